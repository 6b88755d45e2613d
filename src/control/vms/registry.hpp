#pragma once
#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

/// The VMs that were started with --detach, as files that every `ring3` of the same user sees.
///
///   ROOT/NAME/lock         a POSIX lock that the VM's process holds for its life
///   ROOT/NAME/info.json    what it is; status and reason once it has ended
///   ROOT/NAME/console.log  its console, console.log.1 the part before
///   ROOT/NAME/console.sock where `ring3 console` attaches
///   ROOT/NAME/ring3.log    messages of ring3 itself
///
/// Who runs:  whoever holds the lock, as the kernel says. A process id in a file is never believed, so that an entry left by a
///            process that was killed is seen for what it is. (A POSIX lock, not flock: a child made by fork does not keep it.)
/// Trust:     ROOT belongs to this user alone (0700, checked); what is read from info.json is checked all the same.
/// Threading: free functions: any; Claim: one thread at a time.
namespace ring3::vms {

struct VmInfo {
  std::string name;
  u64 started = 0;  ///< seconds since the epoch
  u64 memory_bytes = 0;
  u32 cpus = 0;
  std::string engine;
  std::string console;  ///< "shared", "none", a file's or a terminal's path
  pid_t pid = 0;        ///< the lock's holder; 0: nobody (then it has ended)
  std::optional<int> status;  ///< exit status, when it ended in order
  std::string why;            ///< and why, in one line
  bool running() const { return pid != 0; }
};

/// $XDG_RUNTIME_DIR/ring3, or /run/user/UID/ring3, or /tmp/ring3-UID; made when it is not there.
/// Errors: it belongs to somebody else, or others may enter it.
Result<std::string> state_root();

/// A running VM's hold on its entry. Let go by the end of the process, whatever ends it.
class Claim {
 public:
  /// Takes ROOT/NAME, clearing what an ended VM of that name has left. Errors: EEXIST: it runs.
  static Result<Claim> take(const std::string& root, const std::string& name);
  /// The first free one of vm-1, vm-2, ...
  static Result<Claim> take_any(const std::string& root);

  const std::string& name() const { return name_; }
  const std::string& directory() const { return directory_; }
  int directory_fd() const { return directory_fd_.get(); }
  Status publish(VmInfo info);
  /// It has ended: status and reason for `ps --all`.
  Status finish(int status, const std::string& why);

 private:
  Claim() = default;
  std::string name_;
  std::string directory_;
  UniqueFd directory_fd_;
  UniqueFd lock_;
  VmInfo info_;
};

/// All entries, sorted by name.
Result<std::vector<VmInfo>> list(const std::string& root);
/// One entry. Errors: ENOENT, naming what is there.
Result<VmInfo> find(const std::string& root, const std::string& name);
/// Deletes an ended VM's entry. Errors: EBUSY: it runs.
Status remove(const std::string& root, const std::string& name);
/// Keeps the `most` entries that ended last.
void prune(const std::string& root, std::size_t most);

/// Sends SIGTERM to the VM, with the seconds that its guest gets to power off (0: none). False: it is gone.
/// No other process can be hit: the signal goes to a pidfd whose process was seen to hold the lock after it was opened.
Result<bool> signal_stop(const std::string& root, const std::string& name, int grace_seconds);
/// The same with SIGKILL.
Result<bool> signal_kill(const std::string& root, const std::string& name);

/// "/proc/self/fd/N/console.sock": short enough for a socket address, however long the directory's own path.
std::string socket_path(int directory_fd);

}  // namespace ring3::vms
