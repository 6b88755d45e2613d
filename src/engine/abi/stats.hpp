#pragma once
#include <atomic>
#include <span>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

/// Binary statistics: counters in memory that KVM_GET_STATS_FD shows as a file.
///
/// Spec:      virt/kvm/api KVM_GET_STATS_FD. The file is a memfd with header, descriptors and the live counters.
/// Threading: add() by one thread per counter (the vCPU's, or the VM's ioctls under a lock); readers any.
namespace ring3::engine::abi {

class Stats {
 public:
  enum class Kind : u8 { Cumulative, Nanoseconds, Instant, Flag };  ///< Nanoseconds: cumulative; Flag: 0 or 1 now
  struct Entry {
    const char* name;
    Kind kind;
  };
  ~Stats();
  Stats() = default;
  Stats(const Stats&) = delete;
  Stats& operator=(const Stats&) = delete;

  /// id: what the file calls itself ("kvm-PID/vcpu-N").
  Status create(const char* id, std::span<const Entry> entries);
  void add(unsigned entry, i64 n = 1) {
    if (data_ != nullptr) __atomic_fetch_add(&data_[entry], static_cast<u64>(n), __ATOMIC_RELAXED);
  }
  void set(unsigned entry, u64 value) {
    if (data_ != nullptr) __atomic_store_n(&data_[entry], value, __ATOMIC_RELAXED);
  }
  /// A new read-only fd of the file with its own position, close-on-exec; -errno.
  int open() const;

 private:
  UniqueFd fd_;
  u8* map_ = nullptr;
  std::size_t size_ = 0;
  u64* data_ = nullptr;
};

namespace vcpu_stat {
enum : unsigned {
  Exits, IoExits, MmioExits, HaltExits, SignalExits, IrqInjections, NmiInjections, Hypercalls,
  HaltAttemptedPoll, HaltSuccessfulPoll, HaltPollSuccessNs, HaltPollFailNs, HaltWaitNs, HaltWakeup, Blocking,
  // The translator's (TranslatorVcpu::Stats); 0 where code is interpreted.
  TranslatedBlocks, TranslatedEntries, InterpretedInsns, TlbFills, WindowFaults, RingTransitions, Count
};
inline constexpr Stats::Entry kEntries[Count] = {
    {"exits", Stats::Kind::Cumulative},          {"io_exits", Stats::Kind::Cumulative},
    {"mmio_exits", Stats::Kind::Cumulative},     {"halt_exits", Stats::Kind::Cumulative},
    {"signal_exits", Stats::Kind::Cumulative},   {"irq_injections", Stats::Kind::Cumulative},
    {"nmi_injections", Stats::Kind::Cumulative}, {"hypercalls", Stats::Kind::Cumulative},
    {"halt_attempted_poll", Stats::Kind::Cumulative}, {"halt_successful_poll", Stats::Kind::Cumulative},
    {"halt_poll_success_ns", Stats::Kind::Nanoseconds}, {"halt_poll_fail_ns", Stats::Kind::Nanoseconds},
    {"halt_wait_ns", Stats::Kind::Nanoseconds},   {"halt_wakeup", Stats::Kind::Cumulative},
    {"blocking", Stats::Kind::Flag},
    {"translated_blocks", Stats::Kind::Cumulative}, {"translated_entries", Stats::Kind::Cumulative},
    {"interpreted_insns", Stats::Kind::Cumulative}, {"tlb_fills", Stats::Kind::Cumulative},
    {"window_faults", Stats::Kind::Cumulative}, {"ring_transitions", Stats::Kind::Cumulative},
};
}  // namespace vcpu_stat
namespace vm_stat {
enum : unsigned { Vcpus, MemslotChanges, Count };
inline constexpr Stats::Entry kEntries[Count] = {{"vcpus", Stats::Kind::Instant}, {"memslot_changes", Stats::Kind::Cumulative}};
}  // namespace vm_stat

}  // namespace ring3::engine::abi
