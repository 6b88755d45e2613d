#include "engine/timer/clock.hpp"

#include <cpuid.h>
#include <time.h>
#include <x86intrin.h>

#include <cstdio>
#include <cstring>

namespace ring3::engine {
namespace {

u64 read_clock(clockid_t id) {
  timespec ts{};
  clock_gettime(id, &ts);
  return static_cast<u64>(ts.tv_sec) * 1'000'000'000 + static_cast<u64>(ts.tv_nsec);
}

struct Sample {
  u64 tsc, ns;
};

// The pair whose two TSC reads stand closest together: least disturbed by interrupts and preemption.
Sample sample() {
  Sample best{};
  u64 width = ~0ull;
  for (int i = 0; i < 20; ++i) {
    const u64 a = __rdtsc();
    const u64 ns = read_clock(CLOCK_MONOTONIC);
    const u64 b = __rdtsc();
    if (b - a < width) {
      width = b - a;
      best = {a + (b - a) / 2, ns};
    }
  }
  return best;
}

u64 measure_khz(long sleep_ns) {
  const Sample a = sample();
  const timespec nap{0, sleep_ns};
  nanosleep(&nap, nullptr);
  const Sample b = sample();
  if (b.ns <= a.ns || b.tsc <= a.tsc) return 0;
  return static_cast<u64>(static_cast<u128>(b.tsc - a.tsc) * 1'000'000 / (b.ns - a.ns));
}

u64 cpuid_khz() {
  u32 a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0x15, &a, &b, &c, &d) && a && b && c) {
    return static_cast<u64>(c) * b / a / 1000;
  }
  if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 31 & 1)) {
    __cpuid(0x40000000, a, b, c, d);
    if (a >= 0x40000010 && a < 0x40010000) {
      __cpuid(0x40000010, a, b, c, d);
      return a;
    }
  }
  return 0;
}

u32 find_khz() {
  const u64 told = cpuid_khz();
  if (told) {
    // CPUID may be another machine's under a careless hypervisor: believe it within 1 %.
    const u64 seen = measure_khz(1'000'000);
    if (told <= ~0u && seen && told > seen - seen / 100 && told < seen + seen / 100)
      return static_cast<u32>(told);
  }
  const u64 khz = measure_khz(10'000'000);
  return khz && khz <= ~0u ? static_cast<u32>(khz) : 1'000'000;
}

bool find_stable() {
  u32 a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(0x80000007, &a, &b, &c, &d) && (d >> 8 & 1)) return true;
  // A hypervisor may hide the bit, and still the kernel trusts the TSC.
  std::FILE* f = std::fopen("/sys/devices/system/clocksource/clocksource0/current_clocksource", "re");
  if (!f) return false;
  char name[16] = {};
  const bool tsc = std::fgets(name, sizeof name, f) && std::strncmp(name, "tsc", 3) == 0;
  std::fclose(f);
  return tsc;
}

}  // namespace

HostClock::HostClock() : khz_(find_khz()), stable_(find_stable()) {}
u64 HostClock::monotonic_ns() const { return read_clock(CLOCK_MONOTONIC); }
u64 HostClock::realtime_ns() const { return read_clock(CLOCK_REALTIME); }
u64 HostClock::host_tsc() const { return __rdtsc(); }

}  // namespace ring3::engine
