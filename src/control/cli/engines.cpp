#include "base/linux_kvm.hpp"

#include "control/cli/engines.hpp"


#include <cstdio>

#include "base/log.hpp"
#include "engine/abi/provider.hpp"
#include "kvm/kernel_provider.hpp"

namespace ring3::control {

namespace {

struct Capability {
  unsigned number;
  const char* name;
};

/// What every machine of ours is built from.
constexpr Capability kNeeded[] = {
    {KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"}, {KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR"},
    {KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"},     {KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP"},
    {KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING"}, {KVM_CAP_PIT2, "KVM_CAP_PIT2"},
    {KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"},       {KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"},
};

std::string speed_text(const kvm::ProbeResult& speed) {
  char text[64];
  std::snprintf(text, sizeof text, "%.0f million instructions a second", speed.million_insns_per_second);
  return text;
}

}  // namespace

const char* to_string(EngineKind kind) { return kind == EngineKind::kKvm ? "kvm" : "soft"; }

const char* soft_engine_kind(const EngineOptionMap& options) {
  const auto asked = options.find("engine");
  const bool translates = asked != options.end() ? asked->second == "translator" : engine::can_translate();
  return translates ? "translator" : "interpreter";
}

void warn_without_translator(const EngineOptionMap& options) {
  if (engine::can_translate() || options.count("engine") != 0) return;
  log::warn("{}: the interpreter runs the guest, many times slower", engine::kCannotTranslate);
}

Result<std::unique_ptr<kvm::Endpoint>> open_engine(EngineKind kind, const EngineOptionMap& options) {
  if (kind == EngineKind::kSoft) {
    engine::EngineOptions ours{options};
    // Guest memory of ours can be mapped twice, and stays where it is.
    ours.values.emplace("windows", std::to_string(engine::kWindows));
    // No signal means anything to a vCPU's thread of ours: it is stopped by kick().
    ours.signals_announced = true;
    return engine::create_soft_system(ours);
  }
  return kvm::open_kernel_kvm();
}

EngineReport examine(EngineKind kind, const EngineOptionMap& options, std::chrono::milliseconds limit) {
  EngineReport report;
  report.kind = kind;
  auto system = open_engine(kind, options);
  if (!system) {
    report.problem = system.error().message;
    report.errno_code = system.error().code;
    return report;
  }
  report.opens = true;
  for (const Capability& capability : kNeeded) {
    if ((*system)->ioctl(KVM_CHECK_EXTENSION, capability.number) <= 0) {
      report.problem = std::string("it lacks ") + capability.name + ", which a machine needs";
      break;
    }
  }
  report.complete = report.problem.empty();
  // The speed is worth knowing even of one that will not do.
  auto speed = kvm::probe(std::shared_ptr<kvm::Endpoint>(std::move(*system)), limit);
  if (speed) {
    report.speed = *speed;
  } else if (report.complete) {
    report.problem = speed.error().message;
    report.errno_code = speed.error().code;
  }
  return report;
}

EngineChoice choose(const EngineReport& kvm, const EngineReport& soft) {
  if (!kvm.usable() && !soft.usable()) {
    // Our own engine runs guests wherever it can be made; a host too busy to measure it on is no reason to run none.
    if (soft.complete) return {EngineKind::kSoft, "neither could be measured: /dev/kvm: " + kvm.problem + "; software engine: " + soft.problem};
    return {std::nullopt, "no engine works here: /dev/kvm: " + kvm.problem + "; software engine: " + soft.problem};
  }
  if (!kvm.usable()) return {EngineKind::kSoft, "/dev/kvm cannot be used: " + kvm.problem};
  if (!soft.usable()) return {EngineKind::kKvm, "the software engine does not work: " + soft.problem};
  const bool kvm_faster = kvm.speed->million_insns_per_second >= soft.speed->million_insns_per_second;
  const auto& winner = kvm_faster ? kvm : soft;
  const auto& other = kvm_faster ? soft : kvm;
  return {winner.kind, std::string("it is the faster: ") + speed_text(*winner.speed) + ", " +
                           (kvm_faster ? "the software engine " : "/dev/kvm ") + speed_text(*other.speed)};
}

}  // namespace ring3::control
