#pragma once
#include <array>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/xen/domain.hpp"

/// How long a vCPU was in each of Xen's states.
///
/// Spec:      vcpu.h, VCPUOP_get_runstate_info; virt/kvm/api KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_*.
/// Units:     ns of the VM's clock. The times add up to when the present state began.
/// Threading: the vCPU's owner.
namespace ring3::engine::xen {

class Runstate {
 public:
  /// delay_ns: how long the thread has waited for a CPU since it began; what came while running was runnable instead.
  /// same_thread: the last delay was the same thread's.
  void enter(State state, u64 now_ns, u64 delay_ns, bool same_thread);
  /// KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, _ADJUST: 0 or -EINVAL (times that do not add up, or are of the future).
  int set(const kvm_xen_vcpu_attr& attr, u64 now_ns, u64 delay_ns);
  int adjust(const kvm_xen_vcpu_attr& attr, u64 now_ns);
  void get(kvm_xen_vcpu_attr* attr) const;
  State state() const { return state_; }
  /// The guest's copy at `at`. False: no memory is there.
  bool write(Memory& memory, Gpa at, bool long_mode) const;

 private:
  State state_ = State::kRunning;
  u64 since_ = 0;
  std::array<u64, kStates> times_{};
  u64 delay_ = 0;
};

}  // namespace ring3::engine::xen
