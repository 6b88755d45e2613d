#include "base/linux_kvm.hpp"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <mutex>

#include "base/log.hpp"
#include "control/cli/commands.hpp"
#include "control/cli/console_ports.hpp"
#include "control/cli/disks.hpp"
#include "control/cli/detach.hpp"
#include "control/cli/host.hpp"
#include "control/cli/progress.hpp"
#include "control/cli/rootfs_run.hpp"
#include "control/cli/shares.hpp"
#include "control/cli/signals.hpp"
#include "control/cli/stream_console.hpp"
#include "control/cli/terminal.hpp"
#include "control/cli/text.hpp"
#include "control/vms/shared_console.hpp"
#include "devices/virtio/balloon/balloon_device.hpp"
#include "devices/virtio/rng/rng_device.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

namespace {

void set_up_log(const std::string& level) {
  auto logger = std::make_shared<spdlog::logger>("ring3", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_pattern("ring3: %v");
  logger->set_level(spdlog::level::from_str(level));
  spdlog::set_default_logger(std::move(logger));
}

/// Why the VM is being ended from outside, and the machine to tell. Shared by the signal, console and main threads.
class Ending {
 public:
  void set_machine(vmm::Machine* machine) {
    const std::lock_guard lock(mutex_);
    machine_ = machine;
    if (machine_ != nullptr && status_) machine_->request_stop();
  }
  /// The terminal has the size that it has now.
  void resize_console() {
    const std::lock_guard lock(mutex_);
    winsize size{};
    if (machine_ == nullptr || ioctl(STDIN_FILENO, TIOCGWINSZ, &size) != 0) return;
    machine_->resize_console(size.ws_col, size.ws_row);
  }
  /// The terminal that `ring3 console` attached has this size.
  void resize_console(u16 columns, u16 rows) {
    const std::lock_guard lock(mutex_);
    if (machine_ != nullptr) machine_->resize_console(columns, rows);
  }
  /// The first reason counts.
  void request(int status, const std::string& why) {
    const std::lock_guard lock(mutex_);
    if (!status_) {
      status_ = status;
      why_ = why;
    }
    if (machine_ != nullptr) machine_->request_stop();
  }
  /// Presses the power button. Whether the guest listens to it.
  bool press_power_button() {
    const std::lock_guard lock(mutex_);
    return machine_ != nullptr && machine_->press_power_button();
  }
  /// Whether a machine is there to be asked.
  bool has_machine() {
    const std::lock_guard lock(mutex_);
    return machine_ != nullptr;
  }
  std::optional<int> status() {
    const std::lock_guard lock(mutex_);
    return status_;
  }
  std::string why() {
    const std::lock_guard lock(mutex_);
    return why_;
  }

 private:
  std::mutex mutex_;
  vmm::Machine* machine_ = nullptr;
  std::optional<int> status_;
  std::string why_;
};

/// Says at once what is wrong with a file, before an engine is chosen. The machine reads and checks it.
Status check_file(const std::string& option, const std::string& path) {
  struct stat info {};
  if (stat(path.c_str(), &info) != 0) return Error::from_errno(option + " " + printable(path));
  if (S_ISDIR(info.st_mode)) return Error::of(EISDIR, option + " " + printable(path) + " is a directory, not a file");
  if (access(path.c_str(), R_OK) != 0) return Error::from_errno(option + " " + printable(path));
  return Ok{};
}

Status check_memory_can_be_had(u64 bytes) {
  const u64 ceiling = host_memory_ceiling();
  if (ceiling != 0 && bytes > ceiling) {
    return Error::of(ENOMEM, "--memory: " + format_size(bytes) + " is more than this host has (" + format_size(ceiling) +
                                 " with swap)");
  }
  return Ok{};
}

/// `place`: what `ring3 ps` calls it.
Result<std::unique_ptr<vmm::Console>> make_console(const std::string& where, Background* background,
                                                   StreamConsole::Callbacks callbacks,
                                                   vms::SharedConsole::OnSize on_size, std::string& place) {
  const auto widen = [](auto made) -> Result<std::unique_ptr<vmm::Console>> {
    if (!made) return made.error();
    return std::unique_ptr<vmm::Console>(std::move(*made));
  };
  place = where;
  if (where == "stdio" && background != nullptr) {
    place = "shared";
    return widen(vms::SharedConsole::create(background->claim().directory_fd(), std::move(on_size)));
  }
  if (where == "stdio") return widen(StreamConsole::standard_io(std::move(callbacks)));
  if (where == "none") return widen(StreamConsole::none());
  if (where == "pty") {
    auto console = StreamConsole::pseudo_terminal(place, std::move(callbacks));
    if (console) std::fprintf(stderr, "ring3: the console is on %s\n", place.c_str());
    return widen(std::move(console));
  }
  place = where.substr(std::string("file:").size());
  auto console = StreamConsole::file(place, std::move(callbacks));
  if (char* full = console ? realpath(place.c_str(), nullptr) : nullptr) {
    place = full;
    std::free(full);
  }
  return widen(std::move(console));
}

Result<std::unique_ptr<kvm::Endpoint>> make_engine(const RunOptions& options, EngineKind& kind) {
  if (options.engine) {
    kind = *options.engine;
    log::info("engine {}: asked for", to_string(kind));
  } else {
    // A wrong switch is the user's mistake, not a reason to take the other engine.
    if (!options.engine_options.empty()) {
      if (auto soft = open_engine(EngineKind::kSoft, options.engine_options); !soft) return soft.error();
    }
    const auto limit = std::chrono::milliseconds(300);
    const EngineChoice choice =
        choose(examine(EngineKind::kKvm, {}, limit), examine(EngineKind::kSoft, options.engine_options, limit));
    if (!choice.kind) return Error::of(ENODEV, choice.reason);
    kind = *choice.kind;
    log::info("engine {}: {}", to_string(kind), choice.reason);
  }
  auto system = open_engine(kind, options.engine_options);
  if (!system) return system.error();
  if (kind == EngineKind::kSoft) {
    log::info("guest code runs in the {}", soft_engine_kind(options.engine_options));
    warn_without_translator(options.engine_options);
  }
  const long most = (*system)->ioctl(KVM_CHECK_EXTENSION, KVM_CAP_MAX_VCPUS);
  if (most > 0 && options.cpus > static_cast<unsigned long>(most)) {
    return Error::of(EINVAL, "--cpus: " + std::to_string(options.cpus) + " is more than the " + to_string(kind) +
                                 " engine can run (" + std::to_string(most) + ")");
  }
  return system;
}

/// A guest that writes nothing for so long, and has no driver to do so, is not waited for without a word.
constexpr std::chrono::seconds kSilent{20};

vmm::MachineConfig machine_config(const RunOptions& options) {
  vmm::MachineConfig config;
  config.name = options.name;
  config.memory_bytes = options.memory_bytes;
  config.cpus = options.cpus;
  config.cpu = options.cpu;
  config.kernel = options.kernel;
  config.initrd = options.initrd;
  // A test guest reads its command line as arguments of its own; a kernel wants to be told its console.
  config.append = options.append.value_or(options.test_device ? "" : options.virtio_console ? "console=hvc0" : "console=ttyS0");
  config.virtio_console = options.virtio_console;
  const auto device = [&](auto make) {
    config.devices.push_back([make]() -> Result<std::shared_ptr<virtio::Device>> { return std::shared_ptr<virtio::Device>(make()); });
  };
  if (options.rng) device([] { return std::make_shared<virtio::RngDevice>(); });
  if (options.balloon) device([] { return std::make_shared<virtio::BalloonDevice>(); });
  config.reboot = !options.no_reboot;
  config.test_device = options.test_device;
  return config;
}

int report(const vmm::Outcome& outcome, Ending& ending) {
  using Kind = vmm::Outcome::Kind;
  // What was lost of the output is not made good by a guest that ends well.
  if (ending.status() == kFailure) return fail(ending.why());
  const auto message = [&](const char* otherwise) { return outcome.message.empty() ? otherwise : outcome.message; };
  switch (outcome.kind) {
    case Kind::kPoweredOff: log::info("the guest powered off"); return kSuccess;
    case Kind::kReboot: log::info("the guest rebooted"); return kSuccess;
    case Kind::kPanic: fail(message("the guest panicked")); return kGuestFailure;
    case Kind::kTripleFault: fail(message("the guest triple-faulted")); return kGuestFailure;
    case Kind::kTestExit: return outcome.status;
    case Kind::kStopped: {
      if (const auto why = ending.why(); !why.empty()) fail(why);
      return ending.status().value_or(kKeyboard);
    }
    case Kind::kHostError: break;
  }
  return fail(message("the VM ended for an unknown reason"));
}

/// What the outcome is in words, for `ring3 ps --all`.
std::string in_words(const vmm::Outcome& outcome, Ending& ending) {
  if (outcome.kind == vmm::Outcome::Kind::kStopped && !ending.why().empty()) return ending.why();
  return outcome.message.empty() ? to_string(outcome.kind) : outcome.message;
}

/// What a VM was made for: its command's exit status, or why there is none.
int report_command(const vmm::Outcome& outcome, Ending& ending, rootfs::Session& session, const rootfs::Tail* tail) {
  const auto command = session.finish();
  if (ending.status() == SignalWatcher::exit_status(SIGPIPE)) return *ending.status();
  if (ending.status() || outcome.kind == vmm::Outcome::Kind::kHostError) return report(outcome, ending);
  if (command && outcome.kind == vmm::Outcome::Kind::kPoweredOff) return *command;
  if (const std::string why = session.complaint(); !why.empty()) return fail("in the guest: " + printable(why));
  if (tail != nullptr) {
    const std::string text = tail->text();
    std::fwrite(text.data(), 1, text.size(), stderr);
  }
  const int status = outcome.kind == vmm::Outcome::Kind::kPoweredOff ? kFailure : kGuestFailure;
  fail(std::string("the guest ended before its command did: ") + (outcome.message.empty() ? to_string(outcome.kind) : outcome.message));
  return status;
}

int run_vm(const RunOptions& options, Background* background, RootfsRun* command = nullptr) {
  set_up_log(options.log);
  if (auto status = check_file("--kernel", options.kernel); !status) return fail(status.error().message);
  if (!options.initrd.empty()) {
    if (auto status = check_file("--initrd", options.initrd); !status) return fail(status.error().message);
  }
  if (auto status = check_memory_can_be_had(options.memory_bytes); !status) return fail(status.error().message);
  // Before the disks and the threads: the user network's process is to inherit nothing of them.
  auto networks = Networks::open(options.nets, options.name);
  if (!networks) return fail(networks.error().message);
  auto disks = Disks::open(options.disks);
  if (!disks) return fail(disks.error().message);

  std::vector<u8> seed;
  if (options.seed.any()) {
    auto made = make_seed(options.seed, options.name);
    if (!made) return fail(made.error().message);
    seed = std::move(*made);
  }
  auto shares = Shares::start(options.shares);
  if (!shares) return fail(shares.error().message);

  // A command whose output comes another way leaves the console to the kernel.
  const bool hidden = command != nullptr && !command->terminal && options.console == "stdio";
  // Before any other thread: they inherit the signal mask.
  Ending ending;
  SignalWatcher* watcher_for_callbacks = nullptr;
  SignalWatcher watcher([&](const SignalWatcher::Ask& ask) -> std::optional<std::chrono::seconds> {
    const int status = SignalWatcher::exit_status(ask.signal);
    if (!ending.has_machine()) {
      restore_terminal();
      _exit(status);
    }
    const auto grace = std::chrono::seconds(ask.grace.value_or(static_cast<int>(options.stop_timeout)));
    // A command without a terminal gets the signal; what it does then is its own affair, for a while.
    if (hidden && ask.signal != SIGQUIT && !ask.last && grace.count() > 0 && command->session->send(ask.signal)) {
      log::info("{}: passed on; the command has {} s to end", strsignal(ask.signal), grace.count());
      return grace;
    }
    if (ask.signal == SIGTERM && !ask.last && grace.count() > 0 && ending.press_power_button()) {
      log::info("SIGTERM: the power button is pressed; the guest has {} s to power off", grace.count());
      return grace;
    }
    ending.request(status, ask.signal == SIGINT ? "" : std::string("ended by signal ") + strsignal(ask.signal));
    watcher_for_callbacks->begin_stop(status);
    return std::nullopt;
  }, [&] { ending.resize_console(); });
  watcher_for_callbacks = &watcher;

  StreamConsole::Callbacks callbacks;
  callbacks.on_stop = [&] {
    ending.request(kKeyboard, "");
    watcher.begin_stop(kKeyboard);
  };
  callbacks.on_help = [] { std::fputs(kKeysHelp, stderr); };
  callbacks.on_output_lost = [&](const std::string& why) {
    // Who reads a command's output has enough: it ends as by SIGPIPE, without a word.
    const int status = why.empty() ? SignalWatcher::exit_status(SIGPIPE) : kFailure;
    ending.request(status, why);
    watcher.begin_stop(status);
  };
  std::string console_place;
  rootfs::Tail* tail = nullptr;
  const auto hide = [&]() -> Result<std::unique_ptr<vmm::Console>> {
    auto made = std::make_unique<rootfs::Tail>(command->session->signal_fd());
    tail = made.get();
    return std::unique_ptr<vmm::Console>(std::move(made));
  };
  const auto output_lost = callbacks.on_output_lost;
  auto ports = ConsolePorts::open(options.console_ports);
  if (!ports) return fail(ports.error().message);
  auto console = hidden ? hide() : make_console(options.console, background, std::move(callbacks),
                                                [&](u16 rows, u16 columns) { ending.resize_console(columns, rows); }, console_place);
  if (!console) return fail(console.error().message);
  EngineKind kind = EngineKind::kSoft;
  auto system = make_engine(options, kind);
  if (!system) return fail(system.error().message);
  const bool on_this_terminal = background == nullptr && !hidden && options.console == "stdio";
  BootProgress progress(**console, background == nullptr && !hidden ? STDERR_FILENO : -1, on_this_terminal);
  vmm::MachineConfig config = machine_config(options);
  disks->add_to(config);
  if (!seed.empty()) add_seed(std::move(seed), config);
  shares->add_to(config);
  networks->add_to(config);
  if (auto status = ports->add_to(config); !status) return fail(status.error().message);
  if (options.vsock) {
    if (auto status = add_vsock(*options.vsock, config); !status) return fail(status.error().message);
  }
  auto machine = vmm::Machine::create(std::move(config), std::move(*system), progress);
  if (!machine) return fail(machine.error().message);
  if (background != nullptr) {
    vms::VmInfo info;
    info.started = static_cast<u64>(time(nullptr));
    info.memory_bytes = options.memory_bytes;
    info.cpus = options.cpus;
    info.engine = to_string(kind);
    info.console = console_place;
    if (auto status = background->ready(std::move(info)); !status) return fail(status.error().message);
  }
  if (command != nullptr) command->session->start(output_lost);
  vmm::Outcome outcome;
  {
    Result<RawTerminal> terminal =
        on_this_terminal ? RawTerminal::enter(STDIN_FILENO) : RawTerminal::enter(-1);
    if (!terminal) return fail(terminal.error().message);
    ending.set_machine(machine->get());
    if (on_this_terminal) ending.resize_console();
    if (options.virtio_console) {
      progress.when_silent(kSilent, [&m = **machine]() -> std::string {
        if (m.console_has_driver()) return "";
        return "nothing on the console yet: the guest has no driver for a virtio console. Linux wants virtio_pci and virtio_console in its kernel or "
               "initrd; without --console virtio it has a serial port (console=ttyS0)";
      });
    }
    outcome = (*machine)->run();
    ending.set_machine(nullptr);
    progress.finish();
  }
  machine->reset();  // no device uses the disks any more
  const Status closed = disks->close();
  const int status = !closed              ? fail(closed.error().message)
                     : command != nullptr ? report_command(outcome, ending, *command->session, tail)
                                          : report(outcome, ending);
  if (background != nullptr) background->finish(status, in_words(outcome, ending));
  return status;
}

}  // namespace

int run(const RunOptions& options) {
  if (!options.rootfs.empty()) {
    auto command = prepare_rootfs(options);
    if (!command) return fail(command.error().message);
    return run_vm(command->options, nullptr, &*command);
  }
  if (!options.detach) return run_vm(options, nullptr);
  return detach(options, [&](Background& background) {
    RunOptions named = options;
    named.name = background.claim().name();
    return run_vm(named, &background);
  });
}

}  // namespace ring3::control
