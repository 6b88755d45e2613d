#pragma once
#include <array>
#include <memory>
#include <string>

#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/event_loop.hpp"
#include "fs/share/process.hpp"

namespace ring3::virtio {

/// virtio-fs: a directory of the host, as FUSE messages in virtqueues.
///
/// Spec:      VIRTIO 1.2, 5.11. Queue 0 takes what must not wait behind other requests (FORGET), queue 1 the rest.
/// Modelled:  tag and number of request queues; no notification queue, no DAX window.
/// Flow:      a request is copied whole into a slot of the ShareProcess, the answer is copied back: the process never sees
///            guest memory. While all slots are busy, requests wait in the ring.
/// Threading: one thread for both queues; the ShareProcess is used on it only.
/// Trust:     messages are passed on unread; the answer is cut to the room that the request's descriptors have. A server that
///            has died, or breaks its protocol, ends the device (DEVICE_NEEDS_RESET), not the VM.
class Fs final : public Device {
 public:
  static constexpr std::size_t kMostTag = 36;

  /// `process` is shared with a later device in its place, after a guest's reset.
  Fs(std::string tag, std::shared_ptr<fs::ShareProcess> process) : tag_(std::move(tag)), process_(std::move(process)) {}
  ~Fs() override { stop(); }

  DeviceType type() const override { return DeviceType::kFs; }
  u64 features() const override { return 0; }
  std::vector<u16> queue_sizes() const override { return {128, 1024}; }
  void read_config(u64 offset, std::span<u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;

 private:
  struct InFlight {
    Chain chain;
    Queue* queue = nullptr;
  };
  void kicked(Queue& queue);
  bool take_all(Queue& queue);
  void answered();
  void give_up(const char* why);

  std::string tag_;
  std::shared_ptr<fs::ShareProcess> process_;
  EventLoop loop_;
  std::vector<Queue*> queues_;
  std::array<InFlight, fs::ShareProcess::kSlots> in_flight_;
  bool gone_ = false;
};

}  // namespace ring3::virtio
