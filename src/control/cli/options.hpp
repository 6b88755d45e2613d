#pragma once
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "control/cli/console_port_option.hpp"
#include "control/cli/disk_option.hpp"
#include "control/cli/engines.hpp"
#include "control/cli/networks.hpp"
#include "control/cli/seed.hpp"
#include "control/cli/share_option.hpp"

/// The command line of `ring3`, taken apart and checked as far as it can be without touching the host.
namespace ring3::control {

struct RunOptions {
  std::string name = "ring3";
  u64 memory_bytes = u64{1} << 30;
  u32 cpus = 1;
  std::optional<EngineKind> engine;  ///< nothing: auto
  std::string cpu = "default";
  std::string kernel;
  std::string initrd;
  std::optional<std::string> append;
  std::string console = "stdio";     ///< stdio, pty, none or file:PATH
  std::vector<ConsolePortOption> console_ports;
  std::vector<DiskOption> disks;
  std::vector<net::NetSpec> nets;
  std::optional<VsockOption> vsock;
  std::vector<ShareOption> shares;
  SeedOptions seed;
  std::string rootfs;                ///< a directory; empty: none
  std::optional<bool> rootfs_read_only;  ///< nothing: only when it is the host's own root
  std::vector<std::string> command;  ///< what runs in it
  bool virtio_console = false;       ///< --console virtio: hvc0 instead of the serial port
  bool rng = false, balloon = false;
  bool named = false;                ///< --name was given
  bool detach = false;
  u32 stop_timeout = 30;             ///< seconds that a guest gets to power off when it is asked to
  bool no_reboot = false;
  bool test_device = false;
  std::string log = "warn";
  EngineOptionMap engine_options;
};

struct DoctorOptions {
  bool json = false;
};

struct WithOptions {
  EngineOptionMap engine_options;
  std::vector<std::string> command;  ///< not empty
};

struct VersionOptions {
  bool json = false;
};

/// Text that was asked for (--help): to be printed, and success.
struct HelpText {
  std::string text;
};

using Command = std::variant<RunOptions, WithOptions, DoctorOptions, VersionOptions, HelpText>;

/// argv[1]... Errors: EINVAL, one line for people.
Result<Command> parse_command_line(const std::vector<std::string>& arguments);

/// "0.1.0"
const char* version();

}  // namespace ring3::control
