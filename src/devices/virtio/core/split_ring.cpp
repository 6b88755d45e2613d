// The split ring (VIRTIO 1.2, 2.7): descriptor table, available ring (driver_), used ring (device_).
#include <cstring>

#include "devices/virtio/core/queue.hpp"
#include "devices/virtio/core/ring_layout.hpp"

namespace ring3::virtio {

Queue::Descriptor Queue::split_descriptor(u16 index) const {
  Descriptor d;
  const u8* at = descriptors_ + u64{index} * 16;
  std::memcpy(&d.address, at, 8);
  std::memcpy(&d.length, at + 8, 4);
  std::memcpy(&d.flags, at + 12, 2);
  std::memcpy(&d.next, at + 14, 2);
  return d;
}

bool Queue::available_split() const { return ring::load_acquire(driver_ + 2) != next_avail_; }

Queue::Pop Queue::pop_split(Chain& out) {
  const u16 behind = static_cast<u16>(ring::load_acquire(driver_ + 2) - next_avail_);
  if (behind == 0) return Pop::kEmpty;
  if (behind > setup_.size) return bad("the available index jumped"), Pop::kBroken;
  if (in_flight_ >= setup_.size) return bad("more requests than the ring holds"), Pop::kBroken;
  const u16 head = ring::load(driver_ + 4 + 2 * u64{static_cast<u16>(next_avail_ & (setup_.size - 1))});
  if (head >= setup_.size) return bad("a head outside of the descriptor table"), Pop::kBroken;
  u32 count = 0;
  u16 index = head;
  for (u32 seen = 0;; seen++) {
    if (seen >= setup_.size) return bad("a chain that loops"), Pop::kBroken;
    if (++count > kMostDescriptors) return bad("a chain that is too long"), Pop::kBroken;
    const Descriptor d = split_descriptor(index);
    if ((d.flags & ring::kIndirect) != 0) {
      if ((d.flags & ring::kNext) != 0) return bad("an indirect descriptor with a next one"), Pop::kBroken;
      if (!add_indirect(out, d, count)) return Pop::kBroken;
      break;
    }
    if (!add_piece(out, d)) return Pop::kBroken;
    if ((d.flags & ring::kNext) == 0) break;
    if (d.next >= setup_.size) return bad("a chain that leads out of the descriptor table"), Pop::kBroken;
    index = d.next;
  }
  out.id_ = head;
  out.descriptors_ = 1;
  next_avail_++;
  return Pop::kChain;
}

void Queue::publish_split() {
  for (std::size_t i = 0; i < staged_.size(); i++) {
    const u16 slot = static_cast<u16>((next_used_ + i) & (setup_.size - 1));
    u8* at = device_ + 4 + 8 * u64{slot};
    ring::store32(at, staged_[i].id);
    ring::store32(at + 4, staged_[i].length);
    view_.mark_dirty(setup_.device + 4 + 8 * u64{slot}, 8);
  }
  next_used_ = static_cast<u16>(next_used_ + staged_.size());
  ring::store_release(device_ + 2, next_used_);
  view_.mark_dirty(setup_.device, 4);
}

bool Queue::wants_interrupt_split() {
  // The used index is visible before the driver's wish is read: else both sides may wait.
  ring::fence();
  const u16 old = signalled_;
  const bool valid = signalled_valid_;
  if (valid && old == next_used_) return false;
  signalled_ = next_used_;
  signalled_valid_ = true;
  if (!setup_.event_index) return (ring::load(driver_) & ring::kNoInterrupt) == 0;
  const u16 event = ring::load(driver_ + 4 + 2 * u64{setup_.size});
  return !valid || ring::passed(event, next_used_, old);
}

void Queue::disable_kicks() {
  if (broken() || !refresh()) return;
  if (setup_.packed) {
    ring::store(device_ + 2, ring::kEventDisable);
    view_.mark_dirty(setup_.device, 4);
  } else if (!setup_.event_index) {
    ring::store(device_, ring::kNoNotify);
    view_.mark_dirty(setup_.device, 4);
  }
  // With the event index in a split ring: the event that was asked for lies behind, which is as good.
}

bool Queue::enable_kicks() {
  if (broken() || !refresh()) return false;
  if (setup_.packed) {
    if (setup_.event_index) {
      ring::store(device_, static_cast<u16>(next_avail_ | (avail_wrap_ ? 1u << 15 : 0)));
      ring::store_release(device_ + 2, ring::kEventDesc);
    } else {
      ring::store(device_ + 2, ring::kEventEnable);
    }
    view_.mark_dirty(setup_.device, 4);
  } else if (setup_.event_index) {
    const u64 at = 4 + 8 * u64{setup_.size};
    ring::store(device_ + at, next_avail_);
    view_.mark_dirty(setup_.device + at, 2);
  } else {
    ring::store(device_, 0);
    view_.mark_dirty(setup_.device, 4);
  }
  ring::fence();
  return setup_.packed ? available_packed() : available_split();
}

}  // namespace ring3::virtio
