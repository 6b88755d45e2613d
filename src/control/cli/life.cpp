#include "control/cli/life.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "base/unique_fd.hpp"
#include "control/cli/commands.hpp"
#include "control/cli/text.hpp"
#include "control/cli/vm_text.hpp"
#include "control/vms/registry.hpp"

namespace ring3::control {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::array<const char*, 5> kVerbs{"ps", "stop", "console", "logs", "rm"};

u64 now_seconds() { return static_cast<u64>(::time(nullptr)); }

int ps(bool all, bool json) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  auto list = vms::list(*root);
  if (!list) return fail(list.error().message);
  std::erase_if(*list, [&](const vms::VmInfo& vm) { return !all && !vm.running(); });
  return print(json ? vm_json(*list) : vm_table(*list, now_seconds()));
}

/// Waits until nobody holds the VM's lock any more.
bool wait_until_gone(const std::string& root, const std::string& name, std::chrono::seconds limit) {
  const auto deadline = Clock::now() + limit;
  for (;;) {
    auto vm = vms::find(root, name);
    if (!vm || !vm->running()) return true;
    if (Clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
}

int stop(const std::string& name, u64 timeout, bool force) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  auto vm = vms::find(*root, name);
  if (!vm) return fail(vm.error().message);
  if (!vm->running()) return fail(name + " is not running: " + state_of(*vm) + (vm->why.empty() ? "" : ", " + printable(vm->why)));
  const auto sent = vms::signal_stop(*root, name, force ? 0 : static_cast<int>(timeout));
  if (!sent) return fail(sent.error().message);
  // The VM keeps the time itself; a few seconds more are for its own end.
  constexpr u64 kSlack = 8;
  if (!wait_until_gone(*root, name, std::chrono::seconds((force ? 0 : timeout) + kSlack))) {
    if (!force) return fail(name + " does not end: ring3 stop --force " + name);
    if (const auto killed = vms::signal_kill(*root, name); !killed) return fail(killed.error().message);
    if (!wait_until_gone(*root, name, std::chrono::seconds(kSlack))) return fail(name + " cannot be killed");
  }
  vm = vms::find(*root, name);
  if (vm && !force && vm->status.value_or(1) != 0) {
    const std::string line = "ring3: " + name + " did not power off by itself: " + (vm->why.empty() ? "killed" : printable(vm->why)) + "\n";
    std::fputs(line.c_str(), stderr);
  }
  return kSuccess;
}

/// Copies what is there after `offset`; the new offset, or -1 when standard output is gone.
i64 copy_from(int fd, i64 offset) {
  std::array<char, 65536> buffer;
  for (;;) {
    const ssize_t got = ::pread(fd, buffer.data(), buffer.size(), offset);
    if (got <= 0) return offset;
    if (std::fwrite(buffer.data(), 1, static_cast<std::size_t>(got), stdout) != static_cast<std::size_t>(got)) return -1;
    offset += got;
  }
}

int logs(const std::string& name, bool follow) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  auto vm = vms::find(*root, name);
  if (!vm) return fail(vm.error().message);
  const bool shared = vm->console.empty() || vm->console == "shared";
  if (!shared && (vm->console == "none" || vm->console.rfind("/dev/", 0) == 0)) {
    return fail(name + " keeps no log: its console is " + (vm->console == "none" ? "none" : "on " + printable(vm->console)));
  }
  const std::string path = shared ? *root + "/" + name + "/console.log" : vm->console;
  const auto open_log = [&](const std::string& file) { return UniqueFd(open(file.c_str(), O_RDONLY | O_CLOEXEC | O_NOCTTY)); };
  const auto lost = [] { return fail(std::string("cannot write to standard output: ") + std::strerror(errno)); };
  if (const UniqueFd before = shared ? open_log(path + ".1") : UniqueFd()) {
    if (copy_from(before.get(), 0) < 0) return lost();
  }
  UniqueFd fd = open_log(path);
  if (!fd) return fail(Error::from_errno("cannot read the log of " + name).message);
  i64 offset = 0;
  for (;;) {
    // Asked before the copy: what a VM wrote last is there once it is gone.
    vm = vms::find(*root, name);
    offset = copy_from(fd.get(), offset);
    if (offset < 0 || std::fflush(stdout) != 0) return lost();
    struct stat open_one {}, named {};
    if (fstat(fd.get(), &open_one) == 0 && stat(path.c_str(), &named) == 0 && open_one.st_ino != named.st_ino) {
      if (UniqueFd next = open_log(path)) {
        offset = copy_from(fd.get(), offset);
        fd = std::move(next);
        offset = 0;
        continue;
      }
    }
    if (!follow || !vm || !vm->running()) return kSuccess;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

int rm(const std::vector<std::string>& names) {
  auto root = vms::state_root();
  if (!root) return fail(root.error().message);
  int status = kSuccess;
  for (const std::string& name : names) {
    auto vm = vms::find(*root, name);
    if (!vm) status = fail(vm.error().message);
    else if (auto removed = vms::remove(*root, name); !removed) status = fail(removed.error().message);
  }
  return status;
}

std::string first_line(std::string text) {
  return text.substr(0, text.find('\n'));
}

}  // namespace

bool is_life_verb(const std::string& word) { return std::find(kVerbs.begin(), kVerbs.end(), word) != kVerbs.end(); }

int life_command(const std::vector<std::string>& arguments) {
  CLI::App app{"VMs that run in the background", "ring3"};
  app.require_subcommand(1);
  bool all = false, json = false, force = false, follow = false;
  std::string name, timeout = "30";
  std::vector<std::string> names;

  CLI::App* ps_verb = app.add_subcommand("ps", "list the VMs that were started with --detach");
  ps_verb->add_flag("-a,--all", all, "also those that have ended");
  ps_verb->add_flag("--json", json, "for programs");
  ps_verb->footer("Examples:\n  ring3 ps\n  ring3 ps --all\n  ring3 ps --json | jq -r '.[].name'");

  CLI::App* stop_verb = app.add_subcommand("stop", "press a VM's power button, and end it when it does not power off");
  stop_verb->add_option("NAME", name, "the VM")->required();
  stop_verb->add_option("--timeout", timeout, "how long the guest may take to power off")->type_name("SECONDS")->capture_default_str();
  stop_verb->add_flag("--force", force, "end it at once, as pulling the plug does");
  stop_verb->footer("Exit status: 0 the VM is gone, 2 it is not there or not to be ended.\n\n"
                    "Examples:\n  ring3 stop build\n  ring3 stop --timeout 120 database\n  ring3 stop --force build");

  CLI::App* console_verb = app.add_subcommand("console", "connect this terminal to a VM's console");
  console_verb->add_option("NAME", name, "the VM")->required();
  console_verb->footer("Keys: Ctrl-A d leaves the console (the VM goes on), Ctrl-A h lists the keys.\n\n"
                       "Examples:\n  ring3 console build");

  CLI::App* logs_verb = app.add_subcommand("logs", "print what a VM wrote to its console");
  logs_verb->add_option("NAME", name, "the VM")->required();
  logs_verb->add_flag("-f,--follow", follow, "go on until the VM ends");
  logs_verb->footer("Examples:\n  ring3 logs build\n  ring3 logs -f build");

  CLI::App* rm_verb = app.add_subcommand("rm", "forget VMs that have ended, with their logs");
  rm_verb->add_option("NAME", names, "the VMs")->required();
  rm_verb->footer("Examples:\n  ring3 rm build");

  const std::string help_of = "ring3 " + arguments[0];
  for (CLI::App* verb : app.get_subcommands({})) verb->set_help_flag("-h,--help", "show this help");
  try {
    std::vector<std::string> reversed(arguments.rbegin(), arguments.rend());
    app.parse(reversed);
  } catch (const CLI::CallForHelp&) {
    return print(app.get_subcommand(arguments[0])->help("ring3"));
  } catch (const CLI::ParseError& e) {
    return fail(printable(first_line(e.what())) + "; see " + help_of + " --help");
  }
  if (ps_verb->parsed()) return ps(all, json);
  if (console_verb->parsed()) return attach_console(name);
  if (logs_verb->parsed()) return logs(name, follow);
  if (rm_verb->parsed()) return rm(names);
  auto seconds = parse_count(timeout, "--timeout", 0, 86400);
  if (!seconds) return fail(seconds.error().message);
  return stop(name, *seconds, force);
}

}  // namespace ring3::control
