#pragma once
#include <pthread.h>

#include "shim/files.hpp"

/// pthread_cancel(3) of threads that are in the engine. An asynchronous cancellation unwinds the thread wherever it stands; in the
/// kernel's KVM that is the ioctl's caller. So cancellation is off inside, KVM_RUN of a cancelled thread ends, and the
/// thread goes when it leaves.
namespace ring3::shim {

class CancelScope {
 public:
  /// vcpu: whose KVM_RUN this is; null for any other call.
  explicit CancelScope(File* vcpu);
  /// Where the program had cancellation on: a thread that was cancelled asynchronously meanwhile does not return from here.
  ~CancelScope();
  CancelScope(const CancelScope&) = delete;
  CancelScope& operator=(const CancelScope&) = delete;

  /// KVM_RUN is over: the vCPU may go.
  void over();

 private:
  int state_ = PTHREAD_CANCEL_ENABLE;
  unsigned slot_;
};

/// Behind pthread_cancel(): ends the KVM_RUN of that thread, if it is in one.
void cancelled(pthread_t thread);

}  // namespace ring3::shim
