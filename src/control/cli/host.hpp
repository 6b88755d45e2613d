#pragma once
#include <optional>
#include <string>
#include <vector>

#include "base/types.hpp"

/// What this host is and allows, as far as it matters to running VMs.
namespace ring3::control {

struct HostInfo {
  std::string kernel;                ///< uname release
  std::string cpu_model;             ///< CPUID's brand string
  int x86_64_level = 1;              ///< psABI microarchitecture level, 1 to 4
  std::vector<std::string> present;  ///< CPU features that matter, there
  std::vector<std::string> absent;   ///< and not there
  bool virtualised = false;          ///< a hypervisor is under us
  bool hardware_virtualisation = false;  ///< VT-x or AMD-V is offered
  u32 cpus = 1;                      ///< that this process may use
  u64 memory_total = 0;              ///< bytes; 0: unknown
  u64 memory_available = 0;
  u64 swap_total = 0;
  std::optional<u64> memory_limit;   ///< of our control group, when there is one
  u64 max_map_count = 0;
  int overcommit = 0;                ///< vm.overcommit_memory
  bool kvm_present = false;          ///< /dev/kvm exists
  bool seccomp_filters = false;
  bool user_namespaces = false;      ///< this user may make one
  int landlock_abi = 0;              ///< 0: none
};

HostInfo host_info();

/// Only the memory part: bytes that a guest could ever get, RAM and swap; 0 when unknown.
u64 host_memory_ceiling();

}  // namespace ring3::control
