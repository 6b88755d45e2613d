#pragma once
#include <array>
#include <functional>
#include <memory>
#include <mutex>

#include "base/result.hpp"
#include "devices/bus/bus.hpp"

namespace ring3::devices {

/// The test device that the field's unit-test guests talk to.
///
/// Ports:     0xe0-0xe3 echo what was last written; 0xe4 flush (accepted: RAM never moves here, so
///            there is nothing to do); 0xe8 echoes one byte; 0x2000+n (n < 24) drives interrupt line n
///            with the level value != 0; 0xf4 ends the run with status value*2+1, low 8 bits.
/// Memory:    64 KiB of plain storage at 0xff000000, reached access by access.
/// Threading: any vCPU thread; mutex_ guards the contents, the callbacks are called without it.
/// Trust:     everything comes from the guest.
/// Snapshot:  State holds the echo registers and the storage.
class TestDevice {
 public:
  static constexpr u64 kEchoPort = 0xe0, kFlushPort = 0xe4, kByteEchoPort = 0xe8, kExitPort = 0xf4,
                       kIrqPort = 0x2000, kIrqLines = 24, kMemory = 0xff000000, kMemorySize = 0x10000;

  struct Config {
    std::function<void(u32 line, bool level)> irq;
    std::function<void(u8 status)> exit;
  };
  struct State {
    std::array<u8, 4> echo{};
    u8 byte_echo = 0;
    std::vector<u8> memory;
  };

  explicit TestDevice(Config config);
  ~TestDevice();

  /// Registers all windows. The buses share what they need; the TestDevice may go.
  Status attach(Bus& ports, Bus& memory) const;

  State state() const;
  void restore(const State& state);

 private:
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

}  // namespace ring3::devices
