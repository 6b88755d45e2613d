#include "shim/kvm.hpp"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "shim/engine.hpp"
#include "shim/heap.hpp"
#include "shim/real.hpp"
#include "shim/sharing.hpp"
#include "shim/signals.hpp"

namespace ring3::shim {
namespace {

constexpr size_t kPage = 4096;
constexpr unsigned long kSetUserMemoryRegion2 = _IOC(_IOC_WRITE, KVMIO, 0x49, 160);  // not in the headers of older kernels

/// RING3_SHIM_TRACE=1: every ioctl but KVM_RUN, one line each on standard error.
bool tracing() {
  static const bool on = ::getenv("RING3_SHIM_TRACE") != nullptr;
  return on;
}

void trace(const File* file, unsigned long request, void* arg, long result) {
  static const char* const kNames[] = {"kvm", "vm", "vcpu"};
  ::fprintf(stderr, "ring3-shim: %s nr 0x%02lx size %lu arg %p: %ld\n", kNames[static_cast<unsigned>(file->kind)],
            request & 0xff, request >> 16 & 0x3fff, arg, result);
}

int make(File* parent, unsigned long request, unsigned long arg) {
  ring3_kvm* object = nullptr;
  const int error = engine().create(parent->object, request, arg, &object);
  if (error != 0) return error;
  if (request == KVM_CREATE_VM) return install(Kind::Vm, object, "kvm-vm", true);
  char name[32];
  ::snprintf(name, sizeof name, "kvm-vcpu:%lu", arg);
  return install(Kind::Vcpu, object, name, true);
}

long set_signal_mask(File* file, const void* arg) {
  if (arg == nullptr) {
    file->has_sigmask = false;
    return 0;
  }
  // The engine survives a pointer to nothing; who changes the bytes right after takes what comes.
  if (const long error = engine().ioctl(file->object, KVM_SET_SIGNAL_MASK, const_cast<void*>(arg)); error != 0) return error;
  uint64_t mask;
  memcpy(&mask, static_cast<const char*>(arg) + sizeof(kvm_signal_mask), sizeof mask);
  let_through(mask);
  sigemptyset(&file->sigmask);
  for (int sig = 1; sig <= 64; sig++) {
    if ((mask >> (sig - 1) & 1) && sig != SIGKILL && sig != SIGSTOP) sigaddset(&file->sigmask, sig);
  }
  file->has_sigmask = true;
  return 0;
}

}  // namespace

bool is_kvm_path(const char* path) { return path != nullptr && path[0] == '/' && strcmp(path, "/dev/kvm") == 0; }

int open_system(int flags) {
  if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL)) return -EEXIST;
  if (flags & O_DIRECTORY) return -ENOTDIR;
  heap_for_engine();
  if (const int error = load_engine(); error != 0) return error;
  ring3_kvm* object = nullptr;
  if (const int error = engine().open(::getenv("RING3_ENGINE_OPTIONS"), RING3_SIGNALS_ANNOUNCED | RING3_WINDOW_MEMORY_ANNOUNCED, &object); error != 0) {
    ::fprintf(stderr, "ring3-shim: %s\n", engine().error());
    return error;
  }
  return install(Kind::System, object, "kvm", (flags & O_CLOEXEC) != 0);
}

long ioctl_on(File* file, unsigned long request, void* arg) {
  if (file->kind != Kind::System && file->process != process_generation()) return -EIO;
  if (file->kind == Kind::Vcpu && request == KVM_RUN) {
    const RunScope scope(file);
    return engine().ioctl(file->object, request, arg);
  }
  long result;
  if ((file->kind == Kind::System && request == KVM_CREATE_VM) || (file->kind == Kind::Vm && request == KVM_CREATE_VCPU)) {
    result = make(file, request, reinterpret_cast<unsigned long>(arg));
  } else if (file->kind == Kind::Vcpu && request == KVM_SET_SIGNAL_MASK) {
    result = set_signal_mask(file, arg);
  } else {
    if (file->kind == Kind::Vm && (request == KVM_SET_USER_MEMORY_REGION || request == kSetUserMemoryRegion2)) share_region(file->object, arg);
    result = engine().ioctl(file->object, request, arg);
  }
  if (tracing()) trace(file, request, arg, result);
  return result;
}

long mmap_of(File* file, void* address, size_t length, int protection, int flags, off_t offset) {
  if (file->kind != Kind::Vcpu) return -ENODEV;
  if (length == 0 || (offset & static_cast<off_t>(kPage - 1)) != 0) return -EINVAL;
  length = (length + kPage - 1) & ~(kPage - 1);
  // As the kernel: the dirty ring is shared data.
  if (!(flags & MAP_SHARED) || (protection & PROT_EXEC)) {
    const uint64_t ring = KVM_DIRTY_LOG_PAGE_OFFSET * kPage, begin = static_cast<uint64_t>(offset);
    const uint64_t ends[] = {begin, begin + length - kPage};
    for (const uint64_t at : ends) {
      size_t size = 0;
      if (at >= ring && engine().mapping(file->object, at, &size) != nullptr) return -EINVAL;
    }
  }
  // What lies behind the area stays without access, where the kernel's would raise SIGBUS.
  char* at = static_cast<char*>(real::mmap(address, length, PROT_NONE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE |
                                               (flags & (MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_32BIT)),
                                           -1, 0));
  if (at == MAP_FAILED) return -errno;
  for (size_t done = 0; done < length; done += kPage) {
    size_t size = 0;
    void* page = engine().mapping(file->object, static_cast<uint64_t>(offset) + done, &size);
    if (page == nullptr) continue;
    if (::mremap(page, 0, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, at + done) == MAP_FAILED ||
        (protection != (PROT_READ | PROT_WRITE) && ::mprotect(at + done, kPage, protection) != 0)) {
      const int error = errno;
      ::munmap(at, length);
      return -error;
    }
  }
  return reinterpret_cast<long>(at);
}

}  // namespace ring3::shim
