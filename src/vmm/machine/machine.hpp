#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "devices/virtio/core/device.hpp"
#include "kvm/endpoint.hpp"
#include "vmm/machine/console.hpp"

namespace ring3::vmm {

/// What to build. Plain values; Machine::create checks them and says in one line what is wrong.
struct MachineConfig {
  std::string name = "ring3";      ///< in log lines and thread names
  u64 memory_bytes = u64{1} << 30; ///< a multiple of 4096; at least kMinMemory
  u32 cpus = 1;
  std::string cpu = "default";    ///< a model and ±features, see cpu_model.hpp

  std::string kernel;              ///< path: bzImage, ELF with PVH entry, multiboot-1. Required.
  std::string initrd;              ///< path; empty: none
  std::string append;              ///< kernel command line, passed as it stands

  /// A virtio device: made anew for each boot of the machine; what it stands for on the host (a disk, a connection) is
  /// held by the function, and so outlives a reset of the guest.
  using MakeDevice = std::function<Result<std::shared_ptr<virtio::Device>>()>;
  std::vector<MakeDevice> devices; ///< on PCI bus 0 in this order, from device 1 on. None: no PCI at all

  /// The console is a virtio-console (hvc0) instead of the serial port, which is still there, and mute.
  bool virtio_console = false;

  bool reboot = true;              ///< false: a guest reset ends the run with Outcome::kReboot
  bool test_device = false;        ///< ports 0xf4, 0xe0…, 0x2000…; MMIO at 0xff000000 (kvm-abi.md)

  static constexpr u64 kMinMemory = u64{1} << 20;
  static constexpr u64 kMaxMemory = u64{1} << 40;
  static constexpr u32 kMaxCpus = 254;
};

/// How a run ended.
struct Outcome {
  enum class Kind {
    kPoweredOff,   ///< the guest asked for it (ACPI S5)
    kReboot,       ///< the guest reset itself and MachineConfig::reboot is false
    kPanic,        ///< the guest said so through pvpanic
    kTripleFault,  ///< a vCPU shut down, or executed what this KVM cannot emulate
    kTestExit,     ///< the test device's exit port; `status` holds value*2+1, low 8 bits
    kStopped,      ///< request_stop(), or the console said so
    kHostError,    ///< KVM or the host failed; `message` says what. Registers are in the log.
  };
  Kind kind = Kind::kHostError;
  u8 status = 0;
  std::string message;  ///< one line; set for kHostError, kTripleFault and kPanic
};

const char* to_string(Outcome::Kind kind);

/// One virtual machine: guest RAM, vCPU threads, devices, boot.
///
/// The machine: RAM from 0 to 3 GiB and on from 4 GiB; in-kernel LAPICs, IOAPIC, 8259 and PIT;
/// 16550 at 0x3f8, RTC at 0x70, i8042 at 0x60, pvpanic at 0x505, ACPI PM at 0x600, reset at 0xcf9,
/// fw_cfg at 0x510, the test device if asked for, and with virtio devices
/// PCI Express bus 0: ECAM at 0xe0000000, BARs from 0xc0000000, INTx on GSIs 16 to 19.
///
/// Provider:  speaks only the KVM ABI through the Endpoint it is given, and never asks whose it is.
/// Reboot:    a guest reset (i8042, port 0x92, 0xcf9) destroys the VM object and boots a new one from
///            the same files' contents, with zeroed RAM.
/// Panic:     reported through pvpanic, which a guest uses only when it has the driver (a module in
///            Debian). A kernel that panics without it and has panic=N on its command line looks like
///            any reboot; without panic=N it halts forever.
/// Threading: create() and run() on one thread; request_stop() on any, and from a signal handler;
///            pause(), resume() and press_power_button() on any thread but a vCPU's.
/// Trust:     the kernel and initrd files and everything the guest does are hostile.
class Machine {
 public:
  /// Checks the configuration, reads and checks kernel and initrd, creates the VM and loads it.
  /// Errors: EINVAL for what the user gave, else the host's errno; one line.
  static Result<std::unique_ptr<Machine>> create(MachineConfig config, std::shared_ptr<kvm::Endpoint> system,
                                                 Console& console);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  /// Runs the guest until it ends. Once.
  Outcome run();

  /// Ends the run with kStopped. Async-signal-safe; before run() it makes run() return at once.
  void request_stop();
  /// Returns when no vCPU runs guest code any more. Does not nest: one resume() ends it.
  void pause();
  void resume();
  /// The terminal's size; a virtio console tells the guest. Before run() too. Any thread.
  void resize_console(u16 columns, u16 rows);
  /// False: the console is a virtio-console, and the guest has no driver for it, or not yet. Any thread.
  bool console_has_driver() const;
  /// The ACPI power button: a guest that listens shuts down. False: it does not listen, or has not come so far.
  bool press_power_button();

 private:
  struct Impl;
  explicit Machine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace ring3::vmm
