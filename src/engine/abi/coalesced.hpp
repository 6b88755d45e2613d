#pragma once
#include "base/linux_kvm.hpp"

#include <atomic>
#include <mutex>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

/// Coalesced MMIO and PIO: guest writes to registered zones go to a ring instead of an exit each.
///
/// Spec:      virt/kvm/api KVM_REGISTER_COALESCED_MMIO; the ring is page 2 of every vCPU's run area.
/// Threading: any thread; mutex_ guards the zones and serialises producers. The VMM consumes.
/// Trust:     the ring lies in memory the VMM writes: first and last are checked on every use.
namespace ring3::engine::abi {

class CoalescedRing {
 public:
  Status create();

  /// Maps the ring's page at the given place (page aligned, inside a mapping of the caller's).
  Status map_at(u8* where) const;

  int add(const kvm_coalesced_mmio_zone& zone);
  int remove(const kvm_coalesced_mmio_zone& zone);
  /// Whether the write went to the ring; false when no zone holds all of it or the ring is full.
  bool write(bool pio, u64 address, unsigned size, const void* data) {
    return any_.load(std::memory_order_relaxed) && write_slow(pio, address, size, data);
  }

 private:
  bool write_slow(bool pio, u64 address, unsigned size, const void* data);

  UniqueFd fd_;
  kvm_coalesced_mmio_ring* ring_ = nullptr;
  struct Unmap {
    void* address = nullptr;
    ~Unmap();
  } unmap_;
  std::mutex mutex_;
  std::vector<kvm_coalesced_mmio_zone> zones_;
  std::atomic<bool> any_{false};
};

}  // namespace ring3::engine::abi
