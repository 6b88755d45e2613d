#pragma once
#include <memory>

#include "base/types.hpp"
#include "memory/guest_memory.hpp"

namespace ring3::virtio {

/// A device's look at guest memory: a memslot table that is held, so that a lookup takes no lock.
///
/// Threading: one thread at a time; each queue has its own.
/// Trust:     addresses and lengths come from the guest: every function checks them, overflow included.
class MemoryView {
 public:
  explicit MemoryView(const memory::GuestMemory& memory) : memory_(&memory), table_(memory.table()) {}

  /// Takes the current table; true when it differs from the one before.
  bool refresh() {
    if (memory_->generation() == table_->generation) [[likely]] return false;
    table_ = memory_->table();
    return true;
  }

  /// SAFETY: host memory of [start, start + size) when all of it lies in one slot, which `write` wants writable; else
  /// null. Valid while the VM's RAM is mapped, which outlives its devices. The guest changes it at any time.
  u8* range(Gpa start, u64 size, bool write) const;
  /// As much of [start, start + size) as lies in the slot of `start`: `size` is cut. Null: no RAM there.
  u8* prefix(Gpa start, u64& size, bool write) const;

  /// Copies; false when a byte has no RAM. May cross slots.
  bool read(Gpa from, void* to, u64 size) const;

  void mark_dirty(Gpa start, u64 size) const;
  /// The device stored there, in what the guest may run: marked, and told to who observes stores.
  void stored(Gpa start, u64 size) const {
    mark_dirty(start, size);
    memory_->stored(start, size);
  }

 private:
  const memory::GuestMemory* memory_;
  std::shared_ptr<const memory::SlotTable> table_;
};

}  // namespace ring3::virtio
