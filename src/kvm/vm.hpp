#pragma once
#include "base/linux_kvm.hpp"

#include <memory>
#include <span>

#include "base/result.hpp"
#include "base/types.hpp"
#include "kvm/endpoint.hpp"
#include "kvm/vcpu.hpp"

namespace ring3::kvm {

/// One virtual machine: memory slots, in-kernel interrupt controllers, vCPUs.
///
/// Spec:      virt/kvm/api, the "vm ioctl" entries; each method is the ioctl of its name.
/// Errors:    Error::code is the ioctl's errno; the message names the ioctl.
/// Ownership: owns its Endpoint. Memory given to set_user_memory_region is the caller's and has to
///            stay mapped until the slot is deleted or the VM and its vCPUs are destroyed.
/// Threading: any thread.
class Vm {
 public:
  explicit Vm(std::unique_ptr<Endpoint> endpoint) : endpoint_(std::move(endpoint)) {}

  int check_extension(int capability) const;
  /// KVM_ENABLE_CAP with one argument.
  Status enable_cap(u32 capability, u64 arg0 = 0);

  /// memory_size 0 deletes the slot. All three sizes and addresses are page aligned.
  Status set_user_memory_region(u32 slot, Gpa start, u64 size, Hva host, u32 flags = 0);
  Status set_tss_addr(Gpa where);
  Status set_identity_map_addr(Gpa where);

  Status create_irqchip();
  /// KVM_CREATE_PIT2. flags: KVM_PIT_SPEAKER_DUMMY answers port 0x61 too.
  Status create_pit2(u32 flags);
  Status set_gsi_routing(std::span<const kvm_irq_routing_entry> entries);
  /// KVM_IRQ_LINE: the level of a GSI's line.
  Status irq_line(u32 gsi, bool level);
  Status signal_msi(const kvm_msi& msi);

  /// KVM_IOEVENTFD and KVM_IRQFD, assigning and deassigning.
  Status ioeventfd(const kvm_ioeventfd& request);
  Status irqfd(const kvm_irqfd& request);

  Status get_irqchip(kvm_irqchip& chip) const;
  Status set_irqchip(const kvm_irqchip& chip);
  Status get_pit2(kvm_pit_state2& state) const;
  Status set_pit2(const kvm_pit_state2& state);
  Status get_clock(kvm_clock_data& clock) const;
  Status set_clock(const kvm_clock_data& clock);

  /// KVM_CREATE_VCPU. The id is the initial APIC id.
  Result<Vcpu> create_vcpu(u32 id);

  Endpoint& endpoint() const { return *endpoint_; }

 private:
  std::unique_ptr<Endpoint> endpoint_;
};

}  // namespace ring3::kvm
