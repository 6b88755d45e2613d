#pragma once
#include <sys/mman.h>

#include <cstring>

#include "base/check.hpp"
#include "engine/state/vcpu_state.hpp"

/// What the guests of this folder are put together from.
namespace ring3::diff {

/// Base 0, limit 4 GiB. type: as in a descriptor; code64: CS.L, else the D/B bit.
inline engine::Segment flat_segment(u16 selector, u8 type, u8 dpl, bool code64) {
  engine::Segment s;
  s.selector = selector;
  s.base = 0;
  s.limit = 0xffffffff;
  s.type = type;
  s.dpl = dpl;
  s.g = 1;
  s.l = code64;
  s.db = !code64;
  return s;
}

inline engine::Segment null_segment() {
  engine::Segment s;
  s.selector = 0;
  s.limit = 0;
  s.unusable = 1;
  s.present = 0;
  return s;
}

/// Guest RAM, all of it there; the caller unmaps it.
inline u8* map_guest_ram(u64 size) {
  void* p = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  CHECK(p != MAP_FAILED);
  return static_cast<u8*>(p);
}

/// Sets the 4-level page-table entry of a page. Tables that are missing are taken from *next on (guest-physical), with
/// every right.
inline void map_page(u8* ram, u64 tables, u64* next, u64 linear, u64 entry) {
  u64 table = tables;
  for (unsigned shift = 39; shift > 12; shift -= 9) {
    u64 lower;
    u8* at = ram + table + 8 * (linear >> shift & 0x1ff);
    std::memcpy(&lower, at, 8);
    if (!(lower & 1)) {
      lower = *next | 7;
      *next += 0x1000;
      std::memcpy(at, &lower, 8);
    }
    table = lower & 0xffffffffff000;
  }
  std::memcpy(ram + table + 8 * (linear >> 12 & 0x1ff), &entry, 8);
}

}  // namespace ring3::diff
