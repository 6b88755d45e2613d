// Writing: in place where a cluster is ours alone, else to new clusters that are linked once the data is there.
#include <algorithm>
#include <cstring>

#include "base/checked.hpp"
#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {
namespace {
constexpr u64 kMostAtOnce = u64{4} << 20;
}

int Qcow2Image::grow(std::unique_lock<std::mutex>& lock) {
  lock.unlock();
  const std::lock_guard commit_lock(commit_mutex_);
  lock.lock();
  const int r = refcounts_->grow();
  const i64 size = file_->size();
  if (r == 0 && size > 0) {
    file_end_ = std::max(file_end_, header_.round_up(static_cast<u64>(size)));
    if (zero_from_ != ~u64{0}) zero_from_ = std::max(zero_from_, file_end_);
  }
  return r;
}

int Qcow2Image::allocate(u64 want, u64& first, u64& got) {
  const int r = refcounts_->allocate(want, first, got);
  if (r < 0) return r;
  const u64 end = (first + got) << header_.cluster_bits;
  file_end_ = std::max(file_end_, end);
  if (zero_from_ != ~u64{0}) zero_from_ = std::max(zero_from_, end);
  return 0;
}

// Waits until nobody changes what these clusters are linked to. Whether it had to wait (then look again).
bool Qcow2Image::lock_clusters(std::unique_lock<std::mutex>& lock, u64 first, u64 count) {
  bool waited = false;
  for (;;) {
    const auto it = busy_clusters_.lower_bound(first);
    if (it == busy_clusters_.end() || *it >= first + count) break;
    waited = true;
    clusters_changed_.wait(lock);
  }
  if (!waited) {
    for (u64 c = first; c < first + count; c++) busy_clusters_.insert(c);
  }
  return waited;
}

void Qcow2Image::unlock_clusters(u64 first, u64 count) {
  busy_clusters_.erase(busy_clusters_.lower_bound(first), busy_clusters_.lower_bound(first + count));
  clusters_changed_.notify_all();
}

// The clusters of an entry that is about to go.
void Qcow2Image::free_later(const Entry& e) {
  if ((e.word & kCompressedFlag) != 0) {
    compressed_at_ = compressed_end_ = 0;  // the cluster may be given to others
    const CompressedSpan s = compressed_span(header_, e.word);
    for (u64 c = header_.cluster_of(s.offset); c <= header_.cluster_of(s.offset + s.length - 1); c++) pending_frees_.push_back(c);
  } else if ((e.word & kOffsetMask) != 0 && in_file(e.word & kOffsetMask)) {
    pending_frees_.push_back(header_.cluster_of(e.word & kOffsetMask));
  }
}

// The L2 table, made or copied when it is absent or shared.
int Qcow2Image::l2_for_write(u64 i, std::shared_ptr<MetaTable>& table) {
  if (const int r = l2(i, table); r < 0) return r;
  if (table && (l1_[i] & kCopied) != 0) return 0;
  u64 first = 0, got = 0;
  if (const int r = allocate(1, first, got); r < 0) return r;
  const u64 at = first << header_.cluster_bits;
  if (table) {
    pending_frees_.push_back(header_.cluster_of(l1_[i] & kOffsetMask));
    metadata_.erase(header_.cluster_of(l1_[i] & kOffsetMask));
    table->move_to(at);
  } else {
    table = std::make_shared<MetaTable>(at, header_.cluster_size());
    table->mark_all();
    l2_cache_.put(i, table);
  }
  metadata_.insert(first);
  l1_[i] = at | kCopied;
  dirty_l1_.insert(i);
  return 0;
}

int Qcow2Image::write(u64 offset, std::span<const iovec> buffers) {
  const u64 length = total_length(buffers);
  if (!writable_) return -EROFS;
  if (!range_within(offset, length, size())) return -EINVAL;
  if (const int r = begin_writing(); r < 0) return r;
  for (u64 done = 0; done < length;) {
    u64 n = 0;
    const auto rest = slice(buffers, done, std::min(length - done, kMostAtOnce));
    if (const int r = write_some(offset + done, rest, n); r < 0) return r;
    done += n;
  }
  return relieve();
}

// When most of the cache is dirty, write it before more is needed.
int Qcow2Image::relieve() {
  bool pressed;
  {
    const std::lock_guard lock(meta_mutex_);
    pressed = (l2_cache_.full() && l2_cache_.dirty_count() > 4) || refcounts_->dirty_pressure() || pending_frees_.size() > 65536;
  }
  return pressed ? commit() : 0;
}

int Qcow2Image::write_some(u64 offset, std::span<const iovec> buffers, u64& done) {
  const u64 length = total_length(buffers);
  std::unique_lock lock(meta_mutex_);
  if (corrupt_) return -EIO;
  Run run;
  if (const int r = run_at(offset, length, run); r < 0) return r;
  if (run.state == State::kData && run.in_place) {
    const u32 token = gate_.enter();
    lock.unlock();
    const int r = file_->write(run.host_offset, slice(buffers, 0, run.length));
    gate_.leave(token);
    done = run.length;
    return r;
  }
  return write_new(lock, offset, buffers, run.length, done);
}

// alike: so many bytes are in the state of the first.
int Qcow2Image::write_new(std::unique_lock<std::mutex>& lock, u64 offset, std::span<const iovec> buffers, u64 alike,
                          u64& done) {
  const u64 cs = header_.cluster_size(), reach = header_.l2_reach();
  const u64 first = header_.cluster_of(offset);
  u64 length = total_length(buffers);
  u64 count = header_.cluster_of(offset + length - 1) - first + 1;
  count = std::min(count, (reach - (first << header_.cluster_bits) % reach) >> header_.cluster_bits);
  done = 0;

  // How many of them want a new place; or one that has a place of its own already.
  std::shared_ptr<MetaTable> t;
  if (const int r = l2(offset / reach, t); r < 0) return r;
  const u64 index = offset % reach >> header_.cluster_bits;
  const Entry old = t ? entry(*t, index) : Entry{};
  const bool own = t && usable(old);
  if (own) {
    // No further than there is no data: others may write data in place meanwhile.
    count = 1;
    length = std::min(length, alike);
  } else if (t) {
    for (u64 i = 1; i < count; i++) {
      const Entry e = entry(*t, index + i);
      if (usable(e)) count = i;
      else if (const int r = check_entry(e); r < 0) return r;
    }
  }
  if (lock_clusters(lock, first, count)) return 0;  // somebody changed something: look again

  u64 host = header_.cluster_of(old.word & kOffsetMask), got = 1;
  bool fresh = false;
  if (!own) {
    const u64 never_used = zero_from_;
    int r = allocate(count, host, got);
    if (r == kNeedsGrowth) {
      r = grow(lock);
      unlock_clusters(first, count);
      return r;
    }
    if (r < 0) {
      unlock_clusters(first, count);
      return r;
    }
    fresh = host << header_.cluster_bits >= never_used;
  }
  // What is written, and the edges of whole (sub)clusters around it.
  const u64 from = offset, to = std::min(offset + length, (first + got) << header_.cluster_bits);
  const bool replaces = !own && old.word != 0 && (old.word & (kOffsetMask | kCompressedFlag)) != 0;
  bool tail_replaces = replaces;
  if (!own && t && got > 1) tail_replaces = (entry(*t, index + got - 1).word & (kOffsetMask | kCompressedFlag)) != 0;
  const u64 sub = header_.subcluster_size();
  const u64 head_unit = replaces ? cs : sub, tail_unit = tail_replaces ? cs : sub;
  const u64 start = from / head_unit * head_unit;
  const u64 end = (to + tail_unit - 1) / tail_unit * tail_unit;
  lock.unlock();

  // The edges keep what they held. Past the disk's end there is nothing to keep.
  const auto keep = [&](u64 a, u64 b, std::vector<u8>& bytes, bool& zeroes) {
    bytes.assign(b - a, 0);
    zeroes = true;
    const u64 limit = std::min(b, size());
    for (u64 at = a; at < limit;) {
      Extent e;
      if (const int r = map(at, limit - at, e); r < 0) return r;
      if (e.kind == Kind::kData || e.kind == Kind::kCompressed) {
        zeroes = false;
        if (const int r = Image::read(at, std::span<u8>(bytes).subspan(at - a, e.length)); r < 0) return r;
      }
      at += e.length;
    }
    return 0;
  };
  std::vector<u8> head, tail;
  bool head_zero = true, tail_zero = true;
  int r = start < from ? keep(start, from, head, head_zero) : 0;
  if (r == 0 && to < end) r = keep(to, end, tail, tail_zero);
  if (r == 0) {
    std::vector<iovec> v;
    u64 at = (host << header_.cluster_bits) + (start - (first << header_.cluster_bits));
    if (!head.empty() && !(fresh && head_zero)) v.push_back({head.data(), head.size()});
    else at += head.size();
    const auto data = slice(buffers, 0, to - from);
    v.insert(v.end(), data.begin(), data.end());
    if (!tail.empty() && !(fresh && tail_zero)) v.push_back({tail.data(), tail.size()});
    r = file_->write(at, v);
  }

  lock.lock();
  while (r == 0) {
    r = link(first, got, host << header_.cluster_bits, start, end, own);
    if (r != kNeedsGrowth) break;
    r = grow(lock);
  }
  if (r < 0 && !own) {
    for (u64 i = 0; i < got; i++) (void)refcounts_->add(host + i, -1);
  }
  unlock_clusters(first, count);
  if (r == 0) done = to - from;
  return r;
}

// Makes the L2 entries of `count` clusters from `first` on point to host_offset. [from, to): the bytes of the disk that
// stand there now, whole subclusters. own: the place is the one they had.
int Qcow2Image::link(u64 first, u64 count, u64 host_offset, u64 from, u64 to, bool own) {
  std::shared_ptr<MetaTable> t;
  const u64 guest = first << header_.cluster_bits;
  if (const int r = l2_for_write(guest / header_.l2_reach(), t); r < 0) return r;
  const u64 index = guest % header_.l2_reach() >> header_.cluster_bits;
  const u64 sub = header_.subcluster_size();
  for (u64 i = 0; i < count; i++) {
    const Entry old = entry(*t, index + i);
    Entry e{(host_offset + (i << header_.cluster_bits)) | kCopied, 0};
    if (header_.extended_l2()) {
      const u64 start = (first + i) << header_.cluster_bits;
      const u64 a = std::max(from, start) - start, b = std::min(to, start + header_.cluster_size()) - start;
      u64 bits = 0;
      for (u64 s = a / sub; s < b / sub; s++) bits |= u64{1} << s;
      const bool keeps = (old.word & kCompressedFlag) == 0;
      e.bitmap = ((keeps ? old.bitmap : 0) & ~(bits << 32)) | bits;
      // Of a place that is left only what was copied counts: the caller copies whole clusters then.
      if (!own && !keeps) e.bitmap = bits;
    }
    if (!own) free_later(old);
    set_entry(*t, index + i, e);
  }
  return 0;
}

int Qcow2Image::discard(u64 offset, u64 length) {
  if (!writable_) return -EROFS;
  if (!range_within(offset, length, size())) return -EINVAL;
  if (const int r = begin_writing(); r < 0) return r;
  const u64 from = header_.round_up(offset);
  // The disk's last cluster may be shorter than the others.
  const u64 end = offset + length;
  const u64 to = end == size() ? header_.round_up(end) : end & ~(header_.cluster_size() - 1);
  return from < to ? change_range(from, to - from, false, true) : 0;
}

int Qcow2Image::write_zeroes(u64 offset, u64 length, bool may_unmap) {
  if (!writable_) return -EROFS;
  if (!range_within(offset, length, size())) return -EINVAL;
  if (const int r = begin_writing(); r < 0) return r;
  const u64 end = offset + length;
  const u64 from = header_.round_up(offset);
  const u64 to = end == size() ? header_.round_up(end) : end & ~(header_.cluster_size() - 1);
  if (from >= to) return zero_bytes(offset, length);
  if (const int r = zero_bytes(offset, from - offset); r < 0) return r;
  // Version 2 has no way to say "zeroes" over a backing file.
  if (header_.version < 3 && backing_) return zero_bytes(from, end - from);
  if (const int r = change_range(from, to - from, true, may_unmap); r < 0) return r;
  return end > to ? zero_bytes(to, end - to) : 0;
}

// Plain zeroes, where there are none yet.
int Qcow2Image::zero_bytes(u64 offset, u64 length) {
  static const std::vector<u8> zeroes(u64{256} << 10);
  while (length != 0) {
    Extent e;
    if (const int r = map(offset, length, e); r < 0) return r;
    u64 n = e.length;
    if (e.kind == Kind::kData || e.kind == Kind::kCompressed) {
      n = std::min<u64>(n, zeroes.size());
      if (const int r = Image::write(offset, std::span<const u8>(zeroes).first(n)); r < 0) return r;
    }
    offset += n;
    length -= n;
  }
  return 0;
}

// Whole clusters, a table's worth at a time.
int Qcow2Image::change_range(u64 offset, u64 length, bool zero, bool may_unmap) {
  u64 c = header_.cluster_of(offset);
  const u64 end = c + (length >> header_.cluster_bits);
  const u64 per_table = u64{1} << header_.l2_bits();
  while (c < end) {
    const u64 n = std::min(end - c, per_table - c % per_table);
    u64 done = 0;
    if (const int r = clear_clusters(c, n, zero, !may_unmap, done); r < 0) return r;
    c += done;
  }
  return relieve();
}

int Qcow2Image::clear_clusters(u64 first, u64 count, bool zero, bool keep, u64& done) {
  std::unique_lock lock(meta_mutex_);
  if (corrupt_) return -EIO;
  if (lock_clusters(lock, first, count)) return 0;
  unlock_clusters(first, count);  // the lock itself is held to the end
  const u64 l1_index = first >> header_.l2_bits();
  const u64 index = first & ((u64{1} << header_.l2_bits()) - 1);
  std::shared_ptr<MetaTable> t;
  if (const int r = l2(l1_index, t); r < 0) return r;
  const bool below = backing_ != nullptr;
  done = count;
  if (!t && !(zero && below)) return 0;  // nothing stands here
  if (!below && t) {
    bool any = false;
    for (u64 i = 0; i < count && !any; i++) any = entry(*t, index + i).word != 0 || entry(*t, index + i).bitmap != 0;
    if (!any) return 0;
  }
  int r = l2_for_write(l1_index, t);
  if (r == kNeedsGrowth) {
    done = 0;
    return grow(lock);
  }
  if (r < 0) return r;
  const bool extended = header_.extended_l2();
  const u64 all_zero = extended ? u64{0xffffffff} << 32 : 0;
  const u64 flag = extended ? 0 : kZeroFlag;
  for (u64 i = 0; i < count; i++) {
    const Entry old = entry(*t, index + i);
    if (r = check_entry(old); r < 0) return r;
    const bool absent = old.word == 0 && old.bitmap == 0;
    Entry e;
    if (!zero && absent) continue;
    if (header_.version < 3) {
      if (below) continue;  // it would show what is below: leave it
    } else if (keep && usable(old)) {
      e = {(old.word & (kOffsetMask | kCopied)) | flag, all_zero};
    } else if (below) {
      e = {flag, all_zero};
    }
    if ((e.word & kOffsetMask) == 0) free_later(old);
    set_entry(*t, index + i, e);
  }
  return 0;
}

int Qcow2Image::write_compressed(u64 offset, std::span<const u8> data) {
  return write_precompressed(offset, data, data.size() == header_.cluster_size() ? compress(data) : std::vector<u8>());
}

int Qcow2Image::write_precompressed(u64 offset, std::span<const u8> data, std::span<const u8> packed) {
  if (packed.empty() || header_.in_cluster(offset) != 0 || data.size() != header_.cluster_size()) return Image::write(offset, data);
  if (!writable_) return -EROFS;
  if (!range_within(offset, std::min<u64>(data.size(), size() - std::min(offset, size())), size())) return -EINVAL;
  if (const int r = begin_writing(); r < 0) return r;
  std::unique_lock lock(meta_mutex_);
  if (corrupt_) return -EIO;
  // Next to the one before where there is room, over a cluster's border if the next one is free.
  for (;;) {
    const u64 cs = header_.cluster_size();
    if (compressed_end_ - compressed_at_ >= packed.size()) break;
    u64 first = 0, got = 0;
    const int r = allocate(1, first, got);
    if (r == kNeedsGrowth) {
      if (const int g = grow(lock); g < 0) return g;
      continue;
    }
    if (r < 0) return r;
    if (compressed_at_ == 0 || first << header_.cluster_bits != compressed_end_) {
      // The rest of the old one stays unused; when nothing stands in it, it is given back.
      if (compressed_at_ != 0 && compressed_end_ - compressed_at_ == cs) (void)refcounts_->add(header_.cluster_of(compressed_at_), -1);
      compressed_at_ = first << header_.cluster_bits;
    }
    compressed_end_ = (first + 1) << header_.cluster_bits;
  }
  const u64 at = compressed_at_;
  const u64 first_host = header_.cluster_of(at), last_host = header_.cluster_of(at + packed.size() - 1);
  // One reference for each compressed cluster in a host cluster; allocate() counted the first.
  for (u64 c = first_host; c <= last_host; c++) {
    const bool counted = header_.in_cluster(at) == 0 || c != first_host;
    if (!counted) {
      if (const int r = refcounts_->add(c, 1); r == -ERANGE) {
        compressed_at_ = compressed_end_ = 0;  // the refcount is at its most: begin a new cluster
        if (last_host != first_host) (void)refcounts_->add(last_host, -1);
        lock.unlock();
        return Image::write(offset, data);
      } else if (r < 0) {
        return r;
      }
    }
  }
  compressed_at_ += packed.size();
  if (header_.in_cluster(compressed_at_) == 0) compressed_at_ = compressed_end_ = 0;
  lock.unlock();
  int r = file_->write(at, packed);
  lock.lock();
  std::shared_ptr<MetaTable> t;
  while (r == 0) {
    r = l2_for_write(offset / header_.l2_reach(), t);
    if (r != kNeedsGrowth) break;
    r = grow(lock);
  }
  if (r < 0) return r;
  const u64 index = offset % header_.l2_reach() >> header_.cluster_bits;
  free_later(entry(*t, index));
  set_entry(*t, index, {compressed_entry(header_, at, packed.size()), 0});
  lock.unlock();
  return relieve();
}

}  // namespace ring3::storage::qcow2
