#include "devices/legacy/i8042.hpp"

namespace ring3::devices {
namespace {
constexpr u8 kStatusOutputFull = 0x01, kStatusSystem = 0x04, kStatusCommand = 0x08, kStatusUnlocked = 0x10,
             kStatusTimeout = 0x40;
constexpr u8 kOutputReset = 0x01;  // active low: the CPU runs while it is set
constexpr u8 kNoDevice = 0x02;     // interface test: clock line stuck high
constexpr u8 kResend = 0xfe;
}  // namespace

void I8042::read(u64 offset, std::span<u8> data) {
  std::lock_guard lock(mutex_);
  if (data.empty()) return;
  if (offset == 0) {
    data[0] = s_.output;
    s_.output_full = false;
    s_.timeout = false;
  } else if (offset == 1) {
    data[0] = static_cast<u8>((s_.output_full ? kStatusOutputFull : 0) | kStatusSystem | kStatusUnlocked |
                              (s_.last_was_command ? kStatusCommand : 0) | (s_.timeout ? kStatusTimeout : 0));
  }
}

void I8042::write(u64 offset, std::span<const u8> bytes) {
  if (bytes.empty() || offset > 1) return;
  bool reset = false;
  {
    std::lock_guard lock(mutex_);
    s_.last_was_command = offset == 1;
    reset = offset == 1 ? command(bytes[0]) : data(bytes[0]);
  }
  if (reset && reset_) reset_();
}

// Both return whether the CPU's reset line was pulled.
bool I8042::command(u8 value) {
  s_.pending = 0;
  switch (value) {
    case 0x20:
      answer(s_.command_byte);
      break;
    case 0xa7:  // disable, enable the mouse port; likewise the keyboard's
      s_.command_byte |= 0x20;
      break;
    case 0xa8:
      s_.command_byte &= static_cast<u8>(~0x20);
      break;
    case 0xad:
      s_.command_byte |= 0x10;
      break;
    case 0xae:
      s_.command_byte &= static_cast<u8>(~0x10);
      break;
    case 0xa9:
      answer(kNoDevice);
      break;
    case 0xaa:
      answer(0x55);
      break;
    case 0xab:
      answer(0x00);
      break;
    case 0xc0:
      answer(0x80);  // input port: keyboard not locked
      break;
    case 0xd0:
      answer(s_.output_port);
      break;
    case 0x60:
    case 0xd1:
    case 0xd2:
    case 0xd3:
    case 0xd4:
      s_.pending = value;
      break;
    default:
      if (value >= 0xf0) return (value & kOutputReset) == 0;  // pulses the low bits that are 0
      break;
  }
  return false;
}

bool I8042::data(u8 value) {
  const u8 pending = s_.pending;
  s_.pending = 0;
  switch (pending) {
    case 0x60:
      s_.command_byte = value;
      return false;
    case 0xd1:
      s_.output_port = value;
      return (value & kOutputReset) == 0;
    case 0xd2:
      answer(value);
      return false;
    case 0xd3:
      answer(static_cast<u8>(~value));  // a loop that does not come back whole: no mouse port
      return false;
    default:  // to the keyboard, or with 0xd4 to the mouse: neither is there
      answer(kResend);
      s_.timeout = true;
      return false;
  }
}

I8042::State I8042::state() const {
  std::lock_guard lock(mutex_);
  return s_;
}

void I8042::restore(const State& state) {
  std::lock_guard lock(mutex_);
  s_ = state;
}

void Port92::read(u64 offset, std::span<u8> data) {
  if (offset == 0 && !data.empty()) data[0] = 0x02;
}

void Port92::write(u64 offset, std::span<const u8> data) {
  if (offset == 0 && !data.empty() && (data[0] & 1) && reset_) reset_();
}

}  // namespace ring3::devices
