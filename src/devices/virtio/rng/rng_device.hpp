#pragma once
#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

/// virtio-rng: random bytes of the host kernel.
///
/// Spec:      VIRTIO 1.2, 5.4. No features, no configuration.
/// Bound:     a request gets at most 64 KiB, which the specification allows; the driver asks again.
/// Threading: one thread.
class RngDevice final : public Device {
 public:
  ~RngDevice() override { loop_.stop(); }
  DeviceType type() const override { return DeviceType::kEntropy; }
  u64 features() const override { return 0; }
  std::vector<u16> queue_sizes() const override { return {64}; }
  void read_config(u64, std::span<u8>) override {}
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override { loop_.stop(); }

 private:
  void serve(Queue& queue);
  EventLoop loop_;
};

}  // namespace ring3::virtio
