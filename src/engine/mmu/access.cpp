#include <algorithm>

#include "engine/mmu/impl.hpp"

/// The slow paths of data accesses and fetches: TLB fills, page crossings, MMIO, breakpoints, code pages.
namespace ring3::engine {

using memory::Slot;

void Mmu::Impl::refresh_table() {
  const u64 generation = memory.generation();
  if (table != nullptr && table->generation == generation) [[likely]]
    return;
  table = memory.table();
  last_slot = nullptr;
}

const Slot* Mmu::Impl::find(Gpa gpa) {
  if (last_slot != nullptr && last_slot->contains(gpa)) [[likely]]
    return last_slot;
  const Slot* slot = table->find(gpa);
  if (slot != nullptr) last_slot = slot;
  return slot;
}

bool Mmu::Impl::linear_ok(u64 linear, unsigned size, Seg seg) {
  if (paging != Paging::Long) return true;
  // The end alone may be outside when an access runs off the end of the lower half.
  if (is_canonical(linear) && is_canonical(linear + size - 1)) [[likely]]
    return true;
  mmu.stop_ = Stop::fault(seg == SS ? vec::SS : vec::GP, 0);
  return false;
}

/// Linear addresses have 32 bits outside 64-bit code; implicit accesses of IA-32e mode have 64.
u64 Mmu::Impl::wrap(u64 linear, Privilege p) const {
  return s.code64() || (s.long_mode() && p == Privilege::System) ? linear : linear & 0xffffffff;
}

Mmu::Impl::Bank& Mmu::Impl::bank_for(Privilege p) {
  if (p == Privilege::Current) return *current;
  return space->bank[smap ? kSupervisorNoUser : kSupervisor];
}

bool Mmu::Impl::page(u64 linear, Access access, Bank& bank, Part* out) {
  const unsigned i = index(linear);
  const TlbEntry& e = bank.entries[i];
  const u64 tag = access == Access::Read ? e.read_tag : access == Access::Write ? e.write_tag : e.exec_tag;
  if (tag == (linear & kPageMask)) {
    // SAFETY: a tag stands for a page of RAM at linear + addend.
    out->host = reinterpret_cast<u8*>(linear + e.addend);
    out->gpa = Gpa(bank.gpa[i] | (linear & ~kPageMask));
    out->tracked = false;
    return true;
  }
  if (access == Access::Write && e.read_tag == (linear & kPageMask) && bank.write_walked.test(i)) {
    // The tag was dropped for the dirty log or for code; the translation still holds.
    out->gpa = Gpa(bank.gpa[i] | (linear & ~kPageMask));
    if (const Slot* slot = find(out->gpa); slot != nullptr && !slot->readonly()) {
      out->host = reinterpret_cast<u8*>(linear + e.addend);
      out->tracked = prepare_store(*slot, out->gpa);
      if (!out->tracked) {
        bank.entries[i].write_tag = linear & kPageMask;
        bank.writable.set(i);
      }
      return true;
    }
  }
  if (access == Access::Exec && bank.exec_walked.test(i) && e.exec_tag == ((linear & kPageMask) | kNoTag)) {
    // The tag was dropped so that the page's content is looked at again.
    out->gpa = Gpa(bank.gpa[i] | (linear & ~kPageMask));
    out->host = reinterpret_cast<u8*>(linear + e.addend);
    out->tracked = false;
    executable(linear, bank, bank.shift[i], bank.global.test(i));
    return true;
  }
  return fill(linear, access, bank, out);
}

void Mmu::Impl::executable(u64 linear, Bank& bank, unsigned page_shift, bool global) {
  const unsigned i = index(linear);
  bank.entries[i].exec_tag = linear & kPageMask;
  bank.executable.set(i);
  bank.exec_walked.clear(i);
  if (user_mode) {
    space->executed.add(linear, page_shift);
    note_fetched(*space, linear, Gpa(bank.gpa[i]), bank.shift[i]);
    return;
  }
  supervisor_executed.add(linear, page_shift);
  if (supervisor_local) {
    space->executed.add(linear, page_shift);
  } else if (!global) {
    supervisor_local = true;
    for (auto& sp : spaces) renew(*sp);
    name_fetches();
  }
}

Mmu::Impl::WalkFor Mmu::Impl::walk_for(Access access, const Bank& bank) const {
  const auto which = &bank - space->bank.begin();
  WalkFor why;
  why.write = access == Access::Write;
  why.fetch = access == Access::Exec;
  why.user = which == kUser;
  why.no_user = which == kSupervisorNoUser && access != Access::Exec;
  return why;
}

bool Mmu::Impl::probe(u64 linear, Access access, const Bank& bank) {
  const unsigned i = index(linear);
  const TlbEntry& e = bank.entries[i];
  if (access == Access::Write && e.read_tag == (linear & kPageMask) && bank.write_walked.test(i)) return true;
  Walk w;
  if (walk(linear, walk_for(access, bank), false, &w)) return true;
  mmu.stop_ = Stop::page_fault(linear, w.error);
  return false;
}

bool Mmu::Impl::prepare_store(const Slot& slot, Gpa gpa) {
  if (slot.mark_dirty(gpa) && mmu.dirty_sink_ != nullptr) mmu.dirty_sink_->page_dirtied(slot.id, (gpa - slot.gpa) >> kPageShift);
  return tracker.note_writer(TrackerCore::key(*table, slot, gpa.page()), TrackerCore::writer_bit(vcpu));
}

bool Mmu::Impl::takes_writes(const Walk& w, const Slot& slot, const Bank& bank) {
  // As a processor's TLB keeps the dirty flag that a read found (SDM vol. 3A 4.10.2.2). Of the user's pages: those that are
  // written most often are read first, and those of the supervisor's direct map are code now and then.
  return w.writable && w.dirty && &bank == &space->bank[kUser] && !slot.readonly() && !slot.logs_dirty() && !prepare_store(slot, w.gpa);
}

bool Mmu::Impl::fill(u64 linear, Access access, Bank& bank, Part* out) {
  Walk w;
  if (!walk(linear, walk_for(access, bank), true, &w)) {
    mmu.stop_ = Stop::page_fault(linear, w.error);
    return false;
  }
  out->gpa = w.gpa;
  out->host = nullptr;
  out->tracked = false;
  const Slot* slot = find(w.gpa);
  if (slot == nullptr || (access == Access::Write && slot->readonly())) return true;
  out->host = slot->host(w.gpa);
  if (access == Access::Write) out->tracked = prepare_store(*slot, w.gpa);
  const u64 page_start = linear & kPageMask;
  if (access != Access::Exec) {
    for (unsigned b = 0; b < breakpoint_count; b++) {
      if ((breakpoints[b].start & kPageMask) == page_start) return true;
    }
  }

  const unsigned i = index(linear);
  TlbEntry& e = bank.entries[i];
  const u64 addend = reinterpret_cast<u64>(out->host) - linear;
  const bool same = bank.filled.test(i) && bank.page_of(i) == page_start && e.addend == addend &&
                    bank.global.test(i) == w.global && bank.shift[i] == w.shift;
  if (!same) {
    bank.reset(i);
    bank.filled.set(i);
    bank.gpa[i] = w.gpa.value & kPageMask;
    bank.shift[i] = w.shift;
    e.addend = addend;
    if (w.global) {
      bank.global.set(i);
      space->low_global |= linear >> 47 == 0;
    }
    if (w.shift != kPageShift) {
      bank.large.set(i);
      bank.note_large(linear, w.shift);
    }
  }
  switch (access) {
    case Access::Write:
      bank.write_walked.set(i);
      if (!out->tracked) {
        e.write_tag = page_start;
        bank.writable.set(i);
      }
      e.read_tag = page_start;
      break;
    case Access::Read:
      e.read_tag = page_start;
      if (takes_writes(w, *slot, bank)) {
        bank.write_walked.set(i);
        bank.writable.set(i);
        e.write_tag = page_start;
      }
      break;
    case Access::Exec:
      executable(linear, bank, w.shift, w.global);
      break;
  }
  return true;
}

bool Mmu::Impl::misaligned(u64 linear, unsigned size) const {
  // Unaligned SSE and AVX operands of 16 bytes or more are #AC on AMD's processors (Zen 3) and are not on Intel's (SDM vol. 2,
  // exceptions of type 4: "8 bytes or less"). Operands that are no power of two long are made of words of at most 8 bytes.
  const bool vector = size == 16 || size == 32 || size == 64;
  if (vector && !amd) return false;
  const unsigned unit = vector ? 16 : size >= 7 ? 8 : size >= 3 ? 4 : size;
  return (linear & (unit - 1)) != 0;
}

bool Mmu::Impl::resolve(u64 linear, unsigned size, Access access, Privilege p, Seg seg, Parts* out) {
  CHECK(size >= 1 && size <= kPageSize);
  refresh_table();
  linear = wrap(linear, p);
  if (!linear_ok(linear, size, seg)) return false;
  if (check_alignment && p == Privilege::Current && access != Access::Exec && misaligned(linear, size)) {
    mmu.stop_ = Stop::fault(vec::AC, 0);
    return false;
  }
  Bank& bank = bank_for(p);
  const unsigned here = static_cast<unsigned>(std::min<u64>(size, kPageSize - (linear & ~kPageMask)));
  out->count = 1;
  out->part[0].size = here;
  if (here == size) [[likely]]
    return page(linear, access, bank, &out->part[0]);
  out->count = 2;
  out->part[1].size = size - here;
  const u64 next = wrap(linear + here, p);
  // No page-table flag is set for a store whose other page faults.
  if (access == Access::Write && !(probe(linear, access, bank) && probe(next, access, bank))) return false;
  return page(linear, access, bank, &out->part[0]) && page(next, access, bank, &out->part[1]);
}

void Mmu::Impl::stored(const Part& part) {
  const Slot* slot = find(part.gpa);
  if (slot == nullptr) return;
  const Gpa key = TrackerCore::key(*table, *slot, part.gpa.page());
  tracker.code_stored(key, part.gpa.page_offset(), part.size, vcpu, [&](Gpa gpa, unsigned size) {
    if (mmu.observer_ != nullptr) mmu.observer_->code_written(gpa, size);
  });
}

void Mmu::Impl::note_breakpoints(u64 linear, unsigned size, bool read, bool write) {
  for (unsigned i = 0; i < breakpoint_count; i++) {
    const Breakpoint& b = breakpoints[i];
    if (!((read && b.on_read) || (write && b.on_write))) continue;
    if (linear - b.start < b.size || b.start - linear < size) hits |= b.bit;
  }
}

bool Mmu::Impl::read_parts(const Parts& parts, u8* out) {
  for (unsigned n = 0; n < parts.count; n++) {
    const Part& part = parts.part[n];
    if (part.host != nullptr) {
      // SAFETY: part.host has part.size bytes of guest RAM, inside one page.
      guest_copy(out, part.host, part.size);
    } else {
      for (unsigned done = 0; done < part.size;) {
        const unsigned chunk = std::min(part.size - done, 8u);
        if (mmu.port_ == nullptr) {
          std::memset(out + done, 0xff, chunk);
        } else if (!mmu.port_->mmio_read(part.gpa + done, out + done, chunk)) {
          mmu.stop_ = Stop::exit();
          return false;
        }
        done += chunk;
      }
    }
    out += part.size;
  }
  return true;
}

/// Devices first: they may ask for another try, and RAM must be unchanged then.
bool Mmu::Impl::write_parts(const Parts& parts, const u8* data) {
  const u8* from = data;
  for (unsigned n = 0; n < parts.count; from += parts.part[n].size, n++) {
    const Part& part = parts.part[n];
    if (part.host != nullptr || mmu.port_ == nullptr) continue;
    for (unsigned done = 0; done < part.size;) {
      const unsigned chunk = std::min(part.size - done, 8u);
      if (!mmu.port_->mmio_write(part.gpa + done, from + done, chunk)) {
        mmu.stop_ = Stop::exit();
        return false;
      }
      done += chunk;
    }
  }
  from = data;
  for (unsigned n = 0; n < parts.count; from += parts.part[n].size, n++) {
    const Part& part = parts.part[n];
    if (part.host == nullptr) continue;
    // SAFETY: as in read_parts().
    guest_copy(part.host, from, part.size);
    if (part.tracked) stored(part);
  }
  return true;
}

// ---- Mmu ----

bool Mmu::read_slow(u64 linear, void* out, unsigned size, Seg seg, Privilege p) {
  Impl::Parts parts;
  if (!impl_->resolve(linear, size, Impl::Access::Read, p, seg, &parts)) return false;
  if (!impl_->read_parts(parts, static_cast<u8*>(out))) return false;
  if (impl_->breakpoint_count != 0 && p == Privilege::Current)
    impl_->note_breakpoints(linear, size, true, false);
  return true;
}

bool Mmu::write_slow(u64 linear, const void* data, unsigned size, Seg seg, Privilege p) {
  Impl::Parts parts;
  if (!impl_->resolve(linear, size, Impl::Access::Write, p, seg, &parts)) return false;
  if (!impl_->write_parts(parts, static_cast<const u8*>(data))) return false;
  if (impl_->breakpoint_count != 0 && p == Privilege::Current)
    impl_->note_breakpoints(linear, size, false, true);
  return true;
}

bool Mmu::write_slow_value(u64 linear, u64 value, unsigned size, Seg seg) {
  return write_slow(linear, &value, size, seg,
                    Privilege::Current);  // little-endian: the low bytes come first
}

bool Mmu::read_bytes(u64 linear, void* out, unsigned size, Seg seg, Privilege p) {
  if (size == 0) return true;
  return read_slow(linear, out, size, seg, p);
}

bool Mmu::write_bytes(u64 linear, const void* data, unsigned size, Seg seg, Privilege p) {
  if (size == 0) return true;
  return write_slow(linear, data, size, seg, p);
}

bool Mmu::check_write(u64 linear, unsigned size, Seg seg, Privilege p) {
  Impl::Parts parts;
  return size == 0 || impl_->resolve(linear, size, Impl::Access::Write, p, seg, &parts);
}

bool Mmu::check_read(u64 linear, unsigned size, Seg seg, Privilege p) {
  Impl::Parts parts;
  return size == 0 || impl_->resolve(linear, size, Impl::Access::Read, p, seg, &parts);
}

bool Mmu::rmw_begin_slow(u64 linear, unsigned size, Seg seg, Rmw* rmw) {
  Impl::Parts parts;
  if (!impl_->resolve(linear, size, Impl::Access::Write, Privilege::Current, seg, &parts)) return false;
  rmw->linear = linear;
  rmw->gpa = parts.part[0].gpa;
  rmw->seg = seg;
  rmw->host = nullptr;
  rmw->tracked = false;
  const Impl::Part& a = parts.part[0];
  const Impl::Part& b = parts.part[1];
  if (parts.count == 1 && a.host != nullptr) {
    rmw->host = a.host;
    rmw->tracked = a.tracked;
  } else if (parts.count == 2 && a.host != nullptr && b.host == a.host + a.size && !a.tracked && !b.tracked) {
    rmw->host = a.host;
  } else {
    if (!impl_->read_parts(parts, rmw->buffer)) return false;
    impl_->open_rmw = parts;
  }
  if (impl_->breakpoint_count != 0) impl_->note_breakpoints(linear, size, true, true);
  return true;
}

bool Mmu::rmw_end_slow(Rmw& rmw, const void* value, unsigned size) {
  if (rmw.host == nullptr) return impl_->write_parts(impl_->open_rmw, static_cast<const u8*>(value));
  Impl::Part part;
  part.gpa = rmw.gpa;
  part.size = size;
  impl_->stored(part);
  return true;
}

u8* Mmu::bulk_pointer(u64 linear, bool for_write, unsigned size) {
  const u64 offset = linear & ~kPageMask;
  if (size == 0 || size > kPageSize - offset) return nullptr;
  const unsigned i = index(linear);
  const auto hit = [&] {
    const TlbEntry& e = bank_->entries[i];
    return (for_write ? e.write_tag : e.read_tag) == (linear & kPageMask);
  };
  if (!hit()) {
    if (impl_->check_alignment) return nullptr;
    const Stop kept = stop_;
    Impl::Parts parts;
    const auto access = for_write ? Impl::Access::Write : Impl::Access::Read;
    const bool ok = impl_->resolve(linear, size, access, Privilege::Current, DS, &parts);
    stop_ = kept;
    if (!ok || !hit()) return nullptr;  // a page that gets no tag is not plain RAM
  }
  // SAFETY: the tag says that the page is RAM, and the range lies in it.
  return reinterpret_cast<u8*>(linear + bank_->entries[i].addend);
}

bool Mmu::warm_across(u64 linear, unsigned size, bool write) {
  const u64 next = (linear | ~kPageMask) + 1;
  const auto hit = [&](u64 at) {
    const TlbEntry& e = bank_->entries[index(at)];
    return (write ? e.write_tag : e.read_tag) == (at & kPageMask);
  };
  if (hit(linear) && hit(next)) return true;
  if (impl_->check_alignment) return false;
  const Stop kept = stop_;
  Impl::Parts parts;
  const bool ok = impl_->resolve(linear, size, write ? Impl::Access::Write : Impl::Access::Read, Privilege::Current,
                                 DS, &parts);
  stop_ = kept;
  return ok && hit(linear) && hit(next);
}

// ---- fetch ----

bool Mmu::fetch(u64 linear, Gpa* gpa, const u8** host) {
  Impl::Bank& bank = *impl_->current;
  const unsigned i = index(linear);
  const TlbEntry& e = bank.entries[i];
  if (e.exec_tag == (linear & kPageMask)) [[likely]] {
    *gpa = Gpa(bank.gpa[i] | (linear & ~kPageMask));
    *host = reinterpret_cast<const u8*>(linear + e.addend);
    return true;
  }
  Impl::Parts parts;
  if (!impl_->resolve(linear, 1, Impl::Access::Exec, Privilege::Current, CS, &parts)) return false;
  *gpa = parts.part[0].gpa;
  *host = parts.part[0].host;
  if (*host != nullptr && observer_ != nullptr)
    observer_->validate_page(gpa->page(), *host - gpa->page_offset());
  return true;
}

unsigned Mmu::fetch_bytes(u64 linear, u8* out, unsigned size) {
  unsigned done = 0;
  while (done < size) {
    const u64 at = impl_->wrap(linear + done, Privilege::Current);
    Gpa gpa;
    const u8* host = nullptr;
    if (!fetch(at, &gpa, &host)) return done;
    Impl::Parts parts;
    parts.count = 1;
    parts.part[0].size = static_cast<unsigned>(std::min<u64>(size - done, kPageSize - (at & ~kPageMask)));
    parts.part[0].gpa = gpa;
    parts.part[0].host = const_cast<u8*>(host);
    if (!impl_->read_parts(parts, out + done)) return done;
    done += parts.part[0].size;
  }
  return done;
}

// ---- code pages ----

void Mmu::add_code_page(Gpa page) {
  page = page.page();
  Impl& i = *impl_;
  i.refresh_table();
  const Slot* slot = i.find(page);
  if (slot == nullptr) return;
  const Gpa key = TrackerCore::key(*i.table, *slot, page);
  if (!i.tracker.add_holder(key, page, i.vcpu)) return;
  std::atomic<u16>& word = i.tracker.word(key);
  const u16 writers = word.fetch_or(TrackerCore::kCode, std::memory_order_seq_cst) & TrackerCore::kWriters;
  if (writers == 0) return;
  const u64 host = reinterpret_cast<u64>(slot->host(page));
  if (writers & TrackerCore::writer_bit(i.vcpu)) i.drop_own_writes(host);
  // Only translations are dropped while waiting: the observer is in the middle of decoding.
  i.tracker.shoot_writers(writers, host, i.vcpu, [&] { i.serve_tlb(); });
  if (i.tracker.is_shared_word(word)) return;
  word.fetch_and(static_cast<u16>(~writers), std::memory_order_seq_cst);
}

void Mmu::release_code_page(Gpa page) { impl_->tracker.remove_holder(page.page(), impl_->vcpu); }

void Mmu::release_code_pages() { impl_->tracker.remove_holders(impl_->vcpu); }

}  // namespace ring3::engine
