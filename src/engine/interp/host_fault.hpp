#pragma once
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
  HostFaultRange(const u8* begin, const u8* end, const u8* exit);
  ~HostFaultRange();
  HostFaultRange(const HostFaultRange&) = delete;
  HostFaultRange& operator=(const HostFaultRange&) = delete;

 private:
  void add(const u8* begin, const u8* end, const u8* exit_fpe, const u8* exit_other, bool keep);
  void* node_ = nullptr;
};

/// Before a stub runs with unmasked exceptions: SIGFPE is not blocked on this thread (a blocked one
/// would end the process) and still comes to our handler (the embedding program may have replaced it).
void arm_host_faults();

}  // namespace ring3::engine
