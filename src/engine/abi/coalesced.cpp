#include "engine/abi/coalesced.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/checked.hpp"

namespace ring3::engine::abi {
namespace {
constexpr u32 kSlots = (kPageSize - sizeof(kvm_coalesced_mmio_ring)) / sizeof(kvm_coalesced_mmio);
constexpr std::size_t kMaxZones = 1000;  // as many devices as a bus of the kernel's has
}  // namespace

CoalescedRing::Unmap::~Unmap() {
  if (address != nullptr) ::munmap(address, kPageSize);
}

Status CoalescedRing::create() {
  fd_.reset(::memfd_create("ring3-coalesced", MFD_CLOEXEC));
  if (!fd_) return Error::from_errno("memfd_create");
  if (::ftruncate(fd_.get(), kPageSize) < 0) return Error::from_errno("ftruncate");
  void* p = ::mmap(nullptr, kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (p == MAP_FAILED) return Error::from_errno("mmap");
  unmap_.address = p;
  ring_ = static_cast<kvm_coalesced_mmio_ring*>(p);
  return Ok{};
}

Status CoalescedRing::map_at(u8* where) const {
  void* p = ::mmap(where, kPageSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_.get(), 0);
  if (p == MAP_FAILED) return Error::from_errno("mmap");
  return Ok{};
}

int CoalescedRing::add(const kvm_coalesced_mmio_zone& zone) {
  if (zone.pio > 1) return -EINVAL;
  std::lock_guard lock(mutex_);
  if (zones_.size() >= kMaxZones) return -ENOSPC;
  zones_.push_back(zone);
  any_.store(true, std::memory_order_relaxed);
  return 0;
}

int CoalescedRing::remove(const kvm_coalesced_mmio_zone& zone) {
  if (zone.pio > 1) return -EINVAL;
  std::lock_guard lock(mutex_);
  // As the kernel: every zone that the given one lies in.
  std::erase_if(zones_, [&](const kvm_coalesced_mmio_zone& z) {
    return z.pio == zone.pio && zone.addr >= z.addr && range_within<u64>(zone.addr - z.addr, zone.size, z.size);
  });
  any_.store(!zones_.empty(), std::memory_order_relaxed);
  return 0;
}

bool CoalescedRing::write_slow(bool pio, u64 address, unsigned size, const void* data) {
  if (size == 0 || size > 8) return false;
  std::lock_guard lock(mutex_);
  const bool inside = std::any_of(zones_.begin(), zones_.end(), [&](const kvm_coalesced_mmio_zone& z) {
    return (z.pio != 0) == pio && address >= z.addr && range_within<u64>(address - z.addr, size, z.size);
  });
  if (!inside) return false;
  const u32 last = __atomic_load_n(&ring_->last, __ATOMIC_RELAXED);
  const u32 first = __atomic_load_n(&ring_->first, __ATOMIC_ACQUIRE);
  if (last >= kSlots || (last + 1) % kSlots == first) return false;
  kvm_coalesced_mmio& slot = ring_->coalesced_mmio[last];
  slot.phys_addr = address;
  slot.len = size;
  slot.pio = pio ? 1 : 0;
  std::memset(slot.data, 0, sizeof slot.data);
  std::memcpy(slot.data, data, size);
  __atomic_store_n(&ring_->last, (last + 1) % kSlots, __ATOMIC_RELEASE);
  return true;
}

}  // namespace ring3::engine::abi
