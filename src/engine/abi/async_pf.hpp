#pragma once
#include "base/types.hpp"

/// The MSRs of asynchronous page faults, and of the guest's say in how its HLT waits.
///
/// Spec:      virt/kvm/x86/msr MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK, MSR_KVM_POLL_CONTROL.
/// A host may tell a guest that a page is being brought in, and need never do so. This one does not: the host's kernel
/// brings a page in while the vCPU's thread waits, and nobody learns of it before. Guests that ask for it are answered as
/// by the kernel, and so keep the bits with which they came from another host. Likewise nothing here polls before it waits.
/// Threading: the vCPU's owner only.
namespace ring3::engine::abi {

class AsyncPf {
 public:
  static constexpr u32 kEnable = 0x4b564d02, kInterrupt = 0x4b564d06, kAcknowledge = 0x4b564d07, kPollControl = 0x4b564d05;

  static bool is_msr(u32 index) { return index == kEnable || (index >= kPollControl && index <= kAcknowledge); }
  /// is_msr() only.
  u64 read(u32 index) const {
    return index == kEnable ? enable_ : index == kInterrupt ? vector_ : index == kPollControl ? poll_ : 0;
  }
  /// is_msr() only. lapic: whether the vCPU has one; backed: whether memory is at an address. False: #GP.
  template <class Backed>
  bool write(u32 index, u64 value, bool lapic, Backed&& backed) {
    switch (index) {
      case kEnable:
        if (value & 0x30) return false;  // bits 4 and 5 are reserved, 6 and up the address
        if (!lapic) return value == 0;
        if ((value & 1) && !backed(Gpa(value & ~u64{0x3f}))) return false;
        enable_ = value;
        return true;
      case kInterrupt:
        if (value >> 8 || !lapic) return false;
        vector_ = value;
        return true;
      case kPollControl:
        if (value >> 1) return false;
        poll_ = value;
        return true;
      default:
        return true;  // nothing was told that could be acknowledged
    }
  }
  /// RESET or INIT; the say in how HLT waits outlives them, as in the kernel.
  void reset() { enable_ = vector_ = 0; }

 private:
  u64 enable_ = 0, vector_ = 0, poll_ = 1;
};

}  // namespace ring3::engine::abi
