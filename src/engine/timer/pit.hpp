#pragma once
#include <functional>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/timer/timer_queue.hpp"

/// 8254 programmable interval timer, three channels, and port 0x61.
///
/// Spec:      Intel 8254 datasheet; virt/kvm/api KVM_CREATE_PIT2, KVM_GET/SET_PIT2, KVM_REINJECT_CONTROL.
/// Modelled:  modes 0–5, binary counting (a channel set to BCD counts binary), counter latch,
///            read-back, LSB/MSB/both access; channel 0 raises IRQ 0, channel 2's gate and output stand in
///            port 0x61.
/// Deviation: a periodic channel 0 faster than 5 kHz interrupts at 5 kHz; the counter itself is exact.
///            With HPET legacy mode (KVM_PIT_FLAGS_HPET_LEGACY) channel 0 counts but does not interrupt.
/// Threading: everything from any thread; internally locked. tick runs on the TimerQueue's thread
///            with no lock of the Pit held.
/// Trust:     ports and values come from the guest; set_state's struct from the VMM.
namespace ring3::engine {

class Pit {
 public:
  static constexpr u64 kHz = 1193182;

  /// tick: a pulse of IRQ 0 (wire it to IrqChip::pit_tick).
  /// speaker_port: KVM_PIT_SPEAKER_DUMMY, port 0x61 belongs to the Pit.
  Pit(TimerQueue& timers, std::function<void()> tick, bool speaker_port);

  /// Whether the Pit answers port: 0x40–0x43, and 0x61 with speaker_port.
  bool handles(u16 port) const { return (port & 0xfffc) == 0x40 || (speaker_port_ && port == 0x61); }
  /// One byte. For handled ports only; other ports read 0 and ignore writes.
  u8 read(u16 port);
  void write(u16 port, u8 value);

  void get_state(kvm_pit_state2* out) const;
  /// KVM_SET_PIT2: counting restarts from the given counts. Any values are accepted; 0.
  int set_state(const kvm_pit_state2& in);
  /// KVM_GET/SET_PIT (no flags).
  void get_state(kvm_pit_state* out) const;
  int set_state(const kvm_pit_state& in);

  /// KVM_REINJECT_CONTROL. On (the default): a tick the guest has not acknowledged yet is kept and
  /// raised after the acknowledgement. Off: it is lost.
  void set_reinject(bool on);
  bool reinject() const;
  /// The guest acknowledged (EOI) GSI 0: wire it to IrqChip::add_ack_notifier(0, …). Any lock may be held.
  void irq_acked();
  /// The guest unmasked GSI 0 at the PIC or IOAPIC: ticks it missed while masked are forgotten. Wire it to
  /// IrqChip::set_unmask_notifier(0, …). Any lock may be held.
  void irq_unmasked();

 private:
  struct Channel : kvm_pit_channel_state {
    u64 loaded_ns = 0;  // when counting began
    u64 paused_ns = 0;  // when the gate stopped it; 0: it runs
  };
  void write_control(u8 value);
  void load(unsigned channel, u32 value);
  void start_timer();
  u64 elapsed_ticks(const Channel& c) const;
  u32 counter(const Channel& c) const;
  bool output(const Channel& c) const;
  void latch_count(Channel& c);
  void latch_status(Channel& c);
  void set_gate(unsigned channel, bool level);
  void restore(const kvm_pit_channel_state (&channels)[3], u32 flags);
  void on_timer();
  void inject();

  const Clock& clock_;
  const std::function<void()> tick_;
  const bool speaker_port_;
  mutable std::mutex mutex_;
  Channel channels_[3]{};
  u32 flags_ = 0;  // KVM_PIT_FLAGS_*
  bool reinject_ = true;
  bool acked_ = true;         // no tick is in flight
  u32 pending_ticks_ = 0;     // reinject: raised or waiting, as KVM counts them
  u64 next_tick_ns_ = 0;      // 0: channel 0's timer is off
  u64 period_ns_ = 0;         // 0: one-shot
  TimerQueue::Timer timer_;   // channel 0's next expiry
  TimerQueue::Timer inject_;  // a reinjection to be made outside the caller's locks
};

}  // namespace ring3::engine
