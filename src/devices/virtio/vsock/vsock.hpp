#pragma once
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/unique_fd.hpp"
#include "base/unix_listener.hpp"
#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

/// Stream sockets between the guest and the host (VIRTIO 1.2, 5.10), which are UNIX sockets on the host, as with
/// Firecracker and Cloud Hypervisor:
///
///   in:   a program connects to PATH, writes "CONNECT PORT\n", reads "OK HOSTPORT\n", and talks to the guest's listener;
///   out:  the guest connects to CID 2, port N, and reaches who listens on PATH_N.
///
/// Modelled:  stream sockets with credits both ways, half-close. Not seqpacket (VIRTIO_VSOCK_F_SEQPACKET is not offered).
/// Bounds:    512 connections, 64 of them without their CONNECT line yet; 128 KiB kept for each; a guest that sends
///            more than its credit loses the connection. While the guest takes no replies, nothing more is read from it.
/// Threading: one thread between start() and stop(). Connections end at stop(); the listening socket stays.
/// Trust:     packets are the guest's, lines and bytes are of whoever may open the socket: its file is the owner's only.
class Vsock final : public Device {
 public:
  /// Binds `path`, taking the place of a socket that nobody listens on. Errors: EADDRINUSE, EINVAL (a cid below 3,
  /// a path that is too long) and the host's.
  static Result<std::unique_ptr<Vsock>> create(u64 guest_cid, const std::string& path);
  ~Vsock() override;

  DeviceType type() const override { return DeviceType::kVsock; }
  u64 features() const override { return 0; }
  std::vector<u16> queue_sizes() const override { return {256, 256, 64}; }
  void read_config(u64 offset, std::span<u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;

 private:
  struct Header;
  struct Connection;
  struct Key {
    u32 host, guest;  // ports
    friend auto operator<=>(const Key&, const Key&) = default;
  };
  struct Reset {
    Key key;
    u16 type;
  };

  Vsock(u64 cid, std::string path, UnixListener listener) : cid_(cid), path_(std::move(path)), listener_(std::move(listener)) {}

  void on_accept();
  void on_socket(Connection& c, u32 events);
  void on_line(Connection& c);
  void receive();
  void handle(const Header& h, const Chain& chain);
  void request(const Key& key, const Header& h);
  void data(Connection& c, const Header& h, const Chain& chain);
  void flush(Connection& c);
  void watch(Connection& c);
  void ready(Connection& c);
  void pump();
  bool send_one(Connection& c, Chain& chain, bool* used);
  bool put(Chain& chain, const Key& key, u16 type, u16 op, u32 flags, u32 length, const Connection* c);
  void reset(const Key& key, u16 type);
  void close(Connection& c, bool tell_guest);

  const u64 cid_;
  const std::string path_;
  UnixListener listener_;

  // The rest is the loop's thread's, between start() and stop().
  EventLoop loop_;
  Queue* rx_ = nullptr;
  Queue* tx_ = nullptr;
  std::map<Key, std::shared_ptr<Connection>> open_;
  std::vector<std::shared_ptr<Connection>> lines_;  // without their CONNECT yet
  std::deque<std::weak_ptr<Connection>> ready_;
  std::deque<Reset> resets_;
  u32 next_port_ = u32{1} << 30;
  bool held_up_ = false;                            // tx_ waits for room in resets_
};

}  // namespace ring3::virtio
