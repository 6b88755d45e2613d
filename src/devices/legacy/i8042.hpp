#pragma once
#include <functional>
#include <memory>
#include <mutex>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// Keyboard controller (ports 0x60 and 0x64) with nothing plugged in: it is there for guests that
/// reset through it.
///
/// Spec:      Intel 8042 / IBM PC AT technical reference, keyboard controller commands.
/// Modelled:  status, command byte, self tests, output port, pulse commands (0xfe resets). What is sent
///            to the absent keyboard is answered by "resend" with the time-out bit, what asks for the
///            absent mouse port by an error, so that probes end at once.
/// Deviation: A20 is always open. No interrupts: there is no input.
/// Threading: any vCPU thread; mutex_ guards all. reset is called without it.
/// Trust:     offset, length and value come from the guest.
/// Snapshot:  State holds the registers.
class I8042 final : public Device {
 public:
  // Two windows of one byte: see OffsetWindow.

  struct State {
    u8 command_byte = 0x30, output = 0, output_port = 0x03, pending = 0;
    bool output_full = false, timeout = false, last_was_command = false;
  };

  explicit I8042(std::function<void()> reset) : reset_(std::move(reset)) {}

  /// offset 0: the data port 0x60; offset 1: the command port 0x64.
  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  State state() const;
  void restore(const State& state);

 private:
  void answer(u8 value) {
    s_.output = value;
    s_.output_full = true;
    s_.timeout = false;
  }
  bool command(u8 value);
  bool data(u8 value);

  std::function<void()> reset_;
  mutable std::mutex mutex_;
  State s_;
};

/// The i8042 stands at two ports that are not neighbours: a bus window for the second one.
class OffsetWindow final : public Device {
 public:
  OffsetWindow(std::shared_ptr<Device> device, u64 offset) : device_(std::move(device)), offset_(offset) {}
  void read(u64 offset, std::span<u8> data) override { device_->read(offset_ + offset, data); }
  void write(u64 offset, std::span<const u8> data) override { device_->write(offset_ + offset, data); }

 private:
  std::shared_ptr<Device> device_;
  u64 offset_;
};

/// System control port A (0x92): bit 0 resets, bit 1 is the A20 gate, which is always open here.
///
/// Spec:      IBM PS/2 technical reference.
/// Threading: any vCPU thread, no state but the A20 bit as last written.
/// Trust:     the value comes from the guest.
class Port92 final : public Device {
 public:
  explicit Port92(std::function<void()> reset) : reset_(std::move(reset)) {}
  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

 private:
  std::function<void()> reset_;
};

}  // namespace ring3::devices
