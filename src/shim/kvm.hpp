#pragma once
#include <stddef.h>
#include <sys/types.h>

#include "shim/files.hpp"

/// The system calls on KVM's descriptors. All return what the system call would, or -errno.
namespace ring3::shim {

/// Whether this path names /dev/kvm. Never follows anything.
bool is_kvm_path(const char* path);

/// open("/dev/kvm"): a new system descriptor.
int open_system(int flags);

/// The ioctl numbers of KVM are its own: none other has this type.
inline bool is_kvm_request(unsigned long request) { return (request >> 8 & 0xff) == KVMIO; }

long ioctl_on(File* file, unsigned long request, void* arg);

/// mmap(2) of a vCPU's descriptor: its run area is mapped a second time.
long mmap_of(File* file, void* address, size_t length, int protection, int flags, off_t offset);

}  // namespace ring3::shim
