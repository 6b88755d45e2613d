#include "engine/mmu/window.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "engine/mmu/test_support.hpp"

/// What is mapped in a host window, with which rights, and what takes it out again.
namespace ring3::engine {
namespace {

using namespace test;
using Mode = PageTables::Mode;

/// By the kernel, which tells where a plain access would fault.
bool readable(u64 host) {
  u8 byte;
  iovec to{&byte, 1}, from{reinterpret_cast<void*>(host), 1};
  return ::process_vm_readv(::getpid(), &to, 1, &from, 1, 0) == 1;
}
bool writable(u64 host) {
  u8 byte;
  if (!readable(host)) return false;
  std::memcpy(&byte, reinterpret_cast<void*>(host), 1);
  iovec from{&byte, 1}, to{reinterpret_cast<void*>(host), 1};
  return ::process_vm_writev(::getpid(), &from, 1, &to, 1, 0) == 1;
}

constexpr u64 kLow = 0x400000, kStack = 0x7ffd12345000;

struct WindowTest : testing::Test {
  Mapping ram = std::move(Mapping::shared_anonymous(1 << 20)).value();
  Window window;
  u64 host(unsigned page) { return reinterpret_cast<u64>(ram.data()) + page * kPageSize; }
  u64 at(u64 linear) { return linear + window.deltas()[linear >> Window::kRegionShift]; }
};

TEST_F(WindowTest, RegionsThatAreNotOpenMakeNoAddress) {
  for (u64 region = 0; region < Window::kRegions; region++) {
    const u64 delta = window.deltas()[region];
    EXPECT_TRUE(Window::is_no_delta(delta));
    EXPECT_EQ(Window::region_of(delta), region);
    for (u64 offset : {u64{0}, Window::kRegionSize - 1}) {
      const u64 sum = (region << Window::kRegionShift) + offset + delta;
      EXPECT_NE(sum >> 47, 0u);
      EXPECT_NE(sum >> 47, 0x1ffffu);
    }
  }
  EXPECT_FALSE(window.open_region(1ull << 47));
}

/// Whatever there is of them already, the two regions' addresses are one constant away, and nobody else's.
TEST_F(WindowTest, TwinsHaveOneConstant) {
  constexpr u64 kProgram = 0x555555554000;
  std::vector<std::unique_ptr<Window>> several;
  std::vector<std::pair<u64, u64>> taken;
  for (unsigned n = 0; n < 6; n++) {
    Window& w = *several.emplace_back(std::make_unique<Window>());
    ASSERT_TRUE(w.open_region(kLow));
    ASSERT_TRUE(w.open_region(n % 2 != 0 ? kProgram : kStack));
    ASSERT_TRUE(w.open_region(kProgram));
    EXPECT_EQ(w.deltas()[Window::kPrograms], w.deltas()[Window::kStacks]);
    for (u64 region : {Window::kPrograms, Window::kStacks}) {
      const u64 from = (region << Window::kRegionShift) + w.deltas()[region] - Window::kGuard;
      const u64 to = from + Window::kRegionSize + 2 * Window::kGuard;
      for (const auto& [a, b] : taken) EXPECT_TRUE(to <= a || b <= from);
      taken.emplace_back(from, to);
      for (u64 at : {from, from + Window::kGuard, to - kPageSize}) EXPECT_FALSE(readable(at));
    }
    ASSERT_TRUE(w.map(kProgram, host(1), 1, true, kPageShift));
    u64 linear = 0;
    ASSERT_TRUE(w.linear_of(kProgram + w.deltas()[Window::kPrograms] + 9, &linear));
    EXPECT_EQ(linear, kProgram + 9);
  }
}

/// A process has room for a few windows; the one that finds none says so, and takes nothing.
TEST_F(WindowTest, NoRoomForTwins) {
  std::vector<std::unique_ptr<Window>> several;
  bool open = true;
  while (open && several.size() < 64) open = several.emplace_back(std::make_unique<Window>())->open_region(kStack);
  ASSERT_FALSE(open);
  EXPECT_GT(several.size(), 6u);
  Window& last = *several.back();
  EXPECT_TRUE(last.full());
  EXPECT_FALSE(last.has_region(Window::kPrograms) || last.has_region(Window::kStacks));
  several.front()->close();
  EXPECT_TRUE(last.open_region(kStack));
}

TEST_F(WindowTest, ShowsThePageAndNothingBesideIt) {
  ASSERT_TRUE(window.open_region(kLow));
  ASSERT_TRUE(window.open_region(kStack));
  ASSERT_TRUE(window.map(kLow, host(3), 2, false, kPageShift));
  ASSERT_TRUE(window.map(kStack, host(3), 1, true, kPageShift));
  std::memset(reinterpret_cast<void*>(host(3)), 0x5a, 1);
  EXPECT_EQ(*reinterpret_cast<volatile u8*>(at(kLow)), 0x5a);
  *reinterpret_cast<volatile u8*>(at(kStack)) = 0x77;
  EXPECT_EQ(*reinterpret_cast<volatile u8*>(at(kLow)), 0x77);
  EXPECT_FALSE(writable(at(kLow)));
  EXPECT_FALSE(readable(at(kLow) - 1));
  EXPECT_FALSE(readable(at(kLow) + 2 * kPageSize));
  EXPECT_FALSE(readable(at(kStack) + kPageSize));
  u64 linear = 0;
  ASSERT_TRUE(window.linear_of(at(kStack) + 5, &linear));
  EXPECT_EQ(linear, kStack + 5);
  EXPECT_FALSE(window.linear_of(host(3), &linear));
}

TEST_F(WindowTest, RightsComeAndGo) {
  ASSERT_TRUE(window.open_region(kLow));
  ASSERT_TRUE(window.map(kLow, host(0), 4, true, kPageShift));
  ASSERT_TRUE(window.map(kLow + 8 * kPageSize, host(1), 1, true, kPageShift));
  window.drop_writes_to(host(1));
  EXPECT_TRUE(writable(at(kLow)));
  EXPECT_FALSE(writable(at(kLow + kPageSize)));
  EXPECT_TRUE(readable(at(kLow + kPageSize)));
  EXPECT_FALSE(writable(at(kLow + 8 * kPageSize)));
  ASSERT_TRUE(window.map(kLow + kPageSize, host(1), 1, true, kPageShift));
  EXPECT_TRUE(writable(at(kLow + kPageSize)));
  window.drop_writes();
  for (u64 n = 0; n < 4; n++) EXPECT_FALSE(writable(at(kLow + n * kPageSize)));
  window.unmap(kLow + 2 * kPageSize);
  EXPECT_TRUE(readable(at(kLow + kPageSize)));
  EXPECT_FALSE(readable(at(kLow + 2 * kPageSize)));
  EXPECT_TRUE(readable(at(kLow + 3 * kPageSize)));
  window.retain([&](u64 page, const Window::Page&) { return page == kLow; });
  EXPECT_TRUE(readable(at(kLow)));
  EXPECT_FALSE(readable(at(kLow + 3 * kPageSize)));
  EXPECT_EQ(window.pages().size(), 1u);
  const u64 was = at(kLow);
  window.close();
  EXPECT_FALSE(readable(was));
  EXPECT_TRUE(window.pages().empty());
}

TEST_F(WindowTest, AllOfALargePageGoes) {
  constexpr u64 kLarge = 1 << 21;
  ASSERT_TRUE(window.open_region(kLow));
  ASSERT_TRUE(window.map(kLow, host(0), 4, true, 21));
  ASSERT_TRUE(window.map(kLow + kLarge, host(8), 1, true, 21));
  window.unmap(kLow + 100 * kPageSize);  // not mapped itself
  EXPECT_EQ(window.pages().size(), 1u);
  EXPECT_TRUE(readable(at(kLow + kLarge)));
}

TEST_F(WindowTest, PrivateMemoryIsRefused) {
  Mapping own = std::move(Mapping::anonymous(1 << 20)).value();
  ASSERT_TRUE(window.open_region(kLow));
  EXPECT_FALSE(window.map(kLow, reinterpret_cast<u64>(own.data()), 1, true, kPageShift));
  EXPECT_TRUE(window.full());
  EXPECT_FALSE(readable(at(kLow)));
}

/// The host's mappings are bounded: scattered pages run out of them, and the process does not.
TEST_F(WindowTest, ScatteredPagesFillIt) {
  ASSERT_TRUE(window.open_region(kLow));
  u64 mapped = 0;
  while (window.map(kLow + 2 * mapped * kPageSize, host(mapped % 200), 1, true, kPageShift)) mapped++;
  EXPECT_GT(mapped, 10'000u);
  EXPECT_TRUE(window.full());
  void* one = ::mmap(nullptr, kPageSize, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT_NE(one, MAP_FAILED);
  ::munmap(one, kPageSize);
  window.close();
  ASSERT_TRUE(window.open_region(kLow));
  EXPECT_TRUE(window.map(kLow, host(0), 1, true, kPageShift));
}

TEST_F(WindowTest, HolesInOneMappingFillItToo) {
  Mapping large = std::move(Mapping::shared_anonymous(600u << 20)).value();
  constexpr unsigned kPages = (600u << 20) / kPageSize, kRun = 256;
  ASSERT_TRUE(window.open_region(kLow));
  for (unsigned n = 0; n < kPages; n += kRun)
    ASSERT_TRUE(window.map(kLow + n * kPageSize, reinterpret_cast<u64>(large.data()) + n * kPageSize, kRun, false, kPageShift));
  for (unsigned n = 0; n < kPages; n += 2) window.unmap(kLow + n * kPageSize);
  EXPECT_TRUE(window.full());
  EXPECT_LT(window.pages().size(), kPages / 2);
}

/// Through the Mmu: a window holds what the TLB would.
struct MmuWindowTest : testing::Test {
  struct SharedMachine : Machine {
    Mapping shared;
    SharedMachine() : Machine(1 << 20), shared(std::move(Mapping::shared_anonymous(64 << 20)).value()) {
      std::swap(ram, shared);
      memory.set_region(0, 0, Gpa(0), 0, Hva(0));
      memory.set_region(0, 0, Gpa(0), 64 << 20, Hva(reinterpret_cast<u64>(ram.data())));
      mmu.reset();
      mmu = std::make_unique<Mmu>(state, memory, tracker, 0);
    }
  };
  SharedMachine m;
  PageTables t{m, Mode::Long};
  u64 deltas[Window::kRegions] = {};
  static constexpr u64 kU = pte::P | pte::U, kUW = kU | pte::W;

  MmuWindowTest() {
    t.activate(cr0::WP, cr4::PGE | cr4::PCIDE);
    m.set_cpl(3);
  }
  u64 at(u64 linear) { return linear + deltas[linear >> Window::kRegionShift]; }
  bool dirty(u64 linear) { return (t.load(t.entry(linear, 1)) & pte::D) != 0; }
};

TEST_F(MmuWindowTest, FollowsThePageTablesAsTheTlbDoes) {
  t.map(kLow, 0x800000, kUW);
  t.map(kLow + kPageSize, 0x801000, kU);
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::None);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::Ready);
  ASSERT_TRUE(m.mmu->warm_window(at(kLow), false));
  EXPECT_TRUE(readable(at(kLow)));
  EXPECT_FALSE(writable(at(kLow)));  // or the dirty flag would be missing
  EXPECT_FALSE(dirty(kLow));
  ASSERT_TRUE(m.mmu->warm_window(at(kLow), true));
  EXPECT_TRUE(writable(at(kLow)));
  EXPECT_TRUE(dirty(kLow));
  EXPECT_FALSE(m.mmu->warm_window(at(kLow) + kPageSize, true));
  EXPECT_FALSE(m.mmu->warm_window(at(kLow) + 2 * kPageSize, false));
  // An access that may go on in a page that faults sets no flag.
  t.map(kLow + 8 * kPageSize, 0x808000, kUW);
  EXPECT_FALSE(m.mmu->warm_window(at(kLow) + 9 * kPageSize - 4, true));
  EXPECT_FALSE(dirty(kLow + 8 * kPageSize));
  // Once an access that does not go on there has set it, the page is mapped: its end may be read for as long as the program runs.
  ASSERT_TRUE(m.mmu->write(kLow + 9 * kPageSize - 4, u32{1}));
  EXPECT_TRUE(m.mmu->warm_window(at(kLow) + 9 * kPageSize - 4, true));
  m.mmu->flush_page(kLow);
  EXPECT_FALSE(readable(at(kLow)));
}

TEST_F(MmuWindowTest, PeeksWhereThePageIsAtHand) {
  t.map(kLow, 0x800000, kUW);
  u64 value = 0;
  EXPECT_FALSE(m.mmu->peek(kLow + 8, &value, 8));
  EXPECT_EQ(t.load(t.entry(kLow, 1)) & pte::A, 0u);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  ASSERT_TRUE(m.mmu->warm_window(at(kLow), true));
  *reinterpret_cast<u64*>(at(kLow) + 8) = 0x1122334455667788;
  EXPECT_TRUE(m.mmu->peek(kLow + 8, &value, 8));
  EXPECT_EQ(value, 0x1122334455667788u);
  EXPECT_TRUE(m.mmu->peek(kLow + 8, &value, 2));
  EXPECT_EQ(value, 0x7788u);
  EXPECT_FALSE(m.mmu->peek(kLow + kPageSize - 4, &value, 8));
  EXPECT_FALSE(m.mmu->peek(kLow + 8, &value, 9));
}

TEST_F(MmuWindowTest, WhatIsForeseenSetsNoFlag) {
  t.map(kLow, 0x800000, kUW);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  EXPECT_FALSE(m.mmu->foresee_window(at(kLow), true));
  EXPECT_FALSE(m.mmu->foresee_window(at(kLow), false));
  EXPECT_FALSE(readable(at(kLow)));
  EXPECT_EQ(t.load(t.entry(kLow, 1)) & (pte::A | pte::D), 0u);
  t.map(kLow, 0x800000, kUW | pte::A);
  (void)m.mmu->warm_window(at(kLow), false);  // the flags of the tables above it
  EXPECT_FALSE(m.mmu->foresee_window(at(kLow), true));
  EXPECT_FALSE(dirty(kLow));
  t.map(kLow, 0x800000, kUW | pte::A | pte::D);
  EXPECT_TRUE(m.mmu->foresee_window(at(kLow), true));
  EXPECT_TRUE(writable(at(kLow)));
}

TEST_F(MmuWindowTest, FlushesAreMadeGoodBeforeItIsUsedAgain) {
  for (u64 n = 0; n < 4; n++) {
    t.map(kLow + n * kPageSize, 0x800000 + n * kPageSize, kUW);
  }
  ASSERT_TRUE(m.mmu->open_window(deltas));
  for (u64 n = 0; n < 4; n++) ASSERT_TRUE(m.mmu->warm_window(at(kLow) + n * kPageSize, true));
  t.map(kLow, 0x900000, kUW);                                       // elsewhere
  t.map(kLow + kPageSize, 0x801000, kU | pte::A);                   // read-only
  t.map(kLow + 2 * kPageSize, 0x802000, kUW | pte::A);              // clean again
  m.mmu->set_cr3(t.root(), false);
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::Stale);
  m.mmu->refresh_window();
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::Ready);
  EXPECT_FALSE(readable(at(kLow)));
  EXPECT_TRUE(readable(at(kLow) + kPageSize));
  EXPECT_FALSE(writable(at(kLow) + kPageSize));
  EXPECT_TRUE(readable(at(kLow) + 2 * kPageSize));
  EXPECT_FALSE(writable(at(kLow) + 2 * kPageSize));
  EXPECT_TRUE(writable(at(kLow) + 3 * kPageSize));
}

TEST_F(MmuWindowTest, BelongsToOneAddressSpaceInUserMode) {
  t.map(kLow, 0x800000, kUW);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  m.mmu->set_cr3(t.root() | 5, true);
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::None);
  m.mmu->set_cr3(t.root(), true);
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::Ready);
  m.set_cpl(0);
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::None);
  EXPECT_FALSE(m.mmu->open_window(deltas));
}

TEST_F(MmuWindowTest, CodePagesTakeNoWrites) {
  t.map(kLow, 0x800000, kUW);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  ASSERT_TRUE(m.mmu->warm_window(at(kLow), true));
  m.mmu->add_code_page(Gpa(0x800000));
  EXPECT_FALSE(writable(at(kLow)));
  EXPECT_TRUE(readable(at(kLow)));
  EXPECT_FALSE(m.mmu->warm_window(at(kLow), true));
  m.mmu->release_code_page(Gpa(0x800000));
  EXPECT_TRUE(m.mmu->warm_window(at(kLow), true));
  EXPECT_TRUE(writable(at(kLow)));
}

TEST_F(MmuWindowTest, MemslotsTakeItAway) {
  t.map(kLow, 0x800000, kUW);
  AttentionWord attention;
  m.tracker.register_vcpu(0, m.mmu.get(), &attention, 1);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  ASSERT_TRUE(m.mmu->warm_window(at(kLow), true));
  const u64 was = at(kLow);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  EXPECT_EQ(m.mmu->window(), Mmu::WindowState::None);
  EXPECT_FALSE(readable(was));
  EXPECT_TRUE(Window::is_no_delta(deltas[0]));
  m.tracker.unregister_vcpu(0);
}

TEST_F(MmuWindowTest, HasWhatItMayHave) {
  t.map(kLow, 0x800000, kUW);
  t.map(kLow + 40 * kPageSize, 0x900000, kUW);
  t.map(0x40000000, 0x1000000, kUW, 2 << 20);
  const u64 host = reinterpret_cast<u64>(m.ram.data());
  const HostRange range{host + 0x800000, host + 0x801000};
  m.tracker.restrict_windows({range});
  ASSERT_TRUE(m.mmu->open_window(deltas));
  EXPECT_TRUE(m.mmu->warm_window(at(kLow), true));
  EXPECT_FALSE(m.mmu->window_full());
  EXPECT_FALSE(m.mmu->warm_window(at(kLow) + 40 * kPageSize, true));
  EXPECT_FALSE(readable(at(kLow) + 40 * kPageSize));
  EXPECT_TRUE(m.mmu->window_full());  // and so the window goes
  EXPECT_FALSE(m.mmu->warm_window(at(0x40000000) + 77 * kPageSize, true));
  EXPECT_FALSE(readable(at(0x40000000) + 77 * kPageSize));
  // Not any more: what is mapped goes with the memslots' change, and does not come again.
  AttentionWord attention;
  m.tracker.register_vcpu(0, m.mmu.get(), &attention, 1);
  const u64 was = at(kLow);
  m.tracker.restrict_windows({});
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  EXPECT_FALSE(readable(was));
  ASSERT_TRUE(m.mmu->open_window(deltas));
  EXPECT_FALSE(m.mmu->warm_window(at(kLow), true));
  EXPECT_FALSE(readable(at(kLow)));
  m.tracker.unregister_vcpu(0);
}

TEST_F(MmuWindowTest, LargePagesComeWhole) {
  t.map(0x40000000, 0x1000000, kUW, 2 << 20);
  ASSERT_TRUE(m.mmu->open_window(deltas));
  ASSERT_TRUE(m.mmu->warm_window(at(0x40000000) + 77 * kPageSize, true));
  EXPECT_TRUE(writable(at(0x40000000)));
  EXPECT_TRUE(writable(at(0x40000000) + 511 * kPageSize));
  EXPECT_FALSE(readable(at(0x40000000) + 512 * kPageSize));
  m.mmu->flush_page(0x40000000 + 3 * kPageSize);
  EXPECT_FALSE(readable(at(0x40000000) + 511 * kPageSize));
}

}  // namespace
}  // namespace ring3::engine
