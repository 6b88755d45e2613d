#include "engine/xen/runstate.hpp"

#include <algorithm>
#include <atomic>
#include <cerrno>

namespace ring3::engine::xen {
namespace {

void order_stores() { std::atomic_signal_fence(std::memory_order_release); }

std::array<u64, kStates> times_of(const kvm_xen_vcpu_attr& attr) {
  const auto& r = attr.u.runstate;
  return {r.time_running, r.time_runnable, r.time_blocked, r.time_offline};
}
bool add_up(const kvm_xen_vcpu_attr& attr) {
  u64 sum = 0;
  for (const u64 t : times_of(attr)) sum += t;  // an adjustment may be below 0
  return sum == attr.u.runstate.state_entry_time;
}

}  // namespace

void Runstate::enter(State state, u64 now_ns, u64 delay_ns, bool same_thread) {
  if (since_ == 0) state_ = State::kOffline;  // until now
  u64 time = now_ns - since_;
  if (state_ == State::kRunning) {
    const u64 stolen = same_thread && delay_ns > delay_ ? std::min(delay_ns - delay_, time) : 0;
    times_[static_cast<u32>(State::kRunnable)] += stolen;
    time -= stolen;
  }
  times_[static_cast<u32>(state_)] += time;
  delay_ = delay_ns;
  state_ = state;
  since_ = now_ns;
}

int Runstate::set(const kvm_xen_vcpu_attr& attr, u64 now_ns, u64 delay_ns) {
  if (attr.u.runstate.state >= kStates || !add_up(attr) || now_ns < attr.u.runstate.state_entry_time) return -EINVAL;
  state_ = static_cast<State>(attr.u.runstate.state);
  since_ = attr.u.runstate.state_entry_time;
  times_ = times_of(attr);
  delay_ = delay_ns;
  return 0;
}

int Runstate::adjust(const kvm_xen_vcpu_attr& attr, u64 now_ns) {
  if (!add_up(attr) || now_ns < since_ + attr.u.runstate.state_entry_time) return -EINVAL;
  since_ += attr.u.runstate.state_entry_time;
  const auto more = times_of(attr);
  for (u32 i = 0; i < kStates; i++) times_[i] += more[i];
  return 0;
}

void Runstate::get(kvm_xen_vcpu_attr* attr) const {
  attr->u.runstate.state = static_cast<u64>(state_);
  attr->u.runstate.state_entry_time = since_;
  attr->u.runstate.time_running = times_[0];
  attr->u.runstate.time_runnable = times_[1];
  attr->u.runstate.time_blocked = times_[2];
  attr->u.runstate.time_offline = times_[3];
}

bool Runstate::write(Memory& memory, Gpa at, bool long_mode) const {
  const Gpa entry = at + (long_mode ? kRunstateEntry64 : kRunstateEntry32);
  const u64 marked = since_ | kRunstateUpdate;
  const u32 state = static_cast<u32>(state_);
  if (!memory.write(entry, &marked, sizeof marked)) return false;
  order_stores();
  if (!memory.write(at, &state, sizeof state) || !memory.write(entry + 8, times_.data(), sizeof times_)) return false;
  order_stores();
  return memory.write(entry, &since_, sizeof since_);
}

}  // namespace ring3::engine::xen
