#pragma once
#include <ctime>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::iso {

struct File {
  std::string name;  ///< UTF-8, at most 64 characters, no '/'
  std::string content;
};

/// A CD image of some files in its root directory, as configuration disks need it.
///
/// Spec:     ECMA-119 (ISO 9660), with file identifiers of level 1; Rock Ridge (IEEE P1282: SP, ER, PX, NM) and Joliet (UCS-2
///           level 3) beside it, so that every system shows the names as they were given.
/// Reproducible: the same files, label and time give the same bytes.
/// Errors:   EINVAL: a name or label that cannot be written, two files of one name; EFBIG: more than 64 MiB altogether.
Result<std::vector<u8>> build(const std::string& label, std::span<const File> files, std::time_t time);

}  // namespace ring3::iso
