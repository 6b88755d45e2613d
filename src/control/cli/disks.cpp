#include "control/cli/disks.hpp"

#include <algorithm>

#include "control/cli/text.hpp"
#include "devices/virtio/blk/block_device.hpp"
#include "storage/image/open.hpp"

namespace ring3::control {

Result<Disks> Disks::open(const std::vector<DiskOption>& options) {
  Disks disks;
  for (const DiskOption& o : options) {
    storage::OpenOptions how;
    how.writable = !o.read_only;
    how.direct = o.direct;
    if (!o.format.empty()) how.format = o.format == "qcow2" ? storage::Format::kQcow2 : storage::Format::kRaw;
    if (o.fail_every != 0) {
      how.faults = std::make_shared<storage::Faults>();
      how.faults->every = o.fail_every;
      how.faults->code = o.fail_code;
    }
    auto image = storage::open_image(o.path, how);
    if (!image) {
      const int code = image.error().code;
      std::string message = "--disk: " + image.error().message;
      if (how.writable && (code == EACCES || code == EROFS || code == EPERM)) message += "; to use it as it is: --disk " + printable(o.path) + ",ro";
      return Error::of(code, std::move(message));
    }
    if ((*image)->size() < 512) return Error::of(EINVAL, "--disk: '" + printable(o.path) + "' is empty; make one with: ring3 image create");
    disks.disks_.push_back({o, std::shared_ptr<storage::Image>(std::move(*image))});
  }
  return disks;
}

void Disks::add_to(vmm::MachineConfig& config) const {
  for (std::size_t i = 0; i < disks_.size(); i++) {
    virtio::BlockDevice::Config c;
    c.image = disks_[i].image;
    c.name = "--disk " + printable(disks_[i].option.path);
    c.serial = disks_[i].option.serial.empty() ? "ring3-disk" + std::to_string(i) : disks_[i].option.serial;
    c.queues = static_cast<u16>(std::min<u32>(config.cpus, 8));
    c.read_only = disks_[i].option.read_only;
    c.direct = disks_[i].option.direct;
    config.devices.push_back([c]() -> Result<std::shared_ptr<virtio::Device>> {
      return std::shared_ptr<virtio::Device>(std::make_shared<virtio::BlockDevice>(c));
    });
  }
}

Status Disks::close() {
  Status result = Ok{};
  for (Disk& d : disks_) {
    if (!d.image) continue;
    const int r = d.image->writable() ? d.image->close() : 0;
    if (r < 0 && result) result = Error::from_errno("closing '" + printable(d.option.path) + "'", -r);
    d.image.reset();
  }
  return result;
}

}  // namespace ring3::control
