#pragma once
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/checked.hpp"
#include "vmm/boot/loader.hpp"

/// Shared by the loaders of this room; not for others.
namespace ring3::boot::detail {

/// What of a kernel's file is looked at: its beginning, read once, and what that names elsewhere.
class Kernel {
 public:
  static constexpr u64 kHead = 40 * 1024;  ///< headers, and what tells other files (a CD's magic stands at 32 KiB)
  static Result<Kernel> open(const Request& r);

  const Request& request() const { return *request_; }
  const std::string& name() const { return request_->kernel.name; }
  u64 size() const { return request_->kernel.size; }
  std::span<const u8> head() const { return head_; }
  /// False: it does not lie in the file, or cannot be read.
  bool read(u64 at, std::span<u8> into) const;

 private:
  explicit Kernel(const Request& r) : request_(&r) {}
  const Request* request_;
  std::vector<u8> head_;
};

/// A little-endian integer at `at`, or nothing when it does not lie in the file.
template <class T>
std::optional<T> get(std::span<const u8> file, u64 at) {
  if (!range_within<u64>(at, sizeof(T), file.size())) return std::nullopt;
  T v;
  std::memcpy(&v, file.data() + at, sizeof v);
  return v;
}
template <class T>
std::optional<T> get(const Kernel& kernel, u64 at) {
  u8 bytes[sizeof(T)];
  if (!kernel.read(at, bytes)) return std::nullopt;
  return get<T>(bytes, 0);
}

/// Stores at a place that is ours to choose and known to lie in ram.
template <class T>
void put(std::span<u8> ram, u64 at, T v) {
  if (range_within<u64>(at, sizeof v, ram.size())) std::memcpy(ram.data() + at, &v, sizeof v);
}

inline std::string mib(u64 bytes) { return std::to_string((bytes + (1 << 20) - 1) >> 20) + " MiB"; }
inline Error bad(const std::string& message) { return Error::of(EINVAL, message); }

/// Whether [start, start+size) may be loaded over: in RAM and not over what is ours below 1 MiB.
Status check_place(const std::string& name, u64 start, u64 size, u64 ram);

/// Reads `size` bytes of the file to `start` and zeroes up to `memory` bytes. All checked.
Status load_segment(const Kernel& k, std::span<u8> ram, u64 file_offset, u64 size, u64 start, u64 memory);

/// The command line with its final 0 at layout::kCommandLine.
Status put_command_line(const Request& r, std::span<u8> ram, const std::string& line, u64 limit);
/// Reads the initrd to `start`.
Status put_initrd(const Request& r, std::span<u8> ram, u64 start);
/// The highest page-aligned place for the initrd in [lowest, limit), or why there is none.
Result<u64> place_initrd_high(const Request& r, std::span<const u8> ram, u64 lowest, u64 limit);

void put_gdt(std::span<u8> ram, bool long_mode);
/// Identity map of 4 GiB in 2 MiB pages; returns CR3.
u64 put_page_tables(std::span<u8> ram);
/// Empties the zero page and fills what does not come from the kernel's header: E820, RSDP.
void put_zero_page(const Request& r, std::span<u8> ram);

bool is_bzimage(const Kernel& k);
Result<Entry> load_bzimage(const Kernel& k, std::span<u8> ram);

bool is_elf(const Kernel& k);
/// The PVH entry point of an ELF file, if it has the note. Checks nothing else.
std::optional<u64> pvh_entry(const Kernel& k);
Result<Entry> load_elf(const Kernel& k, std::span<u8> ram);

/// Loads the PT_LOAD segments at their physical addresses; returns the end of the highest one.
struct ElfLoaded {
  u64 end = 0;
  u64 entry = 0;
  bool is64 = false;
  bool kernel_half = false;    ///< every segment is linked in the upper half
  bool entry_in_segment = false;
};
Result<ElfLoaded> load_elf_segments(const Kernel& k, std::span<u8> ram);

/// Offset of a valid multiboot-1 header in the first 8 KiB.
std::optional<u64> find_multiboot(const Kernel& k);
Result<Entry> load_multiboot(const Kernel& k, std::span<u8> ram, u64 header);

}  // namespace ring3::boot::detail
