#include "engine/hyperv/cpuid.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "base/unique_fd.hpp"
#include "engine/hyperv/tlfs.hpp"

namespace ring3::engine::hv {
namespace {

constexpr u32 kVersionNumber = 0x000a0000, kBuild = 0x3839;  // Windows Server 2016's
constexpr u32 kSpinRetries = 0xfff;                          // before a guest says that it spins
constexpr u32 kLogicalProcessors = 64;

/// Whether two guest CPUs may share a core without knowing.
bool smt_possible() {
  const UniqueFd fd(::open("/sys/devices/system/cpu/smt/control", O_RDONLY | O_CLOEXEC));
  char text[32] = {};
  if (!fd || ::read(fd.get(), text, sizeof text - 1) <= 0) return true;
  return std::strncmp(text, "forceoff", 8) != 0 && std::strncmp(text, "notsupported", 12) != 0;
}

kvm_cpuid_entry2 entry(u32 leaf, u32 eax = 0, u32 ebx = 0, u32 ecx = 0, u32 edx = 0) {
  kvm_cpuid_entry2 e{};
  e.function = leaf;
  e.eax = eax;
  e.ebx = ebx;
  e.ecx = ecx;
  e.edx = edx;
  return e;
}

}  // namespace

std::vector<kvm_cpuid_entry2> supported_cpuid(u32 max_vps, bool lapic) {
  u32 vendor[3];
  std::memcpy(vendor, "Linux KVM Hv", 12);  // VMMs put in the name that their guests look for
  const u32 msrs = feature::kVpRuntime | feature::kTimeRefCount | feature::kSynic | feature::kStimer | feature::kApicAccess |
                   feature::kHypercall | feature::kVpIndex | feature::kReset | feature::kReferenceTsc | feature::kFrequency |
                   feature::kReenlightenment;
  const u32 calls = feature::kPostMessages | feature::kSignalEvents | feature::kDebugging;
  const u32 more = feature::kGuestDebugging | feature::kXmmInput | feature::kFrequencyMsrs | feature::kCrashMsrs |
                   feature::kDebugMsrs | (lapic ? feature::kDirectStimer : 0u);
  const u32 recommended = recommend::kRemoteTlbFlush | recommend::kApicMsrs | recommend::kRelaxedTiming | recommend::kNoAutoEoi |
                          recommend::kExProcessorMasks | (lapic ? recommend::kClusterIpi : 0u) |
                          (smt_possible() ? 0u : recommend::kNoNonArchCoreSharing);
  return {
      entry(leaf::kVendor, leaf::kSyndbgCapabilities, vendor[0], vendor[1], vendor[2]),
      entry(leaf::kInterface, leaf::kInterfaceSignature),
      entry(leaf::kVersion, kBuild, kVersionNumber),
      entry(leaf::kFeatures, msrs, calls, 0, more),
      entry(leaf::kRecommendations, recommended, kSpinRetries),
      entry(leaf::kLimits, max_vps, kLogicalProcessors),
      entry(leaf::kSyndbgVendor, 0, vendor[0], vendor[1], vendor[2]),
      entry(leaf::kSyndbgInterface, 0x31235356 /* "VS#1" */),
      entry(leaf::kSyndbgCapabilities, kSyndbgAllowed),
      entry(leaf::kNested, kNestedMsrBitmap),  // as the kernel's, also where nothing nests
  };
}

Cpuid Cpuid::from(const std::function<const kvm_cpuid_entry2*(u32 leaf)>& find) {
  Cpuid c;
  const kvm_cpuid_entry2* e = find(leaf::kInterface);
  c.present = e != nullptr && e->eax == leaf::kInterfaceSignature;
  if (!c.present) return c;
  if ((e = find(leaf::kFeatures)) != nullptr) {
    c.features_eax = e->eax;
    c.features_ebx = e->ebx;
    c.features_edx = e->edx;
  }
  if ((e = find(leaf::kRecommendations)) != nullptr) {
    c.recommend_eax = e->eax;
    c.recommend_ebx = e->ebx;
  }
  if ((e = find(leaf::kSyndbgCapabilities)) != nullptr) c.syndbg_eax = e->eax;
  return c;
}

bool Cpuid::allows_msr(u32 index) const {
  const auto eax = [this](u32 bits) { return (features_eax & bits) != 0; };
  switch (index) {
    case msr::kGuestOsId:
    case msr::kHypercall: return eax(feature::kHypercall);
    case msr::kVpIndex: return eax(feature::kVpIndex);
    case msr::kReset: return eax(feature::kReset);
    case msr::kVpRuntime: return eax(feature::kVpRuntime);
    case msr::kTimeRefCount: return eax(feature::kTimeRefCount);
    case msr::kReferenceTsc: return eax(feature::kReferenceTsc);
    case msr::kTscFrequency:
    case msr::kApicFrequency: return eax(feature::kFrequency);
    case msr::kEoi:
    case msr::kIcr:
    case msr::kTpr:
    case msr::kVpAssistPage: return eax(feature::kApicAccess);
    case msr::kReenlightenmentControl:
    case msr::kTscEmulationControl:
    case msr::kTscEmulationStatus: return eax(feature::kReenlightenment);
    default: break;
  }
  if ((index >= msr::kScontrol && index <= msr::kEom) || (index >= msr::kSint0 && index <= msr::kSint15)) {
    return eax(feature::kSynic);
  }
  if (index >= msr::kStimer0Config && index <= msr::kStimer3Count) return eax(feature::kStimer);
  if (index >= msr::kCrashP0 && index <= msr::kCrashCtl) return (features_edx & feature::kCrashMsrs) != 0;
  if ((index >= msr::kSyndbgControl && index <= msr::kSyndbgPendingBuffer) || index == msr::kSyndbgOptions) {
    return (features_edx & feature::kDebugMsrs) != 0;
  }
  return false;
}

bool Cpuid::allows_call(u16 code) const {
  switch (code) {
    case call::kLongSpinWait: return recommend_ebx != 0 && recommend_ebx != ~0u;
    case call::kPostMessage: return (features_ebx & feature::kPostMessages) != 0;
    case call::kSignalEvent: return (features_ebx & feature::kSignalEvents) != 0;
    case call::kPostDebugData:
    case call::kRetrieveDebugData:
    case call::kResetDebugSession:
      return !syndbg() || (features_ebx & feature::kDebugging) != 0;  // without it the code itself is unknown
    case call::kFlushSpaceEx:
    case call::kFlushListEx:
      return (recommend_eax & recommend::kExProcessorMasks) && (recommend_eax & recommend::kRemoteTlbFlush);
    case call::kFlushSpace:
    case call::kFlushList: return (recommend_eax & recommend::kRemoteTlbFlush) != 0;
    case call::kSendIpiEx: return (recommend_eax & recommend::kExProcessorMasks) && (recommend_eax & recommend::kClusterIpi);
    case call::kSendIpi: return (recommend_eax & recommend::kClusterIpi) != 0;
    default: return true;
  }
}

}  // namespace ring3::engine::hv
