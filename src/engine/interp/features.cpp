#include "engine/interp/features.hpp"

#include <cpuid.h>

#include <cstring>
#include <vector>

namespace ring3::engine {
namespace {

using F = Feature;
constexpr auto A = CpuidReg::Eax, B = CpuidReg::Ebx, C = CpuidReg::Ecx, D = CpuidReg::Edx;
constexpr u32 kExt = 0x80000001;

constexpr FeatureBit kBits[] = {
    {F::X87, 1, 0, D, 0},        {F::Tsc, 1, 0, D, 4},         {F::Msr, 1, 0, D, 5},
    {F::Cx8, 1, 0, D, 8},        {F::Sysenter, 1, 0, D, 11},   {F::Cmov, 1, 0, D, 15},
    {F::Clflush, 1, 0, D, 19},   {F::Mmx, 1, 0, D, 23},        {F::Fxsr, 1, 0, D, 24},
    {F::Sse, 1, 0, D, 25},       {F::Sse2, 1, 0, D, 26},

    {F::Sse3, 1, 0, C, 0},       {F::Pclmul, 1, 0, C, 1},      {F::Monitor, 1, 0, C, 3},
    {F::Ssse3, 1, 0, C, 9},      {F::Fma, 1, 0, C, 12},        {F::Cx16, 1, 0, C, 13},
    {F::Sse41, 1, 0, C, 19},     {F::Sse42, 1, 0, C, 20},      {F::Movbe, 1, 0, C, 22},
    {F::Popcnt, 1, 0, C, 23},    {F::Aes, 1, 0, C, 25},        {F::Xsave, 1, 0, C, 26},
    {F::Avx, 1, 0, C, 28},       {F::F16c, 1, 0, C, 29},       {F::Rdrand, 1, 0, C, 30},

    {F::Fsgsbase, 7, 0, B, 0},   {F::Bmi1, 7, 0, B, 3},        {F::Avx2, 7, 0, B, 5},
    {F::Bmi2, 7, 0, B, 8},       {F::Invpcid, 7, 0, B, 10},    {F::Rdseed, 7, 0, B, 18},
    {F::Adx, 7, 0, B, 19},       {F::Smap, 7, 0, B, 20},       {F::Clflushopt, 7, 0, B, 23},
    {F::Clwb, 7, 0, B, 24},      {F::Sha, 7, 0, B, 29},

    {F::Pku, 7, 0, C, 3},        {F::Gfni, 7, 0, C, 8},        {F::Vaes, 7, 0, C, 9},
    {F::Vpclmul, 7, 0, C, 10},
    {F::Avx512f, 7, 0, B, 16},   {F::Avx512dq, 7, 0, B, 17},   {F::Avx512ifma, 7, 0, B, 21},
    {F::Avx512cd, 7, 0, B, 28},  {F::Avx512bw, 7, 0, B, 30},   {F::Avx512vl, 7, 0, B, 31},
    {F::Avx512vbmi, 7, 0, C, 1}, {F::Avx512vbmi2, 7, 0, C, 6}, {F::Avx512vnni, 7, 0, C, 11},
    {F::Avx512bitalg, 7, 0, C, 12}, {F::Avx512vpopcntdq, 7, 0, C, 14}, {F::Avx512vp2intersect, 7, 0, D, 8},
    {F::Avx512fp16, 7, 0, D, 23}, {F::Avx512bf16, 7, 1, A, 5},
    {F::Rdpid, 7, 0, C, 22},      {F::Serialize, 7, 0, D, 14},

    {F::Xsaveopt, 0xd, 1, A, 0}, {F::Xsavec, 0xd, 1, A, 1},    {F::Xsaves, 0xd, 1, A, 3},

    {F::LahfLm, kExt, 0, C, 0},  {F::Lzcnt, kExt, 0, C, 5},    {F::Sse4a, kExt, 0, C, 6},
    {F::Prefetchw, kExt, 0, C, 8}, {F::Syscall, kExt, 0, D, 11}, {F::Rdtscp, kExt, 0, D, 27},
    {F::Clzero, 0x80000008, 0, B, 0},
};

constexpr Feature kAvx512[] = {F::Avx512f, F::Avx512dq, F::Avx512ifma, F::Avx512cd, F::Avx512bw, F::Avx512vl, F::Avx512vbmi,
                               F::Avx512vbmi2, F::Avx512vnni, F::Avx512bitalg, F::Avx512vpopcntdq, F::Avx512vp2intersect,
                               F::Avx512fp16, F::Avx512bf16};

struct Leaf {
  u32 r[4] = {};
  u32 operator[](CpuidReg reg) const { return r[static_cast<unsigned>(reg)]; }
  bool bit(CpuidReg reg, unsigned n) const { return (*this)[reg] >> n & 1; }
};

template <class Lookup>
GuestFeatures distil(const Lookup& cpuid) {
  GuestFeatures f;
  for (const FeatureBit& b : kBits)
    if (cpuid(b.leaf, b.subleaf).bit(b.reg, b.bit)) f.has.set(static_cast<unsigned>(b.feature));
  f.has.set(static_cast<unsigned>(Feature::Base));

  // What rests on XSAVE, and AVX's dependants, cannot be there alone.
  const auto drop = [&](Feature x) { f.has.reset(static_cast<unsigned>(x)); };
  const Leaf xcr0 = cpuid(0xd, 0);
  f.xcr0_supported = f[F::Xsave] ? (xcr0.r[0] & 0xe7) | 3 : 3;
  if (!f[F::Avx]) f.xcr0_supported &= ~4ull;
  if (!f[F::Xsave])
    for (Feature x : {F::Xsaveopt, F::Xsavec, F::Xsaves, F::Avx}) drop(x);
  if (!(f.xcr0_supported & 4)) drop(F::Avx);
  if (!f[F::Avx])
    for (Feature x : {F::Avx2, F::Fma, F::F16c, F::Vaes, F::Vpclmul}) drop(x);
  // AVX-512 rests on its three state components and on AVX; they are of no use without it.
  if (!f[F::Avx] || (f.xcr0_supported & 0xe0) != 0xe0) drop(F::Avx512f);
  if (!f[F::Avx512f]) {
    f.xcr0_supported &= ~0xe0ull;
    for (Feature x : kAvx512) drop(x);
  }

  const Leaf l0 = cpuid(0, 0), l1 = cpuid(1, 0), l7 = cpuid(7, 0), ext = cpuid(kExt, 0);
  char vendor[12];
  std::memcpy(vendor, &l0.r[1], 4);
  std::memcpy(vendor + 4, &l0.r[3], 4);
  std::memcpy(vendor + 8, &l0.r[2], 4);
  f.amd = std::memcmp(vendor, "AuthenticAMD", 12) == 0 || std::memcmp(vendor, "HygonGenuine", 12) == 0;
  f.pcid = l1.bit(C, 17);
  f.nx = ext.bit(D, 20);
  f.page1g = ext.bit(D, 26);

  u64 cr4 = cr4::PCE;  // VME and PVI stay reserved: the virtual-8086 extensions are not modelled
  const auto allow = [&](bool have, u64 bits) {
    if (have) cr4 |= bits;
  };
  allow(f[F::Tsc], cr4::TSD);
  allow(l1.bit(D, 2), cr4::DE);
  allow(l1.bit(D, 3), cr4::PSE);
  allow(l1.bit(D, 6), cr4::PAE);
  allow(l1.bit(D, 7), cr4::MCE);
  allow(l1.bit(D, 13), cr4::PGE);
  allow(f[F::Fxsr], cr4::OSFXSR);
  allow(f[F::Sse], cr4::OSXMMEXCPT);
  allow(l7.bit(C, 2), cr4::UMIP);
  allow(f[F::Fsgsbase], cr4::FSGSBASE);
  allow(f.pcid, cr4::PCIDE);
  allow(f[F::Xsave], cr4::OSXSAVE);
  allow(l7.bit(B, 7), cr4::SMEP);
  allow(f[F::Smap], cr4::SMAP);
  allow(f[F::Pku], cr4::PKE);
  f.cr4_reserved = ~cr4;
  u64 efer = 0;
  if (f[F::Syscall]) efer |= efer::SCE;
  if (ext.bit(D, 29)) efer |= efer::LME | efer::LMA;
  if (f.nx) efer |= efer::NX;
  if (ext.bit(D, 25)) efer |= efer::FFXSR;
  f.efer_reserved = ~efer;

  const Leaf addresses = cpuid(0x80000008, 0);
  // MSRs that are there only when CPUID says so.
  f.spec_ctrl = l7.bit(D, 26) || addresses.bit(B, 14) || addresses.bit(B, 15) || addresses.bit(B, 24);
  f.ibpb = l7.bit(D, 26) || (f.amd && addresses.bit(B, 12));
  f.flush_l1d = l7.bit(D, 28);
  f.arch_capabilities = l7.bit(D, 29);
  f.osvw = f.amd && ext.bit(C, 9);
  f.null_clears_base = !f.amd || cpuid(0x80000021, 0).bit(A, 6);
  const u8 physical = static_cast<u8>(addresses.r[0]), linear = static_cast<u8>(addresses.r[0] >> 8);
  f.maxphyaddr = physical >= 32 && physical <= 52 ? physical : 36;
  f.linear_bits = linear == 57 ? 57 : 48;
  return f;
}

}  // namespace

std::span<const FeatureBit> feature_bits() { return kBits; }

GuestFeatures make_features(std::span<const kvm_cpuid_entry2> entries) {
  return distil([&](u32 leaf, u32 subleaf) {
    for (const kvm_cpuid_entry2& e : entries) {
      if (e.function != leaf) continue;
      if ((e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) && e.index != subleaf) continue;
      if (!(e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) && subleaf != 0) continue;
      return Leaf{{e.eax, e.ebx, e.ecx, e.edx}};
    }
    return Leaf{};
  });
}

namespace {

/// Under a hypervisor each CPUID is an exit, of 13 us and more where that one is nested: each leaf is asked for once.
GuestFeatures find_host_features() {
  struct Asked {
    u32 leaf, subleaf;
    Leaf is;
  };
  std::vector<Asked> asked;
  GuestFeatures f = distil([&asked](u32 leaf, u32 subleaf) {
    for (const Asked& before : asked)
      if (before.leaf == leaf && before.subleaf == subleaf) return before.is;
    Leaf l;
    if (__get_cpuid_count(leaf, subleaf, &l.r[0], &l.r[1], &l.r[2], &l.r[3]) == 0) l = Leaf{};
    asked.push_back({leaf, subleaf, l});
    return l;
  });
  // The bits say what the CPU has; XGETBV what the host's kernel switches.
  u32 a = 0, b = 0, c = 0, d = 0;
  __cpuid(1, a, b, c, d);
  u32 xcr0 = 0;
  if (c & 1u << 27) {
    u32 high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  }
  if ((xcr0 & 6) != 6)
    for (Feature x : {F::Avx, F::Avx2, F::Fma, F::F16c, F::Vaes, F::Vpclmul}) f.has.reset(static_cast<unsigned>(x));
  // What moves the state needs KMOVQ and vectors of every length (vector_stub.hpp, thunks.S).
  const bool avx512 = (xcr0 & 0xe6) == 0xe6 && f[F::Avx512f] && f[F::Avx512bw] && f[F::Avx512dq] && f[F::Avx512vl];
  if (!avx512) {
    for (Feature x : kAvx512) f.has.reset(static_cast<unsigned>(x));
    f.xcr0_supported &= ~0xe0ull;
  }
  return f;
}

}  // namespace

GuestFeatures host_features() {
  static const GuestFeatures found = find_host_features();
  return found;
}

}  // namespace ring3::engine
