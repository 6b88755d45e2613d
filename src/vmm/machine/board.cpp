#include "vmm/machine/board.hpp"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstring>

#include "base/log.hpp"
#include "devices/legacy/fw_cfg.hpp"
#include "devices/legacy/i8042.hpp"
#include "devices/legacy/pvpanic.hpp"
#include "devices/legacy/test_device.hpp"
#include "devices/virtio/pci/virtio_pci.hpp"
#include "vmm/acpi/tables.hpp"
#include "vmm/machine/cpu_model.hpp"

namespace ring3::vmm {
namespace {

constexpr Gpa kIdentityMap{0xfffbc000};
constexpr Gpa kTss{0xfffbd000};  // three pages
constexpr u32 kSci = 9, kCom1Irq = 4, kRtcIrq = 8;
constexpr u32 kMsrMiscEnable = 0x1a0, kMsrMtrrDefType = 0x2ff;

i64 clock_ns(clockid_t id) {
  timespec t{};
  clock_gettime(id, &t);
  return i64{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

Result<GuestRam> GuestRam::create(u64 bytes) {
  GuestRam ram;
  const u64 low = std::min(bytes, boot::layout::kHoleStart);
  auto a = Mapping::shared_anonymous(low);
  if (!a) return Error::of(a.error().code, "guest memory of " + std::to_string(bytes >> 20) + " MiB: " + a.error().message);
  ram.low = std::move(*a);
  if (bytes > low) {
    auto b = Mapping::shared_anonymous(bytes - low);
    if (!b) return Error::of(b.error().code, "guest memory of " + std::to_string(bytes >> 20) + " MiB: " + b.error().message);
    ram.high = std::move(*b);
  }
  return ram;
}

void GuestRam::clear() {
  for (Mapping* m : {&low, &high}) {
    if (*m && madvise(m->data(), m->size(), MADV_REMOVE) < 0) std::memset(m->data(), 0, m->size());
  }
}

Result<std::unique_ptr<Board>> Board::create(const Sources& s, GuestRam& ram, BoardEvents events) {
  auto vm = s.system.create_vm();
  if (!vm) return vm.error();
  std::unique_ptr<Board> board(new Board(std::move(*vm), std::move(events)));
  auto mmap_size = s.system.vcpu_mmap_size();
  if (!mmap_size) return mmap_size.error();
  board->mmap_size_ = *mmap_size;
  if (s.system.check_extension(KVM_CAP_SET_IDENTITY_MAP_ADDR)) {
    if (auto r = board->vm_.set_identity_map_addr(kIdentityMap); !r) return r.error();
  }
  if (auto r = board->vm_.set_tss_addr(kTss); !r) return r.error();
  const auto slot = [&](u32 n, u64 start, const Mapping& m) -> Status {
    if (const int r = board->dma_memory_.set_region(n, 0, Gpa(start), m.size(), Hva(reinterpret_cast<u64>(m.data()))); r < 0) {
      return Error::from_errno("guest memory", -r);
    }
    return board->vm_.set_user_memory_region(n, Gpa(start), m.size(), Hva(reinterpret_cast<u64>(m.data())));
  };
  // All that stores to RAM while the guest runs goes through queues, which tell; load() stores before it runs.
  board->vm_.endpoint().announces_stores();
  board->dma_memory_.observe_stores([vm = &board->vm_.endpoint()](Gpa start, u64 size) { vm->stored(start, size); });
  if (auto r = slot(0, 0, ram.low); !r) return r.error();
  if (ram.high) {
    if (auto r = slot(1, boot::layout::kHoleEnd, ram.high); !r) return r.error();
  }
  if (auto r = board->create_irqchip(); !r) return r.error();
  if (auto r = board->add_devices(s.config, ram); !r) return r.error();
  if (auto r = board->add_pci(s.config); !r) return r.error();
  if (auto r = board->create_vcpus(s); !r) return r.error();
  if (auto r = board->load(s, ram); !r) return r.error();
  return board;
}

Status Board::create_irqchip() {
  if (auto r = vm_.create_irqchip(); !r) return r;
  if (auto r = vm_.create_pit2(KVM_PIT_SPEAKER_DUMMY); !r) return r;
  // GSI n is 8259 line n and IOAPIC pin n, but GSI 0, the PIT's, arrives at pin 2: as the MADT says.
  std::vector<kvm_irq_routing_entry> routes;
  const auto route = [&](u32 gsi, u32 chip, u32 pin) {
    kvm_irq_routing_entry e{};
    e.gsi = gsi;
    e.type = KVM_IRQ_ROUTING_IRQCHIP;
    e.u.irqchip.irqchip = chip;
    e.u.irqchip.pin = pin;
    routes.push_back(e);
  };
  for (u32 i = 0; i < 16; i++) {
    if (i != 2) route(i, i < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, i & 7);
  }
  for (u32 i = 0; i < 24; i++) {
    if (i != 2) route(i, KVM_IRQCHIP_IOAPIC, i == 0 ? 2 : i);
  }
  return vm_.set_gsi_routing(routes);
}

devices::IrqLine Board::line(u32 gsi) {
  return [this, gsi](bool level) {
    if (auto r = vm_.irq_line(gsi, level); !r) log::debug("{}", r.error().message);
  };
}

Status Board::add_devices(const MachineConfig& config, const GuestRam& ram) {
  using namespace devices;
  using Kind = Outcome::Kind;
  // With another console its output goes nowhere.
  const auto serial_output = config.virtio_console ? std::function<void(u8)>([](u8) {}) : events_.console_output;
  uart_ = std::make_shared<Uart>(Uart::Config{line(kCom1Irq), serial_output, events_.wake_io});
  rtc_ = std::make_shared<Rtc>(Rtc::Config{line(kRtcIrq), [] { return clock_ns(CLOCK_REALTIME); }, events_.wake_io,
                                           ram.low.size(), ram.high.size(), config.cpus});
  pm_ = std::make_shared<AcpiPm>(AcpiPm::Config{line(kSci), [end = events_.end] { end(Kind::kPoweredOff, 0, ""); },
                                                [] { return static_cast<u64>(clock_ns(CLOCK_MONOTONIC)); }});
  auto keyboard = std::make_shared<I8042>(events_.reset);
  auto fw_cfg = std::make_shared<FwCfg>();
  fw_cfg->set_u64(FwCfg::kRamSize, ram.size());
  fw_cfg->set_u16(FwCfg::kCpuCount, static_cast<u16>(config.cpus));
  auto panic = std::make_shared<PvPanic>(
      [end = events_.end] { end(Kind::kPanic, 0, "the guest kernel panicked"); },
      [] { log::warn("the guest kernel panicked and starts its crash kernel"); });

  const acpi::Platform platform;
  struct Place {
    u64 start, size;
    std::shared_ptr<Device> device;
    const char* name;
  };
  const Place places[] = {
      {platform.com1_port, Uart::kPorts, uart_, "uart"},
      {platform.rtc_port, Rtc::kPorts, rtc_, "rtc"},
      {platform.pm1_event_port, AcpiPm::kPorts, pm_, "acpi-pm"},
      {0x60, 1, keyboard, "i8042"},
      {0x64, 1, std::make_shared<OffsetWindow>(keyboard, 1), "i8042"},
      {0x92, 1, std::make_shared<Port92>(events_.reset), "port92"},
      {platform.reset_port, 1, std::make_shared<ResetRegister>(events_.reset), "reset"},
      {platform.pvpanic_port, 1, panic, "pvpanic"},
      {0x510, FwCfg::kPorts, fw_cfg, "fw_cfg"},
  };
  for (const Place& p : places) {
    if (auto r = ports_.add(p.start, p.size, p.device, p.name); !r) return r;
  }
  if (config.test_device) {
    TestDevice test({[this](u32 n, bool level) { line(n)(level); },
                     [end = events_.end](u8 status) { end(Kind::kTestExit, status, ""); }});
    if (auto r = test.attach(ports_, memory_); !r) return r;
  }
  return Ok{};
}

Status Board::add_pci(const MachineConfig& config) {
  if (config.devices.empty() && !config.virtio_console) return Ok{};
  pci::Services services;
  services.send_msi = [this](const pci::MsiMessage& m) {
    kvm_msi msi{};
    msi.address_lo = static_cast<u32>(m.address);
    msi.address_hi = static_cast<u32>(m.address >> 32);
    msi.data = m.data;
    if (auto r = vm_.signal_msi(msi); !r) log::debug("{}", r.error().message);
  };
  services.set_line = [this](u32 gsi, bool level) { line(gsi)(level); };
  if (vm_.check_extension(KVM_CAP_IOEVENTFD) != 0) {
    const u32 length = vm_.check_extension(KVM_CAP_IOEVENTFD_ANY_LENGTH) != 0 ? 0 : 2;
    services.ioeventfd = [this, length](bool assign, Gpa address, int fd) {
      kvm_ioeventfd request{};
      request.addr = address.value;
      request.len = length;
      request.fd = fd;
      request.flags = assign ? 0 : KVM_IOEVENTFD_FLAG_DEASSIGN;
      const auto r = vm_.ioeventfd(request);
      if (!r) log::debug("{}", r.error().message);
      return r.ok();
    };
  }
  pci_ = std::make_shared<pci::Host>(std::move(services));
  if (auto r = pci_->attach(ports_, memory_); !r) return r;
  const auto add = [&](std::shared_ptr<virtio::Device> device) -> Status {
    if (device->looks()) looking_.push_back(device);
    auto function = virtio::VirtioPci::create(std::move(device), dma_memory_);
    if (!function) return function.error();
    return pci_->add(std::move(*function));
  };
  for (const auto& make : config.devices) {
    auto device = make();
    if (!device) return device.error();
    if (auto r = add(std::move(*device)); !r) return r;
  }
  if (!looking_.empty()) {
    vm_.endpoint().while_halted([this](bool more) {
      for (const auto& device : looking_) device->look(more);
    });
  }
  if (!config.virtio_console) return Ok{};
  virtio::ConsoleDevice::Config console;
  console.ports.resize(1);
  console.ports[0].console = true;
  console.ports[0].output = [out = events_.console_output](std::span<const u8> bytes) {
    for (const u8 b : bytes) out(b);
  };
  console.ports[0].has_room = events_.wake_io;
  console_ = std::make_shared<virtio::ConsoleDevice>(std::move(console));
  return add(console_);
}

void Board::input(std::span<const u8> bytes) {
  if (console_) {
    console_->receive(0, bytes);
  } else {
    uart_->receive(bytes);
  }
}

void Board::resize_console(u16 columns, u16 rows) {
  if (console_) console_->resize(columns, rows);
}

Status Board::create_vcpus(const Sources& s) {
  auto supported = s.system.supported_cpuid();
  if (!supported) return supported.error();
  auto model = cpu_model(s.config.cpu, std::move(*supported));
  if (!model) return model.error();
  const bool tsc_deadline = s.system.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) != 0;
  for (u32 id = 0; id < s.config.cpus; id++) {
    auto vcpu = vm_.create_vcpu(id);
    if (!vcpu) return vcpu.error();
    vcpus_.push_back(std::move(*vcpu));
    kvm::Vcpu& v = vcpus_.back();
    if (auto r = v.set_cpuid2(cpuid_for_vcpu(*model, id, s.config.cpus, tsc_deadline)); !r) return r;
    // What firmware leaves behind: fast strings on, all memory write-back.
    for (const auto& [index, data] : {std::pair<u32, u64>{kMsrMiscEnable, 1}, {kMsrMtrrDefType, 0x806}}) {
      kvm_msr_entry e{};
      e.index = index;
      e.data = data;
      if (auto r = v.set_msrs(std::span(&e, 1)); !r) log::debug("{}", r.error().message);
    }
    // LINT0 takes the 8259's interrupts on the boot processor, LINT1 is NMI everywhere (the MADT says so).
    auto lapic = v.lapic();
    if (!lapic) return lapic.error();
    const auto set_lvt = [&](u64 offset, u32 value) { std::memcpy(lapic->regs + offset, &value, sizeof value); };
    if (id == 0) set_lvt(0x350, 0x700);
    set_lvt(0x360, 0x400);
    if (auto r = v.set_lapic(*lapic); !r) return r;
  }
  return Ok{};
}

Status Board::load(const Sources& s, GuestRam& ram) {
  acpi::Platform platform;
  platform.cpus = s.config.cpus;
  platform.pci = pci_ != nullptr;
  auto tables = acpi::build(platform, Gpa(boot::layout::kAcpiTables),
                            boot::layout::kHighMemory - boot::layout::kAcpiTables);
  if (!tables) return tables.error();
  std::memcpy(ram.low.data() + tables->base.value, tables->bytes.data(), tables->bytes.size());

  const auto whole = [](const boot::ImageFile& f) {
    return boot::File{f.path(), f.size(), [&f](u64 at, std::span<u8> into) { return f.read(at, into); }};
  };
  boot::File initrd;
  boot::Request request;
  if (s.initrd) {
    initrd = whole(*s.initrd);
    request.initrd = &initrd;
  }
  request.kernel = whole(s.kernel);
  request.command_line = s.config.append;
  request.memory = ram.size();
  request.rsdp = tables->rsdp;
  auto entry = boot::load_kernel(request, {ram.low.data(), ram.low.size()});
  if (!entry) return entry.error();
  log::debug("{}: {}, entry {:#x}", s.kernel.path(), entry->format, entry->rip);
  return set_entry(*entry);
}

Status Board::set_entry(const boot::Entry& e) {
  kvm::Vcpu& v = vcpus_.front();
  auto sregs = v.sregs();
  if (!sregs) return sregs.error();
  const bool long_mode = e.mode == boot::Entry::Mode::kLong64;
  const auto segment = [](u16 selector, u8 type, bool code64) {
    kvm_segment s{};
    s.limit = 0xffffffff;
    s.selector = selector;
    s.type = type;
    s.present = 1;
    s.s = 1;
    s.g = 1;
    s.l = code64;
    s.db = !code64;
    return s;
  };
  sregs->cs = segment(boot::Entry::kCode, 0xb, long_mode);
  sregs->ds = sregs->es = sregs->fs = sregs->gs = sregs->ss = segment(boot::Entry::kData, 3, false);
  kvm_segment tss{};
  tss.selector = boot::Entry::kTss;
  tss.limit = 0x67;
  tss.type = 0xb;
  tss.present = 1;
  sregs->tr = tss;
  kvm_segment ldt{};
  ldt.type = 2;
  ldt.unusable = 1;
  sregs->ldt = ldt;
  sregs->gdt.base = boot::layout::kGdt;
  sregs->gdt.limit = boot::Entry::kGdtLimit;
  sregs->idt.base = 0;
  sregs->idt.limit = 0;
  sregs->cr0 = long_mode ? 0x80000011 : 0x11;  // PG, ET, PE
  sregs->cr2 = 0;
  sregs->cr3 = e.cr3;
  sregs->cr4 = long_mode ? 0x20 : 0;      // PAE
  sregs->efer = long_mode ? 0x500 : 0;    // LMA, LME
  if (auto r = v.set_sregs(*sregs); !r) return r;
  kvm_regs regs{};
  regs.rip = e.rip;
  regs.rsp = e.rsp;
  regs.rax = e.rax;
  regs.rbx = e.rbx;
  regs.rsi = e.rsi;
  regs.rflags = 2;
  return v.set_regs(regs);
}

bool Board::handle_io(kvm::Vcpu& vcpu) {
  const auto io = vcpu.run_page().io;
  auto data = vcpu.io_data(mmap_size_);
  if (data.empty() || io.size == 0) return false;
  for (; data.size() >= io.size; data = data.subspan(io.size)) {
    if (io.direction == KVM_EXIT_IO_OUT) {
      ports_.write(io.port, data.first(io.size));
    } else {
      ports_.read(io.port, data.first(io.size));
    }
  }
  return true;
}

void Board::handle_mmio(kvm::Vcpu& vcpu) {
  auto& mmio = vcpu.run_page().mmio;
  const std::size_t n = std::min<std::size_t>(mmio.len, sizeof mmio.data);
  if (mmio.is_write) {
    memory_.write(mmio.phys_addr, std::span<const u8>(mmio.data, n));
  } else {
    memory_.read(mmio.phys_addr, std::span(mmio.data, n));
  }
}

}  // namespace ring3::vmm
