#include <nlohmann/json.hpp>

#include <cstdio>

#include "control/cli/commands.hpp"
#include "control/cli/host.hpp"
#include "control/cli/text.hpp"
#include "engine/abi/provider.hpp"

namespace ring3::control {

namespace {

using Json = nlohmann::ordered_json;

Json engine_json(const EngineReport& report) {
  Json json;
  json["usable"] = report.usable();
  json["opens"] = report.opens;
  json["complete"] = report.complete;
  if (report.speed) {
    json["million_instructions_per_second"] = report.speed->million_insns_per_second;
    json["milliseconds_to_long_mode"] = report.speed->milliseconds_to_long_mode;
    json["guest_x86_64_v2"] = report.speed->x86_64_v2;
  } else {
    json["million_instructions_per_second"] = nullptr;
  }
  json["problem"] = report.problem.empty() ? Json(nullptr) : Json(report.problem);
  return json;
}

Json host_json(const HostInfo& host) {
  Json json;
  json["kernel"] = host.kernel;
  json["cpu_model"] = host.cpu_model;
  json["cpus"] = host.cpus;
  json["x86_64_level"] = host.x86_64_level;
  json["features"] = host.present;
  json["missing_features"] = host.absent;
  json["virtualised"] = host.virtualised;
  json["hardware_virtualisation"] = host.hardware_virtualisation;
  json["memory_total_bytes"] = host.memory_total;
  json["memory_available_bytes"] = host.memory_available;
  json["swap_total_bytes"] = host.swap_total;
  json["memory_limit_bytes"] = host.memory_limit ? Json(*host.memory_limit) : Json(nullptr);
  json["max_map_count"] = host.max_map_count;
  json["overcommit_memory"] = host.overcommit;
  json["kvm_device_present"] = host.kvm_present;
  json["seccomp_filters"] = host.seccomp_filters;
  json["user_namespaces"] = host.user_namespaces;
  json["landlock_abi"] = host.landlock_abi;
  return json;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const auto& word : words) text += (text.empty() ? "" : " ") + word;
  return text.empty() ? "none" : text;
}

const char* yes_no(bool value) { return value ? "yes" : "no"; }

std::string row(const std::string& name, const std::string& value) {
  std::string line = "  " + name;
  line.resize(std::max<std::size_t>(line.size() + 1, 26), ' ');
  return line + value + "\n";
}

std::string engine_text(const EngineReport& report) {
  std::string text;
  if (report.speed) {
    char speed[160];
    std::snprintf(speed, sizeof speed, "%.1f million instructions a second; long mode after %.2f ms; guest CPU %s",
                  report.speed->million_insns_per_second, report.speed->milliseconds_to_long_mode,
                  report.speed->x86_64_v2 ? "x86-64-v2 or better" : "below x86-64-v2");
    text = speed;
  }
  if (!report.usable()) text += (text.empty() ? "not usable: " : "; not usable: ") + report.problem;
  return text;
}

}  // namespace

int doctor(const DoctorOptions& options) {
  using std::chrono::milliseconds;
  const HostInfo host = host_info();
  const EngineReport kvm = examine(EngineKind::kKvm, {}, milliseconds(1500));
  const EngineReport soft = examine(EngineKind::kSoft, {}, milliseconds(1500));
  const EngineChoice choice = choose(kvm, soft);
  const int status = choice.kind ? kSuccess : kFailure;

  if (options.json) {
    Json json;
    json["version"] = version();
    json["host"] = host_json(host);
    json["engines"]["kvm"] = engine_json(kvm);
    json["engines"]["soft"] = engine_json(soft);
    json["engines"]["soft"]["runs_guests_in"] = soft_engine_kind({});
    json["choice"]["engine"] = choice.kind ? Json(to_string(*choice.kind)) : Json(nullptr);
    json["choice"]["reason"] = choice.reason;
    const int printed = print(json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n");
    return printed == kSuccess ? status : printed;
  }

  std::string text = "Host\n";
  text += row("kernel", host.kernel);
  text += row("CPU", host.cpu_model + " (x86-64-v" + std::to_string(host.x86_64_level) + "), " + std::to_string(host.cpus) +
                         (host.cpus == 1 ? " CPU" : " CPUs") + (host.virtualised ? ", itself in a VM" : ""));
  text += row("CPU features", joined(host.present));
  text += row("missing CPU features", joined(host.absent));
  text += row("VT-x or AMD-V", yes_no(host.hardware_virtualisation));
  text += row("memory", format_size(host.memory_total) + ", " + format_size(host.memory_available) + " available, " +
                            format_size(host.swap_total) + " swap" +
                            (host.memory_limit ? ", control group limit " + format_size(*host.memory_limit) : ""));
  text += row("vm.max_map_count", std::to_string(host.max_map_count));
  text += row("vm.overcommit_memory", std::to_string(host.overcommit));
  text += row("seccomp filters", yes_no(host.seccomp_filters));
  text += row("user namespaces", yes_no(host.user_namespaces));
  text += row("Landlock", host.landlock_abi > 0 ? "ABI " + std::to_string(host.landlock_abi) : "no");
  text += "\nEngines\n";
  text += row("kvm: /dev/kvm", std::string(host.kvm_present ? "present" : "absent") + ", " + (kvm.opens ? "opens" : "does not open"));
  text += row("kvm", engine_text(kvm));
  text += row("soft", engine_text(soft));
  text += row("soft runs guests in", std::string("the ") + soft_engine_kind({}) + (engine::can_translate() ? "" : std::string(": ") + engine::kCannotTranslate));
  text += "\nChoice\n";
  text += row("--engine auto", choice.kind ? std::string(to_string(*choice.kind)) + ": " + choice.reason : choice.reason);
  const int printed = print(text);
  return printed == kSuccess ? status : printed;
}

int print_version(const VersionOptions& options) {
  if (!options.json) return print(std::string("ring3 ") + version() + "\n");
  Json json;
  json["version"] = version();
  json["engines"] = {"kvm", "soft"};
  return print(json.dump(2) + "\n");
}

}  // namespace ring3::control
