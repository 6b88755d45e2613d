#pragma once
#include <stdlib.h>

#include <filesystem>
#include <string>
#include <system_error>

namespace ring3 {

/// A directory in TMPDIR (/tmp without one) that is there as long as this; what is in it goes with it. For tests.
/// Threading: a plain value.
class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    std::error_code none;
    const std::filesystem::path parent = std::filesystem::temp_directory_path(none);
    std::string name = (none ? std::filesystem::path("/tmp") : parent) / "ring3-XXXXXX";
    if (::mkdtemp(name.data()) != nullptr) path_ = name;
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() {
    std::error_code ignored;
    if (!path_.empty()) std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }  ///< empty: it could not be made

 private:
  std::string path_;
};

}  // namespace ring3
