#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "devices/virtio/core/device.hpp"
#include "net/capture/pcap.hpp"
#include "net/link/link.hpp"
#include "net/packet/address.hpp"

namespace ring3::virtio {

/// A network card (VIRTIO 1.2, 5.1) before a net::Link.
///
/// Modelled:  as many queue pairs as the link has queues; checksum and segmentation offloads both ways, mergeable
///            receive buffers, link status, MTU, and a control queue: receive modes, MAC address, queue pairs, guest
///            offloads.
/// Deviation: receive filters are accepted and deliver more than they ask for; the driver's stack drops the rest.
/// Threading: a thread a queue pair, between start() and stop(); the first serves the control queue too.
/// Loss:      none on the card. What the link does not take waits in the transmit queue, what the guest has no buffers
///            for waits in the link. A frame that fits no buffer the driver offers is dropped.
/// Trust:     headers and control messages are copied once and checked; a frame with an impossible header is dropped,
///            never passed on. Frame bytes are not looked at.
/// The end:   when the link is gone, the status says that it is down and frames are dropped.
class Net final : public Device {
 public:
  struct Config {
    net::Mac mac;
    u16 mtu = 1500;
    std::string name = "net";                        ///< of its threads
    std::shared_ptr<net::PcapWriter> capture;        ///< or null
  };
  /// The link may be shared by cards that follow one another: one of them at a time is started.
  Net(std::shared_ptr<net::Link> link, Config config);
  ~Net() override;

  DeviceType type() const override { return DeviceType::kNet; }
  u64 features() const override;
  std::vector<u16> queue_sizes() const override;
  void read_config(u64 offset, std::span<u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;

  struct Counters {
    std::atomic<u64> received{0}, sent{0}, receive_dropped{0}, send_dropped{0};
  };
  const Counters& counters() const { return counters_; }

 private:
  class Pair;
  void control(Queue& queue);
  u8 command(u8 kind, u8 code, std::span<const u8> data);
  void apply_offloads(u64 bits);
  void link_down();

  std::shared_ptr<net::Link> link_;
  Config config_;
  u64 features_ = 0;                    // negotiated; between start() and stop()
  std::vector<std::unique_ptr<Pair>> pairs_;
  std::mutex mutex_;                    // guards mac_
  net::Mac mac_;
  std::atomic<bool> up_{true};
  Counters counters_;
};

/// Feature bits (5.1.3).
namespace net_feature {
inline constexpr u64 kChecksum = u64{1} << 0, kGuestChecksum = u64{1} << 1, kGuestOffloads = u64{1} << 2, kMtu = u64{1} << 3,
                     kMac = u64{1} << 5, kGuestTso4 = u64{1} << 7, kGuestTso6 = u64{1} << 8, kGuestEcn = u64{1} << 9,
                     kHostTso4 = u64{1} << 11, kHostTso6 = u64{1} << 12, kHostEcn = u64{1} << 13, kMergeable = u64{1} << 15,
                     kStatus = u64{1} << 16, kControl = u64{1} << 17, kControlRx = u64{1} << 18, kMultiqueue = u64{1} << 22,
                     kControlMac = u64{1} << 23, kHostUso = u64{1} << 56;
}

}  // namespace ring3::virtio
