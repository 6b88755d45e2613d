#include "engine/interp/host_fault.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <mutex>

namespace ring3::engine {
namespace {

/// Nodes are reused, never freed: the handler may be walking the list at any time.
struct Node {
  std::atomic<u64> begin{0}, end{0};  // end 0: free
  std::atomic<u64> exit_fpe{0}, exit_other{0};
  std::atomic<bool> keep{false};  // RAX is the guest's: only R14 is ours
  std::atomic<u64> access_exit{0};
  std::atomic<u64*> access_address{nullptr}, access_error{nullptr};
  Node* next = nullptr;
};

std::atomic<Node*> g_nodes{nullptr};
std::mutex g_mutex;  // registration and installation, not the handler

/// The innermost trap. Initial-exec: the handler may be the first to look, and must not allocate.
__thread GuestMemoryTrap* t_trap __attribute__((tls_model("initial-exec"))) = nullptr;

constexpr int kSignals[] = {SIGFPE, SIGILL, SIGSEGV, SIGBUS};
constexpr unsigned kSignalCount = sizeof kSignals / sizeof kSignals[0];
struct sigaction g_previous[kSignalCount];  // below our handler where it stands now
struct sigaction g_first[kSignalCount];     // below it when it was installed first
bool g_installed[kSignalCount];             // g_first holds
bool g_above[kSignalCount];                 // g_previous came over our handler, which was put over it again

/// The signal for which this thread calls a handler that had been put over ours.
__thread int t_chaining __attribute__((tls_model("initial-exec"))) = 0;

unsigned slot_of(int sig) {
  for (unsigned i = 0; i < kSignalCount; ++i)
    if (kSignals[i] == sig) return i;
  return 0;
}

bool is_function(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) || (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void call(const struct sigaction& action, int sig, siginfo_t* info, void* context) {
  if (action.sa_flags & SA_SIGINFO) {
    action.sa_sigaction(sig, info, context);
  } else {
    action.sa_handler(sig);
  }
}

bool is_ours(const struct sigaction& action);
void put_ours(int sig);

/// Calls a handler that was put over ours and that ours was put over again. It knows ours as what it found: it may call
/// it, or put it back and raise the signal once more, and means what is below.
void call_above(int sig, siginfo_t* info, void* context) {
  const unsigned slot = slot_of(sig);
  const struct sigaction above = g_previous[slot];
  t_chaining = sig;
  ::sigaction(sig, &above, nullptr);  // as it left things
  call(above, sig, info, context);
  t_chaining = 0;
  struct sigaction now;
  if (::sigaction(sig, nullptr, &now) != 0) return;
  if (is_ours(now)) {
    g_previous[slot] = g_first[slot];
    g_above[slot] = false;
  } else if (is_function(now) && now.sa_sigaction == above.sa_sigaction) {
    put_ours(sig);
  }
}

void chain(int sig, siginfo_t* info, void* context) {
  const unsigned slot = slot_of(sig);
  const bool again = t_chaining == sig;
  if (g_above[slot] && !again && is_function(g_previous[slot])) return call_above(sig, info, context);
  const struct sigaction& previous = again ? g_first[slot] : g_previous[slot];
  if (is_function(previous)) return call(previous, sig, info, context);
  const bool sent = info->si_code <= 0;  // by kill(2) and its like; a fault is raised again by itself
  if (sent && previous.sa_handler == SIG_IGN) return;
  struct sigaction fallback;
  std::memset(&fallback, 0, sizeof fallback);
  fallback.sa_handler = SIG_DFL;
  ::sigaction(sig, &fallback, nullptr);
  if (sent) ::syscall(SYS_tgkill, ::getpid(), ::syscall(SYS_gettid), sig);
}

}  // namespace

struct GuestMemoryTrapAccess {
  static bool owns(const GuestMemoryTrap& t, u64 address) { return t.owns_(t.context_, address); }
  static void hit(GuestMemoryTrap& t) { t.hit_ = true; }
  [[noreturn]] static void leave(GuestMemoryTrap& t) { siglongjmp(t.away_, 1); }
};

namespace {

void handler(int sig, siginfo_t* info, void* context) {
  ucontext_t* uc = static_cast<ucontext_t*>(context);
  greg_t* regs = uc->uc_mcontext.gregs;
  const u64 rip = static_cast<u64>(regs[REG_RIP]);
  if (info->si_code > 0) {
    GuestMemoryTrap* trap = sig == SIGSEGV || sig == SIGBUS ? t_trap : nullptr;
    if (trap != nullptr && !GuestMemoryTrapAccess::owns(*trap, reinterpret_cast<u64>(info->si_addr))) trap = nullptr;
    for (Node* n = g_nodes.load(std::memory_order_acquire); n != nullptr; n = n->next) {
      const u64 end = n->end.load(std::memory_order_acquire);
      if (rip >= end || rip < n->begin.load(std::memory_order_relaxed)) continue;
      if (const u64 exit = n->access_exit.load(std::memory_order_relaxed); exit != 0 && trap == nullptr && (sig == SIGSEGV || info->si_code == SI_KERNEL)) {
        // An address that is not canonical is not told: #GP; off the stack's registers #SS, which is a SIGBUS.
        const bool told = info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR;
        *n->access_address.load(std::memory_order_relaxed) = told ? reinterpret_cast<u64>(info->si_addr) : ~0ull;
        *n->access_error.load(std::memory_order_relaxed) = static_cast<u64>(regs[REG_ERR]);
        regs[REG_RSP] -= 8;
        // SAFETY: the range's code has a stack of its own making, with room.
        *reinterpret_cast<u64*>(regs[REG_RSP]) = rip;
        regs[REG_RIP] = static_cast<greg_t>(exit);
        return;
      }
      const bool fpe = sig == SIGFPE;
      if (trap != nullptr) GuestMemoryTrapAccess::hit(*trap);
      if (n->keep.load(std::memory_order_relaxed)) {
        regs[REG_R14] = static_cast<greg_t>(rip);
        regs[REG_RIP] = static_cast<greg_t>(n->exit_other.load(std::memory_order_relaxed));
        return;
      }
      regs[REG_RAX] = static_cast<greg_t>(fpe ? HostFault::FloatingPoint : HostFault::Other);
      regs[REG_RIP] = static_cast<greg_t>((fpe ? n->exit_fpe : n->exit_other).load(std::memory_order_relaxed));
      return;
    }
    if (trap != nullptr) {
      ::pthread_sigmask(SIG_SETMASK, &uc->uc_sigmask, nullptr);  // as a return from here would
      // A guest's x87 state may stand in the registers (JitFrame::x87); a handler begins with them cleared.
      if (uc->uc_mcontext.fpregs != nullptr) asm volatile("fxrstor64 %0" : : "m"(*uc->uc_mcontext.fpregs));
      GuestMemoryTrapAccess::leave(*trap);
    }
  }
  chain(sig, info, context);
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == handler;
}

void put_ours(int sig) {
  struct sigaction ours;
  std::memset(&ours, 0, sizeof ours);
  ours.sa_sigaction = handler;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigemptyset(&ours.sa_mask);
  ::sigaction(sig, &ours, nullptr);
}

void install(int sig) {
  struct sigaction current;
  if (::sigaction(sig, nullptr, &current) != 0 || is_ours(current)) return;
  const unsigned slot = slot_of(sig);
  if (!g_installed[slot]) g_first[slot] = current;
  g_above[slot] = g_installed[slot];
  g_installed[slot] = true;
  g_previous[slot] = current;
  put_ours(sig);
}

}  // namespace

HostFaultRange::HostFaultRange(const u8* begin, const u8* end, const u8* exit_fpe, const u8* exit_other) {
  add(begin, end, exit_fpe, exit_other, false, {});
}

HostFaultRange::HostFaultRange(const u8* begin, const u8* end, const u8* exit, const Accesses& accesses) {
  add(begin, end, exit, exit, true, accesses);
}

void HostFaultRange::add(const u8* begin, const u8* end, const u8* exit_fpe, const u8* exit_other, bool keep,
                         const Accesses& accesses) {
  const std::lock_guard lock(g_mutex);
  for (const int sig : kSignals) install(sig);
  Node* node = nullptr;
  for (Node* n = g_nodes.load(); n != nullptr && node == nullptr; n = n->next)
    if (n->end.load() == 0) node = n;
  const bool fresh = node == nullptr;
  if (fresh) node = new Node;
  node->begin.store(reinterpret_cast<u64>(begin));
  node->exit_fpe.store(reinterpret_cast<u64>(exit_fpe));
  node->exit_other.store(reinterpret_cast<u64>(exit_other));
  node->keep.store(keep);
  node->access_address.store(accesses.address);
  node->access_error.store(accesses.error);
  node->access_exit.store(reinterpret_cast<u64>(accesses.exit));
  node->end.store(reinterpret_cast<u64>(end), std::memory_order_release);
  if (fresh) {
    node->next = g_nodes.load();
    g_nodes.store(node, std::memory_order_release);
  }
  node_ = node;
}

HostFaultRange::~HostFaultRange() { static_cast<Node*>(node_)->end.store(0, std::memory_order_release); }

bool GuestMemoryTrap::run(void (*f)(void*), void* argument) {
  outer_ = t_trap;
  if (sigsetjmp(away_, 0) != 0) {
    t_trap = outer_;
    return false;
  }
  t_trap = this;
  f(argument);
  t_trap = outer_;
  return true;
}

bool run_in_nested_trap(void (*f)(void*), void* argument) {
  GuestMemoryTrap* const outer = t_trap;
  if (outer == nullptr) {
    f(argument);
    return true;
  }
  GuestMemoryTrap inner([](void* at, u64 address) {
    return GuestMemoryTrapAccess::owns(*static_cast<GuestMemoryTrap*>(at), address);
  }, outer);
  return inner.run([&] { f(argument); });
}

void arm_host_faults(bool traps) {
  thread_local bool unblocked = false;
  if (!unblocked) {
    sigset_t set;
    sigemptyset(&set);
    for (const int sig : kSignals) sigaddset(&set, sig);
    ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    unblocked = true;
  }
  constexpr u64 kAgain = 1u << 22;  // TSC ticks: one or two milliseconds
  thread_local u64 looked = 0;
  const u64 now = __builtin_ia32_rdtsc();
  if (!traps && looked != 0 && now - looked < kAgain) return;
  looked = now;
  struct sigaction current;
  if (::sigaction(SIGFPE, nullptr, &current) == 0 && is_ours(current)) return;
  const std::lock_guard lock(g_mutex);
  t_chaining = 0;  // whoever was called left by a jump
  install(SIGFPE);
}

}  // namespace ring3::engine
