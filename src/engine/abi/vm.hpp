#pragma once
#include "base/linux_kvm.hpp"

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/result.hpp"
#include "engine/abi/coalesced.hpp"
#include "engine/abi/config.hpp"
#include "engine/abi/eventfd.hpp"
#include "engine/abi/msr_filter.hpp"
#include "engine/abi/stats.hpp"
#include "engine/hyperv/partition.hpp"
#include "engine/irq/irq_chip.hpp"
#include "engine/mmu/mmu.hpp"
#include "engine/timer/pit.hpp"
#include "engine/timer/pvclock.hpp"
#include "engine/timer/timer_queue.hpp"
#include "engine/timer/tsc.hpp"
#include "kvm/endpoint.hpp"
#include "engine/xen/domain.hpp"
#include "memory/guest_memory.hpp"

namespace ring3::engine::abi {

class Vcpu;

inline constexpr unsigned kMaxVcpus = ApicBus::kMaxVcpus;

/// KVM_CHECK_EXTENSION: 0 for what is not offered. The same on the system and on VMs.
int check_extension(u64 capability);

/// Quirks of KVM that can be switched off. Of CD_NW_CLEARED nothing is seen, on or off: CR0.CD and CR0.NW change nothing here.
/// OUT_7E_INC_RIP is off always: RIP stays at the OUT until it is done.
inline constexpr u64 kQuirks = KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_CD_NW_CLEARED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE |
                               KVM_X86_QUIRK_OUT_7E_INC_RIP | KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT | KVM_X86_QUIRK_FIX_HYPERCALL_INSN |
                               KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS;
/// KVM_CAP_EXIT_HYPERCALL: hypercalls, by number, that can be the VMM's.
inline constexpr u64 kHypercallExits = 1u << 12;  // KVM_HC_MAP_GPA_RANGE
/// KVM_CAP_X86_DISABLE_EXITS: PAUSE never ends KVM_RUN; HLT need not where no LAPIC is the engine's.
inline constexpr u64 kDisabledExits = KVM_X86_DISABLE_EXITS_PAUSE | KVM_X86_DISABLE_EXITS_HLT;

/// One VM: memory, interrupt controllers, timers, and its vCPUs.
///
/// Spec:      virt/kvm/api, "vm ioctl" entries.
/// Lifetime:  endpoints share it: it ends when the VM's and all its vCPUs' endpoints have gone.
/// Threading: ioctls from any thread; mutex_ serialises those that change the set of things. vCPUs read
///            irqchip(), pit() and vcpu() without it.
class Vm final : public VcpuSink, public hv::Host, private xen::Host {
 public:
  static Result<std::shared_ptr<Vm>> create(const Config& config);
  ~Vm() override;

  long ioctl(unsigned long request, u64 arg);
  /// KVM_CREATE_VCPU.
  Result<Vcpu*> create_vcpu(u64 id);

  // --- what vCPUs use ---------------------------------------------------------------------------

  const Config& config() const { return config_; }
  memory::GuestMemory& memory() { return memory_; }
  PhysicalTracker& tracker() { return tracker_; }
  TimerQueue& timers() { return timers_; }
  TscSync& tsc_sync() { return tsc_sync_; }
  KvmClock& clock() { return clock_; }
  hv::Partition& hv() { return hv_; }
  ApicBus& bus() { return bus_; }
  xen::Domain& xen() { return xen_; }
  IoEventfds& ioeventfds() { return ioeventfds_; }
  CoalescedRing& coalesced() { return coalesced_; }
  const MsrFilter& msr_filter() const { return msr_filter_; }

  /// Null until KVM_CREATE_IRQCHIP or KVM_CAP_SPLIT_IRQCHIP; then for the VM's lifetime.
  IrqChip* irqchip() const { return irqchip_.load(std::memory_order_acquire); }
  bool full_irqchip() const { return irqchip() != nullptr && irqchip()->mode() == IrqChip::Mode::kFull; }
  Pit* pit() const { return pit_.load(std::memory_order_acquire); }
  Vcpu* vcpu(unsigned id) const { return id < kMaxVcpus ? by_id_[id].load(std::memory_order_acquire) : nullptr; }
  unsigned boot_vcpu() const { return boot_vcpu_; }
  bool exception_payload() const { return exception_payload_.load(std::memory_order_relaxed); }
  bool triple_fault_event() const { return triple_fault_event_.load(std::memory_order_relaxed); }
  /// KVM_X86_QUIRK_* that the VMM has switched off.
  u64 disabled_quirks() const { return disabled_quirks_.load(std::memory_order_relaxed); }
  /// Hypercalls, by number, that the VMM answers.
  u64 hypercall_exits() const { return hypercall_exits_.load(std::memory_order_relaxed); }
  /// Code where no memory is is the VMM's at every CPL (KVM_CAP_EXIT_ON_EMULATION_FAILURE).
  bool exits_without_code() const { return exits_without_code_.load(std::memory_order_relaxed); }
  /// HLT waits in KVM_RUN whoever has the interrupt controllers, and the vCPU counts as running.
  bool halts_in_guest() const { return halts_in_guest_.load(std::memory_order_relaxed); }
  /// HaltPoll's limit.
  u64 halt_poll_ns() const { return halt_poll_ns_.load(std::memory_order_relaxed); }
  /// Entries of a vCPU's dirty ring; 0: the dirty log is bitmaps. Fixed before the first vCPU.
  u32 dirty_ring_entries() const { return dirty_ring_entries_; }
  /// Whether the VMM tells of its stores to guest memory (Endpoint::announces_stores).
  bool stores_announced() const { return stores_announced_.load(std::memory_order_relaxed); }
  void announce_stores() { stores_announced_.store(true, std::memory_order_relaxed); }
  /// Endpoint::while_halted(); may be empty.
  const std::function<void(bool)>& look_while_halted() const { return look_while_halted_; }
  void set_look_while_halted(std::function<void(bool)> look) { look_while_halted_ = std::move(look); }
  unsigned reserved_ioapic_pins() const { return split_pins_; }

  /// Endpoint::window_memory().
  bool window_memory(u64 begin, u64 size, bool may);

  /// Whether a memslot has the host address, or one that vCPUs may still use. In a signal handler, where code that touches
  /// guest memory holds none of the locks that this takes.
  bool owns_host(u64 host) const;
  /// A store by the engine itself. False when it is not writable memory. Any thread; a vCPU's thread is outside
  /// guest code meanwhile.
  bool write_memory(Gpa to, const void* from, std::size_t size, DirtySink* sink);
  /// Sets bits of a byte by an atomic access: the byte before, or -1. Any thread; what another vCPU's ring would say is not noted.
  int set_memory_bits(Gpa at, u8 bits, DirtySink* sink);

  /// The same for a load. False when a byte is not there.
  bool read_memory(Gpa from, void* to, std::size_t size) const;

  // hv::Host
  hv::Vp* find_vp(u32 vp_index) override;
  void each_vp(const std::function<void(hv::Vp&)>& f) override;
  void sint_acked(u32 vp_index, u32 sint) override;

  // VcpuSink
  int hv_sint(u32 vp_index, u32 sint) override;
  int xen_event(u32 vcpu, u32 port) override { return xen_.deliver(vcpu, port); }
  void wake(unsigned vcpu, Attention why) override;
  void nmi(unsigned vcpu) override;
  void smi(unsigned vcpu) override;
  void init(unsigned vcpu) override;
  void sipi(unsigned vcpu, u8 vector) override;
  void ioapic_eoi(unsigned vcpu, u8 vector) override;

 private:
  explicit Vm(const Config& config);

  void note_dirty(const memory::Slot& slot, Gpa at, DirtySink* sink);

  // xen::Host (xen.cpp)
  bool read(Gpa from, void* to, std::size_t size) override;
  bool write(Gpa to, const void* from, std::size_t size) override;
  int set_bits(Gpa at, u8 bits) override;
  bool read_vmm(u64 address, void* to, std::size_t size) override;
  xen::Vcpu* find_vcpu(u32 id) override;
  int copy_eventfd(int fd) override;
  long xen_ioctl(unsigned long request, u64 arg);
  /// Every vCPU's pages of time are out of date.
  void request_clock_updates();

  long set_memory_region(unsigned long request, u64 arg);
  /// Words of the slot's dirty bitmap; 0: no such slot, or it has none. memory_mutex_ held.
  std::size_t dirty_words(u32 slot) const;
  long dirty_log(unsigned long request, u64 arg);
  long enable_cap(u64 arg);
  long enable_dirty_ring(u64 bytes);
  long reset_dirty_rings();
  long create_irqchip(IrqChip::Mode mode, unsigned pins);
  long create_pit(u32 flags);
  long irqchip_ioctl(unsigned long request, u64 arg);
  long pit_ioctl(unsigned long request, u64 arg);
  long irq_ioctl(unsigned long request, u64 arg);
  static long set_pmu_event_filter(u64 arg);
  long clock_ioctl(unsigned long request, u64 arg);

  const Config config_;
  memory::GuestMemory memory_;
  /// The memslots before a change that vCPUs are being told of; else null. By std::atomic_load and std::atomic_store.
  std::shared_ptr<const memory::SlotTable> retiring_;
  PhysicalTracker tracker_{memory_};
  TimerQueue timers_;
  TscSync tsc_sync_;
  KvmClock clock_;
  hv::Partition hv_{clock_, tsc_sync_};
  xen::Domain xen_;
  ApicBus bus_{*this};
  IoEventfds ioeventfds_;
  CoalescedRing coalesced_;
  MsrFilter msr_filter_;
  Stats stats_;

  std::mutex mutex_;
  std::vector<HostRange> window_memory_;  // guarded by memory_mutex_
  std::mutex memory_mutex_;  // one memslot or dirty-log change at a time, with its shootdown
  unsigned boot_vcpu_ = 0;
  unsigned split_pins_ = 0;
  u64 max_vcpu_id_ = 0;  // KVM_CAP_MAX_VCPU_ID; 0: not set
  u32 default_tsc_khz_ = 0;
  std::atomic<u32> mmu_pages_{0};  // KVM_SET_NR_MMU_PAGES
  u64 tss_addr_ = 0, identity_map_addr_ = 0xfffbc000;
  std::function<void(bool)> look_while_halted_;  // does not change once a vCPU runs
  std::atomic<bool> exception_payload_{false}, triple_fault_event_{false}, stores_announced_{false};
  std::atomic<u32> manual_dirty_log_{0};
  std::atomic<u64> disabled_quirks_{0}, hypercall_exits_{0};
  std::atomic<bool> exits_without_code_{false}, halts_in_guest_{false};
  std::atomic<u64> halt_poll_ns_{config_.halt_poll_ns};
  u32 dirty_ring_entries_ = 0;

  // Destroyed in reverse order: first the threads that raise interrupts, then the vCPUs with their LAPICs, then the chips.
  std::unique_ptr<IrqChip> irqchip_owner_;
  std::unique_ptr<Pit> pit_owner_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  std::unique_ptr<Irqfds> irqfds_;
  std::atomic<IrqChip*> irqchip_{nullptr};
  std::atomic<Pit*> pit_{nullptr};
  std::array<std::atomic<Vcpu*>, kMaxVcpus> by_id_{};
};

}  // namespace ring3::engine::abi
