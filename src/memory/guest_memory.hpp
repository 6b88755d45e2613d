#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

/// Guest physical memory as KVM's memslots describe it.
///
/// Spec:      virt/kvm/api, KVM_SET_USER_MEMORY_REGION, KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG.
/// Ownership: host memory belongs to the embedding VMM; this only refers to it.
/// Threading: lookups from any thread, lock-free against one immutable table (table() itself takes a
///            reference under a short lock: hold the table and compare generation(), which is one load);
///            set_region and the dirty-log calls are serialised. After a change the generation differs; the
///            engine makes every vCPU drop what it cached before set_region's caller is answered.
/// Trust:     guest addresses come from the guest; slots from the VMM.
namespace ring3::memory {

inline constexpr u32 kMaxSlots = 32764;

struct Slot {
  u32 id = 0;
  u32 flags = 0;  ///< KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY
  Gpa gpa;
  u64 size = 0;  ///< bytes, a multiple of the page size
  Hva hva;
  /// One bit a page when dirty logging is on; shared by the tables that hold the slot.
  std::shared_ptr<std::vector<std::atomic<u64>>> dirty;

  bool readonly() const;
  bool logs_dirty() const { return dirty != nullptr; }
  bool contains(Gpa a) const { return a >= gpa && a - gpa < size; }
  /// SAFETY: only for a with contains(a); the result is valid to the end of the slot.
  u8* host(Gpa a) const { return reinterpret_cast<u8*>(hva.value + (a - gpa)); }
  /// Marks the page of a dirty when logging is on; whether it was clean. Any thread.
  bool mark_dirty(Gpa a) const;
};

/// An immutable set of slots sorted by gpa.
struct SlotTable {
  std::vector<Slot> slots;
  u64 generation = 0;
  bool has_aliases =
      false;  ///< two slots share host memory: one byte has more than one guest-physical address
  const Slot* find(Gpa a) const;  ///< null: no memory there (MMIO)
};

class GuestMemory {
 public:
  GuestMemory();

  /// The current table; valid for as long as the returned pointer is held.
  std::shared_ptr<const SlotTable> table() const;
  u64 generation() const;

  /// KVM_SET_USER_MEMORY_REGION: create, move, change flags, or delete (size 0). slot is the ABI's
  /// field: the address space in its upper half (only 0 exists) and the id in its lower half.
  /// Returns 0 or -errno as the kernel does (-EINVAL, -EEXIST, -ENOMEM). The hva range must be user
  /// address space; whether it is mapped is the VMM's business.
  int set_region(u32 slot, u32 flags, Gpa gpa, u64 size, Hva hva);

  /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with KVM_DIRTY_LOG_INITIALLY_SET: bitmaps of slots that start
  /// logging from now on begin with every page dirty.
  void set_dirty_initially_set(bool on);

  /// KVM_GET_DIRTY_LOG: copies the bitmap to out (size/4096/8 rounded up to 8 bytes) and, unless
  /// manual_protect, clears it. 0 or -errno.
  int get_dirty_log(u32 slot, void* out, bool manual_protect);
  /// KVM_CLEAR_DIRTY_LOG: clears the pages whose bits are set in bitmap. 0 or -errno. bitmap null: only says what would be wrong.
  ///
  /// Either call clears bits while vCPUs may hold writable translations: the caller makes them drop
  /// those (PhysicalTracker::dirty_log_changed) before it answers the VMM, which then reads the pages.
  int clear_dirty_log(u32 slot, u64 first_page, u32 num_pages, const void* bitmap);

  /// Copies between host and guest-physical memory; false when any byte is not backed (nothing is
  /// copied then). write() marks pages dirty and refuses read-only slots.
  bool read(Gpa from, void* to, u64 size) const;
  bool write(Gpa to, const void* from, u64 size) const;

  /// Who wants to know of stores by devices: set before there are any. Called on their threads.
  void observe_stores(std::function<void(Gpa, u64)> observer) { observer_ = std::move(observer); }
  /// A device stored to [start, start + size), all of it memory, and the guest has not been told yet. Any thread.
  void stored(Gpa start, u64 size) const {
    if (observer_) observer_(start, size);
  }

 private:
  std::function<void(Gpa, u64)> observer_;
  mutable std::mutex mutex_;
  std::shared_ptr<const SlotTable> table_;  // guarded by std::atomic_load/store
  std::atomic<u64> generation_{1};
  bool initially_set_ = false;  // guarded by mutex_
};

}  // namespace ring3::memory
