#pragma once
#include <memory>

#include "base/result.hpp"
#include "control/cli/options.hpp"
#include "control/rootfs/session.hpp"

namespace ring3::control {

/// A `ring3 run --rootfs DIR -- COMMAND` and the options of the VM that does it.
struct RootfsRun {
  RunOptions options;
  std::unique_ptr<rootfs::Session> session;
  bool terminal = false;  ///< the command has this terminal; else its output comes through the session
};

/// Errors: no such directory, no kernel: one line that says what to do.
Result<RootfsRun> prepare_rootfs(const RunOptions& options);

/// $XDG_CACHE_HOME/ring3/kernels/vmlinuz-cloud: the kernel that quickstart has fetched.
std::string default_kernel();

}  // namespace ring3::control
