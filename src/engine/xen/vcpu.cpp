#include "engine/xen/vcpu.hpp"

#include <cerrno>

namespace ring3::engine::xen {
namespace {
void order_stores() { std::atomic_signal_fence(std::memory_order_release); }
}  // namespace

Vcpu::Vcpu(Domain& domain, Processor& processor, TimerQueue& timers, const Tsc& tsc, const TscSync& sync, Lapic* lapic, unsigned id,
           u32 index)
    : domain_(domain),
      processor_(processor),
      timers_(timers),
      tsc_(tsc),
      sync_(sync),
      lapic_(lapic),
      id_(id),
      number_(index),
      timer_(timers,
             [this] {
               timer_expired_.store(true, std::memory_order_release);
               processor_.attend_events();
             }),
      poll_timer_(timers, [this] { wake_poll(); }) {}

Vcpu::~Vcpu() = default;

// ---- attributes ----

int Vcpu::set_attr(const kvm_xen_vcpu_attr& attr) {
  switch (attr.type) {
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO:
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: {
      const bool info = attr.type == KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO;
      const int error = (info ? info_ : time_info_).place(processor_, attr.u.gpa, info ? kInfoSize : kTimeInfoSize);
      request_time_update();
      processor_.attend_time();
      return error;
    }
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR:
      return runstate_area_.place(processor_, attr.u.gpa, kRunstateSize);
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT:
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA:
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST:
      return set_runstate(attr);
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID:
      if (attr.u.vcpu_id >= ApicBus::kMaxVcpus) return -EINVAL;
      number_ = attr.u.vcpu_id;
      return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
      if (attr.u.timer.port != 0 && attr.u.timer.priority != KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL) return -EINVAL;
      stop_timer();
      timer_port_ = attr.u.timer.port;
      if (timer_port_ != 0 && attr.u.timer.expires_ns != 0) {
        start_timer(attr.u.timer.expires_ns, static_cast<i64>(attr.u.timer.expires_ns - domain_.now_ns()));
      }
      return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR:
      if (!is_vector(attr.u.vector)) return -EINVAL;
      upcall_vector_.store(attr.u.vector, std::memory_order_relaxed);
      return 0;
    default:
      return -ENOENT;
  }
}

int Vcpu::get_attr(kvm_xen_vcpu_attr* attr) {
  switch (attr->type) {
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO: attr->u.gpa = info_.address(); return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO: attr->u.gpa = time_info_.address(); return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR:
      if (!runstate_area_.set()) return -ENOENT;
      attr->u.gpa = runstate_area_.address();
      return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT: attr->u.runstate.state = static_cast<u64>(runstate_.state()); return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA: runstate_.get(attr); return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST: return -EINVAL;
    case KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID: attr->u.vcpu_id = number_; return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
      attr->u.timer.port = timer_port_;
      attr->u.timer.priority = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
      attr->u.timer.expires_ns = timer_deadline_;
      return 0;
    case KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR: attr->u.vector = upcall_vector_.load(std::memory_order_relaxed); return 0;
    default: return -ENOENT;
  }
}

int Vcpu::set_runstate(const kvm_xen_vcpu_attr& attr) {
  constexpr u64 kKeep = ~0ull;
  const bool adjust = attr.type == KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST;
  const u64 state = attr.u.runstate.state;
  if (state >= kStates && !(adjust && state == kKeep)) return -EINVAL;
  u64 delay;
  const bool same_thread = run_delay_.read(&delay);
  if (attr.type == KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA) return runstate_.set(attr, domain_.now_ns(), delay);
  if (adjust) {
    if (const int error = runstate_.adjust(attr, domain_.now_ns()); error != 0) return error;
  }
  if (state != kKeep) runstate_.enter(static_cast<State>(state), domain_.now_ns(), delay, same_thread);
  return 0;
}

void Vcpu::running() {
  u64 delay;
  const bool same_thread = run_delay_.read(&delay);
  runstate_.enter(State::kRunning, domain_.now_ns(), delay, same_thread);
  if (runstate_area_.set()) static_cast<void>(runstate_.write(processor_, Gpa(runstate_area_.address()), domain_.long_mode()));
}

// ---- time ----

void Vcpu::update_time() {
  if (!time_due_.exchange(false, std::memory_order_acquire)) return;
  if (!info_.set() && !time_info_.set()) return;
  const PvclockTimeInfo now = domain_.clock().line(tsc_, sync_);
  if (info_.set()) static_cast<void>(write_time(info_.address() + kInfoTime, now));
  if (time_info_.set()) static_cast<void>(write_time(time_info_.address(), now));
}

/// The version goes odd before anything else changes, even after all of it has.
bool Vcpu::write_time(u64 at, PvclockTimeInfo info) {
  if (!processor_.read(Gpa(at), &info.version, sizeof info.version)) return false;
  info.version = (info.version + 1) | 1;
  if (!processor_.write(Gpa(at), &info.version, sizeof info.version)) return false;
  order_stores();
  if (!processor_.write(Gpa(at), &info, sizeof info)) return false;
  order_stores();
  info.version++;
  return processor_.write(Gpa(at), &info.version, sizeof info.version);
}

// ---- events ----

bool Vcpu::upcall_pending() {
  if (domain_.upcall_vector() == 0 || !info_.set()) [[likely]]
    return false;
  u8 pending;
  return processor_.read(Gpa(info_.address() + kInfoUpcallPending), &pending, sizeof pending) && pending != 0;
}

bool Vcpu::mark_pending(u32 word, bool* told) {
  const u8 bit = static_cast<u8>(1u << (word & 7));
  const u64 info = info_.address();
  const int before = info == Area::kNowhere ? -1 : processor_.set_bits(Gpa(info + domain_.layout().pending_sel + word / 8), bit);
  *told = before >= 0;
  if (before < 0) return (untold_.fetch_or(1ull << word, std::memory_order_seq_cst) >> word & 1) == 0;
  if (before & bit) return false;
  processor_.set_bits(Gpa(info + kInfoUpcallPending), 1);
  return true;
}

void Vcpu::event(u32 word) {
  bool told;
  if (!mark_pending(word, &told)) return;
  if (told && upcall_vector_.load(std::memory_order_relaxed) != 0) {
    inject_vector();
  } else {
    wake_poll();
    processor_.attend_events();
  }
}

void Vcpu::masked_event(u32 port) {
  if (poll_port_ == port || poll_port_ == kAnyPort) wake_poll();
}

/// The vector of this vCPU alone comes by its LAPIC.
void Vcpu::inject_vector() {
  const u8 vector = upcall_vector_.load(std::memory_order_relaxed);
  if (vector == 0 || lapic_ == nullptr) return;
  InterruptMessage message;
  message.dest = id_;
  message.vector = vector;
  static_cast<void>(lapic_->accept(message));
}

void Vcpu::attend() {
  if (timer_expired_.exchange(false, std::memory_order_acquire)) {
    static_cast<void>(domain_.deliver(id_, timer_port_));
    timer_deadline_ = 0;
    wake_poll();  // whether or not for that
  }
  const u64 untold = untold_.exchange(0, std::memory_order_seq_cst);
  if (untold == 0) [[likely]]
    return;
  bool told = false, all = true;
  for (u32 word = 0; word < 64; word++) {
    if (!(untold >> word & 1)) continue;
    mark_pending(word, &told);
    all = all && told;
  }
  if (all) inject_vector();
}

void Vcpu::wake_poll() {
  Poll waiting = Poll::kWaiting;
  if (poll_.compare_exchange_strong(waiting, Poll::kOver, std::memory_order_seq_cst)) processor_.attend_events();
}

void Vcpu::begin_poll(u64 port) {
  poll_port_ = port;
  poll_.store(Poll::kWaiting, std::memory_order_seq_cst);
}

void Vcpu::end_poll() {
  poll_.store(Poll::kNone, std::memory_order_seq_cst);
  poll_timer_.disarm();
}

}  // namespace ring3::engine::xen
