#include "engine/interp/features.hpp"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace ring3::engine {
namespace {

kvm_cpuid_entry2 leaf(u32 function, u32 a, u32 b, u32 c, u32 d) {
  kvm_cpuid_entry2 e = {};
  e.function = function;
  e.eax = a, e.ebx = b, e.ecx = c, e.edx = d;
  return e;
}
kvm_cpuid_entry2 subleaf(u32 function, u32 index, u32 a, u32 b, u32 c, u32 d) {
  kvm_cpuid_entry2 e = leaf(function, a, b, c, d);
  e.index = index;
  e.flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
  return e;
}

TEST(Features, NothingOfNothing) {
  const GuestFeatures f = make_features({});
  EXPECT_TRUE(f[Feature::Base]);
  EXPECT_FALSE(f[Feature::Sse]);
  EXPECT_EQ(f.xcr0_supported, 3u);
  EXPECT_TRUE(f.cr4_reserved & cr4::OSXSAVE);
  EXPECT_FALSE(f.amd);
  EXPECT_FALSE(f.nx);
}

TEST(Features, EveryRowSetsItsFeature) {
  std::set<Feature> seen;
  for (const FeatureBit& b : feature_bits()) {
    EXPECT_TRUE(seen.insert(b.feature).second);
    EXPECT_LT(b.bit, 32);
    std::vector<kvm_cpuid_entry2> entries = {
        leaf(1, 0, 0, 1u << 26 | 1u << 28, 0),  // XSAVE and AVX, on which others rest
        subleaf(0xd, 0, 0xe7, 0, 0, 0), subleaf(0xd, 1, 0, 0, 0, 0),
        subleaf(7, 0, 0, 1u << 16, 0, 0), subleaf(7, 1, 0, 0, 0, 0),  // AVX512F
        leaf(0x80000001, 0, 0, 0, 0), leaf(0x80000008, 0, 0, 0, 0)};
    for (kvm_cpuid_entry2& e : entries) {
      if (e.function != b.leaf || e.index != b.subleaf) continue;
      u32* regs[] = {&e.eax, &e.ebx, &e.ecx, &e.edx};
      *regs[static_cast<unsigned>(b.reg)] |= 1u << b.bit;
    }
    EXPECT_TRUE(make_features(entries)[b.feature]) << static_cast<int>(b.feature);
  }
  // All but the ones that have no bit of their own.
  EXPECT_EQ(seen.size(), static_cast<unsigned>(Feature::Count) - 2);
}

TEST(Features, DependantsFallWithWhatTheyRestOn) {
  std::vector<kvm_cpuid_entry2> entries = {leaf(1, 0, 0, 1u << 28 | 1u << 12, 0), subleaf(7, 0, 0, 1u << 5, 0, 0),
                                           subleaf(0xd, 0, 7, 0, 0, 0)};
  GuestFeatures f = make_features(entries);
  EXPECT_FALSE(f[Feature::Avx]);
  EXPECT_FALSE(f[Feature::Avx2]);
  EXPECT_FALSE(f[Feature::Fma]);
  EXPECT_EQ(f.xcr0_supported, 3u);
  entries[0].ecx |= 1u << 26;
  f = make_features(entries);
  EXPECT_TRUE(f[Feature::Avx2]);
  EXPECT_EQ(f.xcr0_supported, 7u);
  EXPECT_FALSE(f.cr4_reserved & cr4::OSXSAVE);
  EXPECT_TRUE(f.cr4_reserved & cr4::LA57);
  EXPECT_TRUE(f.cr4_reserved & 1ull << 40);
}

TEST(Features, VendorAndAddresses) {
  const std::vector<kvm_cpuid_entry2> entries = {leaf(0, 16, 0x68747541, 0x444d4163, 0x69746e65),
                                                 leaf(0x80000001, 0, 0, 0, 1u << 20 | 1u << 29 | 1u << 11 | 1u << 25),
                                                 leaf(0x80000008, 0x3028, 0, 0, 0)};
  const GuestFeatures f = make_features(entries);
  EXPECT_TRUE(f.amd);
  EXPECT_TRUE(f.nx);
  EXPECT_EQ(f.efer_reserved, ~(efer::SCE | efer::LME | efer::LMA | efer::NX | efer::FFXSR));
  EXPECT_EQ(f.maxphyaddr, 40);
  EXPECT_EQ(f.linear_bits, 48);
}

TEST(Features, HostHasTheBaseline) {
  const GuestFeatures f = host_features();
  for (Feature x : {Feature::X87, Feature::Mmx, Feature::Fxsr, Feature::Sse, Feature::Sse2, Feature::Cmov, Feature::Cx8})
    EXPECT_TRUE(f[x]);
}

}  // namespace
}  // namespace ring3::engine
