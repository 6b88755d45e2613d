#include "control/cli/networks.hpp"

#include "control/cli/text.hpp"
#include "devices/virtio/net/net.hpp"
#include "devices/virtio/vsock/vsock.hpp"

namespace ring3::control {

Result<VsockOption> parse_vsock_option(const std::string& text) {
  const auto bad = [&] { return Error::of(EINVAL, "--vsock: '" + printable(text) + "' will not do: cid=N,socket=PATH, such as cid=3,socket=vm.sock"); };
  VsockOption option;
  std::size_t at = 0;
  while (at <= text.size()) {
    const std::size_t comma = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, comma - at);
    at = comma + 1;
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos) return bad();
    const std::string key = word.substr(0, equals);
    const std::string value = word.substr(equals + 1);
    if (key == "cid") {
      auto cid = parse_count(value, "--vsock: cid", 3, 0xfffffffe);
      if (!cid) return cid.error();
      option.cid = static_cast<u32>(*cid);
    } else if (key == "socket") {
      option.socket = value;
    } else {
      return bad();
    }
  }
  if (option.cid == 0 || option.socket.empty()) return bad();
  return option;
}

Result<Networks> Networks::open(const std::vector<net::NetSpec>& specs, const std::string& vm) {
  Networks networks;
  for (const net::NetSpec& spec : specs) {
    if (spec.kind == net::NetSpec::Kind::kNone) continue;
    auto backend = net::open_backend(spec, vm, static_cast<u32>(networks.cards_.size()));
    if (!backend) return Error::of(backend.error().code, "--net: " + backend.error().message);
    networks.cards_.push_back({std::move(backend->link), std::move(backend->capture), backend->mac, backend->mtu});
  }
  return networks;
}

void Networks::add_to(vmm::MachineConfig& config) const {
  for (std::size_t i = 0; i < cards_.size(); i++) {
    virtio::Net::Config c;
    c.mac = cards_[i].mac;
    c.mtu = cards_[i].mtu;
    c.name = "net" + std::to_string(i);
    c.capture = cards_[i].capture;
    config.devices.push_back([link = cards_[i].link, c]() -> Result<std::shared_ptr<virtio::Device>> {
      return std::shared_ptr<virtio::Device>(std::make_shared<virtio::Net>(link, c));
    });
  }
}

Status add_vsock(const VsockOption& option, vmm::MachineConfig& config) {
  auto device = virtio::Vsock::create(option.cid, option.socket);
  if (!device) return device.error();
  // One object for all boots: it holds the listening socket, and nothing else outside of start() and stop().
  config.devices.push_back([shared = std::shared_ptr<virtio::Device>(std::move(*device))]() -> Result<std::shared_ptr<virtio::Device>> {
    return shared;
  });
  return Ok{};
}

}  // namespace ring3::control
