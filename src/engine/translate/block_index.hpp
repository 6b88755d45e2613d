#pragma once
#include <cstddef>
#include <vector>

#include "base/types.hpp"

namespace ring3::engine {

struct CodeBlock;

/// Blocks by a hash of what they are found by: open addressing, grows with what is in it. Looking one up touches one
/// line of the table as a rule, and no block but those whose hash is the same.
/// Threading: the vCPU's thread.
class BlockIndex {
 public:
  BlockIndex() : slots_(kSmallest) {}

  /// The first block with this hash for which is(block) holds, or null.
  template <class F>
  CodeBlock* find(u64 hash, F&& is) const {
    for (std::size_t at = hash & mask();; at = (at + 1) & mask()) {
      const Slot& s = slots_[at];
      if (s.block == nullptr && !s.removed()) return nullptr;
      if (s.block != nullptr && s.hash == hash && is(*s.block)) return s.block;
    }
  }
  void add(u64 hash, CodeBlock* block) {
    if (2 * ++taken_ > slots_.size()) grow();
    put(slots_, hash, block);
    live_++;
  }
  void remove(u64 hash, const CodeBlock* block) {
    for (std::size_t at = hash & mask();; at = (at + 1) & mask()) {
      Slot& s = slots_[at];
      if (s.block == nullptr && !s.removed()) return;
      if (s.block != block) continue;
      s = {Slot::kRemoved, nullptr};
      live_--;
      return;
    }
  }
  void clear() {
    slots_.assign(kSmallest, Slot{});
    slots_.shrink_to_fit();
    taken_ = live_ = 0;
  }

 private:
  struct Slot {
    static constexpr u64 kRemoved = 1;
    u64 hash = 0;
    CodeBlock* block = nullptr;  ///< null: free, and the end of a search unless removed()
    bool removed() const { return hash == kRemoved; }
  };
  static constexpr std::size_t kSmallest = 1u << 12;

  std::size_t mask() const { return slots_.size() - 1; }
  static void put(std::vector<Slot>& slots, u64 hash, CodeBlock* block) {
    std::size_t at = hash & (slots.size() - 1);
    while (slots[at].block != nullptr) at = (at + 1) & (slots.size() - 1);
    slots[at] = {hash, block};
  }
  void grow() {
    std::vector<Slot> bigger(4 * live_ > slots_.size() ? 2 * slots_.size() : slots_.size());
    for (const Slot& s : slots_)
      if (s.block != nullptr) put(bigger, s.hash, s.block);
    slots_ = std::move(bigger);
    taken_ = live_ + 1;
  }

  std::vector<Slot> slots_;
  std::size_t taken_ = 0;  ///< slots that are not free: what lives and what was removed
  std::size_t live_ = 0;
};

}  // namespace ring3::engine
