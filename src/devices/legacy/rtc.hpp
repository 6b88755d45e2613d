#pragma once
#include <array>
#include <functional>
#include <mutex>
#include <optional>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// MC146818A real-time clock with 128 bytes of CMOS RAM, at an index and a data port.
///
/// Spec:      MC146818A datasheet; the PC's additions: century at 0x32, memory sizes at 0x15-0x18,
///            0x30/0x31, 0x34/0x35, 0x5b-0x5d, count of processors less one at 0x5f.
/// Modelled:  BCD and binary, 12 and 24 hours, SET, UIP, alarm with don't-care bytes, periodic,
///            alarm and update-ended interrupts.
/// Deviation: runs on the host's UTC, whose leap seconds and steps it follows; the divider chain and
///            daylight saving do nothing; an alarm more than a day late is dropped; a time before 1970 or after
///            2252 that the guest sets becomes the nearest in between.
/// Threading: read/write on any vCPU thread, poll on the I/O thread; mutex_ guards all.
/// Trust:     index and values come from the guest; any byte may stand in any register.
/// Snapshot:  State holds the CMOS bytes, the index and the clock's offset from the host's.
class Rtc final : public Device {
 public:
  static constexpr u64 kPorts = 2;

  struct Config {
    IrqLine irq;
    std::function<i64()> utc_ns;      ///< ns since 1970; the host's real time
    std::function<void()> on_change;  ///< poll() should be asked again; any vCPU thread, no lock held
    u64 low_memory = 0;               ///< bytes of RAM below 4 GiB
    u64 high_memory = 0;              ///< bytes of RAM above 4 GiB
    u32 cpus = 1;
  };

  struct State {
    std::array<u8, 128> cmos{};
    u8 index = 0;
    i64 offset_s = 0;
    bool frozen = false;
  };

  explicit Rtc(Config config);

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  /// Raises what is due. Returns the ns from now after which to call again; nothing while no
  /// interrupt is enabled.
  std::optional<i64> poll();

  State state() const;
  void restore(const State& state);

 private:
  i64 now_ns() const;
  void read_time(i64 seconds);
  i64 time_from_registers() const;
  void set_guest_time(i64 seconds);
  u8 encode(int value) const;
  int decode(u8 value) const;
  u8 encode_hour(int hour) const;
  int decode_hour(u8 value) const;
  bool alarm_matches(i64 second) const;
  void catch_up();
  void update_irq();
  u8 read_register();
  void write_register(u8 value);
  i64 period_ns() const;

  Config config_;
  mutable std::mutex mutex_;
  std::array<u8, 128> cmos_{};
  u8 index_ = 0;
  i64 offset_s_ = 0;     // guest time less host time
  bool frozen_ = false;  // SET: the time registers hold what the guest writes
  i64 last_second_ = 0;  // up to which alarm and update flags are accounted for
  i64 next_periodic_ = 0;
  bool line_ = false;
};

}  // namespace ring3::devices
