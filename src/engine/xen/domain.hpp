#pragma once
#include <atomic>
#include <map>
#include <mutex>
#include <span>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "engine/timer/clock.hpp"
#include "engine/timer/pvclock.hpp"
#include "engine/xen/interface.hpp"

/// What Xen calls a domain: what a VM's vCPUs share of its interface. The hypercall page, the shared page, event channels.
///
/// Spec:      virt/kvm/api KVM_XEN_HVM_CONFIG, KVM_XEN_HVM_SET_ATTR, KVM_XEN_HVM_EVTCHN_SEND, KVM_EXIT_XEN; Xen's public headers.
/// Threading: everything from any thread. mutex_ is held while an event is delivered; Memory and Lapic are called under it.
/// Trust:     the shared page is the guest's and where it lies the VMM's; every access may fail, which is an error of the call.
/// Not here:  FIFO event channels, grant tables, and every hypercall that is not in hypercall.cpp: they are the VMM's.
namespace ring3::engine::xen {

class Vcpu;

/// Guest memory by physical address. False, or below 0: a byte is not there, or may not be written.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual bool read(Gpa from, void* to, std::size_t size) = 0;
  virtual bool write(Gpa to, const void* from, std::size_t size) = 0;
  /// Sets bits of a byte by an atomic access: the byte before.
  virtual int set_bits(Gpa at, u8 bits) = 0;
};

/// What a domain needs of its VM. Any thread.
class Host : public Memory {
 public:
  /// By KVM's id; null: there is none.
  virtual Vcpu* find_vcpu(u32 id) = 0;
  /// From the VMM's own memory. False: a byte is not there.
  virtual bool read_vmm(u64 address, void* to, std::size_t size) = 0;
  /// A copy of the VMM's eventfd, or -EBADF, -EINVAL.
  virtual int copy_eventfd(int fd) = 0;
};

/// An area of guest memory that the VMM has named. It lies in one page.
class Area {
 public:
  static constexpr u64 kNowhere = ~0ull;
  u64 address() const { return address_.load(std::memory_order_acquire); }
  bool set() const { return address() != kNowhere; }
  /// As the kernel: 0; -EINVAL when it would cross a page; -EFAULT when no writable memory is there, and then it is
  /// remembered all the same, for when there is.
  int place(Memory& memory, u64 address, u32 size);

 private:
  std::atomic<u64> address_{kNowhere};
};

class Domain {
 public:
  /// KVM_CAP_XEN_HVM.
  static constexpr u32 kOffered = KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_SHARED_INFO |
                                  KVM_XEN_HVM_CONFIG_RUNSTATE | KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;

  Domain(Host& host, const Clock& host_clock, const KvmClock& clock) : host_(host), host_clock_(host_clock), clock_(clock) {}

  /// KVM_XEN_HVM_CONFIG: 0 or -errno.
  int configure(const kvm_xen_hvm_config& config);
  /// KVM_XEN_HVM_SET_ATTR, KVM_XEN_HVM_GET_ATTR: 0 or -errno. A new shared page changes the clock's pages of every vCPU.
  int set_attr(const kvm_xen_hvm_attr& attr);
  int get_attr(kvm_xen_hvm_attr* attr) const;
  /// KVM_XEN_HVM_EVTCHN_SEND: 0 or -errno.
  int send(const kvm_irq_routing_xen_evtchn& event);
  /// Memslots have changed: afterwards nobody uses those of before.
  void memory_changed() { const std::lock_guard lock(mutex_); }

  /// The VM has something of Xen's.
  bool enabled() const { return msr_.load(std::memory_order_acquire) != 0; }
  /// The MSR by which a guest asks for hypercall pages.
  bool is_msr(u32 index) const { return index != 0 && index == msr_.load(std::memory_order_acquire); }
  /// VMCALL and VMMCALL are Xen's hypercalls.
  bool intercepts() const { return intercepts_.load(std::memory_order_acquire); }
  /// The VMM sends every event through here, so that a vCPU may wait for some.
  bool sends_all_events() const { return sends_all_.load(std::memory_order_acquire); }

  /// WRMSR of that MSR: a page's address, and which of the VMM's pages in the low bits. amd: the guest's instruction is VMMCALL.
  /// False: #GP.
  bool write_page(u64 value, bool long_mode, bool amd, const GuestWriter& write);

  const SharedInfoLayout& layout() const { return long_mode_.load(std::memory_order_acquire) ? kLayout64 : kLayout32; }
  bool long_mode() const { return long_mode_.load(std::memory_order_acquire); }
  /// The vector of vCPUs that have an event; 0: none.
  u8 upcall_vector() const { return upcall_vector_.load(std::memory_order_acquire); }
  /// 0: XENVER_version is the VMM's.
  u32 version() const { return version_.load(std::memory_order_relaxed); }
  u64 now_ns() const { return clock_.now_ns(); }
  const KvmClock& clock() const { return clock_; }

  /// Makes a port pending for a vCPU. Above 0: delivered; 0: it was pending; -ENOTCONN: masked; -EINVAL, -EFAULT: there is no
  /// such vCPU or port, or no shared page.
  int deliver(u32 vcpu, u32 port);
  /// EVTCHNOP_send. False: the VMM's.
  bool send_from_guest(u32 port);
  /// SCHEDOP_poll: the vCPU waits for one of the ports, or for any when there is not just one. False: one is pending, or
  /// nothing can be waited for.
  bool poll(Vcpu& vcpu, std::span<const u32> ports);

 private:
  /// Where a guest's sends by one port go: to a port of the same guest, or to an eventfd (port 0).
  struct Channel {
    u32 type, port, vcpu;
    UniqueFd eventfd;
  };
  int share_page(u64 gfn);
  int change_channel(const kvm_xen_hvm_attr& attr);
  int assign_channel(const kvm_xen_hvm_attr& attr);
  int update_channel(const kvm_xen_hvm_attr& attr);
  int deliver_locked(u32 vcpu, u32 port);
  /// -1: the page is not there.
  int test_locked(u32 bitmap, u32 port) const;

  Host& host_;
  const Clock& host_clock_;
  const KvmClock& clock_;
  mutable std::mutex mutex_;
  kvm_xen_hvm_config config_{};         // guarded by mutex_
  std::map<u32, Channel> channels_;     // guarded by mutex_
  Area shared_;
  std::atomic<u32> msr_{0}, version_{0};
  std::atomic<bool> intercepts_{false}, sends_all_{false}, long_mode_{false};
  std::atomic<u8> upcall_vector_{0};
};

}  // namespace ring3::engine::xen
