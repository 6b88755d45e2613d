#include "control/cli/engines.hpp"

#include <gtest/gtest.h>

namespace ring3::control {
namespace {

EngineReport working(EngineKind kind, double speed) {
  EngineReport report;
  report.kind = kind;
  report.opens = report.complete = true;
  report.speed = kvm::ProbeResult{speed, 1, true};
  return report;
}

EngineReport broken(EngineKind kind, const std::string& why) {
  EngineReport report;
  report.kind = kind;
  report.problem = why;
  return report;
}

TEST(Choose, TakesTheFaster) {
  EXPECT_EQ(choose(working(EngineKind::kKvm, 3000), working(EngineKind::kSoft, 70)).kind, EngineKind::kKvm);
  EXPECT_EQ(choose(working(EngineKind::kKvm, 4), working(EngineKind::kSoft, 70)).kind, EngineKind::kSoft);
}

TEST(Choose, TakesTheOnlyOne) {
  const auto soft = choose(broken(EngineKind::kKvm, "no such file"), working(EngineKind::kSoft, 70));
  EXPECT_EQ(soft.kind, EngineKind::kSoft);
  EXPECT_NE(soft.reason.find("no such file"), std::string::npos);
  EXPECT_EQ(choose(working(EngineKind::kKvm, 4), broken(EngineKind::kSoft, "x")).kind, EngineKind::kKvm);
}

TEST(Choose, SaysWhyThereIsNone) {
  const auto none = choose(broken(EngineKind::kKvm, "first"), broken(EngineKind::kSoft, "second"));
  EXPECT_FALSE(none.kind.has_value());
  EXPECT_NE(none.reason.find("first"), std::string::npos);
  EXPECT_NE(none.reason.find("second"), std::string::npos);
}

TEST(Choose, TakesOurOwnOnAHostTooBusyToMeasure) {
  EngineReport soft = broken(EngineKind::kSoft, "the probe guest stands still");
  soft.opens = soft.complete = true;
  EXPECT_EQ(choose(broken(EngineKind::kKvm, "first"), soft).kind, EngineKind::kSoft);
  EXPECT_EQ(choose(working(EngineKind::kKvm, 4), soft).kind, EngineKind::kKvm);
}

TEST(OpenEngine, UnknownOptionIsNamed) {
  const auto system = open_engine(EngineKind::kSoft, {{"no-such-option", "1"}});
  ASSERT_FALSE(system.ok());
  EXPECT_NE(system.error().message.find("no-such-option"), std::string::npos);
}

}  // namespace
}  // namespace ring3::control
