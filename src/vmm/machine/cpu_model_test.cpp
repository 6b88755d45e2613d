#include "vmm/machine/cpu_model.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cerrno>

namespace ring3::vmm {
namespace {

kvm_cpuid_entry2 entry(u32 leaf, u32 subleaf, u32 eax, u32 ebx, u32 ecx, u32 edx) {
  kvm_cpuid_entry2 e{};
  e.function = leaf;
  e.index = subleaf;
  e.flags = leaf == 7 ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
  e.eax = eax;
  e.ebx = ebx;
  e.ecx = ecx;
  e.edx = edx;
  return e;
}

std::vector<kvm_cpuid_entry2> everything() {
  return {entry(0, 0, 0xd, 0, 0, 0),        entry(1, 0, 0, 0, ~0u, ~0u),  entry(7, 0, 2, ~0u, ~0u, ~0u),
          entry(7, 1, ~0u, ~0u, ~0u, ~0u), entry(7, 2, ~0u, ~0u, ~0u, ~0u), entry(0x80000001, 0, 0, 0, ~0u, ~0u)};
}

const kvm_cpuid_entry2& at(const std::vector<kvm_cpuid_entry2>& entries, u32 leaf, u32 subleaf) {
  for (const auto& e : entries)
    if (e.function == leaf && e.index == subleaf) return e;
  static const kvm_cpuid_entry2 none{};
  ADD_FAILURE() << "no leaf " << leaf << " " << subleaf;
  return none;
}

TEST(CpuModel, DefaultKeepsOfLeafSevensSubleavesWhatItKnows) {
  auto model = cpu_model("default", everything());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 7, 0).eax, 2u);
  EXPECT_EQ(at(*model, 7, 0).ebx >> 16 & 1, 0u);  // AVX-512
  EXPECT_EQ(at(*model, 7, 0).edx >> 26 & 1, 1u);  // SPEC_CTRL
  EXPECT_EQ(at(*model, 7, 1).eax, 0u);
  EXPECT_EQ(at(*model, 7, 2).eax, 0u);
  EXPECT_EQ(at(*model, 7, 2).edx, 0x30u);  // BHI_CTRL, MCDT_NO
}

// GCC's target_clones choose by family and model: those of a host with AVX-512 led programs to it that the model does not offer.
TEST(CpuModel, FamilyAndModelHaveNoMoreThanIsOffered) {
  constexpr u32 kRocketLake = 0xa0671, kZen3 = 0xa00f11, kZen4 = 0xa10f11, kZen2 = 0x830f10;
  const auto signature = [](const std::string& specification, u32 vendor, u32 host) {
    auto entries = everything();
    entries[0].ebx = vendor;
    entries[1].eax = host;
    auto model = cpu_model(specification, entries);
    EXPECT_TRUE(model.ok());
    return at(*model, 1, 0).eax;
  };
  constexpr u32 kIntel = 0x756e6547, kAmd = 0x68747541;
  EXPECT_EQ(signature("host", kIntel, kRocketLake), kRocketLake);
  EXPECT_EQ(signature("default", kIntel, kRocketLake), 0x306c3u);
  EXPECT_EQ(signature("x86-64-v3,+avx512f", kIntel, kRocketLake), 0x306c3u);
  EXPECT_EQ(signature("x86-64-v3,-movbe", kIntel, kRocketLake), 0x106a3u);
  EXPECT_EQ(signature("default,-avx", kIntel, kRocketLake), 0x106a3u);
  EXPECT_EQ(signature("x86-64-v2", kIntel, kRocketLake), 0x106a3u);
  EXPECT_EQ(signature("x86-64-v2,-popcnt", kIntel, kRocketLake), 0x6fbu);
  EXPECT_EQ(signature("default", kAmd, kZen4), kZen3);
  EXPECT_EQ(signature("default", kAmd, 0xb00f21), kZen3);
  EXPECT_EQ(signature("host", kAmd, kZen4), kZen4);
  EXPECT_EQ(signature("default", kAmd, kZen3), kZen3);
  EXPECT_EQ(signature("default", kAmd, kZen2), kZen2);
}

TEST(CpuModel, WithoutThemTheSubleavesEnd) {
  auto model = cpu_model("default,-bhi-ctrl,-mcdt_no", everything());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 7, 0).eax, 0u);
  EXPECT_EQ(at(*model, 7, 2).edx, 0u);
  auto entries = everything();
  std::erase_if(entries, [](const auto& e) { return e.function == 7 && e.index != 0; });  // an AMD host
  model = cpu_model("default", entries);
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 7, 0).eax, 0u);
  model = cpu_model("default,+bhi-ctrl", entries);
  ASSERT_FALSE(model.ok());
  EXPECT_EQ(model.error().code, EINVAL);
}

/// As a host with AVX-512 and AMX.
std::vector<kvm_cpuid_entry2> with_state() {
  auto all = everything();
  all.push_back(entry(0xd, 0, 0x602e7, 11008, 11008, 0));
  all.push_back(entry(0xd, 1, 0x1f, 11008, 0, 0));
  for (const auto& [index, size, at] : {std::array{2u, 256u, 576u}, std::array{5u, 64u, 1088u}, std::array{6u, 512u, 1152u},
                                        std::array{7u, 1024u, 1664u}, std::array{9u, 8u, 2688u}, std::array{17u, 64u, 2752u},
                                        std::array{18u, 8192u, 2816u}})
    all.push_back(entry(0xd, index, size, at, 0, 0));
  return all;
}
unsigned components(const std::vector<kvm_cpuid_entry2>& entries) {
  return static_cast<unsigned>(std::count_if(entries.begin(), entries.end(), [](const auto& e) { return e.function == 0xd && e.index >= 2; }));
}

TEST(CpuModel, StateOfWhatIsLeftOutGoesToo) {
  auto model = cpu_model("default", with_state());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 0xd, 0).eax, 7u);
  EXPECT_EQ(at(*model, 0xd, 0).ecx, 832u);
  EXPECT_EQ(components(*model), 1u);
  model = cpu_model("default,+avx512f,+avx512vl", with_state());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 0xd, 0).eax, 0xe7u);
  EXPECT_EQ(at(*model, 0xd, 0).ecx, 2688u);
  EXPECT_EQ(components(*model), 4u);
  EXPECT_EQ(at(*model, 7, 0).ebx >> 16 & 1, 1u);
  EXPECT_EQ(at(*model, 7, 0).ebx >> 30 & 1, 0u);
  model = cpu_model("host", with_state());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 0xd, 0).ecx, 11008u);
  model = cpu_model("host,-avx512f", with_state());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 0xd, 0).eax, 0x60207u);
  EXPECT_EQ(at(*model, 7, 0).ebx & 0xd0230000, 0u);  // nothing rests on what is not there
  EXPECT_EQ(at(*model, 7, 0).ecx & 0x5842, 0u);
  EXPECT_EQ(at(*model, 7, 1).eax & 0x20, 0u);
}

TEST(CpuModel, HostIsAllThereIs) {
  auto model = cpu_model("host", everything());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 7, 1).eax, ~0u);
  EXPECT_EQ(at(*model, 7, 2).edx, ~0u);
}

}  // namespace
}  // namespace ring3::vmm
