#pragma once
#include <optional>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::control {

/// --share DIR[:TAG][,ro][,owner=ID][,cache=SECONDS]
struct ShareOption {
  std::string directory;
  std::string tag;         ///< what the guest mounts; empty: share, share1, ... by its place
  bool read_only = false;
  std::optional<u32> own_id;  ///< the guest's uid and gid of this user's files; nothing: as on the host
  u32 cache_ms = 1000;        ///< how long the guest may rely on names and attributes
};

/// Words are separated by commas; a comma in the path is written twice. A tag is 1 to 36 letters, digits, '-', '_' and '.'; what
/// follows the last ':' and is none belongs to the path. Error: EINVAL, one line.
Result<ShareOption> parse_share_option(const std::string& text);

}  // namespace ring3::control
