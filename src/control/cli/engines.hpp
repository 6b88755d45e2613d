#pragma once
#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "base/result.hpp"
#include "kvm/endpoint.hpp"
#include "kvm/probe.hpp"

/// Which KVM to run on: the kernel's /dev/kvm or the software engine. Above this file nobody knows.
namespace ring3::control {

enum class EngineKind { kKvm, kSoft };
const char* to_string(EngineKind kind);

using EngineOptionMap = std::map<std::string, std::string>;

/// What runs guest code on the software engine with these options: "translator" or "interpreter".
const char* soft_engine_kind(const EngineOptionMap& options);

/// Says so, once, when the interpreter runs guests only because this host cannot run translated code.
void warn_without_translator(const EngineOptionMap& options);

/// A system object of that engine. Errors: why there is none, in one line.
Result<std::unique_ptr<kvm::Endpoint>> open_engine(EngineKind kind, const EngineOptionMap& options);

/// One engine, tried with the probe guest.
struct EngineReport {
  EngineKind kind;
  bool opens = false;                     ///< a system object can be had
  bool complete = false;                  ///< it has the capabilities a machine needs
  std::optional<kvm::ProbeResult> speed;  ///< what the probe guest measured, when it ran
  std::string problem;                    ///< why it is not usable; empty when it is
  int errno_code = 0;

  bool usable() const { return problem.empty(); }
};
EngineReport examine(EngineKind kind, const EngineOptionMap& options, std::chrono::milliseconds limit);

/// The faster of two usable engines, or the usable one, and why in one line. A software engine that is complete, and that only the
/// probe guest did not show to be usable, is taken when there is no other. Pure.
struct EngineChoice {
  std::optional<EngineKind> kind;  ///< nothing: neither is usable
  std::string reason;
};
EngineChoice choose(const EngineReport& kvm, const EngineReport& soft);

}  // namespace ring3::control
