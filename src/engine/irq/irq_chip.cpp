#include "engine/irq/irq_chip.hpp"

#include <cerrno>
#include <cstring>
#include <vector>

namespace ring3::engine {

IrqChip::IrqChip(ApicBus& bus, Mode mode, unsigned reserved_pins)
    : bus_(bus), mode_(mode), reserved_pins_(reserved_pins) {
  if (mode_ == Mode::kFull) {
    routing_.set_default();
    pic_ = std::make_unique<Pic>([this] { extint_raised(); },
                                 [this](unsigned irq) { notify_acked(routing_.table()->pic_gsi[irq & 15]); },
                                 [this](u32 irqs) {
                                   const auto t = routing_.table();
                                   for (unsigned i = 0; i < 16; ++i) {
                                     if (irqs >> i & 1) notify_unmasked(t->pic_gsi[i]);
                                   }
                                 });
    ioapic_ = std::make_unique<IoApic>(
        bus_,
        [this](unsigned pin) {
          if (pin < IoApic::kPins) notify_acked(routing_.table()->ioapic_gsi[pin]);
        },
        [this](u32 unmasked) {
          update_eoi_vectors();
          const auto t = routing_.table();
          for (unsigned i = 0; i < IoApic::kPins; ++i) {
            if (unmasked >> i & 1) notify_unmasked(t->ioapic_gsi[i]);
          }
        });
  }
  bus_.set_eoi_listener(this);
}

IrqChip::~IrqChip() {
  bus_.set_eoi_listener(nullptr);
  for (auto& word : bus_.eoi_vectors_) word.store(0, std::memory_order_relaxed);
}

int IrqChip::set_irq(unsigned source, u32 gsi, bool level) {
  const auto t = routing_.table();
  if (gsi >= t->by_gsi.size()) return -1;
  int result = -1;
  for (const RoutingTable::Route& r : t->by_gsi[gsi]) {
    int one = -1;
    if (r.msi) {
      if (level) one = bus_.deliver_msi(r.address_lo, r.address_hi, r.data);
    } else if (r.hv_sint) {
      if (level) one = bus_.sink().hv_sint(r.chip, r.pin);
    } else if (r.xen_event) {
      if (level) one = bus_.sink().xen_event(r.chip, r.pin);
    } else if (r.chip == KVM_IRQCHIP_IOAPIC) {
      if (ioapic_) one = ioapic_->set_line(r.pin, source, level);
    } else if (pic_) {
      one = pic_->set_line(r.pin + (r.chip == KVM_IRQCHIP_PIC_SLAVE ? 8 : 0), source, level);
    }
    if (one >= 0) result = (result < 0 ? 0 : result) + one;
  }
  return result;
}

int IrqChip::pulse(u32 gsi) {
  const int r = set_irq(kIrqSourceUser, gsi, true);
  set_irq(kIrqSourceUser, gsi, false);
  return r;
}

void IrqChip::pit_tick() {
  set_irq(kIrqSourcePit, 0, true);
  set_irq(kIrqSourcePit, 0, false);
  bus_.pulse_lint0_nmi();
}

int IrqChip::set_routing(const kvm_irq_routing_entry* entries, u32 count, u32 flags) {
  const int r = routing_.set(entries, count, flags, mode_ == Mode::kFull, bus_.options().x2apic_format);
  if (r == 0) update_eoi_vectors();
  return r;
}

int IrqChip::get_irqchip(kvm_irqchip* chip) const {
  if (mode_ != Mode::kFull) return -ENXIO;
  switch (chip->chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
      pic_->get_state(0, &chip->chip.pic);
      return 0;
    case KVM_IRQCHIP_PIC_SLAVE:
      pic_->get_state(1, &chip->chip.pic);
      return 0;
    case KVM_IRQCHIP_IOAPIC:
      ioapic_->get_state(&chip->chip.ioapic);
      return 0;
    default:
      return -EINVAL;
  }
}

int IrqChip::set_irqchip(const kvm_irqchip& chip) {
  if (mode_ != Mode::kFull) return -ENXIO;
  switch (chip.chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
      pic_->set_state(0, chip.chip.pic);
      return 0;
    case KVM_IRQCHIP_PIC_SLAVE:
      pic_->set_state(1, chip.chip.pic);
      return 0;
    case KVM_IRQCHIP_IOAPIC:
      ioapic_->set_state(chip.chip.ioapic);
      return 0;
    default:
      return -EINVAL;
  }
}

int IrqChip::ack_interrupt(Lapic& lapic) {
  if (has_extint(lapic)) return pic_->ack();
  return lapic.ack_interrupt();
}

void IrqChip::extint_raised() {
  // One vCPU takes the 8259's interrupts: the first that lets them in.
  for (unsigned i = 0; i < ApicBus::kMaxVcpus && i < bus_.limit_.load(std::memory_order_acquire); ++i) {
    const Lapic* const l = bus_.lapic(i);
    if (l && l->accepts_extint()) return bus_.sink().wake(i, Attention::kExtInt);
  }
}

bool IrqChip::pio_read(u16 port, void* data, u32 size) {
  if (!pic_ || !Pic::handles(port)) return false;
  std::memset(data, 0, size);
  if (size == 1) *static_cast<u8*>(data) = pic_->read(port);
  return true;
}

bool IrqChip::pio_write(u16 port, const void* data, u32 size) {
  if (!pic_ || !Pic::handles(port)) return false;
  if (size == 1) pic_->write(port, *static_cast<const u8*>(data));
  return true;
}

bool IrqChip::mmio_read(Gpa a, void* data, u32 size) {
  if (!ioapic_ || !ioapic_->contains(a)) return false;
  ioapic_->mmio_read(a.value & 0xff, data, size);
  return true;
}

bool IrqChip::mmio_write(Gpa a, const void* data, u32 size) {
  if (!ioapic_ || !ioapic_->contains(a)) return false;
  ioapic_->mmio_write(a.value & 0xff, data, size);
  return true;
}

// --- acknowledgements ------------------------------------------------------------------------------

u64 IrqChip::add_ack_notifier(u32 gsi, std::function<void()> notify) {
  auto n = std::make_shared<Notifier>();
  n->gsi = gsi;
  n->notify = std::move(notify);
  u64 id;
  {
    const std::lock_guard lock(notifiers_mutex_);
    id = next_notifier_++;
    notifiers_.emplace(id, std::move(n));
  }
  update_eoi_vectors();
  return id;
}

void IrqChip::remove_ack_notifier(u64 id) {
  std::shared_ptr<Notifier> n;
  {
    const std::lock_guard lock(notifiers_mutex_);
    const auto it = notifiers_.find(id);
    if (it == notifiers_.end()) return;
    n = std::move(it->second);
    notifiers_.erase(it);
  }
  {
    // Waits for a call in progress, and makes later ones do nothing.
    const std::lock_guard running(n->running);
    n->notify = nullptr;
  }
  update_eoi_vectors();
}

void IrqChip::notify_acked(u32 gsi) {
  if (gsi == RoutingTable::kNoGsi) return;
  std::vector<std::shared_ptr<Notifier>> due;
  {
    const std::lock_guard lock(notifiers_mutex_);
    for (const auto& [id, n] : notifiers_) {
      if (n->gsi == gsi) due.push_back(n);
    }
  }
  for (const auto& n : due) {
    const std::lock_guard running(n->running);
    if (n->notify) n->notify();
  }
}

void IrqChip::hv_sint_acked(u32 vp_index, u32 sint) {
  const auto t = routing_.table();
  const auto it = t->sint_gsis.find({vp_index, sint});
  if (it == t->sint_gsis.end()) return;
  for (const u32 gsi : it->second) notify_acked(gsi);
}

void IrqChip::set_unmask_notifier(u32 gsi, std::function<void()> notify) {
  const std::lock_guard lock(notifiers_mutex_);
  unmask_gsi_ = gsi;
  unmask_notify_ = notify ? std::make_shared<std::function<void()>>(std::move(notify)) : nullptr;
}

void IrqChip::notify_unmasked(u32 gsi) {
  std::shared_ptr<std::function<void()>> notify;
  {
    const std::lock_guard lock(notifiers_mutex_);
    if (gsi == RoutingTable::kNoGsi || gsi != unmask_gsi_) return;
    notify = unmask_notify_;
  }
  if (notify) (*notify)();
}

// Which vectors' EOIs matter beyond their LAPIC: level-triggered ones tell that by their TMR bit,
// edge-triggered ones only when somebody listens for the GSI.
void IrqChip::update_eoi_vectors() {
  const std::lock_guard lock(eoi_vectors_mutex_);
  const auto t = routing_.table();
  u64 words[4] = {};
  if (ioapic_) {
    std::vector<u32> listened;
    {
      const std::lock_guard guard(notifiers_mutex_);
      for (const auto& [id, n] : notifiers_) listened.push_back(n->gsi);
    }
    ioapic_->vectors(words, [&](unsigned pin) {
      for (const u32 gsi : listened) {
        if (t->ioapic_gsi[pin] == gsi) return true;
      }
      return false;
    });
    for (unsigned i = 0; i < 4; ++i) bus_.eoi_vectors_[i].store(words[i], std::memory_order_relaxed);
    return;
  }
  for (u32 gsi = 0; gsi < t->by_gsi.size() && gsi < reserved_pins_; ++gsi) {
    for (const RoutingTable::Route& r : t->by_gsi[gsi]) {
      if (!r.msi) continue;
      const InterruptMessage m = decode_msi(r.address_lo, r.address_hi, r.data, bus_.options());
      if (m.level) words[m.vector >> 6] |= 1ull << (m.vector & 63);
    }
  }
  for (unsigned i = 0; i < 4; ++i) split_level_[i].store(words[i], std::memory_order_relaxed);
}

void IrqChip::eoi(Lapic& from, u8 vector, bool level, bool suppress) {
  if (ioapic_) {
    ioapic_->eoi(vector, suppress);
  } else if (level && (split_level_[vector >> 6].load(std::memory_order_relaxed) >> (vector & 63) & 1)) {
    bus_.sink().ioapic_eoi(from.vcpu(), vector);
  }
}

}  // namespace ring3::engine
