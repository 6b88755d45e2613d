#include "engine/abi/config.hpp"

#include <sched.h>
#include <unistd.h>

#include <charconv>

#include "engine/abi/halt_poll.hpp"
#include "engine/abi/user_memory.hpp"

namespace ring3::engine::abi {
namespace {
Result<u64> number(const std::string& name, const std::string& text, u64 low, u64 high) {
  u64 value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < low || value > high) {
    return Error::of(EINVAL, "engine option " + name + "=" + text + ": a number from " + std::to_string(low) + " to " +
                                 std::to_string(high) + " is needed");
  }
  return value;
}

/// Where the process has one CPU, who waits by looking keeps it from whom it waits for.
bool has_several_cpus() {
  cpu_set_t cpus;
  return sched_getaffinity(getpid(), sizeof cpus, &cpus) != 0 || CPU_COUNT(&cpus) > 1;  // fails with more CPUs than a set holds
}
}  // namespace

Result<Config> Config::create(const EngineOptions& options, bool can_translate) {
  Config config;
  config.translate = can_translate;
  config.signals_announced = options.signals_announced;
  config.halt_poll_ns = has_several_cpus() ? HaltPoll::kDefaultLimit : 0;
  if (options.announces_window_memory && !options.values.contains("windows")) {
    config.windows_announced = true;
    config.windows = kWindows;
  }
  for (const auto& [name, text] : options.values) {
    if (name == "cache-mib") {
      auto v = number(name, text, 1, 1024);
      if (!v) return v.error();
      config.cache_bytes = static_cast<std::size_t>(*v) << 20;
    } else if (name == "code-cache") {
      auto kept = KeptCode::create(text);
      if (!kept) return kept.error();
      config.kept = std::move(*kept);
    } else if (name == "code-mib") {
      auto v = number(name, text, 1, 1024);
      if (!v) return v.error();
      config.code_bytes = static_cast<std::size_t>(*v) << 20;
    } else if (name == "engine") {
      if (text != "interpreter" && text != "translator") {
        return Error::of(EINVAL, "engine option engine=" + text + ": interpreter or translator is needed");
      }
      config.translate = text == "translator";
      if (config.translate && !can_translate) {
        return Error::of(ENOTSUP, "engine option engine=translator: " + std::string(kCannotTranslate));
      }
    } else if (name == "halt-poll-ns") {
      auto v = number(name, text, 0, 1'000'000'000);
      if (!v) return v.error();
      config.halt_poll_ns = *v;
    } else if (name == "lockstep") {
      auto v = number(name, text, 0, ~0u);
      if (!v) return v.error();
      config.lockstep = *v;
    } else if (name == "perf-map") {
      auto v = number(name, text, 0, 1);
      if (!v) return v.error();
      if (*v == 1) {
        auto map = PerfMap::create();
        if (!map) return map.error();
        config.perf_map = std::move(*map);
      }
    } else if (name == "interpreted-ops") {
      auto ops = InterpretedOps::create(text);
      if (!ops) return ops.error();
      config.interpreted_ops = std::move(*ops);
    } else if (name == "windows") {
      auto v = number(name, text, 0, 1u << 16);
      if (!v) return v.error();
      config.windows = static_cast<unsigned>(*v);
    } else if (name == "quantum") {
      auto v = number(name, text, 1, ~0u);
      if (!v) return v.error();
      config.quantum = *v;
    } else {
      return Error::of(EINVAL, "unknown engine option \"" + name + "\" (known: cache-mib, code-cache, code-mib, engine, halt-poll-ns, interpreted-ops, lockstep, perf-map, quantum, windows)");
    }
  }
  if (config.lockstep != 0 && !config.translate) {
    return Error::of(EINVAL, "engine option lockstep compares the translator with the interpreter, and the interpreter alone runs");
  }
  if (!config.translate) config.windows = 0;
  config.clock = std::make_shared<HostClock>();
  config.user_copies = guard_user_copies();
  return config;
}

}  // namespace ring3::engine::abi
