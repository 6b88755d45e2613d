#pragma once
#include <cerrno>
#include <memory>
#include <vector>

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
/// False: a byte could not be read or written; what comes before it may have been copied. 1, 4 and 8 bytes are one access.
bool copy_bytes_in(u64 address, void* to, u64 size);
bool copy_bytes_out(u64 address, const void* from, u64 size);
/// Sets bits of a byte by an atomic access: the byte before, or -1 when it is not there.
int set_bits(u64 address, u8 bits);

template <class T>
bool copy_in(u64 address, T* out) {
  return copy_bytes_in(address, out, sizeof(T));
}
template <class T>
bool copy_out(u64 address, const T& value) {
  return copy_bytes_out(address, &value, sizeof(T));
}

/// Answers with a list of entries behind a head that says how many there is room for.
template <class Head, class Entry>
long answer_list(u64 arg, const std::vector<Entry>& entries, u32 Head::*count, bool tell_needed) {
  Head head;
  if (!copy_in(arg, &head)) return -EFAULT;
  const u32 room = head.*count;
  const u32 have = static_cast<u32>(entries.size());
  if (room < have && !tell_needed) return -E2BIG;
  head.*count = have;
  if (!copy_out(arg, head)) return -EFAULT;
  if (room < have) return -E2BIG;
  return copy_bytes_out(arg + sizeof(Head), entries.data(), entries.size() * sizeof(Entry)) ? 0 : -EFAULT;
}

}  // namespace ring3::engine::abi
