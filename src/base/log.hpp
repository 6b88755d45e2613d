#pragma once
#include <spdlog/spdlog.h>

/// Logging goes through spdlog's default logger (stderr, "ring3: message"); never on a vCPU's fast path.
namespace ring3::log {
using spdlog::debug;
using spdlog::error;
using spdlog::info;
using spdlog::warn;
}  // namespace ring3::log
