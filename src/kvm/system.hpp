#pragma once
#include "base/linux_kvm.hpp"

#include <memory>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "kvm/endpoint.hpp"
#include "kvm/vm.hpp"

namespace ring3::kvm {

/// The system object (/dev/kvm): what this KVM offers, and where VMs are made.
///
/// Spec:      virt/kvm/api, the "system ioctl" entries.
/// Errors:    Error::code is the ioctl's errno; the message names the ioctl.
/// Ownership: shares its Endpoint. VMs made from it may outlive it.
/// Threading: any thread.
class System {
 public:
  /// Checks KVM_GET_API_VERSION (12 is the only one there ever was).
  static Result<System> create(std::shared_ptr<Endpoint> endpoint);

  /// KVM_CHECK_EXTENSION: 0 when absent, else the capability's value.
  int check_extension(int capability) const;
  /// KVM_CREATE_VM, machine type 0.
  Result<Vm> create_vm() const;
  /// KVM_GET_SUPPORTED_CPUID, whole (the buffer grows on E2BIG).
  Result<std::vector<kvm_cpuid_entry2>> supported_cpuid() const;
  /// KVM_GET_MSR_INDEX_LIST, whole.
  Result<std::vector<u32>> msr_index_list() const;
  /// KVM_GET_VCPU_MMAP_SIZE, bytes.
  Result<u64> vcpu_mmap_size() const;

  Endpoint& endpoint() const { return *endpoint_; }

 private:
  explicit System(std::shared_ptr<Endpoint> endpoint) : endpoint_(std::move(endpoint)) {}
  std::shared_ptr<Endpoint> endpoint_;
};

}  // namespace ring3::kvm
