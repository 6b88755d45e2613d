#include "engine/abi/dirty_ring.hpp"

namespace ring3::engine::abi {

Status DirtyRing::create(u32 entries) {
  auto memory = Mapping::shared_anonymous(std::size_t{entries} * sizeof(kvm_dirty_gfn));
  if (!memory) return memory.error();
  memory_ = std::move(*memory);
  entries_ = entries;
  return Ok{};
}

void DirtyRing::put(u32 slot, u64 offset) {
  const u32 n = dirty_.load(std::memory_order_relaxed);
  kvm_dirty_gfn& e = entry(n & (entries_ - 1));
  __atomic_store_n(&e.slot, slot, __ATOMIC_RELAXED);
  __atomic_store_n(&e.offset, offset, __ATOMIC_RELAXED);
  __atomic_store_n(&e.flags, static_cast<u32>(KVM_DIRTY_GFN_F_DIRTY), __ATOMIC_RELEASE);
  dirty_.store(n + 1, std::memory_order_release);
}

void DirtyRing::push(u32 slot, u64 offset) {
  if (waiting_.empty() && dirty_.load(std::memory_order_relaxed) - reset_.load(std::memory_order_acquire) < entries_) {
    put(slot, offset);
  } else {
    waiting_.emplace_back(slot, offset);
  }
}

bool DirtyRing::settle() {
  std::size_t done = 0;
  while (done < waiting_.size() && dirty_.load(std::memory_order_relaxed) - reset_.load(std::memory_order_acquire) < entries_) {
    put(waiting_[done].first, waiting_[done].second);
    done++;
  }
  waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(done));
  return !waiting_.empty() || nearly_full();
}

}  // namespace ring3::engine::abi
