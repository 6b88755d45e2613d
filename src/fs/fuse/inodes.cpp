#include "fs/fuse/inodes.hpp"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "fs/fuse/beneath.hpp"

namespace ring3::fs {
namespace {

constexpr unsigned kDeepest = 1000;  ///< directories opened again, one to get at the other; also ends circles

}  // namespace

Inodes::Birth Inodes::birth(int fd) {
  struct statx info {};
  if (::statx(fd, "", AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, STATX_BTIME, &info) != 0 || (info.stx_mask & STATX_BTIME) == 0) return {};
  return {true, info.stx_btime.tv_sec, info.stx_btime.tv_nsec};
}

void Inodes::set_root(Node node) {
  const std::lock_guard lock(mutex_);
  node.id = kRoot;
  devices_ = {node.device};
  const Key key{node.device, node.inode};
  by_key_[key] = kRoot;
  Entry& entry = by_id_[kRoot];
  entry.key = key;
  entry.type = node.type;
  entry.count = 1;
  entry.node = std::make_shared<const Node>(std::move(node));
  entry.place = recent_.end();
}

void Inodes::set_limit(std::size_t most) {
  const std::lock_guard lock(mutex_);
  limit_ = most;
}

/// Puts the node of an entry that has none, as the one used last.
void Inodes::keep(Entry& entry, u64 id, NodePtr node) const {
  entry.node = std::move(node);
  entry.last = entry.node;
  entry.place = entry.node->opaque ? recent_.end() : recent_.insert(recent_.begin(), id);
}

void Inodes::drop(Entry& entry) const {
  if (entry.node && entry.place != recent_.end()) recent_.erase(entry.place);
  entry.place = recent_.end();
  entry.node.reset();
}

/// `closed` gets what is to be closed without the lock.
std::size_t Inodes::close_beyond(std::size_t most, std::vector<NodePtr>& closed) const {
  const std::size_t before = recent_.size();
  while (recent_.size() > most) {
    Entry& entry = by_id_.at(recent_.back());
    entry.birth = birth(entry.node->fd.get());
    closed.push_back(entry.node);
    drop(entry);
  }
  return before - recent_.size();
}

bool Inodes::close_some(std::size_t most) const {
  std::vector<NodePtr> closed;
  const std::lock_guard lock(mutex_);
  return close_beyond(recent_.size() - std::min(most, recent_.size()), closed) != 0;
}

Inodes::NodePtr Inodes::find(u64 id, unsigned depth) const {
  u64 parent = 0;
  std::string name;
  {
    const std::lock_guard lock(mutex_);
    const auto it = by_id_.find(id);
    if (it == by_id_.end()) return nullptr;
    Entry& entry = it->second;
    if (entry.node) {
      if (entry.place != recent_.end()) recent_.splice(recent_.begin(), recent_, entry.place);
      return entry.node;
    }
    if (auto last = entry.last.lock()) {
      keep(entry, id, last);
      return last;
    }
    parent = entry.parent;
    name = entry.name;
  }
  if (depth >= kDeepest) return nullptr;
  const NodePtr above = find(parent, depth + 1);
  if (!above || !S_ISDIR(above->type)) return nullptr;
  Node again;
  again.fd = open_with_room([&] { return open_beneath(above->fd.get(), name.c_str(), O_PATH | O_NOFOLLOW); });
  struct stat info {};
  if (!again.fd || fstatat(again.fd.get(), "", &info, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW) != 0) return nullptr;
  const Birth born = birth(again.fd.get());
  std::vector<NodePtr> closed;
  const std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  if (it == by_id_.end()) return nullptr;
  Entry& entry = it->second;
  if (entry.node) return entry.node;  // another thread was here first
  if (entry.key != Key{info.st_dev, info.st_ino} || entry.type != (info.st_mode & S_IFMT) || !entry.birth.same_as(born)) return nullptr;
  again.id = id;
  again.device = info.st_dev;
  again.inode = info.st_ino;
  again.type = entry.type;
  const NodePtr node = std::make_shared<const Node>(std::move(again));
  keep(entry, id, node);
  close_beyond(limit_, closed);
  return node;
}

Inodes::NodePtr Inodes::add(Node node, u64 parent, const char* name) {
  std::vector<NodePtr> closed;
  const std::lock_guard lock(mutex_);
  const Key key{node.device, node.inode};
  if (const auto it = by_key_.find(key); it != by_key_.end()) {
    Entry& entry = by_id_.at(it->second);
    NodePtr there = entry.node ? entry.node : entry.last.lock();
    // A number without a descriptor may have gone to another file since.
    if (there || (entry.type == node.type && entry.birth.same_as(birth(node.fd.get())))) {
      if (!entry.node) {
        node.id = it->second;
        keep(entry, it->second, there ? there : std::make_shared<const Node>(std::move(node)));
      } else if (entry.place != recent_.end()) {
        recent_.splice(recent_.begin(), recent_, entry.place);
      }
      entry.count++;
      if (it->second != kRoot) entry.parent = parent, entry.name = name;
      there = entry.node;
      close_beyond(limit_, closed);
      return there;
    }
    by_key_.erase(it);
  }
  node.id = next_id_++;
  const u64 id = node.id;
  by_key_[key] = id;
  Entry& entry = by_id_[id];
  entry.key = key;
  entry.type = node.type;
  entry.count = 1;
  entry.parent = parent;
  entry.name = name;
  const NodePtr made = std::make_shared<const Node>(std::move(node));
  keep(entry, id, made);
  close_beyond(limit_, closed);
  return made;
}

void Inodes::renamed(dev_t device, ino_t inode, u64 parent, const char* name) {
  const std::lock_guard lock(mutex_);
  const auto it = by_key_.find({device, inode});
  if (it == by_key_.end() || it->second == kRoot) return;
  Entry& entry = by_id_.at(it->second);
  entry.parent = parent;
  entry.name = name;
}

void Inodes::forget(u64 id, u64 count) {
  NodePtr last;  // closed without the lock
  const std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  if (id == kRoot || it == by_id_.end()) return;
  Entry& entry = it->second;
  if (entry.count > count) {
    entry.count -= count;
    return;
  }
  last = entry.node;
  drop(entry);
  if (const auto key = by_key_.find(entry.key); key != by_key_.end() && key->second == id) by_key_.erase(key);
  by_id_.erase(it);
}

void Inodes::clear() {
  const std::lock_guard lock(mutex_);
  recent_.clear();
  std::erase_if(by_id_, [](const auto& item) { return item.first != kRoot; });
  std::erase_if(by_key_, [](const auto& item) { return item.second != kRoot; });
}

std::size_t Inodes::size() const {
  const std::lock_guard lock(mutex_);
  return by_id_.size();
}

std::size_t Inodes::kept() const {
  const std::lock_guard lock(mutex_);
  return recent_.size();
}

u64 Inodes::device_index(dev_t device) const {
  const std::lock_guard lock(mutex_);
  const auto it = std::find(devices_.begin(), devices_.end(), device);
  if (it != devices_.end()) return static_cast<u64>(it - devices_.begin());
  devices_.push_back(device);
  return devices_.size() - 1;
}

}  // namespace ring3::fs
