// The packed ring (VIRTIO 1.2, 2.8): one ring of descriptors that both sides write, and two event suppression words.
#include <cstring>

#include "devices/virtio/core/queue.hpp"
#include "devices/virtio/core/ring_layout.hpp"

namespace ring3::virtio {

namespace {
constexpr bool is_available(u16 flags, bool wrap) {
  return ((flags & ring::kAvail) != 0) == wrap && ((flags & ring::kUsed) != 0) != wrap;
}
}  // namespace

bool Queue::available_packed() const {
  return is_available(ring::load_acquire(descriptors_ + u64{next_avail_} * 16 + 14), avail_wrap_);
}

Queue::Pop Queue::pop_packed(Chain& out) {
  if (!available_packed()) return Pop::kEmpty;
  u32 count = 0;
  u16 position = next_avail_;
  bool wrap = avail_wrap_;
  u16 entries = 0;
  for (;;) {
    if (in_flight_ + entries >= setup_.size) return bad("a chain longer than the ring"), Pop::kBroken;
    if (++count > kMostDescriptors) return bad("a chain that is too long"), Pop::kBroken;
    const u8* at = descriptors_ + u64{position} * 16;
    Descriptor d;
    d.flags = ring::load_acquire(at + 14);
    std::memcpy(&d.address, at, 8);
    std::memcpy(&d.length, at + 8, 4);
    std::memcpy(&d.next, at + 12, 2);
    entries++;
    if (++position == setup_.size) position = 0, wrap = !wrap;
    out.id_ = d.next;  // of the last one, by the end (2.8.6)
    if ((d.flags & ring::kIndirect) != 0) {
      if ((d.flags & ring::kNext) != 0) return bad("an indirect descriptor with a next one"), Pop::kBroken;
      if (!add_indirect(out, d, count)) return Pop::kBroken;
      break;
    }
    if (!add_piece(out, d)) return Pop::kBroken;
    if ((d.flags & ring::kNext) == 0) break;
  }
  out.descriptors_ = entries;
  next_avail_ = position;
  avail_wrap_ = wrap;
  return Pop::kChain;
}

// The first entry's flags go last: the driver looks at entries in order, so it sees all or none.
void Queue::publish_packed() {
  u8* first_flags = nullptr;
  u16 first_value = 0;
  for (const Used& u : staged_) {
    u8* at = descriptors_ + u64{next_used_} * 16;
    const u32 id = u.id;
    std::memcpy(at + 8, &u.length, 4);
    std::memcpy(at + 12, &id, 2);
    const u16 flags = static_cast<u16>((used_wrap_ ? ring::kAvail | ring::kUsed : 0) | (u.length != 0 ? ring::kWrite : 0));
    if (first_flags == nullptr) {
      first_flags = at + 14;
      first_value = flags;
    } else {
      ring::store_release(at + 14, flags);
    }
    view_.mark_dirty(setup_.descriptors + u64{next_used_} * 16, 16);
    next_used_ = static_cast<u16>(next_used_ + u.descriptors);
    if (next_used_ >= setup_.size) {
      next_used_ = static_cast<u16>(next_used_ - setup_.size);
      used_wrap_ = !used_wrap_;
      // The same place, counted from the new start; unless nobody looked for a whole round.
      if (signalled_ > setup_.size) signalled_valid_ = false;
      signalled_ = static_cast<u16>(signalled_ - setup_.size);
    }
  }
  ring::store_release(first_flags, first_value);
}

bool Queue::wants_interrupt_packed() {
  ring::fence();
  const u16 old = signalled_;
  const bool valid = signalled_valid_;
  if (valid && old == next_used_) return false;
  signalled_ = next_used_;
  signalled_valid_ = true;
  const u16 flags = ring::load(driver_ + 2) & 3;
  if (flags == ring::kEventDisable) return false;
  if (flags != ring::kEventDesc || !setup_.event_index) return true;
  const u16 wanted = ring::load(driver_);
  u16 event = wanted & 0x7fff;
  if (((wanted >> 15) != 0) != used_wrap_) event = static_cast<u16>(event - setup_.size);
  return !valid || ring::passed(event, next_used_, old);
}

}  // namespace ring3::virtio
