#pragma once
#include "base/types.hpp"

/// The rings as they lie in guest memory (VIRTIO 1.2, 2.7 and 2.8), and how their words are accessed.
namespace ring3::virtio::ring {

inline constexpr u16 kNext = 1, kWrite = 2, kIndirect = 4;            // descriptor flags
inline constexpr u16 kAvail = 1 << 7, kUsed = 1 << 15;                // packed
inline constexpr u16 kNoInterrupt = 1, kNoNotify = 1;                 // flags of the avail and used ring
inline constexpr u16 kEventEnable = 0, kEventDisable = 1, kEventDesc = 2;  // packed event suppression

struct Sizes {
  u64 descriptors, driver, device;
};
/// Bytes of each area; event index words included, negotiated or not.
constexpr Sizes sizes(u16 size, bool packed) {
  if (packed) return {u64{16} * size, 4, 4};
  return {u64{16} * size, u64{6} + 2 * u64{size}, u64{6} + 8 * u64{size}};
}

/// SAFETY: `at` is naturally aligned (Queue::create checks the areas, the offsets here are) and inside a mapped area.
/// The other side is a vCPU that may be writing: only these atomic accesses touch shared words.
inline u16 load(const u8* at) { return __atomic_load_n(reinterpret_cast<const u16*>(at), __ATOMIC_RELAXED); }
inline u16 load_acquire(const u8* at) { return __atomic_load_n(reinterpret_cast<const u16*>(at), __ATOMIC_ACQUIRE); }
inline void store(u8* at, u16 v) { __atomic_store_n(reinterpret_cast<u16*>(at), v, __ATOMIC_RELAXED); }
inline void store_release(u8* at, u16 v) { __atomic_store_n(reinterpret_cast<u16*>(at), v, __ATOMIC_RELEASE); }
inline void store32(u8* at, u32 v) { __atomic_store_n(reinterpret_cast<u32*>(at), v, __ATOMIC_RELAXED); }
inline void fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/// Whether an index that went from `old` to `now` passed `event` (2.7.10.1).
constexpr bool passed(u16 event, u16 now, u16 old) {
  return static_cast<u16>(now - event - 1) < static_cast<u16>(now - old);
}

}  // namespace ring3::virtio::ring
