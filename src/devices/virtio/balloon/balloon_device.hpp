#pragma once
#include <atomic>
#include <map>
#include <mutex>
#include <optional>

#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

/// virtio-balloon: gives memory that the guest does not use back to the host.
///
/// Spec:      VIRTIO 1.2, 5.5: inflate, deflate, VIRTIO_BALLOON_F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING.
/// Deviation: queues are numbered in the order of those that were negotiated, as Linux does, not with gaps.
/// Memory:    pages are dropped with MADV_REMOVE: they read as zeroes when the guest takes them back. Only whole pages
///            of RAM that the guest named, never more.
/// Threading: one thread; set_target(), actual(), stats() and ask_for_stats() on any thread.
class BalloonDevice final : public Device {
 public:
  /// Of what the driver tells (5.5.6.3); a value that it did not tell is missing. Bytes, or counts.
  struct Stats {
    std::optional<u64> swap_in, swap_out, major_faults, minor_faults, free, total, available, disk_caches;
  };
  ~BalloonDevice() override { loop_.stop(); }

  DeviceType type() const override { return DeviceType::kBalloon; }
  u64 features() const override;
  std::vector<u16> queue_sizes() const override { return {128, 128, 16, 64}; }
  void read_config(u64 offset, std::span<u8> data) override;
  void write_config(u64 offset, std::span<const u8> data) override;
  void start(u64 features, std::span<Queue* const> queues) override;
  void stop() override;

  /// How much the guest is asked to give up, in bytes.
  void set_target(u64 bytes);
  /// How much it has given up.
  u64 actual() const { return u64{actual_.load()} * kPageSize; }
  /// Bytes that free page reporting gave back, over all times (a page may come again).
  u64 reported() const { return reported_.load(); }
  /// The guest answers soon; stats() then has it.
  void ask_for_stats();
  Stats stats() const;

 private:
  void serve_pages(Queue& queue, bool inflate);
  void serve_stats();
  void serve_reports();

  std::atomic<u32> target_{0}, actual_{0};
  std::atomic<u64> reported_{0};
  mutable std::mutex mutex_;
  Stats stats_;             // guarded by mutex_
  bool running_ = false;    // guarded by mutex_
  Queue* stats_queue_ = nullptr;
  Queue* report_queue_ = nullptr;
  std::optional<Chain> stats_buffer_;  // the loop's thread: what the driver lent until it is asked again
  bool stats_wanted_ = false;          // the loop's thread
  EventLoop loop_;
};

}  // namespace ring3::virtio
