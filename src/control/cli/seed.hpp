#pragma once
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

/// What a cloud image is told at its first boot: --cloud-init and --ssh-key.
struct SeedOptions {
  std::string user_data, meta_data, network_config;  ///< files; empty: none
  std::vector<std::string> ssh_keys;                 ///< files with public keys, one a line
  bool any() const { return !user_data.empty() || !ssh_keys.empty(); }
};

/// "user-data[,meta-data[,network-config]]"; a comma in a name is written twice. Error: EINVAL.
Status parse_cloud_init(const std::string& text, SeedOptions& seed);

/// A NoCloud seed: a CD image labelled "cidata" (cloud-init's documentation, datasource NoCloud). Without a meta-data file it says
/// the VM's name and an instance id made from the rest, so that what changed is applied, and what did not is not.
/// Errors: a file cannot be read; a key is none; user-data that cloud-init would ignore.
Result<std::vector<u8>> make_seed(const SeedOptions& options, const std::string& name);

/// Adds it as a read-only disk, after the others.
void add_seed(std::vector<u8> image, vmm::MachineConfig& config);

}  // namespace ring3::control
