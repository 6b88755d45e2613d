#include "control/rootfs/initramfs.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>

extern "C" const ring3::u8 ring3_guest_init_start[];
extern "C" const ring3::u8 ring3_guest_init_end[];

namespace ring3::rootfs {
namespace {

namespace files = std::filesystem;
using namespace std::string_view_literals;

constexpr std::array kModules{"virtio"sv, "virtio_ring"sv, "virtio_pci_modern_dev"sv, "virtio_pci_legacy_dev"sv, "virtio_pci"sv,
                              "fuse"sv, "virtiofs"sv,
                              // Tells of a panic.
                              "pvpanic"sv, "pvpanic_mmio"sv};
constexpr std::array kEndings{".ko"sv, ".ko.xz"sv, ".ko.zst"sv, ".ko.gz"sv};

/// Whether a file's name is that of the module, '-' and '_' being one.
bool is_module(std::string file, std::string_view name) {
  const auto dot = file.find(".ko");
  if (dot == std::string::npos || std::find(kEndings.begin(), kEndings.end(), std::string_view(file).substr(dot)) == kEndings.end()) return false;
  file.resize(dot);
  std::replace(file.begin(), file.end(), '-', '_');
  return file == name;
}

}  // namespace

void Archive::entry(const std::string& path, u32 mode, std::span<const u8> content, u32 major, u32 minor) {
  char header[128];
  std::snprintf(header, sizeof header, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", next_inode_++, mode, 0u, 0u,
                1u, 0u, static_cast<u32>(content.size()), 0u, 0u, major, minor, static_cast<u32>(path.size() + 1), 0u);
  const auto align = [this] { bytes_.resize((bytes_.size() + 3) & ~std::size_t{3}); };
  const std::string_view h(header);
  bytes_.insert(bytes_.end(), h.begin(), h.end());
  bytes_.insert(bytes_.end(), path.c_str(), path.c_str() + path.size() + 1);
  align();
  bytes_.insert(bytes_.end(), content.begin(), content.end());
  align();
}

void Archive::directory(const std::string& path) { entry(path, S_IFDIR | 0755, {}, 0, 0); }
void Archive::file(const std::string& path, std::span<const u8> content, u32 mode) { entry(path, S_IFREG | mode, content, 0, 0); }
void Archive::character_device(const std::string& path, u32 major, u32 minor) { entry(path, S_IFCHR | 0600, {}, major, minor); }

std::vector<u8> Archive::finish() {
  entry("TRAILER!!!", 0, {}, 0, 0);
  bytes_.resize((bytes_.size() + 511) & ~std::size_t{511});
  return std::move(bytes_);
}

std::string kernel_release(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::array<char, 0x10000> head{};
  file.read(head.data(), head.size());
  const std::size_t got = static_cast<std::size_t>(file.gcount());
  // The setup header (Documentation/arch/x86/boot): "HdrS" at 0x202, the version's offset less 0x200 at 0x20e.
  if (got < 0x210 || std::string_view(head.data() + 0x202, 4) != "HdrS") return "";
  const std::size_t at = 0x200 + (static_cast<u8>(head[0x20e]) | static_cast<std::size_t>(static_cast<u8>(head[0x20f])) << 8);
  std::string release;
  for (std::size_t i = at; i < got && release.size() < 128; i++) {
    const char c = head[i];
    const bool good = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '.' || c == '-' || c == '_' || c == '+' || c == '~';
    if (!good) break;
    release += c;
  }
  return release == "." || release == ".." ? "" : release;
}

std::vector<std::string> find_modules(const std::string& kernel, std::span<const std::string_view> names) {
  std::vector<std::string> found;
  const std::string release = kernel_release(kernel);
  if (release.empty()) return found;
  std::error_code code;
  const files::path real = files::canonical(kernel, code);
  std::vector<files::path> places;
  if (!code) places.push_back(real.parent_path() / ("modules-" + release));
  places.push_back(files::path("/lib/modules") / release / "kernel");
  for (const files::path& place : places) {
    if (!files::is_directory(place, code)) continue;
    std::vector<files::path> all;
    for (auto it = files::recursive_directory_iterator(place, files::directory_options::skip_permission_denied, code);
         !code && it != files::recursive_directory_iterator(); it.increment(code)) {
      all.push_back(it->path());
    }
    for (const std::string_view name : names) {
      const auto one = std::find_if(all.begin(), all.end(), [&](const files::path& p) { return is_module(p.filename().string(), name); });
      if (one != all.end()) found.push_back(one->string());
    }
    if (!found.empty()) break;  // one kernel's modules are in one place
  }
  return found;
}

Result<std::vector<u8>> make_initramfs(const std::string& kernel, std::span<const std::string_view> devices) {
  Archive archive;
  for (const char* path : {"dev", "proc", "control", "newroot", "modules"}) archive.directory(path);
  archive.character_device("dev/console", 5, 1);
  archive.file("init", {ring3_guest_init_start, ring3_guest_init_end}, 0755);
  std::string order;
  std::vector<std::string_view> names(kModules.begin(), kModules.end());
  names.insert(names.end(), devices.begin(), devices.end());
  for (const std::string& path : find_modules(kernel, names)) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<u8> content{std::istreambuf_iterator<char>(file), {}};
    if (!file || content.empty()) return Error::of(EIO, "cannot read the kernel module " + path);
    const std::string name = files::path(path).filename().string();
    archive.file("modules/" + name, content, 0644);
    order += name + "\n";
  }
  archive.file("modules/ORDER", {reinterpret_cast<const u8*>(order.data()), order.size()}, 0644);
  return archive.finish();
}

}  // namespace ring3::rootfs
