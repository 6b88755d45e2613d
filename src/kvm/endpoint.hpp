#pragma once
#include "base/linux_kvm.hpp"

#include <functional>
#include <memory>
#include <span>

#include "base/mapping.hpp"
#include "base/result.hpp"
#include "base/types.hpp"

/// The seam. Everything above it speaks the KVM ABI: ioctl numbers and structs of <linux/kvm.h>,
/// semantics of the kernel's virt/kvm/api documentation. Two providers stand behind it: the
/// kernel's file descriptors (kernel_provider.hpp) and the software engine (engine/abi/provider.hpp).
/// Nothing above asks which one it has.
namespace ring3::kvm {

/// One object that takes KVM ioctls: /dev/kvm itself, a VM, a vCPU, or a device.
///
/// Threading: as the kernel's: system, VM and device ioctls from any thread; vCPU ioctls from one
/// thread at a time (the provider serialises, as the kernel's vcpu->mutex does).
/// Lifetime:  an object may be destroyed before those made from it; they keep what they need alive.
class Endpoint {
 public:
  virtual ~Endpoint() = default;

  /// The ioctl: request and argument as for ioctl(2) (an integer, or a pointer cast to u64).
  /// Returns the kernel's result (>= 0), or -errno. Never sets errno.
  /// Ioctls that make another object (KVM_CREATE_VM, KVM_CREATE_VCPU, KVM_CREATE_DEVICE) are not
  /// taken here: see create().
  virtual long ioctl(unsigned long request, u64 arg) = 0;

  /// KVM_CREATE_VM on the system, KVM_CREATE_VCPU on a VM. Error::code is the errno.
  virtual Result<std::unique_ptr<Endpoint>> create(unsigned long request, u64 arg) = 0;

  /// vCPU only: the mapped run page and what follows it, KVM_GET_VCPU_MMAP_SIZE bytes; owned by the
  /// endpoint, valid for its lifetime. Null on other objects.
  virtual kvm_run* run_page() = 0;

  /// Makes a KVM_RUN in progress, or the next one, return -EINTR soon. Any thread. The provider
  /// sets immediate_exit and wakes the vCPU thread; the caller clears immediate_exit afterwards.
  virtual void kick() = 0;

  /// vCPU only: a signal came. The KVM_RUN in progress, or the next one, returns -EINTR soon; immediate_exit stays
  /// as it is. Any thread, async-signal-safe. Does nothing where the provider sees signals by itself.
  virtual void signal_came() {}

  /// VM only: from now on the caller tells, by stored(), of everything that it stores to guest memory itself, for as long
  /// as the VM exists. A provider that cannot see such stores need not look for them, at each KVM_RUN and after each
  /// HLT, in the code that it keeps translations of. Before the first vCPU runs.
  virtual void announces_stores() {}
  /// VM only: [start, start + size) of guest memory was stored to by the caller, by system calls or with its own hands: after
  /// the stores, and before the guest can learn of them (a ring's index, an interrupt). Any thread; does not wait.
  virtual void stored(Gpa start, u64 size) { static_cast<void>(start), static_cast<void>(size); }

  /// VM only: a vCPU that looks for its interrupt after HLT, before its thread sleeps, calls look(true) again and again, every other
  /// microsecond, and look(false) once when it has looked enough: what the caller waits for elsewhere may end meanwhile. On the vCPUs' threads,
  /// several at once; not called where the provider does not look. Before the first vCPU runs.
  virtual void while_halted(std::function<void(bool more)> look) { static_cast<void>(look); }

  /// VM only: [begin, begin + size) of the caller's memory, page aligned, may be mapped a second time by mremap(2) of old size 0, and stays
  /// what it is at these addresses (may), or from now on does not: nothing of it is used through such mappings when this
  /// returns. Any thread that holds no lock which a vCPU's exit waits for. False: this provider has no use for it, and need not be told.
  virtual bool window_memory(u64 begin, u64 size, bool may) { return static_cast<void>(begin), static_cast<void>(size), static_cast<void>(may), false; }

  /// vCPU only: the memory that mmap(2) of the vCPU's fd shows from this offset on (bytes, page aligned). It is shared
  /// memory, so that mremap(2) of old size 0 maps it a second time; its pages are not one mapping. Empty where
  /// nothing is, and on other objects. Owned by the endpoint.
  virtual std::span<u8> mappable(u64 offset) {
    static_cast<void>(offset);
    return {};
  }
};

}  // namespace ring3::kvm
