#pragma once
#include "base/linux_kvm.hpp"

/// What kernels after 6.1 added to <linux/kvm.h> and the engine serves, for builds with older headers.
///
/// Spec: virt/kvm/api of Linux 6.8 and later, KVM_SET_USER_MEMORY_REGION2.

#ifndef KVM_CAP_USER_MEMORY2
#define KVM_CAP_USER_MEMORY2 231
/// kvm_userspace_memory_region, which it begins with, and memory that belongs to the guest alone: no memslot here has that.
struct kvm_userspace_memory_region2 {
  __u32 slot;
  __u32 flags;
  __u64 guest_phys_addr;
  __u64 memory_size;
  __u64 userspace_addr;
  __u64 guest_memfd_offset;
  __u32 guest_memfd;
  __u32 pad1;
  __u64 pad2[14];
};
#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#endif
