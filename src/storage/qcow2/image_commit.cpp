// Bringing metadata to the disk, in an order that leaves nothing but leaks when it is cut off anywhere.
#include <algorithm>

#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {

int Qcow2Image::flush() {
  if (!writable_) return 0;
  return commit();
}

int Qcow2Image::close() {
  if (!writable_) return 0;
  if (const int r = commit(); r < 0) return r;
  if (const int r = commit(); r < 0) return r;  // the decrements that the first one set free
  // Old readers take the last compressed cluster in whole sectors.
  const i64 size = file_->size();
  if (size > 0 && size % 512 != 0) return file_->truncate((static_cast<u64>(size) + 511) & ~u64{511});
  return 0;
}

int Qcow2Image::begin_writing() {
  const std::lock_guard lock(meta_mutex_);
  if (corrupt_) return -EIO;
  if (owns_format_) return 0;
  if (header_.autoclear != 0) {
    header_.autoclear = 0;
    int r = write_header_fields();
    if (r == 0) r = file_->sync();
    if (r < 0) return r;
  }
  owns_format_ = true;
  return 0;
}

// All fields that change stand in the first 512 bytes, which a disk writes as a whole.
int Qcow2Image::write_header_fields() {
  u8 b[512];
  if (const int r = file_->read(0, std::span<u8>(b)); r < 0) return r;
  put64(b + 24, header_.size);
  put32(b + 36, header_.l1_size);
  put64(b + 40, header_.l1_offset);
  put64(b + 48, header_.refcount_table_offset);
  put32(b + 56, header_.refcount_table_clusters);
  put32(b + 60, header_.snapshot_count);
  put64(b + 64, header_.snapshots_offset);
  if (header_.version >= 3) {
    put64(b + 72, header_.incompatible);
    put64(b + 80, header_.compatible);
    put64(b + 88, header_.autoclear);
  }
  return file_->write(0, std::span<const u8>(b));
}

int Qcow2Image::commit() {
  const std::lock_guard commit_lock(commit_mutex_);
  std::vector<MetaTable::Piece> blocks, tables;
  std::vector<u64> block_entries, frees;
  std::vector<std::pair<u64, u64>> l1_words;
  std::vector<std::pair<u64, u64>> block_words;
  {
    const std::lock_guard lock(meta_mutex_);
    if (corrupt_) return -EIO;
    refcounts_->take_dirty(blocks);
    block_entries = refcounts_->take_table();
    for (const u64 i : block_entries) block_words.push_back({i, refcounts_->table()[i]});
    l2_cache_.take_dirty(tables);
    for (const u64 i : dirty_l1_) l1_words.push_back({i, l1_[i]});
    dirty_l1_.clear();
    frees.swap(pending_frees_);
  }
  int r = 0;
  const auto write_pieces = [&](const std::vector<MetaTable::Piece>& pieces) {
    for (const auto& p : pieces) {
      if (r == 0) r = file_->write(p.host_offset, std::span<const u8>(p.bytes));
    }
  };
  const auto write_words = [&](u64 base, const std::vector<std::pair<u64, u64>>& words) {
    for (std::size_t i = 0; i < words.size() && r == 0;) {
      std::size_t n = 1;  // neighbours together
      while (i + n < words.size() && words[i + n].first == words[i].first + n) n++;
      std::vector<u8> raw(n * 8);
      for (std::size_t j = 0; j < n; j++) put64(&raw[j * 8], words[i + j].second);
      r = file_->write(base + words[i].first * 8, std::span<const u8>(raw));
      i += n;
    }
  };
  const auto sync = [&] {
    if (r == 0) r = file_->sync();
  };
  write_pieces(blocks);
  sync();  // the blocks; and the data that what follows will refer to
  if (!block_words.empty()) {
    write_words(header_.refcount_table_offset, block_words);
    sync();
  }
  if (!tables.empty()) {
    write_pieces(tables);
    sync();
  }
  if (!l1_words.empty()) {
    write_words(header_.l1_offset, l1_words);
    sync();
  }
  if (r == 0 && !frees.empty()) {
    r = release(std::move(frees));
    frees.clear();
  }
  if (r == 0) return 0;
  const std::lock_guard lock(meta_mutex_);
  for (const auto& p : blocks) MetaTable::give_back(p);
  for (const auto& p : tables) MetaTable::give_back(p);
  refcounts_->give_back_table(block_entries);
  for (const auto& [i, word] : l1_words) dirty_l1_.insert(i);
  pending_frees_.insert(pending_frees_.end(), frees.begin(), frees.end());
  return r;
}

// Nothing on the disk refers to these any more, once for each time they stand in the list.
int Qcow2Image::release(std::vector<u64> clusters) {
  gate_.drain();  // accesses that began before they were unlinked
  std::sort(clusters.begin(), clusters.end());
  std::vector<std::pair<u64, u64>> holes;  // cluster, count
  std::vector<std::pair<u64, i64>> drops;
  {
    const std::lock_guard lock(meta_mutex_);
    for (std::size_t i = 0; i < clusters.size();) {
      std::size_t n = 1;
      while (i + n < clusters.size() && clusters[i + n] == clusters[i]) n++;
      u64 refs = 0;
      if (const int r = refcounts_->get(clusters[i], refs); r < 0) return r;
      if (refs < n) return corrupt("a cluster is in use more often than its refcount says");
      if (refs == n && !metadata_.contains(clusters[i])) {
        if (!holes.empty() && holes.back().first + holes.back().second == clusters[i]) holes.back().second++;
        else holes.push_back({clusters[i], 1});
      }
      drops.push_back({clusters[i], -static_cast<i64>(n)});
      i += n;
    }
  }
  // While the refcount is not 0 yet nobody else gets them. Not being able to is no failure: the space is kept.
  for (const auto& [c, n] : holes) {
    if (header_.cluster_size() >= 4096) (void)file_->zero(c << header_.cluster_bits, n << header_.cluster_bits, true);
  }
  const std::lock_guard lock(meta_mutex_);
  for (const auto& [c, n] : drops) {
    if (const int r = refcounts_->add(c, n); r < 0) return r;
  }
  return 0;
}

}  // namespace ring3::storage::qcow2
