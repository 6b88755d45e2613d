#include "engine/interp/msr.hpp"

#include "engine/interp/families.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/interp/system.hpp"

namespace ring3::engine {
namespace {

constexpr u32 kMtrrVariable = 8;
constexpr u64 kMtrrCap = 0x508;  // write-combining, fixed ranges, eight variable ranges
constexpr u64 kMcgCtlPresent = 1u << 8;
constexpr u64 kHwcrMcStatusWrEn = 1u << 18, kHwcrTscFreqSel = 1u << 24;
constexpr u64 kLfenceSerializes = 2;  // DE_CFG

bool canonical_value(const GuestFeatures& f, u64 v) {
  const unsigned shift = 64 - f.linear_bits;
  return static_cast<u64>(static_cast<i64>(v << shift) >> shift) == v;
}

// ---- memory types ----

bool valid_pat(u64 v) {
  for (unsigned i = 0; i < 8; ++i) {
    const u8 t = (v >> (8 * i)) & 0xff;
    if (t > 7 || t == 2 || t == 3) return false;
  }
  return true;
}

bool valid_mtrr_type(u8 t) { return t < 2 || (t >= 4 && t <= 6); }

/// Index into mtrr_fixed, or -1.
int fixed_mtrr(u32 index) {
  if (index == 0x250) return 0;
  if (index == 0x258 || index == 0x259) return static_cast<int>(index - 0x258 + 1);
  if (index >= 0x268 && index <= 0x26f) return static_cast<int>(index - 0x268 + 3);
  return -1;
}

/// SDM vol. 3A 11.11.2.
bool valid_mtrr(const GuestFeatures& f, u32 index, u64 v) {
  if (index == msr::MTRR_DEF_TYPE) return !(v & ~0xcffull) && valid_mtrr_type(v & 0xff);
  if (fixed_mtrr(index) >= 0) {
    for (unsigned i = 0; i < 8; ++i)
      if (!valid_mtrr_type((v >> (8 * i)) & 0xff)) return false;
    return true;
  }
  const u64 beyond = f.maxphyaddr >= 64 ? 0 : ~0ull << f.maxphyaddr;
  if (index & 1) return !(v & (beyond | 0x7ff));
  return !(v & (beyond | 0xf00)) && valid_mtrr_type(v & 0xff);
}

// ---- machine check ----

u32 bank_count(const VcpuState& s) { return std::min<u32>(s.msr.mcg_cap & 0xff, 32); }

MsrAccess write_mce(VcpuState& s, u32 index, u64 v, bool host) {
  const u32 at = index - msr::MC0_CTL;
  if (at >= bank_count(s) * 4) return MsrAccess::Fault;
  switch (at & 3) {
    case 0:
      // All or nothing, but for the bits Linux clears to hide known-bad error sources.
      if (v != 0 && (v | (1u << 10) | 1) != ~0ull) return MsrAccess::Fault;
      break;
    case 1:
      if (!host && v != 0 && !(s.msr.hwcr & kHwcrMcStatusWrEn)) return MsrAccess::Fault;
      break;
    default: break;
  }
  s.msr.mc_banks[at] = v;
  return MsrAccess::Ok;
}

// ---- EFER ----

MsrAccess write_efer(VcpuState& s, const GuestFeatures& f, u64 v, bool host) {
  if (host) {
    // What there is at all, whether the guest's CPUID shows it or not.
    constexpr u64 kThere = efer::SCE | efer::LME | efer::LMA | efer::NX | efer::FFXSR;
    if (v & ~kThere) return MsrAccess::Fault;
  } else {
    if (v & f.efer_reserved) return MsrAccess::Fault;
    if ((s.cr0 & cr0::PG) && ((v ^ s.efer) & efer::LME)) return MsrAccess::Fault;
  }
  s.efer = (v & ~efer::LMA) | (s.efer & efer::LMA);
  return MsrAccess::Ok;
}

/// Constants and registers without effect, which guests read or write without asking CPUID.
bool constant_msr(const GuestFeatures& f, u32 index, u64* value) {
  switch (index) {
    case msr::PLATFORM_ID:
    case 0x2a:         // EBL_CR_POWERON
    case 0x34:         // SMI_COUNT
    case 0xc1:         // performance counters and their selectors: no PMU
    case 0xc2:
    case 0x186:
    case 0x187:
    case msr::UCODE_WRITE:
    case msr::PERF_CTL:
    case 0x1db:        // last branch and exception records
    case 0x1dc:
    case 0x1dd:
    case 0x1de:
    case 0x606:        // RAPL units and counters
    case 0x611:
    case 0x619:
    case 0x639:
    case 0x641: *value = 0; return true;
    case 0x2c: *value = 1u << 24; return true;            // EBC_FREQUENCY_ID
    case 0xcd: *value = 3; return true;                   // FSB_FREQ
    case 0x11e: *value = 0xbe702111; return true;         // BBL_CR_CTL3
    case msr::PERF_STATUS: *value = 1000 | (4ull << 40); return true;
    case msr::MTRRCAP: *value = kMtrrCap; return true;
    default: break;
  }
  if (!f.amd) return false;
  if (index >= 0xc0010000 && index <= 0xc0010007) {  // K7 event selectors and counters
    *value = 0;
    return true;
  }
  switch (index) {
    case msr::AMD_SYSCFG:
    case msr::AMD_NB_CFG:
    case msr::AMD_PATCH_LOADER:
    case 0xc0010055:  // interrupt pending
    case 0xc0010058:  // MMIO configuration base
    case 0xc0010112:  // TSEG base
    case 0xc0010113:  // TSEG mask
    case 0xc0010114:  // VM_CR
    case 0xc0010117:  // VM_HSAVE_PA
    case 0xc0011022:  // DC_CFG
    case 0xc001102a:  // BU_CFG2
      *value = 0;
      return true;
    case 0xc001001b: *value = 0x20000000; return true;  // CLK_CTL
    default: return false;
  }
}

/// Of the constants above, those to which a write is accepted and has no effect.
bool write_ignored(const GuestFeatures& f, u32 index) {
  switch (index) {
    case msr::UCODE_WRITE:
    case msr::PERF_CTL:
    case 0xc1:
    case 0xc2:
    case 0x186:
    case 0x187: return true;
    default: break;
  }
  if (!f.amd) return false;
  return (index >= 0xc0010000 && index <= 0xc0010007) || index == msr::AMD_SYSCFG || index == msr::AMD_NB_CFG ||
         index == msr::AMD_PATCH_LOADER || index == 0xc0010117 || index == 0xc0011022 || index == 0xc001102a ||
         index == 0xc0010055;
}

const u64* stored(const VcpuState& s, u32 index) {
  const Msrs& m = s.msr;
  switch (index) {
    case msr::SYSENTER_CS: return &m.sysenter_cs;
    case msr::SYSENTER_ESP: return &m.sysenter_esp;
    case msr::SYSENTER_EIP: return &m.sysenter_eip;
    case msr::MISC_ENABLE: return &m.misc_enable;
    case msr::PAT: return &m.pat;
    case msr::MTRR_DEF_TYPE: return &m.mtrr_def_type;
    case msr::MCG_CAP: return &m.mcg_cap;
    case msr::MCG_STATUS: return &m.mcg_status;
    case msr::DEBUGCTL: return &m.debugctl;
    case msr::UCODE_REV: return &m.microcode_rev;
    case msr::PLATFORM_INFO: return &m.platform_info;
    case msr::MISC_FEATURES: return &m.misc_features;
    case msr::EFER: return &s.efer;
    case msr::STAR: return &m.star;
    case msr::LSTAR: return &m.lstar;
    case msr::CSTAR: return &m.cstar;
    case msr::SFMASK: return &m.sfmask;
    case msr::FS_BASE: return &s.seg[FS].base;
    case msr::GS_BASE: return &s.seg[GS].base;
    case msr::KERNEL_GS_BASE: return &m.kernel_gs_base;
    default: break;
  }
  if (index >= msr::MTRR_PHYS0 && index < msr::MTRR_PHYS0 + 2 * kMtrrVariable)
    return &m.mtrr_variable[index - msr::MTRR_PHYS0];
  const int fixed = fixed_mtrr(index);
  return fixed >= 0 ? &m.mtrr_fixed[static_cast<unsigned>(fixed)] : nullptr;
}

u64* stored(VcpuState& s, u32 index) { return const_cast<u64*>(stored(static_cast<const VcpuState&>(s), index)); }

MsrAccess allow(bool ok) { return ok ? MsrAccess::Ok : MsrAccess::Fault; }

}  // namespace

MsrAccess read_msr(const VcpuState& s, const GuestFeatures& f, u32 index, bool host, u64* value) {
  if (const u64* p = stored(s, index)) {
    *value = *p;
    return MsrAccess::Ok;
  }
  if (constant_msr(f, index, value)) return MsrAccess::Ok;
  if (index >= msr::MC0_CTL && index < msr::MC0_CTL + 128) {
    if (index - msr::MC0_CTL >= bank_count(s) * 4) return MsrAccess::Fault;
    *value = s.msr.mc_banks[index - msr::MC0_CTL];
    return MsrAccess::Ok;
  }
  *value = 0;
  switch (index) {
    case msr::TSC_AUX:
      *value = s.msr.tsc_aux;
      return allow(host || f[Feature::Rdtscp] || f[Feature::Rdpid]);
    case msr::XSS: *value = s.msr.xss; return allow(host || f[Feature::Xsaves]);
    case msr::SPEC_CTRL: *value = s.msr.spec_ctrl; return allow(host || f.spec_ctrl);
    case msr::PRED_CMD:
    case msr::FLUSH_CMD: return MsrAccess::Fault;  // write-only
    case msr::ARCH_CAPABILITIES: *value = s.msr.arch_capabilities; return allow(host || f.arch_capabilities);
    case msr::MCG_CTL: *value = s.msr.mcg_ctl; return allow(host || (s.msr.mcg_cap & kMcgCtlPresent));
    case msr::SMBASE: *value = s.msr.smbase; return allow(host);
    case msr::PERF_CAPABILITIES: return allow(host);
    case msr::AMD_HWCR: *value = s.msr.hwcr; return allow(host || f.amd);
    case msr::AMD_DE_CFG: *value = s.msr.de_cfg; return allow(host || f.amd);
    case msr::AMD_OSVW_LENGTH: *value = s.msr.osvw_length; return allow(host || f.osvw);
    case msr::AMD_OSVW_STATUS: *value = s.msr.osvw_status; return allow(host || f.osvw);
    default: return MsrAccess::Unknown;
  }
}

MsrAccess write_msr(VcpuState& s, const GuestFeatures& f, u32 index, u64 v, bool host) {
  Msrs& m = s.msr;
  switch (index) {
    case msr::EFER: return write_efer(s, f, v, host);
    case msr::SYSENTER_ESP:
    case msr::SYSENTER_EIP:
      if (!canonical_value(f, v)) {
        // AMD keeps 32 bits and faults on nothing.
        if (!f.amd) return MsrAccess::Fault;
        v = static_cast<u32>(v);
      }
      *stored(s, index) = v;
      return MsrAccess::Ok;
    case msr::LSTAR:
    case msr::CSTAR:
    case msr::FS_BASE:
    case msr::GS_BASE:
    case msr::KERNEL_GS_BASE:
      if (!canonical_value(f, v)) return MsrAccess::Fault;
      *stored(s, index) = v;
      return MsrAccess::Ok;
    case msr::SFMASK: m.sfmask = static_cast<u32>(v); return MsrAccess::Ok;
    case msr::SYSENTER_CS:
    case msr::STAR:
    case msr::MISC_ENABLE:
    case msr::MCG_STATUS: *stored(s, index) = v; return MsrAccess::Ok;
    case msr::PAT:
      if (!valid_pat(v)) return MsrAccess::Fault;
      m.pat = v;
      return MsrAccess::Ok;
    case msr::DEBUGCTL:
      // Branch records and single-stepping on branches are not modelled: accepted and not retained, as by KVM
      // on a host without them.
      if (host) m.debugctl = v & 3;
      return allow(!(v & ~3ull));
    case msr::UCODE_REV:
      if (host) m.microcode_rev = v;  // a guest writes 0 before it reads the revision
      return MsrAccess::Ok;
    case msr::PLATFORM_INFO:
      // Withdrawing CPUID faulting while it is on would leave it on.
      if (!host || (!(v & (1u << 31)) && (m.misc_features & 1))) return MsrAccess::Fault;
      m.platform_info = v;
      return MsrAccess::Ok;
    case msr::MISC_FEATURES:
      if ((v & ~1ull) || ((v & 1) && !(m.platform_info & (1u << 31)))) return MsrAccess::Fault;
      m.misc_features = v;
      return MsrAccess::Ok;
    case msr::MCG_CAP:
      if (!host) return MsrAccess::Fault;
      if ((v & 0xff) > 32) return MsrAccess::Fault;  // there are registers for 32 banks
      m.mcg_cap = v;
      return MsrAccess::Ok;
    case msr::MCG_CTL:
      if (!(m.mcg_cap & kMcgCtlPresent) && !host) return MsrAccess::Fault;
      if (v != 0 && v != ~0ull) return MsrAccess::Fault;
      m.mcg_ctl = v;
      return MsrAccess::Ok;
    case msr::TSC_AUX:
      if ((!host && !f[Feature::Rdtscp] && !f[Feature::Rdpid]) || v >> 32) return MsrAccess::Fault;
      m.tsc_aux = v;
      return MsrAccess::Ok;
    case msr::XSS: return allow((host || f[Feature::Xsaves]) && v == 0);  // no supervisor state is offered
    case msr::SPEC_CTRL:
      // IBRS, STIBP, SSBD, Intel's BHI_DIS_S: nothing is speculated across guests here, so the bits are storage.
      if ((!host && !f.spec_ctrl) || (v & ~(f.amd ? 7ull : 0x407ull))) return MsrAccess::Fault;
      m.spec_ctrl = v;
      return MsrAccess::Ok;
    case msr::PRED_CMD: return allow((host || f.ibpb) && !(v & ~1ull));
    case msr::FLUSH_CMD: return allow((host || f.flush_l1d) && !(v & ~1ull));
    case msr::ARCH_CAPABILITIES:
      if (!host) return MsrAccess::Fault;
      m.arch_capabilities = v;
      return MsrAccess::Ok;
    case msr::SMBASE:
      if (!host) return MsrAccess::Fault;
      m.smbase = v;
      return MsrAccess::Ok;
    case msr::PERF_CAPABILITIES: return allow(host && v == 0);
    case msr::AMD_HWCR: {
      if (!host && !f.amd) return MsrAccess::Fault;
      const u64 ignored = 0x40 | 0x100 | 0x8;  // flush filter, IGNNE, TLB cache
      const u64 kept = kHwcrMcStatusWrEn | kHwcrTscFreqSel;
      if (v & ~(ignored | kept)) return MsrAccess::Fault;
      m.hwcr = v & kept;
      return MsrAccess::Ok;
    }
    case msr::AMD_DE_CFG:
      if (v & ~kLfenceSerializes) return MsrAccess::Fault;
      // LFENCE always serialises; the guest may set the bit and not clear one that is set.
      if (!host && (!f.amd || v < m.de_cfg)) return MsrAccess::Fault;
      m.de_cfg = v;
      return MsrAccess::Ok;
    case msr::AMD_OSVW_LENGTH:
    case msr::AMD_OSVW_STATUS:
      if (!host) return MsrAccess::Fault;
      (index == msr::AMD_OSVW_LENGTH ? m.osvw_length : m.osvw_status) = v;
      return MsrAccess::Ok;
    default: break;
  }
  if (index == msr::MTRR_DEF_TYPE || fixed_mtrr(index) >= 0 ||
      (index >= msr::MTRR_PHYS0 && index < msr::MTRR_PHYS0 + 2 * kMtrrVariable)) {
    if (!valid_mtrr(f, index, v)) return MsrAccess::Fault;
    *stored(s, index) = v;
    return MsrAccess::Ok;
  }
  if (index >= msr::MC0_CTL && index < msr::MC0_CTL + 128) return write_mce(s, index, v, host);
  if (write_ignored(f, index)) return MsrAccess::Ok;
  u64 constant;
  if (constant_msr(f, index, &constant)) return allow(host && v == constant);
  return MsrAccess::Unknown;
}

std::span<const u32> saved_msrs() {
  static constexpr u32 kList[] = {
      msr::SYSENTER_CS,    msr::SYSENTER_ESP,  msr::SYSENTER_EIP, msr::STAR,       msr::LSTAR,
      msr::CSTAR,          msr::SFMASK,        msr::KERNEL_GS_BASE, msr::FS_BASE,  msr::GS_BASE,
      msr::EFER,           msr::TSC_AUX,       msr::PAT,          msr::MISC_ENABLE, msr::MCG_STATUS,
      msr::MCG_CTL,        msr::SPEC_CTRL,     msr::UCODE_REV,    msr::XSS,        msr::PLATFORM_INFO,
      msr::MISC_FEATURES,  msr::ARCH_CAPABILITIES, msr::SMBASE,   msr::AMD_HWCR,   msr::AMD_DE_CFG,
      msr::AMD_OSVW_LENGTH, msr::AMD_OSVW_STATUS,
  };
  return kList;
}

// ---- RDMSR, WRMSR ----

namespace {

Exec answer(Context& c, Environment::Answer a) {
  switch (a) {
    case Environment::Answer::Done: return Exec::Branch;
    case Environment::Answer::Fault: return c.gp0();
    case Environment::Answer::Exit: break;
  }
  return c.exit();
}

Exec rdmsr(Context& c, const DecodedInsn&) {
  if (c.cpl != 0) return c.gp0();
  VcpuState& s = c.s;
  const u32 index = static_cast<u32>(s.gpr[RCX]);
  u64 value = 0;
  if (c.env.msr_hooks) [[unlikely]] {
    bool handled = false;
    const Environment::Answer a = c.env.msr_before(index, false, &value, &handled);
    if (a != Environment::Answer::Done) return answer(c, a);
    if (handled) {
      s.gpr[RAX] = static_cast<u32>(value);
      s.gpr[RDX] = value >> 32;
      return Exec::Next;
    }
  }
  switch (read_msr(s, c.features, index, false, &value)) {
    case MsrAccess::Ok: break;
    case MsrAccess::Fault: {
      const Environment::Answer a = c.env.msr_hooks ? c.env.msr_faulted(index, false, &value) : Environment::Answer::Fault;
      if (a != Environment::Answer::Done) return answer(c, a);
      break;
    }
    case MsrAccess::Unknown: {
      const Environment::Answer a = c.env.rdmsr(index, &value);
      if (a != Environment::Answer::Done) return answer(c, a);
      break;
    }
  }
  s.gpr[RAX] = static_cast<u32>(value);
  s.gpr[RDX] = value >> 32;
  return Exec::Next;
}

Exec wrmsr(Context& c, const DecodedInsn&) {
  if (c.cpl != 0) return c.gp0();
  VcpuState& s = c.s;
  const u32 index = static_cast<u32>(s.gpr[RCX]);
  u64 value = (s.gpr[RDX] << 32) | static_cast<u32>(s.gpr[RAX]);
  if (c.env.msr_hooks) [[unlikely]] {
    bool handled = false;
    const Environment::Answer a = c.env.msr_before(index, true, &value, &handled);
    if (a != Environment::Answer::Done || handled) return answer(c, a);
  }
  const u64 old_efer = s.efer;
  switch (write_msr(s, c.features, index, value, false)) {
    case MsrAccess::Ok: break;
    case MsrAccess::Fault:
      return answer(c, c.env.msr_hooks ? c.env.msr_faulted(index, true, &value) : Environment::Answer::Fault);
    case MsrAccess::Unknown: return answer(c, c.env.wrmsr(index, value));
  }
  if (index == msr::EFER) {
    if ((old_efer ^ s.efer) & efer::NX) c.mmu.flush_all();
    c.mode_changed();
  }
  return Exec::Branch;
}

}  // namespace

Handler select_msr(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Rdmsr: return rdmsr;
    case Op::Wrmsr: return wrmsr;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
