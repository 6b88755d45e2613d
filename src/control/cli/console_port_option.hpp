#pragma once
#include <string>
#include <vector>

#include "base/result.hpp"

namespace ring3::control {

/// --console-port NAME=pty|file:PATH|unix:PATH
struct ConsolePortOption {
  enum class Where { kPty, kFile, kUnix };
  std::string name;  ///< /dev/virtio-ports/NAME in the guest
  Where where = Where::kPty;
  std::string path;  ///< of the file or socket
};

/// A name is 1 to 60 letters, digits, '-', '_' and '.'. Error: EINVAL, one line.
Result<ConsolePortOption> parse_console_port(const std::string& text);

/// What is wrong with all of them together: too many, or a name twice.
Status check_console_ports(const std::vector<ConsolePortOption>& ports);

}  // namespace ring3::control
