#include "shim/cancel.hpp"

#include <stdint.h>

#include "shim/engine.hpp"

namespace ring3::shim {
namespace {

constexpr unsigned kSlots = 4096, kNone = ~0u;

/// One a thread that has been in KVM_RUN; threads that ended leave theirs to whoever gets their pthread_t.
struct Slot {
  pthread_t thread;  // atomic; 0: free
  File* vcpu;        // atomic; null: not in KVM_RUN
  uint32_t pending;  // atomic: cancelled outside of KVM_RUN
};
Slot g_slots[kSlots];
uint32_t g_cancelling = 0;  // atomic: callers of cancelled() that may hold a vCPU
__thread unsigned t_slot __attribute__((tls_model("initial-exec"))) = kNone;

unsigned claim() {
  const pthread_t self = pthread_self();
  for (unsigned i = 0; i < kSlots; i++) {
    pthread_t owner = __atomic_load_n(&g_slots[i].thread, __ATOMIC_RELAXED);
    if (owner == self) {
      __atomic_store_n(&g_slots[i].pending, 0u, __ATOMIC_RELAXED);  // an earlier thread's
      return i;
    }
    if (owner == 0 && __atomic_compare_exchange_n(&g_slots[i].thread, &owner, self, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      return i;
    }
  }
  return kNone;  // such a thread's KVM_RUN does not end by pthread_cancel()
}

}  // namespace

CancelScope::CancelScope(File* vcpu) : slot_(kNone) {
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &state_);
  if (vcpu == nullptr) return;
  if (t_slot == kNone) t_slot = claim();
  slot_ = t_slot;
  if (slot_ == kNone) return;
  __atomic_store_n(&g_slots[slot_].vcpu, vcpu, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&g_slots[slot_].pending, __ATOMIC_SEQ_CST) != 0) [[unlikely]] engine().signal(vcpu->object);
}

void CancelScope::over() {
  if (slot_ == kNone) return;
  __atomic_store_n(&g_slots[slot_].vcpu, static_cast<File*>(nullptr), __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&g_cancelling, __ATOMIC_SEQ_CST) != 0) __builtin_ia32_pause();
  slot_ = kNone;
}

CancelScope::~CancelScope() {
  over();
  if (state_ == PTHREAD_CANCEL_DISABLE) return;
  if (t_slot == kNone || __atomic_load_n(&g_slots[t_slot].pending, __ATOMIC_RELAXED) == 0) {
    pthread_setcancelstate(state_, nullptr);
    return;
  }
  // glibc 2.36 forgets the thread's result when pthread_setcancelstate() finds it cancelled; pthread_testcancel() does not.
  int type;
  pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &type);
  pthread_setcancelstate(state_, nullptr);
  if (type == PTHREAD_CANCEL_ASYNCHRONOUS) pthread_testcancel();
  __atomic_store_n(&g_slots[t_slot].pending, 0u, __ATOMIC_RELAXED);  // it goes at a cancellation point of its own
  pthread_setcanceltype(type, nullptr);
}

void cancelled(pthread_t thread) {
  __atomic_add_fetch(&g_cancelling, 1, __ATOMIC_SEQ_CST);
  for (Slot& s : g_slots) {
    const pthread_t owner = __atomic_load_n(&s.thread, __ATOMIC_RELAXED);
    if (owner == 0) break;
    if (!pthread_equal(owner, thread)) continue;
    __atomic_store_n(&s.pending, 1u, __ATOMIC_SEQ_CST);
    if (File* vcpu = __atomic_load_n(&s.vcpu, __ATOMIC_SEQ_CST)) engine().signal(vcpu->object);
  }
  __atomic_sub_fetch(&g_cancelling, 1, __ATOMIC_SEQ_CST);
}

}  // namespace ring3::shim
