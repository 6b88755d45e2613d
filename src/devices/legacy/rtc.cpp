#include "devices/legacy/rtc.hpp"

#include <algorithm>
#include <ctime>

namespace ring3::devices {
namespace {
enum : u8 { kSec = 0, kSecAlarm, kMin, kMinAlarm, kHour, kHourAlarm, kWday, kMday, kMonth, kYear, kA, kB, kC, kD };
constexpr u8 kCentury = 0x32;
constexpr u8 kUip = 0x80;
constexpr u8 kSet = 0x80, kPie = 0x40, kAie = 0x20, kUie = 0x10, kBinary = 0x04, k24h = 0x02;
constexpr u8 kIrqf = 0x80, kPf = 0x40, kAf = 0x20, kUf = 0x10;
constexpr i64 kSecond = 1'000'000'000;
constexpr i64 kUipNs = 244'000;  // datasheet, update cycle: UIP precedes it by 244 us
constexpr i64 kDay = 86400;
constexpr i64 kLatest = 8'900'000'000;  // in 2252: ns since 1970 stay within 63 bits, with room to run on

bool is_time(u8 index) { return index <= kYear || index == kCentury; }
bool is_alarm(u8 index) { return index == kSecAlarm || index == kMinAlarm || index == kHourAlarm; }
i64 floor_div(i64 a, i64 b) { return a / b - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0); }
}  // namespace

Rtc::Rtc(Config config) : config_(std::move(config)) {
  cmos_[kA] = 0x26;  // 32768 Hz divider, periodic rate 1024 Hz
  cmos_[kB] = k24h;
  cmos_[kD] = 0x80;  // battery good
  const auto put = [this](u8 low, u8 high, u64 value) {
    value = std::min<u64>(value, 0xffff);
    cmos_[low] = static_cast<u8>(value);
    cmos_[high] = static_cast<u8>(value >> 8);
  };
  constexpr u64 kMib = 1 << 20;
  const u64 above_1m = config_.low_memory > kMib ? config_.low_memory - kMib : 0;
  const u64 above_16m = config_.low_memory > 16 * kMib ? config_.low_memory - 16 * kMib : 0;
  put(0x15, 0x16, 640);
  put(0x17, 0x18, above_1m >> 10);
  put(0x30, 0x31, above_1m >> 10);
  put(0x34, 0x35, above_16m >> 16);
  const u64 high = std::min<u64>(config_.high_memory >> 16, 0xffffff);
  cmos_[0x5b] = static_cast<u8>(high);
  cmos_[0x5c] = static_cast<u8>(high >> 8);
  cmos_[0x5d] = static_cast<u8>(high >> 16);
  cmos_[0x5f] = static_cast<u8>(std::min<u32>(config_.cpus ? config_.cpus - 1 : 0, 255));
  last_second_ = floor_div(now_ns(), kSecond);
}

i64 Rtc::now_ns() const { return (config_.utc_ns ? config_.utc_ns() : 0) + offset_s_ * kSecond; }

u8 Rtc::encode(int value) const {
  return static_cast<u8>((cmos_[kB] & kBinary) ? value : (value / 10 % 10) << 4 | value % 10);
}
int Rtc::decode(u8 value) const { return (cmos_[kB] & kBinary) ? value : (value >> 4) * 10 + (value & 15); }

u8 Rtc::encode_hour(int hour) const {
  if (cmos_[kB] & k24h) return encode(hour);
  const int h12 = hour % 12 == 0 ? 12 : hour % 12;
  return static_cast<u8>(encode(h12) | (hour >= 12 ? 0x80 : 0));
}
int Rtc::decode_hour(u8 value) const {
  if (cmos_[kB] & k24h) return decode(value);
  return decode(value & 0x7f) % 12 + ((value & 0x80) ? 12 : 0);
}

void Rtc::read_time(i64 seconds) {
  const std::time_t t = seconds;
  std::tm tm{};
  gmtime_r(&t, &tm);
  cmos_[kSec] = encode(tm.tm_sec);
  cmos_[kMin] = encode(tm.tm_min);
  cmos_[kHour] = encode_hour(tm.tm_hour);
  cmos_[kWday] = encode(tm.tm_wday + 1);
  cmos_[kMday] = encode(tm.tm_mday);
  cmos_[kMonth] = encode(tm.tm_mon + 1);
  const int year = tm.tm_year + 1900;
  cmos_[kYear] = encode(year % 100);
  // The century byte is the firmware's, and BCD whatever register B says.
  cmos_[kCentury] = static_cast<u8>((year / 1000 % 10) << 4 | year / 100 % 10);
}

i64 Rtc::time_from_registers() const {
  std::tm tm{};
  tm.tm_sec = decode(cmos_[kSec]);
  tm.tm_min = decode(cmos_[kMin]);
  tm.tm_hour = decode_hour(cmos_[kHour]);
  tm.tm_mday = decode(cmos_[kMday]);
  tm.tm_mon = decode(cmos_[kMonth]) - 1;
  const int century = (cmos_[kCentury] >> 4) * 10 + (cmos_[kCentury] & 15);
  tm.tm_year = century * 100 + decode(cmos_[kYear]) - 1900;
  return timegm(&tm);
}

void Rtc::set_guest_time(i64 guest) {
  guest = std::clamp<i64>(guest, 0, kLatest);
  offset_s_ += guest - floor_div(now_ns(), kSecond);
  last_second_ = guest;
  next_periodic_ = 0;
}

bool Rtc::alarm_matches(i64 second) const {
  const i64 in_day = second - floor_div(second, kDay) * kDay;
  const auto field = [](u8 wanted, u8 now) { return wanted >= 0xc0 || wanted == now; };
  return field(cmos_[kSecAlarm], encode(static_cast<int>(in_day % 60))) &&
         field(cmos_[kMinAlarm], encode(static_cast<int>(in_day / 60 % 60))) &&
         field(cmos_[kHourAlarm], encode_hour(static_cast<int>(in_day / 3600)));
}

i64 Rtc::period_ns() const {
  u8 rate = cmos_[kA] & 15;
  if (rate == 0) return 0;
  if (rate <= 2) rate = static_cast<u8>(rate + 7);  // datasheet, table 5: 1 and 2 are 256 and 128 Hz
  return kSecond * (i64{1} << (rate - 1)) / 32768;
}

void Rtc::catch_up() {
  const i64 now = now_ns();
  const i64 second = floor_div(now, kSecond);
  if (!frozen_ && second > last_second_) {
    cmos_[kC] |= kUf;
    for (i64 s = std::max(last_second_ + 1, second - kDay); s <= second; s++) {
      if (!alarm_matches(s)) continue;
      cmos_[kC] |= kAf;
      break;
    }
  }
  last_second_ = second;  // also when the host's clock went backwards
  if (const i64 period = period_ns(); period != 0) {
    if (next_periodic_ == 0 || next_periodic_ > now + period) next_periodic_ = now + period;
    if (now >= next_periodic_) {
      cmos_[kC] |= kPf;  // missed ones are one
      next_periodic_ = now - (now - next_periodic_) % period + period;
    }
  }
  update_irq();
}

void Rtc::update_irq() {
  const bool level = (cmos_[kC] & cmos_[kB] & (kPf | kAf | kUf)) != 0;
  cmos_[kC] = static_cast<u8>((cmos_[kC] & ~kIrqf) | (level ? kIrqf : 0));
  if (level == line_) return;
  line_ = level;
  if (config_.irq) config_.irq(level);
}

std::optional<i64> Rtc::poll() {
  std::lock_guard lock(mutex_);
  catch_up();
  const i64 now = now_ns();
  std::optional<i64> next;
  if ((cmos_[kB] & (kAie | kUie)) && !frozen_) next = (last_second_ + 1) * kSecond - now;
  if ((cmos_[kB] & kPie) && period_ns() != 0) {
    const i64 periodic = next_periodic_ - now;
    next = next ? std::min(*next, periodic) : periodic;
  }
  if (next) next = std::clamp<i64>(*next, 0, kSecond);
  return next;
}

u8 Rtc::read_register() {
  if (is_time(index_) && !is_alarm(index_)) {
    if (!frozen_) read_time(floor_div(now_ns(), kSecond));
    return cmos_[index_];
  }
  switch (index_) {
    case kA: {
      const i64 now = now_ns();
      const bool updating = !frozen_ && now - floor_div(now, kSecond) * kSecond >= kSecond - kUipNs;
      return static_cast<u8>((cmos_[kA] & ~kUip) | (updating ? kUip : 0));
    }
    case kC: {
      catch_up();
      const u8 value = cmos_[kC];
      cmos_[kC] = 0;
      update_irq();
      return value;
    }
    default:
      return cmos_[index_];
  }
}

void Rtc::write_register(u8 value) {
  if (is_time(index_) && !is_alarm(index_)) {
    if (!frozen_) read_time(floor_div(now_ns(), kSecond));
    cmos_[index_] = value;
    if (!frozen_) {
      set_guest_time(time_from_registers());
    }
    return;
  }
  switch (index_) {
    case kA:
      catch_up();
      cmos_[kA] = value & 0x7f;
      next_periodic_ = 0;
      break;
    case kB: {
      catch_up();
      const bool set = (value & kSet) != 0;
      if (set && !frozen_) read_time(floor_div(now_ns(), kSecond));
      // The registers are read back in the format in force when they were written.
      if (!set && frozen_) {
        cmos_[kB] = static_cast<u8>((cmos_[kB] & ~(kBinary | k24h)) | (value & (kBinary | k24h)));
        set_guest_time(time_from_registers());
      }
      frozen_ = set;
      cmos_[kB] = set ? static_cast<u8>(value & ~kUie) : value;  // datasheet: SET clears UIE
      update_irq();
      break;
    }
    case kC:
    case kD:
      break;  // read-only
    default:
      cmos_[index_] = value;
      break;
  }
}

void Rtc::read(u64 offset, std::span<u8> data) {
  std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) {
    if (offset + i == 1) data[i] = read_register();  // the index port does not read back
  }
}

void Rtc::write(u64 offset, std::span<const u8> data) {
  bool changed = false;
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) {
      if (offset + i == 0) {
        index_ = data[i] & 0x7f;  // bit 7 masks NMI
      } else {
        write_register(data[i]);
        changed |= index_ <= kB;
      }
    }
  }
  if (changed && config_.on_change) config_.on_change();
}

Rtc::State Rtc::state() const {
  std::lock_guard lock(mutex_);
  return {cmos_, index_, offset_s_, frozen_};
}

void Rtc::restore(const State& s) {
  std::lock_guard lock(mutex_);
  cmos_ = s.cmos;
  index_ = s.index & 0x7f;
  frozen_ = s.frozen;
  offset_s_ = 0;
  const i64 host = floor_div(now_ns(), kSecond);
  set_guest_time(host + std::clamp<i64>(s.offset_s, -kLatest, kLatest));
  update_irq();
}

}  // namespace ring3::devices
