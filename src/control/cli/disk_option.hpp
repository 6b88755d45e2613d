#pragma once
#include <string>

#include "base/result.hpp"

namespace ring3::control {

/// --disk PATH[,ro|readonly][,format=raw|qcow2][,serial=S|id=S][,discard][,cache=none|writeback][,fail=N[:eio|enospc]]
struct DiskOption {
  std::string path;
  std::string format;      ///< raw, qcow2; empty: by the name
  std::string serial;      ///< empty: made from the number of the disk
  bool read_only = false;
  bool direct = false;     ///< cache=none
  unsigned long fail_every = 0;  ///< for tests: every so many accesses of the image's files fail
  int fail_code = 0;       ///< EIO, ENOSPC
};

/// Words are separated by commas; a comma in the path is written twice. Error: EINVAL, one line.
Result<DiskOption> parse_disk_option(const std::string& text);

}  // namespace ring3::control
