#include "engine/abi/xen.hpp"

#include <cerrno>
#include <cstring>
#include <vector>

#include "engine/abi/user_memory.hpp"

namespace ring3::engine::abi {

long Xen::configure(const kvm_xen_hvm_config& config) {
  if (config.flags & ~u32{KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL}) return -EINVAL;
  const bool intercept = config.flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
  // The pages are then the engine's, not the VMM's.
  if (intercept && (config.blob_addr_32 || config.blob_addr_64 || config.blob_size_32 || config.blob_size_64)) return -EINVAL;
  const std::lock_guard lock(mutex_);
  config_ = config;
  intercepts_.store(intercept, std::memory_order_release);
  msr_.store(config.msr, std::memory_order_release);
  return 0;
}

bool Xen::write_page(u64 value, bool long_mode, bool amd, const GuestWriter& write) {
  kvm_xen_hvm_config config;
  {
    const std::lock_guard lock(mutex_);
    config = config_;
  }
  const u64 number = value & (kPageSize - 1);
  const Gpa to(value & ~(kPageSize - 1));
  std::vector<u8> page(kPageSize);
  if (config.flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL) {
    if (number != 0) return false;
    // Entry n: MOV EAX, n; VMCALL or VMMCALL; RET; the rest INT3.
    constexpr u32 kEntry = 32;
    for (u32 n = 0; n < kPageSize / kEntry; n++) {
      u8* const at = page.data() + std::size_t{n} * kEntry;
      std::memset(at, 0xcc, kEntry);
      at[0] = 0xb8;
      std::memcpy(at + 1, &n, sizeof n);
      const u8 call[] = {0x0f, 0x01, static_cast<u8>(amd ? 0xd9 : 0xc1), 0xc3};
      std::memcpy(at + 5, call, sizeof call);
    }
    return write(to, page.data(), page.size());
  }
  const u64 blob = long_mode ? config.blob_addr_64 : config.blob_addr_32;
  if (number >= (long_mode ? config.blob_size_64 : config.blob_size_32)) return false;
  return copy_bytes_in(blob + number * kPageSize, page.data(), page.size()) && write(to, page.data(), page.size());
}

}  // namespace ring3::engine::abi
