#pragma once
#include <span>
#include <string>

#include "control/vms/registry.hpp"

/// What `ring3 ps` shows. Pure; what VMs say of themselves is shown without control characters.
namespace ring3::control {

/// "running", "killed", "ended (STATUS)".
std::string state_of(const vms::VmInfo& vm);
/// A line for the headings, one a VM. now: seconds since the epoch.
std::string vm_table(std::span<const vms::VmInfo> vms, u64 now);
/// A JSON array and a line's end; always valid.
std::string vm_json(std::span<const vms::VmInfo> vms);

}  // namespace ring3::control
