#pragma once
#include <functional>
#include <mutex>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// ACPI fixed hardware: PM1a event and control blocks, PM timer, one GPE block, in one window of ports.
///
/// Spec:      ACPI 6.4, 4.8.3 (PM1), 4.8.2.1 (timer), 4.8.4.1 (GPE).
/// Layout:    0x00 PM1_STS, 0x02 PM1_EN, 0x04 PM1_CNT, 0x08 PM_TMR, 0x20 GPE0_STS, 0x22 GPE0_EN.
/// Modelled:  write-one-to-clear status, power button, SCI as the OR of status and enable,
///            SLP_EN with the S5 type as power-off. SCI_EN reads 1: there is no SMM to hand over from.
/// Deviation: the timer's carry status is computed when PM1_STS is read and raises no SCI.
/// Threading: any thread; mutex_ guards all. power_off is called without it.
/// Trust:     offset, length and value come from the guest.
/// Snapshot:  State holds the registers and the timer's count.
class AcpiPm final : public Device {
 public:
  static constexpr u64 kPorts = 0x40;
  static constexpr u64 kPm1Event = 0x00, kPm1Control = 0x04, kTimer = 0x08, kGpe0 = 0x20;
  static constexpr u64 kGpe0Bytes = 4;
  static constexpr u8 kSleepTypeS5 = 5;
  static constexpr u64 kTimerHz = 3579545;

  struct Config {
    IrqLine sci;
    std::function<void()> power_off;
    std::function<u64()> monotonic_ns;
  };

  struct State {
    u16 pm1_status = 0, pm1_enable = 0, pm1_control = 0, gpe_status = 0, gpe_enable = 0;
    u32 timer = 0;
  };

  explicit AcpiPm(Config config);

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  /// Whether the guest has enabled the button's event: one that has not will do nothing.
  bool press_power_button();
  /// Sets status bit `gpe` (0 to 15) of GPE0.
  void raise_gpe(u32 gpe);

  State state() const;
  void restore(const State& state);

 private:
  u32 timer() const;
  u8 read_byte(u64 offset);
  bool write_byte(u64 offset, u8 value);
  void update_sci();

  Config config_;
  mutable std::mutex mutex_;
  State s_;              // s_.timer: the count at start_ns_
  u64 start_ns_ = 0;
  u64 seen_carries_ = 0; // of bit 31
  bool line_ = false;
};

/// Reset control register of the PIIX and ICH chipsets (0xcf9), which the FADT names.
///
/// Spec:      Intel ICH9 datasheet, 13.7.5 RST_CNT: a rising RST_CPU (bit 2) resets.
/// Threading: any vCPU thread; mutex_ guards the register.
class ResetRegister final : public Device {
 public:
  static constexpr u8 kResetValue = 0x06;
  explicit ResetRegister(std::function<void()> reset) : reset_(std::move(reset)) {}
  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  std::function<void()> reset_;
  std::mutex mutex_;
  u8 value_ = 0;
};

}  // namespace ring3::devices
