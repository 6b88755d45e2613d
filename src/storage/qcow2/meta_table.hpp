#pragma once
#include <algorithm>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/types.hpp"
#include "storage/qcow2/format.hpp"

namespace ring3::storage::qcow2 {

/// One cluster of metadata in memory, an L2 table or a refcount block, as its bytes stand in the file. Knows which
/// pieces of it have changed since they were last written.
class MetaTable {
 public:
  MetaTable(u64 host_offset, u64 cluster_size)
      : host_offset_(host_offset), bytes_(cluster_size), piece_(std::min<u64>(cluster_size, 4096)),
        dirty_(cluster_size / piece_, 0) {}

  u64 host_offset() const { return host_offset_; }
  /// A copy of a table that others still use gets a place of its own; all of it is to be written there.
  void move_to(u64 host_offset) {
    host_offset_ = host_offset;
    mark_all();
  }
  std::vector<u8>& bytes() { return bytes_; }
  const std::vector<u8>& bytes() const { return bytes_; }
  u64 get(u64 at) const { return get64(&bytes_[at]); }
  void set(u64 at, u64 value) {
    put64(&bytes_[at], value);
    mark(at);
  }
  void mark(u64 at) { dirty_[at / piece_] = 1, any_ = true; }
  void mark_all() { std::fill(dirty_.begin(), dirty_.end(), u8{1}), any_ = true; }
  bool dirty() const { return any_; }

  /// A piece that has to be written.
  struct Piece {
    std::shared_ptr<MetaTable> table;
    u64 at = 0;           ///< in the table
    u64 host_offset = 0;
    std::vector<u8> bytes;
  };
  /// Copies what is dirty into `out`, neighbours joined, and takes it for clean.
  static void take_dirty(const std::shared_ptr<MetaTable>& t, std::vector<Piece>& out) {
    if (!t->any_) return;
    for (u64 i = 0; i < t->dirty_.size();) {
      if (t->dirty_[i] == 0) {
        i++;
        continue;
      }
      u64 end = i;
      while (end < t->dirty_.size() && t->dirty_[end] != 0) t->dirty_[end++] = 0;
      const auto from = t->bytes_.begin() + static_cast<long>(i * t->piece_);
      const auto to = t->bytes_.begin() + static_cast<long>(end * t->piece_);
      out.push_back({t, i * t->piece_, t->host_offset_ + i * t->piece_, std::vector<u8>(from, to)});
      i = end;
    }
    t->any_ = false;
  }
  /// The piece could not be written after all.
  static void give_back(const Piece& p) {
    for (u64 at = p.at; at < p.at + p.bytes.size(); at += p.table->piece_) p.table->mark(at);
  }

 private:
  u64 host_offset_;
  std::vector<u8> bytes_;
  u64 piece_;
  std::vector<u8> dirty_;
  bool any_ = false;
};

/// Tables by number, the least recently used clean ones dropped when they get too many. No locks of its own.
class MetaCache {
 public:
  explicit MetaCache(u64 most_tables) : most_(std::max<u64>(most_tables, 8)) {}

  std::shared_ptr<MetaTable> find(u64 key) {
    const auto it = map_.find(key);
    if (it == map_.end()) return nullptr;
    order_.splice(order_.begin(), order_, it->second.position);
    return it->second.table;
  }
  void put(u64 key, std::shared_ptr<MetaTable> table) {
    erase(key);
    order_.push_front(key);
    map_[key] = {std::move(table), order_.begin()};
    // The dirty ones are written by a commit only, so the search for a clean one ends somewhere.
    auto it = order_.end();
    for (int tries = 0; map_.size() > most_ && tries < 64 && it != order_.begin(); tries++) {
      --it;
      const auto found = map_.find(*it);
      if (it == order_.begin() || found->second.table->dirty()) continue;
      it = order_.erase(it);
      map_.erase(found);
    }
  }
  void erase(u64 key) {
    const auto it = map_.find(key);
    if (it == map_.end()) return;
    order_.erase(it->second.position);
    map_.erase(it);
  }
  void clear() { map_.clear(), order_.clear(); }
  u64 dirty_count() const {
    return static_cast<u64>(std::count_if(map_.begin(), map_.end(), [](const auto& e) { return e.second.table->dirty(); }));
  }
  bool full() const { return map_.size() >= most_; }
  void take_dirty(std::vector<MetaTable::Piece>& out) {
    for (auto& [key, e] : map_) MetaTable::take_dirty(e.table, out);
  }

 private:
  struct Entry {
    std::shared_ptr<MetaTable> table;
    std::list<u64>::iterator position;
  };
  u64 most_;
  std::unordered_map<u64, Entry> map_;
  std::list<u64> order_;
};

/// A set of cluster numbers, small where they are few or lie together.
class ClusterSet {
 public:
  /// Whether it was not there before.
  bool insert(u64 cluster) {
    u64& word = words_[cluster / 64];
    const u64 bit = u64{1} << (cluster % 64);
    const bool is_new = (word & bit) == 0;
    word |= bit;
    return is_new;
  }
  void erase(u64 cluster) {
    const auto it = words_.find(cluster / 64);
    if (it != words_.end()) it->second &= ~(u64{1} << (cluster % 64));
  }
  bool contains(u64 cluster) const {
    const auto it = words_.find(cluster / 64);
    return it != words_.end() && (it->second >> (cluster % 64) & 1) != 0;
  }

 private:
  std::unordered_map<u64, u64> words_;
};

}  // namespace ring3::storage::qcow2
