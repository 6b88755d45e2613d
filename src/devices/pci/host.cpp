#include "devices/pci/host.hpp"

#include <algorithm>

namespace ring3::pci {

using devices::load_le;
using devices::store_le;

class Host::Ecam : public devices::Device {
 public:
  explicit Ecam(Host& host) : host_(host) {}
  void read(u64 offset, std::span<u8> data) override {
    host_.read_config(static_cast<u32>(offset >> 15 & 31), static_cast<u32>(offset >> 12 & 7), static_cast<u32>(offset & 0xfff), data);
  }
  void write(u64 offset, std::span<const u8> data) override {
    host_.write_config(static_cast<u32>(offset >> 15 & 31), static_cast<u32>(offset >> 12 & 7), static_cast<u32>(offset & 0xfff), data);
  }

 private:
  Host& host_;
};

// 0xcf8: only a write of all four bytes sets it; its neighbour 0xcf9 is another device.
class Host::ConfigAddress : public devices::Device {
 public:
  explicit ConfigAddress(Host& host) : host_(host) {}
  void read(u64, std::span<u8> data) override {
    const std::lock_guard lock(host_.config_mutex_);
    if (data.size() == 4) store_le(data, host_.config_address_);
  }
  void write(u64, std::span<const u8> data) override {
    const std::lock_guard lock(host_.config_mutex_);
    if (data.size() == 4) host_.config_address_ = static_cast<u32>(load_le(data)) & 0x80fffffc;
  }

 private:
  Host& host_;
};

class Host::ConfigData : public devices::Device {
 public:
  explicit ConfigData(Host& host) : host_(host) {}
  void read(u64 offset, std::span<u8> data) override {
    u32 device, function, at;
    if (target(offset, device, function, at)) host_.read_config(device, function, at, data);
  }
  void write(u64 offset, std::span<const u8> data) override {
    u32 device, function, at;
    if (target(offset, device, function, at)) host_.write_config(device, function, at, data);
  }

 private:
  bool target(u64 offset, u32& device, u32& function, u32& at) {
    const std::lock_guard lock(host_.config_mutex_);
    const u32 a = host_.config_address_;
    if ((a >> 31) == 0 || (a >> 16 & 0xff) != 0) return false;
    device = a >> 11 & 31, function = a >> 8 & 7, at = (a & 0xfc) + static_cast<u32>(offset & 3);
    return true;
  }
  Host& host_;
};

class Host::Window : public devices::Device {
 public:
  explicit Window(Host& host) : host_(host) {}
  void read(u64 offset, std::span<u8> data) override {
    const u64 address = host_.layout_.window + offset;
    Route r;
    if (host_.find(address, r)) r.function->read_bar(r.bar, address - r.start, data);
  }
  void write(u64 offset, std::span<const u8> data) override {
    const u64 address = host_.layout_.window + offset;
    Route r;
    if (host_.find(address, r)) r.function->write_bar(r.bar, address - r.start, data);
  }

 private:
  Host& host_;
};

Host::Host(Services services, Layout layout) : services_(std::move(services)), layout_(layout), next_bar_(layout.window) {
  // The bridge itself: a function without registers. The ids are those that drivers know as a generic PCIe host.
  functions_[next_device_++] = std::make_shared<Function>(Function::Identity{0x1b36, 0x0008, 0, 0x060000, 0x1af4, 0x1100});
}

Host::~Host() = default;

Status Host::add(std::shared_ptr<Function> function) {
  if (next_device_ >= functions_.size()) return Error::of(ENOSPC, "the PCI bus is full: 31 devices are the most");
  const u32 device = next_device_;
  for (const Function::Bar& bar : function->bar_list()) {
    const u64 at = (next_bar_ + bar.size - 1) & ~(bar.size - 1);
    if (at + bar.size > layout_.window + layout_.window_size) return Error::of(ENOSPC, "the PCI window is full");
    function->place_bar(bar.index, at);
    next_bar_ = at + bar.size;
  }
  function->connect(&services_, [this, device](bool level) { set_intx(device, level); });
  functions_[device] = std::move(function);
  next_device_++;
  rebuild_routes();
  return Ok{};
}

Status Host::attach(devices::Bus& ports, devices::Bus& memory) {
  if (auto r = ports.add(0xcf8, 1, std::make_shared<ConfigAddress>(*this), "pci config address"); !r) return r;
  if (auto r = ports.add(0xcfc, 4, std::make_shared<ConfigData>(*this), "pci config data"); !r) return r;
  if (auto r = memory.add(layout_.ecam, kEcamSize, std::make_shared<Ecam>(*this), "pci ecam"); !r) return r;
  return memory.add(layout_.window, layout_.window_size, std::make_shared<Window>(*this), "pci window");
}

// Functions other than 0, and devices that are not there, read as all ones (the bus presets them).
void Host::read_config(u32 device, u32 function, u32 offset, std::span<u8> data) {
  const std::lock_guard lock(config_mutex_);
  if (function != 0 || !functions_[device]) return;
  data = data.first(std::min<std::size_t>(data.size(), Function::kConfigSize - offset));
  functions_[device]->read_config(offset, data);
}

void Host::write_config(u32 device, u32 function, u32 offset, std::span<const u8> data) {
  const std::lock_guard lock(config_mutex_);
  if (function != 0 || !functions_[device]) return;
  data = data.first(std::min<std::size_t>(data.size(), Function::kConfigSize - offset));
  functions_[device]->write_config(offset, data);
  if (offset < 0x28) rebuild_routes();
}

// Under config_mutex_, or before the guest runs. Where BARs overlap, the lower device answers.
void Host::rebuild_routes() {
  std::vector<Route> routes;
  const u64 end = layout_.window + layout_.window_size;
  for (const auto& f : functions_) {
    if (!f) continue;
    for (const Function::Bar& b : f->bars()) {
      if (!b.decoded || b.address < layout_.window || b.address >= end || b.size > end - b.address) continue;
      routes.push_back({b.address, b.address + b.size - 1, f, b.index});
    }
  }
  const std::unique_lock lock(routes_mutex_);
  routes_.swap(routes);
}

bool Host::find(u64 address, Route& route) const {
  const std::shared_lock lock(routes_mutex_);
  for (const Route& r : routes_) {
    if (address < r.start || address > r.last) continue;
    route = r;
    return true;
  }
  return false;
}

void Host::set_intx(u32 device, bool level) {
  const std::lock_guard lock(lines_mutex_);
  const u32 line = device % layout_.lines;
  const bool before = raised_[line] != 0;
  raised_[line] = level ? raised_[line] | 1u << device : raised_[line] & ~(1u << device);
  const bool now = raised_[line] != 0;
  if (now != before && services_.set_line) services_.set_line(layout_.first_line + line, now);
}

}  // namespace ring3::pci
