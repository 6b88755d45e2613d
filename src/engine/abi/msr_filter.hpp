#pragma once
#include "base/linux_kvm.hpp"

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "base/types.hpp"

/// Which MSRs a guest may touch, and which accesses the VMM answers.
///
/// Spec:      virt/kvm/api KVM_X86_SET_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_MSR_PLATFORM_INFO.
/// Threading: any thread; a change holds for accesses that begin after the ioctl has returned.
namespace ring3::engine::abi {

class MsrFilter {
 public:
  /// KVM_X86_SET_MSR_FILTER with the struct at arg. 0 or -errno.
  long set(u64 arg);
  /// KVM_CAP_X86_USER_SPACE_MSR. 0 or -EINVAL.
  long set_user_space(u64 reasons);
  /// KVM_CAP_MSR_PLATFORM_INFO: whether guests may read MSR 0xce.
  void set_platform_info(bool readable);

  /// False: no access needs any of what follows. One load.
  bool active() const { return active_.load(std::memory_order_acquire); }
  bool allows(u32 index, bool write) const;
  /// Whether KVM_EXIT_X86_RDMSR and _WRMSR are wanted for this KVM_MSR_EXIT_REASON_*.
  bool asks(u32 reason) const { return (user_space_.load(std::memory_order_relaxed) & reason) != 0; }

 private:
  struct Range {
    u32 flags = 0, base = 0, count = 0;
    std::vector<u64> bitmap;
  };
  struct Table {
    bool default_allow = true;
    std::vector<Range> ranges;
  };
  void refresh_active();

  mutable std::mutex mutex_;
  std::shared_ptr<const Table> table_;  // guarded by mutex_; null: everything is allowed
  std::atomic<u32> user_space_{0};
  std::atomic<bool> platform_info_{true};
  std::atomic<bool> active_{false};
};

}  // namespace ring3::engine::abi
