#pragma once
#include <vector>

#include "base/types.hpp"

/// Which MSRs a VMM is told about.
///
/// Spec: virt/kvm/api KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_X86_GET_MCE_CAP_SUPPORTED.
namespace ring3::engine::abi {

/// MSRs to save and restore: each is readable and takes back what was read. Fewer than 256.
std::vector<u32> msr_index_list();
/// MSRs that describe features.
std::vector<u32> msr_feature_list();
/// The value of a feature MSR as offered; false when it is none.
bool feature_msr(u32 index, u64* value);
/// MCG_CAP bits offered, and the number of banks.
u64 mce_cap_supported();

}  // namespace ring3::engine::abi
