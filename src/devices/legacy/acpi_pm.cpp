#include "devices/legacy/acpi_pm.hpp"

namespace ring3::devices {
namespace {
constexpr u16 kTimerStatus = 1 << 0, kPowerButton = 1 << 8;
constexpr u16 kStatusBits = 0x8731;  // TMR, BM, GBL, PWRBTN, SLPBTN, RTC, WAK
constexpr u16 kEnableBits = 0x0721;
constexpr u16 kSciEnable = 1 << 0, kSleepEnable = 1 << 13;
constexpr u64 kNs = 1'000'000'000;
}  // namespace

AcpiPm::AcpiPm(Config config) : config_(std::move(config)) {
  start_ns_ = config_.monotonic_ns ? config_.monotonic_ns() : 0;
}

u32 AcpiPm::timer() const {
  const u64 now = config_.monotonic_ns ? config_.monotonic_ns() : 0;
  const u64 elapsed = now - start_ns_;
  // In two steps: ns * 3.58 MHz overflows 64 bits after 86 minutes.
  const u64 ticks = elapsed / kNs * kTimerHz + elapsed % kNs * kTimerHz / kNs;
  return static_cast<u32>(s_.timer + ticks);
}

void AcpiPm::update_sci() {
  const bool level = ((s_.pm1_status & s_.pm1_enable) & kEnableBits & ~kTimerStatus) != 0 ||
                     (s_.gpe_status & s_.gpe_enable) != 0;
  if (level == line_) return;
  line_ = level;
  if (config_.sci) config_.sci(level);
}

u8 AcpiPm::read_byte(u64 offset) {
  const auto byte = [](u64 v, u64 i) { return static_cast<u8>(v >> (8 * i)); };
  switch (offset) {
    case 0: {
      const u64 msb = timer() >> 31;
      if (msb != seen_carries_) s_.pm1_status |= kTimerStatus;
      seen_carries_ = msb;
      return byte(s_.pm1_status, 0);
    }
    case 1:
      return byte(s_.pm1_status, 1);
    case 2:
    case 3:
      return byte(s_.pm1_enable, offset - 2);
    case 4:
    case 5:
      return byte(s_.pm1_control | kSciEnable, offset - 4);
    case 0x20:
    case 0x21:
      return byte(s_.gpe_status, offset - 0x20);
    case 0x22:
    case 0x23:
      return byte(s_.gpe_enable, offset - 0x22);
    default:
      return 0;
  }
}

void AcpiPm::read(u64 offset, std::span<u8> data) {
  std::lock_guard lock(mutex_);
  const u32 count = timer();  // one value for all bytes of an access
  for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) {
    const u64 at = offset + i;
    data[i] = at >= kTimer && at < kTimer + 4 ? static_cast<u8>(count >> (8 * (at - kTimer))) : read_byte(at);
  }
}

// Returns whether the guest asked for power-off.
bool AcpiPm::write_byte(u64 offset, u8 value) {
  const auto replace = [value](u16 old, u64 i) {
    return static_cast<u16>(i == 0 ? (old & 0xff00) | value : (old & 0x00ff) | value << 8);
  };
  switch (offset) {
    case 0:
    case 1:
      s_.pm1_status &= static_cast<u16>(~(value << (8 * offset)) & kStatusBits);
      break;
    case 2:
    case 3:
      s_.pm1_enable = replace(s_.pm1_enable, offset - 2) & kEnableBits;
      break;
    case 4:
    case 5: {
      const u16 written = replace(s_.pm1_control, offset - 4);
      s_.pm1_control = written & static_cast<u16>(~kSleepEnable);  // SLP_EN reads 0
      if ((written & kSleepEnable) && ((written >> 10) & 7) == kSleepTypeS5) return true;
      break;
    }
    case 0x20:
    case 0x21:
      s_.gpe_status &= static_cast<u16>(~(value << (8 * (offset - 0x20))));
      break;
    case 0x22:
    case 0x23:
      s_.gpe_enable = replace(s_.gpe_enable, offset - 0x22);
      break;
    default:
      break;
  }
  return false;
}

void AcpiPm::write(u64 offset, std::span<const u8> data) {
  bool off = false;
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) off |= write_byte(offset + i, data[i]);
    update_sci();
  }
  if (off && config_.power_off) config_.power_off();
}

bool AcpiPm::press_power_button() {
  std::lock_guard lock(mutex_);
  s_.pm1_status |= kPowerButton;
  update_sci();
  return (s_.pm1_enable & kPowerButton) != 0;
}

void AcpiPm::raise_gpe(u32 gpe) {
  if (gpe >= 16) return;
  std::lock_guard lock(mutex_);
  s_.gpe_status |= static_cast<u16>(1u << gpe);
  update_sci();
}

AcpiPm::State AcpiPm::state() const {
  std::lock_guard lock(mutex_);
  State s = s_;
  s.timer = timer();
  return s;
}

void AcpiPm::restore(const State& state) {
  std::lock_guard lock(mutex_);
  s_ = state;
  s_.pm1_status &= kStatusBits;
  s_.pm1_enable &= kEnableBits;
  s_.pm1_control &= static_cast<u16>(~kSleepEnable);
  start_ns_ = config_.monotonic_ns ? config_.monotonic_ns() : 0;
  seen_carries_ = s_.timer >> 31;
  update_sci();
}

void ResetRegister::read(u64 offset, std::span<u8> data) {
  std::lock_guard lock(mutex_);
  if (offset == 0 && !data.empty()) data[0] = value_;
}

void ResetRegister::write(u64 offset, std::span<const u8> data) {
  if (offset != 0 || data.empty()) return;
  bool reset = false;
  {
    std::lock_guard lock(mutex_);
    reset = (data[0] & 4) && !(value_ & 4);
    value_ = data[0] & 0x0a;  // RST_CPU does not stay set
  }
  if (reset && reset_) reset_();
}

}  // namespace ring3::devices
