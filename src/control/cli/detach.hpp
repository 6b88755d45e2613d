#pragma once
#include <functional>
#include <optional>
#include <string>

#include "base/unique_fd.hpp"
#include "control/cli/options.hpp"
#include "control/vms/registry.hpp"

namespace ring3::control {

/// What a VM that runs in the background has beside one in the foreground.
class Background {
 public:
  Background(vms::Claim claim, UniqueFd ready_pipe) : claim_(std::move(claim)), ready_pipe_(std::move(ready_pipe)) {}

  const vms::Claim& claim() const { return claim_; }
  /// The VM is about to run: its entry is complete, messages go to ring3.log from now on, and the command that the user
  /// gave returns. Errors: that command is gone (it was interrupted), or the entry cannot be written.
  Status ready(vms::VmInfo info);
  bool is_ready() const { return ready_; }
  /// The last word, for `ring3 ps --all`.
  void finish(int status, const std::string& why);

 private:
  vms::Claim claim_;
  UniqueFd ready_pipe_;
  bool ready_ = false;
};

/// Runs `body` in a process of its own session, without this terminal. Returns, in the process that was called, once
/// ready() was called (0, and the VM's name is printed) or the body has failed (its exit status; its messages were shown).
/// In the new process it returns the body's status, for main() to end with.
/// Threading: no other thread may exist yet.
int detach(const RunOptions& options, const std::function<int(Background&)>& body);

}  // namespace ring3::control
