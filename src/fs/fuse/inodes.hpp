#pragma once
#include <sys/stat.h>

#include <cerrno>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
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
/// Descriptors: a guest knows as many inodes as its memory holds, and a process may have but so many descriptors. Beyond
///            set_limit() those that were not asked for longest are closed; find() opens such a one again by the name and directory where it was
///            last seen, if it is the same file still (device, inode, time of birth). If it is not, find() knows none (ESTALE), and the guest's kernel
///            looks the name up again. What is in use (an open file holds its node) stays as it is.
/// Threading: any; one mutex, not held while something is opened.
/// Trust:     ids and counts come from the guest: unknown ids are not found, a count that is too high forgets the inode.
class Inodes {
 public:
  static constexpr u64 kRoot = 1;

  void set_root(Node node);
  /// Keeps about that many descriptors at most, from now on.
  void set_limit(std::size_t most);
  std::shared_ptr<const Node> find(u64 id) const { return find(id, 0); }
  /// The node of that inode, the one that is there or `node` as a new one, seen as `name` in `parent`. The guest's count goes up by one.
  std::shared_ptr<const Node> add(Node node, u64 parent, const char* name);
  /// That inode, if the guest knows it, has this name now.
  void renamed(dev_t device, ino_t inode, u64 parent, const char* name);
  /// The guest's count goes down; at 0 the inode is gone.
  void forget(u64 id, u64 count);
  /// Closes up to that many descriptors; whether there was one to close.
  bool close_some(std::size_t most) const;
  /// What `open` gives; when the process has no descriptor left, once more, with some that are kept here closed. errno is that of the last try.
  template <class F>
  UniqueFd open_with_room(const F& open) const {
    UniqueFd fd = open();
    if (!fd && errno == EMFILE && close_some(16)) fd = open();
    return fd;
  }
  /// All but the root.
  void clear();
  std::size_t size() const;
  /// Inodes with a descriptor that is kept for them.
  std::size_t kept() const;
  /// A small number for the device, 0 for the root's, that tells equal inode numbers of two file systems apart.
  u64 device_index(dev_t device) const;

 private:
  using NodePtr = std::shared_ptr<const Node>;
  using Key = std::pair<dev_t, ino_t>;
  /// When the inode was made; tells it from a later one with its number. False in `known`: the file system does not say.
  struct Birth {
    bool known = false;
    i64 seconds = 0;
    u32 nanoseconds = 0;
    bool same_as(const Birth& other) const {
      return known && other.known && seconds == other.seconds && nanoseconds == other.nanoseconds;
    }
  };
  struct Entry {
    NodePtr node;                     ///< nothing: its descriptor was closed
    std::weak_ptr<const Node> last;   ///< the same, which somebody may still hold
    u64 count = 0;
    Key key;
    u32 type = 0;
    Birth birth;                      ///< of one that was closed
    u64 parent = 0;
    std::string name;
    std::list<u64>::iterator place;   ///< in recent_, when there is a node
  };
  static Birth birth(int fd);
  NodePtr find(u64 id, unsigned depth) const;
  // These under mutex_.
  void keep(Entry& entry, u64 id, NodePtr node) const;
  void drop(Entry& entry) const;
  std::size_t close_beyond(std::size_t most, std::vector<NodePtr>& closed) const;

  mutable std::mutex mutex_;
  mutable std::unordered_map<u64, Entry> by_id_;
  std::map<Key, u64> by_key_;
  mutable std::list<u64> recent_;  ///< ids of entries with a node, but for the root and opaque ones; last used first
  mutable std::vector<dev_t> devices_;
  std::size_t limit_ = ~std::size_t{0};
  u64 next_id_ = kRoot + 1;
};

}  // namespace ring3::fs
