#include <algorithm>

#include "engine/mmu/mmu.hpp"
#include "engine/mmu/tracker_core.hpp"
#include "engine/mmu/tracker_impl.hpp"

namespace ring3::engine {

using memory::Slot;
using memory::SlotTable;

TrackerCore::TrackerCore(memory::GuestMemory& memory) : memory_(memory) {
  const u64 entries = kMaxFrame >> kChunkShift;
  auto directory = Mapping::anonymous(entries * sizeof(std::atomic<std::atomic<u16>*>));
  if (directory) directory_ = std::move(directory).value();
}

TrackerCore::~TrackerCore() {
  for (auto& m : mailboxes_) delete m.load(std::memory_order_relaxed);
}

Mailbox& TrackerCore::mailbox(unsigned index) {
  CHECK(index < kMaxVcpus);
  std::atomic<Mailbox*>& at = mailboxes_[index];
  Mailbox* box = at.load(std::memory_order_acquire);
  if (box == nullptr) {
    auto fresh = std::make_unique<Mailbox>();
    if (at.compare_exchange_strong(box, fresh.get(), std::memory_order_seq_cst)) box = fresh.release();
    unsigned end = mailbox_end_.load(std::memory_order_relaxed);
    while (end <= index && !mailbox_end_.compare_exchange_weak(end, index + 1, std::memory_order_seq_cst)) {
    }
  }
  return *box;
}

std::atomic<u16>& TrackerCore::word(Gpa page) {
  const u64 frame = page.frame();
  if (frame >= kMaxFrame || !directory_) return fallback_;
  // SAFETY: the directory has an entry for every chunk below kMaxFrame; fresh anonymous memory is all
  // zero bits, which is a null pointer and a zero word. Chunks live as long as the tracker.
  auto* directory = reinterpret_cast<std::atomic<std::atomic<u16>*>*>(directory_.data());
  std::atomic<std::atomic<u16>*>& slot = directory[frame >> kChunkShift];
  std::atomic<u16>* chunk = slot.load(std::memory_order_acquire);
  if (chunk == nullptr) [[unlikely]] {
    std::lock_guard lock(chunk_mutex_);
    chunk = slot.load(std::memory_order_acquire);
    if (chunk == nullptr) {
      auto memory = Mapping::anonymous(sizeof(std::atomic<u16>) << kChunkShift);
      if (!memory) return fallback_;
      chunks_.push_back(std::move(memory).value());
      chunk = reinterpret_cast<std::atomic<u16>*>(chunks_.back().data());
      slot.store(chunk, std::memory_order_release);
    }
  }
  return chunk[frame & ((1u << kChunkShift) - 1)];
}

Gpa TrackerCore::key(const SlotTable& table, const Slot& slot, Gpa page) {
  if (!table.has_aliases) [[likely]]
    return page;
  const u64 host = slot.hva.value + (page - slot.gpa);
  for (const Slot& s : table.slots) {
    if (host >= s.hva.value && host - s.hva.value < s.size) return s.gpa + (host - s.hva.value);
  }
  return page;
}

bool TrackerCore::add_holder(Gpa key_page, Gpa page, unsigned vcpu) {
  std::lock_guard lock(holders_mutex_);
  std::vector<Holder>& list = holders_[key_page.frame()];
  for (const Holder& h : list) {
    if (h.vcpu == vcpu && h.page == page) return false;
  }
  list.push_back({vcpu, page});
  return true;
}

void TrackerCore::drop_holder_entry(u64 key_frame, const std::vector<Holder>& left) {
  if (!left.empty()) return;
  // The last holder: its own wait for writers, and those of all before it, are over, so the writers' bits
  // that stand now belong to nobody with a write tag.
  std::atomic<u16>& w = word(Gpa(key_frame << kPageShift));
  if (&w != &fallback_) w.store(0, std::memory_order_seq_cst);
}

void TrackerCore::remove_holder(Gpa page, unsigned vcpu) {
  const auto table = memory_.table();
  const Slot* slot = table->find(page);
  std::lock_guard lock(holders_mutex_);
  const auto it = holders_.find((slot != nullptr ? key(*table, *slot, page) : page).frame());
  if (it == holders_.end()) return;
  std::erase_if(it->second, [&](const Holder& h) { return h.vcpu == vcpu && h.page == page; });
  drop_holder_entry(it->first, it->second);
  if (it->second.empty()) holders_.erase(it);
}

void TrackerCore::remove_holders(unsigned vcpu) {
  std::lock_guard lock(holders_mutex_);
  for (auto it = holders_.begin(); it != holders_.end();) {
    std::erase_if(it->second, [&](const Holder& h) { return h.vcpu == vcpu; });
    drop_holder_entry(it->first, it->second);
    it = it->second.empty() ? holders_.erase(it) : std::next(it);
  }
}

void TrackerCore::post_code_write(Gpa key_page, u64 offset, unsigned size, unsigned vcpu,
                                  std::vector<Gpa>* mine) {
  std::vector<Holder> others;
  {
    std::lock_guard lock(holders_mutex_);
    const auto it = holders_.find(key_page.frame());
    if (it == holders_.end()) return;
    for (const Holder& h : it->second) {
      if (h.vcpu == vcpu) {
        mine->push_back(h.page);
      } else {
        others.push_back(h);
      }
    }
  }
  for (const Holder& h : others) {
    Mailbox& box = mailbox(h.vcpu);
    if (!box.live.load(std::memory_order_acquire)) continue;
    std::lock_guard lock(box.mutex);
    if (!box.code_flush) {
      if (box.writes.size() < Mailbox::kMaxWrites) {
        box.writes.push_back({h.page + offset, size});
      } else {
        box.writes.clear();
        box.code_flush = true;
      }
    }
    box.raise(Mailbox::kCode);
  }
}

void TrackerCore::post_drop(u16 mask, u64 host, unsigned self,
                            std::vector<std::pair<Mailbox*, u64>>* tickets) {
  const unsigned end = mailbox_end_.load(std::memory_order_seq_cst);
  for (unsigned i = 0; i < end; i++) {
    if (i == self || (writer_bit(i) & mask) == 0) continue;
    Mailbox* box = mailboxes_[i].load(std::memory_order_acquire);
    if (box == nullptr || !box->live.load(std::memory_order_seq_cst)) continue;
    std::lock_guard lock(box->mutex);
    if (host == 0 || box->drop_pages.size() >= Mailbox::kMaxDrops) {
      box->drop_all_writes = true;
      box->drop_pages.clear();
    } else if (!box->drop_all_writes) {
      box->drop_pages.push_back(host);
    }
    tickets->emplace_back(box, ++box->tlb_posted);
    box->raise(Mailbox::kTlb);
  }
}

void TrackerCore::slots_changed() {
  std::vector<std::pair<Mailbox*, u64>> tickets;
  const unsigned end = mailbox_end_.load(std::memory_order_seq_cst);
  for (unsigned i = 0; i < end; i++) {
    Mailbox* box = mailboxes_[i].load(std::memory_order_acquire);
    if (box == nullptr || !box->live.load(std::memory_order_seq_cst)) continue;
    std::lock_guard lock(box->mutex);
    box->slots_changed = true;
    tickets.emplace_back(box, ++box->slots_posted);
    box->raise(Mailbox::kSlots);
  }
  for (auto& [box, ticket] : tickets) {
    for (unsigned spins = 0; box->in_guest.load(std::memory_order_seq_cst) &&
                             box->slots_served.load(std::memory_order_acquire) < ticket;
         spins++) {
      back_off(spins);
    }
  }
}

void TrackerCore::host_wrote(Gpa gpa, u64 size) {
  const auto table = memory_.table();
  for (u64 done = 0; done < size;) {
    const Gpa at = gpa + done;
    const u64 n = std::min(size - done, kPageSize - at.page_offset());
    done += n;
    if (const Slot* slot = table->find(at)) host_wrote(*table, *slot, at, static_cast<unsigned>(n));
  }
}

void TrackerCore::host_wrote(const SlotTable& table, const Slot& slot, Gpa at, unsigned size) {
  const Gpa page = key(table, slot, at.page());
  // A read-modify-write, to stand after the stores of the bytes: a decoder sets the code bit in the same
  // way before it reads them, so either it reads the new bytes or its bit is seen here.
  if ((word(page).fetch_or(0, std::memory_order_seq_cst) & kCode) == 0) return;
  code_stored(page, at.page_offset(), size, ~0u, [](Gpa, unsigned) {});
}

PhysicalTracker::PhysicalTracker(memory::GuestMemory& memory) : impl_(std::make_unique<Impl>(memory)) {}
PhysicalTracker::~PhysicalTracker() = default;

void PhysicalTracker::register_vcpu(unsigned index, Mmu* mmu, AttentionWord* attention, u32 attention_bit) {
  Mailbox& box = impl_->core.mailbox(index);
  std::lock_guard lock(box.mutex);
  box.attention = attention;
  box.attention_bit = attention_bit;
  box.mmu.store(mmu, std::memory_order_release);
  if (box.pending.load(std::memory_order_seq_cst) != 0) attention->raise(attention_bit);
}

void PhysicalTracker::unregister_vcpu(unsigned index) {
  Mailbox& box = impl_->core.mailbox(index);
  std::lock_guard lock(box.mutex);
  box.attention = nullptr;
  box.mmu.store(nullptr, std::memory_order_release);
  box.in_guest.store(false, std::memory_order_seq_cst);
}

void PhysicalTracker::enter_guest(unsigned index) {
  Mailbox& box = impl_->core.mailbox(index);
  box.in_guest.store(true, std::memory_order_seq_cst);
  if (box.pending.load(std::memory_order_seq_cst) != 0) {
    if (Mmu* mmu = box.mmu.load(std::memory_order_acquire)) mmu->serve_requests();
  }
}

void PhysicalTracker::leave_guest(unsigned index) {
  impl_->core.mailbox(index).in_guest.store(false, std::memory_order_seq_cst);
}

bool PhysicalTracker::in_guest(unsigned index) const {
  return impl_->core.mailbox(index).in_guest.load(std::memory_order_seq_cst);
}

void PhysicalTracker::memslots_changed() { impl_->core.slots_changed(); }

void PhysicalTracker::restrict_windows(std::vector<HostRange> to) { impl_->core.restrict_windows(std::move(to)); }

void PhysicalTracker::dirty_log_changed() {
  impl_->core.shoot_writers(TrackerCore::kWriters, 0, ~0u, [] {});
}

void PhysicalTracker::host_wrote(Gpa gpa, u64 size) { impl_->core.host_wrote(gpa, size); }
void PhysicalTracker::host_wrote(const SlotTable& table, const Slot& slot, Gpa gpa, unsigned size) {
  impl_->core.host_wrote(table, slot, gpa, size);
}

}  // namespace ring3::engine
