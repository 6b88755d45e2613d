#include "fs/fuse/inodes.hpp"

#include <algorithm>

namespace ring3::fs {

void Inodes::set_root(Node node) {
  const std::lock_guard lock(mutex_);
  node.id = kRoot;
  devices_ = {node.device};
  by_key_[{node.device, node.inode}] = kRoot;
  by_id_[kRoot] = {std::make_shared<const Node>(std::move(node)), 1};
}

std::shared_ptr<const Node> Inodes::find(u64 id) const {
  const std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  return it == by_id_.end() ? nullptr : it->second.node;
}

std::shared_ptr<const Node> Inodes::add(Node node) {
  const std::lock_guard lock(mutex_);
  const Key key{node.device, node.inode};
  if (const auto it = by_key_.find(key); it != by_key_.end()) {
    Entry& entry = by_id_[it->second];
    entry.count++;
    return entry.node;
  }
  node.id = next_id_++;
  const u64 id = node.id;
  by_key_[key] = id;
  return (by_id_[id] = {std::make_shared<const Node>(std::move(node)), 1}).node;
}

void Inodes::forget(u64 id, u64 count) {
  std::shared_ptr<const Node> last;  // closed without the lock
  const std::lock_guard lock(mutex_);
  const auto it = by_id_.find(id);
  if (id == kRoot || it == by_id_.end()) return;
  if (it->second.count > count) {
    it->second.count -= count;
    return;
  }
  last = std::move(it->second.node);
  by_key_.erase({last->device, last->inode});
  by_id_.erase(it);
}

void Inodes::clear() {
  const std::lock_guard lock(mutex_);
  std::erase_if(by_id_, [](const auto& item) { return item.first != kRoot; });
  std::erase_if(by_key_, [](const auto& item) { return item.second != kRoot; });
}

std::size_t Inodes::size() const {
  const std::lock_guard lock(mutex_);
  return by_id_.size();
}

u64 Inodes::device_index(dev_t device) const {
  const std::lock_guard lock(mutex_);
  const auto it = std::find(devices_.begin(), devices_.end(), device);
  if (it != devices_.end()) return static_cast<u64>(it - devices_.begin());
  devices_.push_back(device);
  return devices_.size() - 1;
}

}  // namespace ring3::fs
