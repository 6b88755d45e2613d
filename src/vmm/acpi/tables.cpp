#include "vmm/acpi/tables.hpp"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string_view>

#include "vmm/acpi/aml.hpp"

namespace ring3::acpi {
namespace {

constexpr std::size_t kHeader = 36;

// A table under construction: little-endian fields, checksum at the end.
class Table {
 public:
  Table(std::string_view signature, u8 revision) {
    text(signature, 4);
    u32_(0);  // length
    u8_(revision);
    u8_(0);  // checksum
    text("RING3 ", 6);
    text("RING3VM ", 8);
    u32_(1);
    text("RNG3", 4);
    u32_(1);
  }
  void u8_(u64 v) { put(v, 1); }
  void u16_(u64 v) { put(v, 2); }
  void u32_(u64 v) { put(v, 4); }
  void u64_(u64 v) { put(v, 8); }
  void zero(std::size_t n) { bytes_.insert(bytes_.end(), n, 0); }
  void raw(const std::vector<u8>& b) { bytes_.insert(bytes_.end(), b.begin(), b.end()); }
  /// Generic Address Structure (5.2.3.2) in system I/O space.
  void io_address(u16 port, u8 bits, u8 access) {
    u8_(1), u8_(bits), u8_(0), u8_(access), u64_(port);
  }
  std::size_t size() const { return bytes_.size(); }

  std::vector<u8> finish() {
    const u32 length = static_cast<u32>(bytes_.size());
    std::memcpy(bytes_.data() + 4, &length, 4);
    bytes_[9] = 0;
    bytes_[9] = static_cast<u8>(-std::accumulate(bytes_.begin(), bytes_.end(), 0));
    return std::move(bytes_);
  }

 private:
  void put(u64 v, int n) {
    for (int i = 0; i < n; i++) bytes_.push_back(static_cast<u8>(v >> (8 * i)));
  }
  void text(std::string_view s, std::size_t n) {
    for (std::size_t i = 0; i < n; i++) bytes_.push_back(i < s.size() ? static_cast<u8>(s[i]) : u8{' '});
  }
  std::vector<u8> bytes_;
};

std::vector<u8> build_facs() {  // 5.2.10: no header as the others have
  std::vector<u8> b(64);
  std::memcpy(b.data(), "FACS", 4);
  b[4] = 64;
  b[32] = 2;
  return b;
}

std::vector<u8> build_fadt(const Platform& p, u64 facs, u64 dsdt) {  // 5.2.9
  constexpr u32 kWbinvd = 1 << 0, kProcC1 = 1 << 2, kSleepButtonAbsent = 1 << 5, kTimer32 = 1 << 8, kReset = 1 << 10;
  constexpr u16 kNoVga = 1 << 2, kNoAspm = 1 << 4;
  Table t("FACP", 6);
  t.u32_(facs);
  t.u32_(dsdt);
  t.u8_(0);
  t.u8_(0);   // preferred profile: unspecified
  t.u16_(p.sci_irq);
  t.u32_(0);  // SMI_CMD: none, the system is in ACPI mode always
  t.zero(4);
  t.u32_(p.pm1_event_port);
  t.u32_(0);
  t.u32_(p.pm1_control_port);
  t.u32_(0);
  t.u32_(0);
  t.u32_(p.pm_timer_port);
  t.u32_(p.gpe0_port);
  t.u32_(0);
  t.u8_(4);  // PM1_EVT_LEN
  t.u8_(2);  // PM1_CNT_LEN
  t.u8_(0);
  t.u8_(4);  // PM_TMR_LEN
  t.u8_(p.gpe0_bytes);
  t.u8_(0);
  t.u8_(0);
  t.u8_(0);
  t.u16_(0xfff);  // C2 and C3 not supported
  t.u16_(0xfff);
  t.zero(6);      // flush size, stride, duty
  t.u8_(0);
  t.u8_(0);
  t.u8_(0x32);  // century
  // Boot architecture: no 8042 flag, so that no keyboard is looked for; MSI works.
  t.u16_(kNoVga | kNoAspm);
  t.u8_(0);
  t.u32_(kWbinvd | kProcC1 | kSleepButtonAbsent | kTimer32 | kReset);
  t.io_address(p.reset_port, 8, 1);
  t.u8_(p.reset_value);
  t.u16_(0);
  t.u8_(4);  // minor revision
  t.u64_(0);  // X_FIRMWARE_CTRL: 0 while FIRMWARE_CTRL is used
  t.u64_(dsdt);
  t.io_address(p.pm1_event_port, 32, 2);
  t.zero(12);
  t.io_address(p.pm1_control_port, 16, 2);
  t.zero(12);
  t.zero(12);
  t.io_address(p.pm_timer_port, 32, 3);
  t.io_address(p.gpe0_port, static_cast<u8>(p.gpe0_bytes * 8), 1);
  t.zero(12);
  t.zero(24);  // sleep registers: hardware-reduced only
  t.u64_(0);   // hypervisor vendor
  return t.finish();
}

std::vector<u8> build_madt(const Platform& p) {  // 5.2.12
  Table t("APIC", 5);
  t.u32_(p.lapic_address);
  t.u32_(1);  // PCAT_COMPAT: 8259s are there
  for (u32 id = 0; id < p.cpus; id++) {
    if (id < 255) {
      t.u8_(0), t.u8_(8), t.u8_(id), t.u8_(id), t.u32_(1);
    } else {
      t.u8_(9), t.u8_(16), t.u16_(0), t.u32_(id), t.u32_(1), t.u32_(id);
    }
  }
  t.u8_(1), t.u8_(12), t.u8_(0), t.u8_(0), t.u32_(p.ioapic_address), t.u32_(0);
  // The PIT's IRQ 0 arrives at pin 2; the SCI is level, active high.
  t.u8_(2), t.u8_(10), t.u8_(0), t.u8_(0), t.u32_(2), t.u16_(0);
  t.u8_(2), t.u8_(10), t.u8_(0), t.u8_(p.sci_irq), t.u32_(p.sci_irq), t.u16_(0x000d);
  t.u8_(4), t.u8_(6), t.u8_(0xff), t.u16_(0), t.u8_(1);  // NMI on LINT1 of all
  if (p.cpus > 255) t.u8_(10), t.u8_(12), t.u16_(0), t.u32_(0xffffffff), t.u8_(1), t.zero(3);
  return t.finish();
}

std::vector<u8> build_mcfg(const Platform& p) {  // PCI Firmware 3.2, 4.1.2
  Table t("MCFG", 1);
  t.zero(8);
  t.u64_(p.pci_ecam);
  t.u16_(0);       // segment
  t.u8_(0);        // first and last bus
  t.u8_(0);
  t.zero(4);
  return t.finish();
}

// The host bridge: where its bus and its window are, and the lines its devices pull.
aml::Bytes host_bridge(const Platform& p) {
  using namespace aml;
  std::vector<Bytes> routes;
  for (u32 device = 0; device < 32; device++) {
    routes.push_back(package({integer(device << 16 | 0xffff), integer(0), integer(0), integer(p.pci_first_gsi + device % p.pci_gsis)}));
  }
  return join({
      device("PCI0", join({name("_HID", eisa_id("PNP0A08")), name("_CID", eisa_id("PNP0A03")), name("_UID", integer(0)),
                           name("_SEG", integer(0)), name("_BBN", integer(0)),
                           name("_CRS", resource_template({bus_numbers(0, 0), memory32_window(p.pci_window, p.pci_window_size)})),
                           name("_PRT", package(routes))})),
      // The configuration space is in nobody else's use: without this, kernels do not touch it (PCI Firmware 3.2, 4.1.2).
      device("MRES", join({name("_HID", eisa_id("PNP0C02")), name("_UID", integer(1)),
                           name("_CRS", resource_template({memory32_fixed(p.pci_ecam, 1 << 20)}))})),
  });
}

aml::Bytes processor(u32 id) {
  char name[8];
  std::snprintf(name, sizeof name, "C%03X", id & 0xfff);
  return aml::device(name, aml::join({aml::name("_HID", aml::string("ACPI0007")), aml::name("_UID", aml::integer(id))}));
}

}  // namespace

std::vector<u8> build_dsdt(const Platform& p) {
  using namespace aml;
  const auto status_on = name("_STA", integer(0x0f));
  Bytes devices = join({
      device("COM1", join({name("_HID", eisa_id("PNP0501")), name("_UID", integer(1)), status_on,
                           name("_CRS", resource_template({io(p.com1_port, 8), irq_edge(p.com1_irq)}))})),
      device("RTC", join({name("_HID", eisa_id("PNP0B00")), status_on,
                          name("_CRS", resource_template({io(p.rtc_port, 2), irq_edge(p.rtc_irq)}))})),
      device("PEVT", join({name("_HID", string("QEMU0001")), status_on,
                           name("_CRS", resource_template({io(p.pvpanic_port, 1)}))})),
  });
  if (p.pci) devices = join({devices, host_bridge(p)});
  for (u32 id = 0; id < p.cpus; id++) devices = join({devices, processor(id)});
  Table t("DSDT", 2);
  t.raw(scope("\\_SB_", devices));
  t.raw(name("\\_S5_", package({integer(p.sleep_type_s5), integer(0), integer(0), integer(0)})));
  return t.finish();
}

Result<Tables> build(const Platform& p, Gpa base, u64 limit) {
  const auto align = [](u64 v) { return (v + 63) & ~u64{63}; };
  const auto dsdt = build_dsdt(p);
  const auto facs = build_facs();
  const auto madt = build_madt(p);
  const std::size_t fadt_size = build_fadt(p, 0, 0).size();
  constexpr u64 kRsdp = 36;
  const u64 facs_at = align(kRsdp);
  const u64 xsdt_at = align(facs_at + facs.size());
  const u64 fadt_at = align(xsdt_at + kHeader + 3 * 8);
  const u64 madt_at = align(fadt_at + fadt_size);
  const auto mcfg = p.pci ? build_mcfg(p) : std::vector<u8>();
  const u64 mcfg_at = align(madt_at + madt.size());
  const u64 dsdt_at = align(mcfg_at + mcfg.size());
  const u64 total = dsdt_at + dsdt.size();
  if (total > limit) {
    return Error::of(ENOSPC, "the ACPI tables of " + std::to_string(p.cpus) + " vCPUs take " + std::to_string(total) +
                                 " bytes; there is room for " + std::to_string(limit));
  }
  Tables tables;
  tables.base = base;
  tables.rsdp = base;
  tables.bytes.resize(total);
  const auto place = [&](u64 at, const std::vector<u8>& b) { std::copy(b.begin(), b.end(), tables.bytes.begin() + static_cast<std::ptrdiff_t>(at)); };

  place(facs_at, facs);
  place(dsdt_at, dsdt);
  place(madt_at, madt);
  place(mcfg_at, mcfg);
  place(fadt_at, build_fadt(p, base.value + facs_at, base.value + dsdt_at));
  Table xsdt("XSDT", 1);
  xsdt.u64_(base.value + fadt_at);
  xsdt.u64_(base.value + madt_at);
  if (p.pci) xsdt.u64_(base.value + mcfg_at);
  place(xsdt_at, xsdt.finish());

  // RSDP (5.2.5.3), revision 2. RsdtAddress stays 0: the XSDT is the one that counts.
  u8* r = tables.bytes.data();
  std::memcpy(r, "RSD PTR RING3 ", 8);
  std::memcpy(r + 9, "RING3 ", 6);
  r[15] = 2;
  const u32 length = kRsdp;
  const u64 xsdt_address = base.value + xsdt_at;
  std::memcpy(r + 20, &length, 4);
  std::memcpy(r + 24, &xsdt_address, 8);
  r[8] = static_cast<u8>(-std::accumulate(r, r + 20, 0));
  r[32] = static_cast<u8>(-std::accumulate(r, r + kRsdp, 0));
  return tables;
}

}  // namespace ring3::acpi
