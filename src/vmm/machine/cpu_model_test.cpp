#include "vmm/machine/cpu_model.hpp"

#include <gtest/gtest.h>

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

TEST(CpuModel, HostIsAllThereIs) {
  auto model = cpu_model("host", everything());
  ASSERT_TRUE(model.ok());
  EXPECT_EQ(at(*model, 7, 1).eax, ~0u);
  EXPECT_EQ(at(*model, 7, 2).edx, ~0u);
}

}  // namespace
}  // namespace ring3::vmm
