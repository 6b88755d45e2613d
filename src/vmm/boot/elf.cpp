#include <elf.h>

#include <algorithm>

#include "vmm/boot/formats.hpp"

// ELF kernels: with the PVH note of Xen's pvh.pandoc, or a Linux vmlinux entered as from a bzImage.
namespace ring3::boot::detail {
namespace {

constexpr u32 kXenNotePhys32Entry = 18;
constexpr std::size_t kMaxHeaders = 4096;  // far above any kernel's; bounds the work on a hostile file
constexpr u64 kMaxNotes = 1u << 20;        // likewise

struct Header {
  bool is64;
  u16 type, machine;
  u64 entry, phoff;
  u16 phentsize, phnum;
};
struct Segment {
  u32 type;
  u64 offset, vaddr, paddr, filesz, memsz;
};

std::optional<Header> header(const Kernel& f) {
  if (!is_elf(f) || get<u8>(f, EI_DATA) != u8{ELFDATA2LSB}) return std::nullopt;
  const auto elf_class = get<u8>(f, EI_CLASS);
  if (elf_class == u8{ELFCLASS64}) {
    const auto h = get<Elf64_Ehdr>(f, 0);
    if (!h) return std::nullopt;
    return Header{true, h->e_type, h->e_machine, h->e_entry, h->e_phoff, h->e_phentsize, h->e_phnum};
  }
  if (elf_class == u8{ELFCLASS32}) {
    const auto h = get<Elf32_Ehdr>(f, 0);
    if (!h) return std::nullopt;
    return Header{false, h->e_type, h->e_machine, h->e_entry, h->e_phoff, h->e_phentsize, h->e_phnum};
  }
  return std::nullopt;
}

std::optional<Segment> segment(const Kernel& f, const Header& h, u16 i) {
  const auto at = checked_add(h.phoff, u64{h.phentsize} * i);
  if (!at) return std::nullopt;
  if (h.is64) {
    const auto p = get<Elf64_Phdr>(f, *at);
    if (!p || h.phentsize < sizeof *p) return std::nullopt;
    return Segment{p->p_type, p->p_offset, p->p_vaddr, p->p_paddr, p->p_filesz, p->p_memsz};
  }
  const auto p = get<Elf32_Phdr>(f, *at);
  if (!p || h.phentsize < sizeof *p) return std::nullopt;
  return Segment{p->p_type, p->p_offset, p->p_vaddr, p->p_paddr, p->p_filesz, p->p_memsz};
}

std::optional<u64> find_note(std::span<const u8> notes) {
  u64 at = 0;
  while (at < notes.size()) {
    const auto n = get<Elf32_Nhdr>(notes, at);  // the same in both classes
    if (!n) break;
    const auto aligned = [](u64 v) { return (v + 3) & ~u64{3}; };
    const u64 name = at + sizeof *n;
    const u64 desc = name + aligned(n->n_namesz);
    if (n->n_type == kXenNotePhys32Entry && n->n_namesz == 4 && get<u32>(notes, name) == u32{0x006e6558}) {
      if (n->n_descsz == 8) return get<u64>(notes, desc);
      if (const auto entry = get<u32>(notes, desc); n->n_descsz == 4 && entry) return *entry;
    }
    at = desc + aligned(n->n_descsz);
  }
  return std::nullopt;
}

std::string machine_name(u16 machine) {
  switch (machine) {
    case EM_AARCH64: return "AArch64";
    case EM_ARM: return "32-bit ARM";
    case EM_RISCV: return "RISC-V";
    case EM_PPC64: return "POWER";
    case EM_S390: return "IBM Z";
    case EM_MIPS: return "MIPS";
    default: return "another machine (ELF machine " + std::to_string(machine) + ")";
  }
}

// PVH: everything a guest learns stands in hvm_start_info and what it points to.
Result<Entry> enter_pvh(const Request& r, std::span<u8> ram, u64 entry, u64 end) {
  constexpr u32 kMagic = 0x336ec578;
  constexpr u64 kInfoSize = 56, kModuleSize = 32, kMapEntrySize = 24;
  if (entry >= ram.size()) return bad("kernel " + r.kernel.name + " is damaged: its PVH entry lies outside memory");
  if (auto s = put_command_line(r, ram, r.command_line, layout::kCommandLineMax); !s) return s.error();
  u64 initrd = 0;
  if (r.initrd) {
    auto place = place_initrd_high(r, ram, std::max(end, layout::kHighMemory), u64{1} << 31);
    if (!place) return place.error();
    initrd = *place;
    if (auto s = put_initrd(r, ram, initrd); !s) return s.error();
  }
  const u64 info = layout::kStartInfo;
  std::memset(ram.data() + info, 0, kPageSize);
  const u64 modules = info + kInfoSize + 8;
  const u64 table = modules + kModuleSize;
  const auto map = memory_map(r.memory);
  put<u32>(ram, info, kMagic);
  put<u32>(ram, info + 4, 1);  // version
  put<u32>(ram, info + 12, r.initrd ? 1 : 0);
  put<u64>(ram, info + 16, r.initrd ? modules : 0);
  put<u64>(ram, info + 24, layout::kCommandLine);
  put<u64>(ram, info + 32, r.rsdp.value);
  put<u64>(ram, info + 40, table);
  put<u32>(ram, info + 48, static_cast<u32>(map.size()));
  if (r.initrd) {
    put<u64>(ram, modules, initrd);
    put<u64>(ram, modules + 8, r.initrd->size);
  }
  for (std::size_t i = 0; i < map.size(); i++) {
    const u64 at = table + i * kMapEntrySize;
    put<u64>(ram, at, map[i].start.value);
    put<u64>(ram, at + 8, map[i].size);
    put<u32>(ram, at + 16, static_cast<u32>(map[i].type));
  }
  put_gdt(ram, false);
  Entry e;
  e.format = "ELF, PVH entry";
  e.rip = entry;
  e.rbx = info;
  return e;
}

// A vmlinux without the note: its entry is startup_64, which takes what the bzImage's decompressor leaves.
Result<Entry> enter_linux64(const Request& r, std::span<u8> ram, u64 entry, u64 end) {
  if (auto s = put_command_line(r, ram, r.command_line, 2047); !s) return s.error();
  u64 initrd = 0;
  if (r.initrd) {
    auto place = place_initrd_high(r, ram, std::max(end, layout::kHighMemory), u64{1} << 31);
    if (!place) return place.error();
    initrd = *place;
    if (auto s = put_initrd(r, ram, initrd); !s) return s.error();
  }
  put_zero_page(r, ram);
  const auto zero = ram.subspan(layout::kZeroPage, kPageSize);
  put<u16>(zero, 0x1fe, 0xaa55);
  put<u32>(zero, 0x202, 0x53726448);
  put<u16>(zero, 0x206, 0x20c);
  put<u8>(zero, 0x210, 0xff);
  put<u8>(zero, 0x211, 1);
  put<u32>(zero, 0x218, static_cast<u32>(initrd));
  put<u32>(zero, 0x21c, r.initrd ? static_cast<u32>(r.initrd->size) : 0);
  put<u32>(zero, 0x228, layout::kCommandLine);
  put<u32>(zero, 0x230, 0x1000000);
  put_gdt(ram, true);
  Entry e;
  e.format = "ELF, Linux 64-bit entry";
  e.mode = Entry::Mode::kLong64;
  e.rip = entry;
  e.rsi = layout::kZeroPage;
  e.cr3 = put_page_tables(ram);
  return e;
}

}  // namespace

bool is_elf(const Kernel& f) { return f.head().size() >= 4 && std::memcmp(f.head().data(), ELFMAG, 4) == 0; }

std::optional<u64> pvh_entry(const Kernel& f) {
  const auto h = header(f);
  if (!h) return std::nullopt;
  for (u16 i = 0; i < h->phnum && i < kMaxHeaders; i++) {
    const auto s = segment(f, *h, i);
    if (!s) return std::nullopt;
    if (s->type != PT_NOTE || !range_within<u64>(s->offset, s->filesz, f.size())) continue;
    std::vector<u8> notes(std::min(s->filesz, kMaxNotes));
    if (!f.read(s->offset, notes)) continue;
    if (const auto entry = find_note(notes)) return entry;
  }
  return std::nullopt;
}

Result<ElfLoaded> load_elf_segments(const Kernel& k, std::span<u8> ram) {
  const std::string kernel = "kernel " + k.name();
  const auto h = header(k);
  if (!h) return bad(kernel + " is a truncated or big-endian ELF file");
  if (h->machine != EM_X86_64 && h->machine != EM_386) {
    return bad(kernel + " is for " + machine_name(h->machine) + ", not for x86-64");
  }
  if (h->phnum == 0 || h->phnum > kMaxHeaders) return bad(kernel + " has no program headers to load: an object file or module?");
  ElfLoaded loaded;
  loaded.is64 = h->is64;
  loaded.entry = h->entry;
  loaded.kernel_half = true;
  u64 total = 0;
  bool any = false;
  for (u16 i = 0; i < h->phnum; i++) {
    const auto s = segment(k, *h, i);
    if (!s) return bad(kernel + " is truncated: its program headers lie beyond the file's end");
    if (s->type == PT_INTERP) return bad(kernel + " is a program for an operating system, not a kernel");
    if (s->type != PT_LOAD || s->memsz == 0) continue;
    const auto sum = checked_add(total, s->memsz);
    if (!sum || *sum > layout::kHoleStart) return bad(kernel + " is damaged: its segments take more than 3 GiB");
    total = *sum;
    // Overlapping segments would let a small file keep us busy for long.
    if (total > ram.size()) {
      return bad(kernel + " needs " + mib(total) + " of memory, the VM has " + mib(ram.size()) +
                 ": give it more with --memory");
    }
    if (auto st = load_segment(k, ram, s->offset, s->filesz, s->paddr, s->memsz); !st) return st.error();
    any = true;
    loaded.end = std::max(loaded.end, s->paddr + s->memsz);
    loaded.kernel_half = loaded.kernel_half && (s->vaddr >> 63) != 0;
    loaded.entry_in_segment |= h->entry >= s->paddr && h->entry - s->paddr < s->memsz;
  }
  if (!any) return bad(kernel + " has no segment to load: an object file or module?");
  return loaded;
}

Result<Entry> load_elf(const Kernel& k, std::span<u8> ram) {
  const Request& r = k.request();
  auto loaded = load_elf_segments(k, ram);
  if (!loaded) return loaded.error();
  if (const auto entry = pvh_entry(k)) return enter_pvh(r, ram, *entry, loaded->end);
  if (loaded->is64 && loaded->kernel_half && loaded->entry_in_segment) {
    return enter_linux64(r, ram, loaded->entry, loaded->end);
  }
  return bad("kernel " + r.kernel.name +
             (loaded->is64 ? " is an ELF program, but no kernel: it has neither a PVH entry note (CONFIG_PVH) nor a "
                             "multiboot header"
                           : " is a 32-bit ELF program, but no kernel: it has neither a PVH entry note nor a multiboot "
                             "header in its first 8 KiB"));
}

}  // namespace ring3::boot::detail
