#include "engine/irq/apic_bus.hpp"

#include <cerrno>

#include "engine/irq/lapic.hpp"

namespace ring3::engine {

InterruptMessage decode_msi(u32 address_lo, u32 address_hi, u32 data, const ApicOptions& options) {
  InterruptMessage m;
  m.dest = address_lo >> 12 & 0xff;
  if (options.x2apic_format) {
    m.dest |= address_hi & 0xffffff00;
  } else if (options.ext_dest_id) {
    m.dest |= (address_lo >> 5 & 0x7f) << 8;
  }
  m.logical = address_lo >> 2 & 1;
  m.redirection_hint = address_lo >> 3 & 1;
  m.vector = static_cast<u8>(data);
  m.mode = static_cast<DeliveryMode>(data >> 8 & 7);
  m.level = data >> 15 & 1;
  return m;
}

void ApicBus::attach(Lapic& lapic) {
  const unsigned id = lapic.vcpu();
  if (id >= kMaxVcpus) return;
  lapics_[id].store(&lapic, std::memory_order_release);
  if (limit_.load(std::memory_order_relaxed) <= id) limit_.store(id + 1, std::memory_order_release);
}

void ApicBus::detach(Lapic& lapic) {
  if (lapic.vcpu() < kMaxVcpus) lapics_[lapic.vcpu()].store(nullptr, std::memory_order_release);
}

int ApicBus::deliver(const InterruptMessage& in, const Lapic* source) {
  InterruptMessage m = in;
  int result = -1;
  const auto give = [&](Lapic& to) {
    const int r = to.accept(m);
    if (r >= 0) result = (result < 0 ? 0 : result) + r;
  };

  if (m.shorthand == Shorthand::kSelf) {
    Lapic* const self = source ? lapic(source->vcpu()) : nullptr;
    if (self) give(*self);
    return result;
  }
  const bool everyone = m.shorthand != Shorthand::kNone;
  // The field holds a destination of the sender's or device's width; a broadcast is one to whom it
  // addresses. A lowest-priority message to all of them physically is plain fixed delivery.
  if (!everyone && !m.logical && m.dest == 0xff && m.mode == DeliveryMode::kLowestPriority) {
    m.mode = DeliveryMode::kFixed;
  }
  const bool one = !everyone && (m.mode == DeliveryMode::kLowestPriority ||
                                 (m.redirection_hint && m.mode == DeliveryMode::kFixed));

  // Physical, one destination: the slot of that number, as long as no guest renumbered its APICs.
  if (!everyone && !m.logical && m.dest != 0xff && m.dest != 0xffffffff &&
      !ids_moved_.load(std::memory_order_acquire)) {
    Lapic* const to = lapic(m.dest);
    if (to && to->matches(m.dest, false, source)) {
      if (m.mode == DeliveryMode::kLowestPriority) m.mode = DeliveryMode::kFixed;
      give(*to);
      return result;
    }
  }

  const unsigned limit = limit_.load(std::memory_order_acquire);
  if (one) {
    // The lowest processor priority class wins; among equals the vector picks, so that interrupts
    // spread and each stays on one vCPU.
    const auto eligible = [&](Lapic* l, unsigned* lowest) {
      if (!l || !l->accepts_fixed() || !l->matches(m.dest, m.logical, source)) return false;
      const unsigned cls = l->ppr() >> 4;
      if (cls > *lowest) return false;
      *lowest = cls;
      return true;
    };
    unsigned lowest = 16, count = 0;
    Lapic* first = nullptr;
    for (unsigned i = 0; i < limit; ++i) {
      Lapic* const l = lapic(i);
      const unsigned before = lowest;
      if (!eligible(l, &lowest)) continue;
      if (lowest < before) count = 0;
      if (count++ == 0) first = l;
    }
    if (!first) return -1;
    Lapic* chosen = first;
    unsigned skip = m.vector % count;
    for (unsigned i = first->vcpu(); i < limit; ++i) {
      Lapic* const l = lapic(i);
      unsigned cls = lowest;
      if (!eligible(l, &cls)) continue;
      chosen = l;
      if (skip-- == 0) break;
    }
    m.mode = DeliveryMode::kFixed;
    give(*chosen);
    return result;
  }

  for (unsigned i = 0; i < limit; ++i) {
    Lapic* const l = lapic(i);
    if (!l) continue;
    if (everyone ? (m.shorthand == Shorthand::kAllButSelf && l == source)
                 : !l->matches(m.dest, m.logical, source)) {
      continue;
    }
    give(*l);
  }
  return result;
}

int ApicBus::deliver_msi(u32 address_lo, u32 address_hi, u32 data) {
  if (options_.x2apic_format && (address_hi & 0xff)) return -EINVAL;
  return deliver(decode_msi(address_lo, address_hi, data, options_));
}

void ApicBus::pulse_lint0_nmi() {
  if (lint0_nmi_.load(std::memory_order_relaxed) <= 0) return;
  const unsigned limit = limit_.load(std::memory_order_acquire);
  for (unsigned i = 0; i < limit; ++i) {
    Lapic* const l = lapic(i);
    if (l) l->lint0_nmi();
  }
}

}  // namespace ring3::engine
