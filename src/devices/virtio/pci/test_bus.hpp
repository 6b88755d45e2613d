#pragma once
#include <unistd.h>

#include <map>
#include <mutex>

#include "devices/bus/bus.hpp"
#include "devices/pci/host.hpp"
#include "devices/virtio/core/test_driver.hpp"
#include "devices/virtio/pci/virtio_pci.hpp"

/// A machine that is only a PCI bus, and a driver's way to a virtio device on it: for tests and fuzzers.
namespace ring3::virtio::test {

class TestBus {
 public:
  TestBus() {
    pci::Services s;
    s.send_msi = [this](const pci::MsiMessage& m) {
      const std::lock_guard lock(mutex_);
      messages_[m.data]++;
    };
    s.set_line = [this](u32 gsi, bool level) {
      const std::lock_guard lock(mutex_);
      lines_[gsi] = level;
    };
    s.ioeventfd = [this](bool assign, Gpa at, int fd) {
      if (assign) {
        ioeventfds[at.value] = fd;
      } else {
        ioeventfds.erase(at.value);
      }
      return true;
    };
    host_ = std::make_shared<pci::Host>(std::move(s));
    const bool attached = host_->attach(ports, memory).ok();
    CHECK(attached);
  }
  Guest guest;
  devices::Bus ports{0x10000}, memory;
  std::map<u64, int> ioeventfds;

  /// Puts the device at the next number.
  bool add(std::shared_ptr<Device> device) {
    auto f = VirtioPci::create(std::move(device), guest.memory());
    return f.ok() && host_->add(std::move(*f)).ok();
  }
  int messages(u32 data) {
    const std::lock_guard lock(mutex_);
    return messages_[data];
  }
  bool line(u32 gsi) {
    const std::lock_guard lock(mutex_);
    return lines_[gsi];
  }

  template <class T>
  T read(u64 at) {
    u8 b[sizeof(T)];
    memory.read(at, b);
    return static_cast<T>(devices::load_le(b));
  }
  template <class T>
  void write(u64 at, T v) {
    u8 b[sizeof(T)];
    devices::store_le(b, v);
    memory.write(at, b);
  }
  static u64 config(u32 device, u32 offset) { return 0xe0000000 + (u64{device} << 15) + offset; }
  u64 bar(u32 device) { return read<u64>(config(device, 0x10)) & ~u64{15}; }

  /// As a driver starts: reset, features, queues at 0x1000 + 0x6000 each, MSI-X vector n with data 100 + n (0: config).
  bool start(u32 device, u64 features, u16 queues, u16 size, bool msix = true) {
    const u64 b = bar(device);
    write<u8>(b + 0x14, 0);
    write<u8>(b + 0x14, 3);
    for (u32 half = 0; half < 2; half++) {
      write<u32>(b + 8, half);
      write<u32>(b + 12, static_cast<u32>(features >> (32 * half)));
    }
    write<u8>(b + 0x14, 11);
    if ((read<u8>(b + 0x14) & 8) == 0) return false;
    if (msix) {
      write<u16>(config(device, 0x42), 0x8000);
      for (u64 v = 0; v <= queues; v++) {
        write<u64>(b + VirtioPci::kMsixTable + 16 * v, 0xfee00000);
        write<u32>(b + VirtioPci::kMsixTable + 16 * v + 8, static_cast<u32>(100 + v));
        write<u32>(b + VirtioPci::kMsixTable + 16 * v + 12, 0);
      }
      write<u16>(b + 0x10, 0);
    }
    drivers.clear();
    for (u16 q = 0; q < queues; q++) {
      const auto s = Driver::layout(size, (features & feature::kPacked) != 0, (features & feature::kEventIndex) != 0, 0x1000 + 0x6000 * u64{q});
      drivers.push_back(std::make_unique<Driver>(guest, s));
      write<u16>(b + 0x16, q);
      write<u16>(b + 0x18, size);
      if (msix) write<u16>(b + 0x1a, static_cast<u16>(q + 1));
      write<u64>(b + 0x20, s.descriptors.value);
      write<u64>(b + 0x28, s.driver.value);
      write<u32>(b + 0x30, static_cast<u32>(s.device.value));
      write<u32>(b + 0x34, 0);
      write<u16>(b + 0x1c, 1);
    }
    write<u8>(b + 0x14, 15);
    return (read<u8>(b + 0x14) & 0x44) == 4;
  }
  void kick(u32 device, u16 queue) { write<u16>(bar(device) + VirtioPci::kNotify + 4 * u64{queue}, queue); }
  u8 status(u32 device) { return read<u8>(bar(device) + 0x14); }

  /// Waits for the device's thread to hand a request back.
  std::optional<Done> wait(u16 queue) {
    for (int i = 0; i < 10000; i++) {
      if (const auto done = drivers[queue]->take()) return done;
      usleep(500);
    }
    return std::nullopt;
  }
  std::vector<std::unique_ptr<Driver>> drivers;

 private:
  std::mutex mutex_;
  std::map<u32, int> messages_;
  std::map<u32, bool> lines_;
  std::shared_ptr<pci::Host> host_;
};

}  // namespace ring3::virtio::test
