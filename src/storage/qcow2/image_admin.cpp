// Making images, their size, and snapshots: work on an image that nobody else uses meanwhile.
#include <algorithm>
#include <cstring>

#include "base/checked.hpp"
#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {
namespace {

Error failed(const std::string& what, int r) { return Error::from_errno(what, -r); }

}  // namespace

Status Qcow2Image::create(File& file, const CreateOptions& o) {
  Header h;
  h.version = o.version;
  h.cluster_bits = o.cluster_bits;
  h.size = o.size;
  h.refcount_order = o.refcount_order;
  h.backing_file = o.backing_file;
  h.backing_format = o.backing_format;
  if (o.extended_l2) h.incompatible |= kExtendedL2;
  if (o.zstd) h.incompatible |= kCompressionType, h.compression = 1;
  if (o.lazy_refcounts) h.compatible |= kLazyRefcounts;
  if (o.version != 2 && o.version != 3) return Error::of(EINVAL, "qcow2 has versions 2 and 3");
  if (o.cluster_bits < kMinClusterBits || o.cluster_bits > kMaxClusterBits) {
    return Error::of(EINVAL, "the cluster size is a power of two from 512 to 2M");
  }
  if (o.refcount_order > 6) return Error::of(EINVAL, "refcounts have 1, 2, 4, 8, 16, 32 or 64 bits");
  if (o.version == 2 && (o.refcount_order != 4 || o.extended_l2 || o.zstd || o.lazy_refcounts)) {
    return Error::of(EINVAL, "qcow2 version 2 (compat=0.10) has none of lazy refcounts, extended L2, zstd and other refcount sizes");
  }
  if (o.extended_l2 && o.cluster_bits < 14) return Error::of(EINVAL, "extended L2 entries want clusters of 16K or more");
  if (o.size > u64{1} << 62 || h.l1_needed(o.size) * 8 > kMaxL1Bytes) {
    return Error::of(EFBIG, "a disk of this size wants larger clusters (cluster_size)");
  }
  const u64 cs = h.cluster_size();
  h.l1_size = static_cast<u32>(std::max<u64>(1, h.l1_needed(o.size)));
  const u64 l1_clusters = h.round_up(u64{h.l1_size} * 8) >> h.cluster_bits;
  const u64 per_block = cs * 8 >> h.refcount_order;
  // Header, refcount table (one cluster), blocks, L1 table.
  u64 blocks = 1;
  while (blocks * per_block < 2 + blocks + l1_clusters) blocks++;
  if (blocks * 8 > cs) return Error::of(EINVAL, "this combination of cluster size and refcount size does not work; use larger clusters");
  h.refcount_table_offset = cs;
  h.refcount_table_clusters = 1;
  h.l1_offset = (2 + blocks) << h.cluster_bits;
  std::vector<u8> table(cs), counts(blocks * cs), l1(l1_clusters * cs);
  for (u64 i = 0; i < blocks; i++) put64(&table[i * 8], (2 + i) << h.cluster_bits);
  for (u64 c = 0; c < 2 + blocks + l1_clusters; c++) {
    switch (h.refcount_order) {
      case 0: counts[c / 8] = static_cast<u8>(counts[c / 8] | 1u << c % 8); break;
      case 1: counts[c / 4] = static_cast<u8>(counts[c / 4] | 1u << 2 * (c % 4)); break;
      case 2: counts[c / 2] = static_cast<u8>(counts[c / 2] | 1u << 4 * (c % 2)); break;
      default: counts[(c + 1) * (u64{1} << h.refcount_order) / 8 - 1] = 1; break;  // big-endian
    }
  }
  auto first = h.serialize();
  if (!first) return first.error();
  int r = file.write(cs, std::span<const u8>(table));
  if (r == 0) r = file.write(2 * cs, std::span<const u8>(counts));
  if (r == 0) r = file.write(h.l1_offset, std::span<const u8>(l1));
  if (r == 0) r = file.sync();
  if (r == 0) r = file.write(0, std::span<const u8>(*first));
  if (r == 0) r = file.sync();
  if (r < 0) return failed("writing the image", r);
  return Ok{};
}

int Qcow2Image::preallocate(Preallocation mode, u64 from, u64 to, const std::function<void(u64)>& progress) {
  if (mode == Preallocation::kOff) return 0;
  u64 at = from & ~(header_.cluster_size() - 1);
  const u64 end = header_.round_up(to);
  while (at < end) {
    std::unique_lock lock(meta_mutex_);
    Run run;
    const u64 most = std::min({end - at, header_.l2_reach() - at % header_.l2_reach(), u64{64} << 20});
    if (const int r = run_at(at, most, run); r < 0) return r;
    if (run.state != State::kAbsent) {
      at += run.length;
      continue;
    }
    u64 host = 0, got = 0;
    int r = allocate(run.length >> header_.cluster_bits, host, got);
    if (r == kNeedsGrowth) {
      if (r = grow(lock); r < 0) return r;
      continue;
    }
    if (r < 0) return r;
    const u64 place = host << header_.cluster_bits, bytes = got << header_.cluster_bits;
    const i64 size = file_->size();
    if (size < 0) return static_cast<int>(size);
    if (static_cast<u64>(size) < place + bytes && (r = file_->truncate(place + bytes)) < 0) return r;
    if (mode == Preallocation::kFalloc && (r = file_->reserve(place, bytes)) < 0) return r;
    if (mode == Preallocation::kFull) {
      const std::vector<u8> zeroes(u64{1} << 20);
      for (u64 done = 0; done < bytes; done += zeroes.size()) {
        if (r = file_->write(place + done, std::span(zeroes).first(std::min<u64>(zeroes.size(), bytes - done))); r < 0) return r;
      }
    }
    do {
      r = link(header_.cluster_of(at), got, place, at, at + bytes, false);
    } while (r == kNeedsGrowth && (r = grow(lock)) == 0);
    if (r < 0) return r;
    lock.unlock();
    at += bytes;
    progress(std::min(at, to));
    if (r = relieve(); r < 0) return r;
  }
  return commit();
}

int Qcow2Image::allocate_offline(u64 clusters, u64& first) {
  for (;;) {
    int r = refcounts_->allocate_at_end(clusters, first);
    if (r == kNeedsGrowth) r = refcounts_->grow();
    else {
      if (r == 0) file_end_ = std::max(file_end_, (first + clusters) << header_.cluster_bits);
      if (r == 0 && zero_from_ != ~u64{0}) zero_from_ = std::max(zero_from_, file_end_);
      return r;
    }
    if (r < 0) return r;
  }
}

// The bytes in clusters of their own, refcounts written; on the disk after the next sync.
int Qcow2Image::write_new_place(std::span<const u8> bytes, u64& offset) {
  const u64 clusters = std::max<u64>(1, header_.round_up(bytes.size()) >> header_.cluster_bits);
  u64 first = 0;
  if (const int r = allocate_offline(clusters, first); r < 0) return r;
  if (const int r = refcounts_->write_all(); r < 0) return r;
  offset = first << header_.cluster_bits;
  std::vector<u8> padded(clusters << header_.cluster_bits);
  if (!bytes.empty()) std::memcpy(padded.data(), bytes.data(), bytes.size());
  return file_->write(offset, std::span<const u8>(padded));
}

int Qcow2Image::write_l1_place(const std::vector<u64>& l1, u64& offset) {
  std::vector<u8> raw(l1.size() * 8);
  for (std::size_t i = 0; i < l1.size(); i++) put64(&raw[i * 8], l1[i]);
  return write_new_place(raw, offset);
}

// Everything on the disk, no cache.
int Qcow2Image::settle() {
  if (!writable_) return -EROFS;
  if (const int r = begin_writing(); r < 0) return r;
  for (int i = 0; i < 2; i++) {
    if (const int r = commit(); r < 0) return r;
  }
  compressed_at_ = compressed_end_ = 0;
  l2_cache_.clear();
  return 0;
}

int Qcow2Image::drop_clusters(u64 offset, u64 bytes) {
  if (offset == 0) return 0;
  for (u64 at = offset; at < offset + std::max<u64>(bytes, 1); at += header_.cluster_size()) {
    metadata_.erase(header_.cluster_of(at));
    if (const int r = refcounts_->add(header_.cluster_of(at), -1); r < 0) return r;
  }
  return 0;
}

Status Qcow2Image::resize(u64 size, const std::function<void(u64 done, u64 total)>& progress) {
  // A piece at a time, so that there is something to tell; whole clusters.
  const auto by_pieces = [&](u64 from, u64 to, const auto& change) {
    constexpr u64 kPiece = u64{1} << 30;
    for (u64 at = from; at < to; at = std::min(to, at + kPiece)) {
      if (const int r = change(at, std::min(to - at, kPiece)); r < 0) return r;
      if (progress) progress(std::min(to, at + kPiece) - from, to - from);
    }
    return 0;
  };
  const std::string what = "resizing " + name_;
  if (size > u64{1} << 62 || header_.l1_needed(size) * 8 > kMaxL1Bytes) {
    return Error::of(EFBIG, name_ + ": a disk of this size wants larger clusters");
  }
  if (header_.snapshot_count != 0 && header_.version < 3) {
    return Error::of(ENOTSUP, name_ + " has snapshots, and version 2 cannot keep their size: delete them first");
  }
  const u64 old_size = header_.size;
  if (size < old_size) {
    const u64 from = header_.round_up(size);
    if (const int r = by_pieces(from, old_size, [&](u64 at, u64 n) { return discard(at, n); }); r < 0) return failed(what, r);
    // A discard leaves "zeroes" over a backing file: nothing of the disk may stand past its end when it grows again.
    if (size % header_.cluster_size() != 0) {
      if (const int r = zero_bytes(size, std::min(from, old_size) - size); r < 0) return failed(what, r);
    }
  }
  if (const int r = settle(); r < 0) return failed(what, r);
  const u64 needed = header_.l1_needed(size);
  const Header before = header_;
  u64 old_l1_bytes = 0;
  if (needed > header_.l1_size) {
    std::vector<u64> l1 = l1_;
    l1.resize(std::max<u64>(needed, 1));
    u64 offset = 0;
    int r = write_l1_place(l1, offset);
    if (r == 0) r = file_->sync();
    if (r < 0) return failed(what, r);
    old_l1_bytes = u64{header_.l1_size} * 8;
    header_.l1_offset = offset;
    header_.l1_size = static_cast<u32>(l1.size());
    l1_ = std::move(l1);
    for (u64 at = 0; at < u64{header_.l1_size} * 8; at += header_.cluster_size()) metadata_.insert(header_.cluster_of(offset + at));
  }
  header_.size = size;
  int r = write_header_fields();
  if (r == 0) r = file_->sync();
  if (r == 0 && old_l1_bytes != 0) {
    r = drop_clusters(before.l1_offset, old_l1_bytes);
    if (r == 0) r = refcounts_->write_all();
  }
  if (r < 0) return failed(what, r);
  // What a backing file has past the old end must not appear.
  if (size > old_size && backing_ && backing_->size() > old_size) {
    const u64 start = std::min(header_.round_up(old_size), std::min(size, backing_->size()));
    r = write_zeroes(old_size, start - old_size, true);
    if (r == 0) r = by_pieces(start, std::min(size, backing_->size()), [&](u64 at, u64 n) { return write_zeroes(at, n, true); });
    if (r == 0) r = commit();
    if (r < 0) return failed(what, r);
  }
  return Ok{};
}

// ---- snapshots ----

Result<std::vector<SnapshotInfo>> Qcow2Image::load_snapshots(u64& table_bytes) {
  std::vector<SnapshotInfo> list;
  u64 at = header_.snapshots_offset;
  const u64 start = at;
  const auto bad = [&](const char* why) { return Error::of(EINVAL, name_ + " is corrupt: its snapshot table " + why); };
  for (u32 i = 0; i < header_.snapshot_count; i++) {
    u8 b[40];
    if (at - start > kMaxSnapshotBytes || at >= file_end_) return bad("is too long");
    if (const int r = file_->read(at, std::span<u8>(b)); r < 0) return failed(name_, r);
    SnapshotInfo s;
    s.l1_offset = get64(b);
    s.l1_size = get32(b + 8);
    const u16 id_size = get16(b + 12), name_size = get16(b + 14);
    s.seconds = get32(b + 16);
    s.nanoseconds = get32(b + 20);
    s.vm_clock_ns = get64(b + 24);
    s.vm_state_size = get32(b + 32);
    const u32 extra = get32(b + 36);
    if (extra > 1024) return bad("has an entry that cannot be");
    std::vector<u8> rest(u64{extra} + id_size + name_size);
    if (const int r = file_->read(at + 40, std::span<u8>(rest)); r < 0) return failed(name_, r);
    s.extra.assign(rest.begin(), rest.begin() + extra);
    if (extra >= 8) s.vm_state_size = get64(rest.data());
    s.disk_size = extra >= 16 ? get64(rest.data() + 8) : header_.size;
    s.id.assign(rest.begin() + extra, rest.begin() + extra + id_size);
    s.name.assign(rest.begin() + extra + id_size, rest.end());
    if (u64{s.l1_size} * 8 > kMaxL1Bytes || header_.in_cluster(s.l1_offset) != 0 || s.l1_offset == 0 ||
        !range_within(s.l1_offset, u64{s.l1_size} * 8, file_end_)) {
      return bad("names an L1 table that cannot be");
    }
    at = (at + 40 + rest.size() + 7) & ~u64{7};
    list.push_back(std::move(s));
  }
  table_bytes = at - start;
  return list;
}

Result<std::vector<SnapshotInfo>> Qcow2Image::snapshots() {
  u64 bytes = 0;
  return load_snapshots(bytes);
}

int Qcow2Image::write_snapshot_table(const std::vector<SnapshotInfo>& list, u64& offset) {
  std::vector<u8> raw;
  for (const SnapshotInfo& s : list) {
    std::vector<u8> extra = s.extra;
    if (header_.version >= 3 && extra.size() < 16) extra.resize(16);
    if (extra.size() >= 8) put64(extra.data(), s.vm_state_size);
    if (extra.size() >= 16) put64(extra.data() + 8, s.disk_size);
    const std::size_t at = raw.size();
    raw.resize(at + 40);
    u8* b = &raw[at];
    put64(b, s.l1_offset);
    put32(b + 8, s.l1_size);
    put16(b + 12, s.id.size());
    put16(b + 14, s.name.size());
    put32(b + 16, s.seconds);
    put32(b + 20, s.nanoseconds);
    put64(b + 24, s.vm_clock_ns);
    put32(b + 32, std::min<u64>(s.vm_state_size, 0xffffffff));
    put32(b + 36, extra.size());
    raw.insert(raw.end(), extra.begin(), extra.end());
    raw.insert(raw.end(), s.id.begin(), s.id.end());
    raw.insert(raw.end(), s.name.begin(), s.name.end());
    raw.resize((raw.size() + 7) & ~std::size_t{7});
  }
  offset = 0;
  return raw.empty() ? 0 : write_new_place(raw, offset);
}

// Adds delta to the refcount of all that a tree names: its L2 tables and their clusters.
int Qcow2Image::change_tree(const std::vector<u64>& l1, i64 delta) {
  std::vector<u8> raw(header_.cluster_size());
  for (const u64 word : l1) {
    const u64 table = word & kOffsetMask;
    if (table == 0) continue;
    if (header_.in_cluster(table) != 0 || !in_file(table)) return -EIO;
    if (const int r = file_->read(table, std::span<u8>(raw)); r < 0) return r;
    for (u64 at = 0; at < raw.size(); at += header_.l2_entry_size()) {
      const u64 e = get64(&raw[at]);
      u64 first = 0, last = 0;
      if ((e & kCompressedFlag) != 0) {
        const CompressedSpan s = compressed_span(header_, e);
        first = header_.cluster_of(s.offset);
        last = header_.cluster_of(s.offset + s.length - 1);
      } else {
        first = last = header_.cluster_of(e & kOffsetMask);
      }
      if (first == 0) continue;
      for (u64 c = first; c <= last; c++) {
        if (const int r = refcounts_->add(c, delta); r < 0) return r;
      }
    }
    if (const int r = refcounts_->add(header_.cluster_of(table), delta); r < 0) return r;
  }
  return 0;
}

// Sets the "copied" flags of the active tables to what the refcounts say; or clears them all.
int Qcow2Image::refresh_copied(bool clear_only) {
  std::vector<u8> raw(header_.cluster_size());
  const auto wanted = [&](u64 offset, bool& copied) {
    u64 refs = 0;
    copied = false;
    if (clear_only) return 0;
    const int r = refcounts_->get(header_.cluster_of(offset), refs);
    copied = refs == 1;
    return r;
  };
  std::vector<u64> l1 = l1_;
  for (u64& word : l1) {
    const u64 table = word & kOffsetMask;
    if (table == 0) continue;
    if (const int r = file_->read(table, std::span<u8>(raw)); r < 0) return r;
    bool changed = false, copied = false;
    for (u64 at = 0; at < raw.size(); at += header_.l2_entry_size()) {
      const u64 e = get64(&raw[at]);
      if ((e & kCompressedFlag) != 0 || (e & kOffsetMask) == 0) continue;
      if (const int r = wanted(e & kOffsetMask, copied); r < 0) return r;
      const u64 now = (e & ~kCopied) | (copied ? kCopied : 0);
      if (now != e) put64(&raw[at], now), changed = true;
    }
    if (changed) {
      if (const int r = file_->write(table, std::span<const u8>(raw)); r < 0) return r;
    }
    if (const int r = wanted(table, copied); r < 0) return r;
    word = (word & ~kCopied) | (copied ? kCopied : 0);
  }
  std::vector<u8> words(l1.size() * 8);
  for (std::size_t i = 0; i < l1.size(); i++) put64(&words[i * 8], l1[i]);
  if (const int r = file_->write(header_.l1_offset, std::span<const u8>(words)); r < 0) return r;
  if (const int r = file_->sync(); r < 0) return r;
  l1_ = std::move(l1);
  l2_cache_.clear();
  return 0;
}

Status Qcow2Image::create_snapshot(const std::string& snapshot_name, u64 seconds, u32 nanoseconds) {
  const std::string what = "snapshot of " + name_;
  u64 old_bytes = 0;
  auto list = load_snapshots(old_bytes);
  if (!list) return list.error();
  if (list->size() >= kMaxSnapshots) return Error::of(EFBIG, name_ + " has as many snapshots as it can");
  if (snapshot_name.empty() || snapshot_name.size() > 255) return Error::of(EINVAL, "the name of a snapshot has 1 to 255 characters");
  u64 highest = 0;
  for (const auto& s : *list) {
    if (s.name == snapshot_name) return Error::of(EEXIST, name_ + " has a snapshot '" + snapshot_name + "' already");
    highest = std::max<u64>(highest, std::strtoul(s.id.c_str(), nullptr, 10));
  }
  if (header_.refcount_order == 0) return Error::of(ENOTSUP, name_ + ": refcounts of one bit cannot count snapshots");
  if (const int r = settle(); r < 0) return failed(what, r);
  // Nothing is written in place from here on; then all is counted; then the snapshot exists.
  SnapshotInfo s;
  s.id = std::to_string(highest + 1);
  s.name = snapshot_name;
  s.disk_size = header_.size;
  s.seconds = seconds;
  s.nanoseconds = nanoseconds;
  s.l1_size = header_.l1_size;
  int r = refresh_copied(true);
  if (r == 0) r = write_l1_place(l1_, s.l1_offset);
  if (r == 0) r = change_tree(l1_, +1);
  if (r == 0) r = refcounts_->write_all();
  if (r == -ERANGE) {
    corrupt_ = true;  // counted half-way: the image has to be checked
    return Error::of(ERANGE, name_ + ": a cluster has as many users as its refcount can say (repair the leaks with: ring3 image check --repair)");
  }
  u64 table = 0;
  list->push_back(s);
  if (r == 0) r = write_snapshot_table(*list, table);
  if (r == 0) r = file_->sync();
  if (r < 0) return failed(what, r);
  const u64 old_table = header_.snapshots_offset;
  header_.snapshots_offset = table;
  header_.snapshot_count = static_cast<u32>(list->size());
  r = write_header_fields();
  if (r == 0) r = file_->sync();
  if (r == 0 && list->size() > 1) r = drop_clusters(old_table, old_bytes);
  if (r == 0) r = refcounts_->write_all();
  if (r == 0) metadata_.insert(header_.cluster_of(table));
  if (r < 0) return failed(what, r);
  return Ok{};
}

namespace {
Result<std::size_t> find_snapshot(const std::vector<SnapshotInfo>& list, const std::string& wanted, const std::string& image) {
  for (std::size_t i = 0; i < list.size(); i++) {
    if (list[i].name == wanted) return i;
  }
  for (std::size_t i = 0; i < list.size(); i++) {
    if (list[i].id == wanted) return i;
  }
  return Error::of(ENOENT, image + " has no snapshot '" + wanted + "' (see: ring3 image snapshot --list)");
}
}  // namespace

Status Qcow2Image::delete_snapshot(const std::string& id_or_name) {
  const std::string what = "deleting a snapshot of " + name_;
  u64 old_bytes = 0;
  auto list = load_snapshots(old_bytes);
  if (!list) return list.error();
  auto index = find_snapshot(*list, id_or_name, name_);
  if (!index) return index.error();
  if (const int r = settle(); r < 0) return failed(what, r);
  const SnapshotInfo s = (*list)[*index];
  std::vector<u64> l1;
  int r = read_l1(s.l1_offset, s.l1_size, l1);
  list->erase(list->begin() + static_cast<long>(*index));
  u64 table = 0;
  if (r == 0) r = write_snapshot_table(*list, table);
  if (r == 0) r = file_->sync();
  if (r < 0) return failed(what, r);
  const u64 old_table = header_.snapshots_offset;
  header_.snapshots_offset = table;
  header_.snapshot_count = static_cast<u32>(list->size());
  r = write_header_fields();
  if (r == 0) r = file_->sync();
  if (r == 0) r = drop_clusters(old_table, old_bytes);
  if (r == 0) r = change_tree(l1, -1);
  if (r == 0) r = drop_clusters(s.l1_offset, u64{s.l1_size} * 8);
  if (r == 0) r = refcounts_->write_all();
  if (r == 0) r = refresh_copied(false);
  if (r == 0 && table != 0) metadata_.insert(header_.cluster_of(table));
  if (r < 0) return failed(what, r);
  return Ok{};
}

Status Qcow2Image::apply_snapshot(const std::string& id_or_name) {
  const std::string what = "going back to a snapshot of " + name_;
  auto list = snapshots();
  if (!list) return list.error();
  auto index = find_snapshot(*list, id_or_name, name_);
  if (!index) return index.error();
  const SnapshotInfo& s = (*list)[*index];
  if (const int r = settle(); r < 0) return failed(what, r);
  std::vector<u64> l1, old = l1_;
  if (header_.l1_needed(s.disk_size) > s.l1_size) return Error::of(EINVAL, name_ + " is corrupt: the snapshot's L1 table is too small");
  int r = read_l1(s.l1_offset, s.l1_size, l1);
  for (u64& word : l1) word &= ~kCopied;
  u64 offset = 0;
  if (r == 0) r = change_tree(l1, +1);
  if (r == 0) r = refcounts_->write_all();
  if (r == 0) r = write_l1_place(l1, offset);
  if (r == 0) r = file_->sync();
  if (r < 0) return failed(what, r);
  const u64 old_offset = header_.l1_offset, old_bytes = u64{header_.l1_size} * 8;
  header_.l1_offset = offset;
  header_.l1_size = static_cast<u32>(l1.size());
  header_.size = s.disk_size;
  r = write_header_fields();
  if (r == 0) r = file_->sync();
  l1_ = std::move(l1);
  l2_cache_.clear();
  if (r == 0) r = change_tree(old, -1);
  if (r == 0) r = drop_clusters(old_offset, old_bytes);
  if (r == 0) r = refcounts_->write_all();
  if (r == 0) r = refresh_copied(false);
  if (r < 0) return failed(what, r);
  return Ok{};
}

Status Qcow2Image::show_snapshot(const std::string& id_or_name) {
  if (writable_) return Error::of(EINVAL, "a snapshot is shown read-only");
  auto list = snapshots();
  if (!list) return list.error();
  auto index = find_snapshot(*list, id_or_name, name_);
  if (!index) return index.error();
  const SnapshotInfo& s = (*list)[*index];
  if (header_.l1_needed(s.disk_size) > s.l1_size) return Error::of(EINVAL, name_ + " is corrupt: the snapshot's L1 table is too small");
  if (const int r = read_l1(s.l1_offset, s.l1_size, l1_); r < 0) return failed(name_, r);
  header_.size = s.disk_size;
  l2_cache_.clear();
  return Ok{};
}

}  // namespace ring3::storage::qcow2
