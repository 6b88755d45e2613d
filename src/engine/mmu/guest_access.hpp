#pragma once
#include <cstring>

#include "base/types.hpp"

/// Loads and stores of guest RAM.
///
/// A guest's own data races are part of its memory model, not bugs of ours, so the thread sanitizer
/// does not look at these. For 1, 2, 4 and 8 bytes each is one host move: as atomic as the guest's own.
namespace ring3::engine {

#if defined(__SANITIZE_THREAD__)
#define RING3_GUEST_RACE __attribute__((no_sanitize("thread"), noinline))
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define RING3_GUEST_RACE __attribute__((no_sanitize("thread"), noinline))
#endif
#endif
#ifndef RING3_GUEST_RACE
#define RING3_GUEST_RACE
#endif

template <class T>
RING3_GUEST_RACE inline void guest_load(u64 host, T* out) {
  // SAFETY: the caller's translation says that sizeof(T) bytes of guest RAM stand at host.
  std::memcpy(out, reinterpret_cast<const void*>(host), sizeof(T));
}

template <class T>
RING3_GUEST_RACE inline void guest_store(u64 host, const T& value) {
  // SAFETY: as in guest_load().
  std::memcpy(reinterpret_cast<void*>(host), &value, sizeof(T));
}

/// Any size. The sizes of machine words go in one move each.
RING3_GUEST_RACE inline void guest_copy(void* to, const void* from, u64 size) {
  switch (size) {
    case 1:
      std::memcpy(to, from, 1);
      return;
    case 2:
      std::memcpy(to, from, 2);
      return;
    case 4:
      std::memcpy(to, from, 4);
      return;
    case 8:
      std::memcpy(to, from, 8);
      return;
    case 16:
      std::memcpy(to, from, 16);
      return;
    default:
      break;
  }
#if defined(__SANITIZE_THREAD__)
  for (u64 i = 0; i < size; i++) {
    static_cast<volatile u8*>(to)[i] = static_cast<const volatile u8*>(from)[i];
  }
#else
  std::memcpy(to, from, size);
#endif
}

}  // namespace ring3::engine
