#pragma once
#include <cstring>

#include "base/types.hpp"

/// Access to what an ioctl's argument points to. The VMM is in this process, so a pointer that cannot be
/// one is refused with EFAULT; a bad one within its address space is its own crash.
namespace ring3::engine::abi {

inline bool user_pointer(u64 address, u64 size = 1) {
  return address >= kPageSize && address < (1ull << 47) && size <= (1ull << 47) - address;
}
template <class T>
bool copy_in(u64 address, T* out) {
  if (!user_pointer(address, sizeof(T))) return false;
  std::memcpy(out, reinterpret_cast<const void*>(address), sizeof(T));
  return true;
}
template <class T>
bool copy_out(u64 address, const T& value) {
  if (!user_pointer(address, sizeof(T))) return false;
  std::memcpy(reinterpret_cast<void*>(address), &value, sizeof(T));
  return true;
}

}  // namespace ring3::engine::abi
