#pragma once
#include <signal.h>
#include <stdint.h>
#include <sys/types.h>

#include "ring3/ring3.h"

/// Which file descriptors stand for objects of KVM.
///
/// Each object has a placeholder, a sealed empty memfd, so that its number is a real one: close, dup, poll, fork, exec and
/// SCM_RIGHTS treat it as they treat any file. A table from numbers to File says whose it is.
///
/// Threading: any thread. find() takes no lock: Files are recycled but never freed, so that a stale pointer may be looked at,
///            and a reference is only taken from a count that is not zero.
/// Fork:      a child inherits the numbers; VMs and vCPUs answer EIO there, as the kernel's do in another address space, and
///            are never destroyed there: their threads stayed behind.
namespace ring3::shim {

enum class Kind : uint8_t { System, Vm, Vcpu };

struct File {
  uint32_t references = 0;  ///< atomic; 0: free. One for each descriptor and each call in progress
  Kind kind = Kind::System;
  uint32_t process = 0;     ///< the value of process_generation() at its making
  ring3_kvm* object = nullptr;
  bool has_sigmask = false;  ///< KVM_SET_SIGNAL_MASK; the vCPU's thread only
  sigset_t sigmask = {};
  File* next_free = nullptr;
};

/// Takes the object. The new descriptor, or -errno (the object is closed then). name: what /proc/PID/fd shows.
int install(Kind kind, ring3_kvm* object, const char* name, bool cloexec);

/// With a reference, which release() gives back; null when fd is none of ours.
File* find(int fd);
void release(File* file);

/// Whether any descriptor of ours was ever made in this process: false spares all other work.
bool any_files();

/// `copy` is a new number for the same file as fd.
void duplicated(int fd, int copy);
/// The number is about to be closed or replaced.
void closing(int fd);
void closing_range(unsigned first, unsigned last);

/// Counts forks on the way from the first process to this one.
uint32_t process_generation();
/// Registers the fork handlers. Once.
void watch_forks();

/// No other thread changes the table meanwhile, and no signal handler of this thread runs.
class TableLock {
 public:
  TableLock();
  ~TableLock();
  TableLock(const TableLock&) = delete;
  TableLock& operator=(const TableLock&) = delete;

 private:
  sigset_t saved_;
};

}  // namespace ring3::shim
