#include "engine/mmu/impl.hpp"

/// Address spaces, flushes, mode, and the requests of other threads.
namespace ring3::engine {

void Mmu::Impl::activate(u16 pcid) {
  if (space != nullptr && space->pcid == pcid) {
    space->used = ++use_clock;
    return;
  }
  Space* found = nullptr;
  Space* victim = nullptr;
  for (auto& sp : spaces) {
    if (sp->pcid == pcid) found = sp.get();
    if (victim == nullptr || (victim->pcid >= 0 && (sp->pcid < 0 || sp->used < victim->used)))
      victim = sp.get();
  }
  if (found == nullptr) {
    if (spaces.size() < kSpaces && (victim == nullptr || victim->pcid >= 0)) {
      spaces.push_back(std::make_unique<Space>());
      found = spaces.back().get();
      found->exec_epoch = exec_epoch;
      renew(*found);
    } else {
      found = victim;
      found->stale = true;
      if (has_window(*found)) close_window();
    }
    found->pcid = pcid;
  }
  if (found->stale) {
    for (Bank& b : found->bank) b.flush(false);
    found->stale = false;
    renew(*found);
  }
  if (found->exec_epoch != exec_epoch) {
    for (Bank& b : found->bank) b.drop_exec();
    found->exec_epoch = exec_epoch;
    renew(*found);
  }
  found->used = ++use_clock;
  space = found;
  name_fetches();
}

void Mmu::Impl::renew(Space& sp) {
  sp.generation = ++last_generation;
  sp.executed.clear();
  sp.fetched.clear();
  sp.checks = 0;
  // What is in the TLB is fetched under the new generation without another word.
  const Bank& user = sp.bank[kUser];
  user.executable.for_each([&](unsigned i) {
    sp.executed.add(user.entries[i].exec_tag, user.shift[i]);
    note_fetched(sp, user.entries[i].exec_tag, Gpa(user.gpa[i]), user.shift[i]);
  });
  for (unsigned b = kUser + 1; supervisor_local && b < kBanks; b++) note_executable(sp.bank[b], &sp.executed);
  if (&sp == space) name_fetches();
}

bool Mmu::Impl::fetched_are_same(const u64* of_page) {
  const std::size_t count = space->fetched.size();
  if (supervisor_local || paging == Paging::None || count == kMostFetched) return false;
  if (of_page == nullptr) {
    if (count > space->checks) return false;
    space->checks -= count;
  }
  refresh_table();
  WalkFor why;
  why.user = why.fetch = true;
  for (const Fetched& page : space->fetched) {
    if (of_page != nullptr && ((page.linear ^ *of_page) >> page.shift) != 0) continue;
    Walk w;
    if (!walk(page.linear, why, false, &w) || !w.settled || w.gpa.page() != page.gpa) return false;
    const memory::Slot* slot = find(page.gpa);
    if (slot == nullptr) return false;
    space->executed.add(page.linear, w.shift);
    if (mmu.observer_ != nullptr) mmu.observer_->validate_page(page.gpa, slot->host(page.gpa));
  }
  return true;
}

void Mmu::Impl::renew_unless_same(const u64* of_page) {
  // Page tables that have vanished may cut this off: the new generation is in force by then.
  const u64 before = std::exchange(space->generation, ++last_generation);
  name_fetches();
  if (!fetched_are_same(of_page)) {
    renew(*space);
  } else {
    space->generation = before;
    name_fetches();
  }
}

void Mmu::Impl::renew_supervisor() {
  supervisor_generation = ++last_generation;
  supervisor_executed.clear();
  for (auto& sp : spaces)
    for (unsigned b = kUser + 1; sp->pcid >= 0 && b < kBanks; b++) note_executable(sp->bank[b], &supervisor_executed);
  name_fetches();
}

void Mmu::Impl::flush_page_of(Space& sp, u64 linear) {
  for (Bank& b : sp.bank) b.flush_page(linear);
  if (has_window(sp)) window.unmap(linear & kPageMask);
  if (!sp.executed.may_hold(linear)) return;
  if (&sp == space) {
    renew_unless_same(&linear);
  } else {
    renew(sp);
  }
}

void Mmu::Impl::flush_everything() {
  for (auto& sp : spaces) {
    if (sp.get() == space) {
      for (Bank& b : sp->bank) b.flush(false);
      stale_window(*sp);
      renew(*sp);
    } else {
      if (has_window(*sp)) close_window();
      sp->pcid = -1;
      sp->stale = true;
    }
  }
  supervisor_local = false;
  renew_supervisor();
}

void Mmu::Impl::update_breakpoints() {
  const u64* dr = override_on ? override_dr : s.dr;
  const u64 dr7 = override_on ? override_dr7 : s.dr7;
  if (dr7 == seen_dr7 && std::equal(dr, dr + 4, seen_dr)) return;
  seen_dr7 = dr7;
  std::copy(dr, dr + 4, seen_dr);
  const unsigned before = breakpoint_count;
  breakpoint_count = 0;
  for (unsigned i = 0; i < 4; i++) {
    if (((dr7 >> (2 * i)) & 3) == 0) continue;
    const unsigned rw = (dr7 >> (16 + 4 * i)) & 3;
    if (rw != 1 && rw != 3) continue;
    static constexpr u8 kLength[4] = {1, 2, 8, 4};
    Breakpoint& b = breakpoints[breakpoint_count++];
    b.size = kLength[(dr7 >> (18 + 4 * i)) & 3];
    b.start = dr[i] & ~(b.size - 1);
    b.on_write = true;
    b.on_read = rw == 3;
    b.bit = static_cast<u8>(1u << i);
  }
  if (before != 0 || breakpoint_count != 0) flush_everything();
}

void Mmu::Impl::serve_tlb() {
  if ((box.pending.load(std::memory_order_seq_cst) & Mailbox::kTlb) == 0) return;
  std::vector<u64> pages;
  bool all = false;
  u64 ticket = 0;
  {
    std::lock_guard lock(box.mutex);
    pages.swap(box.drop_pages);
    all = std::exchange(box.drop_all_writes, false);
    ticket = box.tlb_posted;
    box.pending.fetch_and(~u32{Mailbox::kTlb}, std::memory_order_seq_cst);
  }
  for_each_bank([&](Bank& b) {
    if (all) {
      b.drop_writes();
    } else {
      for (u64 host : pages) b.drop_writes_to(host);
    }
  });
  if (all) window.drop_writes();
  for (u64 host : pages) window.drop_writes_to(host);
  box.tlb_served.store(ticket, std::memory_order_release);
}

void Mmu::Impl::serve_all() {
  serve_tlb();
  std::vector<CodeWrite> writes;
  bool flush_code = false, slots = false;
  u64 ticket = 0;
  {
    std::lock_guard lock(box.mutex);
    writes.swap(box.writes);
    flush_code = std::exchange(box.code_flush, false);
    slots = std::exchange(box.slots_changed, false);
    ticket = box.slots_posted;
    box.pending.fetch_and(~u32{Mailbox::kCode | Mailbox::kSlots}, std::memory_order_seq_cst);
  }
  CodeObserver* const observer = mmu.observer_;
  if (slots) {
    table = nullptr;
    refresh_table();
    close_window();
    flush_everything();
    flush_code = true;
  }
  if (flush_code) {
    if (observer != nullptr) observer->code_flush();
    tracker.remove_holders(vcpu);
  } else if (observer != nullptr) {
    for (const CodeWrite& w : writes) observer->code_written(w.gpa, w.size);
  }
  if (slots) box.slots_served.store(ticket, std::memory_order_release);
}

void Mmu::Impl::drop_own_writes(u64 host) {
  for_each_bank([&](Bank& b) { b.drop_writes_to(host); });
  window.drop_writes_to(host);
}

// ---- Mmu ----

Mmu::Mmu(VcpuState& state, memory::GuestMemory& memory, PhysicalTracker& tracker, unsigned vcpu_index)
    : state_(state), impl_(std::make_unique<Impl>(*this, memory, *tracker.impl_, vcpu_index)) {
  impl_->box.live.store(true, std::memory_order_seq_cst);
  impl_->refresh_table();
  impl_->activate(0);
  mode_changed();
}

Mmu::~Mmu() {
  impl_->box.live.store(false, std::memory_order_seq_cst);
  impl_->tracker.remove_holders(impl_->vcpu);
  std::lock_guard lock(impl_->box.mutex);
  impl_->box.drop_pages.clear();
  impl_->box.writes.clear();
  impl_->box.drop_all_writes = impl_->box.code_flush = impl_->box.slots_changed = false;
  impl_->box.pending.store(0, std::memory_order_seq_cst);
}

void Mmu::set_features(unsigned maxphyaddr, bool nx, bool page1g, bool pcid, bool amd) {
  impl_->maxphyaddr = maxphyaddr < 32 ? 32 : maxphyaddr > 52 ? 52 : maxphyaddr;
  impl_->has_nx = nx;
  impl_->has_1g = page1g;
  impl_->has_pcid = pcid;
  impl_->amd = amd;
  impl_->configure();
  flush_all();
}

bool Mmu::generation_lives(u64 generation) const {
  return generation == impl_->supervisor_generation ||
         std::any_of(impl_->spaces.begin(), impl_->spaces.end(), [&](const auto& sp) { return sp->generation == generation && sp->pcid >= 0 && !sp->stale; });
}

void Mmu::override_breakpoints(const u64 dr[4], u64 dr7) {
  impl_->override_on = dr != nullptr;
  if (dr != nullptr) std::copy(dr, dr + 4, impl_->override_dr);
  impl_->override_dr7 = dr7;
  impl_->update_breakpoints();
}

void Mmu::mode_changed() {
  Impl& i = *impl_;
  const u64 c0 = state_.cr0 & (cr0::PG | cr0::WP);
  const u64 c4 = state_.cr4 & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::PCIDE);
  const u64 ef = state_.efer & (efer::LMA | efer::NX);
  if (c0 != i.seen_cr0 || c4 != i.seen_cr4 || ef != i.seen_efer || state_.cr3 != i.seen_cr3) [[unlikely]] {
    i.seen_cr0 = c0;
    i.seen_cr4 = c4;
    i.seen_efer = ef;
    i.seen_cr3 = state_.cr3;
    i.configure();
    i.flush_everything();
    i.activate(i.has_pcid && (state_.cr4 & cr4::PCIDE) ? state_.cr3 & 0xfff : 0);
  }
  i.update_breakpoints();
  i.select_bank();
}

void Mmu::flush_all() { impl_->flush_everything(); }

void Mmu::flush_non_global() {
  for (Impl::Bank& b : impl_->space->bank) b.flush(true);
  impl_->stale_window(*impl_->space);
  impl_->renew_unless_same();
}

void Mmu::flush_page(u64 linear) {
  for (auto& sp : impl_->spaces) {
    // Of the others only global pages, which an ordinary system has in its upper half alone.
    const bool concerned = sp.get() == impl_->space || sp->low_global || linear >> 47 != 0;
    if (sp->pcid >= 0 && concerned) impl_->flush_page_of(*sp, linear);
  }
  if (impl_->supervisor_executed.may_hold(linear)) impl_->renew_supervisor();
}

void Mmu::flush_page(u64 linear, u16 pcid) {
  for (auto& sp : impl_->spaces) {
    if (sp->pcid == pcid) impl_->flush_page_of(*sp, linear);
  }
}

void Mmu::flush_pcid(u16 pcid) {
  for (auto& sp : impl_->spaces) {
    if (sp->pcid != pcid) continue;
    for (Impl::Bank& b : sp->bank) b.flush(true);
    impl_->stale_window(*sp);
    if (sp.get() == impl_->space) {
      impl_->renew_unless_same();
    } else {
      impl_->renew(*sp);
    }
  }
}

void Mmu::set_cr3(u64 value, bool no_flush) {
  const bool pcide = impl_->has_pcid && (state_.cr4 & cr4::PCIDE);
  state_.cr3 = impl_->seen_cr3 = value & ~(1ull << 63);
  impl_->activate(pcide ? value & 0xfff : 0);
  impl_->select_bank();  // first: page tables that have vanished may cut off the flush
  if (!(pcide && no_flush)) flush_non_global();
}

void Mmu::expire_fetches() {
  impl_->exec_epoch++;
  for (Impl::Bank& b : impl_->space->bank) b.drop_exec();
  impl_->space->exec_epoch = impl_->exec_epoch;
  impl_->renew(*impl_->space);
  impl_->renew_supervisor();
}

u64 Mmu::take_breakpoint_hits() { return std::exchange(impl_->hits, 0); }

void Mmu::serve_requests() {
  Mailbox& box = impl_->box;
  if (box.pending.load(std::memory_order_acquire) == 0) [[likely]]
    return;
  {
    // Down before the requests are taken: one that is posted from now on raises it again.
    std::lock_guard lock(box.mutex);
    if (box.attention != nullptr) box.attention->clear(box.attention_bit);
  }
  impl_->serve_all();
}

std::atomic_flag& Mmu::split_lock() { return impl_->shared.split_lock; }

}  // namespace ring3::engine
