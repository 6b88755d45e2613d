#pragma once
#include <span>
#include <string>

#include "base/types.hpp"

namespace ring3::vms {

/// How far a guest has come, as its console tells. Pure; fed with output in pieces of any size.
///
/// Trust: the output is the guest's; what it says decides a word in a progress line, nothing else.
class BootStage {
 public:
  enum class Stage { kStarting, kFirmware, kKernel, kInitramfs, kUserSpace, kLogin };

  /// Returns whether the stage changed. Stages only go forward, until reset().
  bool observe(std::span<const u8> output);
  Stage stage() const { return stage_; }
  /// The guest reboots.
  void reset();

  static const char* describe(Stage stage);

 private:
  static constexpr std::size_t kMostLine = 512;
  bool look();

  Stage stage_ = Stage::kStarting;
  std::string line_;
};

}  // namespace ring3::vms
