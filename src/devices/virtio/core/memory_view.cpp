#include "devices/virtio/core/memory_view.hpp"

#include <algorithm>
#include <cstring>

#include "base/checked.hpp"

namespace ring3::virtio {

u8* MemoryView::range(Gpa start, u64 size, bool write) const {
  u64 there = size;
  u8* host = prefix(start, there, write);
  return there == size ? host : nullptr;
}

u8* MemoryView::prefix(Gpa start, u64& size, bool write) const {
  if (!checked_add(start.value, size)) return nullptr;
  const memory::Slot* slot = table_->find(start);
  if (slot == nullptr || (write && slot->readonly())) return nullptr;
  size = std::min(size, slot->size - (start - slot->gpa));
  return slot->host(start);
}

bool MemoryView::read(Gpa from, void* to, u64 size) const {
  u8* out = static_cast<u8*>(to);
  while (size != 0) {
    u64 n = size;
    const u8* host = prefix(from, n, false);
    if (host == nullptr) return false;
    std::memcpy(out, host, n);
    out += n, from = from + n, size -= n;
  }
  return true;
}

void MemoryView::mark_dirty(Gpa start, u64 size) const {
  while (size != 0) {
    const memory::Slot* slot = table_->find(start);
    if (slot == nullptr) return;
    const u64 n = std::min(size, slot->size - (start - slot->gpa));
    if (slot->logs_dirty()) {
      for (u64 page = start.value & kPageMask; page < start.value + n; page += kPageSize) {
        slot->mark_dirty(Gpa(std::max(page, start.value)));
      }
    }
    start = start + n, size -= n;
  }
}

}  // namespace ring3::virtio
