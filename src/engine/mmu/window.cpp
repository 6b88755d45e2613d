#include "engine/mmu/window.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>

#include "base/check.hpp"

namespace ring3::engine {
namespace {

std::atomic<long> g_mappings{0};  // of all windows, but for what is mapped nowhere

void* pointer(u64 address) { return reinterpret_cast<void*>(address); }

constexpr u64 kReserved = Window::kRegionSize + 2 * Window::kGuard;

/// Host addresses at which nothing is: just there, or nowhere; null: wherever there is room.
void* reserve(void* there) {
  const int fixed = there != nullptr ? MAP_FIXED_NOREPLACE : 0;
  void* p = ::mmap(there, kReserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  if (p != MAP_FAILED && there != nullptr && p != there) {  // a kernel that does not know the flag
    ::munmap(p, kReserved);
    p = MAP_FAILED;
  }
  if (p != MAP_FAILED) (void)::madvise(p, kReserved, MADV_DONTDUMP);
  return p;
}

}  // namespace

bool Window::open_region(u64 linear) {
  const u64 region = linear >> kRegionShift;
  if (region >= kRegions) return false;
  if (has_region(region)) return true;
  if (is_twin(region)) return open_twins();
  void* p = MAP_FAILED;
  if (regions_ < kMaxRegions) {
    // From the bottom up: what lies further up is for twins.
    for (u64 at = kReserved; p == MAP_FAILED && at < kPrograms << (kRegionShift - 1); at += kReserved) p = reserve(pointer(at));
    if (p == MAP_FAILED) p = reserve(nullptr);
  }
  if (p == MAP_FAILED) {
    full_ = true;
    return false;
  }
  deltas_[region] = reinterpret_cast<u64>(p) + kGuard - (region << kRegionShift);
  regions_++;
  return true;
}

/// As far below the guest's addresses as need be: the host's own lie in the same regions.
bool Window::open_twins() {
  for (u64 down = kReserved; regions_ + 2 <= kMaxRegions && down < kPrograms << kRegionShift; down += kReserved) {
    const auto start = [&](u64 region) { return (region << kRegionShift) - down - kGuard; };
    if (reserve(pointer(start(kPrograms))) == MAP_FAILED) continue;
    if (reserve(pointer(start(kStacks))) == MAP_FAILED) {
      CHECK(::munmap(pointer(start(kPrograms)), kReserved) == 0);
      continue;
    }
    deltas_[kPrograms] = deltas_[kStacks] = 0 - down;
    regions_ += 2;
    return true;
  }
  full_ = true;
  return false;
}

void Window::close() {
  for (u64 region = 0; region < kRegions; region++) {
    if (!has_region(region)) continue;
    const u64 start = (region << kRegionShift) + deltas_[region] - kGuard;
    CHECK(::munmap(pointer(start), kReserved) == 0);
    deltas_[region] = no_delta(region);
  }
  regions_ = 0;
  full_ = false;
  drop_books();
}

bool Window::linear_of(u64 host, u64* linear) const {
  for (u64 region = 0; region < kRegions; region++) {
    if (!has_region(region)) continue;
    const u64 at = host - deltas_[region];
    if (at >> kRegionShift != region) continue;
    *linear = at;
    return true;
  }
  return false;
}

void Window::block(u64 page, u64 count) {
  calls_++;
  // What was there goes whatever happens: an address that fails to be blocked would reach memory that is not the guest's.
  CHECK(::mmap(pointer(at(page)), count * kPageSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) !=
        MAP_FAILED);
}

bool Window::map(u64 page, u64 host, unsigned count, bool write, u8 shift) {
  const u64 size = count * kPageSize;
  calls_ += 2;
  // Over pages of the same memory only the right changes.
  bool same = true;
  for (unsigned n = 0; n < count && same; n++) {
    const Page* p = find(page + n * kPageSize);
    same = p != nullptr && p->host == host + n * kPageSize;
  }
  if (!same) {
    if (g_mappings.load() + 2 * static_cast<long>(count) > kMaxMappings) {
      full_ = true;
      return false;
    }
    for (unsigned n = 0; n < count; n++) forget(page + n * kPageSize);
    if (::mremap(pointer(host), 0, size, MREMAP_MAYMOVE | MREMAP_FIXED, pointer(at(page))) == MAP_FAILED) {
      block(page, count);
      full_ = true;
      return false;
    }
  }
  if ((same || !write) && ::mprotect(pointer(at(page)), size, write ? PROT_READ | PROT_WRITE : PROT_READ) != 0) {
    for (unsigned n = 0; n < count; n++) forget(page + n * kPageSize);
    block(page, count);
    return false;
  }
  if (count > 1) (void)::madvise(pointer(at(page)), size, write ? MADV_POPULATE_WRITE : MADV_POPULATE_READ);
  for (unsigned n = 0; n < count; n++) {
    const u64 linear = page + n * kPageSize, from = host + n * kPageSize;
    if (same) forget(linear);
    put(linear, {from, write, shift});
  }
  return true;
}

/// To take pages out of the middle takes mappings too: where those run out, all pages go.
bool Window::wiped() {
  constexpr long kReserve = 8 << 10;
  if (g_mappings.load() <= kMaxMappings + kReserve) return false;
  for (u64 region = 0; region < kRegions; region++)
    if (has_region(region)) block(region << kRegionShift, kRegionSize / kPageSize);
  drop_books();
  full_ = true;
  return true;
}

void Window::drop_books() {
  for (const auto& [page, p] : pages_) g_mappings -= parted(page) + (find(page + kPageSize) == nullptr);
  large_ = 0;
  pages_.clear();
  writable_.clear();
}

bool Window::parted(u64 page) const {
  const Page* here = find(page);
  const Page* before = find(page - kPageSize);
  if (here == nullptr || before == nullptr) return here != before;
  return here->host != before->host + kPageSize || here->write != before->write;
}

void Window::put(u64 page, const Page& p) {
  const long before = parts(page);
  pages_[page] = p;
  g_mappings += parts(page) - before;
  large_ += p.shift != kPageShift;
  if (p.write) writable_.emplace(p.host, page);
}

void Window::forget(u64 page) {
  const auto it = pages_.find(page);
  if (it == pages_.end()) return;
  const Page p = it->second;
  if (p.write) {
    const auto [first, last] = writable_.equal_range(p.host);
    for (auto w = first; w != last; ++w) {
      if (w->second != page) continue;
      writable_.erase(w);
      break;
    }
  }
  const long before = parts(page);
  pages_.erase(it);
  g_mappings += parts(page) - before;
  large_ -= p.shift != kPageShift;
}

void Window::unmap(u64 page) {
  gone_.clear();
  if (pages_.count(page) != 0) gone_.push_back(page);
  if (large_ != 0) {
    constexpr unsigned k2m = 21;
    const u64 first = page >> k2m << k2m;
    for (u64 at = first; at < first + (1ull << k2m); at += kPageSize) {
      const Page* p = at == page ? nullptr : find(at);
      if (p != nullptr && p->shift == k2m) gone_.push_back(at);
    }
    const Page* p = find(page);
    if (p == nullptr || p->shift > k2m) {
      for (const auto& [at, other] : pages_)
        if (other.shift > k2m && at != page && (at ^ page) >> other.shift == 0) gone_.push_back(at);
    }
  }
  unmap_gone();
}

void Window::drop_write(u64 page) {
  if (wiped()) return;
  const auto it = pages_.find(page);
  if (it == pages_.end() || !it->second.write) return;
  const Page p = it->second;
  calls_++;
  CHECK(::mprotect(pointer(at(page)), kPageSize, PROT_READ) == 0);
  forget(page);
  put(page, {p.host, false, p.shift});
}

void Window::unmap_gone() {
  std::sort(gone_.begin(), gone_.end());
  for (std::size_t n = 0; n < gone_.size();) {
    std::size_t end = n + 1;
    while (end < gone_.size() && gone_[end] == gone_[end - 1] + kPageSize && gone_[end] >> kRegionShift == gone_[n] >> kRegionShift) end++;
    if (wiped()) return;
    block(gone_[n], end - n);
    for (; n < end; n++) forget(gone_[n]);
  }
}

void Window::drop_writes() {
  std::vector<u64> pages;
  for (const auto& [host, page] : writable_) pages.push_back(page);
  for (u64 page : pages) drop_write(page);
}

void Window::drop_writes_to(u64 host) {
  for (auto w = writable_.find(host); w != writable_.end(); w = writable_.find(host)) drop_write(w->second);
}

}  // namespace ring3::engine
