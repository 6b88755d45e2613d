// Hypercalls that are not the VMM's. All of their input is the guest's: registers, and memory that may not be there.
#include <sched.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "engine/xen/vcpu.hpp"

namespace ring3::engine::xen {
namespace {
constexpr u64 error(int e) { return static_cast<u64>(-i64{e}); }
constexpr u64 kNsPerMs = 1'000'000;
}  // namespace

std::optional<u64> Vcpu::hypercall(const Hypercall& call) {
  const u32 what = static_cast<u32>(call.args[0]);
  switch (call.number) {
    case call::kXenVersion:
      if (call.args[0] != call::kVersion || domain_.version() == 0) return std::nullopt;
      return domain_.version();
    case call::kEventChannelOp: {
      if (call.args[0] != call::kSend) return std::nullopt;
      u32 port;
      if (!read_linear(call.args[1], &port, sizeof port, call.long_mode)) return error(EFAULT);
      if (!domain_.send_from_guest(port)) return std::nullopt;
      return 0;
    }
    case call::kSchedOp:
      if (what != call::kPoll && what != call::kYield) return std::nullopt;
      return sched_op(call);
    case call::kVcpuOp: return vcpu_op(call);
    case call::kSetTimerOp:
      return set_timer_op(call.long_mode ? call.args[0] : static_cast<u32>(call.args[0]) | call.args[1] << 32);
    default: return std::nullopt;
  }
}

bool Vcpu::read_linear(u64 linear, void* to, std::size_t size, bool long_mode) {
  auto* out = static_cast<u8*>(to);
  for (std::size_t done = 0; done < size;) {
    u64 at = linear + done;
    if (!long_mode) at = static_cast<u32>(at);
    const std::size_t n = std::min<std::size_t>(size - done, kPageSize - (at & (kPageSize - 1)));
    Gpa gpa;
    if (!processor_.translate(at, &gpa) || !processor_.read(gpa, out + done, n)) return false;
    done += n;
  }
  return true;
}

// ---- the scheduler ----

std::optional<u64> Vcpu::sched_op(const Hypercall& call) {
  if (static_cast<u32>(call.args[0]) == call::kPoll && call.long_mode && lapic_ != nullptr && domain_.sends_all_events()) {
    return start_poll(call.args[1]);
  }
  // As KVM does it: who cannot wait here comes back soon, and looks again.
  ::sched_yield();
  return 0;
}

std::optional<u64> Vcpu::start_poll(u64 argument) {
  SchedPoll poll;
  if (!read_linear(argument, &poll, sizeof poll, true)) return error(EFAULT);
  if (poll.count > kMaxPolledPorts) return error(EINVAL);
  std::array<u32, kMaxPolledPorts> ports;  // not on the heap: a read that faults may leave by a jump
  for (u32 i = 0; i < poll.count; i++) {
    if (!read_linear(poll.ports + u64{i} * sizeof(u32), &ports[i], sizeof(u32), true)) return error(EFAULT);
    if (ports[i] >= domain_.layout().ports) return error(EINVAL);
  }
  if (!domain_.poll(*this, std::span(ports).first(poll.count))) return 0;
  constexpr u64 kLongest = 1ull << 62;
  if (poll.timeout_ns != 0) poll_timer_.arm(timers_.clock().monotonic_ns() + std::min(poll.timeout_ns, kLongest));
  processor_.attend_events();
  return 0;
}

// ---- the one-shot timer ----

void Vcpu::start_timer(u64 deadline_ns, i64 in_ns) {
  timer_.cancel();
  timer_expired_.store(in_ns <= 0, std::memory_order_release);
  timer_deadline_ = deadline_ns;
  if (in_ns > 0) {
    timer_.arm(timers_.clock().monotonic_ns() + static_cast<u64>(in_ns));
  } else {
    processor_.attend_events();
  }
}

void Vcpu::stop_timer() {
  timer_.cancel();
  timer_expired_.store(false, std::memory_order_release);
  timer_deadline_ = 0;
}

std::optional<u64> Vcpu::vcpu_op(const Hypercall& call) {
  const u32 what = static_cast<u32>(call.args[0]);
  if (timer_port_ == 0 || (what != call::kSetSingleshotTimer && what != call::kStopSingleshotTimer)) return std::nullopt;
  if (static_cast<u32>(call.args[1]) != number_) return error(EINVAL);
  if (what == call::kStopSingleshotTimer) {
    stop_timer();
    return 0;
  }
  SingleshotTimer timer{};
  constexpr std::size_t kSize32 = 12;
  if (!read_linear(call.args[2], &timer, call.long_mode ? sizeof timer : kSize32, call.long_mode)) return error(EFAULT);
  const i64 in_ns = static_cast<i64>(timer.deadline_ns - domain_.now_ns());
  if ((timer.flags & kTimerInFuture) && in_ns < 0) return error(ETIME);
  start_timer(timer.deadline_ns, in_ns);
  return 0;
}

std::optional<u64> Vcpu::set_timer_op(u64 deadline_ns) {
  if (timer_port_ == 0) return std::nullopt;
  if (deadline_ns == 0) {
    stop_timer();
    return 0;
  }
  const u64 now = domain_.now_ns();
  i64 in_ns = static_cast<i64>(deadline_ns - now);
  // As Xen: what can only be a guest's overflow is neither at once nor never.
  constexpr i64 kTooFar = i64{1} << 50;
  if (static_cast<i64>(deadline_ns) < 0 || in_ns >= kTooFar) {
    in_ns = 100 * kNsPerMs;
    deadline_ns = now + static_cast<u64>(in_ns);
  }
  start_timer(deadline_ns, in_ns);
  return 0;
}

}  // namespace ring3::engine::xen
