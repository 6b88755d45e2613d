#pragma once
#include <array>
#include <atomic>
#include <functional>
#include <map>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "engine/hyperv/tlfs.hpp"
#include "engine/timer/pvclock.hpp"

/// What Hyper-V calls a partition: the state that a VM's virtual processors share.
///
/// Spec:      TLFS "Partition reference time", "Guest crash enlightenment", "Hypercall interface"; virt/kvm/api
///            KVM_HYPERV_EVENTFD.
/// Threading: everything from any thread; one lock, which no callback runs under.
/// Trust:     values of MSRs and the pages that they name come from the guest: a page that is not there is an error or, for
///            the TSC page, a page that is never written.
namespace ring3::engine::hv {

class Vp;

/// What virtual processors need of the VM that they are in. Any thread.
class Host {
 public:
  virtual ~Host() = default;
  /// Null: there is none of that index.
  virtual Vp* find_vp(u32 vp_index) = 0;
  virtual void each_vp(const std::function<void(Vp&)>& f) = 0;
  /// The guest has taken what a SINT said: irqfds with resampling on its GSI want to know.
  virtual void sint_acked(u32 vp_index, u32 sint) = 0;
};

/// Guest memory, by physical address, for the vCPU that uses it. False: a byte is not there, or may not be written.
class GuestPages {
 public:
  virtual ~GuestPages() = default;
  virtual bool read(Gpa from, void* to, std::size_t size) = 0;
  virtual bool write(Gpa to, const void* from, std::size_t size) = 0;
};

class Partition {
 public:
  static constexpr std::size_t kMaxConnections = 1000;

  Partition(const KvmClock& clock, const TscSync& sync) : clock_(clock), sync_(sync) {}

  static bool owns_msr(u32 index);
  struct Access {
    bool host;              ///< KVM_GET/SET_MSRS: the VMM's, not the guest's
    bool syndbg;            ///< CPUID offers the synthetic debugger
    bool amd;               ///< the hypercall page holds VMMCALL
    const Tsc& tsc;         ///< the vCPU's
    GuestPages& pages;
  };
  /// False: #GP, or no such MSR.
  bool read_msr(u32 index, const Access& access, u64* value);
  bool write_msr(u32 index, const Access& access, u64 value);

  /// The reference time, in 100 ns.
  u64 time(const Tsc& tsc) const;
  /// The VM's clock or a TSC was set: the TSC page is out of date.
  void clock_changed();
  /// Writes the TSC page when it is. Between instructions of the vCPU.
  void update_tsc_page(const Tsc& tsc, GuestPages& pages);

  /// VMCALL and VMMCALL are Hyper-V's as soon as a guest has said who it is.
  bool has_guest_os() const;
  /// Whether the VM has Xen's hypercalls too: the page then sets bit 31 of EAX, which tells Hyper-V's. Any thread.
  void set_beside_xen(bool on) { beside_xen_.store(on, std::memory_order_relaxed); }
  u64 syndbg_options() const;
  struct Syndbg {
    u64 control = 0, status = 0, send_page = 0, recv_page = 0, pending_page = 0, options = 0;
  };
  Syndbg syndbg() const;
  void set_syndbg_status(u64 status);

  /// KVM_HYPERV_EVENTFD: 0 or -errno.
  int change_connection(const kvm_hyperv_eventfd& request);
  /// False: no such connection.
  bool signal(u32 connection);

 private:
  enum class Page { kUnset, kGuestChanged, kHostChanged, kSet, kBroken };
  bool write_hypercall_page(u64 value, const Access& access);
  void update_tsc_page_locked(const Tsc& tsc, GuestPages& pages);
  bool write_tsc_page_locked(const Tsc& tsc, GuestPages& pages);
  u64 time_locked(const Tsc& tsc) const;
  /// After a migration that changed the TSC's rate a guest has its TSC emulated, and the page must stay as it was.
  bool page_is_frozen() const { return page_ != Page::kGuestChanged && tsc_emulation_control_ != 0; }

  const KvmClock& clock_;
  const TscSync& sync_;
  mutable std::mutex mutex_;
  u64 guest_os_id_ = 0, hypercall_ = 0, reference_tsc_ = 0;
  u64 reenlightenment_control_ = 0, tsc_emulation_control_ = 0, tsc_emulation_status_ = 0;
  u64 crash_ctl_ = 0;
  std::array<u64, 5> crash_{};
  Syndbg syndbg_;
  std::atomic<bool> beside_xen_{false};
  Page page_ = Page::kUnset;
  TscPage tsc_page_{};
  std::map<u32, UniqueFd> connections_;
};

}  // namespace ring3::engine::hv
