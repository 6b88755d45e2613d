#pragma once
#include <sys/eventfd.h>

#include <cstring>
#include <map>
#include <optional>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/mapping.hpp"
#include "base/unique_fd.hpp"
#include "devices/virtio/core/device.hpp"
#include "devices/virtio/core/ring_layout.hpp"

/// The driver's side of virtio, for tests and fuzzers: guest RAM, and a ring as a driver would keep it.
namespace ring3::virtio::test {

/// RAM at [0, size), and a second slot right above it, so that buffers can cross.
class Guest {
 public:
  static constexpr u64 kSlot = u64{1} << 20;
  explicit Guest(u32 flags = 0) : ram_(*Mapping::anonymous(2 * kSlot)) {
    memory_.set_region(0, flags, Gpa(0), kSlot, Hva(reinterpret_cast<u64>(ram_.data())));
    memory_.set_region(1, flags, Gpa(kSlot), kSlot, Hva(reinterpret_cast<u64>(ram_.data() + kSlot)));
  }
  memory::GuestMemory& memory() { return memory_; }
  u8* at(u64 gpa) { return ram_.data() + gpa; }
  u64 size() const { return ram_.size(); }
  template <class T>
  T get(u64 gpa) {
    T v;
    std::memcpy(&v, at(gpa), sizeof v);
    return v;
  }
  template <class T>
  void put(u64 gpa, T v) {
    std::memcpy(at(gpa), &v, sizeof v);
  }

 private:
  Mapping ram_;
  memory::GuestMemory memory_;
};

struct Buffer {
  u64 address;
  u32 length;
  bool writable;
};

struct Done {
  u16 id;
  u32 written;
};

/// One queue as a driver keeps it.
class Driver {
 public:
  Driver(Guest& guest, const Queue::Setup& setup) : guest_(guest), setup_(setup) {
    const auto s = ring::sizes(setup.size, setup.packed);
    std::memset(guest.at(setup.descriptors.value), 0, s.descriptors);
    std::memset(guest.at(setup.driver.value), 0, s.driver);
    std::memset(guest.at(setup.device.value), 0, s.device);
    for (u16 i = 0; i < setup.size; i++) free_.push_back(static_cast<u16>(setup.size - 1 - i));
  }
  static Queue::Setup layout(u16 size, bool packed, bool event_index, u64 base = 0x1000) {
    Queue::Setup s;
    s.size = size;
    s.descriptors = Gpa(base);
    s.driver = Gpa(base + 0x4000);
    s.device = Gpa(base + 0x5000);
    s.packed = packed, s.event_index = event_index, s.indirect = true;
    return s;
  }

  /// Makes a request available; nothing when the ring is full. `table`: where to put an indirect table, or 0.
  std::optional<u16> add(const std::vector<Buffer>& buffers, u64 table = 0) {
    return setup_.packed ? add_packed(buffers, table) : add_split(buffers, table);
  }
  /// What the device has handed back.
  std::optional<Done> take() { return setup_.packed ? take_packed() : take_split(); }

  /// Whether a driver would kick after what it added since the last question.
  bool wants_kick() {
    const u16 now = setup_.packed ? avail_ : avail_count_;
    const u64 device = setup_.device.value;
    bool kick;
    if (!setup_.packed) {
      const u16 event = guest_.get<u16>(device + 4 + 8 * u64{setup_.size});
      kick = setup_.event_index ? ring::passed(event, now, kicked_) : (guest_.get<u16>(device) & 1) == 0;
    } else {
      const u16 flags = guest_.get<u16>(device + 2), wanted = guest_.get<u16>(device);
      u16 event = wanted & 0x7fff;
      if (((wanted >> 15) != 0) != wrap_) event = static_cast<u16>(event - setup_.size);
      kick = flags != ring::kEventDisable && (flags == ring::kEventEnable || ring::passed(event, now, kicked_));
    }
    kicked_ = now;
    return kick;
  }
  /// Asks for an interrupt after `more` further requests (event index), or switches them on or off.
  void want_interrupt(bool on, u16 more = 0) {
    const u64 driver = setup_.driver.value;
    if (!setup_.packed) {
      guest_.put<u16>(driver, on ? 0 : 1);
      guest_.put<u16>(driver + 4 + 2 * u64{setup_.size}, static_cast<u16>(on ? used_ + more : used_ - 1));
    } else if (setup_.event_index && on) {
      u16 at = static_cast<u16>(used_ + more);
      bool wrap = used_wrap_;
      if (at >= setup_.size) at = static_cast<u16>(at - setup_.size), wrap = !wrap;
      guest_.put<u16>(driver, static_cast<u16>(at | (wrap ? 0x8000 : 0)));
      guest_.put<u16>(driver + 2, ring::kEventDesc);
    } else {
      guest_.put<u16>(driver + 2, on ? ring::kEventEnable : ring::kEventDisable);
    }
  }
  std::size_t free() const { return free_.size(); }

 private:
  void put_descriptor(u64 at, const Buffer& b, u16 flags, u16 next) {
    guest_.put<u64>(at, b.address);
    guest_.put<u32>(at + 8, b.length);
    guest_.put<u16>(at + 12, flags);
    guest_.put<u16>(at + 14, next);
  }
  std::optional<u16> add_split(const std::vector<Buffer>& buffers, u64 table) {
    const std::size_t need = table != 0 ? 1 : buffers.size();
    if (free_.size() < need || need == 0) return std::nullopt;
    std::vector<u16> used;
    for (std::size_t i = 0; i < need; i++) used.push_back(free_.back()), free_.pop_back();
    const u64 d = setup_.descriptors.value;
    if (table != 0) {
      for (std::size_t i = 0; i < buffers.size(); i++) {
        const bool last = i + 1 == buffers.size();
        put_descriptor(table + 16 * i, buffers[i], flags_of(buffers[i], last), static_cast<u16>(last ? 0 : i + 1));
      }
      put_descriptor(d + 16 * u64{used[0]}, {table, static_cast<u32>(16 * buffers.size()), false}, ring::kIndirect, 0);
    } else {
      for (std::size_t i = 0; i < need; i++) {
        const bool last = i + 1 == need;
        put_descriptor(d + 16 * u64{used[i]}, buffers[i], flags_of(buffers[i], last), last ? u16{0} : used[i + 1]);
      }
    }
    guest_.put<u16>(setup_.driver.value + 4 + 2 * u64{static_cast<u16>(avail_count_ % setup_.size)}, used[0]);
    avail_count_++;
    ring::store_release(guest_.at(setup_.driver.value + 2), avail_count_);
    const u16 id = used[0];
    taken_[id] = std::move(used);
    return id;
  }
  std::optional<u16> add_packed(const std::vector<Buffer>& buffers, u64 table) {
    const std::size_t need = table != 0 ? 1 : buffers.size();
    if (free_.size() < need || need == 0) return std::nullopt;
    std::vector<u16> used;
    for (std::size_t i = 0; i < need; i++) used.push_back(free_.back()), free_.pop_back();
    const u16 id = used[0];
    u8* first = guest_.at(setup_.descriptors.value + 16 * u64{avail_}) + 14;
    u16 first_flags = 0;
    for (std::size_t i = 0; i < need; i++) {
      const u64 at = setup_.descriptors.value + 16 * u64{avail_};
      u16 flags = static_cast<u16>(wrap_ ? ring::kAvail : ring::kUsed);
      if (table != 0) {
        for (std::size_t k = 0; k < buffers.size(); k++) {
          put_descriptor(table + 16 * k, buffers[k], 0, buffers[k].writable ? ring::kWrite : u16{0});
        }
        flags |= ring::kIndirect;
        guest_.put<u64>(at, table);
        guest_.put<u32>(at + 8, static_cast<u32>(16 * buffers.size()));
      } else {
        flags = static_cast<u16>(flags | flags_of(buffers[i], i + 1 == need));
        guest_.put<u64>(at, buffers[i].address);
        guest_.put<u32>(at + 8, buffers[i].length);
      }
      guest_.put<u16>(at + 12, id);
      if (i == 0) {
        first_flags = flags;
      } else {
        guest_.put<u16>(at + 14, flags);
      }
      if (++avail_ == setup_.size) avail_ = 0, wrap_ = !wrap_, kicked_ = static_cast<u16>(kicked_ - setup_.size);
    }
    ring::store_release(first, first_flags);
    taken_[id] = std::move(used);
    return id;
  }
  std::optional<Done> take_split() {
    const u64 device = setup_.device.value;
    if (ring::load_acquire(guest_.at(device + 2)) == used_) return std::nullopt;
    const u64 at = device + 4 + 8 * u64{static_cast<u16>(used_ % setup_.size)};
    const Done done{static_cast<u16>(guest_.get<u32>(at)), guest_.get<u32>(at + 4)};
    used_++;
    give_back(done.id);
    return done;
  }
  std::optional<Done> take_packed() {
    const u64 at = setup_.descriptors.value + 16 * u64{used_};
    const u16 flags = ring::load_acquire(guest_.at(at + 14));
    const bool avail = flags & ring::kAvail, used = flags & ring::kUsed;
    if (avail != used || used != used_wrap_) return std::nullopt;
    const Done done{guest_.get<u16>(at + 12), guest_.get<u32>(at + 8)};
    used_ = static_cast<u16>(used_ + taken_[done.id].size());
    if (used_ >= setup_.size) used_ = static_cast<u16>(used_ - setup_.size), used_wrap_ = !used_wrap_;
    give_back(done.id);
    return done;
  }
  void give_back(u16 id) {
    for (u16 i : taken_[id]) free_.push_back(i);
    taken_.erase(id);
  }
  static u16 flags_of(const Buffer& b, bool last) {
    return static_cast<u16>((b.writable ? ring::kWrite : 0) | (last ? 0 : ring::kNext));
  }

  Guest& guest_;
  Queue::Setup setup_;
  std::vector<u16> free_;
  std::map<u16, std::vector<u16>> taken_;
  u16 avail_ = 0, avail_count_ = 0, used_ = 0, kicked_ = 0;
  bool wrap_ = true, used_wrap_ = true;
};

/// A transport that remembers what it was told.
struct RecordingTransport : Transport {
  void config_changed() override { config_changes++; }
  void needs_reset(const std::string& why) override { broken = why; }
  int config_changes = 0;
  std::string broken;
};

}  // namespace ring3::virtio::test
