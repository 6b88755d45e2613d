#include "control/cli/shares.hpp"

#include <algorithm>

#include "control/cli/text.hpp"
#include "devices/virtio/fs/fs.hpp"

namespace ring3::control {

Result<Shares> Shares::start(const std::vector<ShareOption>& options) {
  Shares shares;
  for (const ShareOption& o : options) {
    std::string tag = o.tag;
    if (tag.empty()) tag = shares.shares_.empty() ? "share" : "share" + std::to_string(shares.shares_.size());
    if (std::any_of(shares.shares_.begin(), shares.shares_.end(), [&](const Share& s) { return s.tag == tag; })) {
      return Error::of(EINVAL, "--share: two directories have the tag " + tag + "; give one of them another: DIR:TAG");
    }
    auto process = fs::ShareProcess::start({o.directory, o.read_only, o.own_id, o.cache_ms});
    if (!process) return Error::of(process.error().code, "--share: " + process.error().message);
    shares.shares_.push_back({tag, std::shared_ptr<fs::ShareProcess>(std::move(*process))});
  }
  return shares;
}

void Shares::add_to(vmm::MachineConfig& config) const {
  for (const Share& share : shares_) {
    config.devices.push_back([share]() -> Result<std::shared_ptr<virtio::Device>> {
      return std::shared_ptr<virtio::Device>(std::make_shared<virtio::Fs>(share.tag, share.process));
    });
  }
}

}  // namespace ring3::control
