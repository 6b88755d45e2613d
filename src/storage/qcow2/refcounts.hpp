#pragma once
#include <cerrno>
#include <functional>

#include "storage/qcow2/meta_table.hpp"

namespace ring3::storage::qcow2 {

/// Instead of an error: call grow(), then try again.
inline constexpr int kNeedsGrowth = -ERESTART;

/// Who uses which cluster of the file: the refcount table and its blocks, and the search for free clusters.
///
/// Spec:      qcow2.txt, "Host cluster management".
/// Order:     changes stay in memory until a commit takes them (take_dirty, take_table). An increment has to be on
///            the disk before what refers to the cluster, a decrement after what referred to it.
/// Threading: none of its own; the image's metadata lock.
/// Errors:    0 or -errno; -EIO for a structure that cannot be, which the image then calls corrupt.
class Refcounts {
 public:
  /// write_header: brings the header's fields to the disk.
  Refcounts(File& file, Header& header, ClusterSet& metadata, std::function<int()> write_header);

  /// Reads the table. Errors: EINVAL when an entry cannot be, but for `lenient`.
  Status load(const std::string& name, bool lenient);
  int get(u64 cluster, u64& value);
  /// The first cluster from `cluster` to before `end` whose refcount is not 0, or `end`. Both within one block's range.
  int next_used(u64 cluster, u64 end, u64& found);
  int add(u64 cluster, i64 delta, u64* now = nullptr);
  /// The refcount becomes count. -ERANGE: it has no room for that; kNeedsGrowth as add().
  int put(u64 cluster, u64 count);
  /// Up to `want` clusters in a row with refcount 0, now 1. -ENOSPC or the host's errors.
  int allocate(u64 want, u64& first, u64& got);
  /// Exactly `count` in a row, past all that is used.
  int allocate_at_end(u64 count, u64& first);

  /// After kNeedsGrowth: a larger table, on the disk when it returns. Not while a commit is writing: it writes all
  /// blocks itself, and a commit's older copy must not come after.
  int grow();

  u64 most() const { return bits_ == 64 ? ~u64{0} : (u64{1} << bits_) - 1; }
  u64 per_block() const { return per_block_; }
  const std::vector<u64>& table() const { return table_; }
  /// One past the last cluster with a refcount that is not 0, as far as the blocks tell.
  int used_end(u64& end);

  void take_dirty(std::vector<MetaTable::Piece>& out) { cache_.take_dirty(out); }
  /// Indices of table entries that are not on the disk yet.
  std::vector<u64> take_table() { return std::move(new_entries_); }
  void give_back_table(const std::vector<u64>& indices) {
    new_entries_.insert(new_entries_.end(), indices.begin(), indices.end());
  }
  bool dirty_pressure() const { return cache_.full() && cache_.dirty_count() > 64; }
  /// Writes everything that is dirty, in order. For growth and for offline work.
  int write_all();

 private:
  int block(u64 index, std::shared_ptr<MetaTable>& out);
  int block_or_new(u64 cluster, std::shared_ptr<MetaTable>& t);  ///< of a cluster; 0 and not null, or an error
  int make_block(u64 index);
  u64 value(const MetaTable& t, u64 index) const;
  void set_value(MetaTable& t, u64 index, u64 v);

  File& file_;
  Header& header_;
  ClusterSet& metadata_;
  std::function<int()> write_header_;
  u32 bits_;
  u64 per_block_;
  std::vector<u64> table_;
  std::vector<u64> new_entries_;
  MetaCache cache_;
  u64 hint_ = 0;
};

}  // namespace ring3::storage::qcow2
