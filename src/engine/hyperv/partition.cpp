#include "engine/hyperv/partition.hpp"

#include <fcntl.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "base/event_fd.hpp"

namespace ring3::engine::hv {

bool Partition::owns_msr(u32 index) {
  switch (index) {
    case msr::kGuestOsId:
    case msr::kHypercall:
    case msr::kReset:
    case msr::kTimeRefCount:
    case msr::kReferenceTsc:
    case msr::kSyndbgOptions: return true;
    default:
      return (index >= msr::kCrashP0 && index <= msr::kTscEmulationStatus) ||
             (index >= msr::kSyndbgControl && index <= msr::kSyndbgPendingBuffer);
  }
}

namespace {
u64* syndbg_field(Partition::Syndbg& s, u32 index) {
  switch (index) {
    case msr::kSyndbgControl: return &s.control;
    case msr::kSyndbgStatus: return &s.status;
    case msr::kSyndbgSendBuffer: return &s.send_page;
    case msr::kSyndbgRecvBuffer: return &s.recv_page;
    case msr::kSyndbgPendingBuffer: return &s.pending_page;
    case msr::kSyndbgOptions: return &s.options;
    default: return nullptr;
  }
}
}  // namespace

bool Partition::read_msr(u32 index, const Access& access, u64* value) {
  const std::lock_guard lock(mutex_);
  switch (index) {
    case msr::kGuestOsId: *value = guest_os_id_; return true;
    case msr::kHypercall: *value = hypercall_; return true;
    case msr::kReset: *value = 0; return true;
    case msr::kTimeRefCount: *value = time_locked(access.tsc); return true;
    case msr::kReferenceTsc: *value = reference_tsc_; return true;
    case msr::kCrashCtl: *value = crash_ctl_; return true;
    case msr::kReenlightenmentControl: *value = reenlightenment_control_; return true;
    case msr::kTscEmulationControl: *value = tsc_emulation_control_; return true;
    case msr::kTscEmulationStatus: *value = tsc_emulation_status_; return true;
    default: break;
  }
  if (index >= msr::kCrashP0 && index <= msr::kCrashP4) {
    *value = crash_[index - msr::kCrashP0];
    return true;
  }
  const u64* field = syndbg_field(syndbg_, index);
  if (field == nullptr || (!access.syndbg && !access.host)) return false;
  *value = *field;
  return true;
}

bool Partition::write_msr(u32 index, const Access& access, u64 value) {
  const std::lock_guard lock(mutex_);
  switch (index) {
    case msr::kGuestOsId:
      guest_os_id_ = value;
      if (value == 0) hypercall_ &= ~kPageEnable;
      return true;
    case msr::kHypercall:
      if (guest_os_id_ == 0) return true;  // stays disabled
      if ((value & kPageEnable) && !write_hypercall_page(value, access)) return false;
      hypercall_ = value;
      return true;
    case msr::kReset:
    case msr::kCrashCtl:
      if (index == msr::kCrashCtl && access.host) crash_ctl_ = value & kCrashNotify;
      return true;  // what they ask for is Vp's to say
    case msr::kTimeRefCount: return access.host;  // read-only; a VMM that restores it means no harm
    case msr::kReferenceTsc:
      reference_tsc_ = value;
      page_ = !(value & kPageEnable) ? Page::kUnset : access.host ? Page::kHostChanged : Page::kGuestChanged;
      if (page_ == Page::kGuestChanged) update_tsc_page_locked(access.tsc, access.pages);
      return true;  // the VMM's write: memory may not be back yet, so the page is written before the guest runs
    case msr::kReenlightenmentControl: reenlightenment_control_ = value; return true;
    case msr::kTscEmulationControl: tsc_emulation_control_ = value; return true;
    case msr::kTscEmulationStatus:
      if (value != 0 && !access.host) return false;
      tsc_emulation_status_ = value;
      return true;
    default: break;
  }
  if (index >= msr::kCrashP0 && index <= msr::kCrashP4) {
    crash_[index - msr::kCrashP0] = value;
    return true;
  }
  u64* field = syndbg_field(syndbg_, index);
  if (field == nullptr || (!access.syndbg && !access.host)) return false;
  *field = value;
  return true;
}

bool Partition::write_hypercall_page(u64 value, const Access& access) {
  // OR EAX, 1 << 31; VMMCALL or VMCALL; RET
  const u8 code[9] = {0x0d, 0, 0, 0, 0x80, 0x0f, 0x01, static_cast<u8>(access.amd ? 0xd9 : 0xc1), 0xc3};
  const unsigned skip = beside_xen_.load(std::memory_order_relaxed) ? 0 : 5;
  return access.pages.write(Gpa(value & kPageMask), code + skip, sizeof code - skip);
}

// ---- reference time ----

u64 Partition::time_locked(const Tsc& tsc) const {
  if (page_ != Page::kSet) return clock_.now_ns() / 100;
  return static_cast<u64>(static_cast<u128>(tsc.read()) * tsc_page_.scale >> 64) + tsc_page_.offset;
}

u64 Partition::time(const Tsc& tsc) const {
  const std::lock_guard lock(mutex_);
  return time_locked(tsc);
}

void Partition::clock_changed() {
  const std::lock_guard lock(mutex_);
  if (page_ == Page::kSet && !page_is_frozen()) page_ = Page::kHostChanged;
}

void Partition::update_tsc_page(const Tsc& tsc, GuestPages& pages) {
  const std::lock_guard lock(mutex_);
  update_tsc_page_locked(tsc, pages);
}

void Partition::update_tsc_page_locked(const Tsc& tsc, GuestPages& pages) {
  if (page_ != Page::kGuestChanged && page_ != Page::kHostChanged) return;
  page_ = write_tsc_page_locked(tsc, pages) ? Page::kSet : Page::kBroken;
}

bool Partition::write_tsc_page_locked(const Tsc& tsc, GuestPages& pages) {
  const Gpa at(reference_tsc_ & kPageMask);
  u32 sequence;
  if (!pages.read(at, &sequence, sizeof sequence)) return false;
  if (sequence != 0 && page_is_frozen()) return pages.read(at, &tsc_page_, sizeof tsc_page_);
  // Sequence 0 while it changes: the guest reads the MSR.
  tsc_page_ = TscPage{};
  if (!pages.write(at, &tsc_page_.sequence, sizeof tsc_page_.sequence)) return false;
  const PvclockTimeInfo line = clock_.line(tsc, sync_);
  if (!(line.flags & kPvclockTscStable)) return false;
  // ns = (ticks - timestamp) * mul * 2^(shift - 32) + system_time; a unit of the page is 100 ns and its scale has 64 bits.
  const u128 scale = (static_cast<u128>(line.tsc_to_system_mul) << (32 + line.tsc_shift)) / 100;
  if (scale >> 64) return false;
  tsc_page_.scale = static_cast<u64>(scale);
  tsc_page_.offset = line.system_time / 100 - static_cast<u64>(static_cast<u128>(line.tsc_timestamp) * tsc_page_.scale >> 64);
  if (!pages.write(at, &tsc_page_, sizeof tsc_page_)) return false;
  std::atomic_signal_fence(std::memory_order_release);
  tsc_page_.sequence = sequence + 1 == 0 || sequence + 1 == ~0u ? 1 : sequence + 1;
  return pages.write(at, &tsc_page_.sequence, sizeof tsc_page_.sequence);
}

// ---- the rest ----

bool Partition::has_guest_os() const {
  const std::lock_guard lock(mutex_);
  return guest_os_id_ != 0;
}
u64 Partition::syndbg_options() const { return syndbg().options; }
Partition::Syndbg Partition::syndbg() const {
  const std::lock_guard lock(mutex_);
  return syndbg_;
}
void Partition::set_syndbg_status(u64 status) {
  const std::lock_guard lock(mutex_);
  syndbg_.status = status;
}

int Partition::change_connection(const kvm_hyperv_eventfd& r) {
  if ((r.flags & ~static_cast<u32>(KVM_HYPERV_EVENTFD_DEASSIGN)) || (r.conn_id & ~static_cast<u32>(KVM_HYPERV_CONN_ID_MASK))) {
    return -EINVAL;
  }
  if (r.flags & KVM_HYPERV_EVENTFD_DEASSIGN) {
    const std::lock_guard lock(mutex_);
    return connections_.erase(r.conn_id) == 1 ? 0 : -ENOENT;
  }
  UniqueFd fd(::fcntl(r.fd, F_DUPFD_CLOEXEC, 0));
  if (!fd) return -errno;
  const std::lock_guard lock(mutex_);
  if (connections_.size() >= kMaxConnections) return -ENOSPC;
  return connections_.try_emplace(r.conn_id, std::move(fd)).second ? 0 : -EEXIST;
}

bool Partition::signal(u32 connection) {
  const std::lock_guard lock(mutex_);
  const auto it = connections_.find(connection);
  if (it == connections_.end()) return false;
  signal_event(it->second.get());
  return true;
}

}  // namespace ring3::engine::hv
