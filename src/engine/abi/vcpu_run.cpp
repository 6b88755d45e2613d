// KVM_RUN: the loop between the guest's code, its events and the VMM.
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/signal_set.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"

namespace ring3::engine::abi {
namespace {

/// While KVM_RUN is in progress the thread takes signals only where it waits, so that none is handled unseen: KVM_RUN then
/// ends with EINTR, as the kernel's does. Faults of the process itself stay deliverable. Not needed where the program
/// announces its signals.
class SignalGuard {
 public:
  SignalGuard(sigset_t* thread_mask, bool announced) : thread_mask_(thread_mask), active_(!announced) {
    if (!active_) return;
    const sigset_t blocked = signals_but_faults();
    pthread_sigmask(SIG_SETMASK, &blocked, thread_mask_);
    saved_ = *thread_mask_;
  }
  ~SignalGuard() {
    if (active_) pthread_sigmask(SIG_SETMASK, &saved_, nullptr);
  }
  SignalGuard(const SignalGuard&) = delete;
  SignalGuard& operator=(const SignalGuard&) = delete;

 private:
  sigset_t* thread_mask_;
  const bool active_;
  sigset_t saved_;
};

bool immediate_exit(const kvm_run& run) { return __atomic_load_n(&run.immediate_exit, __ATOMIC_SEQ_CST) != 0; }

constexpr u64 kStealPeriodNs = 10'000'000;
constexpr u64 kStealEntryNs = 100'000;  // on entry: the VMM's thread may have waited for a CPU meanwhile

}  // namespace

bool Vcpu::signal_pending() const {
  if (vm_.config().signals_announced) return signalled_.load(std::memory_order_seq_cst);
  sigset_t pending;
  if (sigpending(&pending) != 0) return false;
  for (int n = 1; n < NSIG; n++) {
    if (sigismember(&pending, n) == 1 && sigismember(have_sigmask_ ? &sigmask_ : &thread_mask_, n) == 0) return true;
  }
  return false;
}

bool Vcpu::wait() {
  const AttentionWord& attention = interp_->context().attention();
  waiting_.store(1, std::memory_order_seq_cst);
  bool no_signal = true;
  if (attention.bits.load(std::memory_order_seq_cst) == 0 && !immediate_exit(*run_page())) {
    // With KVM_SET_SIGNAL_MASK a signal ends the wait although the thread blocks it; it then stays pending for the VMM.
    sigset_t mask = thread_mask_;
    if (have_sigmask_) sigorset(&mask, &thread_mask_, &sigmask_);
    pollfd fds[2] = {{wake_.fd(), POLLIN, 0}, {signal_fd_.get(), POLLIN, 0}};
    // A signal that is announced before the wait begins has written to wake_: waiting_ is set already.
    const int n = vm_.config().signals_announced ? ::ppoll(fds, 1, nullptr, nullptr)
                                                 : ::ppoll(fds, have_sigmask_ ? 2 : 1, nullptr, &mask);
    no_signal = n >= 0 ? !(have_sigmask_ && (fds[1].revents & POLLIN)) : errno != EINTR;
  }
  waiting_.store(0, std::memory_order_seq_cst);
  wake_.drain();
  return no_signal;
}

// ---- events ----

bool Vcpu::interrupt_allowed() const {
  return (state_.rflags & rflags::IF) && !state_.sti_shadow && !state_.mov_ss_shadow && !(guest_debug_ & KVM_GUESTDBG_BLOCKIRQ);
}
bool Vcpu::nmi_allowed() const { return !state_.nmi_blocked && !state_.mov_ss_shadow && !state_.sti_shadow; }

bool Vcpu::has_interrupt() const {
  if (!lapic_) return false;
  if (xen_->upcall_pending()) return true;
  if (user_extint_ >= 0 && lapic_->accepts_extint()) return true;
  return vm_.irqchip()->has_interrupt(*lapic_);
}

bool Vcpu::runnable() const {
  return state_.exception.pending || nmi_injected_ || state_.injected_interrupt || triple_fault_pending_ ||
         ((state_.nmi_pending != 0 || nmis_.load() != 0) && nmi_allowed()) || (interrupt_allowed() && has_interrupt());
}

bool Vcpu::accept_init_sipi() {
  bool changed = false;
  if (init_.exchange(false)) {
    reset(true);
    mp_state_ = id_ == vm_.boot_vcpu() ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_INIT_RECEIVED;
    changed = true;
  }
  if (sipi_.exchange(false) && mp_state_ == KVM_MP_STATE_INIT_RECEIVED) {
    const u8 vector = sipi_vector_.load();
    Segment& cs = state_.seg[CS];
    cs.selector = static_cast<u16>(vector << 8);
    cs.base = static_cast<u64>(vector) << 12;
    state_.rip = 0;
    mp_state_ = KVM_MP_STATE_RUNNABLE;
    state_changed();
    changed = true;
  }
  return changed;
}

void Vcpu::apply_payload() {
  PendingException& e = state_.exception;
  if (!e.has_payload) return;
  if (e.vector == vec::PF) state_.cr2 = e.payload;
  if (e.vector == vec::DB) state_.dr6 = (state_.dr6 & ~0xfull) | e.payload | 0xffff0ff0;
  e.has_payload = false;
  e.payload = 0;
}

void Vcpu::collect_nmis() {
  if (nmis_.load(std::memory_order_relaxed) == 0) return;
  const u32 n = state_.nmi_pending + nmis_.exchange(0);
  const u32 limit = state_.nmi_blocked || nmi_injected_ ? 1 : 2;  // one in service, one waiting
  state_.nmi_pending = static_cast<u8>(n < limit ? n : limit);
}

/// False: the VMM is needed, or the guest is dead (triple_fault_pending_); the event stays where it was.
bool Vcpu::deliver(const Event& event) {
  switch (interp_->inject(event)) {
    case Delivered::Ok:
      env_.drop();
      delivering_ = false;
      return true;
    case Delivered::Exit:
      delivering_ = true;
      return false;
    case Delivered::TripleFault:
      triple_fault_pending_ = true;
      return false;
  }
  return false;
}

bool Vcpu::inject_events(bool* want_window) {
  // Events that were taken before come first (they may have been interrupted, or restored by the VMM).
  if (state_.exception.pending) {
    apply_payload();
    const PendingException& e = state_.exception;
    Event event;
    event.type = Event::Type::Exception;
    event.vector = e.vector;
    event.has_error = e.has_error;
    event.error = e.error;
    event.payload = e.vector == vec::PF ? state_.cr2 : 0;
    if (!deliver(event)) return false;
    state_.exception.pending = exception_injected_ = false;
  } else if (nmi_injected_) {
    Event event;
    event.type = Event::Type::Nmi;
    event.vector = vec::NMI;
    if (!deliver(event)) return false;
    nmi_injected_ = false;
  } else if (state_.injected_interrupt) {
    Event event;
    event.type = state_.injected_soft ? Event::Type::Software : Event::Type::External;
    event.vector = state_.injected_vector;
    if (!deliver(event)) return false;
    state_.injected_interrupt = false;
  }
  collect_nmis();
  if (state_.nmi_pending != 0 && nmi_allowed()) {
    state_.nmi_pending--;
    nmi_injected_ = true;
    Event event;
    event.type = Event::Type::Nmi;
    event.vector = vec::NMI;
    if (!deliver(event)) return false;
    stats_.add(vcpu_stat::NmiInjections);
    nmi_injected_ = false;
    state_.nmi_blocked = true;
  }
  if (has_interrupt()) {
    if (!interrupt_allowed()) {
      // The guest's own RFLAGS and shadows tell when; a debugger that blocks interrupts ends that itself.
      *want_window = !(guest_debug_ & KVM_GUESTDBG_BLOCKIRQ);
      return true;
    }
    int vector;
    if (xen_->upcall_pending()) {
      vector = vm_.xen().upcall_vector();  // until the guest takes note: nothing else is acknowledged
    } else if (user_extint_ >= 0 && lapic_->accepts_extint()) {
      vector = user_extint_;
      user_extint_ = -1;
    } else {
      vector = vm_.irqchip()->ack_interrupt(*lapic_);
    }
    if (vector >= 0) {
      state_.injected_interrupt = true;
      state_.injected_soft = false;
      state_.injected_vector = static_cast<u8>(vector);
      Event event;
      event.type = Event::Type::External;
      event.vector = static_cast<u8>(vector);
      if (!deliver(event)) return false;
      stats_.add(vcpu_stat::IrqInjections);
      state_.injected_interrupt = false;
      if (pv_eoi_.enabled() && lapic_->eoi_is_plain()) pv_eoi_.offer();
      if (has_interrupt()) *want_window = true;
    }
  }
  return true;
}

bool Vcpu::accepts_user_extint() const { return !lapic_ || (user_extint_ < 0 && lapic_->accepts_extint()); }

bool Vcpu::ready_for_injection() const {
  if (!interrupt_allowed() || state_.exception.pending || nmi_injected_ || state_.injected_interrupt) return false;
  return accepts_user_extint();
}

// ---- the loop ----

void Vcpu::update_guest_time(bool after_wait) {
  const bool xen = vm_.xen().enabled();
  if (!(steal_.read_msr() & 1) && !xen) return;
  const u64 now = vm_.config().clock->monotonic_ns();
  if (!after_wait && now - last_steal_ns_ < kStealPeriodNs) return;
  last_steal_ns_ = now;
  steal_.update();
  if (xen) xen_->running();
}

long Vcpu::internal_error(u32 suberror) {
  kvm_run& run = *run_page();
  run.exit_reason = KVM_EXIT_INTERNAL_ERROR;
  run.internal.suberror = suberror;
  // Of an emulation failure the flags at least are told, where the VMM wants to know: no instruction's bytes, there are none.
  run.internal.ndata = suberror == KVM_INTERNAL_ERROR_EMULATION && vm_.exits_without_code() ? 1 : 0;
  run.internal.data[0] = 0;
  return 0;
}

long Vcpu::interrupted() {
  run_page()->exit_reason = KVM_EXIT_INTR;
  stats_.add(vcpu_stat::SignalExits);
  return -EINTR;
}

/// Guest memory was not there any more when it was touched (munmap, a file cut short).
long Vcpu::memory_gone() {
  if (translator_) {
    translator_->rewind();
  } else {
    interp_->rewind();
  }
  run_page()->exit_reason = KVM_EXIT_UNKNOWN;
  return -EFAULT;
}

void Vcpu::tell_pages_are_there() {
  async_pf_.tell(
      lapic_->accepts_fixed(), [this](Gpa from, void* to, std::size_t n) { return vm_.read_memory(from, to, n); },
      [this](Gpa to, const void* from, std::size_t n) { return vm_.write_memory(to, from, n, this); },
      [this](u8 vector) {
        InterruptMessage message;
        message.dest = id_;
        message.vector = vector;
        static_cast<void>(lapic_->accept(message));
      });
}

long Vcpu::run_uninitialised() {
  if (immediate_exit(*run_page())) return -EINTR;
  for (;;) {
    interp_->context().attention().take();
    if (immediate_exit(*run_page()) || signalled_.load(std::memory_order_seq_cst)) return interrupted();
    accept_init_sipi();
    if (mp_state_ != KVM_MP_STATE_UNINITIALIZED) {
      raise(kAttendInit | kAttendMmu | kAttendXen);  // bits taken above belong to the loop that comes next
      return -EAGAIN;
    }
    if (!wait()) return interrupted();
  }
}

bool Vcpu::poll_halt(u64 begin_ns, u64 time_ns) {
  if (time_ns == 0) return false;
  constexpr unsigned kLooks = 64;  // between two looks at the clock, a microsecond or some
  const auto& look = vm_.look_while_halted();
  const HostClock& clock = *vm_.config().clock;
  const AttentionWord& attention = interp_->context().attention();
  const auto woken = [&] { return attention.raised() || immediate_exit(*run_page()); };
  stats_.add(vcpu_stat::HaltAttemptedPoll);
  u64 spent = 0;
  bool came = woken();
  while (!came && spent < time_ns) {
    for (unsigned i = 0; i < kLooks && !came; i++) {
      __builtin_ia32_pause();
      came = woken();
    }
    came = came || signal_pending();
    if (look && !came) {
      look(true);
      came = woken();
    }
    spent = clock.monotonic_ns() - begin_ns;
  }
  if (look) look(false);
  if (came) stats_.add(vcpu_stat::HaltSuccessfulPoll);
  stats_.add(came ? vcpu_stat::HaltPollSuccessNs : vcpu_stat::HaltPollFailNs, spent);
  return came;
}

/// A HLT, or what waits like one.
Vcpu::Step Vcpu::halt(long* result) {
  vm_.tracker().leave_guest(index_);
  const HostClock& clock = *vm_.config().clock;
  const u64 begin = clock.monotonic_ns(), limit = async_pf_.host_may_poll() ? vm_.halt_poll_ns() : 0;
  stats_.set(vcpu_stat::Blocking, 1);
  bool no_signal = true;
  if (!poll_halt(begin, halt_poll_.time(limit))) {
    const u64 asleep = clock.monotonic_ns();
    no_signal = wait();
    stats_.add(vcpu_stat::HaltWaitNs, clock.monotonic_ns() - asleep);
  }
  halt_poll_.ended(clock.monotonic_ns() - begin, limit);
  stats_.set(vcpu_stat::Blocking, 0);
  if (no_signal) stats_.add(vcpu_stat::HaltWakeup);
  update_guest_time(true);
  vm_.tracker().enter_guest(index_);
  if (!vm_.stores_announced()) mmu_.expire_fetches();  // a device may have written while the vCPU slept
  if (no_signal) return Step::Again;
  *result = interrupted();
  return Step::Exit;
}

/// Before guest code runs. Again: look at everything once more; Exit: KVM_RUN returns *result; Run: go.
Vcpu::Step Vcpu::prepare(long* result) {
  kvm_run& run = *run_page();
  const u32 bits = interp_->context().attention().take() | std::exchange(put_off_, 0);
  mmu_.serve_requests();
  settle_pv_eoi();
  env_.msr_hooks = vm_.msr_filter().active();
  if (bits & kAttendClock) {
    pvclock_.update();
    hv_->update_tsc_page();
    xen_->update_time();
    update_guest_time(true);
  }
  serve_flushes();
  if (env_.replaying && !delivering_) {  // an instruction is half done: nothing comes before its end, all of it right after
    put_off_ = bits & ~kAttendClock;
    return Step::Run;
  }

  if (hv_->timers_pending()) hv_->process_timers();
  if (bits & kAttendXen) xen_->attend();
  if (async_pf_.due()) tell_pages_are_there();
  if (hv_->exit_pending()) {
    fill_hyperv_exit();
    *result = 0;
    return Step::Exit;
  }
  if (eoi_exit_) {
    run.exit_reason = KVM_EXIT_IOAPIC_EOI;
    run.eoi.vector = *eoi_exit_;
    eoi_exit_.reset();
    *result = 0;
    return Step::Exit;
  }
  if (set_tpr_exit_) {
    set_tpr_exit_ = false;
    run.exit_reason = KVM_EXIT_SET_TPR;
    *result = 0;
    return Step::Exit;
  }
  if (immediate_exit(run) || signalled_.load(std::memory_order_seq_cst) || ((bits & kAttendKick || look_for_signals_) && signal_pending())) {
    *result = interrupted();
    return Step::Exit;
  }
  look_for_signals_ = false;
  if (ring_ && ring_->settle()) [[unlikely]] {
    run.exit_reason = KVM_EXIT_DIRTY_RING_FULL;
    *result = 0;
    return Step::Exit;
  }
  accept_init_sipi();
  if (triple_fault_pending_) {
    triple_fault_pending_ = false;
    run.exit_reason = KVM_EXIT_SHUTDOWN;
    *result = 0;
    return Step::Exit;
  }
  if (mp_state_ != KVM_MP_STATE_RUNNABLE) {
    const bool kicked = unhalted_.exchange(false);
    // The VMM's own interrupt controller waits for the window of a HLT that is not its exit.
    const bool window = lapic_ == nullptr && run.request_interrupt_window != 0 && ready_for_injection();
    if (mp_state_ == KVM_MP_STATE_HALTED && (kicked || window || runnable())) {
      mp_state_ = KVM_MP_STATE_RUNNABLE;
      return Step::Again;
    }
    return halt(result);
  }
  if (xen_->polling()) {
    if (!xen_->poll_over() && !runnable()) return halt(result);
    xen_->end_poll();
  }

  bool window = false;
  if (!inject_events(&window)) {
    if (triple_fault_pending_) return Step::Again;
    *result = env_.exit_pending() ? 0 : internal_error(KVM_INTERNAL_ERROR_DELIVERY_EV);
    return Step::Exit;
  }
  if (run.request_interrupt_window && !vm_.full_irqchip()) {
    if (ready_for_injection()) {
      run.exit_reason = KVM_EXIT_IRQ_WINDOW_OPEN;
      *result = 0;
      return Step::Exit;
    }
    // A LAPIC that does not take the VMM's interrupts opens no window: raise() comes when that changes.
    window = window || (accepts_user_extint() && !(guest_debug_ & KVM_GUESTDBG_BLOCKIRQ));
  }
  want_window_ = window;
  return Step::Run;
}

long Vcpu::run_loop() {
  kvm_run& run = *run_page();
  Context& c = interp_->context();
  for (;;) {
    long result = 0;
    switch (prepare(&result)) {
      case Step::Again: continue;
      case Step::Exit: return result;
      case Step::Run: break;
    }
    c.interrupt_window = want_window_;
    const bool one = put_off_ != 0;  // guest code that never comes back by itself may follow
    const u64 quantum = one ? 1 : vm_.config().quantum;
    switch (translator_ ? translator_->run(quantum) : interp_->run(quantum)) {
      case Interpreter::Result::Attention: break;
      case Interpreter::Result::Budget:
        if (one) break;
        look_for_signals_ = true;
        update_guest_time(false);
        count_translation();
        break;
      case Interpreter::Result::Exit:
        if (env_.exit_pending()) return 0;
        return trap_.take_hit() ? memory_gone() : internal_error(KVM_INTERNAL_ERROR_EMULATION);
      case Interpreter::Result::Halted:
        if (!lapic_ && !vm_.halts_in_guest()) {
          run.exit_reason = KVM_EXIT_HLT;
          return 0;
        }
        mp_state_ = KVM_MP_STATE_HALTED;
        stats_.add(vcpu_stat::HaltExits);
        break;
      case Interpreter::Result::TripleFault:
        run.exit_reason = KVM_EXIT_SHUTDOWN;
        return 0;
      case Interpreter::Result::Debug:
        run.exit_reason = KVM_EXIT_DEBUG;
        run.debug.arch.exception = interp_->debug_vector();
        run.debug.arch.pad = 0;
        run.debug.arch.pc = state_.seg[CS].base + state_.rip;
        run.debug.arch.dr6 = interp_->debug_dr6() | 0xffff0ff0;
        run.debug.arch.dr7 = c.guest_dr7;
        return 0;
    }
  }
}

void Vcpu::fill_exit_state() {
  kvm_run& run = *run_page();
  run.if_flag = (state_.rflags & rflags::IF) != 0;
  run.cr8 = cr8();
  run.apic_base = apic_base();
  run.ready_for_interrupt_injection = vm_.full_irqchip() || ready_for_injection();
}

long Vcpu::run() {
  kvm_run& run = *run_page();
  SignalGuard guard(&thread_mask_, vm_.config().signals_announced);
  has_run_ = true;
  apply_quirks();
  run.flags = 0;
  const long result = mp_state_ == KVM_MP_STATE_UNINITIALIZED ? run_uninitialised() : run_guest();
  if (xen_->polling()) xen_->end_poll();  // whatever ended KVM_RUN ended the wait
  fill_exit_state();
  signalled_.store(false, std::memory_order_relaxed);
  if (run.kvm_valid_regs & KVM_SYNC_X86_REGS) get_regs(&run.s.regs.regs);
  if (run.kvm_valid_regs & KVM_SYNC_X86_SREGS) get_sregs(&run.s.regs.sregs);
  if (run.kvm_valid_regs & KVM_SYNC_X86_EVENTS) get_events(&run.s.regs.events);
  return result;
}

/// KVM_RUN of a vCPU that has been started: what the VMM changed, then the guest.
long Vcpu::run_guest() {
  kvm_run& run = *run_page();
  long result;
  constexpr u64 kSync = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
  if ((run.kvm_valid_regs & ~kSync) || (run.kvm_dirty_regs & ~kSync)) return -EINVAL;
  if (run.kvm_dirty_regs != 0) {
    // Copies: the VMM may write the page meanwhile.
    const u64 dirty = run.kvm_dirty_regs;
    if (dirty & KVM_SYNC_X86_REGS) {
      const kvm_regs regs = run.s.regs.regs;
      set_regs(regs);
    }
    if (dirty & KVM_SYNC_X86_SREGS) {
      const kvm_sregs sregs = run.s.regs.sregs;
      int error = 0;
      vm_.tracker().enter_guest(index_);  // PAE's directory pointers are read
      const bool whole = trap_.run([&] { error = set_sregs(sregs); });
      vm_.tracker().leave_guest(index_);
      if (!whole) return -EFAULT;
      if (error != 0) return -EINVAL;
    }
    if (dirty & KVM_SYNC_X86_EVENTS) {
      const kvm_vcpu_events events = run.s.regs.events;
      if (set_events(events) != 0) return -EINVAL;
    }
    run.kvm_dirty_regs = 0;
  }
  if (!lapic_) {
    const u64 cr8_in = run.cr8;
    if (cr8_in > 15) return -EINVAL;
    cr8_ = cr8_in;
  }

  env_.msr_hooks = vm_.msr_filter().active();
  env_.complete();
  hv_->complete(run.hyperv);
  // immediate_exit from the start: the instruction that waits for the VMM is finished, no more; the exit reason stays.
  const bool finish_only = immediate_exit(run);
  const u32 reason = run.exit_reason;
  if (!env_.replaying && (immediate_exit(run) || signalled_.load(std::memory_order_seq_cst))) {
    result = -EINTR;
  } else {
    vm_.tracker().enter_guest(index_);
    if (!vm_.stores_announced()) mmu_.expire_fetches();
    if (steal_.read_msr() & 1) update_guest_time(vm_.config().clock->monotonic_ns() - last_steal_ns_ >= kStealEntryNs);
    if (vm_.xen().enabled()) xen_->running();
    static_cast<void>(trap_.take_hit());
    result = 0;
    if (!trap_.run([&] { result = run_loop(); })) result = memory_gone();
    settle_pv_eoi();  // while no memslot can go
    vm_.tracker().leave_guest(index_);
    if (finish_only && result == -EINTR) run.exit_reason = reason;
  }
  stats_.add(vcpu_stat::Exits);
  count_translation();
  return result;
}

void Vcpu::count_translation() {
  if (!translator_) return;
  const TranslatorVcpu::Stats& t = translator_->stats();
  stats_.set(vcpu_stat::TranslatedBlocks, t.translated);
  stats_.set(vcpu_stat::TranslatedEntries, t.entries);
  stats_.set(vcpu_stat::InterpretedInsns, t.interpreted);
  stats_.set(vcpu_stat::TlbFills, t.fills);
  stats_.set(vcpu_stat::WindowFaults, t.window_faults);
  stats_.set(vcpu_stat::RingTransitions, t.transitions);
}

}  // namespace ring3::engine::abi
