#include "engine/irq/irq_routing.hpp"

#include <cerrno>

namespace ring3::engine {
namespace {

std::shared_ptr<RoutingTable> empty_table() {
  auto t = std::make_shared<RoutingTable>();
  t->pic_gsi.fill(RoutingTable::kNoGsi);
  t->ioapic_gsi.fill(RoutingTable::kNoGsi);
  return t;
}

void add(RoutingTable& t, u32 gsi, const RoutingTable::Route& route) {
  if (t.by_gsi.size() <= gsi) t.by_gsi.resize(gsi + 1);
  t.by_gsi[gsi].push_back(route);
  if (route.msi || route.xen_event) return;
  if (route.hv_sint) {
    t.sint_gsis[{route.chip, route.pin}].push_back(gsi);
    return;
  }
  if (route.chip == KVM_IRQCHIP_IOAPIC) {
    t.ioapic_gsi[route.pin] = gsi;
  } else {
    t.pic_gsi[route.pin + (route.chip == KVM_IRQCHIP_PIC_SLAVE ? 8 : 0)] = gsi;
  }
}

}  // namespace

IrqRouting::IrqRouting() : table_(empty_table()) {}

std::shared_ptr<const RoutingTable> IrqRouting::table() const {
  const std::lock_guard lock(mutex_);
  return table_;
}

int IrqRouting::set(const kvm_irq_routing_entry* entries, u32 count, u32 flags, bool chips,
                    bool x2apic_format) {
  if (flags || count > RoutingTable::kMaxRoutes) return -EINVAL;
  auto t = empty_table();
  for (u32 i = 0; i < count; ++i) {
    const kvm_irq_routing_entry& e = entries[i];
    if (e.gsi >= RoutingTable::kMaxRoutes) return -EINVAL;
    RoutingTable::Route r;
    switch (e.type) {
      case KVM_IRQ_ROUTING_IRQCHIP:
        if (e.flags || !chips) return -EINVAL;
        r.chip = e.u.irqchip.irqchip;
        r.pin = e.u.irqchip.pin;
        if (r.chip > KVM_IRQCHIP_IOAPIC) return -EINVAL;
        if (r.pin >= (r.chip == KVM_IRQCHIP_IOAPIC ? KVM_IOAPIC_NUM_PINS : 8)) return -EINVAL;
        break;
      case KVM_IRQ_ROUTING_MSI:
        if (e.flags & ~static_cast<u32>(KVM_MSI_VALID_DEVID)) return -EINVAL;
        r.msi = true;
        r.address_lo = e.u.msi.address_lo;
        r.address_hi = e.u.msi.address_hi;
        r.data = e.u.msi.data;
        if (x2apic_format && (r.address_hi & 0xff)) return -EINVAL;
        break;
      case KVM_IRQ_ROUTING_HV_SINT:
        if (e.flags) return -EINVAL;
        r.hv_sint = true;
        r.chip = e.u.hv_sint.vcpu;
        r.pin = e.u.hv_sint.sint;
        break;
      case KVM_IRQ_ROUTING_XEN_EVTCHN:
        if (e.flags || e.u.xen_evtchn.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL) return -EINVAL;
        r.xen_event = true;
        r.chip = e.u.xen_evtchn.vcpu;  // which may come later, as may a layout that has the port
        r.pin = e.u.xen_evtchn.port;
        break;
      default:
        return -EINVAL;
    }
    // One route per chip and GSI; an MSI, a SINT or an event stands alone.
    if (e.gsi < t->by_gsi.size()) {
      for (const RoutingTable::Route& other : t->by_gsi[e.gsi]) {
        const auto alone = [](const RoutingTable::Route& one) { return one.msi || one.hv_sint || one.xen_event; };
        if (alone(other) || alone(r) || other.chip == r.chip) return -EINVAL;
      }
    }
    add(*t, e.gsi, r);
  }
  const std::lock_guard lock(mutex_);
  table_ = std::move(t);
  return 0;
}

void IrqRouting::set_default() {
  auto t = empty_table();
  for (u32 gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; ++gsi) {
    RoutingTable::Route r;
    if (gsi < 16) {
      r.chip = gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE;
      r.pin = gsi & 7;
      add(*t, gsi, r);
    }
    r.chip = KVM_IRQCHIP_IOAPIC;
    r.pin = gsi;
    add(*t, gsi, r);
  }
  const std::lock_guard lock(mutex_);
  table_ = std::move(t);
}

}  // namespace ring3::engine
