#pragma once
#include <memory>

#include "base/result.hpp"
#include "kvm/endpoint.hpp"

namespace ring3::kvm {

/// The hardware provider: opens the kernel's KVM device. Endpoints made from it own their fds and,
/// for vCPUs, the mapping of the run page.
///
/// Errors: ENOENT and EACCES get a message that says what to do; other failures as open(2).
/// Kicks:  immediate_exit and a real-time signal (kKickSignal) to the thread inside KVM_RUN. The
///         signal's no-op handler is installed on the first call and it is unblocked in every thread
///         that runs a vCPU; an embedding program leaves that signal alone.
Result<std::unique_ptr<Endpoint>> open_kernel_kvm(const char* path = "/dev/kvm");

/// The signal number used for kicks.
int kernel_kick_signal();

}  // namespace ring3::kvm
