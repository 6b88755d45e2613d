#pragma once
#include <memory>
#include <optional>
#include <string>

#include "base/result.hpp"
#include "storage/block/faulty_file.hpp"
#include "storage/block/image.hpp"
#include "storage/qcow2/qcow2_image.hpp"

/// Disk images by name: the format, the chain of backing files, the locks.
namespace ring3::storage {

enum class Format { kRaw, kQcow2 };

/// What a name says: .qcow2 and .qcow are qcow2, all else is raw.
Format format_of_name(const std::string& path);
/// "raw", "qcow2". Error: EINVAL, naming the formats there are.
Result<Format> parse_format(const std::string& text);

struct OpenOptions {
  std::optional<Format> format;  ///< nothing: by the name; then a raw image may not look like another format
  bool writable = false;
  bool direct = false;
  bool backing = true;           ///< false: an image that has a backing file is refused
  bool lock = true;
  std::shared_ptr<Faults> faults;  ///< for tests: armed once all is open
};

/// Opens an image and, read-only, the files below it: at most 64, no file twice, plain local files whose format the
/// image names (or else their extension). Errors: one line that says what to do.
Result<std::unique_ptr<Image>> open_image(const std::string& path, const OpenOptions& options);

/// A qcow2 image without the files below it; lenient: see Qcow2Image::OpenOptions.
Result<std::unique_ptr<qcow2::Qcow2Image>> open_qcow2_alone(const std::string& path, bool writable, bool lenient);

/// What a backing file's name means in an image at `path`: relative names start at the image's folder.
std::string resolve_backing(const std::string& path, const std::string& backing);

}  // namespace ring3::storage
