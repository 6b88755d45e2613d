// How a place on the disk is found in the file, and reading.
#include <zlib.h>
#include <zstd.h>

#include <cstring>

#include "base/checked.hpp"
#include "base/log.hpp"
#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {
namespace {
constexpr u64 kL2CacheBytes = u64{32} << 20;
}

Qcow2Image::Qcow2Image(std::unique_ptr<File> file, Header header, std::string name)
    : file_(std::move(file)), header_(std::move(header)), name_(std::move(name)),
      l2_cache_(kL2CacheBytes >> header_.cluster_bits) {}

Qcow2Image::~Qcow2Image() = default;

Result<std::unique_ptr<Qcow2Image>> Qcow2Image::open(std::unique_ptr<File> file, const std::string& name, OpenOptions o) {
  auto header = Header::read(*file, name);
  if (!header) return header.error();
  std::unique_ptr<Qcow2Image> image(new Qcow2Image(std::move(file), std::move(*header), name));
  if (auto r = image->load(o); !r) return r.error();
  return image;
}

Status Qcow2Image::load(OpenOptions o) {
  writable_ = o.writable;
  if (o.writable && !o.lenient && (header_.incompatible & kCorrupt) != 0) {
    return Error::of(EIO, name_ + " is marked as corrupt; repair it with: ring3 image check --repair");
  }
  const i64 size = file_->size();
  if (size < 0) return Error::from_errno(name_, static_cast<int>(-size));
  file_end_ = header_.round_up(static_cast<u64>(size));
  zero_from_ = file_->grows_with_zeroes() ? file_end_ : ~u64{0};
  if (auto r = load_l1(o); !r) return r;
  if (o.writable || o.lenient) {
    refcounts_ = std::make_unique<Refcounts>(*file_, header_, metadata_, [this] { return write_header_fields(); });
    if (auto r = refcounts_->load(name_, o.lenient); !r) return r;
    if (o.lenient) return Ok{};
    if ((header_.incompatible & kDirty) != 0) {
      auto report = check(Repair::kAll);
      if (!report) return report.error();
      if (report->corruptions_left() != 0) return Error::of(EIO, name_ + " is corrupt; see: ring3 image check");
      log::info("{}: was not closed in good order; repaired", name_);
    }
  }
  return Ok{};
}

Status Qcow2Image::load_l1(OpenOptions o) {
  metadata_.insert(0);
  if (const int r = read_l1(header_.l1_offset, header_.l1_size, l1_); r < 0) return Error::from_errno(name_, -r);
  for (u64 i = 0; i < header_.round_up(u64{header_.l1_size} * 8) >> header_.cluster_bits; i++) {
    metadata_.insert(header_.cluster_of(header_.l1_offset) + i);
  }
  if (header_.snapshot_count != 0) metadata_.insert(header_.cluster_of(header_.snapshots_offset));
  // Table clusters of the refcounts come later (Refcounts::load), and find collisions with these.
  for (u64 i = 0; i < l1_.size(); i++) {
    if (l1_[i] == 0) continue;
    const u64 at = l1_[i] & kOffsetMask;
    const bool sane = (l1_[i] & kL1Reserved) == 0 && header_.in_cluster(at) == 0 && at != 0 && in_file(at);
    if ((!sane || !metadata_.insert(header_.cluster_of(at))) && !o.lenient) {
      return Error::of(EINVAL, name_ + " is corrupt: L1 entry " + std::to_string(i) +
                                   (sane ? " names a cluster that is in use otherwise" : " cannot be") +
                                   " (repair it with: ring3 image check --repair)");
    }
  }
  return Ok{};
}

int Qcow2Image::read_l1(u64 offset, u32 entries, std::vector<u64>& l1) {
  std::vector<u8> raw(u64{entries} * 8);
  if (const int r = file_->read(offset, std::span<u8>(raw)); r < 0) return r;
  l1.resize(entries);
  for (u64 i = 0; i < entries; i++) l1[i] = get64(&raw[i * 8]);
  return 0;
}

int Qcow2Image::corrupt(const char* why) {
  if (!corrupt_) {
    log::error("{} is corrupt: {}; nothing more is written to it (repair it with: ring3 image check --repair)", name_, why);
  }
  corrupt_ = true;
  return -EIO;
}

int Qcow2Image::l2(u64 l1_index, std::shared_ptr<MetaTable>& table) {
  table = nullptr;
  if (l1_index >= l1_.size() || l1_[l1_index] == 0) return 0;
  table = l2_cache_.find(l1_index);
  if (table) return 0;
  const u64 word = l1_[l1_index], at = word & kOffsetMask;
  if ((word & kL1Reserved) != 0 || at == 0 || header_.in_cluster(at) != 0 || !in_file(at)) return corrupt("an L1 entry cannot be");
  auto t = std::make_shared<MetaTable>(at, header_.cluster_size());
  if (const int r = file_->read(at, std::span<u8>(t->bytes())); r < 0) return r;
  l2_cache_.put(l1_index, t);
  table = std::move(t);
  return 0;
}

Qcow2Image::Entry Qcow2Image::entry(const MetaTable& t, u64 index) const {
  if (header_.extended_l2()) return {t.get(index * 16), t.get(index * 16 + 8)};
  return {t.get(index * 8), 0};
}

void Qcow2Image::set_entry(MetaTable& t, u64 index, Entry e) {
  const u64 n = header_.l2_entry_size();
  t.set(index * n, e.word);
  if (n == 16) t.set(index * n + 8, e.bitmap);
}

Qcow2Image::State Qcow2Image::state_of(const Entry& e, u32 sub) const {
  if ((e.word & kCompressedFlag) != 0) return State::kCompressed;
  const bool placed = (e.word & kOffsetMask) != 0;
  if (header_.extended_l2()) {
    if ((e.bitmap >> (32 + sub) & 1) != 0) return placed ? State::kZeroAllocated : State::kZero;
    if (!placed) return State::kAbsent;
    return (e.bitmap >> sub & 1) != 0 ? State::kData : State::kAbsentAllocated;
  }
  if (header_.version >= 3 && (e.word & kZeroFlag) != 0) return placed ? State::kZeroAllocated : State::kZero;
  return placed ? State::kData : State::kAbsent;
}

// What no entry may say.
int Qcow2Image::check_entry(const Entry& e) {
  if ((e.word & kCompressedFlag) != 0) {
    const CompressedSpan s = compressed_span(header_, e.word);
    const bool bits = (e.word & kCopied) != 0 || (header_.extended_l2() && e.bitmap != 0);
    if (bits || s.offset == 0 || !in_file(s.offset)) return corrupt("an entry of a compressed cluster cannot be");
    return 0;
  }
  const u64 at = e.word & kOffsetMask;
  if ((e.word & kL2Reserved) != 0) return corrupt("an L2 entry has reserved bits set");
  if ((header_.version < 3 || header_.extended_l2()) && (e.word & kZeroFlag) != 0) return corrupt("an L2 entry has reserved bits set");
  if (header_.extended_l2()) {
    if ((static_cast<u32>(e.bitmap) & static_cast<u32>(e.bitmap >> 32)) != 0) return corrupt("a subcluster is both data and zeroes");
    if (at == 0 && static_cast<u32>(e.bitmap) != 0) return corrupt("a subcluster has data and no place");
  }
  if (header_.in_cluster(at) != 0) return corrupt("an L2 entry names no whole cluster");
  if (at != 0 && metadata_.contains(header_.cluster_of(at))) return corrupt("an L2 entry names metadata");
  return 0;
}

// Whether a cluster may be written where it stands.
bool Qcow2Image::usable(const Entry& e) const {
  const u64 at = e.word & kOffsetMask;
  return (e.word & kCopied) != 0 && (e.word & kCompressedFlag) == 0 && at != 0 && in_file(at);
}

int Qcow2Image::run_at(u64 offset, u64 most, Run& run) {
  const u64 reach = header_.l2_reach();
  std::shared_ptr<MetaTable> t;
  if (const int r = l2(offset / reach, t); r < 0) return r;
  most = std::min(most, reach - offset % reach);
  run = {};
  if (!t) {
    run.length = most;
    return 0;
  }
  const u64 sub = header_.subcluster_size();
  while (run.length < most) {
    const u64 at = offset + run.length;
    const Entry e = entry(*t, at % reach >> header_.cluster_bits);
    if (header_.in_cluster(at) == 0 || run.length == 0) {
      if (const int r = check_entry(e); r < 0) return run.length != 0 ? 0 : r;
    }
    const u64 inside = header_.in_cluster(at);
    const State s = state_of(e, static_cast<u32>(inside / sub));
    const u64 place = s == State::kData ? (e.word & kOffsetMask) + inside : 0;
    if (run.length == 0) {
      run.state = s;
      run.word = e.word;
      run.host_offset = place;
      run.in_place = s == State::kData && usable(e);
    } else if (s != run.state || (s == State::kData && (place != run.host_offset + run.length || usable(e) != run.in_place))) {
      break;
    }
    // A compressed cluster is a run by itself.
    const u64 step = s == State::kCompressed ? header_.cluster_size() - inside : sub - at % sub;
    run.length += std::min(step, most - run.length);
    if (s == State::kCompressed) break;
  }
  return 0;
}

int Qcow2Image::read_backing(u64 offset, std::span<const iovec> buffers) {
  const u64 length = total_length(buffers);
  const u64 there = backing_ && offset < backing_->size() ? std::min(length, backing_->size() - offset) : 0;
  if (there != 0) {
    const auto part = slice(buffers, 0, there);
    if (const int r = backing_->read(offset, part); r < 0) return r;
  }
  if (there < length) fill_zero(slice(buffers, there, length - there));
  return 0;
}

int Qcow2Image::read(u64 offset, std::span<const iovec> buffers) {
  const u64 length = total_length(buffers);
  if (!range_within(offset, length, size())) return -EINVAL;
  for (u64 done = 0; done < length;) {
    Run run;
    u32 token;
    {
      const std::lock_guard lock(meta_mutex_);
      if (const int r = run_at(offset + done, length - done, run); r < 0) return r;
      token = gate_.enter();
    }
    const auto part = slice(buffers, done, run.length);
    int r = 0;
    switch (run.state) {
      case State::kAbsent:
      case State::kAbsentAllocated: r = read_backing(offset + done, part); break;
      case State::kZero:
      case State::kZeroAllocated: fill_zero(part); break;
      case State::kData: r = file_->read(run.host_offset, part); break;
      case State::kCompressed: r = read_compressed(header_.in_cluster(offset + done), run.word, part); break;
    }
    gate_.leave(token);
    if (r < 0) return r;
    done += run.length;
  }
  return 0;
}

int Qcow2Image::read_compressed(u64 offset, u64 word, std::span<const iovec> buffers) {
  const std::lock_guard lock(unpacked_mutex_);
  if (unpacked_word_ != word || unpacked_.empty()) {
    unpacked_word_ = 0;
    unpacked_.assign(header_.cluster_size(), 0);
    const CompressedSpan s = compressed_span(header_, word);
    std::vector<u8> packed(s.length);
    if (const int r = file_->read(s.offset, std::span<u8>(packed)); r < 0) return r;
    if (const int r = decompress(packed, unpacked_); r < 0) {
      unpacked_.clear();
      return r;
    }
    unpacked_word_ = word;
  }
  copy_to(buffers, unpacked_.data() + offset);
  return 0;
}

int Qcow2Image::decompress(std::span<const u8> from, std::span<u8> to) const {
  if (header_.compression == 1) {
    ZSTD_DCtx* z = ZSTD_createDCtx();
    if (z == nullptr) return -ENOMEM;
    ZSTD_inBuffer in{from.data(), from.size(), 0};
    ZSTD_outBuffer out{to.data(), to.size(), 0};
    std::size_t last_in = 1, last_out = 1;
    bool ok = true;
    while (ok && out.pos < out.size) {
      if (in.pos == last_in && out.pos == last_out) ok = false;  // no progress: cut off
      last_in = in.pos, last_out = out.pos;
      if (ok) ok = ZSTD_isError(ZSTD_decompressStream(z, &out, &in)) == 0;
    }
    ZSTD_freeDCtx(z);
    return ok ? 0 : -EIO;
  }
  z_stream z{};
  z.next_in = const_cast<u8*>(from.data());
  z.avail_in = static_cast<uInt>(from.size());
  z.next_out = to.data();
  z.avail_out = static_cast<uInt>(to.size());
  if (inflateInit2(&z, -15) != Z_OK) return -ENOMEM;
  const int r = inflate(&z, Z_FINISH);
  const bool ok = (r == Z_STREAM_END || r == Z_BUF_ERROR || r == Z_OK) && z.avail_out == 0;
  inflateEnd(&z);
  return ok ? 0 : -EIO;
}

std::vector<u8> Qcow2Image::compress(std::span<const u8> cluster) const {
  std::vector<u8> out(cluster.size());
  if (header_.compression == 1) {
    const std::size_t n = ZSTD_compress(out.data(), out.size() - 1, cluster.data(), cluster.size(), 3);
    if (ZSTD_isError(n) != 0) return {};
    out.resize(n);
    return out;
  }
  z_stream z{};
  if (deflateInit2(&z, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 9, Z_DEFAULT_STRATEGY) != Z_OK) return {};
  z.next_in = const_cast<u8*>(cluster.data());
  z.avail_in = static_cast<uInt>(cluster.size());
  z.next_out = out.data();
  z.avail_out = static_cast<uInt>(out.size() - 1);
  const bool ok = deflate(&z, Z_FINISH) == Z_STREAM_END;
  out.resize(ok ? z.total_out : 0);
  deflateEnd(&z);
  return out;
}

int Qcow2Image::map(u64 offset, u64 length, Extent& e) {
  if (length == 0 || !range_within(offset, length, size())) return -EINVAL;
  Run run;
  {
    const std::lock_guard lock(meta_mutex_);
    if (const int r = run_at(offset, length, run); r < 0) return r;
  }
  e = {};
  e.length = run.length;
  switch (run.state) {
    case State::kAbsent:
    case State::kAbsentAllocated:
      if (backing_ && offset < backing_->size()) {
        if (const int r = backing_->map(offset, std::min(run.length, backing_->size() - offset), e); r < 0) return r;
        e.depth++;
      }
      break;
    case State::kZero:
    case State::kZeroAllocated: e.kind = Kind::kZero; break;
    case State::kCompressed: e.kind = Kind::kCompressed; break;
    case State::kData:
      e.kind = Kind::kData;
      e.has_offset = true;
      e.host_offset = run.host_offset;
      break;
  }
  return 0;
}

Image::Direct Qcow2Image::begin_direct(bool write, u64 offset, std::span<const iovec> buffers) {
  const u64 length = total_length(buffers);
  if (length == 0 || (write && !writable_) || !range_within(offset, length, size())) return {};
  {
    const std::lock_guard lock(meta_mutex_);
    if (write && corrupt_) return {};
    // Only what is in memory already: this must not wait for the host.
    const u64 table = offset / header_.l2_reach();
    if (table < l1_.size() && l1_[table] != 0 && !l2_cache_.find(table)) return {};
    Run run;
    if (run_at(offset, length, run) < 0 || run.length != length) return {};
    if (run.state == State::kData) {
      if (write && !run.in_place) return {};
      const int fd = file_->direct_fd(run.host_offset, buffers);
      if (fd < 0) return {};
      return {fd, run.host_offset, gate_.enter(), nullptr};
    }
    if (write || (run.state != State::kAbsent && run.state != State::kAbsentAllocated)) return {};
  }
  // The images below are only read: nothing there moves, whatever is written here meanwhile.
  if (!backing_ || !range_within(offset, length, backing_->size())) return {};
  Direct below = backing_->begin_direct(false, offset, buffers);
  if (below.fd >= 0 && below.below == nullptr) below.below = backing_.get();
  return below;
}

void Qcow2Image::end_direct(const Direct& direct) {
  if (direct.below == nullptr) return gate_.leave(direct.token);
  Direct own = direct;
  own.below = nullptr;
  direct.below->end_direct(own);
}

}  // namespace ring3::storage::qcow2
