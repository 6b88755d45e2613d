#include "engine/hyperv/synic.hpp"

#include <algorithm>
#include <cerrno>

#include "engine/hyperv/tlfs.hpp"
#include "engine/hyperv/vp.hpp"

namespace ring3::engine::hv {
namespace {

// STIMERx_CONFIG.
constexpr u64 kEnable = 1u << 0, kPeriodic = 1u << 1, kAutoEnable = 1u << 3, kDirect = 1u << 12;
u8 direct_vector(u64 config) { return static_cast<u8>(config >> 4); }
u32 message_sint(u64 config) { return static_cast<u32>(config >> 16 & 15); }

constexpr u64 kMinPeriod = 2000;                     // 100 ns: a guest must not keep a host CPU busy with its ticks
constexpr u64 kFarAway = 30'000'000'000'000'000ull;  // 100 ns: about a hundred years

int vector_of(u64 sint) { return sint & kSintMasked ? -1 : static_cast<int>(sint & 0xff); }

}  // namespace

Synic::Synic(Partition& partition, Host& host, Processor& processor, TimerQueue& timers, const Tsc& tsc, Lapic* lapic,
             const std::atomic<u32>& vp_index)
    : partition_(partition), host_(host), processor_(processor), queue_(timers), tsc_(tsc), lapic_(lapic), vp_index_(vp_index) {
  for (auto& s : sint_) s.store(kSintMasked, std::memory_order_relaxed);
}

Synic::~Synic() {
  for (Stimer& t : stimers_) t.timer.reset();
  if (lapic_ != nullptr) lapic_->set_vector_listener(nullptr);
}

void Synic::activate(bool zero_pages) {
  zero_pages_ = zero_pages;
  control_ = 1;
  for (unsigned i = 0; i < kStimers; i++) {
    if (!stimers_[i].timer) stimers_[i].timer = std::make_unique<TimerQueue::Timer>(queue_, [this, i] { mark(i); });
  }
  lapic_->set_vector_listener(this);
  active_.store(true, std::memory_order_release);
}

// ---- registers ----

bool Synic::read_msr(u32 index, bool host, u64* value) const {
  if (!active() && !host) return false;
  switch (index) {
    case msr::kScontrol: *value = control_; return true;
    case msr::kSversion: *value = version_; return true;
    case msr::kSiefp: *value = event_page_; return true;
    case msr::kSimp: *value = message_page_; return true;
    case msr::kEom: *value = 0; return true;
    default: break;
  }
  if (index < msr::kSint0 || index > msr::kSint15) return false;
  *value = sint_[index - msr::kSint0].load(std::memory_order_relaxed);
  return true;
}

bool Synic::clear_page(u64 value, bool host) {
  if (host || !zero_pages_ || !(value & kPageEnable)) return true;
  static constexpr u8 kZero[kPageSize] = {};
  return processor_.write(Gpa(value & kPageMask), kZero, sizeof kZero);
}

bool Synic::write_msr(u32 index, bool host, u64 value) {
  if (!active() && (!host || value != 0)) return false;
  switch (index) {
    case msr::kScontrol: control_ = value; return true;
    case msr::kSversion:
      if (!host) return false;
      version_ = value;
      return true;
    case msr::kSiefp:
      if (!clear_page(value, host)) return false;
      event_page_ = value;
      return true;
    case msr::kSimp:
      if (!clear_page(value, host)) return false;
      message_page_ = value;
      return true;
    case msr::kEom:
      if (active()) {
        for (u32 i = 0; i < kSints; i++) acked(i);
      }
      return true;
    default: break;
  }
  if (index < msr::kSint0 || index > msr::kSint15) return false;
  // Vectors below 16 are no interrupt's; masked, or as the VMM's zero, they stand for nothing.
  if ((value & 0xff) < 16 && !host && !(value & kSintMasked)) return false;
  sint_[index - msr::kSint0].store(value, std::memory_order_relaxed);
  return true;
}

// ---- interrupts ----

int Synic::raise(u32 sint) {
  if (!active() || sint >= kSints) return -EINVAL;
  const int vector = vector_of(sint_[sint].load(std::memory_order_relaxed));
  if (vector < 0) return -ENOENT;
  InterruptMessage m;
  m.vector = static_cast<u8>(vector);
  return lapic_->accept(m);
}

bool Synic::auto_eoi(u8 vector) const {
  return std::any_of(sint_.begin(), sint_.end(), [vector](const auto& s) {
    const u64 value = s.load(std::memory_order_relaxed);
    return vector_of(value) == vector && (value & kSintAutoEoi);
  });
}

void Synic::eoi(u8 vector) {
  for (u32 i = 0; i < kSints; i++) {
    if (vector_of(sint_[i].load(std::memory_order_relaxed)) == vector) acked(i);
  }
}

/// A message slot may be free now.
void Synic::acked(u32 sint) {
  for (unsigned i = 0; i < kStimers; i++) {
    const Stimer& t = stimers_[i];
    if (t.undelivered && (t.config & kEnable) && !(t.config & kDirect) && message_sint(t.config) == sint) mark(i);
  }
  host_.sint_acked(vp_index_.load(std::memory_order_relaxed), sint);
}

// ---- timers ----

void Synic::mark(unsigned timer) {
  pending_.fetch_or(1u << timer);
  processor_.attend_timers();
}

void Synic::stop(Stimer& t, unsigned index) {
  if (t.timer) t.timer->disarm();
  pending_.fetch_and(~(1u << index));  // one that fires just now looks at `expires`, and finds nothing due
  t.undelivered = false;
  t.expires = 0;
}

u64 Synic::read_stimer(u32 index) const {
  const Stimer& t = stimers_[(index - msr::kStimer0Config) / 2];
  return (index - msr::kStimer0Config) % 2 == 0 ? t.config : t.count;
}

bool Synic::write_stimer(u32 index, bool host, bool direct, u64 value) {
  if (!active() && (!host || value != 0)) return false;
  const unsigned n = (index - msr::kStimer0Config) / 2;
  Stimer& t = stimers_[n];
  if ((index - msr::kStimer0Config) % 2 == 0) {
    if (!host && !direct && (value & kDirect)) return false;
    stop(t, n);
    // A timer that was on and says its time to nobody goes off.
    if ((t.config & kEnable) && !(value & kDirect) && message_sint(value) == 0) value &= ~kEnable;
    t.config = value;
  } else {
    stop(t, n);
    t.count = value;
    if (!host && value == 0) t.config &= ~kEnable;
    if (!host && value != 0 && (t.config & kAutoEnable)) t.config |= kEnable;
  }
  if (t.config & kEnable) mark(n);
  return true;
}

void Synic::process_timers() {
  const u32 pending = pending_.exchange(0);
  for (unsigned i = 0; i < kStimers; i++) {
    Stimer& t = stimers_[i];
    if (!(pending >> i & 1) || !(t.config & kEnable)) continue;
    if (t.expires != 0 && partition_.time(tsc_) >= t.expires) expire(t, i);
    if (!(t.config & kEnable) || t.count == 0) {
      stop(t, i);
    } else if (!t.undelivered) {
      start(t, i);
    }
  }
}

/// On, and with a count.
void Synic::start(Stimer& t, unsigned index) {
  const u64 now = partition_.time(tsc_);
  u64 left;
  if (t.config & kPeriodic) {
    if (t.expires == 0) {
      t.expires = now + t.count;
    } else if (now >= t.expires) {
      t.expires = now + (t.count - (now - t.expires) % t.count);
    }
    left = std::max(t.expires - now, kMinPeriod);
  } else {
    t.expires = t.count;
    if (now >= t.count) return mark(index);  // TLFS: one in the past expires at once
    left = t.count - now;
  }
  t.timer->arm(queue_.clock().monotonic_ns() + std::min(left, kFarAway) * 100);
}

void Synic::expire(Stimer& t, unsigned index) {
  bool done;
  if (t.config & kDirect) {
    InterruptMessage m;
    m.vector = direct_vector(t.config);
    done = lapic_->accept(m) >= 0;
  } else {
    done = send_message(t, index);
  }
  t.undelivered = !done;
  if (done && !(t.config & kPeriodic)) t.config &= ~kEnable;
}

bool Synic::send_message(const Stimer& t, unsigned index) {
  const u32 sint = message_sint(t.config);
  if (!(message_page_ & kPageEnable)) return false;
  const Gpa slot(Gpa(message_page_ & kPageMask) + sint * kMessageSlot);
  u32 type;
  if (!processor_.read(slot, &type, sizeof type)) return false;
  if (type != 0) {  // taken: the guest says when it is free again, if it is told that somebody waits
    if (t.config & kPeriodic) return true;  // ticks do not pile up
    const u8 flags = 1;
    static_cast<void>(processor_.write(slot + kMessageFlagsAt, &flags, sizeof flags));
    return false;
  }
  TimerMessage message{};
  message.type = kMessageTimerExpired;
  message.payload_size = sizeof message - 16;
  message.timer = index;
  message.expiration = t.expires;
  message.delivery = partition_.time(tsc_);
  return processor_.write(slot, &message, sizeof message) && raise(sint) >= 0;
}

}  // namespace ring3::engine::hv
