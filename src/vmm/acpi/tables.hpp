#pragma once
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::acpi {

/// What the tables describe. Ports as in devices/legacy.
struct Platform {
  u32 cpus = 1;                 ///< APIC ids 0 to cpus-1
  u16 pm1_event_port = 0x600;
  u16 pm1_control_port = 0x604;
  u16 pm_timer_port = 0x608;
  u16 gpe0_port = 0x620;
  u8 gpe0_bytes = 4;
  u16 reset_port = 0xcf9;
  u8 reset_value = 0x06;
  u8 sci_irq = 9;
  u8 sleep_type_s5 = 5;
  u16 com1_port = 0x3f8;
  u8 com1_irq = 4;
  u16 rtc_port = 0x70;
  u8 rtc_irq = 8;
  u16 pvpanic_port = 0x505;
  u32 lapic_address = 0xfee00000;
  u32 ioapic_address = 0xfec00000;

  bool pci = false;              ///< a PCI Express host bridge with bus 0
  u32 pci_ecam = 0xe0000000;     ///< 1 MiB
  u32 pci_window = 0xc0000000;
  u32 pci_window_size = 0x20000000;
  u32 pci_first_gsi = 16;        ///< INTA of device n is this plus n modulo pci_gsis
  u32 pci_gsis = 4;
};

/// A blob to be placed at `base`, with the RSDP at its start.
struct Tables {
  Gpa base;
  Gpa rsdp;
  std::vector<u8> bytes;
};

/// Builds RSDP, XSDT, FADT, FACS, DSDT, MADT and, with PCI, MCFG for a blob at `base` (64-byte aligned, below 4 GiB).
///
/// Spec:   ACPI 6.4, chapter 5; not hardware-reduced. Processors over APIC id 254 are x2APIC entries.
/// Errors: ENOSPC when it does not fit in `limit` bytes (many thousands of processors).
Result<Tables> build(const Platform& platform, Gpa base, u64 limit);

/// The DSDT alone, header included (for tests and for looking at it).
std::vector<u8> build_dsdt(const Platform& platform);

}  // namespace ring3::acpi
