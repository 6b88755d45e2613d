#pragma once
#include <stddef.h>
#include <stdint.h>

/// Private anonymous memory of the program's becomes shared anonymous memory at the same addresses, with what it holds.
namespace ring3::shim {

/// A whole mapping that may become shared.
struct PrivateMapping {
  uintptr_t begin = 0, end = 0;
  bool accounted = false, dumped = true, huge = false, locked = false;
  bool full = false;  ///< every page has memory of its own, as after a preallocation
};

/// Those that overlap [from, to), as many as fit: anonymous, nameless, of 16 MiB or more, kept from children by MADV_DONTFORK, without
/// userfaultfd. Returns their number.
unsigned find_private(uintptr_t from, uintptr_t to, PrivateMapping* out, unsigned most);

/// Returns how many bytes from m.begin on are shared now; with too little memory it may be less than all, and what is left is as it was.
/// Advice, locks and NUMA policy go along; a full mapping stays full.
///
/// Other threads may use the memory meanwhile: an access waits until what it is for is in its new place (userfaultfd(2)). Where there is no
/// userfaultfd, what they write then may be lost; where it is only for the accesses of user mode, a system call on
/// the memory may fail with EFAULT.
size_t make_shared(const PrivateMapping& m);

}  // namespace ring3::shim
