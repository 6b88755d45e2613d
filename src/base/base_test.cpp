#include <gtest/gtest.h>

#include "base/checked.hpp"
#include "base/mapping.hpp"
#include "base/types.hpp"

namespace ring3 {

TEST(Checked, RangeWithinIsOverflowSafe) {
  EXPECT_TRUE(range_within<u64>(0, 10, 10));
  EXPECT_FALSE(range_within<u64>(1, 10, 10));
  EXPECT_FALSE(range_within<u64>(~0ull, 2, 10));
  EXPECT_FALSE(range_within<u64>(2, ~0ull, 10));
  EXPECT_FALSE(checked_add<u64>(~0ull, 1));
  EXPECT_EQ(checked_mul<u32>(65536, 65535), 0xffff0000u);
}

TEST(Mapping, OwnsAndReleases) {
  auto m = Mapping::anonymous(8192);
  ASSERT_TRUE(m);
  Mapping a = std::move(*m);
  a.data()[8191] = 1;
  Mapping b;
  b = std::move(a);
  EXPECT_EQ(a.data(), nullptr);
  EXPECT_EQ(b.data()[8191], 1);
}

TEST(Address, PageArithmetic) {
  Gpa a(0x12345);
  EXPECT_EQ(a.page(), Gpa(0x12000));
  EXPECT_EQ(a.page_offset(), 0x345u);
  EXPECT_EQ((a + 1) - a, 1u);
}

}  // namespace ring3
