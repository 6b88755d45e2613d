#pragma once
#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "base/types.hpp"

/// Vectors of bytes for what is read from large files: resize() leaves new bytes as they are, and large ones ask for huge
/// pages, so that memory is touched by the read alone.
/// Errors: std::bad_alloc, as of any vector.
namespace ring3 {

template <class T>
struct RawAllocator {
  using value_type = T;
  static constexpr std::size_t kHuge = 2u << 20;

  RawAllocator() = default;
  template <class U>
  RawAllocator(const RawAllocator<U>&) {}

  T* allocate(std::size_t n) {
    const std::size_t bytes = n * sizeof(T);
    if (bytes < kHuge) return std::allocator<T>().allocate(n);
    const std::size_t whole = (bytes + kHuge - 1) & ~(kHuge - 1);
    void* p = whole < bytes ? nullptr : std::aligned_alloc(kHuge, whole);
    if (p == nullptr) throw std::bad_alloc();
    ::madvise(p, whole, MADV_HUGEPAGE);  // a wish
    return static_cast<T*>(p);
  }
  void deallocate(T* p, std::size_t n) {
    if (n * sizeof(T) < kHuge) std::allocator<T>().deallocate(p, n);
    else std::free(p);
  }
  template <class U>
  void construct(U* at) {
    ::new (static_cast<void*>(at)) U;  // without a value
  }
  template <class U, class... A>
  void construct(U* at, A&&... values) {
    ::new (static_cast<void*>(at)) U(std::forward<A>(values)...);
  }
  bool operator==(const RawAllocator&) const { return true; }
};

using RawBytes = std::vector<u8, RawAllocator<u8>>;

}  // namespace ring3
