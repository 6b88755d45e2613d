#include "engine/abi/halt_poll.hpp"

#include <gtest/gtest.h>

#include <algorithm>

namespace ring3::engine::abi {
namespace {

constexpr u64 kLimit = HaltPoll::kDefaultLimit;

TEST(HaltPoll, GrowsWhileSleepsAreShortAndNoFurther) {
  HaltPoll p;
  EXPECT_EQ(p.time(kLimit), 0u);
  u64 expected = 0;
  for (int i = 0; i < 10; i++) {
    p.ended(kLimit - 1, kLimit);
    expected = expected == 0 ? HaltPoll::kFirst : std::min(2 * expected, kLimit);
    EXPECT_EQ(p.time(kLimit), expected);
  }
  EXPECT_EQ(p.time(kLimit), kLimit);
}

TEST(HaltPoll, StaysWhereLookingWasEnough) {
  HaltPoll p;
  p.ended(50'000, kLimit);
  p.ended(50'000, kLimit);
  EXPECT_EQ(p.time(kLimit), 20'000u);
  p.ended(15'000, kLimit);
  p.ended(20'000, kLimit);
  EXPECT_EQ(p.time(kLimit), 20'000u);
}

TEST(HaltPoll, ALongSleepEndsIt) {
  HaltPoll p;
  for (int i = 0; i < 5; i++) p.ended(150'000, kLimit);
  EXPECT_NE(p.time(kLimit), 0u);
  p.ended(kLimit, kLimit);
  EXPECT_EQ(p.time(kLimit), 0u);
}

TEST(HaltPoll, ALimitThatFallsHolds) {
  HaltPoll p;
  for (int i = 0; i < 8; i++) p.ended(kLimit - 1, kLimit);
  EXPECT_EQ(p.time(5'000), 5'000u);
  EXPECT_EQ(p.time(0), 0u);
  p.ended(1, 0);
  EXPECT_EQ(p.time(kLimit), 0u);
}

}  // namespace
}  // namespace ring3::engine::abi
