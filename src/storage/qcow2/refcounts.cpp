#include "storage/qcow2/refcounts.hpp"

#include <algorithm>
#include <cstring>
#include <span>

#include "base/checked.hpp"

namespace ring3::storage::qcow2 {
namespace {
constexpr u64 kCacheBytes = u64{8} << 20;
constexpr u64 kMostClusters = u64{1} << 46;  // far more than any host file holds
}  // namespace

Refcounts::Refcounts(File& file, Header& header, ClusterSet& metadata, std::function<int()> write_header)
    : file_(file), header_(header), metadata_(metadata), write_header_(std::move(write_header)),
      bits_(1u << header.refcount_order), per_block_(header.cluster_size() * 8 / bits_),
      cache_(kCacheBytes >> header.cluster_bits) {}

Status Refcounts::load(const std::string& name, bool lenient) {
  const u64 bytes = u64{header_.refcount_table_clusters} << header_.cluster_bits;
  std::vector<u8> raw(bytes);
  if (const int r = file_.read(header_.refcount_table_offset, std::span<u8>(raw)); r < 0) return Error::from_errno(name, -r);
  table_.resize(bytes / 8);
  const i64 size = file_.size();
  for (u64 i = 0; i < header_.refcount_table_clusters; i++) {
    metadata_.insert(header_.cluster_of(header_.refcount_table_offset) + i);
  }
  for (u64 i = 0; i < table_.size(); i++) {
    table_[i] = get64(&raw[i * 8]);
    if (table_[i] == 0) continue;
    const bool sane = header_.in_cluster(table_[i]) == 0 && size > 0 && table_[i] < static_cast<u64>(size);
    const bool fresh = sane && metadata_.insert(header_.cluster_of(table_[i]));
    if (!fresh && !lenient) {
      return Error::of(EINVAL, name + " is corrupt: its refcount table names a block that " +
                                   (sane ? "is in use otherwise" : "cannot be") + " (repair it with: ring3 image check --repair)");
    }
  }
  return Ok{};
}

u64 Refcounts::value(const MetaTable& t, u64 i) const {
  const u8* b = t.bytes().data();
  switch (header_.refcount_order) {
    case 0: return b[i / 8] >> (i % 8) & 1;
    case 1: return b[i / 4] >> (2 * (i % 4)) & 3;
    case 2: return b[i / 2] >> (4 * (i % 2)) & 15;
    case 3: return b[i];
    case 4: return get16(b + 2 * i);
    case 5: return get32(b + 4 * i);
    default: return get64(b + 8 * i);
  }
}

void Refcounts::set_value(MetaTable& t, u64 i, u64 v) {
  u8* b = t.bytes().data();
  const auto sub_byte = [&](u64 width) {
    const u64 per = 8 / width;
    const u32 shift = static_cast<u32>(width * (i % per));
    const u32 mask = ((1u << width) - 1) << shift;
    b[i / per] = static_cast<u8>((b[i / per] & ~mask) | (static_cast<u32>(v) << shift & mask));
  };
  switch (header_.refcount_order) {
    case 0: sub_byte(1); break;
    case 1: sub_byte(2); break;
    case 2: sub_byte(4); break;
    case 3: b[i] = static_cast<u8>(v); break;
    case 4: put16(b + 2 * i, v); break;
    case 5: put32(b + 4 * i, v); break;
    default: put64(b + 8 * i, v); break;
  }
  t.mark(i * bits_ / 8);
}

int Refcounts::block(u64 index, std::shared_ptr<MetaTable>& out) {
  out = nullptr;
  if (index >= table_.size() || table_[index] == 0) return 0;
  out = cache_.find(index);
  if (out) return 0;
  if (header_.in_cluster(table_[index]) != 0) return -EIO;
  auto t = std::make_shared<MetaTable>(table_[index], header_.cluster_size());
  if (const int r = file_.read(t->host_offset(), std::span<u8>(t->bytes())); r < 0) return r;
  cache_.put(index, t);
  out = std::move(t);
  return 0;
}

int Refcounts::get(u64 cluster, u64& v) {
  std::shared_ptr<MetaTable> t;
  if (const int r = block(cluster / per_block_, t); r < 0) return r;
  v = t ? value(*t, cluster % per_block_) : 0;
  return 0;
}

int Refcounts::next_used(u64 cluster, u64 end, u64& found) {
  found = end;
  std::shared_ptr<MetaTable> t;
  if (const int r = block(cluster / per_block_, t); r < 0 || !t) return r;
  const u64 first = cluster / per_block_ * per_block_;
  const std::span<const u8> bytes = t->bytes();
  u64 i = cluster - first;
  const u64 stop = end - first;
  while (i < stop) {
    // A word of zeroes at a time, where one begins here.
    if (const u64 bit = i * bits_; bit % 64 == 0) {
      u64 word = 0;
      std::memcpy(&word, bytes.data() + bit / 8, std::min<u64>(sizeof word, bytes.size() - bit / 8));
      if (word == 0) {
        i += 64 / bits_;
        continue;
      }
    }
    if (value(*t, i) != 0) {
      found = first + i;
      return 0;
    }
    i++;
  }
  return 0;
}

int Refcounts::block_or_new(u64 cluster, std::shared_ptr<MetaTable>& t) {
  if (const int r = block(cluster / per_block_, t); r < 0 || t) return r;
  if (cluster > kMostClusters) return -EIO;
  if (const int r = make_block(cluster / per_block_); r < 0) return r;
  if (const int r = block(cluster / per_block_, t); r < 0) return r;
  return t ? 0 : -EIO;
}

int Refcounts::put(u64 cluster, u64 count) {
  if (count > most()) return -ERANGE;
  std::shared_ptr<MetaTable> t;
  if (const int r = count != 0 ? block_or_new(cluster, t) : block(cluster / per_block_, t); r < 0) return r;
  if (!t) return 0;
  set_value(*t, cluster % per_block_, count);
  if (count == 0 && cluster < hint_) hint_ = cluster;
  return 0;
}

int Refcounts::add(u64 cluster, i64 delta, u64* now) {
  std::shared_ptr<MetaTable> t;
  if (const int r = delta >= 0 ? block_or_new(cluster, t) : block(cluster / per_block_, t); r < 0) return r;
  if (!t) return -EIO;
  const u64 before = value(*t, cluster % per_block_);
  if (delta < 0 ? before < static_cast<u64>(-delta) : most() - before < static_cast<u64>(delta)) {
    return delta < 0 ? -EIO : -ERANGE;
  }
  const u64 after = before + static_cast<u64>(delta);
  set_value(*t, cluster % per_block_, after);
  if (after == 0 && cluster < hint_) hint_ = cluster;
  if (now != nullptr) *now = after;
  return 0;
}

// A block for a range that had none. It stands in the range itself, so that it needs no other.
int Refcounts::make_block(u64 index) {
  if (index >= table_.size()) return kNeedsGrowth;
  const u64 own = index * per_block_;
  if (metadata_.contains(own)) return -EIO;  // used, whatever the refcounts say
  auto t = std::make_shared<MetaTable>(own << header_.cluster_bits, header_.cluster_size());
  t->mark_all();
  set_value(*t, 0, 1);
  table_[index] = t->host_offset();
  new_entries_.push_back(index);
  metadata_.insert(own);
  cache_.put(index, t);
  return 0;
}

// A larger table, with the blocks that cover itself, past everything the old one covers. On the disk when it returns.
int Refcounts::grow() {
  const u64 cluster = header_.cluster_size();
  if (const int r = write_all(); r < 0) return r;
  const u64 start = table_.size() * per_block_;  // the first cluster that nothing covers
  const i64 size = file_.size();
  if (size < 0) return static_cast<int>(size);
  if (start < header_.cluster_of(header_.round_up(static_cast<u64>(size)))) return -EIO;  // used, and not counted
  u64 wanted = table_.size() + table_.size() / 2 + 1;
  u64 table_clusters, blocks = 1;
  for (;;) {
    wanted = std::max(wanted, table_.size() + blocks);
    table_clusters = (wanted * 8 + cluster - 1) / cluster;
    const u64 needed = (blocks + table_clusters + per_block_ - 1) / per_block_;
    if (needed <= blocks) break;
    blocks = needed;
  }
  if (table_clusters * cluster > kMaxRefcountTableBytes) return -EFBIG;
  std::vector<u64> table = table_;
  table.resize(table_clusters * cluster / 8);
  std::vector<std::shared_ptr<MetaTable>> made;
  for (u64 i = 0; i < blocks; i++) {
    made.push_back(std::make_shared<MetaTable>((start + i) << header_.cluster_bits, cluster));
    table[table_.size() + i] = made.back()->host_offset();
  }
  for (u64 c = 0; c < blocks + table_clusters; c++) set_value(*made[c / per_block_], c % per_block_, 1);
  std::vector<u8> raw(table_clusters * cluster);
  for (u64 i = 0; i < table.size(); i++) put64(&raw[i * 8], table[i]);
  for (const auto& t : made) {
    if (const int r = file_.write(t->host_offset(), std::span<const u8>(t->bytes())); r < 0) return r;
  }
  const u64 offset = (start + blocks) << header_.cluster_bits;
  if (const int r = file_.write(offset, std::span<const u8>(raw)); r < 0) return r;
  if (const int r = file_.sync(); r < 0) return r;

  const u64 old_offset = header_.refcount_table_offset;
  const u32 old_clusters = header_.refcount_table_clusters;
  header_.refcount_table_offset = offset;
  header_.refcount_table_clusters = static_cast<u32>(table_clusters);
  int r = write_header_();
  if (r == 0) r = file_.sync();
  if (r < 0) {
    header_.refcount_table_offset = old_offset;
    header_.refcount_table_clusters = old_clusters;
    return r;
  }
  const u64 first_new = table_.size();
  table_ = std::move(table);
  for (u64 i = 0; i < blocks; i++) {
    std::vector<MetaTable::Piece> written;
    MetaTable::take_dirty(made[i], written);
    cache_.put(first_new + i, made[i]);
    metadata_.insert(start + i);
  }
  for (u64 i = 0; i < table_clusters; i++) metadata_.insert(start + blocks + i);
  // The old table is nobody's any more.
  for (u64 i = 0; i < old_clusters; i++) {
    const u64 c = header_.cluster_of(old_offset) + i;
    metadata_.erase(c);
    if (add(c, -1) < 0) break;  // a leak at worst
  }
  return 0;
}

int Refcounts::allocate(u64 want, u64& first, u64& got) {
  got = 0;
  u64 c = hint_;
  std::shared_ptr<MetaTable> t;
  u64 of = ~u64{0};
  while (got < want) {
    if (c > kMostClusters) return -EFBIG;
    if (c / per_block_ != of) {
      if (const int r = block(c / per_block_, t); r < 0) return r;
      if (!t) {
        if (got != 0) break;  // what there is in a row will do; the new block would stand in between
        if (const int r = make_block(c / per_block_); r < 0) return r;
        continue;
      }
      of = c / per_block_;
    }
    // What is known as metadata is never given out, whatever its refcount says.
    if (value(*t, c % per_block_) != 0 || metadata_.contains(c)) {
      if (got != 0) break;
    } else {
      if (got == 0) first = c;
      got++;
    }
    c++;
  }
  for (u64 i = 0; i < got; i++) {
    if (const int r = add(first + i, 1); r < 0) {
      while (i-- > 0) (void)add(first + i, -1);
      return r;
    }
  }
  hint_ = first + got;
  return 0;
}

int Refcounts::used_end(u64& end) {
  end = 0;
  for (u64 i = table_.size(); i-- > 0;) {
    std::shared_ptr<MetaTable> t;
    if (const int r = block(i, t); r < 0) return r;
    if (!t) continue;
    for (u64 j = per_block_; j-- > 0;) {
      if (value(*t, j) != 0) {
        end = i * per_block_ + j + 1;
        return 0;
      }
    }
  }
  return 0;
}

int Refcounts::allocate_at_end(u64 count, u64& first) {
  // One by one from the end on, begun anew where a block comes in between.
  u64 c = 0;
  if (const int r = used_end(c); r < 0) return r;
  const i64 size = file_.size();
  if (size < 0) return static_cast<int>(size);
  c = std::max(c, header_.cluster_of(header_.round_up(static_cast<u64>(size))));
  const u64 keep = hint_;
  for (;;) {
    hint_ = c;
    u64 got = 0;
    const int r = allocate(count, first, got);
    if (r < 0) {
      hint_ = keep;
      return r;
    }
    if (got == count) break;
    for (u64 i = 0; i < got; i++) (void)add(first + i, -1);
    c = first + got;
  }
  hint_ = std::min(keep, first);
  return 0;
}

int Refcounts::write_all() {
  std::vector<MetaTable::Piece> pieces;
  cache_.take_dirty(pieces);
  const std::vector<u64> entries = take_table();
  new_entries_.clear();
  if (pieces.empty() && entries.empty()) return 0;
  int r = 0;
  for (const auto& p : pieces) {
    if (r == 0) r = file_.write(p.host_offset, std::span<const u8>(p.bytes));
  }
  if (r == 0 && !entries.empty()) {
    r = file_.sync();
    for (const u64 i : entries) {
      u8 raw[8];
      put64(raw, table_[i]);
      if (r == 0) r = file_.write(header_.refcount_table_offset + i * 8, std::span<const u8>(raw));
    }
  }
  if (r == 0) r = file_.sync();
  if (r < 0) {
    for (const auto& p : pieces) MetaTable::give_back(p);
    give_back_table(entries);
  }
  return r;
}

}  // namespace ring3::storage::qcow2
