#pragma once
#include "base/types.hpp"
#include "fs/fuse/server.hpp"

namespace ring3::fs {

/// On the socket, VMM to server: a request lies in the slot.
struct SlotRequest {
  u32 slot = 0;
  u32 length = 0;
  u32 room = 0;
};
/// Server to VMM: the answer does. 0: there is none.
struct SlotAnswer {
  u32 slot = 0;
  u32 length = 0;
};

/// A slot in the shared memory: the request, then the answer.
inline constexpr std::size_t kSlotPart = (Server::kMostMessage + kPageSize - 1) & kPageMask;
inline constexpr std::size_t kSlotBytes = 2 * kSlotPart;

}  // namespace ring3::fs
