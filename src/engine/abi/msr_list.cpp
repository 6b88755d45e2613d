#include "engine/abi/msr_list.hpp"

#include <algorithm>

#include "engine/abi/cpuid.hpp"
#include "engine/hyperv/tlfs.hpp"
#include "engine/interp/msr.hpp"

namespace ring3::engine::abi {
namespace {
// The rooms' MSRs behind Environment, in the order a VMM has to write them: the TSC before its deadline.
constexpr u32 kOwn[] = {
    0x10,        // TSC
    0x3b,        // TSC_ADJUST
    0x6e0,       // TSC_DEADLINE
    0x3a,        // FEATURE_CONTROL
    0x34,        // SMI_COUNT
    0x140,       // MISC_FEATURES_ENABLES
    0xce,        // PLATFORM_INFO
    0x10a,       // ARCH_CAPABILITIES
    0x1fc,       // POWER_CTL
    0x11,        // KVM_WALL_CLOCK
    0x12,        // KVM_SYSTEM_TIME
    0x4b564d00,  // KVM_WALL_CLOCK_NEW
    0x4b564d01,  // KVM_SYSTEM_TIME_NEW
    0x4b564d02,  // KVM_ASYNC_PF_EN
    0x4b564d03,  // KVM_STEAL_TIME
    0x4b564d04,  // KVM_PV_EOI_EN
    0x4b564d05,  // KVM_POLL_CONTROL
    0x4b564d06,  // KVM_ASYNC_PF_INT
    0x4b564d07,  // KVM_ASYNC_PF_ACK
    // Hyper-V's: the VMM knows which others (SIMP, SIEFP, SINTx, STIMERx) come with SCONTROL and the first timer.
    hv::msr::kGuestOsId, hv::msr::kHypercall, hv::msr::kTimeRefCount, hv::msr::kReferenceTsc, hv::msr::kTscFrequency,
    hv::msr::kApicFrequency, hv::msr::kCrashP0, hv::msr::kCrashP0 + 1, hv::msr::kCrashP0 + 2, hv::msr::kCrashP0 + 3,
    hv::msr::kCrashP4, hv::msr::kCrashCtl, hv::msr::kReset, hv::msr::kVpIndex, hv::msr::kVpRuntime, hv::msr::kScontrol,
    hv::msr::kStimer0Config, hv::msr::kVpAssistPage, hv::msr::kReenlightenmentControl, hv::msr::kTscEmulationControl,
    hv::msr::kTscEmulationStatus, hv::msr::kSyndbgOptions, hv::msr::kSyndbgControl, hv::msr::kSyndbgStatus,
    hv::msr::kSyndbgSendBuffer, hv::msr::kSyndbgRecvBuffer, hv::msr::kSyndbgPendingBuffer,
};
}  // namespace

std::vector<u32> msr_index_list() {
  const auto core = saved_msrs();
  std::vector<u32> list(core.begin(), core.end());
  for (const u32 index : kOwn) {
    if (std::find(list.begin(), list.end(), index) == list.end()) list.push_back(index);
  }
  return list;
}

std::vector<u32> msr_feature_list() { return {msr::AMD_DE_CFG, msr::UCODE_REV, msr::ARCH_CAPABILITIES, msr::PERF_CAPABILITIES}; }

bool feature_msr(u32 index, u64* value) {
  switch (index) {
    case msr::AMD_DE_CFG:
      *value = 2;  // LFENCE serialises
      return true;
    case msr::UCODE_REV:
      *value = 0x100000000;
      return true;
    case msr::ARCH_CAPABILITIES:
      *value = arch_capabilities();
      return true;
    case msr::PERF_CAPABILITIES:
      *value = 0;
      return true;
    default:
      return false;
  }
}

u64 mce_cap_supported() {
  constexpr u64 kCtlP = 1u << 8, kCmciP = 1u << 10, kSerP = 1u << 24;
  return kCtlP | kCmciP | kSerP | 32;
}

}  // namespace ring3::engine::abi
