#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "devices/virtio/core/device.hpp"
#include "storage/block/image.hpp"

namespace ring3::virtio {

/// virtio-blk over a disk image.
///
/// Spec:      VIRTIO 1.2, 5.2. Offered: several queues, flush, discard, write zeroes, serial number, read-only.
/// Promise:   a flush that was answered with success covers every write that was answered before it was sent. A driver
///            that does not negotiate flush has each write flushed before it is answered.
/// Errors:    what the host refuses is VIRTIO_BLK_S_IOERR for that request; the guest and the other requests go on. A
///            request without a header or a status byte breaks the device.
/// Threading: one thread a queue; the image serves several at once. A small read of what the host has in its page cache, by a driver
///            that sends one request at a time, is served on the thread of the vCPU that kicked: no other is woken for it. Such
///            accesses that bypass the page cache are sent to the host there.
/// Ownership: shares the image, which outlives a reset of the machine; whoever made it closes it.
/// Trust:     requests come from the guest: ranges are checked here and by the image, data is never looked at.
class BlockDevice final : public Device {
 public:
  struct Config {
    std::shared_ptr<storage::Image> image;
    std::string name;       ///< in messages
    std::string serial;     ///< at most 20 bytes are shown
    u16 queues = 1;
    bool read_only = false; ///< also when the image cannot be written
    bool io_uring = true;   ///< use it where the host has it
    bool direct = false;    ///< the image's file bypasses the page cache: writes gain from io_uring too
  };
  explicit BlockDevice(Config config);
  ~BlockDevice() override;

  DeviceType type() const override { return DeviceType::kBlock; }
  u64 features() const override;
  std::vector<u16> queue_sizes() const override;
  void read_config(u64 offset, std::span<u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;
  bool takes_kicks() const override { return true; }
  bool kicked(u16 index) override;
  bool looks() const override { return true; }
  void look(bool more) override;
  bool can_reset_queues() const override { return true; }
  void start_queue(u16 index, Queue& queue) override;
  void stop_queue(u16 index) override;

  static constexpr u64 kSizeMax = 1, kSegMax = 2, kReadOnly = 5, kBlockSize = 6, kFlush = 9, kTopology = 10, kMultiQueue = 12,
                       kDiscard = 13, kWriteZeroes = 14;
  static constexpr u16 kQueueSize = 256;
  static constexpr u32 kMostSegments = 254;       ///< data buffers of a request
  static constexpr u32 kMostRanges = 64;          ///< of a discard
  static constexpr u32 kMostRangeSectors = 1u << 22;  ///< 2 GiB a range

 private:
  class Worker;
  /// Tells the user, once, that the host refuses something.
  void refused(int error);
  Config config_;
  std::atomic<bool> told_{false}, told_full_{false};
  u64 negotiated_ = 0;
  std::mutex workers_mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;  ///< guarded by workers_mutex_
  std::atomic<bool> sent_{false};   ///< by kicked(), and may be under way
  std::atomic<bool> quiet_{false};  ///< a worker may be that look() has told not to wait for its ring; set with workers_mutex_
};

}  // namespace ring3::virtio
