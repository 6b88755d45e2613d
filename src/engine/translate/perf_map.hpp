#pragma once
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"

/// /tmp/perf-PID.map: tells `perf report` which host code stands for which guest code.
///
/// Spec:      tools/perf/Documentation/jit-interface.txt: lines "START SIZE name", in hexadecimal. A block at guest RIP
///            x is named guest_x (kernel code) or guest_user_x. The kernel's own symbol for x is found in the
///            guest's System.map.
/// Limits:    the file has no times: when the code cache was emptied and filled anew (code-mib is too small), later
///            lines overlap earlier ones and names of that code are doubtful.
/// Threading: any thread.
namespace ring3::engine {

class PerfMap {
 public:
  /// directory: where perf looks, "/tmp". A link that stands at the file's name is not followed.
  static Result<std::unique_ptr<PerfMap>> create(const std::string& directory = "/tmp");
  ~PerfMap();
  PerfMap(const PerfMap&) = delete;
  PerfMap& operator=(const PerfMap&) = delete;

  void add(const void* code, u64 size, u64 rip, bool user);
  const std::string& path() const { return path_; }

 private:
  PerfMap(std::FILE* file, std::string path) : file_(file), path_(std::move(path)) {}
  std::mutex mutex_;
  std::FILE* file_;
  std::string path_;
};

}  // namespace ring3::engine
