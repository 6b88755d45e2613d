#pragma once
#include "base/types.hpp"

/// Numbers of Microsoft's Hypervisor Top-Level Functional Specification (TLFS), as far as they are served here.
namespace ring3::engine::hv {

// Synthetic MSRs (TLFS appendix "MSRs"). All stand below kMsrEnd.
namespace msr {
inline constexpr u32 kBegin = 0x40000000, kGuestOsId = 0x40000000, kHypercall = 0x40000001, kVpIndex = 0x40000002,
                     kReset = 0x40000003, kVpRuntime = 0x40000010, kTimeRefCount = 0x40000020, kReferenceTsc = 0x40000021,
                     kTscFrequency = 0x40000022, kApicFrequency = 0x40000023, kEoi = 0x40000070, kIcr = 0x40000071,
                     kTpr = 0x40000072, kVpAssistPage = 0x40000073, kScontrol = 0x40000080, kSversion = 0x40000081,
                     kSiefp = 0x40000082, kSimp = 0x40000083, kEom = 0x40000084, kSint0 = 0x40000090, kSint15 = 0x4000009f,
                     kStimer0Config = 0x400000b0, kStimer3Count = 0x400000b7, kSyndbgControl = 0x400000f1,
                     kSyndbgStatus = 0x400000f2, kSyndbgSendBuffer = 0x400000f3, kSyndbgRecvBuffer = 0x400000f4,
                     kSyndbgPendingBuffer = 0x400000f5, kSyndbgOptions = 0x400000ff, kCrashP0 = 0x40000100,
                     kCrashP4 = 0x40000104, kCrashCtl = 0x40000105, kReenlightenmentControl = 0x40000106,
                     kTscEmulationControl = 0x40000107, kTscEmulationStatus = 0x40000108, kEnd = 0x40000200;
}

// CPUID leaves (TLFS "Feature and interface discovery").
namespace leaf {
inline constexpr u32 kVendor = 0x40000000, kInterface = 0x40000001, kVersion = 0x40000002, kFeatures = 0x40000003,
                     kRecommendations = 0x40000004, kLimits = 0x40000005, kNested = 0x4000000a, kSyndbgVendor = 0x40000080,
                     kSyndbgInterface = 0x40000081, kSyndbgCapabilities = 0x40000082;
inline constexpr u32 kInterfaceSignature = 0x31237648;  // "Hv#1"
}

// Leaf kFeatures.
namespace feature {
// EAX: MSRs.
inline constexpr u32 kVpRuntime = 1u << 0, kTimeRefCount = 1u << 1, kSynic = 1u << 2, kStimer = 1u << 3, kApicAccess = 1u << 4,
                     kHypercall = 1u << 5, kVpIndex = 1u << 6, kReset = 1u << 7, kReferenceTsc = 1u << 9, kFrequency = 1u << 11,
                     kReenlightenment = 1u << 13;
// EBX: hypercalls.
inline constexpr u32 kPostMessages = 1u << 4, kSignalEvents = 1u << 5, kDebugging = 1u << 11;
// EDX.
inline constexpr u32 kGuestDebugging = 1u << 1, kXmmInput = 1u << 4, kFrequencyMsrs = 1u << 8, kCrashMsrs = 1u << 10,
                     kDebugMsrs = 1u << 11, kDirectStimer = 1u << 19;
}

// Leaf kRecommendations, EAX.
namespace recommend {
inline constexpr u32 kRemoteTlbFlush = 1u << 2, kApicMsrs = 1u << 3, kRelaxedTiming = 1u << 5, kNoAutoEoi = 1u << 9,
                     kClusterIpi = 1u << 10, kExProcessorMasks = 1u << 11, kNoNonArchCoreSharing = 1u << 18;
}
inline constexpr u32 kNestedMsrBitmap = 1u << 19;      // leaf kNested, EAX
inline constexpr u32 kSyndbgAllowed = 1u << 1;         // leaf kSyndbgCapabilities, EAX
inline constexpr u64 kSyndbgUseHypercalls = 1u << 2;   // MSR kSyndbgOptions
inline constexpr u64 kCrashNotify = 1ull << 63;        // MSR kCrashCtl

// Hypercalls: the control word's call code, and result codes.
namespace call {
inline constexpr u16 kFlushSpace = 0x02, kFlushList = 0x03, kLongSpinWait = 0x08, kSendIpi = 0x0b, kFlushSpaceEx = 0x13,
                     kFlushListEx = 0x14, kSendIpiEx = 0x15, kPostMessage = 0x5c, kSignalEvent = 0x5d, kPostDebugData = 0x69,
                     kRetrieveDebugData = 0x6a, kResetDebugSession = 0x6b;
}
namespace status {
inline constexpr u64 kSuccess = 0, kInvalidCode = 2, kInvalidInput = 3, kInvalidAlignment = 4, kInvalidParameter = 5,
                     kAccessDenied = 6, kOperationDenied = 8, kInvalidPortId = 17;
}

// SynIC: fields of SINTx, and of SIMP, SIEFP, the assist page's and the TSC page's MSR.
inline constexpr unsigned kSints = 16, kStimers = 4;
inline constexpr u64 kSintMasked = 1u << 16, kSintAutoEoi = 1u << 17, kPageEnable = 1;

/// A slot of the message page.
struct TimerMessage {
  u32 type;
  u8 payload_size;
  u8 flags;  ///< bit 0: more messages wait
  u8 reserved[2];
  u64 sender;
  u32 timer;
  u32 reserved2;
  u64 expiration, delivery;
};
static_assert(sizeof(TimerMessage) == 40);
inline constexpr u32 kMessageTimerExpired = 0x80000010, kMessageSlot = 256, kMessageFlagsAt = 5;

/// The reference TSC page: time = (tsc * scale >> 64) + offset, in 100 ns; sequence 0: read the MSR instead.
struct TscPage {
  u32 sequence;
  u32 reserved;
  u64 scale;
  u64 offset;
};
static_assert(sizeof(TscPage) == 24);

}  // namespace ring3::engine::hv
