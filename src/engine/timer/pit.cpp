#include "engine/timer/pit.hpp"

#include <cstring>

namespace ring3::engine {
namespace {

constexpr u64 kNsPerSecond = 1'000'000'000;
constexpr u64 kMinPeriodNs = 200'000;

// Access modes (1 is LSB only), and the states of a two-byte access in kvm_pit_channel_state.
constexpr u8 kMsb = 2, kWord0 = 3, kWord1 = 4;

u64 ticks_of(u64 ns) { return static_cast<u64>(static_cast<u128>(ns) * Pit::kHz / kNsPerSecond); }
u64 ns_of(u64 ticks) { return static_cast<u64>(static_cast<u128>(ticks) * kNsPerSecond / Pit::kHz); }

// A restored count is the VMM's: never 0, so that it can divide.
u32 modulus(u32 count) { return count ? count : 0x10000; }

}  // namespace

Pit::Pit(TimerQueue& timers, std::function<void()> tick, bool speaker_port)
    : clock_(timers.clock()),
      tick_(std::move(tick)),
      speaker_port_(speaker_port),
      timer_(timers, [this] { on_timer(); }),
      inject_(timers, [this] { inject(); }) {
  for (unsigned i = 0; i < 3; ++i) {
    Channel& c = channels_[i];
    c.mode = 0xff;
    c.gate = i != 2;
    c.count = 0x10000;
    c.loaded_ns = clock_.monotonic_ns();
    if (!c.gate) c.paused_ns = c.loaded_ns;
  }
}

// The input clocks since the count was loaded or the gate restarted it.
u64 Pit::elapsed_ticks(const Channel& c) const {
  const u64 until = c.paused_ns ? c.paused_ns : clock_.monotonic_ns();
  return until > c.loaded_ns ? ticks_of(until - c.loaded_ns) : 0;
}

u32 Pit::counter(const Channel& c) const {
  const u64 d = elapsed_ticks(c);
  const u32 n = modulus(c.count);
  switch (c.mode) {
    case 0:
    case 1:
    case 4:
    case 5:
      return static_cast<u32>(n - d) & 0xffff;  // wraps and counts on
    case 3:
      return static_cast<u32>(n - (2 * d) % n);  // by two
    default:
      return static_cast<u32>(n - d % n);
  }
}

bool Pit::output(const Channel& c) const {
  const u64 d = elapsed_ticks(c);
  const u32 n = modulus(c.count);
  switch (c.mode) {
    case 1:
      return d >= n || c.paused_ns;  // low from the trigger to the end
    case 2:
      return d % n != n - 1;  // low for the last clock
    case 3:
      return c.paused_ns || d % n < (n + 1) / 2;
    case 4:
    case 5:
      return d != n;  // a strobe of one clock
    default:
      return d >= n;
  }
}

void Pit::latch_count(Channel& c) {
  if (c.count_latched) return;
  c.latched_count = static_cast<u16>(counter(c));
  c.count_latched = c.rw_mode;
}

void Pit::latch_status(Channel& c) {
  if (c.status_latched) return;
  c.status = static_cast<u8>((output(c) ? 0x80 : 0) | (c.rw_mode & 3) << 4 | (c.mode & 7) << 1 | (c.bcd & 1));
  c.status_latched = 1;
}

void Pit::set_gate(unsigned channel, bool level) {
  Channel& c = channels_[channel];
  const bool rise = level && !c.gate;
  const bool fall = !level && c.gate;
  c.gate = level;
  const u64 now = clock_.monotonic_ns();
  switch (c.mode) {
    case 1:
    case 5:  // the rising edge triggers
      if (rise) {
        c.loaded_ns = now;
        c.paused_ns = 0;
      }
      break;
    case 2:
    case 3:  // low stops, the rising edge reloads
      if (rise) {
        c.loaded_ns = now;
        c.paused_ns = 0;
      }
      if (fall) c.paused_ns = now;
      break;
    default:  // low stops, high goes on
      if (rise && c.paused_ns) {
        c.loaded_ns += now - c.paused_ns;
        c.paused_ns = 0;
      }
      if (fall) c.paused_ns = now;
      break;
  }
}

void Pit::load(unsigned channel, u32 value) {
  Channel& c = channels_[channel];
  c.count = modulus(value);
  c.loaded_ns = clock_.monotonic_ns();
  // Modes 1 and 5 wait for a trigger, the others for the gate. Channels 0 and 1 have it tied high, and
  // their one-shots start by the load.
  c.paused_ns = channel == 2 && (!c.gate || c.mode == 1 || c.mode == 5) ? c.loaded_ns : 0;
  if (channel == 0) start_timer();
}

void Pit::start_timer() {
  const Channel& c = channels_[0];
  timer_.disarm();
  next_tick_ns_ = period_ns_ = 0;
  pending_ticks_ = 0;
  acked_ = true;
  const bool one_shot = c.mode == 0 || c.mode == 1 || c.mode == 4;
  if ((flags_ & KVM_PIT_FLAGS_HPET_LEGACY) || (!one_shot && c.mode != 2 && c.mode != 3)) return;
  u64 ns = ns_of(modulus(c.count));
  if (!one_shot) {
    // A guest must not keep a host CPU busy with its ticks.
    if (ns < kMinPeriodNs) ns = kMinPeriodNs;
    period_ns_ = ns;
  }
  next_tick_ns_ = c.loaded_ns + ns;
  timer_.arm(next_tick_ns_);
}

void Pit::on_timer() {
  {
    const std::lock_guard lock(mutex_);
    if (!next_tick_ns_) return;
    const u64 now = clock_.monotonic_ns();
    if (now < next_tick_ns_) return;  // re-armed meanwhile
    u64 ticks = 1;
    if (period_ns_) {
      // Ticks the host was too late for count as raised and unacknowledged.
      ticks = 1 + (now - next_tick_ns_) / period_ns_;
      next_tick_ns_ += ticks * period_ns_;
      timer_.arm(next_tick_ns_);
    } else {
      next_tick_ns_ = 0;
    }
    if (reinject_) {
      const u64 sum = pending_ticks_ + ticks;
      pending_ticks_ = sum > 0xffffffff ? 0xffffffff : static_cast<u32>(sum);
    }
  }
  inject();
}

void Pit::inject() {
  {
    const std::lock_guard lock(mutex_);
    if (reinject_) {
      if (!acked_) return;
      acked_ = false;
    }
  }
  tick_();
}

void Pit::irq_acked() {
  const std::lock_guard lock(mutex_);
  if (!reinject_) return;
  acked_ = true;
  if (pending_ticks_ && --pending_ticks_) inject_.arm(0);
}

void Pit::irq_unmasked() {
  const std::lock_guard lock(mutex_);
  pending_ticks_ = 0;
  acked_ = true;
}

void Pit::write_control(u8 value) {
  const unsigned select = value >> 6;
  if (select == 3) {  // read-back
    for (unsigned i = 0; i < 3; ++i) {
      if (!(value >> (i + 1) & 1)) continue;
      if (!(value & 0x20)) latch_count(channels_[i]);
      if (!(value & 0x10)) latch_status(channels_[i]);
    }
    return;
  }
  Channel& c = channels_[select];
  const u8 access = value >> 4 & 3;
  if (access == 0) return latch_count(c);
  c.rw_mode = c.read_state = c.write_state = access;
  c.mode = value >> 1 & 7;
  if (c.mode > 5) c.mode = static_cast<u8>(c.mode - 4);
  c.bcd = value & 1;
  c.count_latched = 0;
  if (select == 0) {  // counting stops until a count is written
    timer_.disarm();
    next_tick_ns_ = 0;
  }
}

void Pit::write(u16 port, u8 value) {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    if (!speaker_port_) return;
    if (value & 2) {
      flags_ |= KVM_PIT_FLAGS_SPEAKER_DATA_ON;
    } else {
      flags_ &= ~static_cast<u32>(KVM_PIT_FLAGS_SPEAKER_DATA_ON);
    }
    return set_gate(2, value & 1);
  }
  if ((port & 0xfffc) != 0x40) return;
  const unsigned n = port & 3;
  if (n == 3) return write_control(value);
  Channel& c = channels_[n];
  switch (c.write_state) {
    case kMsb:
      load(n, static_cast<u32>(value) << 8);
      break;
    case kWord0:
      c.write_latch = value;
      c.write_state = kWord1;
      break;
    case kWord1:
      c.write_state = kWord0;
      load(n, c.write_latch | static_cast<u32>(value) << 8);
      break;
    default:
      load(n, value);
      break;
  }
}

u8 Pit::read(u16 port) {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    if (!speaker_port_) return 0;
    const Channel& c = channels_[2];
    // Bit 4 is the DRAM refresh toggle, every 15 µs.
    const u8 refresh = clock_.monotonic_ns() / 15'000 & 1;
    return static_cast<u8>((c.gate ? 1 : 0) | (flags_ & KVM_PIT_FLAGS_SPEAKER_DATA_ON ? 2 : 0) |
                           refresh << 4 | (output(c) ? 0x20 : 0));
  }
  if ((port & 0xfffc) != 0x40 || (port & 3) == 3) return 0;
  Channel& c = channels_[port & 3];
  if (c.status_latched) {
    c.status_latched = 0;
    return c.status;
  }
  if (c.count_latched) {
    switch (c.count_latched) {
      case kMsb:
        c.count_latched = 0;
        return static_cast<u8>(c.latched_count >> 8);
      case kWord0:
        c.count_latched = kMsb;
        return static_cast<u8>(c.latched_count);
      default:
        c.count_latched = 0;
        return static_cast<u8>(c.latched_count);
    }
  }
  const u32 count = counter(c);
  switch (c.read_state) {
    case kMsb:
      return static_cast<u8>(count >> 8);
    case kWord0:
      c.read_state = kWord1;
      return static_cast<u8>(count);
    case kWord1:
      c.read_state = kWord0;
      return static_cast<u8>(count >> 8);
    default:
      return static_cast<u8>(count);
  }
}

void Pit::get_state(kvm_pit_state* out) const {
  kvm_pit_state2 all;
  get_state(&all);
  std::memcpy(out->channels, all.channels, sizeof out->channels);
}

void Pit::get_state(kvm_pit_state2* out) const {
  const std::lock_guard lock(mutex_);
  std::memset(out, 0, sizeof *out);
  for (unsigned i = 0; i < 3; ++i) {
    out->channels[i] = channels_[i];
    out->channels[i].count_load_time = static_cast<i64>(channels_[i].loaded_ns);
  }
  out->flags = flags_;
}

void Pit::restore(const kvm_pit_channel_state (&channels)[3], u32 flags) {
  flags_ = flags;
  for (unsigned i = 0; i < 3; ++i) {
    static_cast<kvm_pit_channel_state&>(channels_[i]) = channels[i];
    load(i, channels[i].count);
  }
}

int Pit::set_state(const kvm_pit_state2& in) {
  const std::lock_guard lock(mutex_);
  restore(in.channels, in.flags);
  return 0;
}

int Pit::set_state(const kvm_pit_state& in) {
  const std::lock_guard lock(mutex_);
  restore(in.channels, flags_ & ~static_cast<u32>(KVM_PIT_FLAGS_HPET_LEGACY));
  return 0;
}

void Pit::set_reinject(bool on) {
  const std::lock_guard lock(mutex_);
  if (on && !reinject_) {
    pending_ticks_ = 0;
    acked_ = true;
  }
  reinject_ = on;
}

bool Pit::reinject() const {
  const std::lock_guard lock(mutex_);
  return reinject_;
}

}  // namespace ring3::engine
