#include "control/cli/options.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <array>
#include <cctype>

#include "control/cli/text.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

namespace {

using vmm::MachineConfig;

/// Stands for an empty value on its way through the parser, which takes "--append=" for a missing one.
constexpr const char* kEmptyValue = "\x1f";

struct ValueOption {
  const char* brief;  ///< or nullptr
  const char* name;
};

/// The options of `run` that take a value.
constexpr auto kValueOptions = std::to_array<ValueOption>({
    {"-n", "--name"},   {"-m", "--memory"},    {"-c", "--cpus"},      {nullptr, "--engine"},
    {nullptr, "--cpu"}, {nullptr, "--kernel"}, {nullptr, "--initrd"}, {nullptr, "--append"},
    {nullptr, "--console"}, {nullptr, "--log"}, {nullptr, "--engine-option"},
    {nullptr, "--stop-timeout"}, {nullptr, "--disk"}, {nullptr, "--net"}, {nullptr, "--vsock"},
    {nullptr, "--share"}, {nullptr, "--cloud-init"}, {nullptr, "--ssh-key"}, {nullptr, "--rootfs"},
    {nullptr, "--console-port"},
});

/// Ties each value to its option, so that one that begins with a dash or is empty is still the value:
/// "-c -1" is a bad count, not an unknown option.
std::vector<std::string> tie_values(const std::vector<std::string>& arguments) {
  std::vector<std::string> tied;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& a = arguments[i];
    const auto is_a = [&](const ValueOption& o) { return a == o.name || (o.brief != nullptr && a == o.brief); };
    const auto option = std::find_if(kValueOptions.begin(), kValueOptions.end(), is_a);
    if (option != kValueOptions.end() && i + 1 < arguments.size()) {
      const std::string& value = arguments[++i];
      tied.push_back(std::string(option->name) + "=" + (value.empty() ? kEmptyValue : value));
      continue;
    }
    const bool empty_value = std::any_of(kValueOptions.begin(), kValueOptions.end(),
                                         [&](const ValueOption& o) { return a == std::string(o.name) + "="; });
    tied.push_back(empty_value ? a + kEmptyValue : a);
  }
  return tied;
}

std::string real_value(const std::string& value) { return value == kEmptyValue ? "" : value; }

std::string one_line(std::string text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back())) != 0) text.pop_back();
  std::replace(text.begin(), text.end(), '\n', ' ');
  return text;
}

/// The words of the run verb as typed, before they are checked.
struct RunText {
  std::string name = "ring3", memory = "1G", cpus = "1", engine = "auto", cpu = "default", kernel, initrd, append;
  std::string console = "stdio", log = "warn", stop_timeout = "30";
  std::vector<std::string> engine_options, disks, nets, shares, ssh_keys, console_ports;
  std::string cloud_init, rootfs;
  std::string vsock;
};

/// Its flags, and which of its words were given.
struct RunFlags {
  bool append = false, named = false, rng = false, balloon = false, no_reboot = false, test_device = false, detach = false;
};

constexpr const char* kRunExamples =
    "Keys with the console on this terminal: Ctrl-A x ends the VM, Ctrl-A h lists the keys.\n"
    "Exit status: 0 the guest powered off, 2 bad usage or a failure of the host, 3 the guest panicked or\n"
    "triple-faulted, 130 ended from the keyboard; with --test-device, the guest's own.\n\n"
    "Examples:\n"
    "  ring3 run --kernel vmlinuz --initrd initramfs.gz -m 512M\n"
    "  ring3 run --kernel vmlinuz --initrd initramfs.gz --append \"console=ttyS0 quiet\" -c 2 --engine soft\n"
    "  ring3 run --kernel vmlinuz --append \"console=ttyS0 panic=1\" --no-reboot --console file:boot.log\n"
    "  ring3 run --kernel vmlinuz --initrd initrd.img --disk disk.qcow2 --append \"console=ttyS0 root=/dev/vda1\"\n"
    "  ring3 run --kernel test.elf --test-device; echo $?\n"
    "  ring3 run --kernel vmlinuz --initrd initramfs.gz --detach --name build; ring3 console build\n"
    "  ring3 run --rootfs debian -- sh -c 'uname -r; make check'";
constexpr const char* kDoctorExamples =
    "Exit status: 0 an engine works here, 2 none does.\n\n"
    "Examples:\n"
    "  ring3 doctor\n"
    "  ring3 doctor --json | jq .choice.engine";
constexpr const char* kVersionExamples =
    "Examples:\n"
    "  ring3 version\n"
    "  ring3 version --json";
constexpr const char* kTopExamples =
    "Examples:\n"
    "  ring3 doctor\n"
    "  ring3 run --kernel vmlinuz --initrd initramfs.gz -m 512M\n"
    "  ring3 run --help";

bool good_name(const std::string& name) {
  if (name.empty() || name.size() > 64 || name[0] == '-' || name[0] == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '-' || c == '_' || c == '.';
  });
}

Status check_memory(const std::string& text, RunOptions& out) {
  auto size = parse_size(text);
  if (!size) return Error::of(EINVAL, "--memory: " + size.error().message);
  if (*size < MachineConfig::kMinMemory) {
    const bool bare = !text.empty() && std::isdigit(static_cast<unsigned char>(text.back())) != 0;
    return Error::of(EINVAL, "--memory: " + printable(text) + " is too little; at least " +
                                 format_size(MachineConfig::kMinMemory) + " is needed" +
                                 (bare && *size > 0 ? " (a number alone is bytes: say " + printable(text) + "M?)" : ""));
  }
  if (*size > MachineConfig::kMaxMemory) {
    return Error::of(EINVAL, "--memory: " + printable(text) + " is too much; at most " +
                                 format_size(MachineConfig::kMaxMemory) + " is supported");
  }
  if (*size % kPageSize != 0) {
    return Error::of(EINVAL, "--memory: " + printable(text) + " is not a whole number of 4 KiB pages");
  }
  out.memory_bytes = *size;
  return Ok{};
}

/// KEY=VALUE; the word interpreter (translator) is short for engine=interpreter.
Status add_engine_option(const std::string& word, EngineOptionMap* map) {
  const std::string pair = word == "interpreter" || word == "translator" ? "engine=" + word : word;
  const auto equals = pair.find('=');
  if (equals == std::string::npos || equals == 0) {
    return Error::of(EINVAL, "--engine-option: '" + printable(real_value(pair)) + "' is not KEY=VALUE");
  }
  if (!map->emplace(pair.substr(0, equals), pair.substr(equals + 1)).second) {
    return Error::of(EINVAL, "--engine-option: " + printable(pair.substr(0, equals)) + " is given twice");
  }
  return Ok{};
}

Result<Command> check_run(const RunText& text, const RunFlags& flags) {
  RunOptions run;
  run.no_reboot = flags.no_reboot;
  run.test_device = flags.test_device;
  run.detach = flags.detach;
  run.named = flags.named;

  run.name = real_value(text.name);
  if (!good_name(run.name)) {
    return Error::of(EINVAL, "--name: '" + printable(run.name) + "' will not do: 1 to 64 letters, digits, '-', '_' and '.'");
  }
  if (auto status = check_memory(real_value(text.memory), run); !status) return status.error();
  auto cpus = parse_count(real_value(text.cpus), "--cpus", 1, MachineConfig::kMaxCpus);
  if (!cpus) return cpus.error();
  run.cpus = static_cast<u32>(*cpus);
  auto patience = parse_count(real_value(text.stop_timeout), "--stop-timeout", 0, 86400);
  if (!patience) return patience.error();
  run.stop_timeout = static_cast<u32>(*patience);

  if (text.engine == "kvm") run.engine = EngineKind::kKvm;
  else if (text.engine == "soft") run.engine = EngineKind::kSoft;
  else if (text.engine != "auto") {
    return Error::of(EINVAL, "--engine: there is no '" + printable(real_value(text.engine)) + "'; there are auto, kvm and soft");
  }

  run.cpu = real_value(text.cpu);
  if (run.cpu.empty()) return Error::of(EINVAL, "--cpu wants the name of a model");
  run.kernel = real_value(text.kernel);
  if (!text.rootfs.empty()) {
    run.rootfs = real_value(text.rootfs);
    for (const auto& [ending, read_only] : {std::pair{",ro", true}, {",readonly", true}, {",rw", false}}) {
      const std::string_view e(ending);
      if (run.rootfs.size() <= e.size() || run.rootfs.substr(run.rootfs.size() - e.size()) != e) continue;
      run.rootfs.resize(run.rootfs.size() - e.size());
      run.rootfs_read_only = read_only;
      break;
    }
    if (run.rootfs.empty()) return Error::of(EINVAL, "--rootfs wants a directory, such as --rootfs debian -- uname -a");
    if (!text.initrd.empty()) return Error::of(EINVAL, "--initrd does not go with --rootfs, which makes its own");
    if (flags.detach) return Error::of(EINVAL, "--detach does not go with --rootfs, whose command is waited for");
  }
  if (run.kernel.empty() && run.rootfs.empty()) return Error::of(EINVAL, "nothing to boot: give --kernel FILE (see ring3 run --help)");
  run.initrd = real_value(text.initrd);
  if (run.initrd.empty() && !text.initrd.empty()) return Error::of(EINVAL, "--initrd wants the name of a file");
  if (flags.append) run.append = real_value(text.append);

  for (const std::string& n : text.nets) {
    auto net = net::parse_net(real_value(n));
    if (!net) return Error::of(EINVAL, printable(net.error().message));
    run.nets.push_back(std::move(*net));
  }
  // A test guest gets the devices it asks for and no others.
  if (run.nets.empty() && !flags.test_device) run.nets.emplace_back();
  if (!text.vsock.empty()) {
    auto vsock = parse_vsock_option(real_value(text.vsock));
    if (!vsock) return vsock.error();
    run.vsock = std::move(*vsock);
  }
  for (const std::string& d : text.disks) {
    auto disk = parse_disk_option(real_value(d));
    if (!disk) return disk.error();
    run.disks.push_back(std::move(*disk));
  }
  for (const std::string& s : text.shares) {
    auto share = parse_share_option(real_value(s));
    if (!share) return share.error();
    run.shares.push_back(std::move(*share));
  }
  if (!text.cloud_init.empty()) {
    if (auto status = parse_cloud_init(real_value(text.cloud_init), run.seed); !status) return status.error();
  }
  for (const std::string& key : text.ssh_keys) run.seed.ssh_keys.push_back(real_value(key));
  run.rng = flags.rng;
  run.balloon = flags.balloon;
  run.console = real_value(text.console);
  // virtio, or virtio,WHERE
  if (run.console == "virtio" || run.console.rfind("virtio,", 0) == 0) {
    run.virtio_console = true;
    run.console = run.console == "virtio" ? "stdio" : run.console.substr(7);
  }
  const bool to_file = run.console.rfind("file:", 0) == 0;
  if (!to_file && run.console != "stdio" && run.console != "pty" && run.console != "none") {
    return Error::of(EINVAL, "--console: there is no '" + printable(run.console) + "'; there are stdio, pty, file:PATH and none, and virtio,WHERE");
  }
  if (run.console == "file:") return Error::of(EINVAL, "--console file: wants a path, such as file:console.log");
  for (const std::string& s : text.console_ports) {
    auto port = parse_console_port(real_value(s));
    if (!port) return port.error();
    run.console_ports.push_back(std::move(*port));
  }
  if (auto status = check_console_ports(run.console_ports); !status) return status.error();

  run.log = real_value(text.log);
  const std::array<const char*, 6> levels{"debug", "info", "warn", "error", "off", "trace"};
  if (std::none_of(levels.begin(), levels.end(), [&](const char* level) { return run.log == level; })) {
    return Error::of(EINVAL, "--log: there is no level '" + printable(run.log) + "'; there are error, warn, info, debug, trace and off");
  }

  for (const std::string& pair : text.engine_options) {
    if (auto status = add_engine_option(pair, &run.engine_options); !status) return status.error();
  }
  if (!run.engine_options.empty() && run.engine == EngineKind::kKvm) {
    return Error::of(EINVAL, "--engine-option is for the software engine, not for --engine kvm");
  }
  return Command(std::move(run));
}

constexpr const char* kWithHelp =
    "run another VMM on ring3's KVM\n"
    "Usage: ring3 with [OPTIONS] [--] COMMAND [ARGUMENT]...\n\n"
    "Options:\n"
    "  -h,--help                   show this help\n"
    "  --engine-option KEY=VALUE   a switch of the software engine, such as interpreter; repeatable\n\n"
    "The program, and every program it starts, finds a /dev/kvm that the software engine serves, whether the host has one\n"
    "or not. It has to be linked dynamically. Exit status: the program's, 2 when it cannot be started.\n\n"
    "Examples:\n"
    "  ring3 with -- qemu-system-x86_64 -accel kvm -cpu host -m 1G -nographic disk.qcow2\n"
    "  ring3 with --engine-option interpreter -- qemu-system-x86_64 -accel kvm -M q35 -kernel vmlinuz\n";

/// By hand: what follows the program's name is the program's, dashes and all.
Result<Command> parse_with(const std::vector<std::string>& arguments) {
  WithOptions with;
  std::size_t i = 1;
  for (; i < arguments.size(); i++) {
    const std::string& a = arguments[i];
    const std::string key = "--engine-option";
    if (a == "--") {
      i++;
      break;
    }
    if (a == "-h" || a == "--help") return Command(HelpText{kWithHelp});
    std::string pair;
    if (a == key) {
      if (i + 1 >= arguments.size()) return Error::of(EINVAL, key + " wants a value; see ring3 with --help");
      pair = arguments[++i];
    } else if (a.rfind(key + "=", 0) == 0) {
      pair = a.substr(key.size() + 1);
    } else if (!a.empty() && a[0] == '-') {
      return Error::of(EINVAL, "unknown option '" + printable(a.substr(0, a.find('='))) + "'; see ring3 with --help");
    } else {
      break;
    }
    if (auto status = add_engine_option(pair, &with.engine_options); !status) return status.error();
  }
  with.command.assign(arguments.begin() + static_cast<std::ptrdiff_t>(i), arguments.end());
  if (with.command.empty() || with.command[0].empty()) {
    return Error::of(EINVAL, "nothing to run: give a command, such as ring3 with -- qemu-system-x86_64 -accel kvm");
  }
  return Command(std::move(with));
}

}  // namespace

const char* version() { return RING3_VERSION; }

Result<Command> parse_command_line(const std::vector<std::string>& arguments) {
  if (!arguments.empty() && arguments[0] == "with") return parse_with(arguments);
  if (!arguments.empty() && arguments[0] == "run") {
    // What follows "--" is the guest's command, dashes and all.
    const auto dashes = std::find(arguments.begin(), arguments.end(), "--");
    if (dashes != arguments.end()) {
      auto parsed = parse_command_line({arguments.begin(), dashes});
      auto* options = parsed ? std::get_if<RunOptions>(&*parsed) : nullptr;
      if (options == nullptr) return parsed;
      if (options->rootfs.empty()) return Error::of(EINVAL, "a command after -- wants --rootfs DIR, the guest's root");
      options->command.assign(dashes + 1, arguments.end());
      if (options->command.empty() || options->command[0].empty()) return Error::of(EINVAL, "nothing to run after --; see ring3 run --help");
      return parsed;
    }
  }
  CLI::App app{"ring3 runs x86-64 operating systems as ordinary Linux processes.", "ring3"};
  app.set_help_flag("-h,--help", "show this help");
  app.footer(kTopExamples);
  app.require_subcommand(0, 1);
  bool version_flag = false;
  app.add_flag("--version", version_flag, "the same as ring3 version");

  RunText text;
  RunFlags flags;
  CLI::App* run = app.add_subcommand("run", "boot a VM in the foreground, its console on this terminal");
  run->footer(kRunExamples);
  const CLI::Option* named = run->add_option("-n,--name", text.name, "what to call the VM")->type_name("NAME")->capture_default_str();
  run->add_option("-m,--memory", text.memory, "guest memory: 512M, 2G")->type_name("SIZE")->capture_default_str();
  run->add_option("-c,--cpus", text.cpus, "virtual CPUs")->type_name("N")->capture_default_str();
  run->add_option("--engine", text.engine, "auto (the faster one), kvm (/dev/kvm) or soft")->type_name("ENGINE")->capture_default_str();
  run->add_option("--cpu", text.cpu, "CPU model and features: MODEL[,+FEATURE][,-FEATURE]")->type_name("MODEL")->capture_default_str();
  run->add_option("--kernel", text.kernel, "what to boot: bzImage, ELF with a PVH entry, multiboot")->type_name("FILE");
  run->add_option("--initrd", text.initrd, "initial RAM disk")->type_name("FILE");
  const CLI::Option* append =
      run->add_option("--append", text.append, "kernel command line [console=ttyS0; empty with --test-device]")->type_name("STRING");
  run->add_option("--net", text.nets,
                  "a network card: user[,hostfwd=tcp|udp:[ADDR]:PORT-[ADDR]:PORT][,restrict=on], tap,ifname=NAME, or none; with\n"
                  "[,pcap=FILE][,mac=ADDR][,queues=N][,mtu=N]; repeatable [user; none with --test-device]")
      ->type_name("NET")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  run->add_option("--vsock", text.vsock, "sockets between host and guest: cid=N,socket=PATH")->type_name("VSOCK");
  run->add_option("--console", text.console, "the serial console: stdio, pty, file:PATH or none; virtio[,WHERE] makes it hvc0")->type_name("WHERE")->capture_default_str();
  run->add_option("--console-port", text.console_ports, "a byte channel, /dev/virtio-ports/NAME in the guest: NAME=pty|file:PATH|unix:PATH; repeatable")
      ->type_name("PORT")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  run->add_option("--disk", text.disks, "a disk image: PATH[,ro][,format=raw|qcow2][,serial=S][,cache=none|writeback]; repeatable")
      ->type_name("IMAGE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  run->add_option("--share", text.shares, "a host directory in the guest (virtio-fs): DIR[:TAG][,ro][,owner=ID][,cache=SECONDS]; repeatable")
      ->type_name("DIR")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  run->add_option("--cloud-init", text.cloud_init, "a NoCloud seed disk for cloud-init: USER-DATA[,META-DATA[,NETWORK-CONFIG]]")->type_name("FILE");
  run->add_option("--ssh-key", text.ssh_keys, "a public key for the cloud image's user, in the seed; repeatable")
      ->type_name("FILE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');
  run->add_option("--rootfs", text.rootfs, "run a command (after --) with this directory as the guest's root: DIR[,ro|rw]")->type_name("DIR");
  run->add_flag("--rng", flags.rng, "a source of randomness for the guest")->disable_flag_override();
  run->add_flag("--balloon", flags.balloon, "give memory that the guest does not use back to the host")->disable_flag_override();
  run->add_flag("--no-reboot", flags.no_reboot, "end, with status 0, when the guest reboots")->disable_flag_override();
  run->add_flag("--test-device", flags.test_device, "add the device of test guests (exit port 0xf4, ...)")->disable_flag_override();
  run->add_flag("-d,--detach", flags.detach, "run in the background: see ring3 ps, stop, console, logs")->disable_flag_override();
  run->add_option("--stop-timeout", text.stop_timeout, "how long the guest may take to power off on SIGTERM")
      ->type_name("SECONDS")
      ->capture_default_str();
  run->add_option("--log", text.log, "messages to show: error, warn, info, debug, trace, off")->type_name("LEVEL")->capture_default_str();
  run->add_option("--engine-option", text.engine_options, "a switch of the software engine; repeatable. interpreter: no translated code")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->delimiter('\0');

  app.add_subcommand("with", "run another VMM on ring3's KVM");  // taken apart above; named here for the help

  DoctorOptions doctor_options;
  CLI::App* doctor = app.add_subcommand("doctor", "what this host offers, which engine would run and why, and their speed");
  doctor->footer(kDoctorExamples);
  doctor->add_flag("--json", doctor_options.json, "for programs")->disable_flag_override();

  // For the list of verbs only: image_command() has its words before this parser sees them.
  for (const auto& [verb, help] : {std::pair{"ps", "list the VMs that run in the background"},
                                   {"stop", "power a VM off"},
                                   {"console", "connect this terminal to a VM's console"},
                                   {"logs", "print what a VM wrote to its console"},
                                   {"rm", "forget a VM that has ended"}}) {
    app.add_subcommand(verb, help);  // taken apart in life.cpp
  }
  app.add_subcommand("image", "make, inspect, convert and repair disk images: ring3 image --help");

  VersionOptions version_options;
  CLI::App* version_verb = app.add_subcommand("version", "the version of ring3");
  version_verb->footer(kVersionExamples);
  version_verb->add_flag("--json", version_options.json, "for programs")->disable_flag_override();

  for (CLI::App* verb : {run, doctor, version_verb}) verb->set_help_flag("-h,--help", "show this help");

  std::string help_of = "ring3";
  if (!arguments.empty()) {
    for (const CLI::App* verb : {run, doctor, version_verb}) {
      if (arguments[0] == verb->get_name()) help_of = "ring3 " + verb->get_name();
    }
    const std::string& first = arguments[0];
    if (help_of == "ring3" && (first.empty() || first[0] != '-')) {
      return Error::of(EINVAL, "there is no verb '" + printable(first) + "'; there are run, ps, stop, console, logs, rm, with, image, doctor and version");
    }
  }
  try {
    auto tied = tie_values(arguments);
    std::reverse(tied.begin(), tied.end());  // the parser takes them from the back
    app.parse(tied);
  } catch (const CLI::CallForHelp&) {
    for (CLI::App* verb : {run, doctor, version_verb}) {
      if (verb->parsed()) return Command(HelpText{verb->help("ring3")});
    }
    return Command(HelpText{app.help()});
  } catch (const CLI::ExtrasError&) {
    std::string extra;
    for (const CLI::App* level : {run, doctor, version_verb, &app}) {
      const auto remaining = level->remaining();
      if (extra.empty() && !remaining.empty()) extra = remaining.front();
    }
    const bool option = !extra.empty() && extra[0] == '-';
    if (option) extra = extra.substr(0, extra.find('='));
    return Error::of(EINVAL, (option ? "unknown option '" : "unexpected argument '") + printable(extra) + "'; see " + help_of + " --help");
  } catch (const CLI::ArgumentMismatch& e) {
    const std::string what = e.what();
    if (what.find("flag override") != std::string::npos) {
      return Error::of(EINVAL, "--" + printable(what.substr(0, what.find(' '))) + " takes no value; see " + help_of + " --help");
    }
    const std::string option = what.substr(0, what.find(':'));
    const bool missing = what.find("missing") != std::string::npos;
    return Error::of(EINVAL, printable(option) + (missing ? " wants a value" : " is given more than once") + "; see " + help_of + " --help");
  } catch (const CLI::ParseError& e) {
    return Error::of(EINVAL, printable(one_line(e.what())) + "; see " + help_of + " --help");
  }

  if (run->parsed()) {
    flags.append = append->count() > 0;
    flags.named = named->count() > 0;
    return check_run(text, flags);
  }
  if (doctor->parsed()) return Command(doctor_options);
  if (version_verb->parsed() || version_flag) return Command(version_options);
  return Error::of(EINVAL, "say what to do: ring3 run, ring3 doctor or ring3 version (see ring3 --help)");
}

}  // namespace ring3::control
