#include "engine/irq/ioapic.hpp"

#include <cstring>

namespace ring3::engine {
namespace {

constexpr u32 kVersionValue = 0x11 | (IoApic::kPins - 1) << 16;
constexpr u64 kReadOnly = 1ull << 12 | 1ull << 14;  // delivery status, remote IRR

}  // namespace

IoApic::IoApic(ApicBus& bus, std::function<void(unsigned)> acked, std::function<void(u32)> changed)
    : bus_(bus), acked_(std::move(acked)), changed_(std::move(changed)) {}

void IoApic::reset() {
  {
    const std::lock_guard lock(mutex_);
    base_ = kDefaultBase;
    select_ = id_ = irr_ = irr_delivered_ = 0;
    for (Entry& e : entries_) e = Entry{};
  }
  changed_(0);
}

bool IoApic::contains(Gpa a) const { return a.value - base_.load(std::memory_order_relaxed) < kSize; }

u32 IoApic::read_window() const {
  switch (select_) {
    case 0:
    case 2:
      return (id_ & 0xf) << 24;  // ID, arbitration ID
    case 1:
      return kVersionValue;
    default:
      break;
  }
  const u32 pin = (select_ - 0x10) >> 1;
  if (select_ < 0x10 || pin >= kPins) return ~0u;
  return static_cast<u32>(entries_[pin].bits >> (select_ & 1 ? 32 : 0));
}

// Whether the redirection table changed.
bool IoApic::write_window(u32 value, u32* unmasked) {
  if (select_ == 0) id_ = value >> 24 & 0xf;
  const u32 pin = (select_ - 0x10) >> 1;
  if (select_ < 0x10 || pin >= kPins) return false;
  Entry& e = entries_[pin];
  const Entry old = e;
  if (select_ & 1) {
    e.bits = (e.bits & 0xffffffff) | static_cast<u64>(value) << 32;
  } else {
    e.bits = (e.bits & ~0xffffffffull) | value;
    e.bits = (e.bits & ~kReadOnly) | (old.bits & kReadOnly);
    // Guests without an EOI register drop a remote IRR by making the pin edge triggered for a moment.
    if (!e.level()) e.set_remote_irr(false);
  }
  if (old.masked() && !e.masked()) *unmasked |= 1u << pin;
  if (e.level() && (irr_ >> pin & 1)) (void)service_locked(pin);
  return true;
}

void IoApic::mmio_read(u32 offset, void* data, u32 size) {
  u64 value = 0;
  {
    const std::lock_guard lock(mutex_);
    if (offset == 0x00) value = select_;
    if (offset == 0x10) value = read_window();
  }
  std::memset(data, 0, size);
  if (size == 1 || size == 2 || size == 4 || size == 8) std::memcpy(data, &value, size);
}

void IoApic::mmio_write(u32 offset, const void* data, u32 size) {
  if (size != 1 && size != 2 && size != 4 && size != 8) return;
  u32 value = 0;
  std::memcpy(&value, data, size < 4 ? size : 4);
  bool changed = false;
  u32 unmasked = 0;
  {
    const std::lock_guard lock(mutex_);
    if (offset == 0x00) select_ = value & 0xff;
    if (offset == 0x10) changed = write_window(value, &unmasked);
  }
  if (changed) changed_(unmasked);
}

int IoApic::service_locked(unsigned pin) {
  Entry& e = entries_[pin];
  if (e.masked() || (e.level() && e.remote_irr())) return -1;
  InterruptMessage m;
  m.vector = e.vector();
  m.mode = static_cast<DeliveryMode>(e.bits >> 8 & 7);
  m.logical = e.bits >> 11 & 1;
  m.level = e.level();
  m.dest = static_cast<u32>(e.bits >> 56);
  if (!m.level) irr_delivered_ |= 1u << pin;
  // ExtINT entries pass the 8259 through: it reaches the vCPU by way of LINT0 here.
  if (m.mode == DeliveryMode::kExtInt) return -1;
  const int r = bus_.deliver(m);
  if (r >= 0 && m.level) e.set_remote_irr(true);
  return r;
}

int IoApic::raise_locked(unsigned pin) {
  const u32 bit = 1u << pin;
  const bool was = irr_ & bit;
  irr_ |= bit;
  if (!entries_[pin].level()) {
    if (was) return 0;
    irr_delivered_ &= ~bit;
  } else if (entries_[pin].remote_irr() && !entries_[pin].masked()) {
    return 0;
  }
  return service_locked(pin);
}

int IoApic::set_line(unsigned pin, unsigned source, bool level) {
  if (pin >= kPins || source >= 32) return -1;
  const std::lock_guard lock(mutex_);
  u32& sources = sources_[pin];
  sources = level ? sources | 1u << source : sources & ~(1u << source);
  if (sources) return raise_locked(pin);
  irr_ &= ~(1u << pin);
  irr_delivered_ &= ~(1u << pin);
  return 1;
}

void IoApic::eoi(u8 vector, bool suppress) {
  u32 pins = 0;
  {
    const std::lock_guard lock(mutex_);
    for (unsigned i = 0; i < kPins; ++i) {
      if (entries_[i].vector() == vector) pins |= 1u << i;
    }
  }
  for (unsigned i = 0; i < kPins; ++i) {
    if (!(pins >> i & 1)) continue;
    // First those who hold the line learn of it, and may let go; then the pin is looked at again.
    acked_(i);
    const std::lock_guard lock(mutex_);
    Entry& e = entries_[i];
    if (e.vector() != vector || !e.level() || suppress) continue;
    e.set_remote_irr(false);
    if (irr_ >> i & 1) (void)service_locked(i);
  }
}

void IoApic::get_state(kvm_ioapic_state* out) const {
  const std::lock_guard lock(mutex_);
  std::memset(out, 0, sizeof *out);
  out->base_address = base_;
  out->ioregsel = select_;
  out->id = id_;
  out->irr = irr_ & ~irr_delivered_;
  for (unsigned i = 0; i < kPins; ++i) out->redirtbl[i].bits = entries_[i].bits;
}

void IoApic::set_state(const kvm_ioapic_state& in) {
  {
    const std::lock_guard lock(mutex_);
    base_ = in.base_address;
    select_ = in.ioregsel;
    id_ = in.id;
    irr_ = irr_delivered_ = 0;
    for (unsigned i = 0; i < kPins; ++i) entries_[i].bits = in.redirtbl[i].bits;
    for (unsigned i = 0; i < kPins; ++i) {
      if (in.irr >> i & 1) (void)raise_locked(i);
    }
  }
  changed_(0);
}

void IoApic::vectors(u64 out[4], const std::function<bool(unsigned)>& wanted) const {
  bool want[kPins];
  for (unsigned i = 0; i < kPins; ++i) want[i] = wanted(i);
  const std::lock_guard lock(mutex_);
  out[0] = out[1] = out[2] = out[3] = 0;
  for (unsigned i = 0; i < kPins; ++i) {
    const u8 v = entries_[i].vector();
    if (want[i] || entries_[i].level()) out[v >> 6] |= 1ull << (v & 63);
  }
}

}  // namespace ring3::engine
