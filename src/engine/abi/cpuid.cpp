#include "engine/abi/cpuid.hpp"

#include <cpuid.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "engine/interp/features.hpp"
#include "engine/interp/xstate.hpp"

namespace ring3::engine::abi {
namespace {

constexpr u32 kPvSignature = 0x40000000, kPvFeatures = 0x40000001;

constexpr u32 bit(unsigned n) { return 1u << n; }
template <class... N>
constexpr u32 bits(N... n) {
  return (0u | ... | bit(static_cast<unsigned>(n)));
}

struct Regs {
  u32 eax = 0, ebx = 0, ecx = 0, edx = 0;
};
Regs host(u32 leaf, u32 subleaf = 0) {
  Regs r;
  static const u32 kMax[2] = {__get_cpuid_max(0, nullptr), __get_cpuid_max(0x80000000u, nullptr)};
  const u32 max = kMax[leaf >> 31];
  if (max == 0 || leaf > max) return r;
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool host_is(const char* vendor) {
  const Regs r = host(0);
  char name[13] = {};
  std::memcpy(name, &r.ebx, 4);
  std::memcpy(name + 4, &r.edx, 4);
  std::memcpy(name + 8, &r.ecx, 4);
  return std::strcmp(name, vendor) == 0;
}
bool host_is_amd() { return host_is("AuthenticAMD") || host_is("HygonGenuine"); }

// Leaf 1 EDX, and the part of leaf 0x80000001 EDX that repeats it on AMD.
constexpr u32 kLeaf1Edx = bits(0 /*FPU*/, 2 /*DE*/, 3 /*PSE*/, 4 /*TSC*/, 5 /*MSR*/, 6 /*PAE*/, 7 /*MCE*/, 8 /*CX8*/, 9 /*APIC*/,
                               11 /*SEP*/, 12 /*MTRR*/, 13 /*PGE*/, 14 /*MCA*/, 15 /*CMOV*/, 16 /*PAT*/, 17 /*PSE36*/,
                               19 /*CLFSH*/, 23 /*MMX*/, 24 /*FXSR*/, 25 /*SSE*/, 26 /*SSE2*/);
constexpr u32 kAmdMirror = kLeaf1Edx & ~bits(11, 19, 25, 26);

// Vector extensions are executed by the host's own units, so they need the host's bit; AVX also needs its OS.
constexpr u32 kLeaf1EcxHost = bits(0 /*SSE3*/, 1 /*PCLMUL*/, 9 /*SSSE3*/, 13 /*CX16*/, 19 /*SSE4.1*/, 20 /*SSE4.2*/,
                                   22 /*MOVBE*/, 23 /*POPCNT*/, 25 /*AES*/, 30 /*RDRAND*/);
constexpr u32 kLeaf1EcxAvx = bits(12 /*FMA*/, 28 /*AVX*/, 29 /*F16C*/);
// Not the TSC deadline timer: the documentation wants it asked for by its capability, as it comes with the LAPICs.
constexpr u32 kLeaf1EcxOwn = bits(17 /*PCID*/, 21 /*x2APIC*/, 26 /*XSAVE*/, 31 /*hypervisor*/);

constexpr u32 kLeaf7EbxHost = bits(3 /*BMI1*/, 8 /*BMI2*/, 13 /*no FCS/FDS*/, 18 /*RDSEED*/, 19 /*ADX*/,
                                   23 /*CLFLUSHOPT*/, 24 /*CLWB*/, 29 /*SHA*/);
constexpr u32 kLeaf7EbxOwn = bits(0 /*FSGSBASE*/, 1 /*TSC_ADJUST*/, 6 /*FDP_EXCPTN_ONLY*/, 7 /*SMEP*/, 9 /*ERMS*/, 10 /*INVPCID*/,
                                  20 /*SMAP*/);
constexpr u32 kLeaf7EcxHost = bits(8 /*GFNI*/);
constexpr u32 kLeaf7EcxAvx = bits(9 /*VAES*/, 10 /*VPCLMULQDQ*/);
constexpr u32 kLeaf7EcxOwn = bits(2 /*UMIP*/, 22 /*RDPID*/);
constexpr u32 kLeaf7EdxHost = bits(4 /*FSRM*/);
// AVX-512: with the host's kernel switching its state, and what moving that takes (host_features()).
constexpr u32 kLeaf7EbxAvx512 = bits(16 /*F*/, 17 /*DQ*/, 21 /*IFMA*/, 28 /*CD*/, 30 /*BW*/, 31 /*VL*/);
constexpr u32 kLeaf7EcxAvx512 = bits(1 /*VBMI*/, 6 /*VBMI2*/, 11 /*VNNI*/, 12 /*BITALG*/, 14 /*VPOPCNTDQ*/);
constexpr u32 kLeaf7EdxAvx512 = bits(8 /*VP2INTERSECT*/, 23 /*FP16*/);
constexpr u32 kLeaf71EaxAvx512 = bit(5) /*BF16*/;
constexpr u32 kLeaf7EdxOwn = bits(29 /*ARCH_CAPABILITIES*/);
constexpr u32 kSpecCtrl = bit(26);  // leaf 7 EDX, Intel: SPEC_CTRL and PRED_CMD
// Leaf 7.2 EDX, Intel. Without BHI_CTRL Linux clears the branch history in software at every system call, BHI_NO or not.
constexpr u32 kLeaf72Edx = bits(4 /*BHI_CTRL*/, 5 /*MCDT_NO*/);

constexpr u32 kExt1EcxHost = bits(5 /*ABM*/, 6 /*SSE4a*/, 8 /*PREFETCHW*/);
constexpr u32 kExt1EcxOwn = bits(0 /*LAHF in 64-bit mode*/);
constexpr u32 kExt1EdxHost = bits(22 /*MMXEXT*/);
constexpr u32 kExt1EdxOwn = bits(11 /*SYSCALL*/, 20 /*NX*/, 26 /*1G pages*/, 27 /*RDTSCP*/, 29 /*LM*/);

bool host_avx() {
  if (!(host(1).ecx & bit(27))) return false;  // OSXSAVE
  u32 low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & 6) == 6;
}

kvm_cpuid_entry2 entry(u32 leaf, Regs r) {
  kvm_cpuid_entry2 e{};
  e.function = leaf;
  e.eax = r.eax;
  e.ebx = r.ebx;
  e.ecx = r.ecx;
  e.edx = r.edx;
  return e;
}
kvm_cpuid_entry2 entry(u32 leaf, u32 subleaf, Regs r) {
  kvm_cpuid_entry2 e = entry(leaf, r);
  e.index = subleaf;
  e.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
  return e;
}

}  // namespace

u64 arch_capabilities() {
  constexpr u64 kRdclNo = 1u << 0, kIbrsAll = 1u << 1, kSkipL1dFlush = 1u << 3, kSsbNo = 1u << 4, kMdsNo = 1u << 5,
                kPschangeMcNo = 1u << 6, kTaaNo = 1u << 8, kSbdrSsdpNo = 1u << 13, kFbsdpNo = 1u << 14, kPsdpNo = 1u << 15,
                kBhiNo = 1u << 20, kPbrsbNo = 1u << 24, kGdsNo = 1u << 26, kRfdsNo = 1u << 27, kItsNo = 1ull << 62;
  return kRdclNo | kIbrsAll | kSkipL1dFlush | kSsbNo | kMdsNo | kPschangeMcNo | kTaaNo | kSbdrSsdpNo | kFbsdpNo | kPsdpNo |
         kBhiNo | kPbrsbNo | kGdsNo | kRfdsNo | kItsNo;
}

namespace {

std::vector<kvm_cpuid_entry2> find_supported_cpuid() {
  std::vector<kvm_cpuid_entry2> out;
  const bool amd = host_is_amd();
  const bool avx = host_avx();
  const u32 avx_mask = avx ? ~0u : 0u;
  const bool avx512 = host_features()[Feature::Avx512f];
  const u32 avx512_mask = avx512 ? ~0u : 0u;

  const Regs h0 = host(0);
  const u32 max_basic = 0xd;
  out.push_back(entry(0, Regs{max_basic, h0.ebx, h0.ecx, h0.edx}));

  const Regs h1 = host(1);
  // One logical processor, APIC id 0: the VMM puts in each vCPU's own. CLFLUSH lines of 64 bytes.
  out.push_back(entry(1, Regs{h1.eax, bit(16) | (8u << 8),
                              (h1.ecx & (kLeaf1EcxHost | (kLeaf1EcxAvx & avx_mask))) | kLeaf1EcxOwn, kLeaf1Edx}));

  out.push_back(entry(2, amd ? Regs{} : host(2)));
  for (u32 i = 0; i < 8 && !amd; i++) {  // deterministic cache parameters, of one core that shares with nobody
    Regs r = host(4, i);
    const bool end = (r.eax & 0x1f) == 0;
    r.eax &= 0x3fff;
    out.push_back(entry(4, i, r));
    if (end) break;
  }
  out.push_back(entry(6, Regs{bit(2) /* ARAT */, 0, 0, 0}));

  const Regs h7 = host(7);
  const u32 leaf7_ebx = (h7.ebx & (kLeaf7EbxHost | (bit(5) /*AVX2*/ & avx_mask) | (kLeaf7EbxAvx512 & avx512_mask))) | kLeaf7EbxOwn;
  const u32 leaf7_ecx = (h7.ecx & (kLeaf7EcxHost | (kLeaf7EcxAvx & avx_mask) | (kLeaf7EcxAvx512 & avx512_mask))) | kLeaf7EcxOwn;
  const u32 leaf7_edx = (h7.edx & (kLeaf7EdxHost | (kLeaf7EdxAvx512 & avx512_mask))) | kLeaf7EdxOwn | (amd ? 0u : kSpecCtrl);
  const u32 leaf71_eax = h7.eax >= 1 && avx512 ? host(7, 1).eax & kLeaf71EaxAvx512 : 0;
  out.push_back(entry(7, 0, Regs{amd ? (leaf71_eax != 0 ? 1u : 0u) : 2u, leaf7_ebx, leaf7_ecx, leaf7_edx}));
  if (!amd || leaf71_eax != 0) out.push_back(entry(7, 1, Regs{leaf71_eax, 0, 0, 0}));
  if (!amd) {
    out.push_back(entry(7, 2, Regs{0, 0, 0, kLeaf72Edx}));
  }

  out.push_back(entry(0xb, 0, Regs{}));  // no topology: the VMM describes its own

  // XSAVE: x87, SSE, AVX and AVX-512, the latter where the host has it. Sizes for what XCR0 enables are computed at run time;
  // here for all. AMX is not offered.
  const u32 xcr0 = (avx ? 7 : 3) | (avx512 ? 0xe0 : 0);
  const u32 standard = xstate_size(xcr0, false);
  out.push_back(entry(0xd, 0, Regs{xcr0, standard, standard, 0}));
  const Regs hd1 = host(0xd, 1);
  out.push_back(entry(0xd, 1, Regs{hd1.eax & bits(0 /*XSAVEOPT*/, 1 /*XSAVEC*/, 2 /*XGETBV 1*/, 3 /*XSAVES*/), xstate_size(xcr0, true), 0, 0}));
  for (const XstateComponent& x : xstate_components())
    if (xcr0 >> x.number & 1) out.push_back(entry(0xd, x.number, Regs{x.size, x.standard, 0, 0}));

  u32 signature[3];
  std::memcpy(signature, "KVMKVMKVM\0\0\0", 12);
  out.push_back(entry(kPvSignature, Regs{kPvFeatures, signature[0], signature[1], signature[2]}));
  out.push_back(entry(kPvFeatures, Regs{pv::kOffered, 0, 0, 0}));

  const Regs e0 = host(0x80000000);
  out.push_back(entry(0x80000000, Regs{amd ? 0x80000021u : 0x80000008u, e0.ebx, e0.ecx, e0.edx}));
  const Regs e1 = host(0x80000001);
  u32 e1_edx = (e1.edx & kExt1EdxHost) | kExt1EdxOwn;
  if (amd) e1_edx |= kLeaf1Edx & kAmdMirror;
  const u32 e1_ecx = (e1.ecx & kExt1EcxHost) | kExt1EcxOwn;
  out.push_back(entry(0x80000001, Regs{e1.eax, amd ? e1.ebx : 0, e1_ecx, e1_edx}));
  for (u32 leaf = 0x80000002; leaf <= 0x80000004; leaf++) out.push_back(entry(leaf, host(leaf)));
  if (amd) out.push_back(entry(0x80000005, host(0x80000005)));
  const Regs e6 = host(0x80000006);
  out.push_back(entry(0x80000006, Regs{amd ? e6.eax : 0, amd ? e6.ebx : 0, e6.ecx, amd ? e6.edx : 0}));
  out.push_back(entry(0x80000007, Regs{0, 0, 0, bit(8) /* invariant TSC */}));

  const Regs e8 = host(0x80000008);
  const u32 physical = std::clamp<u32>(e8.eax & 0xff, 36, 46);
  // CLZERO; always-saved x87 error pointers; then bits that keep guests from slow mitigations of problems they do not have.
  u32 e8_ebx = (e8.ebx & bit(0)) | bit(2);
  if (amd) e8_ebx |= bits(14 /*IBRS: MSR SPEC_CTRL*/, 26 /*SSB_NO*/, 29 /*BTC_NO*/);
  out.push_back(entry(0x80000008, Regs{physical | (48u << 8), amd ? e8_ebx : 0, 0, 0}));
  if (amd) {
    // No nested data breakpoints, LFENCE always serialises, a null selector clears the base, SRSO_NO; ECX: TSA_SQ_NO, TSA_L1_NO.
    out.push_back(entry(0x80000021, Regs{bits(0, 2, 6, 29), 0, bits(1, 2), 0}));
  }
  return out;
}

}  // namespace

std::vector<kvm_cpuid_entry2> supported_cpuid() {
  static const std::vector<kvm_cpuid_entry2> found = find_supported_cpuid();  // each CPUID may be an exit (host_features())
  return found;
}

std::vector<kvm_cpuid_entry2> emulated_cpuid() {
  // Nothing is slower than the rest here, so nothing is offered as "emulated only" beyond what is supported.
  return {entry(0, Regs{7, 0, 0, 0}), entry(1, Regs{0, 0, bit(22) /* MOVBE */, 0}), entry(7, 0, Regs{0, 0, bit(22) /* RDPID */, 0})};
}

int Cpuid::set(std::span<const kvm_cpuid_entry2> entries) {
  for (const auto& e : entries) {
    if (e.function != 0x80000008) continue;
    const u32 linear = e.eax >> 8 & 0xff;
    if (linear != 48 && linear != 0) return -EINVAL;  // 57 would need LA57
  }
  entries_.assign(entries.begin(), entries.end());
  return 0;
}

const kvm_cpuid_entry2* Cpuid::find(u32 leaf, u32 subleaf) const {
  for (const auto& e : entries_) {
    if (e.function != leaf) continue;
    if (!(e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e.index == subleaf) return &e;
  }
  return nullptr;
}

bool Cpuid::amd() const {
  const kvm_cpuid_entry2* e = find(0, 0);
  if (e == nullptr) return false;
  char name[13] = {};
  std::memcpy(name, &e->ebx, 4);
  std::memcpy(name + 4, &e->edx, 4);
  std::memcpy(name + 8, &e->ecx, 4);
  return std::strcmp(name, "AuthenticAMD") == 0 || std::strcmp(name, "HygonGenuine") == 0;
}

void Cpuid::lookup(u32 leaf, u32 subleaf, u32 out[4]) const {
  const kvm_cpuid_entry2* e = find(leaf, subleaf);
  if (e == nullptr && !amd()) {
    // Out of range of its class: Intel processors answer with the highest basic leaf (SDM CPUID, "if a value entered…").
    const u32 base = leaf & 0xc0000000u ? leaf & 0xffffff00u : 0;
    const u32 class_base = leaf >= 0x40000000u && leaf < 0x50000000u ? base : leaf & 0x80000000u;
    const kvm_cpuid_entry2* head = find(class_base, 0);
    const bool in_range = head != nullptr && leaf <= head->eax && leaf >= class_base;
    const kvm_cpuid_entry2* basic = find(0, 0);
    if (!in_range && basic != nullptr) e = find(basic->eax, subleaf);
  }
  if (e != nullptr) {
    out[0] = e->eax;
    out[1] = e->ebx;
    out[2] = e->ecx;
    out[3] = e->edx;
    return;
  }
  out[0] = out[1] = out[2] = out[3] = 0;
  // An absent topology level still tells its number and the x2APIC id.
  if (leaf == 0xb || leaf == 0x1f) {
    if (const kvm_cpuid_entry2* one = find(leaf, 1)) {
      out[2] = subleaf & 0xff;
      out[3] = one->edx;
    }
  }
}

namespace {
/// The place of KVM's features in a table; its size without them.
std::size_t pv_features_in(const std::vector<kvm_cpuid_entry2>& entries) {
  u32 signature[3];
  std::memcpy(signature, "KVMKVMKVM\0\0\0", 12);
  for (const auto& e : entries) {
    if ((e.function & 0xffff00ff) != kPvSignature) continue;
    if (e.ebx != signature[0] || e.ecx != signature[1] || e.edx != signature[2]) continue;
    for (std::size_t i = 0; i < entries.size(); i++) {
      if (entries[i].function == (e.function | kPvFeatures)) return i;
    }
    break;
  }
  return entries.size();
}
}  // namespace

const kvm_cpuid_entry2* Cpuid::pv_features() const {
  const std::size_t at = pv_features_in(entries_);
  return at == entries_.size() ? nullptr : &entries_[at];
}

void Cpuid::drop_pv_feature(std::vector<kvm_cpuid_entry2>* entries, u32 bit) {
  const std::size_t at = pv_features_in(*entries);
  if (at != entries->size()) (*entries)[at].eax &= ~bit;
}

bool Cpuid::x2apic() const {
  const kvm_cpuid_entry2* e = find(1, 0);
  return e != nullptr && (e->ecx & bit(21));
}
bool Cpuid::tsc_deadline() const {
  const kvm_cpuid_entry2* e = find(1, 0);
  return e != nullptr && (e->ecx & bit(24));
}
u8 Cpuid::physical_bits() const {
  const kvm_cpuid_entry2* head = find(0x80000000, 0);
  const kvm_cpuid_entry2* e = find(0x80000008, 0);
  if (head == nullptr || head->eax < 0x80000008 || e == nullptr || (e->eax & 0xff) == 0) return 36;
  return static_cast<u8>(std::min<u32>(e->eax & 0xff, 52));
}

}  // namespace ring3::engine::abi
