#pragma once
#include "base/types.hpp"

namespace ring3::engine {

/// Addresses of the process, page aligned.
struct HostRange {
  u64 begin = 0, end = 0;
};

}  // namespace ring3::engine
