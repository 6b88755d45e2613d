#pragma once
#include <map>
#include <memory>
#include <string>

#include "base/result.hpp"
#include "kvm/endpoint.hpp"

/// The software engine as a provider of the KVM ABI: what open("/dev/kvm") is to the kernel's.
namespace ring3::engine {

/// Switches for debugging and experiments; empty means the defaults.
///
/// | name        | value            | meaning                                              |
/// |-------------|------------------|------------------------------------------------------|
/// | cache-mib   | 1..1024          | decoded-code cache of a whole VM, MiB (default 16)   |
/// | code-cache  | a file           | translations of earlier runs, and of this one when the VM ends; the user's own file, made if missing (default: none) |
/// | code-mib    | 1..1024          | translated code of a whole VM, MiB (default 512)     |
/// | engine      | interpreter, translator | what runs guest code (default: the translator where can_translate(), else the interpreter) |
/// | halt-poll-ns | 0..10^9         | for how long a vCPU after HLT looks for what wakes it before it sleeps, at most (default 200000; 0 where the process has one CPU); KVM_CAP_HALT_POLL sets it for a VM |
/// | interpreted-ops | a file    | gets a table of the instructions that the translator left to the interpreter |
/// | lockstep    | 0..2^32-1        | n: every n-th translated block is compared with the interpreter, differences go to standard error; VMs of one vCPU (default 0: none) |
/// | perf-map    | 0, 1             | 1: /tmp/perf-PID.map names translated code for perf (default 0) |
/// | quantum     | 1..2^32-1        | guest instructions between two looks at the event flag's slow sources |
/// | windows     | 0..2^16          | a user program found running so often in a row gets a host window (TranslatorVcpu::Options; default 0: none; kWindows in ring3's own VMM and under announces_window_memory) |
struct EngineOptions {
  std::map<std::string, std::string> values;
  /// The embedding program promises: a signal that comes to a thread in KVM_RUN is announced by Endpoint::signal_came(),
  /// called in its handler. KVM_RUN then leaves the thread's signal mask alone (KVM_SET_SIGNAL_MASK is the program's
  /// own matter too) and ends at once, in guest code as in a wait.
  bool signals_announced = false;
  /// The embedding program promises: Endpoint::window_memory() tells which guest memory may be mapped a second time, and in time when
  /// it may not any more. Host windows are then on unless the option `windows` says otherwise; with that option they take all shared
  /// memory until it is said that it may not be.
  bool announces_window_memory = false;
};

/// The value of `windows` that serves best.
inline constexpr unsigned kWindows = 8;

/// Whether translated code runs on this host's CPU (it needs AVX and BMI2). Where not, the interpreter runs guests.
bool can_translate();
inline constexpr const char* kCannotTranslate = "translated code needs a host CPU with AVX and BMI2";

/// The system object. Stateless beyond its options: any number of them may exist.
///
/// Errors:    EINVAL for an unknown option or a value out of range, naming it; ENOTSUP for engine=translator where it cannot run.
/// Threading: as kvm::Endpoint says. A vCPU's KVM_RUN runs the guest on the calling thread.
/// Signals:   KVM_RUN returns -EINTR when kicked, when immediate_exit is set, and after a signal that
///            interrupted it while it waited (HLT, wait-for-SIPI). A signal handled while guest code
///            runs is seen when its handler sets immediate_exit and calls kick(), or at the next wait.
Result<std::unique_ptr<kvm::Endpoint>> create_soft_system(const EngineOptions& options);

}  // namespace ring3::engine
