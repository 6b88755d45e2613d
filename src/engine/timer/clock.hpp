#pragma once
#include <atomic>
#include <mutex>

#include "base/types.hpp"

/// Host time as the engine's clocks and timers see it; injectable so that tests own time.
///
/// Units:     nanoseconds of CLOCK_MONOTONIC / CLOCK_REALTIME; ticks of the host's TSC; kHz.
/// Threading: any thread, lock-free.
namespace ring3::engine {

class Clock {
 public:
  virtual ~Clock() = default;
  virtual u64 monotonic_ns() const = 0;
  virtual u64 realtime_ns() const = 0;
  virtual u64 host_tsc() const = 0;
  /// Frequency of host_tsc(); never 0. The first call may take two milliseconds.
  virtual u32 host_tsc_khz() const = 0;
  /// Whether host_tsc() advances at that rate on all CPUs alike (invariant and synchronised).
  virtual bool tsc_stable() const = 0;
  /// Whether host_tsc() is the RDTSC instruction, which a reader may then execute itself.
  virtual bool is_rdtsc() const { return false; }
};

/// The machine's clocks. The TSC frequency comes from the first of CPUID leaf 0x15 (crystal × ratio), leaf 0x40000010
/// (hypervisor), a measurement against CLOCK_MONOTONIC_RAW. It is found once per HostClock, when it is first asked for: many
/// programs that open an engine never do. Make one per VM or per process.
class HostClock final : public Clock {
 public:
  HostClock();
  HostClock(const HostClock&) = delete;
  HostClock& operator=(const HostClock&) = delete;
  u64 monotonic_ns() const override;
  u64 realtime_ns() const override;
  u64 host_tsc() const override;
  u32 host_tsc_khz() const override {
    const u32 khz = khz_.load(std::memory_order_acquire);
    return khz != 0 ? khz : find_khz();
  }
  bool tsc_stable() const override { return stable_; }
  bool is_rdtsc() const override { return true; }

 private:
  // Both clocks at one moment.
  struct Sample {
    u64 tsc, ns;
  };
  static Sample sample();
  static u64 measure_khz(const Sample& begin);
  u32 find_khz() const;

  const Sample begin_;
  const bool stable_;
  mutable std::mutex mutex_;
  mutable std::atomic<u32> khz_{0};
};

/// Time that moves only by advance(): for tests. The TSC follows the monotonic clock at khz.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(u32 khz = 1'000'000) : khz_(khz) {}
  u64 monotonic_ns() const override { return ns_.load(std::memory_order_relaxed); }
  u64 realtime_ns() const override { return monotonic_ns() + 1'700'000'000'000'000'000u; }
  u64 host_tsc() const override {
    return static_cast<u64>(static_cast<u128>(monotonic_ns()) * khz_ / 1'000'000);
  }
  u32 host_tsc_khz() const override { return khz_; }
  bool tsc_stable() const override { return true; }
  void advance(u64 ns) { ns_.fetch_add(ns, std::memory_order_relaxed); }

 private:
  u32 khz_;
  std::atomic<u64> ns_{1'000'000'000};
};

}  // namespace ring3::engine
