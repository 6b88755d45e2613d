#include "control/cli/vm_text.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <vector>

#include "control/cli/text.hpp"

namespace ring3::control {
namespace {

std::string span(u64 seconds) {
  const auto two = [](u64 a, const char* unit_a, u64 b, const char* unit_b) {
    return std::to_string(a) + unit_a + (b != 0 ? " " + std::to_string(b) + unit_b : "");
  };
  if (seconds < 60) return std::to_string(seconds) + "s";
  if (seconds < 3600) return two(seconds / 60, "m", seconds % 60, "s");
  if (seconds < 86400) return two(seconds / 3600, "h", seconds % 3600 / 60, "m");
  return two(seconds / 86400, "d", seconds % 86400 / 3600, "h");
}

}  // namespace

std::string state_of(const vms::VmInfo& vm) {
  if (vm.running()) return "running";
  if (!vm.status) return "killed";
  return "ended (" + std::to_string(*vm.status) + ")";
}

std::string vm_table(std::span<const vms::VmInfo> vms, u64 now) {
  std::vector<std::array<std::string, 7>> rows{{"NAME", "PID", "STATE", "SINCE", "MEMORY", "CPUS", "ENGINE"}};
  for (const vms::VmInfo& vm : vms) {
    rows.push_back({vm.name, vm.pid > 0 ? std::to_string(vm.pid) : "-", state_of(vm),
                    vm.started != 0 && now >= vm.started ? span(now - vm.started) : "-", format_size(vm.memory_bytes),
                    std::to_string(vm.cpus), printable(vm.engine)});
  }
  std::string text;
  std::array<std::size_t, 7> width{};
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); i++) width[i] = std::max(width[i], row[i].size());
  }
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); i++) {
      text += row[i];
      if (i + 1 < row.size()) text += std::string(width[i] - row[i].size() + 2, ' ');
    }
    text += "\n";
  }
  return text;
}

std::string vm_json(std::span<const vms::VmInfo> vms) {
  auto array = nlohmann::json::array();
  for (const vms::VmInfo& vm : vms) {
    nlohmann::json item{{"name", vm.name},     {"state", vm.running() ? "running" : vm.status ? "ended" : "killed"},
                        {"started", vm.started}, {"memory_bytes", vm.memory_bytes},
                        {"cpus", vm.cpus},     {"engine", vm.engine},
                        {"console", vm.console}};
    item["pid"] = vm.pid > 0 ? nlohmann::json(vm.pid) : nlohmann::json();
    item["status"] = vm.status ? nlohmann::json(*vm.status) : nlohmann::json();
    if (vm.status) item["why"] = vm.why;
    array.push_back(std::move(item));
  }
  return array.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace ring3::control
