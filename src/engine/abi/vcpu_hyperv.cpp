// What the Hyper-V room needs of a vCPU.
#include "base/backoff.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"

namespace ring3::engine::abi {

bool Vcpu::read(Gpa from, void* to, std::size_t size) { return vm_.read_memory(from, to, size); }
bool Vcpu::write(Gpa to, const void* from, std::size_t size) { return vm_.write_memory(to, from, size, this); }
void Vcpu::attend_timers() { raise(kAttendHyperv); }
void Vcpu::attend_exit() { raise(kAttendExit); }
void Vcpu::attend_clock() { raise(kAttendClock); }

void Vcpu::flush_tlbs(const std::vector<unsigned>& vcpus) {
  for (const unsigned id : vcpus) {
    Vcpu* const v = vm_.vcpu(id);
    if (v == nullptr) continue;
    const u64 ticket = v->flush_asked_.fetch_add(1, std::memory_order_seq_cst) + 1;
    if (v == this) continue;
    v->raise(kAttendHyperv);
    flush_waits_.emplace_back(v, ticket);
  }
  raise(kAttendHyperv | kAttendExit);
}

/// A vCPU that is not in guest code, or comes back to it, passes here before its next instruction: enter_guest() is
/// ordered against in_guest() as flush_asked_ is against itself, so that one of the two sides sees the other.
void Vcpu::serve_flushes() {
  const u64 asked = flush_asked_.load(std::memory_order_seq_cst);
  if (asked != flush_served_.load(std::memory_order_relaxed)) {
    mmu_.flush_all();
    flush_served_.store(asked, std::memory_order_release);
  }
  if (flush_waits_.empty()) [[likely]]
    return;
  // Outside guest code meanwhile: two vCPUs may wait for each other.
  vm_.tracker().leave_guest(index_);
  for (const auto& [v, ticket] : flush_waits_) {
    for (unsigned spins = 0; v->flush_served_.load(std::memory_order_acquire) < ticket && vm_.tracker().in_guest(v->index_); spins++) {
      back_off(spins);
    }
  }
  flush_waits_.clear();
  vm_.tracker().enter_guest(index_);
  if (flush_asked_.load(std::memory_order_seq_cst) != asked) serve_flushes();  // asked for meanwhile
}

void Vcpu::fill_hyperv_exit() {
  kvm_run& run = *run_page();
  const hv::Exit e = hv_->take_exit();
  if (e.kind == hv::Exit::Kind::kHyperv) {
    run.exit_reason = KVM_EXIT_HYPERV;
    run.hyperv = e.hyperv;
    return;
  }
  run.exit_reason = KVM_EXIT_SYSTEM_EVENT;
  run.system_event.type = e.kind == hv::Exit::Kind::kCrash ? KVM_SYSTEM_EVENT_CRASH : KVM_SYSTEM_EVENT_RESET;
  run.system_event.ndata = 0;
}

}  // namespace ring3::engine::abi
