#include "devices/virtio/rng/rng_device.hpp"

#include <sys/epoll.h>
#include <sys/random.h>

#include <algorithm>

namespace ring3::virtio {

void RngDevice::start(u64, std::span<Queue* const> queues) {
  Queue* queue = queues[0];
  if (queue == nullptr) return;
  Status status = loop_.add(queue->kick_fd(), EPOLLIN, [this, queue](u32) { serve(*queue); });
  if (status) status = loop_.start("rng");
  if (!status) queue->fail("no thread for it: " + status.error().message);
}

void RngDevice::serve(Queue& queue) {
  constexpr u64 kMost = 64 << 10;
  Chain chain;
  queue.clear_kick();
  do {
    queue.disable_kicks();
    while (queue.pop(chain) == Queue::Pop::kChain) {
      u8 bytes[256];  // what getrandom() gives whole, whatever signals come
      u64 done = 0;
      const u64 wanted = std::min(chain.writable_bytes(), kMost);
      while (done < wanted) {
        const u64 n = std::min<u64>(wanted - done, sizeof bytes);
        if (::getrandom(bytes, n, 0) != static_cast<ssize_t>(n)) break;
        done += chain.write(done, bytes, n);
      }
      queue.complete(chain, static_cast<u32>(done));
    }
    queue.notify();
  } while (queue.enable_kicks());
}

}  // namespace ring3::virtio
