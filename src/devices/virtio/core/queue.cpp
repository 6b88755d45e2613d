// What split and packed rings share: chains, checks, mapping. The rings themselves: split_ring.cpp, packed_ring.cpp.
#include "devices/virtio/core/queue.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/checked.hpp"
#include "base/event_fd.hpp"
#include "devices/virtio/core/ring_layout.hpp"

namespace ring3::virtio {

// ---- Chain ----

void Chain::clear() {
  readable_.clear();
  writable_.clear();
  writable_at_.clear();
  readable_bytes_ = writable_bytes_ = 0;
  id_ = descriptors_ = 0;
}

void Chain::cut(std::span<const iovec> from, u64 offset, u64 length, std::vector<iovec>& out) {
  for (const iovec& v : from) {
    if (length == 0) return;
    if (offset >= v.iov_len) {
      offset -= v.iov_len;
      continue;
    }
    const u64 n = std::min<u64>(length, v.iov_len - offset);
    out.push_back({static_cast<u8*>(v.iov_base) + offset, n});
    offset = 0;
    length -= n;
  }
}

std::size_t Chain::read(u64 offset, void* to, std::size_t size) const {
  std::size_t done = 0;
  for (const iovec& v : readable_) {
    if (done == size) break;
    if (offset >= v.iov_len) {
      offset -= v.iov_len;
      continue;
    }
    const std::size_t n = std::min<std::size_t>(size - done, v.iov_len - offset);
    std::memcpy(static_cast<u8*>(to) + done, static_cast<const u8*>(v.iov_base) + offset, n);
    offset = 0;
    done += n;
  }
  return done;
}

std::size_t Chain::write(u64 offset, const void* from, std::size_t size) const {
  std::size_t done = 0;
  for (const iovec& v : writable_) {
    if (done == size) break;
    if (offset >= v.iov_len) {
      offset -= v.iov_len;
      continue;
    }
    const std::size_t n = std::min<std::size_t>(size - done, v.iov_len - offset);
    std::memcpy(static_cast<u8*>(v.iov_base) + offset, static_cast<const u8*>(from) + done, n);
    offset = 0;
    done += n;
  }
  return done;
}

// ---- Queue ----

Queue::Queue(const memory::GuestMemory& memory, const Setup& setup, int kick_fd, Hooks hooks)
    : setup_(setup), kick_fd_(kick_fd), hooks_(std::move(hooks)), view_(memory) {
  if (!hooks_.device_broken) hooks_.device_broken = std::make_shared<std::atomic<bool>>(false);
}

Result<std::unique_ptr<Queue>> Queue::create(const memory::GuestMemory& memory, const Setup& s, int kick_fd, Hooks hooks) {
  if (s.size == 0 || s.size > kMostEntries || (!s.packed && (s.size & (s.size - 1)) != 0)) {
    return Error::of(EINVAL, "queue " + std::to_string(s.index) + ": a size of " + std::to_string(s.size));
  }
  const bool aligned = s.descriptors.value % 16 == 0 && s.driver.value % (s.packed ? 4 : 2) == 0 && s.device.value % 4 == 0;
  if (!aligned) return Error::of(EINVAL, "queue " + std::to_string(s.index) + ": a ring that is not aligned");
  std::unique_ptr<Queue> queue(new Queue(memory, s, kick_fd, std::move(hooks)));
  queue->staged_.reserve(s.size);
  if (!queue->map_rings()) return Error::of(EINVAL, "queue " + std::to_string(s.index) + ": a ring outside of RAM");
  return queue;
}

bool Queue::map_rings() {
  const ring::Sizes sizes = ring::sizes(setup_.size, setup_.packed);
  // SAFETY: range() checks that all of each area lies in one slot.
  descriptors_ = view_.range(setup_.descriptors, sizes.descriptors, setup_.packed);
  driver_ = view_.range(setup_.driver, sizes.driver, false);
  device_ = view_.range(setup_.device, sizes.device, true);
  return descriptors_ != nullptr && driver_ != nullptr && device_ != nullptr;
}

bool Queue::refresh() {
  if (!view_.refresh()) [[likely]] return true;
  if (map_rings()) return true;
  return bad("a ring is in RAM no longer");
}

void Queue::set_state(const State& state) {
  next_avail_ = state.next_avail;
  next_used_ = state.next_used;
  avail_wrap_ = state.avail_wrap;
  used_wrap_ = state.used_wrap;
  if (setup_.packed) {
    next_avail_ = static_cast<u16>(next_avail_ % setup_.size);
    next_used_ = static_cast<u16>(next_used_ % setup_.size);
  }
  signalled_ = next_used_;
  signalled_valid_ = false;  // whether the last interrupt was sent is not known: one too many does no harm
}

bool Queue::bad(const char* why) {
  if (!hooks_.device_broken->exchange(true) && hooks_.broken) {
    hooks_.broken("queue " + std::to_string(setup_.index) + ": " + why);
  }
  return false;
}

void Queue::fail(const std::string& why) { bad(why.c_str()); }

void Queue::clear_kick() { drain_event(kick_fd_); }

Queue::Pop Queue::pop(Chain& out) {
  out.clear();
  if (broken() || !refresh()) return Pop::kBroken;
  const Pop result = setup_.packed ? pop_packed(out) : pop_split(out);
  if (result == Pop::kChain) in_flight_ += out.descriptors_;
  return result;
}

void Queue::put_back(const Chain& chain) {
  in_flight_ -= std::min<u32>(in_flight_, chain.descriptors_);
  if (!setup_.packed) {
    next_avail_--;
    return;
  }
  if (next_avail_ < chain.descriptors_) {
    next_avail_ = static_cast<u16>(next_avail_ + setup_.size);
    avail_wrap_ = !avail_wrap_;
  }
  next_avail_ = static_cast<u16>(next_avail_ - chain.descriptors_);
}

// One buffer, which may lie in several slots.
bool Queue::add_piece(Chain& out, const Descriptor& d) {
  const bool writable = (d.flags & ring::kWrite) != 0;
  if (!writable && !out.writable_.empty()) return bad("a readable buffer after a writable one");
  constexpr u64 kMostBytes = 0xffffffff;
  if (out.readable_bytes_ + out.writable_bytes_ + d.length > kMostBytes) return bad("a chain of 4 GiB or more");
  if (!checked_add(d.address, u64{d.length})) return bad("a buffer whose end is beyond all addresses");
  Gpa at(d.address);
  u64 left = d.length;
  while (left != 0) {
    u64 n = left;
    u8* host = view_.prefix(at, n, writable);
    if (host == nullptr) return bad("a buffer outside of RAM");
    if (writable) {
      out.writable_.push_back({host, n});
      out.writable_at_.push_back(at);
      out.writable_bytes_ += n;
    } else {
      out.readable_.push_back({host, n});
      out.readable_bytes_ += n;
    }
    at = at + n, left -= n;
  }
  return true;
}

// An indirect table (2.7.5.3, 2.8.7): in a split ring linked by next, in a packed one in order.
bool Queue::add_indirect(Chain& out, const Descriptor& d, u32& count) {
  if (!setup_.indirect) return bad("an indirect table, which was not negotiated");
  if ((d.flags & ring::kWrite) != 0 && setup_.packed) return bad("an indirect table with the write flag");
  if (d.length == 0 || d.length % 16 != 0) return bad("an indirect table of an odd length");
  const u32 entries = d.length / 16;
  if (!checked_add(d.address, u64{d.length})) return bad("an indirect table beyond all addresses");
  u32 index = 0;
  for (u32 seen = 0;; seen++) {
    if (seen >= entries) return bad("an indirect table that loops");
    if (++count > kMostDescriptors) return bad("a chain that is too long");
    Descriptor e;
    u8 raw[16];
    if (!view_.read(Gpa(d.address) + u64{index} * 16, raw, sizeof raw)) return bad("an indirect table outside of RAM");
    std::memcpy(&e.address, raw, 8);
    std::memcpy(&e.length, raw + 8, 4);
    if (setup_.packed) {
      std::memcpy(&e.flags, raw + 14, 2);
      e.flags &= ring::kWrite | ring::kIndirect;
      e.next = 0;
    } else {
      std::memcpy(&e.flags, raw + 12, 2);
      std::memcpy(&e.next, raw + 14, 2);
    }
    if ((e.flags & ring::kIndirect) != 0) return bad("an indirect table in an indirect table");
    if (!add_piece(out, e)) return false;
    if (setup_.packed) {
      if (++index == entries) return true;
    } else {
      if ((e.flags & ring::kNext) == 0) return true;
      if (e.next >= entries) return bad("an indirect table that leads out of itself");
      index = e.next;
    }
  }
}

void Queue::complete(const Chain& chain, u32 written) {
  // What the device says it wrote, and no more than there was.
  u64 left = std::min<u64>(written, chain.writable_bytes_);
  if (!broken() && staged_.size() >= setup_.size) publish();
  if (!broken() && refresh()) staged_.push_back({chain.id_, static_cast<u32>(left), chain.descriptors_});
  // Of a queue that is broken by now too: the bytes have changed.
  for (std::size_t i = 0; i < chain.writable_.size() && left != 0; i++) {
    const u64 n = std::min<u64>(left, chain.writable_[i].iov_len);
    view_.stored(chain.writable_at_[i], n);
    left -= n;
  }
}

void Queue::publish() {
  if (staged_.empty()) return;
  if (!broken() && refresh()) {
    if (setup_.packed) {
      publish_packed();
    } else {
      publish_split();
    }
    for (const Used& u : staged_) in_flight_ -= std::min<u32>(in_flight_, u.descriptors);
  }
  staged_.clear();
}

void Queue::notify() {
  publish();
  if (broken() || !refresh()) return;
  if ((setup_.packed ? wants_interrupt_packed() : wants_interrupt_split()) && hooks_.interrupt) hooks_.interrupt();
}

}  // namespace ring3::virtio
