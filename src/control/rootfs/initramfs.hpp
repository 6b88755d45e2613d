#pragma once
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::rootfs {

/// A cpio archive in the kernel's "newc" form (Documentation/driver-api/early-userspace/buffer-format).
class Archive {
 public:
  void directory(const std::string& path);
  void file(const std::string& path, std::span<const u8> content, u32 mode);
  void character_device(const std::string& path, u32 major, u32 minor);
  /// The whole archive. Once.
  std::vector<u8> finish();

 private:
  void entry(const std::string& path, u32 mode, std::span<const u8> content, u32 major, u32 minor);
  std::vector<u8> bytes_;
  u32 next_inode_ = 1;
};

/// The release ("6.1.0-56-cloud-amd64") that a bzImage says it is; empty when it says nothing.
std::string kernel_release(const std::string& path);

/// The files of those modules that are there for a kernel: in modules-RELEASE beside it, or in /lib/modules/RELEASE. What is not
/// found is taken for built in. Names with '_' are also looked for with '-'; .ko, .ko.xz, .ko.zst and .ko.gz count.
std::vector<std::string> find_modules(const std::string& kernel, std::span<const std::string_view> names);

/// The initramfs of `ring3 run --rootfs`: our init, the modules that virtio-fs needs and those for `devices`, the names of
/// further drivers with what they need before them. Errors: a module cannot be read.
Result<std::vector<u8>> make_initramfs(const std::string& kernel, std::span<const std::string_view> devices);

}  // namespace ring3::rootfs
