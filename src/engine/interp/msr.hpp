#pragma once
#include <span>

#include "engine/interp/context.hpp"

/// The MSRs of the vCPU core: those whose value lives in VcpuState or is a constant.
///
/// Spec:      Intel SDM vol. 4; AMD APM vol. 2 app. A; where both are silent, what KVM answers.
/// Threading: as VcpuState.
/// Use:       RDMSR/WRMSR ask here first and go to Environment on Unknown; KVM_GET_MSRS and KVM_SET_MSRS
///            do the same with host_initiated. After a host write of EFER the caller drops translations and
///            calls Context::mode_changed(); the WRMSR handler does so itself.
namespace ring3::engine {

enum class MsrAccess : u8 {
  Ok,
  Fault,    ///< #GP(0), or the entry at which KVM_GET_MSRS/KVM_SET_MSRS stops
  Unknown,  ///< not the core's: ask Environment
};

/// host_initiated: reads what the guest's CPUID hides, too; writes read-only state (microcode revision,
/// MCi_STATUS, feature-gated MSRs), and round-trips whatever read_msr returned.
MsrAccess read_msr(const VcpuState& s, const GuestFeatures& features, u32 index, bool host_initiated, u64* value);
MsrAccess write_msr(VcpuState& s, const GuestFeatures& features, u32 index, u64 value, bool host_initiated);

/// The core's MSRs that a VMM saves and restores (its part of KVM_GET_MSR_INDEX_LIST). Machine-check
/// banks, MTRRs and feature MSRs are not listed, as in KVM; they can be read and written all the same.
std::span<const u32> saved_msrs();

namespace msr {
inline constexpr u32 PLATFORM_ID = 0x17, APIC_BASE = 0x1b, SPEC_CTRL = 0x48, PRED_CMD = 0x49, UCODE_WRITE = 0x79,
                     UCODE_REV = 0x8b, SMBASE = 0x9e, PLATFORM_INFO = 0xce, MTRRCAP = 0xfe, ARCH_CAPABILITIES = 0x10a,
                     FLUSH_CMD = 0x10b, MISC_FEATURES = 0x140, SYSENTER_CS = 0x174, SYSENTER_ESP = 0x175,
                     SYSENTER_EIP = 0x176, MCG_CAP = 0x179, MCG_STATUS = 0x17a, MCG_CTL = 0x17b, PERF_STATUS = 0x198,
                     PERF_CTL = 0x199, MISC_ENABLE = 0x1a0, DEBUGCTL = 0x1d9, MTRR_PHYS0 = 0x200, PAT = 0x277,
                     MTRR_DEF_TYPE = 0x2ff, PERF_CAPABILITIES = 0x345, MC0_CTL = 0x400, XSS = 0xda0,
                     EFER = 0xc0000080, STAR = 0xc0000081, LSTAR = 0xc0000082, CSTAR = 0xc0000083,
                     SFMASK = 0xc0000084, FS_BASE = 0xc0000100, GS_BASE = 0xc0000101, KERNEL_GS_BASE = 0xc0000102,
                     TSC_AUX = 0xc0000103, AMD_SYSCFG = 0xc0010010, AMD_HWCR = 0xc0010015, AMD_NB_CFG = 0xc001001f,
                     AMD_PATCH_LOADER = 0xc0010020, AMD_OSVW_LENGTH = 0xc0010140, AMD_OSVW_STATUS = 0xc0010141,
                     AMD_DE_CFG = 0xc0011029;
}  // namespace msr

}  // namespace ring3::engine
