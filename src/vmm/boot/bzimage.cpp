#include <algorithm>

#include "vmm/boot/formats.hpp"

// Linux boot protocol: Documentation/x86/boot.rst. Offsets are those of the file and of the zero page.
namespace ring3::boot::detail {
namespace {

enum : u64 {
  kSetupSects = 0x1f1,
  kSysSize = 0x1f4,
  kVidMode = 0x1fa,
  kBootFlag = 0x1fe,
  kJumpLength = 0x201,
  kMagic = 0x202,
  kVersion = 0x206,
  kLoaderType = 0x210,
  kLoadFlags = 0x211,
  kCode32Start = 0x214,
  kRamdiskImage = 0x218,
  kRamdiskSize = 0x21c,
  kCmdLinePtr = 0x228,
  kInitrdMax = 0x22c,
  kAlignment = 0x230,
  kRelocatable = 0x234,
  kXLoadFlags = 0x236,
  kCmdlineSize = 0x238,
  kPrefAddress = 0x258,
  kInitSize = 0x260,
  kHeaderCopyEnd = 0x290,  // where the zero page goes on with fields of its own
};
constexpr u32 kHdrS = 0x53726448;
constexpr u8 kLoadedHigh = 1;
constexpr u16 kXlfKernel64 = 1;
constexpr u64 kEntry64 = 0x200;
constexpr u64 kSector = 512;

template <class T>
T field(const Kernel& f, u64 at) {  // of a header whose length is known
  return get<T>(f, at).value_or(0);
}

}  // namespace

bool is_bzimage(const Kernel& f) {
  return get<u32>(f, kMagic) == kHdrS && get<u16>(f, kBootFlag) == u16{0xaa55};
}

Result<Entry> load_bzimage(const Kernel& f, std::span<u8> ram) {
  const Request& r = f.request();
  const std::string kernel = "kernel " + f.name();
  if (f.size() < kHeaderCopyEnd) return bad(kernel + " is truncated: it ends inside its header");
  const u16 version = field<u16>(f, kVersion);
  if (version < 0x202 || !(field<u8>(f, kLoadFlags) & kLoadedHigh)) {
    return bad(kernel + " is too old: a bzImage of boot protocol 2.02 or later is needed");
  }
  const u8 sects = field<u8>(f, kSetupSects);
  const u64 payload = (u64{sects ? sects : u8{4}} + 1) * kSector;
  if (payload >= f.size()) return bad(kernel + " is truncated: it ends before its code begins");
  const u64 present = f.size() - payload;
  u64 code = present;
  if (version >= 0x204) {
    const u64 wanted = u64{field<u32>(f, kSysSize)} * 16;
    // The size is rounded up to 16 and may count a checksum that old builds left out.
    if (wanted > present + 32) {
      return bad(kernel + " is truncated: its header says " + std::to_string(payload + wanted) + " bytes, the file has " +
                 std::to_string(f.size()));
    }
  }

  const bool relocatable = version >= 0x205 && field<u8>(f, kRelocatable) != 0;
  u64 alignment = version >= 0x205 ? field<u32>(f, kAlignment) : 0;
  if (alignment == 0) alignment = 0x100000;
  if ((alignment & (alignment - 1)) != 0) return bad(kernel + " is damaged: its alignment is no power of two");
  const u64 preferred = version >= 0x20a ? field<u64>(f, kPrefAddress) : layout::kHighMemory;
  const u64 needed = std::max<u64>(code, version >= 0x20a ? field<u32>(f, kInitSize) : code * 3);

  u64 load = preferred;
  if (load < layout::kHighMemory || !range_within<u64>(load, needed, ram.size())) {
    const u64 lowest = (layout::kHighMemory + alignment - 1) & ~(alignment - 1);
    if (relocatable && lowest >= layout::kHighMemory && range_within<u64>(lowest, needed, ram.size())) {
      load = lowest;
    } else {
      const u64 from = relocatable ? lowest : std::max(preferred, layout::kHighMemory);
      const auto end = checked_add(from, needed);
      if (!end || *end > layout::kHoleStart) return bad(kernel + " is damaged: it asks for memory beyond 3 GiB");
      return bad(kernel + " needs " + mib(*end) + " of memory to start, the VM has " + mib(ram.size()) +
                 ": give it more with --memory");
    }
  }

  const u64 cmdline_max = version >= 0x206 ? field<u32>(f, kCmdlineSize) : 255;
  if (auto s = put_command_line(r, ram, r.command_line, cmdline_max); !s) return s.error();
  u64 initrd = 0;
  if (r.initrd) {
    const u64 limit = (version >= 0x203 ? u64{field<u32>(f, kInitrdMax)} : u64{0x37ffffff}) + 1;
    auto place = place_initrd_high(r, ram, load + needed, limit);
    if (!place) return place.error();
    initrd = *place;
  }
  if (auto s = load_segment(f, ram, payload, code, load, code); !s) return s.error();
  if (r.initrd) {
    if (auto s = put_initrd(r, ram, initrd); !s) return s.error();
  }

  put_zero_page(r, ram);
  const auto zero = ram.subspan(layout::kZeroPage, kPageSize);
  const u64 header_end = std::min<u64>(kMagic + field<u8>(f, kJumpLength), kHeaderCopyEnd);
  if (header_end > kSetupSects) std::memcpy(zero.data() + kSetupSects, f.head().data() + kSetupSects, header_end - kSetupSects);
  put<u16>(zero, kVidMode, 0xffff);  // normal
  put<u8>(zero, kLoaderType, 0xff);  // no assigned number
  put<u32>(zero, kCode32Start, static_cast<u32>(load));
  put<u32>(zero, kCmdLinePtr, layout::kCommandLine);
  put<u32>(zero, kRamdiskImage, static_cast<u32>(initrd));
  put<u32>(zero, kRamdiskSize, r.initrd ? static_cast<u32>(r.initrd->size) : 0);

  const bool long_mode = version >= 0x20c && (field<u16>(f, kXLoadFlags) & kXlfKernel64) && code > kEntry64;
  put_gdt(ram, long_mode);
  Entry e;
  e.format = long_mode ? "bzImage, 64-bit entry" : "bzImage, 32-bit entry";
  e.rsi = layout::kZeroPage;
  e.rip = load;
  if (long_mode) {
    e.mode = Entry::Mode::kLong64;
    e.rip = load + kEntry64;
    e.cr3 = put_page_tables(ram);
  }
  return e;
}

}  // namespace ring3::boot::detail
