#pragma once
#include <sys/stat.h>

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::fs {

/// An inode the guest knows. Constant once it is in the table; the descriptor keeps the host's inode alive, so that its
/// number is not given to another file meanwhile.
struct Node {
  UniqueFd fd;  ///< O_PATH
  u64 id = 0;
  dev_t device = 0;
  ino_t inode = 0;
  u32 type = 0;         ///< S_IFMT bits
  bool opaque = false;  ///< the root of a file system that is an interface of the host's kernel: shown empty
};

/// The inodes the guest knows, by the number it knows them by and by the host's identity.
///
/// Threading: any; one mutex.
/// Trust:     ids and counts come from the guest: unknown ids are not found, a count that is too high forgets the inode.
class Inodes {
 public:
  static constexpr u64 kRoot = 1;

  void set_root(Node node);
  std::shared_ptr<const Node> find(u64 id) const;
  /// The node of that inode, the one that is there or `node` as a new one. The guest's count goes up by one.
  std::shared_ptr<const Node> add(Node node);
  /// The guest's count goes down; at 0 the inode is gone.
  void forget(u64 id, u64 count);
  /// All but the root.
  void clear();
  std::size_t size() const;
  /// A small number for the device, 0 for the root's, that tells equal inode numbers of two file systems apart.
  u64 device_index(dev_t device) const;

 private:
  struct Entry {
    std::shared_ptr<const Node> node;
    u64 count = 0;
  };
  using Key = std::pair<dev_t, ino_t>;
  mutable std::mutex mutex_;
  std::unordered_map<u64, Entry> by_id_;
  std::map<Key, u64> by_key_;
  mutable std::vector<dev_t> devices_;
  u64 next_id_ = kRoot + 1;
};

}  // namespace ring3::fs
