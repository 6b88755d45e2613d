#pragma once
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "base/event_fd.hpp"
#include "devices/virtio/core/test_driver.hpp"
#include "stepped_loops.hpp"

/// The driver of a device that is fuzzed: requests made of a script's bytes, and what must hold whatever they say.
///
///   - The device changes no byte but those of buffers that it was given to write and has not handed back, and of the
///     rings' areas that are its own; none of read-only RAM, none beside the RAM.
///   - It hands back what it was given, once, and says that it wrote no more than there was room for.
///   - A request with a buffer that is not RAM ends the device; it is never handed back.
///   - It comes to rest: with nothing new to do, no descriptor stays ready.
namespace ring3::virtio::fuzz {

inline void check(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "device_fuzz: %s\n", what);
  std::abort();
}

/// The script's bytes; zeroes once they are used up.
struct Input {
  const u8* data;
  std::size_t size;
  u64 take(std::size_t n) {  // at most 8
    u64 v = 0;
    n = std::min(n, size);
    std::memcpy(&v, data, n);
    skip(n);
    return v;
  }
  void skip(std::size_t n) { data += n, size -= n; }
  u8 byte() { return static_cast<u8>(take(1)); }
};

/// A request as the driver made it.
struct Request {
  std::vector<u8> message;               ///< its readable bytes
  std::vector<test::Buffer> readable, writable;
  u64 room = 0;                          ///< bytes of `writable`
  bool bad = false;                      ///< breaks the rules of rings: is never to be handed back
  int table = -1;                        ///< which of the queue's indirect tables it takes
};

class Driver {
 public:
  // Guest addresses are offsets in the Guest's mapping. Two slots of RAM side by side, and one that is read-only.
  static constexpr u64 kRam = 0x10000, kSecond = 0x14000, kRamEnd = 0x18000, kReadOnly = 0x30000, kReadOnlyEnd = 0x31000;
  static constexpr u64 kRing = 0x200, kTable = kRam + 0x1000, kData = kRam + 0x2000;
  static constexpr u16 kMostQueues = 8, kEntries = 16;
  static constexpr u8 kCanary = 0xa5;

  Driver() {
    std::memset(canaries_, kCanary, sizeof canaries_);
    memory().set_region(0, 0, Gpa(0), 0, Hva(0));
    memory().set_region(1, 0, Gpa(0), 0, Hva(0));
    // Beside the slots a page of the host's that is looked at, and then none that can be touched.
    for (u64 at = 0; at < guest_.size(); at += kPageSize) {
      const bool ours = (at + kPageSize >= kRam && at < kRamEnd + kPageSize) || (at + kPageSize >= kReadOnly && at < kReadOnlyEnd + kPageSize);
      if (!ours) mprotect(guest_.at(at), kPageSize, PROT_NONE);
    }
    for (u64 at : {kRam - kPageSize, kRamEnd, kReadOnly - kPageSize, kReadOnly, kReadOnlyEnd}) std::memset(guest_.at(at), kCanary, kPageSize);
    const auto slot = [&](u32 id, u32 flags, u64 from, u64 to) {
      check(memory().set_region(id, flags, Gpa(from), to - from, Hva(reinterpret_cast<u64>(guest_.at(from)))) == 0, "no RAM");
    };
    slot(0, 0, kRam, kSecond);
    slot(1, 0, kSecond, kRamEnd);
    slot(2, KVM_MEM_READONLY, kReadOnly, kReadOnlyEnd);
    for (auto& fd : kicks_) fd.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  }
  memory::GuestMemory& memory() { return guest_.memory(); }

  void begin() {
    std::memset(guest_.at(kRam), 0, kRamEnd - kRam);
    next_ = kData;
    broken_ = std::make_shared<std::atomic<bool>>(false);
    tampered_ = unsure_ = false;
  }
  void end() {
    for (u64 at : {kRam - kPageSize, kRamEnd, kReadOnly - kPageSize, kReadOnly, kReadOnlyEnd}) {
      check(std::memcmp(guest_.at(at), canaries_, kPageSize) == 0, "bytes that are not the device's have changed");
    }
  }

  /// The device is told of pages by their numbers, in messages.
  void names_pages(bool yes) { names_pages_ = yes; }
  /// DRIVER_OK. rings: bit 0 packed, bit 1 event index, bit 2 no indirect tables, bit 3 four entries a ring.
  void start(Device& device, u64 features, u8 rings) {
    device_ = &device;
    const std::size_t count = device.queue_sizes().size();
    check(count <= kMostQueues, "too many queues");
    broken_ = std::make_shared<std::atomic<bool>>(false);
    std::memset(owned_, 0, sizeof owned_);
    tampered_ = unsure_ = false;
    indirect_ = (rings & 4) == 0;
    sides_.clear();
    sides_.resize(count);
    std::vector<Queue*> all;
    for (u16 i = 0; i < count; i++) {
      drain_event(kicks_[i].get());
      sides_[i].setup = setup(i, rings);
      start_queue(i);
      all.push_back(sides_[i].queue.get());
    }
    device.start(features, all);
    for (u16 i = 0; i < count; i++) signal_event(kicks_[i].get());
    running_ = true;
  }
  void stop() {
    if (!running_) return;
    device_->stop();
    running_ = false;
    sides_.clear();
    // What was not handed back is the driver's again.
    std::memset(owned_, 0, sizeof owned_);
  }
  bool running() const { return running_; }
  bool broken() const { return broken_->load(); }
  bool tampered() const { return tampered_; }
  bool indirect() const { return indirect_; }
  u16 queues() const { return static_cast<u16>(sides_.size()); }
  /// VIRTIO_F_RING_RESET, there and back.
  void restart_queue(u16 index) {
    device_->stop_queue(index);
    for (const auto& [id, r] : sides_[index].out) {
      for (const test::Buffer& b : r.writable) own(b, -1);
    }
    areas(index, -1);
    start_queue(index);
    device_->start_queue(index, *sides_[index].queue);
    signal_event(kicks_[index].get());
  }

  /// Where a buffer of `length` bytes lies. how: bits 0 to 2.
  u64 place(u8 how, u64 length) {
    switch (how & 7) {
      case 1: return length < kSecond - kData ? kSecond - length / 2 : kData;  // in two slots
      case 2: return kReadOnly;
      case 3: return kRamEnd - length / 2;
      case 4: return kData;                                                    // where others are
      case 5: return kRam + length % 0x1000;                                   // the rings
      case 6: return ~u64{0} - length / 2;
      default: break;
    }
    if (next_ + length > kRamEnd) next_ = kData;
    const u64 at = next_;
    next_ += std::min<u64>(length, kRamEnd - kData);
    return at;
  }
  static bool inside(u64 at, u64 length, bool write) {
    const auto within = [&](u64 from, u64 to) { return at >= from && at <= to && length <= to - at; };
    return length == 0 || within(kRam, kRamEnd) || (!write && within(kReadOnly, kReadOnlyEnd));
  }
  /// What a driver stores by itself.
  void poke(u64 at, std::span<const u8> bytes) {
    at = kRam + at % (kRamEnd - kRam);
    const u64 n = std::min<u64>(bytes.size(), kRamEnd - at);
    std::memcpy(guest_.at(at), bytes.data(), n);
    touch(at, n);
  }

  /// Makes a request available. False: the ring is full.
  bool add(u16 queue, Request r, bool table, bool backwards) {
    Side& side = sides_[queue];
    std::vector<test::Buffer> all = r.readable;
    all.insert(backwards ? all.begin() : all.end(), r.writable.begin(), r.writable.end());
    if (all.empty() || tampered_) return false;
    u64 total = 0;
    for (const test::Buffer& b : all) {
      total += b.length;
      r.bad |= !inside(b.address, b.length, b.writable);
      if (b.writable) r.room += b.length;
      for (const test::Buffer& other : all) unsure_ |= &other != &b && meet(other, b.address, b.length);
    }
    r.bad |= total > 0xffffffff;
    r.bad |= backwards && !r.readable.empty() && r.room != 0;
    for (int i = 0; table && indirect_ && i < kTables && r.table < 0; i++) {
      if ((side.tables & 1u << i) == 0) r.table = i;
    }
    const auto id = side.driver->add(all, r.table < 0 ? 0 : kTable + 0x200 * u64{queue} + 0x100 * static_cast<u64>(r.table));
    if (!id) return false;
    if (r.table >= 0) side.tables |= 1u << r.table;
    for (const test::Buffer& b : r.readable) unsure_ |= is_owned(b);
    for (const test::Buffer& b : r.writable) {
      if (is_owned(b)) unsure_ = true;
      if (in_ram(b)) touch(b.address, b.length);
      own(b, 1);
    }
    side.out[*id] = std::move(r);
    side.last = *id;
    return true;
  }
  /// What add() made of it.
  const Request& last(u16 queue) { return sides_[queue].out[sides_[queue].last]; }
  /// The bytes for readable buffers, before they are made available.
  void put(const test::Buffer& b, const u8* from) {
    if (!in_ram(b)) return;
    touch(b.address, b.length);
    std::memcpy(guest_.at(b.address), from, b.length);
  }

  void kick(u16 queue) {
    if (device_->takes_kicks()) {
      before();
      const bool taken = device_->kicked(queue);
      after();
      if (taken) return;
    }
    signal_event(kicks_[queue].get());
  }
  /// Lets the device work until it rests; completed(queue, request, written) is told of what it handed back, each queue's in
  /// order.
  template <class Completed>
  void turn(Completed completed) {
    if (!running_) return;
    before();
    int rounds = 0;
    while (step_loops()) check(++rounds < 2000, "the device does not come to rest");
    after();
    for (u16 i = 0; i < sides_.size() && !tampered_; i++) {
      Side& side = sides_[i];
      while (!tampered_) {
        const auto done = side.driver->take();
        if (!done) break;
        const auto it = side.out.find(done->id);
        check(it != side.out.end(), "a request was handed back that was none, or twice");
        Request r = std::move(it->second);
        side.out.erase(it);
        if (r.table >= 0) side.tables &= ~(1u << r.table);
        check(!r.bad, "a request that breaks the rules was handed back");
        check(done->written <= r.room, "more was written than there was room for");
        for (const test::Buffer& buffer : r.writable) own(buffer, -1);
        completed(i, r, done->written);
      }
    }
  }
  /// Some bytes of requests may be others than they were made with: what the device makes of them is not known.
  bool unsure() const { return unsure_ || tampered_; }
  /// After a turn: what is made available from now on is known again, unless something old is still out.
  void settle() {
    if (std::all_of(sides_.begin(), sides_.end(), [](const Side& side) { return side.out.empty(); })) unsure_ = false;
  }
  /// What was written to a request's buffers.
  std::vector<u8> written(const Request& r, u64 length) {
    std::vector<u8> bytes;
    for (const test::Buffer& b : r.writable) {
      const u64 n = std::min<u64>(b.length, length - bytes.size());
      if (n != 0) bytes.insert(bytes.end(), guest_.at(b.address), guest_.at(b.address) + n);
    }
    return bytes;
  }
  /// The device may change the page: it was told to give it up.
  void give_up(u64 page) {
    if (page < kRam || page >= kRamEnd) return;
    touch(page, kPageSize);
    for (u64 i = 0; i < kPageSize; i++) owner(page)[i] = kForGood;
  }
  void want_interrupts(u16 queue, bool on, u8 more) {
    if (!tampered_) sides_[queue].driver->want_interrupt(on, more);
  }
  u64 interrupts() const { return interrupts_; }

 private:
  struct Side {
    Queue::Setup setup;
    std::unique_ptr<test::Driver> driver;
    std::unique_ptr<Queue> queue;
    std::map<u16, Request> out;
    u16 last = 0;
    u32 tables = 0;  // bits: those that requests take
  };
  static Queue::Setup setup(u16 index, u8 rings) {
    Queue::Setup s;
    s.index = index;
    s.size = (rings & 8) != 0 ? 4 : kEntries;
    const u64 base = kRam + kRing * index;
    s.descriptors = Gpa(base);
    s.driver = Gpa(base + 0x100);
    s.device = Gpa(base + 0x140);
    s.packed = (rings & 1) != 0;
    s.event_index = (rings & 2) != 0;
    s.indirect = (rings & 4) == 0;
    return s;
  }
  void start_queue(u16 index) {
    Side& side = sides_[index];
    side.out.clear();
    side.tables = 0;
    side.driver = std::make_unique<test::Driver>(guest_, side.setup);
    Queue::Hooks hooks;
    hooks.interrupt = [this] { interrupts_++; };
    hooks.device_broken = broken_;
    auto made = Queue::create(guest_.memory(), side.setup, kicks_[index].get(), hooks);
    check(bool(made), "no queue");
    side.queue = std::move(*made);
    areas(index, 1);
  }
  static constexpr u16 kForGood = 0x8000;
  static constexpr int kTables = 2;  // a queue
  static bool in_ram(const test::Buffer& b) { return b.length != 0 && b.address >= kRam && b.address < kRamEnd && b.length <= kRamEnd - b.address; }
  u16* owner(u64 gpa) { return owned_ + (gpa - kRam); }
  bool is_owned(const test::Buffer& b) {
    return in_ram(b) && std::any_of(owner(b.address), owner(b.address) + b.length, [](u16 n) { return n != 0; });
  }
  void own(const test::Buffer& b, int by) {
    if (in_ram(b)) count(b.address, b.length, by);
  }
  void count(u64 at, u64 length, int by) {
    for (u16* o = owner(at); o != owner(at) + length; o++) {
      if (*o < kForGood) *o = static_cast<u16>(*o + by);
    }
  }
  static bool meet(const test::Buffer& b, u64 at, u64 length) { return b.address < at + length && at < b.address + b.length; }
  /// Somebody writes there.
  void touch(u64 at, u64 length) {
    if (at < kData) tampered_ = true;
    const auto meets = [&](const test::Buffer& b) { return meet(b, at, length); };
    for (const Side& side : sides_) {
      for (const auto& [id, r] : side.out) {
        unsure_ |= std::any_of(r.readable.begin(), r.readable.end(), meets) || std::any_of(r.writable.begin(), r.writable.end(), meets);
      }
    }
  }
  void areas(u16 index, int by) {
    const Queue::Setup& s = sides_[index].setup;
    const auto bytes = ring::sizes(s.size, s.packed);
    count(s.device.value, bytes.device, by);
    if (s.packed) count(s.descriptors.value, bytes.descriptors, by);
  }
  void before() { std::memcpy(shadow_, guest_.at(kRam), sizeof shadow_); }
  void after() {
    if (tampered_ || (names_pages_ && unsure_)) return;
    constexpr u64 kPiece = 64;
    for (u64 at = 0; at < sizeof shadow_; at += kPiece) {
      if (std::memcmp(shadow_ + at, guest_.at(kRam + at), kPiece) == 0) continue;
      for (u64 i = at; i < at + kPiece; i++) {
        check(shadow_[i] == *guest_.at(kRam + i) || owned_[i] != 0, "the device changed what is not its own");
      }
    }
  }

  test::Guest guest_;
  UniqueFd kicks_[kMostQueues];
  Device* device_ = nullptr;
  std::shared_ptr<std::atomic<bool>> broken_;
  u16 owned_[kRamEnd - kRam] = {};  // by byte of RAM: how many buffers the device may write there
  std::vector<Side> sides_;
  u8 shadow_[kRamEnd - kRam];
  u8 canaries_[kPageSize];
  u64 next_ = kData;
  bool indirect_ = true, running_ = false, names_pages_ = false;
  bool tampered_ = false;     // rings may hold anything: nothing is expected of them any more
  bool unsure_ = false;
  u64 interrupts_ = 0;
};

}  // namespace ring3::virtio::fuzz
