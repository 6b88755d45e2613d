#include "storage/image/open.hpp"

#include <algorithm>
#include <cstring>
#include <set>

#include "storage/block/host_file.hpp"
#include "storage/block/raw.hpp"

namespace ring3::storage {
namespace {

constexpr std::size_t kMostBelow = 64;
using Seen = std::set<std::pair<u64, u64>>;

bool ends_with(const std::string& s, const char* end) {
  const std::size_t n = std::strlen(end);
  return s.size() >= n && s.compare(s.size() - n, n, end) == 0;
}

// The name of the format whose mark a file begins with, or nullptr.
const char* looks_like(File& file) {
  static constexpr struct {
    const char* name;
    u64 at;
    std::string_view mark;
  } kMarks[] = {{"qcow2", 0, "QFI\xfb"}, {"qed", 0, std::string_view("QED\0", 4)}, {"vmdk", 0, "KDMV"},
                {"vhdx", 0, "vhdxfile"}, {"vpc", 0, "conectix"}, {"vdi", 64, std::string_view("\x7f\x10\xda\xbe", 4)},
                {"luks", 0, std::string_view("LUKS\xba\xbe", 6)}};
  u8 b[128] = {};
  if (file.read(0, std::span<u8>(b)) < 0) return nullptr;
  for (const auto& m : kMarks) {
    if (std::memcmp(b + m.at, m.mark.data(), m.mark.size()) == 0) return m.name;
  }
  return nullptr;
}

std::unique_ptr<File> behind_faults(std::unique_ptr<File> file, const OpenOptions& o) {
  if (!o.faults) return file;
  return std::make_unique<FaultyFile>(std::move(file), o.faults);
}

Result<std::unique_ptr<Image>> open_one(const std::string& path, const OpenOptions& o, Seen& seen) {
  HostFile::Options host;
  host.writable = o.writable;
  host.direct = o.direct;
  host.lock = o.lock;
  auto file = HostFile::open(path, host);
  if (!file) return file.error();
  if (!seen.insert((*file)->identity()).second) return Error::of(ELOOP, "'" + path + "' is its own backing file");
  if (seen.size() > kMostBelow) return Error::of(ELOOP, "'" + path + "': more than 64 backing files");
  const Format format = o.format.value_or(format_of_name(path));
  if (format == Format::kRaw) {
    if (const char* other = o.format ? nullptr : looks_like(**file)) {
      const std::string says = "'" + path + "' begins like a " + other + " image";
      if (std::strcmp(other, "qcow2") == 0) return Error::of(EINVAL, says + "; say which it is: format=qcow2 or format=raw");
      return Error::of(EINVAL, says + ", which ring3 does not read; convert it (qemu-img convert -O qcow2), or say format=raw for its bytes as they are");
    }
    const i64 size = (*file)->size();
    if (size < 0) return Error::from_errno("'" + path + "'", static_cast<int>(-size));
    return std::unique_ptr<Image>(std::make_unique<RawImage>(behind_faults(std::move(*file), o), static_cast<u64>(size), o.writable));
  }
  auto image = qcow2::Qcow2Image::open(behind_faults(std::move(*file), o), "'" + path + "'", {o.writable, false});
  if (!image) return image.error();
  const qcow2::Header& h = (*image)->header();
  if (!h.backing_file.empty()) {
    if (!o.backing) return Error::of(EPERM, "'" + path + "' has a backing file, and following it was forbidden");
    OpenOptions below;
    below.lock = o.lock;
    below.direct = o.direct;
    below.faults = o.faults;
    if (!h.backing_format.empty()) {
      auto f = parse_format(h.backing_format);
      if (!f) return Error::of(ENOTSUP, "'" + path + "': its backing file has a format that ring3 does not read");
      below.format = *f;
    }
    auto backing = open_one(resolve_backing(path, h.backing_file), below, seen);
    if (!backing) return Error::of(backing.error().code, "backing file of '" + path + "': " + backing.error().message);
    (*image)->set_backing(std::move(*backing));
  }
  return std::unique_ptr<Image>(std::move(*image));
}

}  // namespace

Format format_of_name(const std::string& path) {
  return ends_with(path, ".qcow2") || ends_with(path, ".qcow") ? Format::kQcow2 : Format::kRaw;
}

Result<Format> parse_format(const std::string& text) {
  if (text == "raw") return Format::kRaw;
  if (text == "qcow2") return Format::kQcow2;
  return Error::of(EINVAL, "there is no image format '" + text.substr(0, 40) + "'; there are raw and qcow2");
}

std::string resolve_backing(const std::string& path, const std::string& backing) {
  const auto slash = path.rfind('/');
  if (backing[0] == '/' || slash == std::string::npos) return backing;
  return path.substr(0, slash + 1) + backing;
}

Result<std::unique_ptr<Image>> open_image(const std::string& path, const OpenOptions& options) {
  Seen seen;
  auto image = open_one(path, options, seen);
  if (image && options.faults) options.faults->armed.store(true);
  return image;
}

Result<std::unique_ptr<qcow2::Qcow2Image>> open_qcow2_alone(const std::string& path, bool writable, bool lenient) {
  HostFile::Options host;
  host.writable = writable;
  auto file = HostFile::open(path, host);
  if (!file) return file.error();
  return qcow2::Qcow2Image::open(std::move(*file), "'" + path + "'", {writable, lenient});
}

}  // namespace ring3::storage
