#pragma once
#include "base/types.hpp"

/// What a guest and Xen share: layouts, hypercall numbers.
///
/// Spec: Xen's public headers xen.h, arch-x86/xen.h, vcpu.h, sched.h, event_channel.h, version.h. Guests of 32 bits have
///       layouts of their own.
namespace ring3::engine::xen {

/// Where things stand in the page that the domain shares (struct shared_info).
struct SharedInfoLayout {
  u32 pending;      ///< bits, one an event channel
  u32 mask;         ///< the same
  u32 wall_clock;   ///< version, seconds, nanoseconds: 32 bits each
  u32 seconds_high;
  u32 ports;        ///< event channels that the bitmaps have
  u32 word_bits;    ///< of them, those that a bit of pending_sel stands for
  u32 pending_sel;  ///< in struct vcpu_info
};
inline constexpr SharedInfoLayout kLayout64{0x800, 0xa00, 0xc00, 0xc0c, 4096, 64, 8};
inline constexpr SharedInfoLayout kLayout32{0x800, 0x880, 0x900, 0x924, 1024, 32, 4};

/// struct vcpu_info, in both layouts.
inline constexpr u32 kInfoSize = 64, kInfoUpcallPending = 0, kInfoTime = 32;
/// struct pvclock_vcpu_time_info.
inline constexpr u32 kTimeInfoSize = 32;

/// struct vcpu_runstate_info: the state in 32 bits, then when it began and the time spent in each, 64 bits each.
inline constexpr u32 kRunstateSize = 48, kRunstateEntry64 = 8, kRunstateEntry32 = 4;
inline constexpr u64 kRunstateUpdate = 1ull << 63;  ///< in the entry time: the rest is being written
enum class State : u32 { kRunning = 0, kRunnable = 1, kBlocked = 2, kOffline = 3 };
inline constexpr u32 kStates = 4;

namespace call {
inline constexpr u64 kSetTimerOp = 15, kXenVersion = 17, kVcpuOp = 24, kSchedOp = 29, kEventChannelOp = 32;
inline constexpr u32 kVersion = 0;                                   // of kXenVersion
inline constexpr u32 kSetSingleshotTimer = 8, kStopSingleshotTimer = 9;  // of kVcpuOp
inline constexpr u32 kYield = 0, kPoll = 3;                          // of kSchedOp
inline constexpr u32 kSend = 4;                                      // of kEventChannelOp
}  // namespace call

/// struct vcpu_set_singleshot_timer; 32-bit guests give 12 bytes of it.
struct SingleshotTimer {
  u64 deadline_ns;
  u32 flags;
  u32 padding;
};
inline constexpr u32 kTimerInFuture = 1;  ///< flags: an error when it has passed

/// struct sched_poll of 64-bit guests.
struct SchedPoll {
  u64 ports;  ///< address of 32-bit numbers
  u32 count;
  u32 padding;
  u64 timeout_ns;  ///< 0: none
};
static_assert(sizeof(SingleshotTimer) == 16 && sizeof(SchedPoll) == 24);
inline constexpr u32 kMaxPolledPorts = 128;

/// Kinds of event channels (struct evtchn_status) that a guest may send by.
inline constexpr u32 kInterdomain = 2, kIpi = 5;

}  // namespace ring3::engine::xen
