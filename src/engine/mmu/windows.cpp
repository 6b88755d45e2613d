#include <cstring>

#include "engine/mmu/impl.hpp"

/// Which address space has the window, and what gets into it.
namespace ring3::engine {

using memory::Slot;

void Mmu::Impl::close_window() {
  if (window_space == nullptr) return;
  window_space = nullptr;
  window.close();
  show_deltas();
}

bool Mmu::open_window(u64* deltas, u64* first) {
  Impl& i = *impl_;
  i.close_window();
  if (i.paging != Impl::Paging::Long || bank_ != &i.space->bank[kUser]) return false;
  // What position-dependent programs name by absolute addresses lies there.
  if (!i.window.open_region(0)) return false;
  i.window_space = i.space;
  i.window_stale = false;
  i.window_deltas = deltas;
  i.window_first = first;
  i.show_deltas();
  return true;
}

void Mmu::close_window() { impl_->close_window(); }

bool Mmu::window_full() const { return impl_->window.full(); }

std::size_t Mmu::window_pages() const { return impl_->window.pages().size(); }

u64 Mmu::take_window_calls() { return impl_->window.take_calls(); }

bool Mmu::open_window_region(u64 linear) {
  if (window() != WindowState::Ready || !impl_->window.open_region(linear)) return false;
  impl_->show_deltas();
  return true;
}

void Mmu::refresh_window() {
  Impl& i = *impl_;
  if (!i.has_window(*i.space)) return;
  i.refresh_table();
  std::vector<u64> read_only;
  i.window.retain([&](u64 linear, const Window::Page& p) {
    const auto holds = [&](bool write) {
      Impl::WalkFor why;
      why.user = true;
      why.write = write;
      Impl::Walk w;
      if (!i.walk(linear, why, false, &w) || !w.settled || w.shift != p.shift) return false;
      const Slot* slot = i.find(w.gpa);
      return slot != nullptr && reinterpret_cast<u64>(slot->host(w.gpa)) == p.host && !(write && slot->readonly());
    };
    if (p.write && holds(true)) return true;
    if (!holds(false)) return false;
    if (p.write) read_only.push_back(linear);
    return true;
  });
  for (u64 linear : read_only) i.window.drop_write(linear);
  i.window_stale = false;
}

bool Mmu::Impl::map_window(u64 page, u64 host, unsigned count, bool write, u8 shift) {
  if (!tracker.windows_may_map(host, count * kPageSize)) {
    window.refuse();
    return false;
  }
  return window.map(page, host, count, write, shift);
}

/// Of the guest's page of 2 MiB that holds linear: what one memslot backs, in runs with the same rights.
void Mmu::Impl::map_large(u64 linear, u64 host, bool write) {
  constexpr unsigned kShift = 21;
  const u64 first = linear >> kShift << kShift;
  const Bank& bank = space->bank[kUser];
  const Gpa gpa(bank.gpa[index(linear)]);
  const Slot* slot = find(gpa);
  const u64 before = linear - first;
  if (slot == nullptr || slot->logs_dirty() || gpa.value - slot->gpa.value < before ||
      slot->size - (gpa.value - slot->gpa.value) < (1ull << kShift) - before || window.find(linear) != nullptr)
    return;
  const u64 host_first = host - before;
  const auto writable = [&](u64 at) { return write && !prepare_store(*slot, gpa - before + (at - first)); };
  for (u64 at = first, end = first + (1ull << kShift); at < end;) {
    const bool w = writable(at);
    u64 next = at + kPageSize;
    while (next < end && writable(next) == w) next += kPageSize;
    if (!map_window(at, host_first + (at - first), static_cast<unsigned>((next - at) / kPageSize), w, kShift)) return;
    at = next;
  }
}

bool Mmu::peek(u64 linear, u64* to, unsigned size) const {
  const u64 page = linear & kPageMask;
  if (size > sizeof *to || (linear & ~kPageMask) + size > kPageSize) return false;
  const TlbEntry& e = bank_->entries[index(linear)];
  u64 host = 0;
  if (e.read_tag == page) {
    host = page + e.addend;
  } else {
    const Window::Page* const p = impl_->window.find(page);
    if (p == nullptr || window() == WindowState::None) return false;
    host = p->host;
  }
  *to = 0;
  // SAFETY: the page is RAM of a memslot.
  std::memcpy(to, reinterpret_cast<const u8*>(host + (linear & ~kPageMask)), size);
  return true;
}

bool Mmu::foresee_window(u64 host, bool write) {
  Impl& i = *impl_;
  u64 linear = 0;
  if (window() != WindowState::Ready || !i.window.linear_of(host, &linear)) return false;
  Impl::Walk w;
  Impl::WalkFor why;
  why.user = true;
  why.write = write;
  i.refresh_table();
  return i.walk(linear, why, false, &w) && w.settled && warm_window(host, write);
}

bool Mmu::warm_window(u64 host, bool write) {
  Impl& i = *impl_;
  u64 linear = 0;
  if (window() != WindowState::Ready || !i.window.linear_of(host, &linear)) return false;
  // It may lie in two pages: no flag is set in a page table when the other page faults. Where none is left to be set, as once
  // the interpreter has been there, what lies behind the page does not matter.
  constexpr u64 kLongest = 64;
  if ((linear & ~kPageMask) > kPageSize - kLongest) {
    Impl::Walk next, here;
    Impl::WalkFor why;
    why.user = true;
    why.write = write;
    i.refresh_table();
    if (!i.walk((linear & kPageMask) + kPageSize, why, false, &next) && !(i.walk(linear, why, false, &here) && here.settled))
      return false;
  }
  linear &= kPageMask;
  if (!warm(linear, 1, write)) return false;
  const Impl::Bank& bank = i.space->bank[kUser];
  struct Here {
    u64 host = 0;
    bool write = false;
    u8 shift = 0;
  };
  const auto here = [&](u64 page) {
    const unsigned n = index(page);
    const TlbEntry& e = bank.entries[n];
    if (e.read_tag != page) return Here{};
    return Here{page + e.addend, e.write_tag == page, bank.shift[n]};
  };
  if (here(linear).shift == 21) i.map_large(linear, here(linear).host, here(linear).write);
  constexpr u64 kAround = 16 * kPageSize;
  const auto missing = [&](u64 page, const Here& h) {
    const Window::Page* p = i.window.find(page);
    return h.host != 0 && (p == nullptr || p->host != h.host || (h.write && !p->write));
  };
  for (u64 page = linear & ~(kAround - 1), end = page + kAround; page < end;) {
    const Here first = here(page);
    u64 next = page + kPageSize;
    if (missing(page, first)) {
      for (; next < end; next += kPageSize) {
        const Here h = here(next);
        if (h.host != first.host + (next - page) || h.write != first.write || h.shift != first.shift || !missing(next, h)) break;
      }
      (void)i.map_window(page, first.host, static_cast<unsigned>((next - page) / kPageSize), first.write, first.shift);
    }
    page = next;
  }
  const Window::Page* p = i.window.find(linear);
  return p != nullptr && (p->write || !write);
}

}  // namespace ring3::engine
