#pragma once
#include <memory>

#include "base/types.hpp"

/// Access to what an ioctl's argument points to: memory of the VMM, which is in this process. A pointer to
/// nothing, or to memory without the right, gives EFAULT as the kernel's copies do.
/// Threading: any thread.
namespace ring3::engine::abi {

/// While one of these lives, copies survive bad pointers: it installs the process's fault handlers (interp/host_fault.hpp).
std::shared_ptr<const void> guard_user_copies();

inline bool user_pointer(u64 address, u64 size = 1) {
  return address >= kPageSize && address < (1ull << 47) && size <= (1ull << 47) - address;
}
/// False: a byte could not be read or written; what comes before it may have been copied.
bool copy_bytes_in(u64 address, void* to, u64 size);
bool copy_bytes_out(u64 address, const void* from, u64 size);

template <class T>
bool copy_in(u64 address, T* out) {
  return copy_bytes_in(address, out, sizeof(T));
}
template <class T>
bool copy_out(u64 address, const T& value) {
  return copy_bytes_out(address, &value, sizeof(T));
}

}  // namespace ring3::engine::abi
