#include "vmm/machine/machine.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>

#include "base/event_fd.hpp"
#include "base/log.hpp"
#include "base/unique_fd.hpp"
#include "vmm/machine/board.hpp"
#include "vmm/machine/console_output.hpp"
#include "vmm/machine/cpu_model.hpp"
#include "vmm/machine/threads.hpp"

namespace ring3::vmm {

const char* to_string(Outcome::Kind kind) {
  switch (kind) {
    case Outcome::Kind::kPoweredOff: return "powered off";
    case Outcome::Kind::kReboot: return "rebooted";
    case Outcome::Kind::kPanic: return "panicked";
    case Outcome::Kind::kTripleFault: return "triple-faulted";
    case Outcome::Kind::kTestExit: return "test exit";
    case Outcome::Kind::kStopped: return "stopped";
    case Outcome::Kind::kHostError: return "host error";
  }
  return "?";
}

namespace {

bool is_signalled(const UniqueFd& fd) {
  pollfd p{fd.get(), POLLIN, 0};
  return ::poll(&p, 1, 0) > 0;
}

std::string hex(u64 v) { return fmt::format("{:#x}", v); }

}  // namespace

struct Machine::Impl {
  enum class Phase { kRunning, kPaused, kStopping };

  Impl(MachineConfig c, kvm::System s, boot::ImageFile k, std::optional<boot::ImageFile> i, GuestRam r, Console& con)
      : config(std::move(c)), system(std::move(s)), kernel(std::move(k)), initrd(std::move(i)), ram(std::move(r)),
        console(con), output(con), stop_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        wake_fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

  MachineConfig config;
  kvm::System system;
  boot::ImageFile kernel;
  std::optional<boot::ImageFile> initrd;
  GuestRam ram;
  Console& console;
  ConsoleOutput output;
  UniqueFd stop_fd;  // request_stop()
  UniqueFd wake_fd;  // something changed for the I/O thread
  bool input_closed = false;

  // Guards board's pointer, ended, pause_wanted and parked; changed_ tells of the last three and of vCPU ends.
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_ptr<Board> board;
  u16 columns = 0, rows = 0;  // of the console, for the next board too
  std::optional<Outcome> ended;  // the first end counts
  bool pause_wanted = false;
  u32 parked = 0;
  u32 running = 0;
  std::atomic<Phase> phase{Phase::kRunning};
  std::atomic<bool> io_end{false};

  Status make_board();
  void end(Outcome outcome);
  void kick_all();
  void vcpu_main(u32 index);
  bool handle_exit(u32 index, kvm::Vcpu& vcpu);
  void dump(u32 index, kvm::Vcpu& vcpu, bool error);
  void io_main();
  Outcome run_board();
  void log_statistics();
};

Status Machine::Impl::make_board() {
  BoardEvents events;
  events.end = [this](Outcome::Kind kind, u8 status, std::string message) { end({kind, status, std::move(message)}); };
  events.reset = [this] { end({Outcome::Kind::kReboot, 0, ""}); };
  events.console_output = [this](u8 byte) { output.put(byte); };
  events.wake_io = [this] { signal_event(wake_fd.get()); };
  auto made = Board::create({config, system, kernel, initrd ? &*initrd : nullptr}, ram, std::move(events));
  if (!made) return made.error();
  std::lock_guard lock(mutex);
  board = std::move(*made);
  board->resize_console(columns, rows);
  return Ok{};
}

void Machine::Impl::end(Outcome outcome) {
  std::lock_guard lock(mutex);
  if (!ended) ended = std::move(outcome);
  phase.store(Phase::kStopping);
  changed.notify_all();
}

void Machine::Impl::kick_all() {
  for (kvm::Vcpu& v : board->vcpus()) v.kick();
}

void Machine::Impl::vcpu_main(u32 index) {
  kvm::Vcpu& vcpu = board->vcpus()[index];
  for (;;) {
    // First take the kick back, then look at what it was for: a later one ends the next KVM_RUN.
    vcpu.clear_kick();
    const Phase now = phase.load();
    if (now == Phase::kStopping) break;
    if (now == Phase::kPaused) {
      std::unique_lock lock(mutex);
      parked++;
      changed.notify_all();
      changed.wait(lock, [&] { return phase.load() != Phase::kPaused; });
      parked--;
      continue;
    }
    const int r = vcpu.run();
    if (r == -EINTR || r == -EAGAIN) continue;
    if (r < 0) {
      dump(index, vcpu, true);
      end({Outcome::Kind::kHostError, 0, Error::from_errno("KVM_RUN on vCPU " + std::to_string(index), -r).message});
      break;
    }
    if (!handle_exit(index, vcpu)) break;
  }
  std::lock_guard lock(mutex);
  running--;
  changed.notify_all();
}

// Whether the vCPU goes on.
bool Machine::Impl::handle_exit(u32 index, kvm::Vcpu& vcpu) {
  using Kind = Outcome::Kind;
  const kvm_run& run = vcpu.run_page();
  const std::string who = "vCPU " + std::to_string(index);
  const auto rip = [&] {
    auto regs = vcpu.regs();
    return regs ? hex(regs->rip) : std::string("?");
  };
  switch (run.exit_reason) {
    case KVM_EXIT_IO:
      if (board->handle_io(vcpu)) return true;
      end({Kind::kHostError, 0, "KVM describes port data outside its run page"});
      return false;
    case KVM_EXIT_MMIO:
      board->handle_mmio(vcpu);
      return true;
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
      return true;
    case KVM_EXIT_SHUTDOWN:
      dump(index, vcpu, false);
      end({Kind::kTripleFault, 0, "the guest triple-faulted on " + who + " at rip " + rip()});
      return false;
    case KVM_EXIT_SYSTEM_EVENT:
      if (run.system_event.type == KVM_SYSTEM_EVENT_SHUTDOWN) {
        end({Kind::kPoweredOff, 0, ""});
      } else if (run.system_event.type == KVM_SYSTEM_EVENT_RESET) {
        end({Kind::kReboot, 0, ""});
      } else {
        end({Kind::kPanic, 0, "the guest reported system event " + std::to_string(run.system_event.type)});
      }
      return false;
    case KVM_EXIT_INTERNAL_ERROR:
      dump(index, vcpu, true);
      if (run.internal.suberror == KVM_INTERNAL_ERROR_EMULATION) {
        end({Kind::kTripleFault, 0, "the guest executed what this KVM cannot emulate, on " + who + " at rip " + rip()});
      } else {
        end({Kind::kHostError, 0, "KVM internal error " + std::to_string(run.internal.suberror) + " on " + who +
                                      " at rip " + rip()});
      }
      return false;
    case KVM_EXIT_FAIL_ENTRY:
      dump(index, vcpu, true);
      end({Kind::kHostError, 0, "the host CPU refused the guest's state on " + who + ": reason " +
                                    hex(run.fail_entry.hardware_entry_failure_reason)});
      return false;
    default:
      dump(index, vcpu, true);
      end({Kind::kHostError, 0, "unexpected KVM exit " + std::to_string(run.exit_reason) + " on " + who + " at rip " + rip()});
      return false;
  }
}

void Machine::Impl::dump(u32 index, kvm::Vcpu& vcpu, bool error) {
  const auto level = error ? spdlog::level::err : spdlog::level::info;
  auto regs = vcpu.regs();
  auto sregs = vcpu.sregs();
  if (!regs || !sregs) return;
  const kvm_regs& r = *regs;
  const kvm_sregs& s = *sregs;
  spdlog::log(level, "vCPU {}: rip {:#x} rflags {:#x} rsp {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x}", index, u64{r.rip},
              u64{r.rflags}, u64{r.rsp}, u64{r.rax}, u64{r.rbx}, u64{r.rcx}, u64{r.rdx});
  spdlog::log(level, "vCPU {}: rsi {:#x} rdi {:#x} rbp {:#x} r8 {:#x} r9 {:#x} r10 {:#x} r11 {:#x} r12 {:#x} r13 {:#x} "
              "r14 {:#x} r15 {:#x}", index, u64{r.rsi}, u64{r.rdi}, u64{r.rbp}, u64{r.r8}, u64{r.r9}, u64{r.r10},
              u64{r.r11}, u64{r.r12}, u64{r.r13}, u64{r.r14}, u64{r.r15});
  spdlog::log(level, "vCPU {}: cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:#x} base {:#x} ss {:#x} gdt {:#x} idt {:#x}",
              index, u64{s.cr0}, u64{s.cr2}, u64{s.cr3}, u64{s.cr4}, u64{s.efer}, u16{s.cs.selector}, u64{s.cs.base},
              u16{s.ss.selector}, u64{s.gdt.base}, u64{s.idt.base});
}

// Console input, the RTC's timer, request_stop().
void Machine::Impl::io_main() {
  std::array<u8, 512> buffer;
  while (!io_end.load()) {
    const auto timer = board->rtc().poll();
    const std::size_t room = std::min(board->input_room(), buffer.size());
    const bool listen = !input_closed && console.input_fd() >= 0 && room > 0;
    pollfd fds[3] = {{wake_fd.get(), POLLIN, 0}, {stop_fd.get(), POLLIN, 0}, {listen ? console.input_fd() : -1, POLLIN, 0}};
    timespec timeout{};
    if (timer) {
      timeout.tv_sec = static_cast<time_t>(*timer / 1'000'000'000);
      timeout.tv_nsec = static_cast<long>(*timer % 1'000'000'000);
    }
    if (::ppoll(fds, 3, timer ? &timeout : nullptr, nullptr) < 0) continue;
    if (fds[0].revents) drain_event(wake_fd.get());
    if (fds[1].revents) {
      end({Outcome::Kind::kStopped, 0, ""});
      fds[1].fd = -1;
      // Nothing else is left to do here, but the fd stays signalled for run().
      return;
    }
    if (fds[2].revents) {
      const ConsoleInput in = console.read(std::span(buffer.data(), room));
      if (in.bytes > 0) board->input(std::span<const u8>(buffer.data(), std::min(in.bytes, room)));
      input_closed |= in.closed;
      if (in.stop) {
        end({Outcome::Kind::kStopped, 0, ""});
        return;
      }
    }
  }
}

/// A line for each vCPU, of what is not 0.
void Machine::Impl::log_statistics() {
  for (std::size_t n = 0; n < board->vcpus().size(); n++) {
    auto all = board->vcpus()[n].statistics();
    if (!all) return;  // not every kernel has them
    std::string line;
    for (const kvm::Vcpu::Statistic& s : *all)
      if (s.value != 0) line += " " + s.name + " " + std::to_string(s.value);
    log::info("{}: vCPU {}:{}", config.name, n, line);
  }
}

Outcome Machine::Impl::run_board() {
  {
    std::lock_guard lock(mutex);
    ended.reset();
    parked = 0;
    running = 0;
    phase.store(pause_wanted ? Phase::kPaused : Phase::kRunning);
  }
  output.hold();
  io_end.store(false);
  std::vector<std::thread> threads;
  std::thread io;
  try {
    io = start_thread(config.name + " io", [this] { io_main(); });
    for (u32 i = 0; i < config.cpus; i++) {
      {
        std::lock_guard lock(mutex);
        running++;
      }
      threads.push_back(start_thread(config.name + " vcpu" + std::to_string(i), [this, i] { vcpu_main(i); }));
    }
  } catch (const std::system_error& e) {
    {
      std::lock_guard lock(mutex);
      running--;  // of the one that did not start, or of none: then nobody waits for it
    }
    end({Outcome::Kind::kHostError, 0, std::string("cannot start a thread: ") + e.what()});
  }

  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return ended.has_value(); });
  }
  output.release();
  // A kick is not lost, so one would do; repeating it costs nothing and forgives a provider's slip.
  for (;;) {
    kick_all();
    std::unique_lock lock(mutex);
    changed.notify_all();
    if (threads.empty() || changed.wait_for(lock, std::chrono::milliseconds(20), [&] { return running == 0; })) break;
  }
  for (std::thread& t : threads) t.join();
  io_end.store(true);
  signal_event(wake_fd.get());
  if (io.joinable()) io.join();
  if (spdlog::should_log(spdlog::level::info)) log_statistics();
  std::lock_guard lock(mutex);
  return *ended;
}

Machine::Machine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Machine::~Machine() = default;

Result<std::unique_ptr<Machine>> Machine::create(MachineConfig config, std::shared_ptr<kvm::Endpoint> endpoint,
                                                 Console& console) {
  const auto bad = [](std::string message) { return Error::of(EINVAL, std::move(message)); };
  if (config.memory_bytes < MachineConfig::kMinMemory || config.memory_bytes > MachineConfig::kMaxMemory) {
    return bad("the memory size must lie between 1 MiB and 1 TiB");
  }
  if (config.memory_bytes % kPageSize != 0) return bad("the memory size must be a multiple of 4 KiB");
  if (config.cpus < 1 || config.cpus > MachineConfig::kMaxCpus) {
    return bad("the number of vCPUs must lie between 1 and " + std::to_string(MachineConfig::kMaxCpus));
  }
  if (config.kernel.empty()) return bad("no kernel is given: use --kernel FILE");

  auto system = kvm::System::create(std::move(endpoint));
  if (!system) return system.error();
  int most = system->check_extension(KVM_CAP_MAX_VCPUS);
  if (most == 0) most = 4;  // virt/kvm/api: what the absence of the capability means
  if (config.cpus > static_cast<u32>(most)) {
    return bad("this KVM runs at most " + std::to_string(most) + " vCPUs in a VM");
  }
  for (const auto& [cap, name] : {std::pair{KVM_CAP_IRQCHIP, "IRQCHIP"}, {KVM_CAP_PIT2, "PIT2"}, {KVM_CAP_USER_MEMORY, "USER_MEMORY"},
                                  {KVM_CAP_SET_TSS_ADDR, "SET_TSS_ADDR"}, {KVM_CAP_EXT_CPUID, "EXT_CPUID"},
                                  {KVM_CAP_IRQ_ROUTING, "IRQ_ROUTING"}, {KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT"}}) {
    if (system->check_extension(cap) == 0) {
      return Error::of(ENOTSUP, std::string("this KVM lacks KVM_CAP_") + name + ", which this VM needs");
    }
  }

  const u64 low = std::min(config.memory_bytes, boot::layout::kHoleStart);
  auto kernel = boot::ImageFile::open(config.kernel, "kernel", low);
  if (!kernel) return kernel.error();
  std::optional<boot::ImageFile> initrd;
  if (!config.initrd.empty()) {
    auto file = boot::ImageFile::open(config.initrd, "initrd", low);
    if (!file) return file.error();
    initrd = std::move(*file);
  }
  auto ram = GuestRam::create(config.memory_bytes);
  if (!ram) return ram.error();
  std::unique_ptr<Impl> impl;
  try {
    impl = std::make_unique<Impl>(std::move(config), std::move(*system), std::move(*kernel), std::move(initrd),
                                  std::move(*ram), console);
  } catch (const std::system_error& e) {
    return Error::of(EAGAIN, std::string("cannot start a thread: ") + e.what());
  }
  if (!impl->stop_fd || !impl->wake_fd) return Error::from_errno("eventfd");
  if (auto r = impl->make_board(); !r) return r.error();
  return std::unique_ptr<Machine>(new Machine(std::move(impl)));
}

Outcome Machine::run() {
  Outcome outcome;
  for (;;) {
    if (is_signalled(impl_->stop_fd)) {
      outcome = {Outcome::Kind::kStopped, 0, ""};
      break;
    }
    outcome = impl_->run_board();
    if (outcome.kind != Outcome::Kind::kReboot || !impl_->config.reboot) break;
    log::info("{}: the guest resets", impl_->config.name);
    {
      std::lock_guard lock(impl_->mutex);
      impl_->board.reset();
    }
    impl_->ram.clear();
    if (auto r = impl_->make_board(); !r) {
      outcome = {Outcome::Kind::kHostError, 0, "the guest reset, but cannot be booted again: " + r.error().message};
      break;
    }
  }
  // A stopped terminal may hold the last output back; a request to stop, now or meanwhile, ends that.
  const bool wait = outcome.kind != Outcome::Kind::kStopped;
  while (!impl_->output.drain(wait ? 50 : 200)) {
    if (!wait || is_signalled(impl_->stop_fd)) break;
  }
  return outcome;
}

void Machine::request_stop() { signal_event(impl_->stop_fd.get()); }

void Machine::pause() {
  Impl& m = *impl_;
  std::unique_lock lock(m.mutex);
  m.pause_wanted = true;
  auto running = Impl::Phase::kRunning;
  m.phase.compare_exchange_strong(running, Impl::Phase::kPaused);
  // Before run() there is nothing to wait for; a machine that ends meanwhile is as still as a paused one.
  while (m.phase.load() == Impl::Phase::kPaused && m.parked < m.running) {
    if (m.board) m.kick_all();
    m.changed.wait_for(lock, std::chrono::milliseconds(20));
  }
}

void Machine::resume() {
  std::lock_guard lock(impl_->mutex);
  impl_->pause_wanted = false;
  auto paused = Impl::Phase::kPaused;
  impl_->phase.compare_exchange_strong(paused, Impl::Phase::kRunning);
  impl_->changed.notify_all();
}

void Machine::resize_console(u16 columns, u16 rows) {
  std::lock_guard lock(impl_->mutex);
  impl_->columns = columns, impl_->rows = rows;
  if (impl_->board) impl_->board->resize_console(columns, rows);
}

bool Machine::console_has_driver() const {
  const std::lock_guard lock(impl_->mutex);
  return !impl_->board || impl_->board->console_has_driver();
}

bool Machine::press_power_button() {
  std::lock_guard lock(impl_->mutex);
  return impl_->board && impl_->board->pm().press_power_button();
}

}  // namespace ring3::vmm
