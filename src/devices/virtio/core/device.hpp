#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/types.hpp"
#include "devices/virtio/core/queue.hpp"

/// What every virtio device is made of, whatever carries it to the guest.
///
/// Spec: Virtual I/O Device (VIRTIO) 1.2; section numbers stand at what they explain.
namespace ring3::virtio {

/// Device ids (chapter 5). The PCI device id is 0x1040 plus it.
enum class DeviceType : u16 {
  kNet = 1, kBlock = 2, kConsole = 3, kEntropy = 4, kBalloon = 5, kVsock = 19, kFs = 26,
};

/// Feature bits that belong to the transport and the rings (chapter 6). A device does not list them: they are offered
/// for every device, and the Queue honours what was negotiated.
namespace feature {
inline constexpr u64 kIndirect = u64{1} << 28, kEventIndex = u64{1} << 29, kVersion1 = u64{1} << 32,
                     kPacked = u64{1} << 34, kRingReset = u64{1} << 40;
}

/// What a device may ask of its transport. Any thread; takes none of the device's locks and waits for nothing.
class Transport {
 public:
  virtual ~Transport() = default;
  /// Something in the configuration space changed by itself: raises config_generation and interrupts the driver.
  virtual void config_changed() = 0;
  /// The driver broke the rules: DEVICE_NEEDS_RESET. Queues stop yielding chains until the driver resets the device.
  /// A Queue that finds an error calls this by itself.
  virtual void needs_reset(const std::string& why) = 0;
};

/// A virtio device without its transport.
///
/// Life:      attach() once; then any number of start() … stop(). Between them the device owns threads and uses the
///            queues it was given; outside it touches neither queues nor guest memory.
/// Threading: attach, start, stop, start_queue, stop_queue and the config accesses come from vCPU threads, one at a
///            time. config_changed() and needs_reset() may be called from the device's threads at any moment.
/// Trust:     everything read from queues and written to the configuration space comes from the guest.
class Device {
 public:
  virtual ~Device() = default;

  virtual DeviceType type() const = 0;
  /// The device's own feature bits (0 to 23, 50 up). Constant.
  virtual u64 features() const = 0;
  /// The largest size of each queue: powers of two, at most 1024; the number of queues. Constant.
  virtual std::vector<u16> queue_sizes() const = 0;

  /// The device's configuration space. data comes zeroed; what lies past the end stays as it is. 1 to 8 bytes.
  virtual void read_config(u64 offset, std::span<u8> data) = 0;
  virtual void write_config(u64 offset, std::span<const u8> data) { (void)offset, (void)data; }

  /// The transport outlives the device's last stop().
  virtual void attach(Transport& transport) { transport_ = &transport; }

  /// DRIVER_OK. `features`: what was negotiated. One entry a queue; null: the driver did not enable it. Queues stay
  /// valid until stop() (or stop_queue()) returns. Each kick fd is signalled once right after start(), so that what
  /// was put into the rings before is seen.
  virtual void start(u64 features, std::span<Queue* const> queues) = 0;
  /// Reset. Returns when no thread of the device uses a queue or guest memory any more, that is after I/O in
  /// flight has ended. What was popped and not completed is forgotten.
  virtual void stop() = 0;

  /// True: kicks reach the device by kicked() instead of the kick fds, while that returns true.
  virtual bool takes_kicks() const { return false; }
  /// The driver's kick, on the thread of the vCPU that made it, which goes on when this returns: some hundred microseconds at
  /// most. At any time, beside start() and stop() too; several at once. False: not started; the kick fd is signalled instead.
  virtual bool kicked(u16 index) { return (void)index, false; }

  /// True: look() is wanted.
  virtual bool looks() const { return false; }
  /// On the thread of a vCPU that has nothing to do, again and again while `more`, then once without: answers what has ended. At any time,
  /// beside start() and stop() too; several at once.
  virtual void look(bool more) { (void)more; }

  /// VIRTIO_F_RING_RESET is offered when this is true. stop_queue() is stop() for one queue.
  virtual bool can_reset_queues() const { return false; }
  virtual void stop_queue(u16 index) { (void)index; }
  virtual void start_queue(u16 index, Queue& queue) { (void)index, (void)queue; }

 protected:
  Transport* transport_ = nullptr;
};

/// Bytes [offset, offset + data.size()) of a configuration structure; what lies past its end stays as it is.
template <class Config>
void read_config_struct(const Config& config, u64 offset, std::span<u8> data) {
  for (std::size_t i = 0; i < data.size(); i++) {
    if (offset < sizeof config && i < sizeof config - offset) {
      data[i] = reinterpret_cast<const u8*>(&config)[offset + i];
    }
  }
}

}  // namespace ring3::virtio
