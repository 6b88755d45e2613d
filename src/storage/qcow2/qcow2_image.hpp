#pragma once
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "storage/block/image.hpp"
#include "storage/qcow2/check.hpp"
#include "storage/qcow2/format.hpp"
#include "storage/qcow2/meta_table.hpp"
#include "storage/qcow2/refcounts.hpp"

namespace ring3::storage::qcow2 {

struct CreateOptions {
  u64 size = 0;
  u32 version = 3;
  u32 cluster_bits = 16;
  u32 refcount_order = 4;
  bool extended_l2 = false;
  bool lazy_refcounts = false;
  bool zstd = false;
  std::string backing_file, backing_format;
};

struct SnapshotInfo {
  std::string id, name;
  u64 disk_size = 0;
  u64 vm_state_size = 0;
  u64 seconds = 0;            ///< since 1970
  u32 nanoseconds = 0;
  u64 vm_clock_ns = 0;
  u64 l1_offset = 0;
  u32 l1_size = 0;
  std::vector<u8> extra;      ///< as in the file, but for the sizes
};

/// A qcow2 image.
///
/// Spec:      QEMU's docs/interop/qcow2.txt, versions 2 and 3. Not: encryption, external data files, bitmaps (an
///            image that has them loses them when it is written to, as the format foresees).
/// Order:     metadata is changed in memory and written by commit(): refcount blocks (and the data that was written
///            before), sync, new refcount table entries, sync, L2 tables, sync, L1 entries, sync; only then are
///            freed clusters given out again. What stands in the file is consistent at every moment but for leaks.
/// Lazy refcounts: the bit is kept, and makes no difference: refcounts are always written first.
/// Threading: see Image. meta_mutex_ guards all metadata in memory and is never held over data I/O;
///            commit_mutex_ (taken first) makes commits and growth one at a time. Snapshots, resize, check and
///            preallocation are for images that nobody else uses meanwhile.
/// Trust:     the file is hostile: every number in it is checked before it is used. What cannot be makes the
///            access fail with -EIO, and the image corrupt: nothing more is written to it.
class Qcow2Image final : public Image {
 public:
  /// lenient: for a check; opens what is broken, and writes nothing of its own accord.
  struct OpenOptions {
    bool writable = false;
    bool lenient = false;
  };
  /// The backing file is set afterwards (header().backing_file says whether there is one).
  static Result<std::unique_ptr<Qcow2Image>> open(std::unique_ptr<File> file, const std::string& name, OpenOptions o);
  /// Writes an empty image to an empty file.
  static Status create(File& file, const CreateOptions& options);
  ~Qcow2Image() override;

  void set_backing(std::unique_ptr<Image> backing) { backing_ = std::move(backing); }
  Image* backing() const { return backing_.get(); }
  const Header& header() const { return header_; }
  File& file() { return *file_; }

  const char* format() const override { return "qcow2"; }
  u64 size() const override { return header_.size; }
  bool writable() const override { return writable_; }
  u32 cluster_size() const override { return static_cast<u32>(header_.cluster_size()); }
  int read(u64 offset, std::span<const iovec> buffers) override;
  int write(u64 offset, std::span<const iovec> buffers) override;
  int write_zeroes(u64 offset, u64 length, bool may_unmap) override;
  int discard(u64 offset, u64 length) override;
  int flush() override;
  int close() override;
  int map(u64 offset, u64 length, Extent& extent) override;
  Direct begin_direct(bool write, u64 offset, std::span<const iovec> buffers) override;
  void end_direct(const Direct& direct) override;
  using Image::read;
  using Image::write;

  /// Writes whole clusters compressed, to places where nothing stands yet. Falls back to plain ones where they
  /// do not get smaller.
  int write_compressed(u64 offset, std::span<const u8> data);
  /// What write_compressed does first, on any thread: empty when the cluster does not get smaller.
  std::vector<u8> compress(std::span<const u8> cluster) const;
  int write_precompressed(u64 offset, std::span<const u8> data, std::span<const u8> compressed);

  enum class Preallocation { kOff, kMetadata, kFalloc, kFull };
  int preallocate(Preallocation mode, u64 from, u64 to, const std::function<void(u64)>& progress);
  /// `progress` is told of bytes of the disk that were dealt with, and of how many there are: those cut off, or those that a backing file would show.
  Status resize(u64 size, const std::function<void(u64 done, u64 total)>& progress = {});

  Result<std::vector<SnapshotInfo>> snapshots();
  Status create_snapshot(const std::string& name, u64 seconds, u32 nanoseconds);
  Status delete_snapshot(const std::string& id_or_name);
  /// The disk becomes what it was.
  Status apply_snapshot(const std::string& id_or_name);
  /// Reads show the snapshot from now on. Only for images that are not writable.
  Status show_snapshot(const std::string& id_or_name);

  Result<CheckReport> check(Repair repair, const CheckProgress& progress = {});

 private:
  /// An L2 entry; bitmap: of extended entries, else made up.
  struct Entry {
    u64 word = 0;
    u64 bitmap = 0;
  };
  enum class State { kAbsent, kZero, kZeroAllocated, kData, kAbsentAllocated, kCompressed };
  /// A run of bytes in one state, at consecutive places.
  struct Run {
    State state = State::kAbsent;
    u64 length = 0;
    u64 host_offset = 0;   ///< kData
    u64 word = 0;          ///< of the first cluster
    bool in_place = false; ///< kData: may be written where it stands
  };

  Qcow2Image(std::unique_ptr<File> file, Header header, std::string name);
  Status load(OpenOptions o);
  Status load_l1(OpenOptions o);

  // Under meta_mutex_ (image_map.cpp).
  int l2(u64 l1_index, std::shared_ptr<MetaTable>& table);
  int l2_for_write(u64 l1_index, std::shared_ptr<MetaTable>& table);
  Entry entry(const MetaTable& t, u64 index) const;
  void set_entry(MetaTable& t, u64 index, Entry e);
  State state_of(const Entry& e, u32 subcluster) const;
  int check_entry(const Entry& e);
  int run_at(u64 offset, u64 most, Run& run);
  bool in_file(u64 host_offset) const { return host_offset < file_end_; }
  bool usable(const Entry& e) const;
  void free_later(const Entry& e);
  int corrupt(const char* why);

  int read_backing(u64 offset, std::span<const iovec> buffers);
  int read_compressed(u64 offset, u64 word, std::span<const iovec> buffers);
  int decompress(std::span<const u8> from, std::span<u8> to) const;

  // image_write.cpp
  bool lock_clusters(std::unique_lock<std::mutex>& lock, u64 first, u64 count);
  void unlock_clusters(u64 first, u64 count);
  int write_some(u64 offset, std::span<const iovec> buffers, u64& done);
  int write_new(std::unique_lock<std::mutex>& lock, u64 offset, std::span<const iovec> buffers, u64 alike, u64& done);
  int link(u64 first, u64 count, u64 host_offset, u64 from, u64 to, bool whole);
  int allocate(u64 want, u64& first, u64& got);
  int grow(std::unique_lock<std::mutex>& lock);
  int clear_clusters(u64 first, u64 count, bool zero, bool keep, u64& done);
  int change_range(u64 offset, u64 length, bool zero, bool may_unmap);
  int zero_bytes(u64 offset, u64 length);
  int relieve();

  // image_commit.cpp
  int commit();
  int write_header_fields();
  int release(std::vector<u64> clusters);
  int begin_writing();

  // image_snapshot.cpp
  int read_l1(u64 offset, u32 entries, std::vector<u64>& l1);
  int change_tree(const std::vector<u64>& l1, i64 delta);
  int refresh_copied(bool clear_only);
  int write_new_place(std::span<const u8> bytes, u64& offset);
  int write_snapshot_table(const std::vector<SnapshotInfo>& list, u64& offset);
  int drop_clusters(u64 offset, u64 bytes);
  int allocate_offline(u64 clusters, u64& first);
  int settle();
  int write_l1_place(const std::vector<u64>& l1, u64& offset);
  Result<std::vector<SnapshotInfo>> load_snapshots(u64& table_bytes);
  friend class Checker;

  std::unique_ptr<File> file_;
  Header header_;
  std::string name_;
  std::unique_ptr<Image> backing_;
  bool writable_ = false;
  bool owns_format_ = false;  // we have written: the autoclear bits are dealt with

  std::mutex commit_mutex_;
  std::mutex meta_mutex_;
  std::condition_variable clusters_changed_;
  bool corrupt_ = false;
  std::vector<u64> l1_;
  std::set<u64> dirty_l1_;
  ClusterSet metadata_;
  MetaCache l2_cache_;
  std::unique_ptr<Refcounts> refcounts_;
  std::set<u64> busy_clusters_;         // being given space, zeroed or discarded
  std::vector<u64> pending_frees_;      // one reference each; after the next commit
  u64 file_end_ = 0;                    // clusters below may be referred to
  u64 zero_from_ = 0;                   // host bytes never used: they read as zeroes
  u64 compressed_at_ = 0, compressed_end_ = 0;  // room left in the last cluster of compressed data
  AccessGate gate_;

  std::mutex unpacked_mutex_;
  u64 unpacked_word_ = 0;
  std::vector<u8> unpacked_;
};

}  // namespace ring3::storage::qcow2
