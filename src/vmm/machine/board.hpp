#pragma once
#include <functional>
#include <memory>
#include <vector>

#include "base/mapping.hpp"
#include "base/result.hpp"
#include "devices/bus/bus.hpp"
#include "devices/legacy/acpi_pm.hpp"
#include "devices/legacy/rtc.hpp"
#include "devices/legacy/uart.hpp"
#include "devices/pci/host.hpp"
#include "devices/virtio/console/console_device.hpp"
#include "kvm/system.hpp"
#include "memory/guest_memory.hpp"
#include "vmm/boot/image_file.hpp"
#include "vmm/boot/loader.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::vmm {

/// Guest RAM: [0, low.size()) and, above the hole, [4 GiB, 4 GiB + high.size()).
struct GuestRam {
  Mapping low;
  Mapping high;  ///< empty up to 3 GiB of memory
  static Result<GuestRam> create(u64 bytes);
  u64 size() const { return low.size() + high.size(); }
  /// All zero again; gives the host its pages back.
  void clear();
};

/// What the board's devices ask of the machine. Called on vCPU threads.
struct BoardEvents {
  std::function<void(Outcome::Kind kind, u8 status, std::string message)> end;
  std::function<void()> reset;
  std::function<void(u8)> console_output;
  std::function<void()> wake_io;  ///< room in the UART, or the RTC's timer changed
};

/// One boot of the machine: the VM object, its vCPUs, the devices and the loaded kernel, from reset to
/// the end or the next reset.
///
/// Ownership: `ram` belongs to the machine and outlives the board.
/// Threading: created and destroyed on one thread; handle_io and handle_mmio on vCPU threads.
class Board {
 public:
  struct Sources {
    const MachineConfig& config;
    const kvm::System& system;
    const boot::ImageFile& kernel;
    const boot::ImageFile* initrd;
  };
  static Result<std::unique_ptr<Board>> create(const Sources& sources, GuestRam& ram, BoardEvents events);

  std::vector<kvm::Vcpu>& vcpus() { return vcpus_; }
  /// How many bytes of console input are taken now; and takes them.
  std::size_t input_room() const { return console_ ? console_->room(0) : uart_->room(); }
  void input(std::span<const u8> bytes);
  void resize_console(u16 columns, u16 rows);
  /// False: the guest has no driver for the virtio console that this machine has.
  bool console_has_driver() const { return !console_ || console_->started(); }
  devices::Rtc& rtc() { return *rtc_; }
  devices::AcpiPm& pm() { return *pm_; }

  /// False when the exit's description of its data is not within the run mapping.
  bool handle_io(kvm::Vcpu& vcpu);
  void handle_mmio(kvm::Vcpu& vcpu);

 private:
  Board(kvm::Vm vm, BoardEvents events) : vm_(std::move(vm)), events_(std::move(events)) {}
  Status create_irqchip();
  Status add_devices(const MachineConfig& config, const GuestRam& ram);
  Status add_pci(const MachineConfig& config);
  Status create_vcpus(const Sources& sources);
  Status load(const Sources& sources, GuestRam& ram);
  Status set_entry(const boot::Entry& entry);
  devices::IrqLine line(u32 gsi);

  // The devices call into vm_, so they are declared after it and go first.
  kvm::Vm vm_;
  BoardEvents events_;
  memory::GuestMemory dma_memory_;  // RAM as devices see it: the same slots as vm_'s
  u64 mmap_size_ = 0;
  std::vector<kvm::Vcpu> vcpus_;
  std::vector<std::shared_ptr<virtio::Device>> looking_;  // devices with something to look for while a vCPU has nothing to do
  std::shared_ptr<pci::Host> pci_;  // none without virtio devices. Stops their threads when it goes
  devices::Bus ports_{0x10000};
  devices::Bus memory_;
  std::shared_ptr<devices::Uart> uart_;
  std::shared_ptr<virtio::ConsoleDevice> console_;  // instead of the UART as the console; or none
  std::shared_ptr<devices::Rtc> rtc_;
  std::shared_ptr<devices::AcpiPm> pm_;
};

}  // namespace ring3::vmm
