#include "vmm/boot/loader.hpp"

#include <algorithm>
#include <string_view>

#include "vmm/boot/formats.hpp"

namespace ring3::boot {

std::vector<MemoryRange> memory_map(u64 memory) {
  using namespace layout;
  const u64 low = std::min(memory, kHoleStart);
  std::vector<MemoryRange> map;
  map.push_back({Gpa(0), std::min(low, kEbda), MemoryType::kUsable});
  map.push_back({Gpa(kEbda), 0xa0000 - kEbda, MemoryType::kReserved});
  map.push_back({Gpa(kAcpiTables), kHighMemory - kAcpiTables, MemoryType::kReserved});
  if (low > kHighMemory) map.push_back({Gpa(kHighMemory), low - kHighMemory, MemoryType::kUsable});
  // The pages KVM keeps for itself on some hosts, and the firmware's place.
  map.push_back({Gpa(0xfffb0000), kHoleEnd - 0xfffb0000, MemoryType::kReserved});
  if (memory > kHoleStart) map.push_back({Gpa(kHoleEnd), memory - kHoleStart, MemoryType::kUsable});
  return map;
}

namespace detail {

Status check_place(const std::string& name, u64 start, u64 size, u64 ram) {
  using namespace layout;
  if (size == 0) return Ok{};
  if (!range_within<u64>(start, size, ram)) {
    return bad("kernel " + name + " does not fit: it wants memory up to " +
               (checked_add(start, size) ? mib(start + size) : "beyond 2^64") + ", the VM has " + mib(ram) +
               " below 3 GiB: give it more with --memory");
  }
  if (start < kHighMemory && start + size > kBootArea) {
    return bad("kernel " + name + " wants to be loaded over the machine's own area from 0x90000 to 1 MiB");
  }
  return Ok{};
}

Result<Kernel> Kernel::open(const Request& r) {
  Kernel k(r);
  k.head_.resize(std::min(r.kernel.size, kHead));
  if (auto s = r.kernel.read(0, k.head_); !s) return s.error();
  return k;
}

bool Kernel::read(u64 at, std::span<u8> into) const {
  if (!range_within<u64>(at, into.size(), size())) return false;
  if (into.empty()) return true;
  if (!range_within<u64>(at, into.size(), head_.size())) return request_->kernel.read(at, into).ok();
  std::memcpy(into.data(), head_.data() + at, into.size());
  return true;
}

Status load_segment(const Kernel& k, std::span<u8> ram, u64 file_offset, u64 size, u64 start, u64 memory) {
  if (!range_within<u64>(file_offset, size, k.size())) {
    return bad("kernel " + k.name() + " is truncated: a part it names lies beyond the file's end");
  }
  if (size > memory) return bad("kernel " + k.name() + " is damaged: a segment is longer in the file than in memory");
  if (auto s = check_place(k.name(), start, memory, ram.size()); !s) return s;
  if (size != 0) {
    if (auto s = k.request().kernel.read(file_offset, ram.subspan(start, size)); !s) return s;
  }
  if (memory > size) std::memset(ram.data() + start + size, 0, memory - size);
  return Ok{};
}

Status put_command_line(const Request&, std::span<u8> ram, const std::string& line, u64 limit) {
  using namespace layout;
  limit = std::min(limit, kCommandLineMax - 1);
  if (line.size() > limit) {
    return bad("the kernel command line has " + std::to_string(line.size()) + " characters; this kernel takes " +
               std::to_string(limit));
  }
  if (line.find('\0') != std::string::npos) return bad("the kernel command line holds a NUL character");
  std::memcpy(ram.data() + kCommandLine, line.c_str(), line.size() + 1);
  return Ok{};
}

Status put_initrd(const Request& r, std::span<u8> ram, u64 start) {
  if (!range_within<u64>(start, r.initrd->size, ram.size())) return bad("the initrd does not fit in memory");
  return r.initrd->read(0, ram.subspan(start, r.initrd->size));
}

Result<u64> place_initrd_high(const Request& r, std::span<const u8> ram, u64 lowest, u64 limit) {
  limit = std::min<u64>(limit, ram.size());
  const u64 size = r.initrd->size;
  if (size <= limit) {
    const u64 start = (limit - size) & kPageMask;
    if (start >= lowest) return start;
  }
  return bad("initrd " + r.initrd->name + " (" + mib(size) + ") does not fit beside the kernel, which takes memory up to " +
             mib(lowest) + ": give the VM more memory than " + mib(ram.size()) + " with --memory");
}

void put_gdt(std::span<u8> ram, bool long_mode) {
  put<u64>(ram, layout::kGdt, 0);
  put<u64>(ram, layout::kGdt + 8, 0);
  put<u64>(ram, layout::kGdt + Entry::kCode, long_mode ? 0x00af9b000000ffff : 0x00cf9b000000ffff);
  put<u64>(ram, layout::kGdt + Entry::kData, 0x00cf93000000ffff);
  put<u64>(ram, layout::kGdt + Entry::kTss, 0x00008b0000000067);
}

u64 put_page_tables(std::span<u8> ram) {
  constexpr u64 kPresentWritable = 3, kLarge = 0x80;
  const u64 pml4 = layout::kPageTables, pdpt = pml4 + kPageSize, pd = pdpt + kPageSize;
  std::memset(ram.data() + pml4, 0, 6 * kPageSize);
  put<u64>(ram, pml4, pdpt | kPresentWritable);
  for (u64 i = 0; i < 4; i++) put<u64>(ram, pdpt + i * 8, (pd + i * kPageSize) | kPresentWritable);
  for (u64 i = 0; i < 4 * 512; i++) put<u64>(ram, pd + i * 8, i << 21 | kPresentWritable | kLarge);
  return pml4;
}

void put_zero_page(const Request& r, std::span<u8> ram) {
  constexpr u64 kRsdpAddress = 0x070, kE820Count = 0x1e8, kE820Table = 0x2d0;
  const auto page = ram.subspan(layout::kZeroPage, kPageSize);
  std::fill(page.begin(), page.end(), u8{0});
  put<u64>(page, kRsdpAddress, r.rsdp.value);
  u64 at = kE820Table;
  const auto map = memory_map(r.memory);
  put<u8>(page, kE820Count, static_cast<u8>(map.size()));
  for (const auto& range : map) {
    put<u64>(page, at, range.start.value);
    put<u64>(page, at + 8, range.size);
    put<u32>(page, at + 16, static_cast<u32>(range.type));
    at += 20;
  }
}

namespace {

// What a file is that is no kernel for us: the more exact, the sooner the user sees the mistake.
std::string describe(std::span<const u8> f) {
  const auto starts = [&](std::string_view magic, u64 at = 0) {
    return range_within<u64>(at, magic.size(), f.size()) && std::memcmp(f.data() + at, magic.data(), magic.size()) == 0;
  };
  if (starts("\x1f\x8b")) return "is gzip-compressed: unpack it with gunzip first";
  if (starts(std::string_view("\xfd"
                              "7zXZ\0",
                              6))) {
    return "is xz-compressed: unpack it with unxz first";
  }
  if (starts("\x28\xb5\x2f\xfd")) return "is zstd-compressed: unpack it with unzstd first";
  if (starts("BZh")) return "is bzip2-compressed: unpack it with bunzip2 first";
  if (starts("\x04\x22\x4d\x18") || starts("\x02\x21\x4c\x18")) return "is lz4-compressed: unpack it with unlz4 first";
  if (starts("ARM\x64", 0x38)) return "is a kernel for AArch64, not for x86-64";
  if (starts("070701") || starts("070702")) return "is a cpio archive: give it as --initrd, and a kernel as --kernel";
  if (starts("QFI\xfb")) return "is a qcow2 disk image, not a kernel";
  if (starts("CD001", 0x8001)) return "is a CD image, not a kernel";
  if (starts("#!")) return "is a script, not a kernel";
  if (starts("!<arch>\n")) return "is an archive (.deb or .a), not a kernel: unpack it first";
  if (starts("HdrS", 0x202)) return "is a damaged Linux kernel: its boot sector has no signature";
  if (starts("MZ")) return "is a Windows or EFI program without a Linux boot header";
  if (starts("\x55\xaa", 510)) return "looks like a boot sector or a disk image, not a kernel";
  const std::size_t n = std::min<std::size_t>(f.size(), 512);
  const bool text = std::all_of(f.begin(), f.begin() + static_cast<std::ptrdiff_t>(n), [](u8 c) {
    return (c >= 0x20 && c != 0x7f) || c == '\n' || c == '\r' || c == '\t';
  });
  if (text) return "is a text file, not a kernel";
  return "is not a kernel this VM can load (bzImage, ELF with a PVH entry, or multiboot)";
}

}  // namespace
}  // namespace detail

File File::of(std::string name, std::span<const u8> bytes) {
  return {std::move(name), bytes.size(), [bytes](u64 at, std::span<u8> into) -> Status {
            std::memcpy(into.data(), bytes.data() + at, into.size());
            return Ok{};
          }};
}

Result<Entry> load_kernel(const Request& r, std::span<u8> ram) {
  using namespace detail;
  if (r.kernel.size == 0) return bad("kernel " + r.kernel.name + " is empty");
  if (ram.size() < layout::kHighMemory) return bad("a kernel needs 1 MiB of memory at least");
  auto k = Kernel::open(r);
  if (!k) return k.error();
  if (is_bzimage(*k)) return load_bzimage(*k, ram);
  if (is_elf(*k) && pvh_entry(*k)) return load_elf(*k, ram);
  if (auto header = find_multiboot(*k)) return load_multiboot(*k, ram, *header);
  if (is_elf(*k)) return load_elf(*k, ram);
  return bad("kernel " + r.kernel.name + " " + describe(k->head()));
}

}  // namespace ring3::boot
