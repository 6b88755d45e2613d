#pragma once
#include "base/types.hpp"

/// The MSRs of asynchronous page faults, and of the guest's say in how its HLT waits.
///
/// Spec:      virt/kvm/x86/msr MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK, MSR_KVM_POLL_CONTROL.
/// A host may tell a guest that a page is being brought in, and need never do so. This one does not: the host's kernel
/// brings a page in while the vCPU's thread waits, and nobody learns of it before. But whoever asks for it, or brings a guest
/// that had asked for it elsewhere, is told once that every page is there: its tasks may wait for pages that another host was
/// bringing in. Likewise nothing here polls before it waits.
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
        if ((value & kTells) == kTells && !backed(Gpa(value & ~u64{0x3f}))) return false;
        enable_ = value;
        news_ = (value & kTells) == kTells ? News::kDue : News::kNone;
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
        if ((value & 1) && news_ == News::kWaits) news_ = News::kDue;
        return true;
    }
  }

  /// MSR_KVM_POLL_CONTROL: the guest does not look for its wake-ups itself before it executes HLT.
  bool host_may_poll() const { return (poll_ & 1) != 0; }
  /// There is something to tell the guest: tell() is to be called between instructions.
  bool due() const { return news_ == News::kDue; }
  /// Says that every page is there, once what was told before is taken. read and write: of guest memory, false where there is
  /// none; interrupt: raises a vector.
  template <class Read, class Write, class Interrupt>
  void tell(bool lapic_enabled, Read&& read, Write&& write, Interrupt&& interrupt) {
    const Gpa token((enable_ & ~u64{0x3f}) + kTokenOffset);
    u32 untaken;
    news_ = News::kWaits;
    if (!lapic_enabled || !read(token, &untaken, sizeof untaken) || untaken != 0) return;
    news_ = News::kNone;
    const u32 all = ~0u;
    if (write(token, &all, sizeof all)) interrupt(static_cast<u8>(vector_));
  }
  /// RESET or INIT; the say in how HLT waits outlives them, as in the kernel.
  void reset() {
    enable_ = vector_ = 0;
    news_ = News::kNone;
  }

 private:
  static constexpr u64 kTells = 1 | 8;  // enabled, and by interrupts
  static constexpr u64 kTokenOffset = 4;
  enum class News : u8 { kNone, kDue, kWaits /* for the guest's acknowledgement */ };
  u64 enable_ = 0, vector_ = 0, poll_ = 1;
  News news_ = News::kNone;
};

}  // namespace ring3::engine::abi
