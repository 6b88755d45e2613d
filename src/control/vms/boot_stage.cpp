#include "control/vms/boot_stage.hpp"

#include <array>
#include <string_view>

namespace ring3::vms {
namespace {

struct Mark {
  std::string_view text;
  BootStage::Stage stage;
};

constexpr std::array<Mark, 18> kMarks{{
    {"SeaBIOS", BootStage::Stage::kFirmware},
    {"UEFI", BootStage::Stage::kFirmware},
    {"GNU GRUB", BootStage::Stage::kFirmware},
    {"Booting from", BootStage::Stage::kFirmware},
    {"Linux version ", BootStage::Stage::kKernel},
    {"Decompressing Linux", BootStage::Stage::kKernel},
    {"Run /init as init process", BootStage::Stage::kInitramfs},
    {"Loading, please wait", BootStage::Stage::kInitramfs},
    {"Begin: ", BootStage::Stage::kInitramfs},
    {"Freeing unused kernel image", BootStage::Stage::kInitramfs},
    {"Run /sbin/init as init process", BootStage::Stage::kUserSpace},
    {"systemd[1]:", BootStage::Stage::kUserSpace},
    {"Welcome to ", BootStage::Stage::kUserSpace},
    {"INIT: version", BootStage::Stage::kUserSpace},
    {"Starting version ", BootStage::Stage::kUserSpace},
    {"ring3-guest: ready", BootStage::Stage::kLogin},
    {" login: ", BootStage::Stage::kLogin},
    {"ring3-test: ", BootStage::Stage::kLogin},
}};

}  // namespace

bool BootStage::look() {
  Stage best = stage_;
  for (const Mark& mark : kMarks) {
    if (mark.stage > best && line_.find(mark.text) != std::string::npos) best = mark.stage;
  }
  const bool changed = best != stage_;
  stage_ = best;
  return changed;
}

bool BootStage::observe(std::span<const u8> output) {
  bool changed = false;
  for (const u8 byte : output) {
    if (byte == '\n') {
      changed |= look();
      line_.clear();
    } else if (line_.size() < kMostLine) {
      line_.push_back(static_cast<char>(byte));
    }
  }
  return look() || changed;  // a prompt has no line's end
}

void BootStage::reset() {
  stage_ = Stage::kStarting;
  line_.clear();
}

const char* BootStage::describe(Stage stage) {
  switch (stage) {
    case Stage::kStarting: return "starting";
    case Stage::kFirmware: return "in the firmware";
    case Stage::kKernel: return "the kernel starts";
    case Stage::kInitramfs: return "in the initramfs";
    case Stage::kUserSpace: return "user space starts";
    case Stage::kLogin: return "up";
  }
  return "?";
}

}  // namespace ring3::vms
