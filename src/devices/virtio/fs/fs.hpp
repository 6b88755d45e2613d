#pragma once
#include <array>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>

#include "base/unique_fd.hpp"
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
/// Waiting:   a guest that asks a file system mostly waits for the answer. The vCPU's thread takes its request from the ring
///            itself, has the process's near thread serve it, and finds the answer and its interrupt when it goes on: no other
///            thread is woken. Large requests, those that find the near thread busy, and for a while all after
///            one that took long, go to the process's other threads, and their answers come back on the device's own.
/// Deferred:  requests whose answer is known (fs/fuse/deferred.hpp) are handed back at once, and served with the next one or
///            kDeferral later. The driver waits for no FORGET: it is told of them some at a time.
/// Threading: the device's thread and any vCPU's; mutex_ guards queues and process, and is not held in a wait.
/// Trust:     messages are passed on unread, but for what deferred_answer() looks at; the answer is cut to the room that the request's descriptors have. A server that
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
  bool takes_kicks() const override { return true; }
  bool kicked(u16 index) override;

 private:
  static constexpr std::size_t kMostWaitedFor = 64 * 1024;  ///< bytes of request and room
  static constexpr std::chrono::microseconds kMostWait{300};
  static constexpr std::chrono::milliseconds kDeferral{10};
  static constexpr unsigned kMostUntold = 32;  ///< requests without an answer that are handed back with one interrupt
  struct InFlight {
    Chain chain;
    Queue* queue = nullptr;
  };
  // All under mutex_; `lock` holds it, and with `wait` lets it go meanwhile.
  using Lock = std::unique_lock<std::mutex>;
  void serve(Queue& queue, Lock& lock, bool wait);
  bool take_all(Queue& queue, Lock& lock, bool wait);
  void take_answers(bool near);
  bool defer(InFlight& request, std::span<const u8> message);
  void tell();
  void give_up(const char* why);

  std::string tag_;
  std::shared_ptr<fs::ShareProcess> process_;
  EventLoop loop_;
  std::mutex mutex_;
  std::condition_variable left_;  ///< kicks_ became 0
  bool running_ = false;
  bool starved_ = false;          ///< requests were left in a ring for want of slots
  unsigned kicks_ = 0;            ///< vCPU threads in kicked()
  unsigned late_ = 0;             ///< waits in a row that were too long
  unsigned no_wait_ = 0;          ///< that many requests more are not waited for
  UniqueFd timer_;                ///< a timerfd: kDeferral after the first request that was deferred
  bool timer_runs_ = false;
  unsigned untold_ = 0;           ///< handed back to untold_queue_ without an interrupt
  Queue* untold_queue_ = nullptr;
  std::vector<Queue*> queues_;
  std::array<InFlight, fs::ShareProcess::kSlots> in_flight_;
  bool gone_ = false;
};

}  // namespace ring3::virtio
