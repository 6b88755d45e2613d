#include "control/cli/rootfs_run.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <initializer_list>
#include <string_view>

#include "control/cli/text.hpp"

namespace ring3::control {

std::string default_kernel() {
  const char* cache = std::getenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  std::string base = cache != nullptr && cache[0] == '/' ? cache : std::string(home != nullptr ? home : "") + "/.cache";
  return base + "/ring3/kernels/vmlinuz-cloud";
}

Result<RootfsRun> prepare_rootfs(const RunOptions& options) {
  RootfsRun run;
  run.options = options;
  RunOptions& o = run.options;
  struct stat info {};
  if (stat(o.rootfs.c_str(), &info) != 0) return Error::from_errno("--rootfs " + printable(o.rootfs));
  if (!S_ISDIR(info.st_mode)) return Error::of(ENOTDIR, "--rootfs " + printable(o.rootfs) + " is not a directory");
  if (o.kernel.empty()) {
    o.kernel = default_kernel();
    if (access(o.kernel.c_str(), R_OK) != 0) {
      return Error::of(ENOENT, "there is no kernel at " + o.kernel + ": fetch one with scripts/fetch-kernels (./quickstart does), or give --kernel FILE");
    }
  }
  struct stat slash {};
  const bool whole_host = stat("/", &slash) == 0 && slash.st_dev == info.st_dev && slash.st_ino == info.st_ino;

  rootfs::Request request;
  request.directory = o.rootfs;
  // The host's own root is not written to unless that is said.
  request.read_only = o.rootfs_read_only.value_or(whole_host);
  request.kernel = o.kernel;
  request.command = o.command.empty() ? std::vector<std::string>{"/bin/sh"} : o.command;
  request.terminal = run.terminal = isatty(STDIN_FILENO) != 0 && isatty(STDOUT_FILENO) != 0;
  const auto driver = [&](bool there, std::initializer_list<std::string_view> modules) {
    if (there) request.modules.insert(request.modules.end(), modules);
  };
  const auto is = [](net::NetSpec::Kind kind) { return [kind](const net::NetSpec& n) { return n.kind == kind; }; };
  driver(!std::all_of(o.nets.begin(), o.nets.end(), is(net::NetSpec::Kind::kNone)), {"failover", "net_failover", "virtio_net"});
  driver(!o.disks.empty(), {"virtio_blk"});
  driver(!o.console_ports.empty(), {"virtio_console"});
  driver(o.rng, {"virtio_rng"});
  driver(o.balloon, {"virtio_balloon"});
  driver(o.vsock.has_value(), {"vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"});
  const auto first = std::find_if_not(o.nets.begin(), o.nets.end(), is(net::NetSpec::Kind::kNone));
  request.user_network = first != o.nets.end() && first->kind == net::NetSpec::Kind::kUser;
  auto session = rootfs::Session::create(request);
  if (!session) return Error::of(session.error().code, "--rootfs: " + session.error().message);
  run.session = std::move(*session);

  o.initrd = run.session->initramfs();
  o.append = "console=ttyS0 quiet loglevel=1 panic=-1" + (o.append ? " " + *o.append : std::string());
  o.no_reboot = true;
  ShareOption root, control;
  root.directory = o.rootfs;
  root.tag = "ring3-root";
  root.read_only = request.read_only;
  // A tree that an unprivileged user has made for this is root's in the guest.
  if (geteuid() != 0 && info.st_uid == geteuid()) root.own_id = 0;
  control.directory = run.session->control();
  control.tag = "ring3-control";
  control.cache_ms = 0;
  if (geteuid() != 0) control.own_id = 0;
  o.shares.insert(o.shares.begin(), {root, control});
  return run;
}

}  // namespace ring3::control
