#pragma once
#include <map>
#include <mutex>
#include <vector>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// fw_cfg: numbered items a guest reads byte by byte. Port 0 selects (16 bits), port 1 is the data.
///
/// Spec:      QEMU docs/specs/fw_cfg. The traditional interface; ID says that there is no DMA.
/// Threading: any vCPU thread; mutex_ guards the selection. Items are set before the guest runs.
/// Trust:     the selector comes from the guest; unknown items and reads past the end give 0.
/// Snapshot:  State holds the selection.
class FwCfg final : public Device {
 public:
  static constexpr u64 kPorts = 2;
  static constexpr u16 kSignature = 0, kId = 1, kRamSize = 3, kCpuCount = 5, kFileDirectory = 0x19;

  struct State {
    u16 selector = 0;
    u64 position = 0;
  };

  FwCfg();
  void set(u16 key, std::vector<u8> bytes) { items_[key] = std::move(bytes); }
  void set_u16(u16 key, u16 value);
  void set_u64(u16 key, u64 value);

  void read(u64 offset, std::span<u8> data) override;
  void write(u64 offset, std::span<const u8> data) override;

  State state() const;
  void restore(const State& state);

 private:
  std::map<u16, std::vector<u8>> items_;
  mutable std::mutex mutex_;
  State s_;
};

}  // namespace ring3::devices
