#include "engine/translate/code_cache.hpp"

#include <gtest/gtest.h>

#include "engine/mmu/test_support.hpp"

namespace ring3::engine {
namespace {

struct Tables : testing::Test {
  test::Machine m;
  test::PageTables first{m, test::PageTables::Mode::Long}, second{m, test::PageTables::Mode::Long, 0x200000};
  std::unique_ptr<CodeCache> cache = std::move(CodeCache::create(1u << 20)).value();
  /// The jump table in force, and what its entries count under.
  std::pair<const JumpTable*, u64> table() {
    const u64 bias = cache->bias(0, *m.mmu);
    return {cache->jump_table(), bias};
  }
};

// A table is 1 MiB: one that nobody can come back to is taken before another is touched.
TEST_F(Tables, ATableIsUsedAgainWhenItsGenerationIsGone) {
  first.activate();
  const auto before = table();
  for (unsigned n = 0; n < 40; n++) {
    const u64 generation = m.mmu->fetch_generation();
    m.mmu->flush_all();
    EXPECT_FALSE(m.mmu->generation_lives(generation));
    const auto now = table();
    EXPECT_EQ(now.first, before.first);
    EXPECT_NE(now.second, before.second);
  }
}

// With PCIDs generations come back, and find their tables with what they held.
TEST_F(Tables, AddressSpacesThatComeBackKeepTheirTables) {
  m.mmu->set_features(46, true, true, true, false);
  first.activate();
  m.state.cr4 |= cr4::PCIDE;
  m.set_cpl(3);
  std::vector<std::pair<const JumpTable*, u64>> tables;
  const u64 roots[] = {first.root(), second.root() | 1};
  for (unsigned round = 0; round < 6; round++) {
    for (unsigned n = 0; n < 2; n++) {
      m.mmu->set_cr3(roots[n], true);
      const auto now = table();
      if (round == 0) tables.push_back(now);
      EXPECT_EQ(now, tables[n]) << round;
    }
  }
  EXPECT_NE(tables[0].first, tables[1].first);
  // What one of them has fetched is mapped elsewhere: it goes on in its own table under another bias, and the other is as it was.
  constexpr u64 kCode = 0x400000;
  m.mmu->set_cr3(roots[0], true);
  first.map(kCode, 0x10000, test::pte::P | test::pte::U);
  Gpa gpa;
  const u8* host;
  ASSERT_TRUE(m.mmu->fetch(kCode, &gpa, &host));
  first.map(kCode, 0x11000, test::pte::P | test::pte::U);
  m.mmu->flush_page(kCode);
  EXPECT_EQ(table().first, tables[0].first);
  EXPECT_NE(table().second, tables[0].second);
  m.mmu->set_cr3(roots[1], true);
  EXPECT_EQ(table(), tables[1]);
}

}  // namespace
}  // namespace ring3::engine
