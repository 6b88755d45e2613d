#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"

/// What a VM has of Xen's interface: the hypercall page, and hypercalls that are the VMM's.
///
/// Spec:      virt/kvm/api KVM_XEN_HVM_CONFIG, KVM_EXIT_XEN. Shared info, event channels and runstate are not served.
/// Threading: any thread; is_msr() and intercepts() are lock-free.
namespace ring3::engine::abi {

class Xen {
 public:
  /// KVM_CAP_XEN_HVM.
  static constexpr u32 kOffered = KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;

  /// KVM_XEN_HVM_CONFIG: 0 or -errno.
  long configure(const kvm_xen_hvm_config& config);
  /// The MSR by which a guest asks for hypercall pages.
  bool is_msr(u32 index) const { return index != 0 && index == msr_.load(std::memory_order_acquire); }
  /// VMCALL and VMMCALL are Xen's hypercalls, which the VMM answers.
  bool intercepts() const { return intercepts_.load(std::memory_order_acquire); }

  using GuestWriter = std::function<bool(Gpa to, const void* from, std::size_t size)>;
  /// WRMSR of that MSR: a page's address, and which of the VMM's pages in the low bits. amd: the guest's instruction is VMMCALL.
  /// False: #GP.
  bool write_page(u64 value, bool long_mode, bool amd, const GuestWriter& write);

 private:
  std::mutex mutex_;
  kvm_xen_hvm_config config_{};
  std::atomic<u32> msr_{0};
  std::atomic<bool> intercepts_{false};
};

}  // namespace ring3::engine::abi
