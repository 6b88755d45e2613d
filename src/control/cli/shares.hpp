#pragma once
#include <memory>
#include <vector>

#include "base/result.hpp"
#include "control/cli/share_option.hpp"
#include "fs/share/process.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

/// The directories of `ring3 run --share`, each with its process.
///
/// start() forks, so it comes before any thread. Errors: one line that names the directory.
class Shares {
 public:
  static Result<Shares> start(const std::vector<ShareOption>& options);
  /// Adds a virtio-fs device for each, in order.
  void add_to(vmm::MachineConfig& config) const;

 private:
  struct Share {
    std::string tag;
    std::shared_ptr<fs::ShareProcess> process;
  };
  std::vector<Share> shares_;
};

}  // namespace ring3::control
