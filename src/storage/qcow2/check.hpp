#pragma once
#include <functional>
#include <string>
#include <vector>

#include "base/types.hpp"

namespace ring3::storage::qcow2 {

enum class Repair { kNone, kLeaks, kAll };

/// Told how far a check is: of the disk's size, so many bytes. Never less than before.
using CheckProgress = std::function<void(u64 done)>;

/// What a check found, and left.
struct CheckReport {
  u64 corruptions = 0, leaks = 0;                       ///< before repairs
  u64 corruptions_fixed = 0, leaks_fixed = 0;
  u64 image_end = 0;                                    ///< bytes: the end of the last cluster in use
  u64 total_clusters = 0, allocated_clusters = 0, compressed_clusters = 0, fragmented_clusters = 0;
  std::vector<std::string> messages;                    ///< at most kMostMessages
  static constexpr std::size_t kMostMessages = 100;

  u64 corruptions_left() const { return corruptions - corruptions_fixed; }
  u64 leaks_left() const { return leaks - leaks_fixed; }
};

}  // namespace ring3::storage::qcow2
