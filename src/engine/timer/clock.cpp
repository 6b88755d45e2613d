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

// A sample is off by a few nanoseconds: over two milliseconds that is about one in a million.
constexpr u64 kShortest = 2'000'000, kLongest = 1'000'000'000;

}  // namespace

// The pair whose two TSC reads stand closest together: least disturbed by interrupts and preemption.
HostClock::Sample HostClock::sample() {
  Sample best{};
  u64 width = ~0ull;
  for (int i = 0; i < 20; ++i) {
    const u64 a = __rdtsc();
    const u64 ns = read_clock(CLOCK_MONOTONIC_RAW);
    const u64 b = __rdtsc();
    if (b - a < width) {
      width = b - a;
      best = {a + (b - a) / 2, ns};
    }
  }
  return best;
}

u64 HostClock::measure_khz(const Sample& begin) {
  const Sample end = sample();
  if (end.ns <= begin.ns || end.tsc <= begin.tsc) return 0;
  return static_cast<u64>(static_cast<u128>(end.tsc - begin.tsc) * 1'000'000 / (end.ns - begin.ns));
}

u32 HostClock::find_khz() const {
  const std::lock_guard lock(mutex_);
  if (const u32 khz = khz_.load(std::memory_order_relaxed); khz != 0) return khz;
  // What has passed since this clock was made serves as the interval, unless the host may have slept in it.
  Sample begin = begin_;
  u64 now = read_clock(CLOCK_MONOTONIC_RAW);
  if (now - begin.ns > kLongest) {
    begin = sample();
    now = begin.ns;
  }
  // No sleep: whoever asks first may be in a jail that knows of none.
  while (now - begin.ns < kShortest) {
    _mm_pause();
    now = read_clock(CLOCK_MONOTONIC_RAW);
  }
  const u64 seen = measure_khz(begin);
  const u64 told = cpuid_khz();
  // CPUID may be another machine's under a careless hypervisor: believe it within 1 %.
  u64 khz = told && told > seen - seen / 100 && told < seen + seen / 100 ? told : seen;
  if (khz == 0 || khz > ~0u) khz = 1'000'000;
  khz_.store(static_cast<u32>(khz), std::memory_order_release);
  return static_cast<u32>(khz);
}

HostClock::HostClock() : begin_(sample()), stable_(find_stable()) {}
u64 HostClock::monotonic_ns() const { return read_clock(CLOCK_MONOTONIC); }
u64 HostClock::realtime_ns() const { return read_clock(CLOCK_REALTIME); }
u64 HostClock::host_tsc() const { return __rdtsc(); }

}  // namespace ring3::engine
