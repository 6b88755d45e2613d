#include <functional>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "engine/mmu/mmu.hpp"
#include "engine/mmu/test_support.hpp"

/// What stays in the TLB and what each flush removes.
namespace ring3::engine {
namespace {

using namespace test;
using Mode = PageTables::Mode;

constexpr u64 kRW = pte::P | pte::W;

u32 value_at(Machine& m, u64 linear) {
  u32 v = 0;
  return m.mmu->read(linear, &v) ? v : ~0u;
}

struct TlbTest : testing::Test {
  Machine m;
  PageTables t{m, Mode::Long};
  TlbTest() {
    t.activate(cr0::WP, cr4::PGE | cr4::PCIDE);
    for (u32 i = 0; i < 32; i++) m.poke<u32>(0x800000 + i * 0x1000, i);
    for (u32 i = 0; i < 8; i++) m.poke<u32>(0x1000000 + i * 0x200000, 100 + i);
  }
  u64 page(unsigned i) { return 0x800000 + i * 0x1000; }
};

TEST_F(TlbTest, EntriesStayUntilFlushed) {
  t.map(0x400000, page(1), kRW);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  t.map(0x400000, page(2), kRW);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  m.mmu->flush_page(0x401000);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  m.mmu->flush_page(0x400abc);
  EXPECT_EQ(value_at(m, 0x400000), 2u);
}

TEST_F(TlbTest, Cr3KeepsGlobalsOnly) {
  t.map(0x400000, page(1), kRW);
  t.map(0x401000, page(1), kRW | pte::G);
  value_at(m, 0x400000), value_at(m, 0x401000);
  t.map(0x400000, page(2), kRW);
  t.map(0x401000, page(2), kRW | pte::G);
  m.mmu->set_cr3(m.state.cr3, false);
  EXPECT_EQ(value_at(m, 0x400000), 2u);
  EXPECT_EQ(value_at(m, 0x401000), 1u);
  m.mmu->flush_all();
  EXPECT_EQ(value_at(m, 0x401000), 2u);
}

TEST_F(TlbTest, GlobalNeedsPge) {
  m.state.cr4 &= ~cr4::PGE;
  m.mmu->mode_changed();
  t.map(0x401000, page(1), kRW | pte::G);
  value_at(m, 0x401000);
  t.map(0x401000, page(2), kRW | pte::G);
  m.mmu->set_cr3(m.state.cr3, false);
  EXPECT_EQ(value_at(m, 0x401000), 2u);
}

TEST_F(TlbTest, PcidSwitchesKeepAndFlush) {
  PageTables other(m, Mode::Long, t.end_of_tables() + 0x100000);
  t.map(0x400000, page(1), kRW);
  other.map(0x400000, page(2), kRW);
  const u64 a = t.root() | 1, b = other.root() | 2;
  m.mmu->set_cr3(a, false);
  EXPECT_EQ(m.state.cr3, a);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  m.mmu->set_cr3(b | 1ull << 63, true);
  EXPECT_EQ(m.state.cr3, b);
  EXPECT_EQ(value_at(m, 0x400000), 2u);
  t.map(0x400000, page(3), kRW);
  other.map(0x400000, page(4), kRW);
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x400000), 1u);  // kept
  m.mmu->set_cr3(b, false);
  EXPECT_EQ(value_at(m, 0x400000), 4u);
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x400000), 1u);  // b's flush was not a's
  m.mmu->flush_pcid(1);
  EXPECT_EQ(value_at(m, 0x400000), 3u);
  t.map(0x400000, page(5), kRW);
  m.mmu->set_cr3(b, true);
  m.mmu->flush_page(0x400000, 1);
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x400000), 5u);
  t.map(0x400000, page(6), kRW);
  m.mmu->set_cr3(b, true);
  m.mmu->flush_all();
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x400000), 6u);
  // INVLPG reaches global pages under every PCID, of the lower half as well; others under the current one alone.
  t.map(0x400000, page(8), kRW);
  m.mmu->set_cr3(b, true);
  m.mmu->flush_page(0x400000);
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x400000), 6u);
  t.map(0x600000, page(7), kRW | pte::G);
  EXPECT_EQ(value_at(m, 0x600000), 7u);
  t.map(0x600000, page(8), kRW | pte::G);
  m.mmu->set_cr3(b, true);
  m.mmu->flush_page(0x600000);
  m.mmu->set_cr3(a, true);
  EXPECT_EQ(value_at(m, 0x600000), 8u);
}

TEST_F(TlbTest, ManyPcids) {
  std::vector<std::unique_ptr<PageTables>> spaces;
  u64 tables = 0x2000000;
  for (unsigned i = 0; i < 20; i++) {
    spaces.push_back(std::make_unique<PageTables>(m, Mode::Long, tables));
    spaces[i]->map(0x400000, page(i), kRW);
    tables = spaces[i]->end_of_tables();
  }
  for (unsigned round = 0; round < 3; round++) {
    for (unsigned i = 0; i < 20; i++) {
      m.mmu->set_cr3(spaces[i]->root() | i, round != 0);
      EXPECT_EQ(value_at(m, 0x400000), i);
    }
  }
}

TEST_F(TlbTest, LargePageInvlpgFlushesAllOfIt) {
  t.map(0x40000000, 0x1000000, kRW, 2 << 20);
  t.map(0x40200000, 0x1200000, kRW, 2 << 20);
  m.poke<u32>(0x1000000 + 0x123000, 55);
  m.poke<u32>(0x1400000 + 0x123000, 66);
  EXPECT_EQ(value_at(m, 0x40000000), 100u);
  EXPECT_EQ(value_at(m, 0x40123000), 55u);
  EXPECT_EQ(value_at(m, 0x40200000), 101u);
  t.map(0x40000000, 0x1400000, kRW, 2 << 20);
  t.map(0x40200000, 0x1600000, kRW, 2 << 20);
  m.mmu->flush_page(0x40050000);  // a page of it that is not in the TLB
  EXPECT_EQ(value_at(m, 0x40000000), 102u);
  EXPECT_EQ(value_at(m, 0x40123000), 66u);
  EXPECT_EQ(value_at(m, 0x40200000), 101u);
  t.map(0x40000000, 0x1000000, kRW, 2 << 20);
  m.mmu->flush_page(0x40123000);  // one that is
  EXPECT_EQ(value_at(m, 0x40000000), 100u);
  EXPECT_EQ(value_at(m, 0x40123000), 55u);
}

TEST_F(TlbTest, ModeChangesAreSeen) {
  t.map(0x400000, page(1), pte::P);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  EXPECT_FALSE(m.mmu->write<u32>(0x400000, 7));
  m.state.cr0 &= ~cr0::WP;
  m.mmu->mode_changed();
  EXPECT_TRUE(m.mmu->write<u32>(0x400000, 7));
  m.state.cr0 |= cr0::WP;
  m.mmu->mode_changed();
  EXPECT_FALSE(m.mmu->write<u32>(0x400000, 8));
  EXPECT_EQ(m.peek<u32>(page(1)), 7u);
  m.set_cpl(3);
  EXPECT_EQ(value_at(m, 0x400000), ~0u);
  m.set_cpl(0);
  EXPECT_EQ(value_at(m, 0x400000), 7u);
}

TEST_F(TlbTest, SmapFollowsAc) {
  t.map(0x400000, page(1), kRW | pte::U);
  m.state.cr4 |= cr4::SMAP;
  m.mmu->mode_changed();
  m.set_ac(true);
  EXPECT_EQ(value_at(m, 0x400000), 1u);
  m.set_ac(false);
  EXPECT_EQ(value_at(m, 0x400000), ~0u);
  EXPECT_EQ(m.mmu->stop().error, pferr::P);
  m.set_ac(true);
  u32 v = 0;
  EXPECT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_FALSE(m.mmu->read_system(0x400000, &v));  // implicit: AC does not help
  EXPECT_FALSE(m.mmu->write_system(0x400000, v));
  m.set_cpl(3);
  EXPECT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_FALSE(m.mmu->read_system(0x400000, &v));
  EXPECT_EQ(m.mmu->stop().error, pferr::P);  // not a user access
}

TEST_F(TlbTest, ReadEntryDoesNotAllowWriting) {
  t.map(0x400000, page(1), kRW);
  value_at(m, 0x400000);
  EXPECT_EQ(t.load(t.entry(0x400000, 1)) & (pte::A | pte::D), pte::A);
  EXPECT_TRUE(m.mmu->write<u32>(0x400000, 3));
  EXPECT_EQ(t.load(t.entry(0x400000, 1)) & (pte::A | pte::D), pte::A | pte::D);
}

TEST_F(TlbTest, ReadEntryOfADirtyPageAllowsTheUserToWrite) {
  constexpr u64 kUser = kRW | pte::U;
  const auto dirty_after_write = [&](u64 flags, bool user) {
    t.map(0x400000, page(1), flags | pte::A | pte::D);
    m.mmu->flush_all();
    m.set_cpl(user ? 3 : 0);
    EXPECT_EQ(value_at(m, 0x400000), 1u);
    // Who takes the flag away has to flush before it may expect it back: whether a walk was made is seen by that.
    t.store(t.entry(0x400000, 1), page(1) | flags | pte::A);
    EXPECT_TRUE(m.mmu->write<u32>(0x400000, 1));
    return (t.load(t.entry(0x400000, 1)) & pte::D) != 0;
  };
  EXPECT_FALSE(dirty_after_write(kUser, true));
  EXPECT_TRUE(dirty_after_write(kUser, false));
  m.set_cpl(3);
  t.map(0x400000, page(1), (kUser & ~pte::W) | pte::A | pte::D);
  m.mmu->flush_all();
  value_at(m, 0x400000);
  EXPECT_FALSE(m.mmu->write<u32>(0x400000, 1));
}

TEST_F(TlbTest, FetchesAreValidatedAtEachFill) {
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  t.map(0x400000, page(1), kRW);
  t.map(0x401000, page(9), kRW);
  Gpa gpa;
  const u8* host = nullptr;
  ASSERT_TRUE(m.mmu->fetch(0x400010, &gpa, &host));
  EXPECT_EQ(gpa.value, page(1) + 0x10);
  EXPECT_EQ(host, m.at(page(1) + 0x10));
  ASSERT_TRUE(m.mmu->fetch(0x400020, &gpa, &host));
  EXPECT_EQ(gpa.value, page(1) + 0x20);
  EXPECT_EQ(observer.validated, std::vector<u64>{page(1)});
  m.mmu->expire_fetches();
  ASSERT_TRUE(m.mmu->fetch(0x400020, &gpa, &host));
  EXPECT_EQ(observer.validated.size(), 2u);
  // Also of address spaces that are not current.
  const u64 here = m.state.cr3;
  m.mmu->set_cr3(here | 5, true);
  m.mmu->expire_fetches();
  m.mmu->set_cr3(here, true);
  ASSERT_TRUE(m.mmu->fetch(0x400020, &gpa, &host));
  EXPECT_EQ(observer.validated.size(), 3u);
  // A flush reaches translations that only wait for their page to be looked at again: of a page, of a space, of all.
  unsigned to = 2;
  for (const auto& flush : std::vector<std::function<void()>>{[&] { m.mmu->flush_page(0x400abc); },
                                                              [&] { m.mmu->flush_non_global(); }, [&] { m.mmu->flush_all(); }}) {
    m.mmu->expire_fetches();
    t.map(0x400000, page(to), kRW);
    flush();
    ASSERT_TRUE(m.mmu->fetch(0x400020, &gpa, &host));
    EXPECT_EQ(gpa.value, page(to) + 0x20);
    EXPECT_EQ(host, m.at(page(to) + 0x20));
    to++;
  }
  t.map(0x400000, page(1), kRW);
  m.mmu->flush_page(0x400000);
  // Bytes across a page end, up to a fault.
  u8 bytes[16];
  std::memset(m.at(page(1) + 0xff8), 1, 8);
  std::memset(m.at(page(9)), 2, 8);
  EXPECT_EQ(m.mmu->fetch_bytes(0x400ff8, bytes, 15), 15u);
  EXPECT_EQ(bytes[7], 1);
  EXPECT_EQ(bytes[8], 2);
  EXPECT_EQ(m.mmu->fetch_bytes(0x401ffa, bytes, 15), 6u);
  EXPECT_EQ(m.mmu->stop().vector, vec::PF);
  EXPECT_EQ(m.mmu->stop().error, pferr::I);
  EXPECT_EQ(m.mmu->stop().payload, 0x402000u);
}

/// The name of the execute translations changes when one of them may have become wrong, and only then.
TEST_F(TlbTest, FetchGenerations) {
  t.map(0x400000, page(1), kRW);                                     // code of this address space
  t.map(0x401000, page(2), kRW);                                     // data
  t.map(0xffffffff80000000, page(3), kRW | pte::G);                  // the kernel's
  t.map(0xffffffff80001000, page(4), kRW | pte::G);
  Gpa gpa;
  const u8* host;
  ASSERT_TRUE(m.mmu->fetch(0xffffffff80000000, &gpa, &host));
  const u64 kernel = m.mmu->fetch_generation();
  value_at(m, 0x401000);
  m.mmu->flush_page(0x401000);
  EXPECT_EQ(m.mmu->fetch_generation(), kernel) << "a data page";
  m.mmu->set_cr3(m.state.cr3, false);
  EXPECT_EQ(m.mmu->fetch_generation(), kernel) << "global pages stay over MOV CR3";
  ASSERT_TRUE(m.mmu->fetch(0xffffffff80000000, &gpa, &host));
  m.mmu->flush_page(0xffffffff80000123);
  const u64 flushed = m.mmu->fetch_generation();
  EXPECT_NE(flushed, kernel);
  ASSERT_TRUE(m.mmu->fetch(0xffffffff80001000, &gpa, &host));
  m.mmu->expire_fetches();
  const u64 expired = m.mmu->fetch_generation();
  EXPECT_NE(expired, flushed);
  // A page that is not global makes CR3 count, also for what was fetched before.
  ASSERT_TRUE(m.mmu->fetch(0x400000, &gpa, &host));
  const u64 local = m.mmu->fetch_generation();
  EXPECT_NE(local, expired);
  m.mmu->set_cr3(m.state.cr3, false);
  EXPECT_NE(m.mmu->fetch_generation(), local);
  // With PCID, the other space has another name, and the first its old one when it comes back.
  const u64 first = m.mmu->fetch_generation();
  m.mmu->set_cr3((m.state.cr3 & kPageMask) | 5, false);
  EXPECT_NE(m.mmu->fetch_generation(), first);
  m.mmu->set_cr3(m.state.cr3 & kPageMask, true);
  EXPECT_EQ(m.mmu->fetch_generation(), first);
}

/// User code that a flush finds where it was keeps its name: most flushes are for data.
TEST_F(TlbTest, FetchGenerationsHoldOverFlushesForOthers) {
  FakeObserver observer;
  m.mmu->set_code_observer(&observer);
  constexpr u64 kCode = 0x400000, kSameSlot = kCode + (u64{Mmu::kTlbSize} << kPageShift), kUser = kRW | pte::U;
  Gpa gpa;
  const u8* host;
  u64 held = 0;
  // Two pages that cannot be in the TLB at once, and one beside them.
  const auto begin = [&] {
    t.map(kCode, page(1), kUser);
    t.map(kSameSlot, page(2), kUser);
    t.map(kCode + kPageSize, page(3), kUser);
    m.mmu->flush_all();
    m.set_cpl(3);
    for (u64 at : {kCode, kCode + kPageSize, kSameSlot}) ASSERT_TRUE(m.mmu->fetch(at, &gpa, &host));
    held = m.mmu->fetch_generation();
  };
  const auto flushed = [&] {
    m.set_cpl(0);
    m.mmu->set_cr3(m.state.cr3, false);
    m.set_cpl(3);
    return m.mmu->fetch_generation();
  };
  begin();
  observer.validated.clear();
  t.map(0x800000, page(4), kUser);
  EXPECT_EQ(flushed(), held);
  EXPECT_EQ(observer.validated, (std::vector<u64>{page(1), page(3), page(2)})) << "they count as fetched again";
  m.mmu->flush_pcid(0);
  EXPECT_EQ(m.mmu->fetch_generation(), held);
  m.mmu->flush_page(kCode + 0x123);
  EXPECT_EQ(m.mmu->fetch_generation(), held) << "by itself";
  m.mmu->flush_page(kCode, 0);
  EXPECT_EQ(m.mmu->fetch_generation(), held);
  t.map(kCode + kPageSize, page(7), kUser | pte::A);
  m.mmu->flush_page(kCode);
  EXPECT_EQ(m.mmu->fetch_generation(), held) << "another page's change is not seen before its flush";
  m.mmu->flush_page(kCode + kPageSize);
  EXPECT_NE(m.mmu->fetch_generation(), held);
  // All of a large page goes by any of its addresses.
  t.map(0x40000000, 0x1000000, kUser, 2 << 20);
  ASSERT_TRUE(m.mmu->fetch(0x40001000, &gpa, &host));
  held = m.mmu->fetch_generation();
  m.mmu->flush_page(0x40123000);
  EXPECT_EQ(m.mmu->fetch_generation(), held);
  t.map(0x40000000, 0x1200000, kUser | pte::A, 2 << 20);
  m.mmu->flush_page(0x40123000);
  EXPECT_NE(m.mmu->fetch_generation(), held);

  const std::pair<const char*, std::function<void()>> changes[] = {
      {"another page", [&] { t.map(kCode, page(5), kUser | pte::A); }},
      {"one that has left the TLB", [&] { t.map(kCode, page(5), kUser | pte::A); t.map(kSameSlot, page(2), kUser | pte::A); }},
      {"not there", [&] { t.unmap(kCode + kPageSize); }},
      {"not executable", [&] { t.map(kSameSlot, page(2), kUser | pte::A | pte::NX); }},
      {"not the user's", [&] { t.map(kSameSlot, page(2), kRW | pte::A); }},
      {"not accessed", [&] { t.map(kSameSlot, page(2), kUser); }},
  };
  for (const auto& [what, change] : changes) {
    begin();
    change();
    EXPECT_NE(flushed(), held) << what;
    begin();
    change();
    for (u64 at : {kCode, kCode + kPageSize, kSameSlot}) m.mmu->flush_page(at);
    EXPECT_NE(m.mmu->fetch_generation(), held) << what << ", by pages";
  }
  // Other tables under the same PCID: the same code at the same place, and other code.
  PageTables other(m, Mode::Long, t.end_of_tables() + 0x100000);
  for (unsigned n = 0; n < 2; n++) {
    begin();
    other.map(kCode, page(1), kUser | pte::A);
    other.map(kCode + kPageSize, page(3), kUser | pte::A);
    other.map(kSameSlot, page(n == 0 ? 2 : 6), kUser | pte::A);
    // The upper levels' flags are a walk's to set.
    const u64 root = m.state.cr3;
    m.set_cpl(0);
    m.mmu->set_cr3(other.root() | 7, false);
    m.set_cpl(3);
    for (u64 at : {kCode, kSameSlot}) ASSERT_TRUE(m.mmu->fetch(at, &gpa, &host));
    m.set_cpl(0);
    m.mmu->set_cr3(root, true);
    m.mmu->set_cr3(other.root(), false);
    m.set_cpl(3);
    EXPECT_EQ(m.mmu->fetch_generation() == held, n == 0);
    m.set_cpl(0);
    m.mmu->set_cr3(root, false);
  }
  // Flushes that come all the time do not look at all of it each time.
  begin();
  unsigned changed = 0;
  for (unsigned n = 0; n < 100; n++) changed += std::exchange(held, flushed()) != held;
  EXPECT_GE(changed, 1u);
  m.mmu->set_code_observer(nullptr);
}

/// INVLPG of one address drops all of a large page's in the upper half too, whatever was flushed before.
TEST_F(TlbTest, LargePagesOfBothHalves) {
  for (const u64 base : {0xffff888000000000ull, 0x40000000ull}) {
    for (const u64 flags : {kRW, kRW | pte::G}) {
      m.mmu->flush_all();
      m.poke<u32>(0x1000000 + 0x123000, 55);
      m.poke<u32>(0x1400000 + 0x123000, 66);
      t.map(base, 0x1000000, flags, 2 << 20);
      t.map(0x60000000, 0x1200000, kRW, 2 << 20);
      EXPECT_EQ(value_at(m, base + 0x123000), 55u);
      EXPECT_EQ(value_at(m, 0x60000000), 101u);
      m.mmu->set_cr3(m.state.cr3, false);
      EXPECT_EQ(value_at(m, base + 0x123000), 55u);
      t.map(base, 0x1400000, flags, 2 << 20);
      EXPECT_EQ(value_at(m, base + 0x123000), 55u);
      m.mmu->flush_page(base + 0x156000);
      EXPECT_EQ(value_at(m, base + 0x123000), 66u);
    }
  }
}

/// However many pages a kernel and its programs run in, flushes of the lower half's leave the kernel's translations alone.
TEST_F(TlbTest, HalvesAreFlushedApart) {
  constexpr u64 kKernel = 0xffffffff80000000, kUser = 0x400000;
  for (u64 i = 0; i < 600; i++) {
    t.map(kKernel + i * kPageSize, page(i % 8), kRW | pte::G);
    t.map(kUser + i * kPageSize, page(i % 8), kRW | pte::U);
  }
  Gpa gpa;
  const u8* host;
  const auto run_in = [&](u64 base, u8 cpl) {
    m.set_cpl(cpl);
    for (u64 i = 0; i < 600; i++) ASSERT_TRUE(m.mmu->fetch(base + i * kPageSize, &gpa, &host));
  };
  run_in(kUser, 3);
  run_in(kKernel, 0);
  u64 kernel = m.mmu->fetch_generation();
  const auto flush_lower = [&] {
    for (u64 i = 0; i < 4096; i++) m.mmu->flush_page(kUser + i * kPageSize);
  };
  flush_lower();
  EXPECT_EQ(m.mmu->fetch_generation(), kernel);
  // The same after the kernel's were named anew.
  run_in(kUser, 3);
  run_in(kKernel, 0);
  m.mmu->flush_page(kKernel);
  EXPECT_NE(m.mmu->fetch_generation(), kernel);
  kernel = m.mmu->fetch_generation();
  flush_lower();
  EXPECT_EQ(m.mmu->fetch_generation(), kernel);
}

/// Random mappings, sizes, address spaces and accesses; after every change the flush the SDM asks for. The
/// model keeps only the mappings.
TEST_F(TlbTest, RandomChangesWithProperFlushes) {
  std::mt19937_64 rng(77);
  struct Mapping {
    u64 gpa = 0, flags = 0;
    bool present = false;
  };
  constexpr unsigned kSpaces = 10, kPages = 24;
  struct AddressSpace {
    std::unique_ptr<PageTables> tables;
    std::map<u64, Mapping> pages;
  };
  // Pages that share TLB slots: 0x400000 apart in linear addresses.
  const auto linear_of = [](u64 i) { return 0x10000000 + (i % 6) * 0x1000 + (i / 6) * 0x400000; };
  std::vector<AddressSpace> spaces(kSpaces);
  u64 tables = 0x2000000;
  for (auto& s : spaces) {
    s.tables = std::make_unique<PageTables>(m, Mode::Long, tables);
    for (u64 i = 0; i < kPages; i++) s.tables->map(linear_of(i), 0, 0);
    tables = s.tables->end_of_tables();
  }
  for (u32 i = 0; i < 64; i++) m.poke<u32>(0x800000 + i * 0x1000, i);
  unsigned now = 0;
  m.mmu->set_cr3(spaces[0].tables->root(), false);
  std::vector<bool> touched(kSpaces, false);
  for (unsigned step = 0; step < 60000; step++) {
    const unsigned what = rng() % 100;
    if (what < 3) {
      now = rng() % kSpaces;
      const bool keep = !touched[now] && rng() % 2;
      m.mmu->set_cr3(spaces[now].tables->root() | now | (keep ? 1ull << 63 : 0), keep);
      touched[now] = false;
    } else if (what < 20) {
      const unsigned which = rng() % 3 == 0 ? rng() % kSpaces : now;
      const u64 linear = linear_of(rng() % kPages);
      Mapping& p = spaces[which].pages[linear];
      p.present = rng() % 8 != 0;
      p.gpa = 0x800000 + (rng() % 64) * 0x1000;
      p.flags = pte::P | (rng() & 6);
      spaces[which].tables->map(linear, p.gpa, p.present ? p.flags : 0);
      if (which == now) {
        m.mmu->flush_page(linear + rng() % 4096);
      } else if (rng() % 2) {
        m.mmu->flush_page(linear, static_cast<u16>(which));
      } else {
        touched[which] = true;
      }
    } else if (what < 24) {
      m.set_cpl(rng() % 2 ? 3 : 0);
    } else {
      const u64 linear = linear_of(rng() % kPages);
      const Mapping p = spaces[now].pages[linear];
      const bool user = m.state.cpl() == 3;
      const u64 need = pte::P | (user ? pte::U : 0);
      if (rng() % 2) {
        u32 v = 0;
        const bool ok = m.mmu->read(linear, &v);
        ASSERT_EQ(ok, p.present && (p.flags & need) == need) << step;
        if (ok) {
          ASSERT_EQ(v, m.peek<u32>(p.gpa)) << step;
        }
      } else {
        const u32 v = static_cast<u32>(rng());
        const bool ok = m.mmu->write<u32>(linear, v);
        ASSERT_EQ(ok, p.present && (p.flags & (need | pte::W)) == (need | pte::W)) << step;
        if (ok) {
          ASSERT_EQ(v, m.peek<u32>(p.gpa)) << step;
        }
      }
    }
  }
}

}  // namespace
}  // namespace ring3::engine
