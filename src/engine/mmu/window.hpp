#pragma once
#include <array>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/types.hpp"

/// Host windows: pages of one guest address space, mapped a second time where translated code reaches them by adding a
/// constant to the linear address, under the host's own page tables. Private to this room.
///
/// The lower half of the linear addresses has 32 regions of 4 TiB; a window stands for the few that a program uses. Each
/// has a range of host addresses with a guard on either side, in which nothing but these pages is ever mapped: an
/// address of the region, and those nearer than the guard, reach pages of this address space or fault.
/// What is mapped here is what the TLB held once and was not told to drop since, as an entry of the TLB is.
///
/// Pages are mapped from the memslot's own mapping by mremap(2) with old size 0, which only shared memory allows.
/// Errors:    nothing here fails for good: what cannot be mapped is answered false, and reached through the TLB.
/// Threading: the vCPU's thread.
namespace ring3::engine {

class Window {
 public:
  static constexpr unsigned kRegionShift = 42, kRegions = 32;
  static constexpr u64 kRegionSize = 1ull << kRegionShift, kGuard = 1ull << 32;
  /// In deltas(), for a region without host addresses: added to an address of the lower half it makes one that is not
  /// canonical, and tells the region still. region: below 256.
  static constexpr u64 no_delta(u64 region) { return 1ull << 62 | region << 52; }
  static constexpr bool is_no_delta(u64 sum) { return sum >> 62 == 1; }
  static constexpr u64 region_of(u64 sum) { return sum >> 52 & 0xff; }
  static constexpr unsigned kMaxRegions = 6;
  /// Where Linux puts position-independent programs with what they allocate, and where libraries, mappings and stacks. These two
  /// regions get host addresses at the same time and by one constant, so that code that goes from one to the other need not
  /// load another.
  static constexpr u64 kPrograms = 21, kStacks = 31;
  static constexpr bool is_twin(u64 region) { return region == kPrograms || region == kStacks; }
  /// The region whose constant is this one's too: of the twins one and the same.
  static constexpr u64 named_for(u64 region) { return is_twin(region) ? kStacks : region; }
  /// Of all windows of the process, where the host allows it 65530. Neighbours that are neighbours in the memslot too, with the
  /// same rights, are one mapping.
  static constexpr long kMaxMappings = 48 << 10;

  Window() {
    for (u64 n = 0; n < kRegions; n++) deltas_[n] = no_delta(n);
  }
  ~Window() { close(); }
  Window(const Window&) = delete;
  Window& operator=(const Window&) = delete;

  /// By region (linear >> kRegionShift): host address - linear, or no_delta().
  const std::array<u64, kRegions>& deltas() const { return deltas_; }
  /// Finds host addresses for linear's region. True when it has them.
  bool open_region(u64 linear);
  bool has_region(u64 region) const { return deltas_[region] != no_delta(region); }
  /// Unmaps everything and gives the host addresses back.
  void close();

  /// Which linear address a host address stands for; false: none of a region.
  bool linear_of(u64 host, u64* linear) const;

  struct Page {
    u64 host = 0;  ///< of the memslot
    bool write = false;
    u8 shift = kPageShift;  ///< log2 of the page size of the guest's mapping
  };
  const std::unordered_map<u64, Page>& pages() const { return pages_; }
  const Page* find(u64 page) const {
    const auto it = pages_.find(page);
    return it == pages_.end() ? nullptr : &it->second;
  }
  /// Maps count pages from linear `page` on, in one region that has addresses, which lie at `host` one behind the other. What
  /// was mapped there goes. False: nothing is mapped there now.
  bool map(u64 page, u64 host, unsigned count, bool write, u8 shift);
  /// This page; where it belongs to a large page of the guest, all of that.
  void unmap(u64 page);
  void drop_write(u64 page);
  /// All pages may be read only from here on; of one page of a memslot.
  void drop_writes();
  void drop_writes_to(u64 host);
  bool full() const { return full_; }  ///< a page or a region found no room, or is of memory that cannot be mapped twice
  void refuse() { full_ = true; }
  u64 take_calls() { return std::exchange(calls_, 0); }  ///< system calls since the last time
  /// All pages for which keep(linear, Page) says no.
  template <class Keep>
  void retain(Keep keep) {
    gone_.clear();
    for (const auto& [page, p] : pages_)
      if (!keep(page, p)) gone_.push_back(page);
    unmap_gone();
  }

 private:
  bool open_twins();
  void put(u64 page, const Page& p);
  void forget(u64 page);
  bool parted(u64 page) const;  ///< another mapping begins there
  bool wiped();
  void drop_books();
  long parts(u64 page) const { return parted(page) + parted(page + kPageSize); }
  void unmap_gone();  ///< the pages of gone_
  void block(u64 page, u64 count);  ///< nothing is reached there; the books are the caller's
  u64 at(u64 page) const { return page + deltas_[page >> kRegionShift]; }

  std::array<u64, kRegions> deltas_;
  unsigned regions_ = 0;
  bool full_ = false;
  u64 calls_ = 0;
  std::size_t large_ = 0;  ///< pages of large ones
  std::unordered_map<u64, Page> pages_;
  std::unordered_multimap<u64, u64> writable_;  ///< host page to linear page
  std::vector<u64> gone_;
};

}  // namespace ring3::engine
