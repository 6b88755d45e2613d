#include "engine/irq/lapic.hpp"

#include <bit>
#include <cerrno>
#include <cstring>

namespace ring3::engine {
namespace {

constexpr u32 kVersionValue = 0x14 | 5u << 16;  // integrated, six LVT entries
constexpr u32 kVersionOneMore = 1u << 16;
constexpr u32 kVersionEoiSuppression = 1u << 24;

constexpr u32 kLvtMasked = 1u << 16;
constexpr u32 kSvrEnable = 1u << 8, kSvrSuppressEoi = 1u << 12;

// Error status register bits.
constexpr u32 kErrSendVector = 1u << 5, kErrReceiveVector = 1u << 6, kErrRegister = 1u << 7;

// What can be written in each LVT entry (SDM figure 11-8); the delivery status bit is read-only.
u32 lvt_writable(unsigned n) {
  switch (n) {
    case 0x32:
      return 0xff | kLvtMasked | 3u << 17;  // timer
    case 0x35:
    case 0x36:
      return 0xff | kLvtMasked | 0xa700;  // LINT: mode, polarity, trigger
    case 0x37:
      return 0xff | kLvtMasked;  // error: always fixed
    default:
      return 0xff | kLvtMasked | 0x700;
  }
}

DeliveryMode lvt_mode(u32 entry) { return static_cast<DeliveryMode>(entry >> 8 & 7); }

// The logical id of an x2APIC follows from its id (SDM 11.12.10.2).
u32 x2apic_ldr(u32 id) { return (id >> 4) << 16 | 1u << (id & 15); }

}  // namespace

Lapic::Lapic(ApicBus& bus, TimerQueue& timers, const Tsc& tsc, unsigned vcpu, bool bsp)
    : bus_(bus),
      tsc_(tsc),
      clock_(timers.clock()),
      vcpu_(vcpu),
      bsp_(bsp),
      base_(kDefaultBase | kBaseEnable | (bsp ? kBaseBsp : 0)),
      timer_(timers, [this] { on_timer(); }) {
  reset(false);
  bus_.attach(*this);
}

Lapic::~Lapic() {
  bus_.detach(*this);
  note_lint0(reg(kLvtLint0), kLvtMasked);
  timer_.cancel();
}

bool Lapic::has_lvt(unsigned n) const { return (n >= kLvtTimer && n <= kLvtError) || (n == kLvtCmci && cmci_); }

template <class F>
void Lapic::each_lvt(F f) const {
  for (unsigned n = kLvtTimer; n <= kLvtError; ++n) f(n);
  if (cmci_) f(unsigned{kLvtCmci});
}

u32 Lapic::version() const {
  return kVersionValue + (cmci_ ? kVersionOneMore : 0) + (features_.eoi_suppression ? kVersionEoiSuppression : 0);
}

void Lapic::set_features(const Features& features) {
  features_ = features;
  put(kVersion, version());
}

void Lapic::set_cmci(bool on) {
  if (on && !cmci_) put(kLvtCmci, kLvtMasked);
  cmci_ = on;
  put(kVersion, version());
}

void Lapic::mask_lint0_at_reset() {
  lint0_masked_ = true;
  const u32 old = reg(kLvtLint0);
  put(kLvtLint0, kLvtMasked);
  note_lint0(old, kLvtMasked);
}

void Lapic::reset(bool init) {
  {
    const std::lock_guard lock(timer_mutex_);
    timer_stop_locked();
    deadline_tsc_ = 0;
  }
  if (!init) base_.store(kDefaultBase | kBaseEnable | (bsp_ ? kBaseBsp : 0), std::memory_order_relaxed);
  const u32 old_lint0 = reg(kLvtLint0);
  const u32 id = reg(kId);
  for (auto& r : regs_) r.store(0, std::memory_order_relaxed);
  if (init && !x2apic()) {
    put(kId, id);
  } else if (x2apic()) {
    set_x2apic_id();
  } else {
    set_xapic_id(static_cast<u8>(vcpu_));
  }
  put(kVersion, version());
  each_lvt([this](unsigned n) { put(n, kLvtMasked); });
  // The BSP's LINT0 passes the 8259 through from the start (KVM_X86_QUIRK_LINT0_REENABLED), for
  // firmware that never programs it.
  if (bsp_ && !lint0_masked_) put(kLvtLint0, static_cast<u32>(DeliveryMode::kExtInt) << 8);
  note_lint0(old_lint0, reg(kLvtLint0));
  if (!x2apic()) put(kDfr, 0xffffffff);
  put(kSvr, 0xff);
  irr_pending_.store(false, std::memory_order_release);
  errors_.store(0, std::memory_order_relaxed);
}

void Lapic::set_xapic_id(u8 id) {
  put(kId, static_cast<u32>(id) << 24);
  if (id != static_cast<u8>(vcpu_)) bus_.ids_moved_.store(true, std::memory_order_release);
}

void Lapic::set_x2apic_id() {
  put(kId, vcpu_);
  put(kLdr, x2apic_ldr(vcpu_));
}

u32 Lapic::apic_id() const { return x2apic() ? vcpu_ : reg(kId) >> 24; }

bool Lapic::allows_base(u64 old, u64 value, bool host_initiated, const Features& features) {
  const unsigned bits = features.physical_bits < 36   ? 36
                        : features.physical_bits > 52 ? 52
                                                      : features.physical_bits;
  const u64 reserved = ~((1ull << bits) - 1) | 0x2ff | (features.x2apic ? 0 : kBaseX2apic);
  if (value & reserved) return false;
  const u64 mode_bits = kBaseEnable | kBaseX2apic;
  const u64 from = old & mode_bits, to = value & mode_bits;
  if (to == kBaseX2apic) return false;
  if (host_initiated) return true;
  if (from == mode_bits && to == kBaseEnable) return false;  // only by way of "disabled"
  return from != 0 || to != mode_bits;                       // only by way of xAPIC
}

bool Lapic::set_apic_base(u64 value, bool host_initiated) {
  const u64 old = apic_base();
  if (!allows_base(old, value, host_initiated, features_)) return false;
  const u64 mode_bits = kBaseEnable | kBaseX2apic;
  const u64 from = old & mode_bits, to = value & mode_bits;
  base_.store(value, std::memory_order_release);
  if (from == to) return true;
  if (to == mode_bits) {
    set_x2apic_id();
  } else if (to == kBaseEnable) {
    set_xapic_id(static_cast<u8>(vcpu_));
    if (from == mode_bits) {
      put(kLdr, 0);
      put(kDfr, 0xffffffff);
    }
  } else {
    const std::lock_guard lock(timer_mutex_);
    timer_stop_locked();
    deadline_tsc_ = 0;
  }
  // While disabled the 8259 reaches the vCPU directly: let it look.
  bus_.sink().wake(vcpu_, Attention::kExtInt);
  attention_if_pending();
  return true;
}

// --- priorities and the run loop -----------------------------------------------------------------

int Lapic::highest(unsigned bank) const {
  for (int i = 7; i >= 0; --i) {
    const u32 word = regs_[bank + static_cast<unsigned>(i)].load(std::memory_order_acquire);
    if (word) return i * 32 + 31 - std::countl_zero(word);
  }
  return -1;
}

int Lapic::pending_vector() const {
  if (!enabled()) return -1;
  const int v = highest(kIrr);
  return v >= 0 && (v & 0xf0) > static_cast<int>(reg(kPpr) & 0xf0) ? v : -1;
}

int Lapic::ack_interrupt() {
  const int v = pending_vector();
  if (v < 0) return -1;
  const u8 vector = static_cast<u8>(v);
  if (vectors_ == nullptr || !vectors_->auto_eoi(vector)) {
    put(kIsr + (vector >> 5), reg(kIsr + (vector >> 5)) | 1u << (vector & 31));  // only the owner writes ISR
  }
  // Cleared before IRR is looked at again, so that an arrival in between is never forgotten.
  irr_pending_.store(false);
  clear_bit(kIrr, vector);
  if (highest(kIrr) >= 0) irr_pending_.store(true);
  update_ppr();
  return v;
}

void Lapic::update_ppr() {
  const u32 tpr = reg(kTpr) & 0xff;
  const int isr = highest(kIsr);
  const u32 isrv = isr < 0 ? 0 : static_cast<u32>(isr);
  put(kPpr, (tpr & 0xf0) >= (isrv & 0xf0) ? tpr : isrv & 0xf0);
}

void Lapic::attention_if_pending() {
  if (has_interrupt()) bus_.sink().wake(vcpu_, Attention::kInterrupt);
}

void Lapic::set_tpr(u32 value) {
  put(kTpr, value & 0xff);
  update_ppr();
  attention_if_pending();
}

void Lapic::eoi() {
  const int v = highest(kIsr);
  if (v < 0) return;
  const u8 vector = static_cast<u8>(v);
  put(kIsr + (vector >> 5), reg(kIsr + (vector >> 5)) & ~(1u << (vector & 31)));
  update_ppr();
  if (vectors_ != nullptr) vectors_->eoi(vector);
  const bool level = test(kTmr, vector);
  if (level || bus_.eoi_wanted(vector)) {
    EoiListener* const listener = bus_.listener_.load(std::memory_order_acquire);
    if (listener) listener->eoi(*this, vector, level, reg(kSvr) & kSvrSuppressEoi);
  }
  attention_if_pending();
}

bool Lapic::eoi_is_plain() const {
  if (vectors_ != nullptr || irr_pending_.load(std::memory_order_acquire)) return false;
  int bits = 0;
  for (unsigned i = 0; i < 8; ++i) bits += std::popcount(reg(kIsr + i));
  if (bits != 1) return false;
  const u8 vector = static_cast<u8>(highest(kIsr));
  return !test(kTmr, vector) && !bus_.eoi_wanted(vector);
}

bool Lapic::accepts_extint() const {
  if (!enabled()) return true;
  const u32 lint0 = reg(kLvtLint0);
  return !(lint0 & kLvtMasked) && lvt_mode(lint0) == DeliveryMode::kExtInt;
}

// --- arrival -------------------------------------------------------------------------------------

int Lapic::accept_fixed(u8 vector, bool level) {
  if (!accepts_fixed()) return -1;
  if (vector < 16) {
    report_error(kErrReceiveVector);
    return -1;
  }
  if (level != test(kTmr, vector)) {
    if (level) {
      set_bit(kTmr, vector);
    } else {
      clear_bit(kTmr, vector);
    }
  }
  const u32 bit = 1u << (vector & 31);
  const bool merged = regs_[kIrr + (vector >> 5)].fetch_or(bit) & bit;
  irr_pending_.store(true);
  // Whoever set the bit first has woken the vCPU or is about to; but it may have looked (priority too
  // low, IF clear) and gone to sleep over it, which only a change of its own state ends.
  if (!merged) bus_.sink().wake(vcpu_, Attention::kInterrupt);
  return merged ? 0 : 1;
}

int Lapic::accept(const InterruptMessage& m) {
  switch (m.mode) {
    case DeliveryMode::kFixed:
    case DeliveryMode::kLowestPriority:
      return accept_fixed(m.vector, m.level);
    case DeliveryMode::kNmi:
      bus_.sink().nmi(vcpu_);
      return 1;
    case DeliveryMode::kSmi:
      bus_.sink().smi(vcpu_);
      return 1;
    case DeliveryMode::kInit:
      // The level de-assert only synchronised arbitration ids on old processors.
      if (m.level && !m.assert_) return 0;
      bus_.sink().init(vcpu_);
      return 1;
    case DeliveryMode::kStartup:
      bus_.sink().sipi(vcpu_, m.vector);
      return 1;
    case DeliveryMode::kReserved:
    case DeliveryMode::kExtInt:
      return -1;  // the 8259 is asked directly: accepts_extint()
  }
  return -1;
}

bool Lapic::local_event(Source source) {
  static constexpr unsigned kEntry[] = {kLvtTimer, kLvtThermal, kLvtPerf, kLvtLint0, kLvtLint1, kLvtError, kLvtCmci};
  const u32 entry = reg(kEntry[static_cast<unsigned>(source)]);
  if (!enabled() || (source == Source::kCmci && !cmci_) || (entry & kLvtMasked)) return false;
  InterruptMessage m;
  m.vector = static_cast<u8>(entry);
  const bool lint = source == Source::kLint0 || source == Source::kLint1;
  m.mode = source == Source::kTimer || source == Source::kError ? DeliveryMode::kFixed : lvt_mode(entry);
  m.level = lint && m.mode == DeliveryMode::kFixed && (entry >> 15 & 1);
  return accept(m) >= 0;
}

void Lapic::lint0_nmi() {
  const u32 entry = reg(kLvtLint0);
  if (enabled() && !(entry & kLvtMasked) && lvt_mode(entry) == DeliveryMode::kNmi) bus_.sink().nmi(vcpu_);
}

void Lapic::note_lint0(u32 old_value, u32 new_value) {
  const auto nmi = [](u32 v) { return !(v & kLvtMasked) && lvt_mode(v) == DeliveryMode::kNmi; };
  const int change = static_cast<int>(nmi(new_value)) - static_cast<int>(nmi(old_value));
  if (change) bus_.lint0_nmi_.fetch_add(change, std::memory_order_relaxed);
}

bool Lapic::matches(u32 dest, bool logical, const Lapic* source) const {
  if (!enabled()) return false;
  const bool x2 = x2apic();
  // A broadcast in the width of the sender: a device's MSI or IOAPIC entry has 8 bits unless the VMM opted
  // for 32-bit ids; an x2APIC's IPI to 0xff means vCPU 255.
  if (source) {
    if (dest == (source->x2apic() ? 0xffffffffu : 0xffu)) return true;
  } else if (dest == 0xffffffffu || (dest == 0xff && !(x2 && bus_.options().no_broadcast_quirk))) {
    return true;
  }
  if (!logical) {
    if (x2) return dest == vcpu_;
    // An xAPIC whose id does not fit 8 bits can still be started by its full id.
    return dest == reg(kId) >> 24 || (dest > 0xff && dest == vcpu_);
  }
  const u32 ldr = reg(kLdr);
  if (x2) return ldr >> 16 == dest >> 16 && (ldr & dest & 0xffff);
  const u32 mine = ldr >> 24;
  switch (reg(kDfr) >> 28) {
    case 0xf:
      return mine & dest & 0xff;
    case 0x0:
      return dest <= 0xff && mine >> 4 == dest >> 4 && (mine & dest & 0xf);
    default:
      return false;
  }
}

void Lapic::report_error(u32 bits) {
  errors_.fetch_or(bits, std::memory_order_relaxed);
  const u32 entry = reg(kLvtError);
  // An error about the error vector itself must not report itself again.
  if ((entry & 0xff) >= 16) local_event(Source::kError);
}

void Lapic::send_ipi(u32 low, u32 dest) {
  InterruptMessage m;
  m.vector = static_cast<u8>(low);
  m.mode = static_cast<DeliveryMode>(low >> 8 & 7);
  m.logical = low >> 11 & 1;
  m.assert_ = low >> 14 & 1;
  m.level = low >> 15 & 1;
  m.shorthand = static_cast<Shorthand>(low >> 18 & 3);
  m.dest = dest;
  if (m.mode == DeliveryMode::kFixed || m.mode == DeliveryMode::kLowestPriority) {
    if (m.vector < 16) return report_error(kErrSendVector);
  }
  // An IPI with the trigger mode set to level is an edge all the same but for INIT (SDM 11.6.1).
  if (m.mode != DeliveryMode::kInit) m.level = false;
  (void)bus_.deliver(m, this);
}

// --- registers -----------------------------------------------------------------------------------

bool Lapic::readable(unsigned n) const {
  switch (n) {
    case kId:
    case kVersion:
    case kTpr:
    case kPpr:
    case kLdr:
    case kSvr:
    case kEsr:
    case kIcr:
    case kInitialCount:
    case kCurrentCount:
    case kDivide:
      return true;
    case kApr:
    case kRrd:
    case kDfr:
    case kIcrHigh:
      return !x2apic();
    default:
      return (n >= kIsr && n < kEsr) || has_lvt(n);
  }
}

u32 Lapic::read_register(unsigned n) {
  switch (n) {
    case kId:
      return x2apic() ? vcpu_ : reg(kId);
    case kApr:
      return 0;
    case kCurrentCount: {
      const std::lock_guard lock(timer_mutex_);
      return static_cast<u32>((timer_remaining_ns_locked() + timer_divisor() - 1) / timer_divisor());
    }
    default:
      return reg(n);
  }
}

void Lapic::mmio_read(u32 offset, void* data, u32 size) {
  std::memset(data, 0, size);
  if (!enabled() || x2apic()) {
    std::memset(data, 0xff, size);  // KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    return;
  }
  const unsigned n = offset >> 4;
  const u32 byte = offset & 15;
  if (offset >= 0x400 || !readable(n)) return report_error(kErrRegister);
  if (byte + size > 4) return;
  const u32 value = read_register(n);
  std::memcpy(data, reinterpret_cast<const u8*>(&value) + byte, size);
}

void Lapic::mmio_write(u32 offset, const void* data, u32 size) {
  if (!enabled() || x2apic()) return;
  if (size != 4 || (offset & 15)) return;
  u32 value;
  std::memcpy(&value, data, 4);
  const unsigned n = offset >> 4;
  if (n == kSelfIpi || offset >= 0x400 || (!write_register(n, value) && !readable(n))) {
    report_error(kErrRegister);
  }
}

bool Lapic::write_register(unsigned n, u32 value) {
  switch (n) {
    case kId:
      if (x2apic()) return false;
      set_xapic_id(static_cast<u8>(value >> 24));
      return true;
    case kTpr:
      set_tpr(value);
      return true;
    case kEoi:
      eoi();
      return true;
    case kLdr:
      if (x2apic()) return false;
      put(kLdr, value & 0xff000000);
      return true;
    case kDfr:
      if (x2apic()) return false;
      put(kDfr, value | 0x0fffffff);
      return true;
    case kSvr:
      set_svr(value);
      return true;
    case kEsr:
      put(kEsr, errors_.exchange(0, std::memory_order_relaxed));
      return true;
    case kIcr:
      value &= ~(1u << 12);  // delivery status: always idle
      put(kIcr, value);
      send_ipi(value, x2apic() ? reg(kIcrHigh) : reg(kIcrHigh) >> 24);
      return true;
    case kIcrHigh:
      if (x2apic()) return false;
      put(kIcrHigh, value & 0xff000000);
      return true;
    case kInitialCount: {
      const std::lock_guard lock(timer_mutex_);
      if (timer_mode() == TimerMode::kTscDeadline) return true;
      timer_stop_locked();
      put(kInitialCount, value);
      timer_start_locked(value);
      return true;
    }
    case kDivide: {
      const std::lock_guard lock(timer_mutex_);
      const u64 ticks = timer_remaining_ns_locked() / timer_divisor();
      put(kDivide, value & 0xb);
      // A running count goes on at the new rate.
      if (timer_target_ns_) timer_start_locked(ticks ? ticks : 1);
      return true;
    }
    case kSelfIpi: {
      if (!x2apic()) return false;
      if ((value & 0xff) < 16) {
        report_error(kErrSendVector);
      } else {
        (void)accept_fixed(static_cast<u8>(value), false);
      }
      return true;
    }
    default:
      if (!has_lvt(n)) return false;
      set_lvt(n, value);
      return true;
  }
}

void Lapic::set_lvt(unsigned n, u32 value) {
  value &= lvt_writable(n);
  if (!(reg(kSvr) & kSvrEnable)) value |= kLvtMasked;
  const u32 old = reg(n);
  if (n != kLvtTimer) {
    put(n, value);
    if (n == kLvtLint0) {
      note_lint0(old, value);
      if (accepts_extint()) bus_.sink().wake(vcpu_, Attention::kExtInt);
    }
    return;
  }
  const std::lock_guard lock(timer_mutex_);
  if (!features_.tsc_deadline) value &= ~(1u << 18);
  const u32 mode = value >> 17 & 3, old_mode = old >> 17 & 3;
  put(n, value);
  if (mode == old_mode) return;
  if (mode >= 2 || old_mode >= 2) {
    // To and from TSC-deadline mode disarms the timer (SDM 11.5.4.1).
    timer_stop_locked();
    put(kInitialCount, 0);
    deadline_tsc_ = 0;
  } else if (timer_target_ns_) {
    timer_period_ns_ = 0;
    if (mode == 1) timer_start_locked(timer_remaining_ns_locked() / timer_divisor());
  }
}

void Lapic::set_svr(u32 value) {
  const u32 writable = 0x3ff | (reg(kVersion) & kVersionEoiSuppression ? kSvrSuppressEoi : 0);
  const u32 old = reg(kSvr);
  put(kSvr, value & writable);
  if ((old & kSvrEnable) && !(value & kSvrEnable)) {
    const u32 lint0 = reg(kLvtLint0);
    each_lvt([this](unsigned n) { put(n, reg(n) | kLvtMasked); });
    note_lint0(lint0, reg(kLvtLint0));
  }
}

void Lapic::write_icr(u64 value) {
  put(kIcrHigh, static_cast<u32>(value >> 32));
  (void)write_register(kIcr, static_cast<u32>(value));
}

bool Lapic::read_x2apic(u32 msr, u64* value) {
  const unsigned n = msr - 0x800;
  if (!x2apic() || n >= 0x40 || !readable(n)) return false;
  *value = read_register(n);
  if (n == kIcr) *value |= static_cast<u64>(reg(kIcrHigh)) << 32;
  return true;
}

bool Lapic::write_x2apic(u32 msr, u64 value) {
  const unsigned n = msr - 0x800;
  if (!x2apic() || n >= 0x40) return false;
  if (n == kIcr) {
    write_icr(value);
    return true;
  }
  if (value >> 32) return false;
  if ((n == kEoi || n == kEsr) && value) return false;
  if (n == kTpr && value > 0xff) return false;
  if (n == kSelfIpi && value > 0xff) return false;
  return write_register(n, static_cast<u32>(value));
}

void Lapic::get_state(kvm_lapic_state* out) const {
  std::memset(out, 0, sizeof *out);
  for (unsigned n = 0; n < regs_.size(); ++n) {
    u32 v = reg(n);
    if (n == kId && x2apic() && !bus_.options().x2apic_format) v <<= 24;
    std::memcpy(out->regs + n * 16, &v, 4);
  }
  const std::lock_guard lock(timer_mutex_);
  const u32 count = static_cast<u32>((timer_remaining_ns_locked() + timer_divisor() - 1) / timer_divisor());
  std::memcpy(out->regs + kCurrentCount * 16, &count, 4);
}

int Lapic::set_state(const kvm_lapic_state& in) {
  u32 r[64];
  for (unsigned n = 0; n < 64; ++n) std::memcpy(&r[n], in.regs + n * 16, 4);
  if (x2apic()) {
    if (bus_.options().x2apic_format && r[kId] != vcpu_) return -EINVAL;
    r[kId] = vcpu_;
    r[kLdr] = x2apic_ldr(vcpu_);
  } else {
    if (r[kId] >> 24 != (vcpu_ & 0xff)) bus_.ids_moved_.store(true, std::memory_order_release);
  }
  const std::lock_guard lock(timer_mutex_);
  timer_stop_locked();
  const u32 lint0 = reg(kLvtLint0);
  for (unsigned n = 0; n < 64; ++n) put(n, r[n]);
  put(kVersion, version());
  each_lvt([&](unsigned n) { put(n, r[n] & lvt_writable(n)); });
  put(kDivide, r[kDivide] & 0xb);
  note_lint0(lint0, reg(kLvtLint0));
  update_ppr();
  irr_pending_.store(true);  // at worst one look for nothing
  if (timer_mode() == TimerMode::kTscDeadline) {
    put(kCurrentCount, 0);
    timer_arm_deadline_locked();
  } else {
    deadline_tsc_ = 0;
    timer_start_locked(r[kCurrentCount]);
  }
  bus_.sink().wake(vcpu_, Attention::kInterrupt);
  return 0;
}

// --- timer ---------------------------------------------------------------------------------------

Lapic::TimerMode Lapic::timer_mode() const {
  switch (reg(kLvtTimer) >> 17 & 3) {
    case 0:
      return TimerMode::kOneShot;
    case 1:
      return TimerMode::kPeriodic;
    default:
      return TimerMode::kTscDeadline;
  }
}

u32 Lapic::timer_divisor() const {
  const u32 d = reg(kDivide);
  const u32 code = (d & 3) | (d >> 1 & 4);
  return code == 7 ? 1 : 2u << code;
}

u64 Lapic::timer_remaining_ns_locked() const {
  if (!timer_target_ns_ || timer_mode() == TimerMode::kTscDeadline) return 0;
  const u64 now = clock_.monotonic_ns();
  if (now < timer_target_ns_) return timer_target_ns_ - now;
  // Late: the count has wrapped in the meantime, or stands at 0.
  return timer_period_ns_ ? timer_period_ns_ - (now - timer_target_ns_) % timer_period_ns_ : 0;
}

// Counts down remaining ticks from now, then periods of the initial count in periodic mode.
void Lapic::timer_start_locked(u64 remaining_ticks) {
  timer_target_ns_ = timer_period_ns_ = 0;
  if (!remaining_ticks || timer_mode() == TimerMode::kTscDeadline) return timer_.disarm();
  constexpr u64 kMinPeriodNs = 200'000;
  u64 ns = remaining_ticks * timer_divisor();
  if (timer_mode() == TimerMode::kPeriodic) {
    // A guest must not keep a host CPU busy with its ticks.
    timer_period_ns_ = static_cast<u64>(reg(kInitialCount)) * timer_divisor();
    if (!timer_period_ns_) return timer_.disarm();
    if (timer_period_ns_ < kMinPeriodNs) {
      timer_period_ns_ = kMinPeriodNs;
      ns = kMinPeriodNs;
    }
  }
  timer_target_ns_ = clock_.monotonic_ns() + ns;
  timer_.arm(timer_target_ns_);
}

void Lapic::timer_stop_locked() {
  timer_target_ns_ = timer_period_ns_ = 0;
  timer_.disarm();
}

void Lapic::timer_arm_deadline_locked() {
  if (deadline_tsc_) {
    timer_.arm(tsc_.deadline_ns(deadline_tsc_));
  } else {
    timer_.disarm();
  }
}

u64 Lapic::tsc_deadline() const {
  const std::lock_guard lock(timer_mutex_);
  return timer_mode() == TimerMode::kTscDeadline ? deadline_tsc_ : 0;
}

void Lapic::set_tsc_deadline(u64 value) {
  {
    const std::lock_guard lock(timer_mutex_);
    if (timer_mode() != TimerMode::kTscDeadline || !enabled()) return;
    deadline_tsc_ = value;
    if (!value || tsc_.read() < value) return timer_arm_deadline_locked();
    timer_.disarm();
    deadline_tsc_ = 0;
  }
  local_event(Source::kTimer);  // already past
}

void Lapic::tsc_changed() {
  const std::lock_guard lock(timer_mutex_);
  if (timer_mode() == TimerMode::kTscDeadline && deadline_tsc_) timer_arm_deadline_locked();
}

void Lapic::on_timer() {
  {
    const std::lock_guard lock(timer_mutex_);
    // Disarmed or re-armed after this callback had begun: then there is nothing due.
    if (timer_mode() == TimerMode::kTscDeadline) {
      if (!deadline_tsc_) return;
      if (tsc_.read() < deadline_tsc_) return timer_arm_deadline_locked();
      deadline_tsc_ = 0;
    } else {
      const u64 now = clock_.monotonic_ns();
      if (!timer_target_ns_) return;
      if (now < timer_target_ns_) return timer_.arm(timer_target_ns_);
      if (timer_period_ns_) {
        timer_target_ns_ += timer_period_ns_ * (1 + (now - timer_target_ns_) / timer_period_ns_);
        timer_.arm(timer_target_ns_);
      } else {
        timer_target_ns_ = 0;
      }
    }
  }
  local_event(Source::kTimer);
}

}  // namespace ring3::engine
