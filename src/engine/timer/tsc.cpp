#include "engine/timer/tsc.hpp"

#include <cerrno>

namespace ring3::engine {
namespace {

// As KVM's tsc_tolerance_ppm: a rate this near the host's is served unscaled.
constexpr u64 kTolerancePpm = 250;

constexpr u64 kForeverNs = 3'153'600'000ull * 1'000'000'000ull;  // a hundred years

}  // namespace

bool TscSync::all_matched() const {
  const std::lock_guard lock(mutex_);
  const Tsc* first = nullptr;
  for (const Tsc* t : vcpus_) {
    if (!first) first = t;
    if (t->offset_.load(std::memory_order_relaxed) != first->offset_.load(std::memory_order_relaxed) ||
        t->ratio_.load(std::memory_order_relaxed) != first->ratio_.load(std::memory_order_relaxed)) {
      return false;
    }
  }
  return true;
}

Tsc::Tsc(const Clock& clock, TscSync& sync, u32 khz)
    : clock_(clock), sync_(sync), rdtsc_(clock.is_rdtsc()) {
  if (khz) (void)set_khz(khz);
  {
    const std::lock_guard lock(sync_.mutex_);
    sync_.vcpus_.insert(this);
  }
  host_write(0);
}

Tsc::~Tsc() {
  const std::lock_guard lock(sync_.mutex_);
  sync_.vcpus_.erase(this);
}

int Tsc::set_khz(u32 khz) {
  const u64 host = clock_.host_tsc_khz();
  if (khz == 0) khz = static_cast<u32>(host);
  if (khz > kMaxKhz) return -EINVAL;
  u64 ratio = kUnity;
  const u64 tolerance = host * kTolerancePpm / 1'000'000;
  if (khz + tolerance < host || khz > host + tolerance) {
    const u128 r = (static_cast<u128>(khz) << 48) / host;
    if (r == 0 || r >> 64) return -EINVAL;
    ratio = static_cast<u64>(r);
  }
  const std::lock_guard lock(sync_.mutex_);
  khz_.store(khz, std::memory_order_relaxed);
  if (ratio == ratio_.load(std::memory_order_relaxed)) return 0;
  const u64 host_now = clock_.host_tsc();
  const u64 value = at(host_now);
  ratio_.store(ratio, std::memory_order_relaxed);
  u64 offset = value - scaled(host_now);
  // vCPUs change their rate one after another: the later ones join the first in its offset.
  for (const Tsc* t : sync_.vcpus_) {
    if (t == this || t->ratio_.load(std::memory_order_relaxed) != ratio) continue;
    const u64 ahead = t->at(host_now) - value;
    const u64 second = static_cast<u64>(khz) * 1000;
    if (ahead + second < 2 * second) offset = t->offset_.load(std::memory_order_relaxed);
  }
  offset_.store(offset, std::memory_order_relaxed);
  return 0;
}

void Tsc::guest_write(u64 value) {
  const std::lock_guard lock(sync_.mutex_);
  const u64 delta = value - at(clock_.host_tsc());
  offset_.fetch_add(delta, std::memory_order_relaxed);
  adjust_.fetch_add(delta, std::memory_order_relaxed);
}

void Tsc::host_write(u64 value) {
  const std::lock_guard lock(sync_.mutex_);
  const u64 ns = clock_.monotonic_ns();
  u64 offset = value - scaled(clock_.host_tsc());
  const u64 ratio = ratio_.load(std::memory_order_relaxed);
  if (sync_.last_ratio_ == ratio) {
    // 0 is what a vCPU that is being created or reset writes: it joins the others, whenever that is.
    bool joins = value == 0;
    if (!joins) {
      const u64 rate = khz();
      const u64 expected =
          sync_.last_value_ + static_cast<u64>(static_cast<u128>(ns - sync_.last_ns_) * rate / 1'000'000);
      const u64 second = rate * 1000;
      joins = value - expected + second < 2 * second;
    }
    if (joins) offset = sync_.last_offset_;
  }
  sync_.last_ns_ = ns;
  sync_.last_value_ = scaled(clock_.host_tsc()) + offset;
  sync_.last_ratio_ = ratio;
  sync_.last_offset_ = offset;
  offset_.store(offset, std::memory_order_relaxed);
}

void Tsc::guest_write_adjust(u64 value) {
  const std::lock_guard lock(sync_.mutex_);
  const u64 delta = value - adjust_.load(std::memory_order_relaxed);
  offset_.fetch_add(delta, std::memory_order_relaxed);
  adjust_.store(value, std::memory_order_relaxed);
}

void Tsc::set_offset(u64 offset) {
  const std::lock_guard lock(sync_.mutex_);
  offset_.store(offset, std::memory_order_relaxed);
}

u64 Tsc::deadline_ns(u64 value) const {
  const u64 now_ns = clock_.monotonic_ns();
  const u64 now = read();
  if (value <= now) return now_ns;
  const u64 rate = ratio_.load(std::memory_order_relaxed) == kUnity ? clock_.host_tsc_khz() : khz();
  const u128 ns = (static_cast<u128>(value - now) * 1'000'000 + rate - 1) / rate;
  return now_ns + (ns > kForeverNs ? kForeverNs : static_cast<u64>(ns));
}

}  // namespace ring3::engine
