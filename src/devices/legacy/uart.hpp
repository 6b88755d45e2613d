#pragma once
#include <array>
#include <deque>
#include <functional>
#include <mutex>
#include <vector>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// 16550A serial port: eight byte-wide registers, one interrupt line.
///
/// Spec:      PC16550D datasheet; the section stands at each register.
/// Modelled:  FIFOs with trigger levels, interrupt priority, loopback (guests probe with it), modem status.
/// Deviation: the baud rate is stored but does not pace output; the character time-out interrupt comes
///            at once. Bytes from the host wait until the guest asserts RTS or enables the receive
///            interrupt, as under hardware flow control: what is typed during boot is not lost.
/// Threading: read/write on any vCPU thread, receive on the I/O thread; mutex_ guards all registers.
///            transmit is called with mutex_ held, so that output keeps the guest's order.
/// Trust:     offset, length and value come from the guest.
/// Snapshot:  State holds registers and FIFO contents, and what the host has sent ahead.
class Uart final : public Device {
 public:
  static constexpr u64 kPorts = 8;
  static constexpr std::size_t kFifo = 16;
  static constexpr std::size_t kQueue = 4096;  ///< bytes held for the guest beyond the FIFO

  struct Config {
    IrqLine irq;
    std::function<void(u8)> transmit;
    /// The receive queue has room again after receive() had refused bytes. Any vCPU thread, no lock held.
    std::function<void()> on_room;
  };

  struct State {
    u8 ier = 0, lcr = 0, mcr = 0, lsr_errors = 0, msr_delta = 0, scr = 0, dll = 0, dlm = 0, fcr = 0;
    bool thre_pending = false;
    std::vector<u8> fifo;
    std::vector<u8> queue;
  };

  explicit Uart(Config config) : config_(std::move(config)) {}

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  /// Bytes that receive() would take now.
  std::size_t room() const;
  /// Takes bytes for the guest; returns how many (back-pressure: on_room tells when to come again).
  std::size_t receive(std::span<const u8> bytes);

  State state() const;
  /// Over-long FIFO contents are cut; the interrupt line follows.
  void restore(const State& state);

 private:
  u8 read_register(u64 offset, bool& freed);
  void write_register(u64 offset, u8 value);
  std::size_t fifo_depth() const { return (fcr_ & 1) ? kFifo : 1; }
  void push_fifo(u8 byte);
  bool refill();
  u8 msr_lines() const;
  u8 interrupt_id() const;
  void update_irq();

  Config config_;
  mutable std::mutex mutex_;
  u8 ier_ = 0, lcr_ = 0, mcr_ = 0, scr_ = 0, dll_ = 0x0c, dlm_ = 0, fcr_ = 0;
  u8 lsr_errors_ = 0;  // bits 1..4 of LSR, cleared by reading it
  u8 msr_delta_ = 0;
  bool thre_pending_ = false;
  bool line_ = false;
  bool refused_ = false;
  std::deque<u8> fifo_;
  std::deque<u8> queue_;
};

}  // namespace ring3::devices
