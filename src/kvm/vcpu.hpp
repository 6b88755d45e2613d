#pragma once
#include "base/linux_kvm.hpp"

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "kvm/endpoint.hpp"

namespace ring3::kvm {

/// One virtual CPU: its state, the run page, KVM_RUN.
///
/// Spec:      virt/kvm/api, the "vcpu ioctl" entries; each method is the ioctl of its name.
/// Errors:    Error::code is the ioctl's errno; the message names the ioctl.
/// Ownership: owns its Endpoint, and with it the run page.
/// Threading: one thread at a time, but for kick(), which any thread may call.
class Vcpu {
 public:
  explicit Vcpu(std::unique_ptr<Endpoint> endpoint) : endpoint_(std::move(endpoint)) {}

  Result<kvm_regs> regs() const;
  Status set_regs(const kvm_regs& regs);
  Result<kvm_sregs> sregs() const;
  Status set_sregs(const kvm_sregs& sregs);
  Result<kvm_fpu> fpu() const;
  Status set_fpu(const kvm_fpu& fpu);
  Result<kvm_lapic_state> lapic() const;
  Status set_lapic(const kvm_lapic_state& lapic);
  Result<kvm_vcpu_events> vcpu_events() const;
  Status set_vcpu_events(const kvm_vcpu_events& events);
  Result<kvm_mp_state> mp_state() const;
  Status set_mp_state(u32 state);
  Result<kvm_xcrs> xcrs() const;
  Status set_xcrs(const kvm_xcrs& xcrs);

  Status set_cpuid2(std::span<const kvm_cpuid_entry2> entries);
  Result<std::vector<kvm_cpuid_entry2>> cpuid2() const;
  /// Fails with EINVAL, naming the MSR, when not all of them were taken.
  Status set_msrs(std::span<const kvm_msr_entry> entries);
  /// Fills in the data of the entries, whose index is given.
  Status get_msrs(std::span<kvm_msr_entry> entries) const;
  Result<u32> tsc_khz() const;
  struct Statistic {
    std::string name;
    u64 value = 0;  ///< the first one, of a histogram
  };
  /// What KVM_GET_STATS_FD shows. Errors: EPROTO for a file that is not as the API has it.
  Result<std::vector<Statistic>> statistics() const;

  /// KVM_RUN. 0: the exit stands in run_page(); else -errno (-EINTR after a kick, -EAGAIN while an
  /// application processor wakes up: call it again).
  int run() { return static_cast<int>(endpoint_->ioctl(KVM_RUN, 0)); }

  /// The run page; valid for the vCPU's lifetime.
  kvm_run& run_page() const { return *endpoint_->run_page(); }
  /// PIO data of a KVM_EXIT_IO: size*count bytes in the run mapping. Empty when the exit's offsets
  /// do not lie in the mapping of `mmap_size` bytes.
  std::span<u8> io_data(u64 mmap_size) const;

  /// Makes a KVM_RUN in progress, or the next, return -EINTR. The run loop clears it with clear_kick().
  void kick() { endpoint_->kick(); }
  /// Takes back immediate_exit. Only on the vCPU's thread, before it looks at what the kick was for.
  void clear_kick() { __atomic_store_n(&endpoint_->run_page()->immediate_exit, u8{0}, __ATOMIC_SEQ_CST); }

  Endpoint& endpoint() const { return *endpoint_; }

 private:
  std::unique_ptr<Endpoint> endpoint_;
};

}  // namespace ring3::kvm
