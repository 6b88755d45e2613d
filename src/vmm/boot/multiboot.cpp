#include <algorithm>

#include "vmm/boot/formats.hpp"

// Multiboot Specification 0.6.96: header 3.1, machine state 3.2, information 3.3.
namespace ring3::boot::detail {
namespace {

constexpr u32 kHeaderMagic = 0x1badb002, kLoaderMagic = 0x2badb002;
constexpr u64 kSearch = 8192;
constexpr u32 kAddressFields = 1 << 16;
constexpr u32 kKnownRequirements = 0x7;  // page-aligned modules, memory information, video mode (none is given)

}  // namespace

std::optional<u64> find_multiboot(const Kernel& f) {
  const u64 end = std::min<u64>(f.size(), kSearch);
  for (u64 at = 0; at + 12 <= end; at += 4) {
    if (get<u32>(f, at) != kHeaderMagic) continue;
    const u32 flags = get<u32>(f, at + 4).value_or(0);
    const u32 checksum = get<u32>(f, at + 8).value_or(0);
    if (kHeaderMagic + flags + checksum == 0) return at;
  }
  return std::nullopt;
}

Result<Entry> load_multiboot(const Kernel& f, std::span<u8> ram, u64 header) {
  const Request& r = f.request();
  const std::string kernel = "kernel " + f.name();
  const u32 flags = get<u32>(f, header + 4).value_or(0);
  if (flags & 0xffff & ~kKnownRequirements) {
    return bad(kernel + " requires multiboot features that this VM does not know");
  }
  Entry e;
  e.format = "multiboot";
  e.rax = kLoaderMagic;
  e.rbx = layout::kStartInfo;
  u64 end = 0;
  if (flags & kAddressFields) {
    const auto header_addr = get<u32>(f, header + 12), load_addr = get<u32>(f, header + 16),
               load_end = get<u32>(f, header + 20), bss_end = get<u32>(f, header + 24), entry = get<u32>(f, header + 28);
    if (!header_addr || !load_addr || !load_end || !bss_end || !entry) {
      return bad(kernel + " is truncated: it ends inside its multiboot header");
    }
    if (*header_addr < *load_addr || *header_addr - *load_addr > header) {
      return bad(kernel + " is damaged: its multiboot addresses contradict each other");
    }
    const u64 offset = header - (*header_addr - *load_addr);
    const u64 size = *load_end ? u64{*load_end} - *load_addr : f.size() - offset;
    if (*load_end && *load_end < *load_addr) return bad(kernel + " is damaged: its multiboot addresses contradict each other");
    u64 memory = size;
    if (*bss_end) {
      if (*bss_end < *load_addr || *bss_end - *load_addr < size) {
        return bad(kernel + " is damaged: its multiboot addresses contradict each other");
      }
      memory = *bss_end - *load_addr;
    }
    if (auto s = load_segment(f, ram, offset, size, *load_addr, memory); !s) return s.error();
    end = *load_addr + memory;
    e.rip = *entry;
  } else {
    if (!is_elf(f)) return bad(kernel + " has a multiboot header without load addresses, and is no ELF file");
    auto loaded = load_elf_segments(f, ram);
    if (!loaded) return loaded.error();
    if (loaded->is64) {
      return bad(kernel + " is a 64-bit multiboot ELF file; multiboot takes 32-bit ones: convert it with "
                          "objcopy -O elf32-i386");
    }
    end = loaded->end;
    e.rip = loaded->entry;
  }
  if (e.rip >= ram.size()) return bad(kernel + " is damaged: its entry lies outside memory");

  // The first word is the kernel's name, as other loaders have it.
  const std::string line = r.command_line.empty() ? f.name() : f.name() + " " + r.command_line;
  if (auto s = put_command_line(r, ram, line, layout::kCommandLineMax); !s) return s.error();

  u64 initrd = 0;
  if (r.initrd) {
    initrd = (std::max(end, layout::kHighMemory) + kPageSize - 1) & kPageMask;
    if (!range_within<u64>(initrd, r.initrd->size, ram.size())) {
      return bad("initrd " + r.initrd->name + " (" + mib(r.initrd->size) + ") does not fit behind the kernel, which ends at " +
                 mib(end) + ": give the VM more memory than " + mib(ram.size()) + " with --memory");
    }
    if (auto s = put_initrd(r, ram, initrd); !s) return s.error();
  }

  const u64 info = layout::kStartInfo, module = info + 0x100, name = info + 0x120, table = info + 0x200;
  std::memset(ram.data() + info, 0, kPageSize);
  constexpr u32 kMemory = 1 << 0, kCmdline = 1 << 2, kModules = 1 << 3, kMap = 1 << 6, kLoaderName = 1 << 9;
  put<u32>(ram, info, kMemory | kCmdline | kModules | kMap | kLoaderName);
  put<u32>(ram, info + 4, 639);
  put<u32>(ram, info + 8, static_cast<u32>((ram.size() - layout::kHighMemory) >> 10));
  put<u32>(ram, info + 16, layout::kCommandLine);
  put<u32>(ram, info + 20, r.initrd ? 1 : 0);
  put<u32>(ram, info + 24, static_cast<u32>(module));
  if (r.initrd) {
    put<u32>(ram, module, static_cast<u32>(initrd));
    put<u32>(ram, module + 4, static_cast<u32>(initrd + r.initrd->size));
    put<u32>(ram, module + 8, static_cast<u32>(layout::kCommandLine));
  }
  const auto map = memory_map(r.memory);
  put<u32>(ram, info + 44, static_cast<u32>(map.size() * 24));
  put<u32>(ram, info + 48, static_cast<u32>(table));
  for (std::size_t i = 0; i < map.size(); i++) {
    const u64 at = table + i * 24;
    put<u32>(ram, at, 20);
    put<u64>(ram, at + 4, map[i].start.value);
    put<u64>(ram, at + 12, map[i].size);
    put<u32>(ram, at + 20, static_cast<u32>(map[i].type));
  }
  std::memcpy(ram.data() + name, "ring3", 6);
  put<u32>(ram, info + 64, static_cast<u32>(name));
  put_gdt(ram, false);
  return e;
}

}  // namespace ring3::boot::detail
