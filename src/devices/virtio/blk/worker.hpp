#pragma once
#include <mutex>
#include <optional>

#include "devices/virtio/blk/block_device.hpp"
#include "devices/virtio/blk/uring.hpp"
#include "devices/virtio/core/event_loop.hpp"

namespace ring3::virtio {

/// Serves one queue of a BlockDevice on a thread of its own, from construction to destruction; what comes alone is read, or begun, on
/// a vCPU's.
///
/// Threading: kicked() on any thread, but not beside the destructor; mutex_ guards queue, ring and requests.
class BlockDevice::Worker {
 public:
  Worker(BlockDevice& device, u64 features, Queue& queue);
  ~Worker();
  /// The driver's kick, on the thread of a vCPU. False: there is more to do than one small read from the page cache, or one access to send off.
  bool kicked();
  /// BlockDevice::look(), with workers_mutex_. Whether something may be under way still.
  bool look(bool more);

 private:
  static constexpr u64 kMostAtOnce = 16 * 1024;  ///< bytes that a vCPU's thread may be kept with
  static constexpr unsigned kSingle = 4;         ///< requests that came alone, until that is what is expected
  static constexpr unsigned kDeep = 8;           ///< accesses under way, from which on several ends are waited for at once
  static constexpr unsigned kPatience = 100;     ///< microseconds
  static constexpr unsigned kMostRounds = 256;   ///< such waits in a row, though the driver always has more
  struct Request {
    Chain chain;
    std::vector<iovec> buffers;
    storage::Image::Direct direct;
    u64 offset = 0, length = 0;
    bool write = false;
  };
  void serve();
  /// Begins everything that is in the ring.
  void take_all();
  unsigned worth_waiting_for() const;
  /// Whether it is answered; false: it flies, and reap() answers it.
  bool handle(Request& r);
  bool read_or_write(Request& r, bool write, u64 sector);
  bool check(Request& r, bool write, u64 sector);
  bool read_cached(Request& r);
  bool begin(Request& r);
  bool fly(Request& r);
  u8 transfer(Request& r);
  /// The status of what the image answered.
  u8 status(int result);
  u8 get_id(Request& r);
  u8 ranges(Request& r, bool write_zeroes);
  void answer(Request& r, u8 status);
  void reap(bool answers);
  Request& take();

  BlockDevice& device_;
  const Config& config_;
  const bool flush_each_;
  const bool read_only_;
  Queue& queue_;
  std::mutex mutex_;
  unsigned alone_ = 0;  ///< requests in a row that came when no other was there
  std::unique_ptr<Uring> uring_;
  u64 flying_bytes_ = 0;  ///< of the accesses in uring_
  std::vector<std::unique_ptr<Request>> all_;
  std::vector<Request*> free_;
  EventLoop loop_;
};

}  // namespace ring3::virtio
