#pragma once

/// CHECK(condition): a bug of ours when it fails. Never reachable from guest input: what a guest
/// can cause is a fault delivered to the guest, what the host can cause is a Result.
namespace ring3::detail {
[[noreturn]] void check_failed(const char* expression, const char* file, int line);
}

#define CHECK(cond) \
  (static_cast<bool>(cond) ? void(0) : ::ring3::detail::check_failed(#cond, __FILE__, __LINE__))
