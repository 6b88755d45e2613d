#include "control/cli/console_port_option.hpp"

#include <sys/un.h>

#include <algorithm>
#include <cctype>
#include <set>

#include "control/cli/text.hpp"

namespace ring3::control {
namespace {
constexpr std::size_t kMostPorts = 16, kMostName = 60;
}

Result<ConsolePortOption> parse_console_port(const std::string& text) {
  const std::size_t equals = text.find('=');
  if (equals == std::string::npos) {
    return Error::of(EINVAL, "--console-port: '" + printable(text) + "' lacks its place: NAME=pty, NAME=file:PATH or NAME=unix:PATH");
  }
  ConsolePortOption port;
  port.name = text.substr(0, equals);
  const bool good = !port.name.empty() && port.name.size() <= kMostName && std::all_of(port.name.begin(), port.name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
  });
  if (!good || port.name == "." || port.name == "..") {
    return Error::of(EINVAL, "--console-port: '" + printable(port.name) + "' is no name: 1 to 60 letters, digits, '-', '_' and '.'");
  }
  const std::string where = text.substr(equals + 1);
  if (where == "pty") return port;
  const std::string kind = where.substr(0, 5);
  if (kind != "file:" && kind != "unix:") {
    return Error::of(EINVAL, "--console-port " + port.name + ": there is no '" + printable(where) + "'; there are pty, file:PATH and unix:PATH");
  }
  port.where = kind == "file:" ? ConsolePortOption::Where::kFile : ConsolePortOption::Where::kUnix;
  port.path = where.substr(5);
  if (port.path.empty()) return Error::of(EINVAL, "--console-port " + port.name + ": " + kind + " wants a path");
  if (port.where == ConsolePortOption::Where::kUnix && port.path.size() >= sizeof sockaddr_un{}.sun_path) {
    return Error::of(EINVAL, "--console-port " + port.name + ": the socket's path is longer than a socket's may be (" +
                                 std::to_string(sizeof sockaddr_un{}.sun_path - 1) + " bytes)");
  }
  return port;
}

Status check_console_ports(const std::vector<ConsolePortOption>& ports) {
  if (ports.size() > kMostPorts) return Error::of(EINVAL, "--console-port: at most " + std::to_string(kMostPorts) + " can be given");
  std::set<std::string> names;
  for (const ConsolePortOption& p : ports) {
    if (!names.insert(p.name).second) return Error::of(EINVAL, "--console-port: the name " + p.name + " is given twice");
  }
  return Ok{};
}

}  // namespace ring3::control
