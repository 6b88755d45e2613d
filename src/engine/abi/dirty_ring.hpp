#pragma once
#include "base/linux_kvm.hpp"

#include <atomic>
#include <mutex>
#include <span>
#include <vector>

#include "base/mapping.hpp"
#include "base/result.hpp"

/// One vCPU's ring of pages that it made dirty, in place of the bitmaps that KVM_GET_DIRTY_LOG hands out.
///
/// Spec:      virt/kvm/api 8.29 KVM_CAP_DIRTY_LOG_RING.
/// Which pages are in a ring already says the slot's bitmap, which the VMM does not see then: a page is pushed when its bit
/// becomes set, and the bit is cleared when the VMM gives the entry back.
/// Threading: push() and settle() on the vCPU's thread; reset() on any, one at a time. The entries are shared with the VMM.
/// Trust:     entries that come back are the VMM's: slot and offset are checked by whom reset() hands them to.
namespace ring3::engine::abi {

class DirtyRing {
 public:
  static constexpr u32 kMaxEntries = 65536;
  static constexpr u32 kReserved = 64;  // KVM_DIRTY_RING_RSVD_ENTRIES
  static constexpr u64 kMmapPage = KVM_DIRTY_LOG_PAGE_OFFSET;

  /// entries: a power of two, more than kReserved.
  Status create(u32 entries);
  std::span<u8> memory() const { return {memory_.data(), memory_.size()}; }

  void push(u32 slot, u64 offset);
  /// Moves into the ring what did not fit; then whether the VMM must act before the guest goes on.
  bool settle();
  /// Whether push() has made settle() worth calling.
  bool nearly_full() const {
    return dirty_.load(std::memory_order_relaxed) - reset_.load(std::memory_order_relaxed) >= entries_ - kReserved;
  }

  /// Calls visit(slot, offset) for every entry that the VMM has marked as collected, which is free then. Their number.
  template <class Visit>
  u32 reset(Visit&& visit) {
    u32 n = 0;
    for (; n < entries_; n++) {
      const u32 at = reset_.load(std::memory_order_relaxed) & (entries_ - 1);
      kvm_dirty_gfn& e = entry(at);
      if ((__atomic_load_n(&e.flags, __ATOMIC_ACQUIRE) & KVM_DIRTY_GFN_F_RESET) == 0) break;
      const u32 slot = __atomic_load_n(&e.slot, __ATOMIC_RELAXED);
      const u64 offset = __atomic_load_n(&e.offset, __ATOMIC_RELAXED);
      __atomic_store_n(&e.flags, 0u, __ATOMIC_RELEASE);
      reset_.fetch_add(1, std::memory_order_release);
      visit(slot, offset);
    }
    return n;
  }

 private:
  kvm_dirty_gfn& entry(u32 at) const { return reinterpret_cast<kvm_dirty_gfn*>(memory_.data())[at]; }
  void put(u32 slot, u64 offset);

  Mapping memory_;
  u32 entries_ = 0;
  std::atomic<u32> dirty_{0}, reset_{0};  // counts since the start
  std::vector<std::pair<u32, u64>> waiting_;  // came when the ring was full
};

}  // namespace ring3::engine::abi
