// What the Xen room needs of a VM and its vCPUs, and the ioctls.
#include <fcntl.h>

#include <cerrno>

#include "engine/abi/user_memory.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"

namespace ring3::engine::abi {

// ---- the VM ----

bool Vm::read(Gpa from, void* to, std::size_t size) { return read_memory(from, to, size); }
bool Vm::write(Gpa to, const void* from, std::size_t size) { return write_memory(to, from, size, nullptr); }
int Vm::set_bits(Gpa at, u8 bits) { return set_memory_bits(at, bits, nullptr); }
bool Vm::read_vmm(u64 address, void* to, std::size_t size) { return copy_bytes_in(address, to, size); }

xen::Vcpu* Vm::find_vcpu(u32 id) {
  Vcpu* const v = vcpu(id);
  return v != nullptr ? &v->xen() : nullptr;
}

int Vm::copy_eventfd(int fd) {
  if (const i64 id = eventfd_identity(fd); id < 0) return static_cast<int>(id);
  const int copy = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
  return copy < 0 ? -errno : copy;
}

long Vm::xen_ioctl(unsigned long request, u64 arg) {
  switch (request) {
    case KVM_XEN_HVM_CONFIG: {
      kvm_xen_hvm_config config;
      if (!copy_in(arg, &config)) return -EFAULT;
      const int result = xen_.configure(config);
      if (result == 0) hv_.set_beside_xen(xen_.intercepts());
      return result;
    }
    case KVM_XEN_HVM_EVTCHN_SEND: {
      kvm_irq_routing_xen_evtchn event;
      return copy_in(arg, &event) ? xen_.send(event) : -EFAULT;
    }
    case KVM_XEN_HVM_SET_ATTR: {
      kvm_xen_hvm_attr attr;
      if (!copy_in(arg, &attr)) return -EFAULT;
      const int result = xen_.set_attr(attr);
      if (result == 0 && attr.type == KVM_XEN_ATTR_TYPE_SHARED_INFO) request_clock_updates();
      return result;
    }
    default: {
      kvm_xen_hvm_attr attr;
      if (!copy_in(arg, &attr)) return -EFAULT;
      const int result = xen_.get_attr(&attr);
      return result != 0 || copy_out(arg, attr) ? result : -EFAULT;
    }
  }
}

// ---- a vCPU ----

int Vcpu::set_bits(Gpa at, u8 bits) { return vm_.set_memory_bits(at, bits, nullptr); }  // other threads' as well
void Vcpu::attend_events() { raise(kAttendXen); }
void Vcpu::attend_time() { raise(kAttendClock); }

bool Vcpu::translate(u64 linear, Gpa* at) {
  const Mmu::Translation t = mmu_.translate(linear);
  *at = t.gpa;
  return t.valid;
}

long Vcpu::xen_ioctl(unsigned long request, u64 arg) {
  kvm_xen_vcpu_attr attr;
  if (!copy_in(arg, &attr)) return -EFAULT;
  if (request == KVM_XEN_VCPU_SET_ATTR) return xen_->set_attr(attr);
  const int result = xen_->get_attr(&attr);
  return result != 0 || copy_out(arg, attr) ? result : -EFAULT;
}

}  // namespace ring3::engine::abi
