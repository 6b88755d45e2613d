#include "kvm/vm.hpp"

#include <cstring>
#include <vector>

namespace ring3::kvm {
namespace {
Status status(const char* name, long r) {
  if (r < 0) return Error::from_errno(name, static_cast<int>(-r));
  return Ok{};
}
template <class T>
u64 arg(T& object) {
  return reinterpret_cast<u64>(&object);
}
template <class T>
u64 arg(const T& object) {
  return reinterpret_cast<u64>(&object);
}
}  // namespace

int Vm::check_extension(int capability) const {
  const long r = endpoint_->ioctl(KVM_CHECK_EXTENSION, static_cast<u64>(capability));
  return r < 0 ? 0 : static_cast<int>(r);
}

Status Vm::enable_cap(u32 capability, u64 arg0) {
  kvm_enable_cap cap{};
  cap.cap = capability;
  cap.args[0] = arg0;
  return status("KVM_ENABLE_CAP", endpoint_->ioctl(KVM_ENABLE_CAP, arg(cap)));
}

Status Vm::set_user_memory_region(u32 slot, Gpa start, u64 size, Hva host, u32 flags) {
  kvm_userspace_memory_region region{};
  region.slot = slot;
  region.flags = flags;
  region.guest_phys_addr = start.value;
  region.memory_size = size;
  region.userspace_addr = host.value;
  return status("KVM_SET_USER_MEMORY_REGION", endpoint_->ioctl(KVM_SET_USER_MEMORY_REGION, arg(region)));
}

Status Vm::set_tss_addr(Gpa where) {
  return status("KVM_SET_TSS_ADDR", endpoint_->ioctl(KVM_SET_TSS_ADDR, where.value));
}

Status Vm::set_identity_map_addr(Gpa where) {
  const u64 address = where.value;
  return status("KVM_SET_IDENTITY_MAP_ADDR", endpoint_->ioctl(KVM_SET_IDENTITY_MAP_ADDR, arg(address)));
}

Status Vm::create_irqchip() { return status("KVM_CREATE_IRQCHIP", endpoint_->ioctl(KVM_CREATE_IRQCHIP, 0)); }

Status Vm::create_pit2(u32 flags) {
  kvm_pit_config config{};
  config.flags = flags;
  return status("KVM_CREATE_PIT2", endpoint_->ioctl(KVM_CREATE_PIT2, arg(config)));
}

Status Vm::set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) {
  std::vector<u64> buffer((sizeof(kvm_irq_routing) + entries.size_bytes() + 7) / 8);
  auto* head = reinterpret_cast<kvm_irq_routing*>(buffer.data());
  head->nr = static_cast<u32>(entries.size());
  std::memcpy(head->entries, entries.data(), entries.size_bytes());
  return status("KVM_SET_GSI_ROUTING", endpoint_->ioctl(KVM_SET_GSI_ROUTING, reinterpret_cast<u64>(head)));
}

Status Vm::irq_line(u32 gsi, bool level) {
  kvm_irq_level line{};
  line.irq = gsi;
  line.level = level ? 1 : 0;
  return status("KVM_IRQ_LINE", endpoint_->ioctl(KVM_IRQ_LINE, arg(line)));
}

Status Vm::signal_msi(const kvm_msi& msi) {
  return status("KVM_SIGNAL_MSI", endpoint_->ioctl(KVM_SIGNAL_MSI, arg(msi)));
}

Status Vm::ioeventfd(const kvm_ioeventfd& request) {
  return status("KVM_IOEVENTFD", endpoint_->ioctl(KVM_IOEVENTFD, arg(request)));
}
Status Vm::irqfd(const kvm_irqfd& request) {
  return status("KVM_IRQFD", endpoint_->ioctl(KVM_IRQFD, arg(request)));
}

Status Vm::get_irqchip(kvm_irqchip& chip) const {
  return status("KVM_GET_IRQCHIP", endpoint_->ioctl(KVM_GET_IRQCHIP, arg(chip)));
}
Status Vm::set_irqchip(const kvm_irqchip& chip) {
  return status("KVM_SET_IRQCHIP", endpoint_->ioctl(KVM_SET_IRQCHIP, arg(chip)));
}
Status Vm::get_pit2(kvm_pit_state2& state) const {
  return status("KVM_GET_PIT2", endpoint_->ioctl(KVM_GET_PIT2, arg(state)));
}
Status Vm::set_pit2(const kvm_pit_state2& state) {
  return status("KVM_SET_PIT2", endpoint_->ioctl(KVM_SET_PIT2, arg(state)));
}
Status Vm::get_clock(kvm_clock_data& clock) const {
  return status("KVM_GET_CLOCK", endpoint_->ioctl(KVM_GET_CLOCK, arg(clock)));
}
Status Vm::set_clock(const kvm_clock_data& clock) {
  return status("KVM_SET_CLOCK", endpoint_->ioctl(KVM_SET_CLOCK, arg(clock)));
}

Result<Vcpu> Vm::create_vcpu(u32 id) {
  auto vcpu = endpoint_->create(KVM_CREATE_VCPU, id);
  if (!vcpu) return Error::of(vcpu.error().code, "KVM_CREATE_VCPU: " + vcpu.error().message);
  return Vcpu(std::move(*vcpu));
}

}  // namespace ring3::kvm
