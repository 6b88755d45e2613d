#pragma once
#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"

/// The GSI routing table.
///
/// Spec:      virt/kvm/api KVM_SET_GSI_ROUTING; entry types IRQCHIP, MSI, HV_SINT and XEN_EVTCHN.
/// Threading: table() from any thread: an immutable snapshot; set() replaces it.
/// Trust:     entries come from the VMM.
namespace ring3::engine {

struct RoutingTable {
  static constexpr unsigned kMaxRoutes = 4096;  ///< KVM_CAP_IRQ_ROUTING: entries, and GSIs below this
  static constexpr unsigned kNoGsi = ~0u;

  struct Route {
    bool msi = false;
    bool hv_sint = false;   ///< chip: a VP's index; pin: the SINT of its SynIC
    bool xen_event = false;  ///< chip: a vCPU's id; pin: its port
    u32 chip = 0, pin = 0;  ///< KVM_IRQCHIP_*; pin within it (the slave's 0–7)
    u32 address_lo = 0, address_hi = 0, data = 0;
  };
  std::vector<std::vector<Route>> by_gsi;
  /// GSIs of the routes to a VP's SINT.
  std::map<std::pair<u32, u32>, std::vector<u32>> sint_gsis;
  std::array<u32, 16> pic_gsi;  ///< PIC line → GSI, kNoGsi
  std::array<u32, KVM_IOAPIC_NUM_PINS> ioapic_gsi;
};

class IrqRouting {
 public:
  IrqRouting();

  /// KVM_SET_GSI_ROUTING. chips: an irqchip with PIC and IOAPIC exists (else only MSI routes are legal).
  /// 0 or -EINVAL; nothing changes on error.
  int set(const kvm_irq_routing_entry* entries, u32 count, u32 flags, bool chips, bool x2apic_format);
  /// What the kernel installs at KVM_CREATE_IRQCHIP: GSIs 0–15 to the PIC and the IOAPIC pin of the
  /// same number, 16–23 to the IOAPIC.
  void set_default();
  std::shared_ptr<const RoutingTable> table() const;

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const RoutingTable> table_;
};

}  // namespace ring3::engine
