#include "engine/timer/pvclock.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace ring3::engine {
namespace {

constexpr u32 kWallClockOld = 0x11, kSystemTimeOld = 0x12, kWallClock = 0x4b564d00, kSystemTime = 0x4b564d01;
constexpr u64 kNsPerSecond = 1'000'000'000;

struct WallClock {
  u32 version, sec, nsec;
};

// x86 keeps stores in order; only the compiler must be told.
void order_stores() { std::atomic_signal_fence(std::memory_order_release); }

}  // namespace

TscScale tsc_to_ns_scale(u32 khz) {
  // mul = 10⁹·2³² / (Hz·2^shift), with the shift that puts mul into [2³¹, 2³²).
  const u64 hz = static_cast<u64>(khz ? khz : 1) * 1000;
  int shift = -31;
  for (; shift < 31; ++shift) {
    const u128 base = shift < 0 ? static_cast<u128>(hz) : static_cast<u128>(hz) << shift;
    const u128 scaled = static_cast<u128>(kNsPerSecond) << (shift < 0 ? 32 - shift : 32);
    const u128 mul = scaled / base;
    // mul falls as the shift grows: the first that fits 32 bits is the most exact.
    if (mul < (static_cast<u128>(1) << 32)) return {static_cast<u32>(mul), static_cast<i8>(shift)};
  }
  return {0x80000000, 31};
}

u64 scale_tsc_delta(u64 ticks, TscScale scale) {
  ticks = scale.shift < 0 ? ticks >> -scale.shift : ticks << scale.shift;
  return static_cast<u64>((static_cast<u128>(ticks) * scale.mul) >> 32);
}

// --- KvmClock ----------------------------------------------------------------------------------

KvmClock::KvmClock(const Clock& clock)
    : clock_(clock),
      ref_tsc_(clock.host_tsc()),
      ref_mono_(clock.monotonic_ns()) {}

u64 KvmClock::at_locked(u64 host_tsc, u64 mono_ns) const {
  if (clock_.tsc_stable()) {
    if (scale_.mul == 0) scale_ = tsc_to_ns_scale(clock_.host_tsc_khz());
    return ref_clock_ + scale_tsc_delta(host_tsc - ref_tsc_, scale_);
  }
  return ref_clock_ + (mono_ns - ref_mono_);
}

u64 KvmClock::now_ns() const {
  const std::lock_guard lock(mutex_);
  return at_locked(clock_.host_tsc(), clock_.monotonic_ns());
}

KvmClock::Reference KvmClock::reference() const {
  const std::lock_guard lock(mutex_);
  if (clock_.tsc_stable()) return {ref_tsc_, ref_clock_};
  const u64 tsc = clock_.host_tsc();
  return {tsc, at_locked(tsc, clock_.monotonic_ns())};
}

PvclockTimeInfo KvmClock::line(const Tsc& tsc, const TscSync& sync) const {
  const Reference ref = reference();
  const TscScale scale = tsc_to_ns_scale(tsc.khz());
  PvclockTimeInfo info{};
  info.tsc_timestamp = tsc.at(ref.host_tsc);
  info.system_time = ref.clock_ns;
  info.tsc_to_system_mul = scale.mul;
  info.tsc_shift = scale.shift;
  if (clock_.tsc_stable() && sync.all_matched()) info.flags |= kPvclockTscStable;
  return info;
}

void KvmClock::get(kvm_clock_data* out, bool stable) const {
  const std::lock_guard lock(mutex_);
  std::memset(out, 0, sizeof *out);
  out->realtime = clock_.realtime_ns();
  out->host_tsc = clock_.host_tsc();
  out->clock = at_locked(out->host_tsc, clock_.monotonic_ns());
  out->flags = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
  if (stable && clock_.tsc_stable()) out->flags |= KVM_CLOCK_TSC_STABLE;
}

int KvmClock::set(const kvm_clock_data& in) {
  if (in.flags & ~static_cast<u32>(KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC | KVM_CLOCK_TSC_STABLE))
    return -EINVAL;
  const std::lock_guard lock(mutex_);
  ref_tsc_ = clock_.host_tsc();
  ref_mono_ = clock_.monotonic_ns();
  ref_clock_ = in.clock;
  if (in.flags & KVM_CLOCK_REALTIME) {
    // Time went on since the clock was read.
    const u64 now = clock_.realtime_ns();
    if (now > in.realtime) ref_clock_ += now - in.realtime;
  }
  return 0;
}

// --- PvClock -----------------------------------------------------------------------------------

PvClock::PvClock(KvmClock& vm, const TscSync& sync, const Tsc& tsc, GuestWriter writer, bool boot_vcpu)
    : vm_(vm), sync_(sync), tsc_(tsc), writer_(std::move(writer)), boot_vcpu_(boot_vcpu) {}

u64 PvClock::read_msr(u32 index) const {
  switch (index) {
    case kSystemTimeOld:
    case kSystemTime:
      return system_time_msr_;
    case kWallClockOld:
    case kWallClock:
      return wall_clock_msr_;
    default:
      return 0;
  }
}

void PvClock::write_msr(u32 index, u64 value, bool host_initiated) {
  switch (index) {
    case kSystemTimeOld:
    case kSystemTime:
      if (boot_vcpu_ && !host_initiated)
        vm_.old_msr_.store(index == kSystemTimeOld, std::memory_order_relaxed);
      system_time_msr_ = value;
      version_ = 0;
      request_update();
      break;
    case kWallClockOld:
    case kWallClock: {
      wall_clock_msr_ = value;
      if (!value) break;
      u32 version;
      WallClock wall{};
      {
        const std::lock_guard lock(vm_.mutex_);
        version = vm_.wall_version_ += 2;
        const u64 base =
            vm_.clock_.realtime_ns() - vm_.at_locked(vm_.clock_.host_tsc(), vm_.clock_.monotonic_ns());
        wall = {version - 1, static_cast<u32>(base / kNsPerSecond), static_cast<u32>(base % kNsPerSecond)};
      }
      if (!writer_(Gpa(value), &wall, sizeof wall)) break;
      order_stores();
      (void)writer_(Gpa(value), &version, sizeof version);
      break;
    }
    default:
      break;
  }
}

void PvClock::update() {
  if (!pending_.exchange(false, std::memory_order_acquire)) return;
  if (!(system_time_msr_ & 1)) return;
  const Gpa page(system_time_msr_ & ~1ull);
  PvclockTimeInfo info = vm_.line(tsc_, sync_);
  info.version = version_ + 1;
  if (vm_.old_msr_.load(std::memory_order_relaxed)) info.flags = 0;
  if (stopped_) info.flags |= kPvclockGuestStopped;
  stopped_ = false;
  // The version goes odd before anything else changes, even after all of it has.
  if (!writer_(page, &info.version, sizeof info.version)) return;
  order_stores();
  if (!writer_(page, &info, sizeof info)) return;
  order_stores();
  version_ += 2;
  (void)writer_(page, &version_, sizeof version_);
}

int PvClock::guest_stopped() {
  if (!(system_time_msr_ & 1)) return -EINVAL;
  stopped_ = true;
  request_update();
  return 0;
}

void PvClock::reset() {
  system_time_msr_ = 0;
  stopped_ = false;
  pending_.store(false, std::memory_order_relaxed);
}

// --- StealTime ---------------------------------------------------------------------------------

RunDelay::~RunDelay() {
  if (fd_ >= 0) close(fd_);
}

bool RunDelay::read(u64* ns) {
  *ns = 0;
  const long tid = gettid();
  const bool same = fd_ >= 0 && tid_ == tid;
  if (!same) {
    if (fd_ >= 0) close(fd_);
    fd_ = open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC);
    tid_ = tid;
  }
  char text[128];
  const ssize_t n = fd_ < 0 ? -1 : pread(fd_, text, sizeof text - 1, 0);
  if (n > 0) {
    text[n] = 0;
    char* end = nullptr;
    std::strtoull(text, &end, 10);  // time on the CPU
    *ns = std::strtoull(end, nullptr, 10);
  }
  return same;
}

bool StealTime::write_msr(u64 value) {
  constexpr u64 kEnable = 1, kReserved = 0x3e;  // bits 5:1
  if (value & kReserved) return false;
  msr_ = value;
  if (value & kEnable) {
    have_last_ = false;
    update();
  }
  return true;
}

void StealTime::update() {
  if (!(msr_ & 1)) return;
  u64 delay;
  if (!delay_.read(&delay)) have_last_ = false;
  update_to(delay);
}

void StealTime::update_to(u64 run_delay_ns) {
  if (!(msr_ & 1)) return;
  if (have_last_ && run_delay_ns > last_delay_) steal_ += run_delay_ns - last_delay_;
  last_delay_ = run_delay_ns;
  have_last_ = true;
  // struct kvm_steal_time: steal u64, version u32, flags u32, preempted u8, padding to 64 bytes.
  const Gpa record(msr_ & ~0x3full);
  const u32 odd = version_ + 1;
  if (!writer_(record + 8, &odd, sizeof odd)) return;
  order_stores();
  const u32 flags = 0;
  const u8 preempted = 0;
  if (!writer_(record, &steal_, sizeof steal_) || !writer_(record + 12, &flags, sizeof flags) ||
      !writer_(record + 16, &preempted, sizeof preempted)) {
    return;
  }
  order_stores();
  version_ += 2;
  (void)writer_(record + 8, &version_, sizeof version_);
}

}  // namespace ring3::engine
