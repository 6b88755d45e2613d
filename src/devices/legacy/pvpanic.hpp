#pragma once
#include <functional>

#include "devices/bus/device.hpp"

namespace ring3::devices {

/// pvpanic: one port at which a guest kernel's driver reports its panic.
///
/// Spec:      QEMU docs/specs/pvpanic: reading gives the events the device knows; writing a bit reports it.
/// Threading: any vCPU thread; no state.
/// Trust:     the value comes from the guest; unknown bits are ignored.
class PvPanic final : public Device {
 public:
  static constexpr u8 kPanicked = 1, kCrashLoaded = 2;
  /// panicked: the guest is dead. crash_loaded: it panicked and is about to run its crash kernel.
  PvPanic(std::function<void()> panicked, std::function<void()> crash_loaded)
      : panicked_(std::move(panicked)), crash_loaded_(std::move(crash_loaded)) {}

  void read(u64 offset, std::span<u8> data) override {
    if (offset == 0 && !data.empty()) data[0] = kPanicked | kCrashLoaded;
  }
  void write(u64 offset, std::span<const u8> data) override {
    if (offset != 0 || data.empty()) return;
    if ((data[0] & kCrashLoaded) && crash_loaded_) crash_loaded_();
    if ((data[0] & kPanicked) && panicked_) panicked_();
  }

 private:
  std::function<void()> panicked_;
  std::function<void()> crash_loaded_;
};

}  // namespace ring3::devices
