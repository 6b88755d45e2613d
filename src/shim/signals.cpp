#include "shim/signals.hpp"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "shim/engine.hpp"
#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr int kSignals = 65;  // 1 to 64

struct Entry {
  uint32_t version = 0;          // atomic; odd while the rest changes
  struct sigaction program = {};  // what the program believes to have set
  bool wrapped = false;          // the kernel calls on_signal() for it, or the engine's handler does
  bool pinned = false;           // the engine's handler stands; it passes on to on_signal()
  bool held = false;             // on_signal() stands even for a default action
};
Entry g_entries[kSignals];
struct sigaction g_engine_actions[kSignals];  // of pinned ones
bool g_taken = false;                         // atomic

// Of this thread: the vCPU whose KVM_RUN is in progress, and the mask to return to when signals were held back.
__thread File* volatile t_vcpu __attribute__((tls_model("initial-exec"))) = nullptr;
__thread volatile bool t_held_back __attribute__((tls_model("initial-exec"))) = false;
__thread sigset_t t_mask __attribute__((tls_model("initial-exec")));

bool is_handler(const struct sigaction& a) {
  return (a.sa_flags & SA_SIGINFO) != 0 || (a.sa_handler != SIG_DFL && a.sa_handler != SIG_IGN);
}

bool is_fault(int sig) { return sig == SIGSEGV || sig == SIGBUS || sig == SIGFPE || sig == SIGILL; }

bool default_ends_process(int sig) {
  switch (sig) {
    case SIGCHLD: case SIGCONT: case SIGURG: case SIGWINCH: case SIGSTOP: case SIGTSTP: case SIGTTIN: case SIGTTOU:
    case SIGKILL:
      return false;
    default:
      return true;
  }
}

struct sigaction read_program(int sig) {
  const Entry& e = g_entries[sig];
  for (;;) {
    const uint32_t before = __atomic_load_n(&e.version, __ATOMIC_ACQUIRE);
    if (before & 1) continue;
    struct sigaction copy = e.program;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    if (__atomic_load_n(&e.version, __ATOMIC_RELAXED) == before) return copy;
  }
}

/// Precondition: TableLock.
void write_program(int sig, const struct sigaction& action) {
  Entry& e = g_entries[sig];
  __atomic_add_fetch(&e.version, 1, __ATOMIC_ACQ_REL);
  e.program = action;
  __atomic_add_fetch(&e.version, 1, __ATOMIC_RELEASE);
}

void queue_again(int sig, siginfo_t* info) {
  const pid_t pid = ::getpid();
  const long tid = real::syscall(SYS_gettid, 0, 0, 0, 0, 0, 0);
  if (real::syscall(SYS_rt_tgsigqueueinfo, pid, tid, sig, reinterpret_cast<long>(info), 0, 0) != 0) {
    real::syscall(SYS_tgkill, pid, tid, sig, 0, 0, 0);
  }
}

/// What the kernel would have done for a program without a handler.
void default_action(int sig, siginfo_t* info, bool fault) {
  struct sigaction dfl;
  memset(&dfl, 0, sizeof dfl);
  dfl.sa_handler = SIG_DFL;
  real::sigaction(sig, &dfl, nullptr);
  if (!fault) queue_again(sig, info);  // a fault is raised again by the instruction itself
}

void on_signal(int sig, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  ucontext_t* uc = static_cast<ucontext_t*>(context);
  const bool fault = info->si_code > 0 && (is_fault(sig) || sig == SIGTRAP);
  File* vcpu = t_vcpu;
  if (vcpu != nullptr && !fault) {
    if (!t_held_back) {
      t_mask = uc->uc_sigmask;
      t_held_back = true;
    }
    sigaddset(&uc->uc_sigmask, sig);
    queue_again(sig, info);
    engine().signal(vcpu->object);
    errno = saved_errno;
    return;
  }

  struct sigaction action = read_program(sig);
  if (!is_handler(action)) {
    if (action.sa_handler == SIG_DFL || fault) default_action(sig, info, fault);
    errno = saved_errno;
    return;
  }
  if (action.sa_flags & static_cast<int>(SA_RESETHAND)) {
    struct sigaction dfl;
    memset(&dfl, 0, sizeof dfl);
    dfl.sa_handler = SIG_DFL;
    set_action(sig, &dfl, nullptr, false);
  }
  if (__atomic_load_n(&g_entries[sig].pinned, __ATOMIC_RELAXED)) {
    // The engine's handler has an empty mask: the program's is applied here, and taken back by the return.
    pthread_sigmask(SIG_BLOCK, &action.sa_mask, nullptr);
    if (action.sa_flags & SA_NODEFER) {
      sigset_t self;
      sigemptyset(&self);
      sigaddset(&self, sig);
      pthread_sigmask(SIG_UNBLOCK, &self, nullptr);
    }
  }
  if (action.sa_flags & SA_SIGINFO) {
    action.sa_sigaction(sig, info, context);
  } else {
    action.sa_handler(sig);
  }
}

/// The action that the kernel is given in place of the program's.
struct sigaction wrapper_of(const struct sigaction& program) {
  struct sigaction w = program;
  w.sa_sigaction = on_signal;
  w.sa_flags = (program.sa_flags | SA_SIGINFO) & ~static_cast<int>(SA_RESETHAND);
  return w;
}

/// Precondition: TableLock. Makes the entry true to what stands now, if it was never asked for.
void learn(int sig) {
  Entry& e = g_entries[sig];
  if (e.wrapped || e.pinned || e.held) return;
  struct sigaction now;
  if (real::sigaction(sig, nullptr, &now) == 0) write_program(sig, now);
}

int set_engines(int sig, const struct sigaction* action, struct sigaction* old) {
  Entry& e = g_entries[sig];
  if (__atomic_load_n(&e.pinned, __ATOMIC_ACQUIRE) && action == nullptr) {
    if (old != nullptr) *old = g_engine_actions[sig];
    return 0;
  }
  const TableLock lock;
  learn(sig);
  if (old != nullptr) {
    // What the engine is to pass on to.
    *old = e.pinned ? g_engine_actions[sig] : wrapper_of(e.program);
    if (!e.pinned) old->sa_flags |= SA_SIGINFO;
  }
  if (action == nullptr) return 0;
  if (real::sigaction(sig, action, nullptr) != 0) return -1;
  g_engine_actions[sig] = *action;
  e.wrapped = true;
  __atomic_store_n(&e.pinned, is_handler(*action), __ATOMIC_RELEASE);
  return 0;
}

}  // namespace

int set_action(int sig, const struct sigaction* action, struct sigaction* old, bool by_engine) {
  if (sig < 1 || sig >= kSignals || !__atomic_load_n(&g_taken, __ATOMIC_ACQUIRE)) return real::sigaction(sig, action, old);
  if (by_engine) return set_engines(sig, action, old);
  if (sig == SIGKILL || sig == SIGSTOP) return real::sigaction(sig, action, old);
  const struct sigaction wanted = action != nullptr ? *action : read_program(sig);
  const TableLock lock;
  Entry& e = g_entries[sig];
  learn(sig);
  const struct sigaction before = e.program;
  if (action != nullptr) {
    if (!e.pinned) {
      const bool wrap = e.held || is_handler(wanted);
      // The program's action first: the wrapper may be called as soon as it stands.
      write_program(sig, wanted);
      const struct sigaction kernels = wrap ? wrapper_of(wanted) : wanted;
      if (real::sigaction(sig, &kernels, nullptr) != 0) {
        write_program(sig, before);
        return -1;
      }
      e.wrapped = wrap;
    } else {
      write_program(sig, wanted);
    }
  }
  if (old != nullptr) *old = before;
  return 0;
}

void take_over_signals() {
  const TableLock lock;
  for (int sig = 1; sig < kSignals; sig++) {
    struct sigaction now;
    if (sig == SIGKILL || sig == SIGSTOP || real::sigaction(sig, nullptr, &now) != 0) continue;
    write_program(sig, now);
    if (!is_handler(now)) continue;
    const struct sigaction w = wrapper_of(now);
    g_entries[sig].wrapped = real::sigaction(sig, &w, nullptr) == 0;
  }
  __atomic_store_n(&g_taken, true, __ATOMIC_RELEASE);
}

void let_through(uint64_t mask) {
  const TableLock lock;
  for (int sig = 1; sig < kSignals; sig++) {
    Entry& e = g_entries[sig];
    if ((mask >> (sig - 1) & 1) || !default_ends_process(sig) || sig == SIGKILL || sig == SIGSTOP) continue;
    // Those of libc's own use, and synchronous ones, stay as they are.
    if ((sig >= 32 && sig < SIGRTMIN) || is_fault(sig) || sig == SIGTRAP || sig == SIGABRT) continue;
    learn(sig);
    if (e.wrapped || e.held || e.program.sa_handler != SIG_DFL) continue;
    const struct sigaction w = wrapper_of(e.program);
    e.held = e.wrapped = real::sigaction(sig, &w, nullptr) == 0;
  }
}

RunScope::RunScope(File* vcpu) {
  if (vcpu->has_sigmask) {
    // In KVM_RUN's place from here on: a signal that the mask lets through now ends it at once.
    t_vcpu = vcpu;
    masked_ = true;
    pthread_sigmask(SIG_SETMASK, &vcpu->sigmask, &thread_mask_);
    return;
  }
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  t_vcpu = vcpu;
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

RunScope::~RunScope() {
  __atomic_signal_fence(__ATOMIC_SEQ_CST);
  if (!masked_) {
    t_vcpu = nullptr;
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (t_held_back) {
      const sigset_t mask = t_mask;
      t_held_back = false;
      pthread_sigmask(SIG_SETMASK, &mask, nullptr);  // the program's handlers run here
    }
    return;
  }
  // What the thread itself blocks stays pending for it: back to its mask while the wrapper still holds signals back.
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, nullptr);
  t_vcpu = nullptr;
  t_held_back = false;
  pthread_sigmask(SIG_SETMASK, &thread_mask_, nullptr);
}

}  // namespace ring3::shim
