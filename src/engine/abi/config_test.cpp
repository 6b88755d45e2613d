#include "engine/abi/config.hpp"

#include <gtest/gtest.h>

namespace ring3::engine::abi {
namespace {

Result<Config> make(std::map<std::string, std::string> values, bool can_translate) {
  return Config::create(EngineOptions{std::move(values)}, can_translate);
}

TEST(Config, TranslatesWhereTheHostCan) {
  EXPECT_TRUE(make({}, true)->translate);
  EXPECT_FALSE(make({}, false)->translate);
}

TEST(Config, DoesWhatWasAskedFor) {
  EXPECT_TRUE(make({{"engine", "translator"}}, true)->translate);
  EXPECT_FALSE(make({{"engine", "interpreter"}}, true)->translate);
  EXPECT_FALSE(make({{"engine", "interpreter"}}, false)->translate);
  const auto refused = make({{"engine", "translator"}}, false);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ENOTSUP);
  EXPECT_NE(refused.error().message.find("AVX"), std::string::npos);
  EXPECT_FALSE(make({{"engine", "both"}}, true).ok());
}

TEST(Config, HowLongAHaltLooks) {
  EXPECT_EQ(make({{"halt-poll-ns", "0"}}, true)->halt_poll_ns, 0u);
  EXPECT_EQ(make({{"halt-poll-ns", "1000"}}, true)->halt_poll_ns, 1000u);
  EXPECT_FALSE(make({{"halt-poll-ns", "2000000000"}}, true).ok());
}

TEST(Config, LockstepNeedsTheTranslator) {
  EXPECT_EQ(make({{"lockstep", "3"}}, true)->lockstep, 3u);
  EXPECT_FALSE(make({{"lockstep", "1"}, {"engine", "interpreter"}}, true).ok());
  EXPECT_FALSE(make({{"lockstep", "1"}}, false).ok());
}

}  // namespace
}  // namespace ring3::engine::abi
