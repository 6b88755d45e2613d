#pragma once
#include <sys/uio.h>

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "devices/virtio/core/memory_view.hpp"

namespace ring3::virtio {

/// A request of the driver: first the bytes the device reads, then those it may write.
///
/// The descriptors were copied once, checked, and turned into pieces of guest RAM; the bytes themselves still belong to
/// the guest, which may change them at any moment: copy what is decided upon (read()), and only then look at it.
///
/// Lifetime: the pieces stay valid until the queue is stopped. A Chain may be reused for the next pop() (it keeps its
///           memory) and moved; it is plain data.
class Chain {
 public:
  /// SAFETY: pieces of guest RAM, each within one memslot; see memory_view.hpp.
  std::span<const iovec> readable() const { return readable_; }
  std::span<const iovec> writable() const { return writable_; }
  std::span<const Gpa> writable_at() const { return writable_at_; }  ///< of each piece of writable()
  u64 readable_bytes() const { return readable_bytes_; }
  u64 writable_bytes() const { return writable_bytes_; }

  /// Copies from the readable part, from `offset` on; returns how many bytes there were.
  std::size_t read(u64 offset, void* to, std::size_t size) const;
  /// Copies to the writable part; returns how many bytes had room.
  std::size_t write(u64 offset, const void* from, std::size_t size) const;
  /// The pieces of [offset, offset + length), cut at the end of the part; appended to `out`.
  void readable_range(u64 offset, u64 length, std::vector<iovec>& out) const { cut(readable_, offset, length, out); }
  void writable_range(u64 offset, u64 length, std::vector<iovec>& out) const { cut(writable_, offset, length, out); }

 private:
  friend class Queue;
  static void cut(std::span<const iovec> from, u64 offset, u64 length, std::vector<iovec>& out);
  void clear();

  std::vector<iovec> readable_, writable_;
  std::vector<Gpa> writable_at_;
  u64 readable_bytes_ = 0, writable_bytes_ = 0;
  u16 id_ = 0;           // split: the head; packed: the buffer id
  u16 descriptors_ = 0;  // ring entries it takes (packed), 1 in a split ring
};

/// One virtqueue, split or packed (2.7, 2.8), seen from the device.
///
/// Threading: not thread-safe: one thread at a time, except kick_fd(), broken(), size(), index().
/// Errors:    whatever the driver does wrong (loops, lengths, addresses outside RAM, indices that jump) breaks the whole
///            device: hooks.broken is called once, and from then on pop() gives kBroken and nothing is written to
///            the rings. Nothing here crashes, allocates without bound or loops for longer than the ring is.
/// Dirty log: whatever is written to guest memory is marked, pieces of a chain when it is completed.
///
/// The usual loop, on a readable kick_fd():
///
///     queue.clear_kick();
///     do {
///       queue.disable_kicks();
///       while (queue.pop(chain) == Queue::Pop::kChain) queue.complete(chain, serve(chain));
///       queue.notify();
///     } while (queue.enable_kicks());
class Queue {
 public:
  struct Setup {
    u16 index = 0;
    u16 size = 0;  ///< split: a power of two; packed: any; at most kMostEntries
    Gpa descriptors, driver, device;
    bool packed = false, event_index = false, indirect = false;
  };
  struct Hooks {
    std::function<void()> interrupt;                  ///< the driver is to be told of used buffers
    std::function<void(const std::string&)> broken;   ///< called once a session
    std::shared_ptr<std::atomic<bool>> device_broken; ///< shared by the queues of a device
  };
  /// The most a chain may have of descriptors, indirect ones included.
  static constexpr u32 kMostDescriptors = 1024;
  static constexpr u16 kMostEntries = 1024;

  /// Error: EINVAL, the driver gave a size, alignment or address that will not do. kick_fd is not owned.
  static Result<std::unique_ptr<Queue>> create(const memory::GuestMemory& memory, const Setup& setup, int kick_fd, Hooks hooks);

  enum class Pop { kChain, kEmpty, kBroken };
  /// The next request. `out` is overwritten.
  Pop pop(Chain& out);
  /// Undoes the last pop() that was not undone; nothing may have been completed since.
  void put_back(const Chain& chain);

  /// Hands a request back, in any order; `written`: bytes written to its writable part, from the start. The driver
  /// sees it with the next publish(): several together appear at once (mergeable receive buffers).
  void complete(const Chain& chain, u32 written);
  void publish();
  /// publish(), and an interrupt unless the driver does not want it now (event index, flags).
  void notify();

  /// Whether the driver kicks when it adds a request. They are only hints: kicks may come at any time.
  void disable_kicks();
  /// True: requests came meanwhile; look again.
  bool enable_kicks();

  /// The device found a request that breaks its protocol.
  void fail(const std::string& why);
  bool broken() const { return hooks_.device_broken->load(std::memory_order_relaxed); }

  /// For a device that is given guest addresses by other means than buffers (a balloon's page numbers).
  const MemoryView& memory() const { return view_; }

  int kick_fd() const { return kick_fd_; }  ///< an eventfd; readable after a kick
  void clear_kick();
  u16 size() const { return setup_.size; }
  u16 index() const { return setup_.index; }

  /// What a snapshot holds of a queue whose device is stopped.
  struct State {
    u16 next_avail = 0, next_used = 0;
    bool avail_wrap = true, used_wrap = true;
  };
  State state() const { return {next_avail_, next_used_, avail_wrap_, used_wrap_}; }
  void set_state(const State& state);

 private:
  struct Descriptor {  // both kinds, as copied
    u64 address;
    u32 length;
    u16 flags;
    u16 next;  // packed: the buffer id
  };
  struct Used {
    u32 id, length;
    u16 descriptors;
  };
  Queue(const memory::GuestMemory& memory, const Setup& setup, int kick_fd, Hooks hooks);

  bool map_rings();
  bool refresh();
  Pop pop_split(Chain& out);
  Pop pop_packed(Chain& out);
  bool add_indirect(Chain& out, const Descriptor& d, u32& count);
  bool add_piece(Chain& out, const Descriptor& d);
  bool available_split() const;
  bool available_packed() const;
  void publish_split();
  void publish_packed();
  bool wants_interrupt_split();
  bool wants_interrupt_packed();
  Descriptor split_descriptor(u16 index) const;
  bool bad(const char* why);

  Setup setup_;
  int kick_fd_;
  Hooks hooks_;
  MemoryView view_;
  // SAFETY: each points to its ring's area, all of it within one memslot of view_'s table; mapped anew when that changes.
  u8* descriptors_ = nullptr;
  u8* driver_ = nullptr;
  u8* device_ = nullptr;
  u16 next_avail_ = 0, next_used_ = 0;  // packed: position in the ring; split: free running
  bool avail_wrap_ = true, used_wrap_ = true;
  u32 in_flight_ = 0;             // ring entries popped and not published
  std::vector<Used> staged_;
  u16 signalled_ = 0;             // next_used_ at the last look at the event index
  bool signalled_valid_ = true;
};

}  // namespace ring3::virtio
