#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "control/cli/commands.hpp"
#include "control/cli/life.hpp"
#include "control/cli/text.hpp"
#include "control/image/image_command.hpp"

namespace ring3::control {

namespace {

/// A descriptor that was closed at the start must not become some file of ours: take its number with
/// one that fails for what it is meant for.
void occupy_closed_descriptors() {
  for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (fcntl(fd, F_GETFD) >= 0) continue;
    const int got = open("/dev/null", fd == STDIN_FILENO ? O_RDONLY : fd == STDOUT_FILENO ? O_RDONLY : O_WRONLY);
    if (got >= 0 && got != fd) close(got);
  }
}

}  // namespace

int fail(const std::string& message) {
  const std::string line = "ring3: " + message + "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
  return kFailure;
}

int print(const std::string& text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    return fail(std::string("cannot write to standard output: ") + std::strerror(errno));
  }
  return kSuccess;
}

int main_with(const std::vector<std::string>& arguments) {
  occupy_closed_descriptors();
  signal(SIGPIPE, SIG_IGN);  // a closed pipe is an error to report, not a silent death
  if (!arguments.empty() && arguments[0] == "image") return image_command({arguments.begin() + 1, arguments.end()});
  if (!arguments.empty() && is_life_verb(arguments[0])) return life_command(arguments);
  auto command = parse_command_line(arguments);
  if (!command) return fail(command.error().message);
  if (const auto* options = std::get_if<RunOptions>(&*command)) return run(*options);
  if (const auto* options = std::get_if<WithOptions>(&*command)) return with(*options);
  if (const auto* options = std::get_if<DoctorOptions>(&*command)) return doctor(*options);
  if (const auto* options = std::get_if<VersionOptions>(&*command)) return print_version(*options);
  return print(std::get<HelpText>(*command).text);
}

}  // namespace ring3::control
