#pragma once
#include <setjmp.h>

#include <type_traits>

#include "base/types.hpp"

/// Faults of instructions that run on the host for a guest.
///
/// A stub may raise SIGFPE (an unmasked SIMD or x87 exception, which the guest is to see) and, if the
/// host lacks an instruction after all, SIGILL or SIGSEGV. The process-wide handlers installed here look
/// at where the fault happened: inside a registered range of generated code, execution goes on at the range's
/// fault exit with a code in RAX; anywhere else the handler that was there before is called.
///
/// Signal dispositions belong to the process, so this is the engine's one piece of global state.
/// Threading: registration from any thread; the handler takes no lock.
namespace ring3::engine {

/// What a fault exit finds in RAX.
enum class HostFault : u32 { None = 0, FloatingPoint = 1, Other = 2 };

class HostFaultRange {
 public:
  /// Code in [begin, end): faults go on at exit_fpe (SIGFPE) or exit_other. Addresses in the executable
  /// mapping. Installs the handlers when they are not there yet.
  HostFaultRange(const u8* begin, const u8* end, const u8* exit_fpe, const u8* exit_other);
  /// Code whose fault exit wants all registers as they were, but for R14, which gets the address of
  /// the instruction that faulted.
  HostFaultRange(const u8* begin, const u8* end, const u8* exit) : HostFaultRange(begin, end, exit, Accesses{}) {}
  /// The same, where a SIGSEGV that is not guest memory's goes on at `exit` of Accesses instead, with all registers as they
  /// were and the address of the instruction pushed on the stack, which must have room. address: where the access went, ~0
  /// when the host does not tell; error: the page fault's error code. They outlive this.
  struct Accesses {
    const u8* exit = nullptr;
    u64* address = nullptr;
    u64* error = nullptr;
  };
  HostFaultRange(const u8* begin, const u8* end, const u8* exit, const Accesses& accesses);
  ~HostFaultRange();
  HostFaultRange(const HostFaultRange&) = delete;
  HostFaultRange& operator=(const HostFaultRange&) = delete;

 private:
  void add(const u8* begin, const u8* end, const u8* exit_fpe, const u8* exit_other, bool keep, const Accesses& accesses);
  void* node_ = nullptr;
};

/// Before a stub runs with unmasked exceptions: SIGFPE is not blocked on this thread (a blocked one
/// would end the process) and still comes to our handler (the embedding program may have replaced it).
/// traps: exceptions are unmasked. When they are not (DIV may still trap), a thread looks after the handler every millisecond or
/// two only: a program that replaces it takes it away for so long at most, and not every KVM_RUN makes a system call.
void arm_host_faults(bool traps = true);

/// Guest memory belongs to the VMM and may vanish under the engine (munmap, a truncated file: SIGSEGV, SIGBUS). Accesses to
/// it are plain loads and stores all over the engine; while run() runs f, one that faults ends f at once, by a jump
/// out of the signal handler that calls no destructors on its way: f holds no lock, and no half-changed structure, where it
/// touches guest memory. In a registered range the fault goes to the range's exit as ever, and hit() tells.
/// Nests: the innermost one of the thread counts.
class GuestMemoryTrap {
 public:
  /// Whether a host address is guest memory. Called in the signal handler, on the thread that faulted.
  using Owns = bool (*)(void* context, u64 address);
  GuestMemoryTrap(Owns owns, void* context) : owns_(owns), context_(context) {}
  GuestMemoryTrap(const GuestMemoryTrap&) = delete;
  GuestMemoryTrap& operator=(const GuestMemoryTrap&) = delete;

  /// False: f was cut off by a fault of guest memory.
  template <class F>
  bool run(F&& f) {
    return run([](void* at) { (*static_cast<std::remove_reference_t<F>*>(at))(); }, &f);
  }
  /// A fault of guest memory in a registered range since the last call.
  bool take_hit() {
    const bool was = hit_;
    hit_ = false;
    return was;
  }

 private:
  friend struct GuestMemoryTrapAccess;
  bool run(void (*f)(void*), void* argument);

  const Owns owns_;
  void* const context_;
  GuestMemoryTrap* outer_ = nullptr;
  volatile bool hit_ = false;
  sigjmp_buf away_;
};
/// As the innermost trap of this thread would have it, for code that must not be jumped out of: false when f was cut
/// off. Without one f just runs.
bool run_in_nested_trap(void (*f)(void*), void* argument);

}  // namespace ring3::engine
