#pragma once
#include "shim/files.hpp"

/// Signals as the kernel's KVM_RUN treats them: one that comes while the guest runs ends KVM_RUN with EINTR, and its handler runs
/// when ioctl(2) is about to return, with the thread's own signal mask.
///
/// The program's handlers are wrapped. When one is called on a thread in KVM_RUN, the wrapper blocks the signal in the
/// interrupted context, queues it again for this thread with the same siginfo, and tells the vCPU. When KVM_RUN has
/// returned the mask is put back, and the signal arrives a second time, now for the program. So handlers never run amid
/// guest code, may leave by siglongjmp, and no signal is lost before a wait.
///
/// The engine has handlers of its own for SIGSEGV, SIGBUS, SIGFPE and SIGILL. They stay in place whatever the program
/// installs: what is not the engine's own is passed on to the program's action.
namespace ring3::shim {

/// Wraps the handlers that stand now; from then on sigaction() and signal() wrap theirs. Once, when the engine is loaded.
void take_over_signals();

/// KVM_RUN on this thread, from the constructor on; the destructor lets the held-back signals come.
class RunScope {
 public:
  explicit RunScope(File* vcpu);
  ~RunScope();
  RunScope(const RunScope&) = delete;
  RunScope& operator=(const RunScope&) = delete;

 private:
  bool masked_ = false;
  sigset_t thread_mask_;
};

/// KVM_SET_SIGNAL_MASK lets these through (the kernel's sigset_t): those that would end the process are wrapped too, for
/// KVM_RUN only returns EINTR when such a signal comes that the thread itself blocks.
void let_through(uint64_t mask);

/// sigaction(2), as programs and the engine call it.
int set_action(int sig, const struct sigaction* action, struct sigaction* old, bool by_engine);

}  // namespace ring3::shim
