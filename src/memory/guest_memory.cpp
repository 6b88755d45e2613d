#include "memory/guest_memory.hpp"

#include <linux/kvm.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>

#include "base/checked.hpp"

namespace ring3::memory {
namespace {

constexpr u64 kUserSpaceEnd = (1ull << 47) - kPageSize;  // TASK_SIZE_MAX with four-level host paging
constexpr u64 kMaxPagesPerSlot = (1ull << 31) - 1;       // KVM_MEM_MAX_NR_PAGES
constexpr u64 kMaxGpa = 1ull << 52;
constexpr u32 kKnownFlags = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY;

u64 pages_of(const Slot& s) { return s.size >> kPageShift; }
u64 words_of(const Slot& s) { return (pages_of(s) + 63) / 64; }

bool overlap(u64 a, u64 a_size, u64 b, u64 b_size) { return a < b + b_size && b < a + a_size; }

/// Bits of word w that stand for pages of the slot.
u64 valid_bits(const Slot& s, u64 w) {
  const u64 left = pages_of(s) - w * 64;
  return left >= 64 ? ~0ull : (1ull << left) - 1;
}

std::shared_ptr<std::vector<std::atomic<u64>>> make_bitmap(const Slot& s, bool all_dirty) {
  auto bits = std::make_shared<std::vector<std::atomic<u64>>>(words_of(s));
  if (all_dirty) {
    for (u64 w = 0; w < bits->size(); w++) (*bits)[w].store(valid_bits(s, w), std::memory_order_relaxed);
  }
  return bits;
}

/// Calls visit(slot, gpa, bytes, offset into the request) piece by piece; false when a byte has no slot.
template <class Visit>
bool for_each_piece(const SlotTable& table, Gpa start, u64 size, Visit visit) {
  if (!checked_add(start.value, size)) return false;
  u64 done = 0;
  while (done < size) {
    const Gpa at = start + done;
    const Slot* slot = table.find(at);
    if (slot == nullptr) return false;
    const u64 n = std::min(size - done, slot->size - (at - slot->gpa));
    if (!visit(*slot, at, n, done)) return false;
    done += n;
  }
  return true;
}

}  // namespace

bool Slot::readonly() const { return (flags & KVM_MEM_READONLY) != 0; }

bool Slot::mark_dirty(Gpa a) const {
  if (dirty == nullptr) return false;
  const u64 page = (a - gpa) >> kPageShift;
  std::atomic<u64>& word = (*dirty)[page / 64];
  const u64 bit = 1ull << (page % 64);
  // The load avoids bouncing the line between writers of pages that are dirty already. It orders
  // nothing: who clears the bit also makes every vCPU drop its writable translations and waits for
  // that, so a store that relied on the set bit is finished before the log is handed out.
  if ((word.load(std::memory_order_seq_cst) & bit) != 0) return false;
  return (word.fetch_or(bit, std::memory_order_seq_cst) & bit) == 0;
}

const Slot* SlotTable::find(Gpa a) const {
  auto it = std::upper_bound(slots.begin(), slots.end(), a, [](Gpa g, const Slot& s) { return g < s.gpa; });
  if (it == slots.begin()) return nullptr;
  --it;
  return it->contains(a) ? &*it : nullptr;
}

GuestMemory::GuestMemory() {
  auto table = std::make_shared<SlotTable>();
  table->generation = generation_.load();
  table_ = std::move(table);
}

std::shared_ptr<const SlotTable> GuestMemory::table() const {
  return std::atomic_load_explicit(&table_, std::memory_order_acquire);
}

u64 GuestMemory::generation() const { return generation_.load(std::memory_order_acquire); }

void GuestMemory::set_dirty_initially_set(bool on) {
  std::lock_guard lock(mutex_);
  initially_set_ = on;
}

int GuestMemory::set_region(u32 slot, u32 flags, Gpa gpa, u64 size, Hva hva) {
  if ((flags & ~kKnownFlags) != 0) return -EINVAL;
  if ((size | gpa.value | hva.value) & ~kPageMask) return -EINVAL;
  if (!range_within(hva.value, size, kUserSpaceEnd)) return -EINVAL;
  if ((slot >> 16) != 0 || slot >= kMaxSlots) return -EINVAL;
  if (!checked_add(gpa.value, size)) return -EINVAL;
  if ((size >> kPageShift) > kMaxPagesPerSlot) return -EINVAL;

  std::lock_guard lock(mutex_);
  const std::shared_ptr<const SlotTable> old_table = table();
  const auto& slots = old_table->slots;
  const auto old = std::find_if(slots.begin(), slots.end(), [&](const Slot& s) { return s.id == slot; });
  const bool exists = old != slots.end();

  if (size == 0 && !exists) return -EINVAL;
  if (size != 0 && exists) {
    if (hva != old->hva || size != old->size || ((flags ^ old->flags) & KVM_MEM_READONLY)) return -EINVAL;
    if (gpa == old->gpa && flags == old->flags) return 0;
  }
  if (size != 0) {
    if (!range_within(gpa.value, size, kMaxGpa)) return -EINVAL;
    for (const Slot& s : slots) {
      if (s.id != slot && overlap(gpa.value, size, s.gpa.value, s.size)) return -EEXIST;
    }
  }

  try {
    auto next = std::make_shared<SlotTable>();
    next->slots.reserve(slots.size() + 1);
    for (const Slot& s : slots) {
      if (s.id != slot) next->slots.push_back(s);
    }
    next->has_aliases = old_table->has_aliases;
    if (size != 0) {
      for (const Slot& s : next->slots) {
        if (overlap(hva.value, size, s.hva.value, s.size)) next->has_aliases = true;
      }
      Slot s;
      s.id = slot;
      s.flags = flags;
      s.gpa = gpa;
      s.size = size;
      s.hva = hva;
      if (flags & KVM_MEM_LOG_DIRTY_PAGES) {
        s.dirty = exists && old->dirty != nullptr ? old->dirty : make_bitmap(s, initially_set_);
      }
      const auto at = std::upper_bound(next->slots.begin(), next->slots.end(), gpa,
                                       [](Gpa a, const Slot& b) { return a < b.gpa; });
      next->slots.insert(at, std::move(s));
    }
    // Only an alias that was there can have gone: who adds thousands of slots does not sort them all each time.
    if (exists && old_table->has_aliases) {
      next->has_aliases = false;
      std::vector<std::pair<u64, u64>> host;
      for (const Slot& s : next->slots) host.emplace_back(s.hva.value, s.size);
      std::sort(host.begin(), host.end());
      for (std::size_t i = 1; i < host.size(); i++) {
        if (host[i].first - host[i - 1].first < host[i - 1].second) next->has_aliases = true;
      }
    }
    next->generation = generation_.load(std::memory_order_relaxed) + 1;
    const u64 generation = next->generation;
    std::atomic_store_explicit(&table_, std::shared_ptr<const SlotTable>(std::move(next)),
                               std::memory_order_release);
    generation_.store(generation, std::memory_order_release);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
  return 0;
}

int GuestMemory::get_dirty_log(u32 slot, void* out, bool manual_protect) {
  if ((slot >> 16) != 0 || slot >= kMaxSlots) return -EINVAL;
  std::lock_guard lock(mutex_);
  const auto current = table();
  for (const Slot& s : current->slots) {
    if (s.id != slot) continue;
    if (s.dirty == nullptr) return -ENOENT;
    u8* to = static_cast<u8*>(out);
    for (std::atomic<u64>& word : *s.dirty) {
      const u64 bits = manual_protect || word.load(std::memory_order_relaxed) == 0
                           ? word.load(std::memory_order_seq_cst)
                           : word.exchange(0, std::memory_order_seq_cst);
      std::memcpy(to, &bits, sizeof bits);
      to += sizeof bits;
    }
    return 0;
  }
  return -ENOENT;
}

int GuestMemory::clear_dirty_log(u32 slot, u64 first_page, u32 num_pages, const void* bitmap) {
  if ((first_page & 63) != 0) return -EINVAL;
  if ((slot >> 16) != 0 || slot >= kMaxSlots) return -EINVAL;
  std::lock_guard lock(mutex_);
  const auto current = table();
  for (const Slot& s : current->slots) {
    if (s.id != slot) continue;
    if (s.dirty == nullptr) return -ENOENT;
    const u64 pages = pages_of(s);
    if (first_page > pages || num_pages > pages - first_page ||
        (num_pages < pages - first_page && (num_pages & 63) != 0)) {
      return -EINVAL;
    }
    if (bitmap == nullptr) return 0;
    const u8* from = static_cast<const u8*>(bitmap);
    for (u64 done = 0; done < num_pages; done += 64, from += sizeof(u64)) {
      u64 bits;
      std::memcpy(&bits, from, sizeof bits);
      if (num_pages - done < 64) bits &= (1ull << (num_pages - done)) - 1;
      if (bits != 0) (*s.dirty)[(first_page + done) / 64].fetch_and(~bits, std::memory_order_seq_cst);
    }
    return 0;
  }
  return -ENOENT;
}

bool GuestMemory::read(Gpa from, void* to, u64 size) const {
  const auto current = table();
  const auto any = [](const Slot&, Gpa, u64, u64) { return true; };
  if (!for_each_piece(*current, from, size, any)) return false;
  return for_each_piece(*current, from, size, [to](const Slot& s, Gpa at, u64 n, u64 done) {
    // SAFETY: [at, at+n) lies in the slot.
    std::memcpy(static_cast<u8*>(to) + done, s.host(at), n);
    return true;
  });
}

bool GuestMemory::write(Gpa to, const void* from, u64 size) const {
  const auto current = table();
  const auto writable = [](const Slot& s, Gpa, u64, u64) { return !s.readonly(); };
  if (!for_each_piece(*current, to, size, writable)) return false;
  return for_each_piece(*current, to, size, [from](const Slot& s, Gpa at, u64 n, u64 done) {
    // SAFETY: [at, at+n) lies in the slot.
    std::memcpy(s.host(at), static_cast<const u8*>(from) + done, n);
    // After the bytes: a log that is read in between misses nothing.
    for (u64 p = at.value & kPageMask; p < at.value + n; p += kPageSize) {
      s.mark_dirty(Gpa(std::max(p, at.value)));
    }
    return true;
  });
}

}  // namespace ring3::memory
