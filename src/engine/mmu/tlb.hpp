#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <new>
#include <type_traits>

#include "base/mapping.hpp"
#include "engine/mmu/mmu.hpp"

/// The software TLB: a few address spaces (one per PCID in use), each with a bank per privilege. Private
/// to this room and to one vCPU's thread.
///
/// Flushes cost what was filled, not what there is: each bank keeps bitmaps of its filled entries.
namespace ring3::engine {

/// Zeroed memory is an empty set. Going through all of a set that is nearly empty costs nearly nothing: a summary says which words may hold something.
template <unsigned Size>
struct IndexSet {
  static_assert(Size % 64 == 0);
  u64 words[Size / 64];
  mutable u64 summary[(Size / 64 + 63) / 64];  // a bit a word; one too many is harmless, one too few is not
  void set(unsigned i) {
    words[i / 64] |= 1ull << (i % 64);
    summary[i / 4096] |= 1ull << (i / 64 % 64);
  }
  void clear(unsigned i) { words[i / 64] &= ~(1ull << (i % 64)); }
  bool test(unsigned i) const { return (words[i / 64] >> (i % 64)) & 1; }
  template <class F>
  void for_each(F f) const {
    for (unsigned s = 0; s < sizeof summary / sizeof summary[0]; s++) {
      for (u64 left = summary[s]; left != 0; left &= left - 1) {
        const unsigned w = s * 64 + static_cast<unsigned>(__builtin_ctzll(left));
        for (u64 bits = words[w]; bits != 0; bits &= bits - 1) {
          f(w * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
        }
        if (words[w] == 0) summary[s] &= ~(1ull << (w % 64));
      }
    }
  }
  /// What is in this set and not in the other.
  template <class F>
  void for_each_but(const IndexSet& other, F f) const {
    for (unsigned s = 0; s < sizeof summary / sizeof summary[0]; s++) {
      for (u64 left = summary[s]; left != 0; left &= left - 1) {
        const unsigned w = s * 64 + static_cast<unsigned>(__builtin_ctzll(left));
        for (u64 bits = words[w] & ~other.words[w]; bits != 0; bits &= bits - 1) {
          f(w * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
        }
      }
    }
  }
  bool empty() const {
    for (unsigned s = 0; s < sizeof summary / sizeof summary[0]; s++) {
      for (u64 left = summary[s]; left != 0; left &= left - 1) {
        if (words[s * 64 + static_cast<unsigned>(__builtin_ctzll(left))] != 0) return false;
      }
    }
    return true;
  }
};

/// The pages that were fetched from, as far as a flush of one page must know: may say yes to others of the same half of
/// the address space. A page of a large one stands for all of it, and for all between it and other large ones.
class PageFilter {
 public:
  void add(u64 linear, unsigned shift) {
    const unsigned word = hash(linear) / 64;
    if (bits_[word] == 0 && used_ <= kFew) few_[used_++ % kFew] = static_cast<u8>(word);
    bits_[word] |= 1ull << (hash(linear) % 64);
    if (shift == kPageShift) return;
    const u64 mask = (1ull << shift) - 1;
    low_ = std::min(low_, linear & ~mask);
    high_ = std::max(high_, linear | mask);
  }
  bool may_hold(u64 linear) const {
    return (bits_[hash(linear) / 64] >> (hash(linear) % 64) & 1) != 0 || (linear >= low_ && linear <= high_);
  }
  void clear() {
    if (used_ <= kFew) {
      for (unsigned i = 0; i < used_; i++) bits_[few_[i]] = 0;
      used_ = 0;
      low_ = ~0ull;
      high_ = 0;
    } else {
      *this = PageFilter();
    }
  }

 private:
  /// The halves apart: a system flushes pages of the lower one all the time, and has its own code in the upper one.
  static unsigned hash(u64 linear) {
    return static_cast<unsigned>((linear >> kPageShift) * 0x9e3779b97f4a7c15ull >> 51 | linear >> 63 << 13);
  }
  static constexpr unsigned kFew = 16;
  std::array<u64, 256> bits_{};
  u8 few_[kFew] = {};  ///< the words in use, as long as there are no more
  unsigned used_ = 0;  ///< kFew + 1: more
  u64 low_ = ~0ull, high_ = 0;
};

/// BankBase is Mmu's array of entries, which the inline fast paths index.
template <class BankBase>
struct TlbBankWithSets : BankBase {
  static constexpr unsigned kSize = Mmu::kTlbSize;
  static bool is_none(u64 tag) { return (tag & Mmu::kNoTag) != 0; }

  u8 shift[kSize];  ///< log2 of the page size of the guest's mapping
  IndexSet<kSize> filled, global, large;
  IndexSet<kSize> writable, executable;  ///< write_tag, exec_tag are set
  /// The exec tag was dropped, and has the bit of kNoTag, but the translation still holds: no other walk.
  IndexSet<kSize> exec_walked;
  IndexSet<kSize> write_walked;  ///< a walk for writing succeeded: a dropped write tag needs no other walk
  /// Which large pages there may be, by half of the address space and address bits: of 2 MiB by 21 to 26, of 1 GiB by 30 to
  /// 35. Set when one is filled, cleared when all are flushed. A system's own memory, in the upper half, is large pages
  /// everywhere; what it flushes all the time lies in the lower one.
  u64 large_2m[2], large_1g[2];

  void reset(unsigned i) {
    this->entries[i] = Mmu::no_entry(i);
    filled.clear(i);
    global.clear(i);
    large.clear(i);
    writable.clear(i);
    executable.clear(i);
    write_walked.clear(i);
    exec_walked.clear(i);
  }
  u64 page_of(unsigned i) const {
    const Mmu::TlbEntry& e = this->entries[i];
    // An empty entry's is the address of a page that selects another.
    return !is_none(e.read_tag) ? e.read_tag : !is_none(e.write_tag) ? e.write_tag : e.exec_tag & ~Mmu::kNoTag;
  }
  void flush(bool keep_global) {
    if (keep_global) {
      filled.for_each_but(global, [&](unsigned i) { reset(i); });
    } else {
      filled.for_each([&](unsigned i) { reset(i); });
    }
    if (large.empty()) large_2m[0] = large_2m[1] = large_1g[0] = large_1g[1] = 0;
  }
  void flush_page(u64 linear) {
    const u64 page = linear & kPageMask;
    const unsigned at = static_cast<unsigned>(linear >> kPageShift) & (kSize - 1);
    if (filled.test(at) && page_of(at) == page) {
      if (large.test(at)) {
        flush_large(linear, shift[at]);
        return;
      }
      reset(at);
    }
    // The page itself may have left the TLB while others of the same large page are still there.
    if (!may_be_large(page)) return;
    large.for_each([&](unsigned i) {
      if (((page_of(i) ^ linear) >> shift[i]) == 0) reset(i);
    });
  }
  void note_large(u64 linear, unsigned s) {
    const unsigned half = linear >> 63;
    if (s == 21) large_2m[half] |= 1ull << ((linear >> 21) & 63);
    if (s == 30) large_1g[half] |= 1ull << ((linear >> 30) & 63);
    if (s != 21 && s != 30) large_2m[half] = ~0ull;
  }
  bool may_be_large(u64 linear) const {
    const unsigned half = linear >> 63;
    return ((large_2m[half] >> ((linear >> 21) & 63)) & 1) != 0 || ((large_1g[half] >> ((linear >> 30) & 63)) & 1) != 0;
  }
  void flush_large(u64 linear, unsigned s) {
    large.for_each([&](unsigned i) {
      if (((page_of(i) ^ linear) >> std::max<unsigned>(s, shift[i])) == 0) reset(i);
    });
  }
  void drop_writes() {
    writable.for_each([&](unsigned i) {
      this->entries[i].write_tag = Mmu::no_tag(i);
      writable.clear(i);
      reset_if_empty(i);
    });
  }
  /// Write tags of pages at this host address.
  void drop_writes_to(u64 host) {
    writable.for_each([&](unsigned i) {
      Mmu::TlbEntry& e = this->entries[i];
      if (e.write_tag + e.addend != host) return;
      e.write_tag = Mmu::no_tag(i);
      writable.clear(i);
      reset_if_empty(i);
    });
  }
  void drop_exec() {
    executable.for_each([&](unsigned i) {
      this->entries[i].exec_tag |= Mmu::kNoTag;
      executable.clear(i);
      exec_walked.set(i);
    });
  }
  void reset_if_empty(unsigned i) {
    const Mmu::TlbEntry& e = this->entries[i];
    if (is_none(e.read_tag) && is_none(e.write_tag) && is_none(e.exec_tag) && !exec_walked.test(i)) reset(i);
  }
};

/// Empty banks in zeroed memory, which the host gives when it is filled: of more than 1 MiB each, most never is.
/// Errors: std::bad_alloc.
template <class Bank, unsigned Count>
class Banks {
 public:
  Banks() {
    auto memory = Mapping::anonymous(sizeof(Bank) * Count);
    if (!memory) throw std::bad_alloc();
    memory_ = std::move(*memory);
    for (Bank& b : *this) b.entries[0] = Mmu::no_entry(0);
  }
  // SAFETY: a bank has no constructor and no destructor: zeroes, and its first entry, are an empty one.
  Bank* begin() const { return reinterpret_cast<Bank*>(memory_.data()); }
  Bank* end() const { return begin() + Count; }
  Bank& operator[](std::size_t n) const { return begin()[n]; }

 private:
  static_assert(std::is_trivially_default_constructible_v<Bank> && std::is_trivially_destructible_v<Bank>);
  Mapping memory_;
};

}  // namespace ring3::engine
