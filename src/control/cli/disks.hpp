#pragma once
#include <memory>
#include <vector>

#include "base/result.hpp"
#include "control/cli/options.hpp"
#include "storage/block/image.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

/// The images of `ring3 run --disk`: opened (and locked) before the machine is made, closed in good order after it has ended.
///
/// Errors: one line that names the image and says what to do.
class Disks {
 public:
  static Result<Disks> open(const std::vector<DiskOption>& options);
  Disks(Disks&&) = default;
  Disks& operator=(Disks&&) = default;

  /// Adds a virtio-blk device a disk, in order: /dev/vda, /dev/vdb…
  void add_to(vmm::MachineConfig& config) const;
  /// Flushes and closes. After the machine is gone. Once.
  Status close();

 private:
  Disks() = default;
  struct Disk {
    DiskOption option;
    std::shared_ptr<storage::Image> image;
  };
  std::vector<Disk> disks_;
};

}  // namespace ring3::control
