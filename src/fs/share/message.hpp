#pragma once
#include <atomic>

#include "base/types.hpp"
#include "fs/fuse/server.hpp"

namespace ring3::fs {

/// On the socket, VMM to server: a request lies in the slot.
struct SlotRequest {
  u32 slot = 0;
  u32 length = 0;
  u32 room = 0;
};
/// In place of a slot: nothing but what lies in the DeferredRing is to be served.
inline constexpr u32 kNoSlot = ~u32{0};
/// Server to VMM: the answer does. 0: there is none.
struct SlotAnswer {
  u32 slot = 0;
  u32 length = 0;
};

/// A slot in the shared memory: the request, then the answer.
inline constexpr std::size_t kSlotPart = (Server::kMostMessage + kPageSize - 1) & kPageMask;
inline constexpr std::size_t kSlotBytes = 2 * kSlotPart;

/// Behind the slots, for one request at a time that is waited for: no socket, the futex `state` is all that wakes.
struct NearChannel {
  enum : u32 {
    kIdle = 0,
    kAsked = 1,     ///< VMM: a request; the answer is waited for here
    kUnwatched = 2, ///< VMM: no longer; it is to come by the socket
    kAnswered = 3,  ///< server, after kAsked or kAwaited
    kSent = 4,      ///< server, after kUnwatched: the socket has it
    kAwaited = 5,   ///< VMM, after kAsked: its thread sleeps and is to be woken
  };
  std::atomic<u32> state;
  SlotRequest request;
  std::atomic<u64> answer;  ///< slot above, length below: read once, since the server may write at any time
};

/// Behind that page, requests that nobody waits for (deferred.hpp): each a length (u32) and as many bytes, around the end of `bytes`.
/// Whatever else the server is asked, it takes these first; kNoSlot asks for them alone.
struct DeferredRing {
  static constexpr u32 kBytes = 1 << 14;
  static constexpr u32 kMostMessage = 2048;
  alignas(64) std::atomic<u32> written;  ///< VMM: bytes so far, as is the next; both run around
  alignas(64) std::atomic<u32> taken;    ///< server
  alignas(64) u8 bytes[kBytes];
};

}  // namespace ring3::fs
