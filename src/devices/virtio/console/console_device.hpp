#pragma once
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

/// virtio-console: terminals (hvc0…) and named byte channels (/dev/vport0p1…).
///
/// Spec:      VIRTIO 1.2, 5.3: VIRTIO_CONSOLE_F_SIZE, F_MULTIPORT, F_EMERG_WRITE.
/// Threading: one thread serves all queues and calls the ports' `output`; receive(), room() and resize() on any thread.
/// Bound:     kMostWaiting bytes of input a port wait for the guest; room() says how many more are taken.
/// Trust:     what the guest writes are bytes, control messages are checked; output() may hold the device back, and
///            with it only this device.
class ConsoleDevice final : public Device {
 public:
  struct Port {
    std::string name;       ///< of a channel: /dev/virtio-ports/NAME; empty for none
    bool console = false;   ///< a terminal rather than a channel
    std::function<void(std::span<const u8>)> output;  ///< takes all; may wait, which holds the device back
    /// Instead of `output`: takes what it can and says how much. output_room() is to be called when it can take more.
    std::function<std::size_t(std::span<const u8>)> try_output;
    std::function<void()> has_room;              ///< room() grew after it was short; may be null
    std::function<void(bool open)> opened;       ///< the guest opened or closed the channel (a reset closes it); may be null
    bool open = true;                            ///< somebody is at the host's end; see set_open()
  };
  struct Config {
    std::vector<Port> ports;  ///< 1 to 16; the first is hvc0 when it is a console
    u16 columns = 0, rows = 0;
  };
  static constexpr std::size_t kMostWaiting = 64 << 10;

  explicit ConsoleDevice(Config config);
  ~ConsoleDevice() override { loop_.stop(); }

  DeviceType type() const override { return DeviceType::kConsole; }
  u64 features() const override;
  std::vector<u16> queue_sizes() const override;
  void read_config(u64 offset, std::span<u8> data) override;
  void write_config(u64 offset, std::span<const u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;

  std::size_t room(std::size_t port) const;
  /// Input for the guest: what room() allows is kept, the rest dropped.
  void receive(std::size_t port, std::span<const u8> bytes);
  void resize(u16 columns, u16 rows);
  /// try_output() of that port can take more. Any thread.
  void output_room(std::size_t port);
  /// Somebody has come to the host's end of a channel, or has gone: the guest's readers see the end, its writers wait. Any thread.
  void set_open(std::size_t port, bool open);
  /// A driver has the device. Threading: any.
  bool started() const {
    const std::lock_guard lock(mutex_);
    return running_;
  }

 private:
  struct Control {
    u32 id;
    u16 event, value;
  };
  /// What try_output() has not taken yet.
  struct Held {
    Chain chain;
    u64 done = 0;
    bool any = false;
  };
  static std::size_t receive_queue(std::size_t port) { return port == 0 ? 0 : 2 * port + 2; }
  void serve_output(std::size_t port);
  bool pass_output(std::size_t port, Held& held);
  void tell_open(std::size_t port);
  void serve_input(std::size_t port);
  void serve_control();
  void handle(const Control& message);
  void send(const Control& message, std::span<const u8> extra = {});
  void send_size(u32 port);
  void flush_control();

  Config config_;
  mutable std::mutex mutex_;
  std::vector<std::deque<u8>> waiting_;  // guarded by mutex_, by port
  std::vector<bool> was_short_;          // guarded by mutex_
  std::vector<bool> open_;               // guarded by mutex_, by port
  u16 columns_, rows_;                   // guarded by mutex_
  // On the loop's thread, and in start() and stop().
  std::vector<Queue*> queues_;
  bool multiport_ = false;
  std::vector<Held> held_;               // by port
  std::vector<bool> guest_open_;         // by port
  std::vector<bool> told_open_;          // what the guest knows of open_
  std::vector<bool> ready_;              // the driver has set the port up
  std::deque<std::vector<u8>> control_;  // for the driver
  EventLoop loop_;
  bool running_ = false;                 // guarded by mutex_: the loop takes tasks
};

}  // namespace ring3::virtio
