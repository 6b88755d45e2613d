#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>

#include "engine/mmu/mmu.hpp"
#include "engine/mmu/test_support.hpp"

/// Writes to pages that hold code reach their observers, from one vCPU and from many.
namespace ring3::engine {
namespace {

using namespace test;

/// A second vCPU on a Machine's memory.
struct Vcpu {
  Vcpu(Machine& m, unsigned index) : mmu((state.reset(), state), m.memory, m.tracker, index) {
    mmu.set_code_observer(&observer);
    m.tracker.register_vcpu(index, &mmu, &attention, 4);
  }
  VcpuState state;
  FakeObserver observer;
  AttentionWord attention;
  Mmu mmu;
};

TEST(Tracker, OwnWritesAreReportedAfterTheStore) {
  Machine m;
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  ASSERT_TRUE(m.mmu->write<u32>(0x5000, 1));  // a write tag from before
  m.mmu->add_code_page(Gpa(0x5abc));
  ASSERT_TRUE(m.mmu->write<u32>(0x5010, 2));
  ASSERT_TRUE(m.mmu->write<u32>(0x6000, 2));
  ASSERT_EQ(observer.writes.size(), 1u);
  EXPECT_EQ(observer.writes[0].gpa, 0x5010u);
  EXPECT_EQ(observer.writes[0].size, 4u);
  EXPECT_EQ(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);
  EXPECT_NE(m.mmu->bulk_pointer(0x5000, false, 8), nullptr);
  Mmu::Rmw rmw;
  ASSERT_TRUE(m.mmu->rmw_begin(0x5020, 8, DS, &rmw));
  ASSERT_NE(rmw.host, nullptr);
  EXPECT_EQ(observer.writes.size(), 1u);
  ASSERT_TRUE(m.mmu->rmw_end(rmw, nullptr, 8));
  ASSERT_EQ(observer.writes.size(), 2u);
  EXPECT_EQ(observer.writes[1].gpa, 0x5020u);
  ASSERT_TRUE(m.mmu->write<u64>(0x4ffc, ~0ull));  // straddles: only the part inside
  ASSERT_EQ(observer.writes.size(), 3u);
  EXPECT_EQ(observer.writes[2].gpa, 0x5000u);
  EXPECT_EQ(observer.writes[2].size, 4u);
}

TEST(Tracker, ReleaseMakesStoresFastAgain) {
  Machine m;
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  Vcpu other(m, 1);
  m.mmu->add_code_page(Gpa(0x5000));
  other.mmu.add_code_page(Gpa(0x5000));
  m.mmu->release_code_page(Gpa(0x5000));
  EXPECT_EQ(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);  // the other one still holds it
  ASSERT_TRUE(m.mmu->write<u8>(0x5000, 1));
  EXPECT_TRUE(observer.writes.empty());
  other.mmu.release_code_page(Gpa(0x5000));
  EXPECT_NE(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);
  m.mmu->add_code_page(Gpa(0x5000));
  m.mmu->add_code_page(Gpa(0x7000));
  EXPECT_EQ(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);
  m.mmu->release_code_pages();
  EXPECT_NE(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);
  EXPECT_NE(m.mmu->bulk_pointer(0x7000, true, 8), nullptr);
  m.mmu->add_code_page(Gpa(0xfe000000));  // no RAM there: ignored
}

TEST(Tracker, OtherVcpusAreToldThroughTheirMailbox) {
  Machine m;
  Vcpu other(m, 1);
  other.mmu.add_code_page(Gpa(0x5000));
  ASSERT_TRUE(m.mmu->write<u16>(0x5ff0, 1));
  EXPECT_EQ(other.attention.bits.load(), 4u);
  EXPECT_TRUE(other.observer.writes.empty());
  m.tracker.enter_guest(1);  // serves
  ASSERT_EQ(other.observer.writes.size(), 1u);
  EXPECT_EQ(other.observer.writes[0].gpa, 0x5ff0u);
  EXPECT_EQ(other.attention.bits.load(), 0u);
  m.tracker.leave_guest(1);
  const u8 zero[0x3000] = {};
  ASSERT_TRUE(m.memory.write(Gpa(0x4000), zero, sizeof zero));
  m.tracker.host_wrote(Gpa(0x4000), sizeof zero);
  other.mmu.serve_requests();
  ASSERT_EQ(other.observer.writes.size(), 2u);
  EXPECT_EQ(other.observer.writes[1].gpa, 0x5000u);
  EXPECT_EQ(other.observer.writes[1].size, 0x1000u);
  for (unsigned i = 0; i < 1000; i++) {
    ASSERT_TRUE(m.mmu->write<u16>(0x5ff0, 1));
  }
  EXPECT_EQ(other.observer.flushes, 0u);
  other.mmu.serve_requests();
  EXPECT_EQ(other.observer.flushes, 1u);  // too many to list
  EXPECT_EQ(other.observer.writes.size(), 2u);
  EXPECT_NE(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);  // a flush releases
}

TEST(Tracker, MemslotChangeFlushesCode) {
  Machine m;
  Vcpu other(m, 1);
  other.mmu.add_code_page(Gpa(0x5000));
  m.tracker.memslots_changed();
  EXPECT_EQ(other.observer.flushes, 0u);
  m.tracker.enter_guest(1);
  EXPECT_EQ(other.observer.flushes, 1u);
  m.tracker.leave_guest(1);
  m.mmu->serve_requests();
  EXPECT_NE(m.mmu->bulk_pointer(0x5000, true, 8), nullptr);
}

TEST(Tracker, PagesShownTwiceAreOnePage) {
  Machine m;
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(0xf0000000), 0x10000, Hva(reinterpret_cast<u64>(m.at(0x20000)))),
            0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  observer.flushes = 0;
  ASSERT_TRUE(m.mmu->write<u8>(0x21000, 1));
  ASSERT_TRUE(m.mmu->write<u8>(0xf0001000, 1));
  m.mmu->add_code_page(Gpa(0xf0001000));
  ASSERT_TRUE(m.mmu->write<u8>(0x21010, 7));
  ASSERT_EQ(observer.writes.size(), 1u);
  EXPECT_EQ(observer.writes[0].gpa, 0xf0001010u);  // by the name under which it was decoded
  ASSERT_TRUE(m.mmu->write<u8>(0xf0001020, 7));
  ASSERT_EQ(observer.writes.size(), 2u);
  EXPECT_EQ(observer.writes[1].gpa, 0xf0001020u);
  m.mmu->release_code_page(Gpa(0xf0001000));
  EXPECT_NE(m.mmu->bulk_pointer(0x21000, true, 8), nullptr);
}

TEST(Tracker, PageTablesThatHoldCode) {
  Machine m;
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  PageTables t(m, PageTables::Mode::Long);
  t.map(0x400000, 0x10000, pte::P | pte::W);
  t.activate();
  const u64 at = t.entry(0x400000, 1);
  m.mmu->add_code_page(Gpa(at).page());
  ASSERT_TRUE(m.mmu->write<u8>(0x400000, 1));
  ASSERT_EQ(observer.writes.size(), 1u);
  EXPECT_EQ(observer.writes[0].gpa, at);
  EXPECT_EQ(observer.writes[0].size, 8u);
}

TEST(Tracker, SparseMemoryIsCheapToTrack) {
  Machine m;
  Mapping big = std::move(Mapping::anonymous(64ull << 30)).value();
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(1ull << 38), 64ull << 30, Hva(reinterpret_cast<u64>(big.data()))),
            0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  PageTables t(m, PageTables::Mode::Long);
  for (u64 i = 0; i < 64; i++) t.map(i << 30, (1ull << 38) + (i << 30), pte::P | pte::W, 1ull << 30);
  t.activate();
  for (u64 i = 0; i < 64; i++) {
    m.mmu->add_code_page(Gpa((1ull << 38) + (i << 30)));
    ASSERT_TRUE(m.mmu->write<u8>(i << 30, 1));
    ASSERT_EQ(observer.writes.size(), i + 1);
  }
}

/// Every vCPU decodes words from shared pages and writes to them. Each page holds one word; a decoder that
/// has "decoded" a word drops it when it is told of a write. After a write and the writer's message
/// has been served, no vCPU may still hold the old word.
///
/// Checked: at each block boundary (requests served), what a vCPU holds decoded is at least as new as every
/// write that was finished before it began to serve. Values only grow, so newness is a comparison.
struct Stress {
  static constexpr unsigned kPages = 6;
  static constexpr u64 kBase = 0x10000;
  std::atomic<u64> finished[kPages] = {};  ///< the newest value whose store returned
  std::atomic<u64> next{1};
  std::atomic<bool> stop{false};
  std::atomic<u64> decodes{0}, drops{0}, checks{0}, lost{0};
};

struct StressVcpu final : CodeObserver {
  StressVcpu(Machine& m, Stress& s, unsigned i)
      : machine(m), stress(s), index(i), mmu((state.reset(), state), m.memory, m.tracker, i) {
    mmu.set_code_observer(this);
    m.tracker.register_vcpu(i, &mmu, &attention, 1);
  }

  void code_written(Gpa gpa, unsigned) override {
    const unsigned p = static_cast<unsigned>((gpa.value - Stress::kBase) >> 12);
    if (held[p]) stress.drops++;
    held[p] = false;
    if ((rng() & 1) != 0) mmu.release_code_page(gpa.page()), added[p] = false;
  }
  void validate_page(Gpa, const u8*) override {}
  void code_flush() override {
    for (unsigned p = 0; p < Stress::kPages; p++) held[p] = added[p] = false;
  }

  void run(unsigned steps) {
    rng.seed(index + 1);
    machine.tracker.enter_guest(index);
    for (unsigned i = 0; i < steps && !stress.stop.load(std::memory_order_relaxed); i++) {
      // A block boundary.
      u64 before[Stress::kPages];
      for (unsigned p = 0; p < Stress::kPages; p++) before[p] = stress.finished[p].load();
      if (attention.bits.load() != 0) mmu.serve_requests();
      for (unsigned p = 0; p < Stress::kPages; p++) {
        if (!held[p]) continue;
        stress.checks++;
        if (value[p] < before[p]) stress.lost++;
      }
      const unsigned p = static_cast<unsigned>(rng() % Stress::kPages);
      const u64 at = Stress::kBase + p * 0x1000;
      switch (rng() % 8) {
        case 0:
        case 1:
          if (!held[p]) {
            mmu.add_code_page(Gpa(at));
            Gpa gpa;
            const u8* host = nullptr;
            if (!mmu.fetch(at, &gpa, &host)) stress.lost++;
            guest_load(reinterpret_cast<u64>(host), &value[p]);
            held[p] = added[p] = true;
            stress.decodes++;
          }
          break;
        case 2:
        case 3:
        case 4: {
          // Writers of a page take turns, so that its value only grows.
          if (turn[p].test_and_set(std::memory_order_acquire)) break;
          const u64 v = stress.next.fetch_add(1);
          bool ok;
          if (rng() & 1) {
            ok = mmu.write<u64>(at, v);
          } else {
            Mmu::Rmw rmw;
            ok = mmu.rmw_begin(at, 8, DS, &rmw);
            if (ok) guest_store(reinterpret_cast<u64>(rmw.host), v);
            ok = ok && mmu.rmw_end(rmw, &v, 8);
          }
          if (!ok) stress.lost++;
          stress.finished[p].store(v);
          turn[p].clear(std::memory_order_release);
          break;
        }
        case 5:
          if (!held[p] && added[p]) mmu.release_code_page(Gpa(at)), added[p] = false;
          break;
        case 6:
          machine.tracker.leave_guest(index);
          if (rng() % 8 == 0) std::this_thread::yield();
          machine.tracker.enter_guest(index);
          break;
        default:
          mmu.write<u64>(0x80000 + index * 0x1000, i);
          break;
      }
    }
    machine.tracker.leave_guest(index);
  }

  static std::atomic_flag turn[Stress::kPages];
  Machine& machine;
  Stress& stress;
  const unsigned index;
  VcpuState state;
  AttentionWord attention;
  Mmu mmu;
  std::mt19937 rng;
  u64 value[Stress::kPages] = {};
  bool held[Stress::kPages] = {};
  bool added[Stress::kPages] = {};
};
std::atomic_flag StressVcpu::turn[Stress::kPages] = {};

void run_stress(unsigned vcpus, unsigned steps, bool disturb) {
  Machine m;
  Stress s;
  std::vector<std::unique_ptr<StressVcpu>> all;
  for (unsigned i = 0; i < vcpus; i++) all.push_back(std::make_unique<StressVcpu>(m, s, i + 1));
  std::vector<std::thread> threads;
  for (auto& v : all) threads.emplace_back([&v, steps] { v->run(steps); });
  std::thread other;
  if (disturb) {
    other = std::thread([&] {
      Mapping extra = std::move(Mapping::anonymous(0x4000)).value();
      while (!s.stop.load()) {
        EXPECT_EQ(
            m.memory.set_region(5, 0, Gpa(0x80000000), 0x4000, Hva(reinterpret_cast<u64>(extra.data()))), 0);
        m.tracker.memslots_changed();
        m.tracker.dirty_log_changed();
        EXPECT_EQ(m.memory.set_region(5, 0, Gpa(0x80000000), 0, Hva(0)), 0);
        m.tracker.memslots_changed();
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
  }
  for (auto& t : threads) t.join();
  s.stop.store(true);
  if (other.joinable()) other.join();
  EXPECT_EQ(s.lost.load(), 0u);
  EXPECT_GT(s.decodes.load(), 100u);
  EXPECT_GT(s.drops.load(), 100u);
  EXPECT_GT(s.checks.load(), 1000u);
}

TEST(Tracker, NoInvalidationIsLost) { run_stress(4, 20000, false); }
TEST(Tracker, NoInvalidationIsLostWhileMemslotsChange) { run_stress(3, 10000, true); }
/// More vCPUs than bits in a page's word.
TEST(Tracker, NoInvalidationIsLostWithManyVcpus) { run_stress(20, 1500, false); }

/// Until the writer has stored again: so that the two sides interleave on a machine of any size.
void wait_for_progress(const std::atomic<u64>& written, bool wanted) {
  const u64 before = written.load();
  while (wanted && written.load() < before + 2) std::this_thread::yield();
}

/// Rounds of a test that needs many interleavings, but not at any price on a busy machine.
struct Rounds {
  unsigned left = 2000;
  std::chrono::steady_clock::time_point end = std::chrono::steady_clock::now() + std::chrono::seconds(2);
  bool next() { return left-- != 0 && std::chrono::steady_clock::now() < end; }
};

/// A store through a tag that a decoder's shootdown has not removed would be missed: two vCPUs pass a page
/// back and forth between writing fast and decoding.
TEST(Tracker, ShootdownWaitsForWriters) {
  Machine m;
  struct Quiet final : CodeObserver {
    std::atomic<bool> told{false};
    void code_written(Gpa, unsigned) override { told = true; }
    void validate_page(Gpa, const u8*) override {}
    void code_flush() override { told = true; }
  } observers[2];
  VcpuState states[2];
  AttentionWord attention[2];
  std::unique_ptr<Mmu> mmus[2];
  for (unsigned i = 0; i < 2; i++) {
    states[i].reset();
    mmus[i] = std::make_unique<Mmu>(states[i], m.memory, m.tracker, i + 1);
    mmus[i]->set_code_observer(&observers[i]);
    m.tracker.register_vcpu(i + 1, mmus[i].get(), &attention[i], 1);
  }
  std::atomic<bool> stop{false};
  std::atomic<u64> written{0};
  std::thread writer([&] {
    m.tracker.enter_guest(1);
    for (u64 v = 1; !stop.load(std::memory_order_relaxed); v++) {
      if (attention[0].bits.load() != 0) mmus[0]->serve_requests();
      mmus[0]->write<u64>(0x9000, v);
      written.store(v);
    }
    m.tracker.leave_guest(1);
  });
  m.tracker.enter_guest(2);
  u64 lost = 0, changed = 0;
  Rounds rounds;
  for (unsigned i = 0; rounds.next(); i++) {
    observers[1].told = false;
    mmus[1]->add_code_page(Gpa(0x9000));
    u64 seen = 0;
    guest_load(reinterpret_cast<u64>(m.at(0x9000)), &seen);
    wait_for_progress(written, i % 4 != 0);
    const u64 before = written.load();
    if (attention[1].bits.load() != 0) mmus[1]->serve_requests();
    if (seen < before) {
      changed++;
      if (!observers[1].told) lost++;
    }
    mmus[1]->release_code_page(Gpa(0x9000));
    mmus[1]->serve_requests();
  }
  m.tracker.leave_guest(2);
  stop = true;
  writer.join();
  EXPECT_EQ(lost, 0u);
  EXPECT_GT(changed, 3u);
}

/// After the dirty log was taken and dirty_log_changed() returned, every later store marks its page again.
TEST(Tracker, DirtyLogLosesNoStore) {
  Machine m;
  Mapping extra = std::move(Mapping::anonymous(0x4000)).value();
  ASSERT_EQ(m.memory.set_region(1, 1 /* KVM_MEM_LOG_DIRTY_PAGES */, Gpa(0x80000000), 0x4000,
                                Hva(reinterpret_cast<u64>(extra.data()))),
            0);
  VcpuState state;
  state.reset();
  AttentionWord attention;
  Mmu mmu(state, m.memory, m.tracker, 1);
  m.tracker.register_vcpu(1, &mmu, &attention, 1);
  std::atomic<bool> stop{false};
  std::atomic<u64> written{0};
  std::thread writer([&] {
    m.tracker.enter_guest(1);
    for (u64 v = 1; !stop.load(std::memory_order_relaxed); v++) {
      if (attention.bits.load() != 0) mmu.serve_requests();
      mmu.write<u64>(0x80001008, v);
      written.store(v);
    }
    m.tracker.leave_guest(1);
  });
  const auto content = [&] {
    u64 v = 0;
    guest_load(reinterpret_cast<u64>(extra.data() + 0x1008), &v);
    return v;
  };
  u64 after_last_log = 0, changes = 0, lost = 0;
  Rounds rounds;
  for (unsigned i = 0; rounds.next(); i++) {
    wait_for_progress(written, i % 4 != 0);
    const u64 before = content();
    u64 bits = 0;
    ASSERT_EQ(m.memory.get_dirty_log(1, &bits, false), 0);
    m.tracker.dirty_log_changed();
    // What changed between two logs was stored after the first one's dirty_log_changed() had returned.
    if (before != after_last_log) {
      changes++;
      if ((bits & 2) == 0) lost++;
    }
    after_last_log = content();
  }
  stop = true;
  writer.join();
  EXPECT_EQ(lost, 0u);
  EXPECT_GT(changes, 3u);
}

/// Who asks others to drop something returns only when they have, or are outside guest code.
TEST(Tracker, RequestsWaitForVcpusInGuestCode) {
  for (unsigned what = 0; what < 3; what++) {
    Machine m;
    Vcpu writer(m, 1), decoder(m, 2);
    ASSERT_TRUE(writer.mmu.write<u64>(0x9000, 1));
    m.tracker.enter_guest(1);
    std::atomic<bool> returned{false};
    u64 seen = 0;
    std::thread asker([&] {
      if (what == 0) {
        m.tracker.enter_guest(2);
        decoder.mmu.add_code_page(Gpa(0x9000));
        guest_load(reinterpret_cast<u64>(m.at(0x9000)), &seen);
        m.tracker.leave_guest(2);
      } else if (what == 1) {
        m.tracker.dirty_log_changed();
      } else {
        m.tracker.memslots_changed();
      }
      returned = true;
    });
    while (writer.attention.bits.load() == 0) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_FALSE(returned.load()) << what;
    EXPECT_TRUE(writer.mmu.write<u64>(0x9000, 2));  // through the tag of before
    if (what == 2) {
      m.tracker.leave_guest(1);
    } else {
      writer.mmu.serve_requests();
      EXPECT_EQ(writer.attention.bits.load(), 0u);
    }
    asker.join();
    if (what == 0) {
      EXPECT_EQ(seen, 2u);
      EXPECT_TRUE(decoder.observer.writes.empty());
      EXPECT_TRUE(writer.mmu.write<u64>(0x9000, 3));
      decoder.mmu.serve_requests();
      EXPECT_EQ(decoder.observer.writes.size(), 1u);
    }
    m.tracker.leave_guest(1);
  }
}

/// Two vCPUs that decode from each other's writable page at once do not wait for one another forever.
TEST(Tracker, DecodersServeEachOther) {
  Machine m;
  Vcpu a(m, 1), b(m, 2);
  std::atomic<unsigned> arrived{0};
  const auto run = [&](Vcpu& v, unsigned index, u64 mine, u64 other) {
    m.tracker.enter_guest(index);
    for (unsigned i = 0; i < 200; i++) {
      v.mmu.write<u64>(mine, i);
      arrived++;
      while (arrived.load() < 2 * (i + 1)) {
        v.mmu.serve_requests();  // in guest code
        std::this_thread::yield();
      }
      v.mmu.add_code_page(Gpa(other));
      v.mmu.release_code_page(Gpa(other));
      v.mmu.serve_requests();
    }
    m.tracker.leave_guest(index);
  };
  std::thread ta([&] { run(a, 1, 0x9000, 0xa000); });
  std::thread tb([&] { run(b, 2, 0xa000, 0x9000); });
  ta.join();
  tb.join();
  EXPECT_EQ(arrived.load(), 400u);
}

}  // namespace
}  // namespace ring3::engine
