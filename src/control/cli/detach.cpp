#include "control/cli/detach.hpp"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>

#include "control/cli/commands.hpp"

namespace ring3::control {
namespace {

constexpr std::size_t kMostEnded = 16;

/// The command that the user gave: waits for the VM's process to be ready or to fail.
int wait_for(pid_t child, const UniqueFd& pipe) {
  std::string name;
  char buffer[128];
  for (;;) {
    const ssize_t got = ::read(pipe.get(), buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    name.append(buffer, static_cast<std::size_t>(got));
  }
  if (!name.empty() && name.back() == '\n') return print(name);
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) != 0) return WEXITSTATUS(status);
  return fail("the VM's process ended before it was ready");
}

}  // namespace

Status Background::ready(vms::VmInfo info) {
  if (auto status = claim_.publish(std::move(info)); !status) return status;
  const UniqueFd log(openat(claim_.directory_fd(), "ring3.log", O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!log) return Error::from_errno("cannot make " + claim_.directory() + "/ring3.log");
  const std::string line = claim_.name() + "\n";
  if (::write(ready_pipe_.get(), line.data(), line.size()) != static_cast<ssize_t>(line.size())) {
    return Error::of(EPIPE, "the command that started " + claim_.name() + " is gone");
  }
  std::fflush(nullptr);
  ready_ = true;
  dup2(log.get(), STDOUT_FILENO);
  dup2(log.get(), STDERR_FILENO);
  ready_pipe_.reset();
  if (chdir("/") != 0) return Error::from_errno("chdir");  // so that no file system is kept busy
  return Ok{};
}

void Background::finish(int status, const std::string& why) {
  // Without an entry it would be reported as killed; there is nobody left to tell more.
  if (auto result = claim_.finish(status, why); !result) fail(result.error().message);
}

int detach(const RunOptions& options, const std::function<int(Background&)>& body) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  vms::prune(*root, kMostEnded);
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return fail(Error::from_errno("pipe").message);
  UniqueFd reader(ends[0]);
  UniqueFd writer(ends[1]);
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) return fail(Error::from_errno("cannot start the VM's process").message);
  if (child > 0) {
    writer.reset();
    return wait_for(child, reader);
  }
  reader.reset();
  setsid();
  const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  if (null < 0 || dup2(null, STDIN_FILENO) < 0) return fail(Error::from_errno("/dev/null").message);
  close(null);
  auto claim = options.named ? vms::Claim::take(*root, options.name) : vms::Claim::take_any(*root);
  if (!claim) return fail(claim.error().message);
  Background background(std::move(*claim), std::move(writer));
  const int status = body(background);
  // What never ran leaves nothing behind; the user has seen why.
  if (!background.is_ready()) {
    if (auto removed = vms::remove(*root, background.claim().name()); !removed) return fail(removed.error().message);
  }
  return status;
}

}  // namespace ring3::control
