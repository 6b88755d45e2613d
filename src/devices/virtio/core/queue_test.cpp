#include "devices/virtio/core/queue.hpp"

#include <gtest/gtest.h>

#include <unistd.h>

#include <random>
#include <thread>

#include "devices/virtio/core/event_loop.hpp"
#include "devices/virtio/core/test_driver.hpp"

namespace ring3::virtio {
namespace {

using test::Buffer;
using test::Driver;
using test::Guest;

struct Param {
  bool packed, event_index;
};

class Rings : public testing::TestWithParam<Param> {
 public:
  void make(u16 size, u32 memory_flags = 0) {
    guest = std::make_unique<Guest>(memory_flags);
    setup = Driver::layout(size, GetParam().packed, GetParam().event_index);
    driver = std::make_unique<Driver>(*guest, setup);
    kick.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    why.clear();
    interrupts = 0;
    Queue::Hooks hooks;
    hooks.interrupt = [this] { interrupts++; };
    hooks.broken = [this](const std::string& text) { why += text; };
    auto made = Queue::create(guest->memory(), setup, kick.get(), hooks);
    ASSERT_TRUE(made) << made.error().message;
    queue = std::move(*made);
  }
  // The offsets of descriptor fields, which differ between the two kinds.
  u64 descriptor(u16 i) const { return setup.descriptors.value + 16 * u64{i}; }
  u64 flags_at(u16 i) const { return descriptor(i) + (setup.packed ? 14 : 12); }

  std::unique_ptr<Guest> guest;
  Queue::Setup setup;
  std::unique_ptr<Driver> driver;
  UniqueFd kick;
  std::unique_ptr<Queue> queue;
  std::string why;
  int interrupts = 0;
  Chain chain;
};

TEST_P(Rings, ARequestGoesThereAndBack) {
  make(8);
  EXPECT_EQ(queue->pop(chain), Queue::Pop::kEmpty);
  std::memcpy(guest->at(0x20000), "hello", 5);
  const auto id = driver->add({{0x20000, 5, false}, {0x21000, 4, true}, {0x22000, 4, true}});
  ASSERT_TRUE(id);
  ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
  EXPECT_EQ(chain.readable_bytes(), 5u);
  EXPECT_EQ(chain.writable_bytes(), 8u);
  char text[8] = {};
  EXPECT_EQ(chain.read(1, text, 8), 4u);
  EXPECT_STREQ(text, "ello");
  EXPECT_EQ(chain.write(2, "wxyzuvWXYZ", 10), 6u);
  EXPECT_EQ(std::memcmp(guest->at(0x21002), "wx", 2), 0);
  EXPECT_EQ(std::memcmp(guest->at(0x22000), "yzuv", 4), 0);
  queue->complete(chain, 8);
  EXPECT_FALSE(driver->take());
  queue->notify();
  EXPECT_EQ(interrupts, 1);
  const auto done = driver->take();
  ASSERT_TRUE(done);
  EXPECT_EQ(done->id, *id);
  EXPECT_EQ(done->written, 8u);
  EXPECT_FALSE(driver->take());
  EXPECT_EQ(why, "");
}

TEST_P(Rings, ManyRandomRequestsOutOfOrder) {
  for (u16 size : {1, 2, 4, 16, 256}) {
    make(size);
    std::mt19937 random(size);
    std::vector<Chain> held;
    std::map<u16, u32> expected;  // id: bytes to be written
    u32 sent = 0, back = 0;
    for (int step = 0; step < 20000; step++) {
      switch (random() % 3) {
        case 0: {
          std::vector<Buffer> buffers;
          const u32 n = 1 + random() % 4;
          const u32 readable = random() % (n + 1);
          for (u32 i = 0; i < n; i++) buffers.push_back({0x20000 + random() % 0x8000, 1 + u32(random() % 100), i >= readable});
          // Each id has an indirect table of its own.
          const bool indirect = random() % 2 == 0;
          if (const auto id = driver->add(buffers, indirect ? 0x60000 + 64 * u64{sent % 1024} : 0)) {
            u32 writable = 0;
            for (const Buffer& b : buffers) writable += b.writable ? b.length : 0;
            ASSERT_EQ(expected.count(*id), 0u);
            expected[*id] = writable;
            sent++;
          }
          break;
        }
        case 1: {
          Chain c;
          const auto r = queue->pop(c);
          ASSERT_NE(r, Queue::Pop::kBroken) << why;
          if (r == Queue::Pop::kChain && random() % 8 == 0) {
            queue->put_back(c);
            ASSERT_EQ(queue->pop(c), Queue::Pop::kChain);
          }
          if (r == Queue::Pop::kChain) held.push_back(std::move(c));
          break;
        }
        default: {
          if (!held.empty()) {
            const std::size_t n = random() % held.size();
            queue->complete(held[n], static_cast<u32>(held[n].writable_bytes()));
            held.erase(held.begin() + static_cast<std::ptrdiff_t>(n));
          }
          if (random() % 2 == 0) queue->notify();
          while (const auto done = driver->take()) {
            ASSERT_EQ(expected.count(done->id), 1u);
            ASSERT_EQ(expected[done->id], done->written);
            expected.erase(done->id);
            back++;
          }
        }
      }
    }
    for (const Chain& c : held) queue->complete(c, static_cast<u32>(c.writable_bytes()));
    queue->notify();
    while (queue->pop(chain) == Queue::Pop::kChain) {
      queue->complete(chain, static_cast<u32>(chain.writable_bytes()));
      queue->notify();
    }
    while (driver->take()) back++;
    EXPECT_EQ(sent, back);
    EXPECT_GT(sent, 300u);
    EXPECT_EQ(why, "");
  }
}

TEST_P(Rings, SeveralAppearAtOnce) {
  make(8);
  for (int round = 0; round < 5; round++) {  // over the wrap
    Chain a, b, c;
    for (int i = 0; i < 3; i++) ASSERT_TRUE(driver->add({{0x20000, 16, true}}));
    ASSERT_EQ(queue->pop(a), Queue::Pop::kChain);
    ASSERT_EQ(queue->pop(b), Queue::Pop::kChain);
    ASSERT_EQ(queue->pop(c), Queue::Pop::kChain);
    queue->complete(a, 1);
    queue->complete(b, 2);
    queue->complete(c, 3);
    EXPECT_FALSE(driver->take());
    queue->publish();
    u32 sum = 0;
    while (const auto done = driver->take()) sum += done->written;
    EXPECT_EQ(sum, 6u);
  }
}

TEST_P(Rings, KicksAreOnlyWantedWhenAsked) {
  make(4);
  int wanted = 0;
  for (int i = 0; i < 40; i++) {
    queue->disable_kicks();
    ASSERT_TRUE(driver->add({{0x20000, 16, true}}));
    const bool early = driver->wants_kick();
    if (i > 0) {
      EXPECT_FALSE(early) << i;
    }
    EXPECT_TRUE(queue->enable_kicks());  // there is one
    ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
    EXPECT_FALSE(queue->enable_kicks());
    ASSERT_TRUE(driver->add({{0x20000, 16, true}}));
    wanted += driver->wants_kick();
    queue->complete(chain, 0);
    ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
    queue->complete(chain, 0);
    queue->notify();
    while (driver->take()) {
    }
  }
  EXPECT_EQ(wanted, 40);
}

TEST_P(Rings, InterruptsAreOnlySentWhenWanted) {
  make(8);
  const auto one = [&] {
    ASSERT_TRUE(driver->add({{0x20000, 16, true}}));
    ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
    queue->complete(chain, 0);
    queue->notify();
    ASSERT_TRUE(driver->take());
  };
  one();
  const int first = interrupts;
  driver->want_interrupt(false);
  for (int i = 0; i < 5; i++) one();
  EXPECT_EQ(interrupts, first);
  for (int round = 0; round < 20; round++) {
    driver->want_interrupt(true);
    const int before = interrupts;
    one();
    EXPECT_EQ(interrupts, before + 1);
    if (!GetParam().event_index) continue;
    one();  // the event lies behind: no more until asked for again
    EXPECT_EQ(interrupts, before + 1) << round;
    driver->want_interrupt(true, 2);
    one();
    one();
    EXPECT_EQ(interrupts, before + 1);
    one();
    EXPECT_EQ(interrupts, before + 2);
  }
  const int before = interrupts;
  queue->notify();  // nothing new
  EXPECT_EQ(interrupts, before);
}

TEST_P(Rings, ABufferMayCrossSlots) {
  make(4);
  ASSERT_TRUE(driver->add({{Guest::kSlot - 100, 200, true}}));
  ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
  EXPECT_EQ(chain.writable_bytes(), 200u);
  EXPECT_EQ(chain.writable().size(), 2u);
}

TEST_P(Rings, WhatIsWrittenIsMarkedDirty) {
  make(4, KVM_MEM_LOG_DIRTY_PAGES);
  ASSERT_TRUE(driver->add({{0x30000, 3 * 4096, true}, {0x50000, 4096, true}}));
  std::vector<u64> log(Guest::kSlot / 4096 / 64);
  ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
  queue->complete(chain, 4097);
  queue->notify();
  ASSERT_EQ(guest->memory().get_dirty_log(0, log.data(), false), 0);
  const auto dirty = [&](u64 gpa) { return (log[gpa / 4096 / 64] >> (gpa / 4096 % 64) & 1) != 0; };
  EXPECT_TRUE(dirty(0x30000));
  EXPECT_TRUE(dirty(0x31000));
  EXPECT_FALSE(dirty(0x32000));
  EXPECT_FALSE(dirty(0x50000));
  EXPECT_TRUE(dirty(setup.packed ? setup.descriptors.value : setup.device.value));
}

TEST_P(Rings, WhatIsWrittenIsTold) {
  make(4);
  std::vector<std::pair<u64, u64>> stored;
  guest->memory().observe_stores([&](Gpa start, u64 size) { stored.emplace_back(start.value, size); });
  ASSERT_TRUE(driver->add({{Guest::kSlot - 100, 200, true}, {0x50000, 4096, true}}));
  ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
  queue->fail("on purpose");
  EXPECT_TRUE(stored.empty());
  queue->complete(chain, 250);  // the bytes are there, though nobody will be told
  const std::vector<std::pair<u64, u64>> expected{{Guest::kSlot - 100, 100}, {Guest::kSlot, 100}, {0x50000, 50}};
  EXPECT_EQ(stored, expected);
  queue->complete(chain, 0);
  EXPECT_EQ(stored, expected);
  guest->memory().observe_stores(nullptr);
}

TEST_P(Rings, HostileRings) {
  struct Case {
    const char* name;
    std::function<void(Rings&)> harm;
  };
  const auto buffer = [](u64 address, u32 length, bool writable = false) {
    return [=](Rings& t) { t.driver->add({{address, length, writable}}); };
  };
  const std::vector<Case> cases = {
      {"outside of RAM", buffer(2 * Guest::kSlot, 1)},
      {"end outside of RAM", buffer(2 * Guest::kSlot - 1, 2)},
      {"address overflows", buffer(~u64{0} - 3, 8)},
      {"writable before readable", [](Rings& t) { t.driver->add({{0x20000, 4, true}, {0x21000, 4, false}}); }},
      {"indirect length 0", [](Rings& t) { t.driver->add({{0x20000, 4, false}}, 0x60000); t.guest->put<u32>(t.descriptor(0) + 8, 0); }},
      {"indirect length odd", [](Rings& t) { t.driver->add({{0x20000, 4, false}}, 0x60000); t.guest->put<u32>(t.descriptor(0) + 8, 17); }},
      {"indirect outside", [](Rings& t) { t.driver->add({{0x20000, 4, false}}, 0x60000); t.guest->put<u64>(t.descriptor(0), 3 * Guest::kSlot); }},
      {"indirect overflows", [](Rings& t) { t.driver->add({{0x20000, 4, false}}, 0x60000); t.guest->put<u64>(t.descriptor(0), ~u64{0} - 7); }},
      {"indirect huge", [](Rings& t) { t.driver->add({{0x20000, 0, false}}, 0x60000); std::memset(t.guest->at(0x60010), 0, 0x10000);
         for (u64 i = 0; i < 4096 && !t.setup.packed; i++) t.guest->put<u16>(0x60000 + 16 * i + 12, 1), t.guest->put<u16>(0x60000 + 16 * i + 14, static_cast<u16>(i + 1));
         t.guest->put<u32>(t.descriptor(0) + 8, 0x10000); }},
      {"indirect and next", [](Rings& t) { t.driver->add({{0x20000, 4, false}}, 0x60000); t.guest->put<u16>(t.flags_at(0), static_cast<u16>(t.guest->get<u16>(t.flags_at(0)) | 1)); }},
      {"nested indirect", [](Rings& t) { t.driver->add({{0x20000, 16, false}}, 0x60000); t.guest->put<u16>(0x60000 + (t.setup.packed ? 14 : 12), 4); }},
      {"too many bytes", [](Rings& t) { std::vector<Buffer> all(4, Buffer{0, u32{2} << 30, false}); t.driver->add(all); }},
  };
  for (const Case& c : cases) {
    make(4);
    // Descriptor 0 is the first that the driver uses.
    c.harm(*this);
    EXPECT_EQ(queue->pop(chain), Queue::Pop::kBroken) << c.name;
    EXPECT_NE(why, "") << c.name;
    const std::string once = why;
    EXPECT_EQ(queue->pop(chain), Queue::Pop::kBroken);
    EXPECT_EQ(why, once);
    queue->complete(chain, 1);
    queue->notify();
    EXPECT_FALSE(driver->take());
    EXPECT_FALSE(queue->enable_kicks());
  }
}

TEST_P(Rings, SplitOnly) {
  if (GetParam().packed) return;
  struct Case {
    const char* name;
    std::function<void()> harm;
  };
  const std::vector<Case> cases = {
      {"loop of one", [&] { guest->put<u16>(flags_at(0), 1); guest->put<u16>(descriptor(0) + 14, 0); }},
      {"loop of two", [&] { guest->put<u16>(flags_at(0), 1); guest->put<u16>(descriptor(0) + 14, 1);
                            guest->put<u16>(flags_at(1), 1); guest->put<u16>(descriptor(1) + 14, 0); }},
      {"next outside", [&] { guest->put<u16>(flags_at(0), 1); guest->put<u16>(descriptor(0) + 14, 4); }},
      {"head outside", [&] { guest->put<u16>(setup.driver.value + 4, 4); }},
      {"index jumps", [&] { guest->put<u16>(setup.driver.value + 2, 6); }},
      {"loop in an indirect table", [&] { guest->put<u16>(flags_at(0), 4); guest->put<u64>(descriptor(0), 0x60000); guest->put<u32>(descriptor(0) + 8, 32);
                                          guest->put<u16>(0x6000c, 1); guest->put<u16>(0x6000e, 1); guest->put<u16>(0x6001c, 1); guest->put<u16>(0x6001e, 0); }},
      {"out of an indirect table", [&] { guest->put<u16>(flags_at(0), 4); guest->put<u64>(descriptor(0), 0x60000); guest->put<u32>(descriptor(0) + 8, 32);
                                         guest->put<u16>(0x6000c, 1); guest->put<u16>(0x6000e, 2); }},
  };
  for (const Case& c : cases) {
    make(4);
    ASSERT_TRUE(driver->add({{0x20000, 4, false}}));
    c.harm();
    EXPECT_EQ(queue->pop(chain), Queue::Pop::kBroken) << c.name;
    EXPECT_NE(why, "") << c.name;
  }
}

TEST_P(Rings, TheSameHeadForEver) {
  make(4);
  ASSERT_TRUE(driver->add({{0x20000, 4, false}}));
  std::vector<Chain> held;
  Queue::Pop r = Queue::Pop::kChain;
  for (u16 i = 1; i < 100 && r == Queue::Pop::kChain; i++) {
    held.emplace_back();
    r = queue->pop(held.back());
    if (setup.packed) {  // available again at once, in every round
      for (u16 k = 0; k < 4; k++) guest->put<u16>(flags_at(k), static_cast<u16>((i / 4) % 2 == 0 ? ring::kAvail : ring::kUsed));
    } else {
      guest->put<u16>(setup.driver.value + 2, static_cast<u16>(i + 1));
    }
  }
  EXPECT_EQ(r, Queue::Pop::kBroken);
  EXPECT_LE(held.size(), 5u);
}

TEST_P(Rings, BadSetups) {
  make(4);
  const auto refused = [&](Queue::Setup s) { return !Queue::create(guest->memory(), s, kick.get(), {}).ok(); };
  Queue::Setup s = setup;
  s.size = 0;
  EXPECT_TRUE(refused(s));
  s.size = 2048;
  EXPECT_TRUE(refused(s));
  s.size = 3;
  EXPECT_EQ(refused(s), !setup.packed);
  for (int field = 0; field < 3; field++) {
    for (u64 value : {u64{0x20001}, 2 * Guest::kSlot, Guest::kSlot * 2 - 4, ~u64{0} & ~u64{15}}) {
      s = setup;
      (field == 0 ? s.descriptors : field == 1 ? s.driver : s.device) = Gpa(value);
      if (setup.packed && field != 0 && value == Guest::kSlot * 2 - 4) continue;  // four bytes are all there are
      EXPECT_TRUE(refused(s)) << field << " " << value;
    }
  }
}

TEST_P(Rings, RingsFollowTheirSlot) {
  make(4);
  ASSERT_TRUE(driver->add({{0x20000, 4, false}}));
  ASSERT_EQ(guest->memory().set_region(0, 0, Gpa(0), 0, Hva(0)), 0);
  EXPECT_EQ(queue->pop(chain), Queue::Pop::kBroken);
}

TEST_P(Rings, StateIsCarriedOver) {
  make(4);
  for (int i = 0; i < 7; i++) {
    ASSERT_TRUE(driver->add({{0x20000, 4, true}}));
    ASSERT_EQ(queue->pop(chain), Queue::Pop::kChain);
    queue->complete(chain, 4);
    queue->notify();
    ASSERT_TRUE(driver->take());
    const auto state = queue->state();
    auto next = Queue::create(guest->memory(), setup, kick.get(), {});
    ASSERT_TRUE(next);
    queue = std::move(*next);
    queue->set_state(state);
  }
}

// Another thread changes RAM all the time: nothing may crash (ASan and UBSan watch), whatever comes out.
TEST_P(Rings, FlippedBitsMeanwhile) {
  make(16);
  std::atomic<bool> end{false};
  std::thread flipper([&] {
    std::mt19937_64 random(5);
    while (!end.load(std::memory_order_relaxed)) {
      const u64 r = random();
      const u64 base = (r & 1) != 0 ? setup.descriptors.value : (r & 2) != 0 ? setup.driver.value : 0x60000;
      __atomic_fetch_xor(guest->at(base + (r >> 8) % 300), static_cast<u8>(1u << (r >> 4 & 7)), __ATOMIC_RELAXED);
    }
  });
  std::mt19937 random(7);
  for (int round = 0; round < 2000; round++) {
    auto made = Queue::create(guest->memory(), setup, kick.get(), {});
    ASSERT_TRUE(made);
    queue = std::move(*made);
    queue->set_state({static_cast<u16>(random()), static_cast<u16>(random()), true, true});
    for (int i = 0; i < 20; i++) {
      if (queue->pop(chain) != Queue::Pop::kChain) break;
      u8 bytes[64];
      (void)chain.read(0, bytes, sizeof bytes);
      (void)chain.write(0, bytes, 4);
      queue->complete(chain, 4);
      queue->notify();
      (void)queue->enable_kicks();
    }
  }
  end.store(true);
  flipper.join();
}

INSTANTIATE_TEST_SUITE_P(All, Rings, testing::Values(Param{false, false}, Param{false, true}, Param{true, false}, Param{true, true}),
                         [](const auto& i) { return std::string(i.param.packed ? "Packed" : "Split") + (i.param.event_index ? "EventIndex" : ""); });

TEST(EventLoop, ServesDescriptorsAndTasks) {
  EventLoop loop;
  const UniqueFd fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  std::atomic<int> seen{0}, tasks{0};
  ASSERT_TRUE(loop.add(fd.get(), 1 /* EPOLLIN */, [&](u32) {
    u64 n;
    if (::read(fd.get(), &n, sizeof n) == sizeof n) seen += static_cast<int>(n);
  }));
  ASSERT_TRUE(loop.start("test"));
  const u64 three = 3;
  ASSERT_EQ(::write(fd.get(), &three, sizeof three), 8);
  loop.post([&] { tasks++; });
  for (int i = 0; i < 2000 && (seen != 3 || tasks != 1); i++) usleep(1000);
  EXPECT_EQ(seen, 3);
  EXPECT_EQ(tasks, 1);
  loop.stop();
  EXPECT_FALSE(loop.running());
  ASSERT_TRUE(loop.start("again"));
}

}  // namespace
}  // namespace ring3::virtio
