#include <elf.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>

#include "base/mapping.hpp"
#include "vmm/boot/formats.hpp"
#include "vmm/boot/image_file.hpp"
#include "vmm/boot/loader.hpp"

namespace ring3::boot {
namespace {

using Bytes = std::vector<u8>;

template <class T>
void put(Bytes& b, u64 at, T v) {
  if (b.size() < at + sizeof v) b.resize(at + sizeof v);
  std::memcpy(b.data() + at, &v, sizeof v);
}
template <class T>
T get(std::span<const u8> b, u64 at) {
  T v{};
  if (at + sizeof v <= b.size()) std::memcpy(&v, b.data() + at, sizeof v);
  return v;
}

// A bzImage of protocol 2.15 with `code` bytes of 0x90 after two sectors.
Bytes bzimage(u64 code = 64 * 1024) {
  Bytes b(1024 + code, 0);
  std::fill(b.begin() + 1024, b.end(), u8{0x90});
  put<u8>(b, 0x1f1, 1);
  put<u32>(b, 0x1f4, static_cast<u32>(code / 16));
  put<u16>(b, 0x1fe, 0xaa55);
  put<u16>(b, 0x200, 0x6aeb);
  put<u32>(b, 0x202, 0x53726448);
  put<u16>(b, 0x206, 0x20f);
  put<u8>(b, 0x211, 1);
  put<u32>(b, 0x22c, 0x7fffffff);
  put<u32>(b, 0x230, 0x200000);
  put<u8>(b, 0x234, 1);
  put<u16>(b, 0x236, 1);
  put<u32>(b, 0x238, 2047);
  put<u64>(b, 0x258, 0x1000000);
  put<u32>(b, 0x260, 0x800000);
  return b;
}

struct ElfOptions {
  u16 machine = EM_X86_64;
  u64 paddr = 0x100000;
  u64 vaddr = 0xffffffff81000000;
  u64 memsz = 0x3000;
  u64 entry = 0x100010;
  bool note = true;
};

Bytes elf64(const ElfOptions& o = {}) {
  Bytes b(0x1000);
  Elf64_Ehdr h{};
  std::memcpy(h.e_ident, ELFMAG, 4);
  h.e_ident[EI_CLASS] = ELFCLASS64;
  h.e_ident[EI_DATA] = ELFDATA2LSB;
  h.e_type = ET_EXEC;
  h.e_machine = o.machine;
  h.e_entry = o.entry;
  h.e_phoff = sizeof h;
  h.e_phentsize = sizeof(Elf64_Phdr);
  h.e_phnum = o.note ? 2 : 1;
  put(b, 0, h);
  Elf64_Phdr p{};
  p.p_type = PT_LOAD;
  p.p_offset = 0x800;
  p.p_vaddr = o.vaddr;
  p.p_paddr = o.paddr;
  p.p_filesz = 0x800;
  p.p_memsz = o.memsz;
  put(b, sizeof h, p);
  p = {};
  p.p_type = PT_NOTE;
  p.p_offset = 0x400;
  p.p_filesz = 20;
  put(b, sizeof h + sizeof p, p);
  put<u32>(b, 0x400, 4);
  put<u32>(b, 0x404, 4);
  put<u32>(b, 0x408, 18);
  put<u32>(b, 0x40c, 0x006e6558);
  put<u32>(b, 0x410, 0x100020);
  for (u64 i = 0x800; i < 0x1000; i++) b[i] = 0xf4;
  return b;
}

Bytes elf32_multiboot(u32 flags = 3) {
  Bytes b(0x1000);
  Elf32_Ehdr h{};
  std::memcpy(h.e_ident, ELFMAG, 4);
  h.e_ident[EI_CLASS] = ELFCLASS32;
  h.e_ident[EI_DATA] = ELFDATA2LSB;
  h.e_type = ET_EXEC;
  h.e_machine = EM_386;
  h.e_entry = 0x400000;
  h.e_phoff = sizeof h;
  h.e_phentsize = sizeof(Elf32_Phdr);
  h.e_phnum = 1;
  put(b, 0, h);
  Elf32_Phdr p{};
  p.p_type = PT_LOAD;
  p.p_offset = 0x200;
  p.p_vaddr = p.p_paddr = 0x400000;
  p.p_filesz = 0xe00;
  p.p_memsz = 0x2000;
  put(b, sizeof h, p);
  put<u32>(b, 0x400, 0x1badb002);
  put<u32>(b, 0x404, flags);
  put<u32>(b, 0x408, 0u - 0x1badb002u - flags);
  return b;
}

Bytes flat_multiboot() {
  Bytes b(0x1000, 0xcc);
  const u32 flags = 1 << 16;
  put<u32>(b, 0x10, 0x1badb002);
  put<u32>(b, 0x14, flags);
  put<u32>(b, 0x18, 0u - 0x1badb002u - flags);
  put<u32>(b, 0x1c, 0x200010);  // header_addr
  put<u32>(b, 0x20, 0x200000);  // load_addr
  put<u32>(b, 0x24, 0);         // load_end: the whole file
  put<u32>(b, 0x28, 0x203000);  // bss_end
  put<u32>(b, 0x2c, 0x200100);
  return b;
}

class Boot : public testing::Test {
 protected:
  void SetUp() override { resize(u64{64} << 20); }
  void resize(u64 memory) {
    memory_ = memory;
    auto m = Mapping::anonymous(memory);
    ASSERT_TRUE(m.ok());
    ram_ = std::move(*m);
  }
  std::span<u8> ram() { return {ram_.data(), ram_.size()}; }
  void give_initrd(u64 size) {
    initrd_.name = "initrd.img";
    initrd_.size = size;
    initrd_.read = [](u64, std::span<u8> into) -> Status {
      std::fill(into.begin(), into.end(), u8{0x5a});
      return Ok{};
    };
    use_initrd_ = true;
  }
  Result<Entry> load(const Bytes& kernel, const std::string& line = "console=ttyS0") {
    Request r;
    r.kernel = File::of("vmlinuz", kernel);
    r.command_line = line;
    r.memory = memory_;
    r.rsdp = Gpa(layout::kAcpiTables);
    if (use_initrd_) r.initrd = &initrd_;
    return load_kernel(r, ram());
  }
  std::string message(const Bytes& kernel) {
    auto r = load(kernel);
    if (r) return "(loaded)";
    EXPECT_EQ(r.error().code, EINVAL);
    EXPECT_EQ(r.error().message.find('\n'), std::string::npos);
    return r.error().message;
  }
  std::string string_at(u64 at) { return reinterpret_cast<const char*>(ram_.data() + at); }

  Mapping ram_;
  u64 memory_ = 0;
  File initrd_;
  bool use_initrd_ = false;
};

#define EXPECT_SAYS(text, wanted) EXPECT_NE((text).find(wanted), std::string::npos) << (text)

TEST_F(Boot, MemoryMap) {
  auto small = memory_map(u64{512} << 20);
  EXPECT_EQ(small[0].size, 0x9fc00u);
  EXPECT_EQ(small[3].start.value, 0x100000u);
  EXPECT_EQ(small[3].size, (u64{511} << 20));
  auto big = memory_map(u64{6} << 30);
  u64 usable = 0;
  u64 last = 0;
  for (auto& r : big) {
    EXPECT_GE(r.start.value, last);
    last = r.start.value + r.size;
    if (r.type == MemoryType::kUsable) usable += r.size;
  }
  EXPECT_EQ(usable, (u64{6} << 30) - 0x100000 + 0x9fc00);
  EXPECT_EQ(big.back().start.value, u64{4} << 30);
  EXPECT_EQ(big.back().size, u64{3} << 30);
}

TEST_F(Boot, BzImage64) {
  give_initrd(0x12345);
  auto e = load(bzimage());
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->mode, Entry::Mode::kLong64);
  EXPECT_EQ(e->rip, 0x1000200u);
  EXPECT_EQ(e->rsi, layout::kZeroPage);
  EXPECT_EQ(ram()[0x1000000], 0x90);
  const auto z = ram().subspan(layout::kZeroPage, 4096);
  EXPECT_EQ(get<u32>(z, 0x202), 0x53726448u);
  EXPECT_EQ(get<u8>(z, 0x210), 0xff);
  EXPECT_EQ(get<u64>(z, 0x070), layout::kAcpiTables);
  EXPECT_EQ(get<u32>(z, 0x228), layout::kCommandLine);
  EXPECT_EQ(string_at(layout::kCommandLine), "console=ttyS0");
  const u32 initrd = get<u32>(z, 0x218);
  EXPECT_EQ(get<u32>(z, 0x21c), 0x12345u);
  EXPECT_EQ(initrd % 4096, 0u);
  EXPECT_GE(initrd, 0x1800000u);
  EXPECT_EQ(ram()[initrd], 0x5a);
  EXPECT_EQ(get<u8>(z, 0x1ef), 0);  // the sentinel
  EXPECT_EQ(get<u8>(z, 0x1e8), memory_map(memory_).size());
  EXPECT_EQ(get<u64>(z, 0x2d0 + 3 * 20), 0x100000u);
  // The identity map takes the entry to itself.
  const u64 pml4e = get<u64>(ram(), e->cr3);
  const u64 pdpte = get<u64>(ram(), pml4e & ~u64{0xfff});
  EXPECT_EQ(get<u64>(ram(), (pdpte & ~u64{0xfff}) + 8 * 8), 0x1000083u);
}

TEST_F(Boot, BzImage32WithoutXLoadFlags) {
  auto b = bzimage();
  put<u16>(b, 0x236, 0);
  auto e = load(b);
  ASSERT_TRUE(e.ok());
  EXPECT_EQ(e->mode, Entry::Mode::kProtected32);
  EXPECT_EQ(e->rip, 0x1000000u);
  put<u16>(b, 0x206, 0x204);  // 2.04 knows neither preferred address nor relocation
  e = load(b);
  ASSERT_TRUE(e.ok());
  EXPECT_EQ(e->rip, 0x100000u);
}

TEST_F(Boot, RelocatesWhenThePreferredPlaceIsTooHigh) {
  resize(u64{16} << 20);
  auto e = load(bzimage());
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->rip, 0x200200u);
  auto fixed = bzimage();
  put<u8>(fixed, 0x234, 0);
  EXPECT_SAYS(message(fixed), "needs 24 MiB");
}

TEST_F(Boot, BzImageProblems) {
  const auto cut = [](u64 size) {
    auto image = bzimage();
    image.resize(size);
    return image;
  };
  EXPECT_SAYS(message(cut(0x250)), "truncated");
  EXPECT_SAYS(message(cut(1000)), "truncated");
  EXPECT_SAYS(message(cut(30000)), "truncated");
  auto b = bzimage();
  put<u8>(b, 0x211, 0);
  EXPECT_SAYS(message(b), "too old");
  b = bzimage();
  put<u32>(b, 0x230, 3);
  EXPECT_SAYS(message(b), "alignment");
  b = bzimage();
  put<u32>(b, 0x260, 0xffffffff);
  put<u64>(b, 0x258, ~u64{0});
  EXPECT_SAYS(message(b), "damaged");
  b = bzimage();
  auto r = load(b, std::string(2048, 'x'));
  ASSERT_FALSE(r.ok());
  EXPECT_SAYS(r.error().message, "2047");
  EXPECT_TRUE(load(b, std::string(2047, 'x')).ok());
  resize(u64{4} << 20);
  EXPECT_SAYS(message(bzimage()), "--memory");
}

TEST_F(Boot, InitrdTooLarge) {
  give_initrd(u64{59} << 20);
  EXPECT_SAYS(message(bzimage()), "initrd initrd.img (59 MiB) does not fit");
  EXPECT_SAYS(message(elf32_multiboot()), "(loaded)");
  give_initrd(u64{63} << 20);
  EXPECT_SAYS(message(elf64()), "does not fit");
  EXPECT_SAYS(message(elf32_multiboot()), "does not fit");
  give_initrd(~u64{0});
  EXPECT_SAYS(message(bzimage()), "does not fit");
  EXPECT_SAYS(message(elf64()), "does not fit");
  EXPECT_SAYS(message(flat_multiboot()), "does not fit");
}

TEST_F(Boot, Pvh) {
  give_initrd(0x2000);
  auto e = load(elf64());
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->mode, Entry::Mode::kProtected32);
  EXPECT_EQ(e->rip, 0x100020u);
  EXPECT_EQ(ram()[0x100000], 0xf4);
  EXPECT_EQ(ram()[0x100900], 0);
  EXPECT_EQ(get<u32>(ram(), e->rbx), 0x336ec578u);
  EXPECT_EQ(get<u32>(ram(), e->rbx + 12), 1u);
  const u64 module = get<u64>(ram(), e->rbx + 16);
  EXPECT_EQ(get<u64>(ram(), module + 8), 0x2000u);
  EXPECT_EQ(ram()[get<u64>(ram(), module)], 0x5a);
  EXPECT_EQ(string_at(get<u64>(ram(), e->rbx + 24)), "console=ttyS0");
  EXPECT_EQ(get<u64>(ram(), e->rbx + 32), layout::kAcpiTables);
  const u64 map = get<u64>(ram(), e->rbx + 40);
  EXPECT_EQ(get<u32>(ram(), e->rbx + 48), memory_map(memory_).size());
  EXPECT_EQ(get<u64>(ram(), map + 3 * 24), 0x100000u);
}

TEST_F(Boot, Vmlinux64WithoutTheNote) {
  ElfOptions o;
  o.note = false;
  auto e = load(elf64(o));
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->mode, Entry::Mode::kLong64);
  EXPECT_EQ(e->rip, 0x100010u);
  EXPECT_EQ(get<u16>(ram(), layout::kZeroPage + 0x1fe), 0xaa55);
}

TEST_F(Boot, ElfProblems) {
  ElfOptions o;
  o.note = false;
  o.vaddr = o.paddr;
  EXPECT_SAYS(message(elf64(o)), "PVH");  // a program, linked low
  o = {};
  o.machine = EM_AARCH64;
  EXPECT_SAYS(message(elf64(o)), "AArch64");
  o = {};
  o.memsz = u64{100} << 20;
  EXPECT_SAYS(message(elf64(o)), "--memory");
  o = {};
  o.paddr = ~u64{0} - 0x1000;
  EXPECT_SAYS(message(elf64(o)), "fit");
  o = {};
  o.paddr = 0x98000;
  EXPECT_SAYS(message(elf64(o)), "own area");
  o = {};
  o.memsz = 0x10;
  EXPECT_SAYS(message(elf64(o)), "damaged");
  auto b = elf64();
  b.resize(0x900);
  EXPECT_SAYS(message(b), "truncated");
  b.resize(0x50);
  EXPECT_SAYS(message(b), "truncated");
  b.resize(0x20);
  EXPECT_SAYS(message(b), "truncated");
  b = elf64();
  put<u32>(b, sizeof(Elf64_Ehdr), PT_INTERP);
  EXPECT_SAYS(message(b), "program");
  b = elf32_multiboot();
  put<u32>(b, 0x400, 0);
  EXPECT_SAYS(message(b), "multiboot");
}

TEST_F(Boot, MultibootElf) {
  give_initrd(0x1800);
  auto e = load(elf32_multiboot(), "a b");
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->rip, 0x400000u);
  EXPECT_EQ(e->rax, 0x2badb002u);
  const u64 info = e->rbx;
  EXPECT_EQ(string_at(get<u32>(ram(), info + 16)), "vmlinuz a b");
  EXPECT_EQ(get<u32>(ram(), info + 8), 63u * 1024);
  EXPECT_EQ(get<u32>(ram(), info + 20), 1u);
  const u32 module = get<u32>(ram(), info + 24);
  const u32 start = get<u32>(ram(), module);
  EXPECT_EQ(start, 0x402000u);
  EXPECT_EQ(get<u32>(ram(), module + 4) - start, 0x1800u);
  EXPECT_EQ(ram()[start], 0x5a);
  u32 table = get<u32>(ram(), info + 48);
  const u32 end = table + get<u32>(ram(), info + 44);
  u32 n = 0;
  for (; table < end; table += get<u32>(ram(), table) + 4) n++;
  EXPECT_EQ(n, memory_map(memory_).size());
}

TEST_F(Boot, MultibootAddressFields) {
  auto e = load(flat_multiboot());
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->rip, 0x200100u);
  EXPECT_EQ(ram()[0x200fff], 0xcc);
  EXPECT_EQ(ram()[0x201000], 0);
  auto b = flat_multiboot();
  put<u32>(b, 0x1c, 0x100);
  EXPECT_SAYS(message(b), "contradict");
  b = flat_multiboot();
  put<u32>(b, 0x28, 0x200001);
  EXPECT_SAYS(message(b), "contradict");
  b = flat_multiboot();
  put<u32>(b, 0x24, 0xffffffff);
  put<u32>(b, 0x28, 0);
  EXPECT_SAYS(message(b), "truncated");
  b = flat_multiboot();
  put<u32>(b, 0x2c, 0xfffffff0);
  EXPECT_SAYS(message(b), "entry");
  b.resize(0x20);
  EXPECT_SAYS(message(b), "truncated");
  EXPECT_SAYS(message(elf32_multiboot(0x8)), "features");
}

TEST_F(Boot, NamesWhatIsNoKernel) {
  const auto text = [](const std::string& s) { return Bytes(s.begin(), s.end()); };
  EXPECT_SAYS(message({}), "empty");
  EXPECT_SAYS(message(text("#!/bin/sh\nexit 0\n")), "script");
  EXPECT_SAYS(message(text("just some words\n")), "text");
  EXPECT_SAYS(message(Bytes{0x1f, 0x8b, 8, 0}), "gunzip");
  EXPECT_SAYS(message(Bytes{0xfd, '7', 'z', 'X', 'Z', 0, 0}), "unxz");
  EXPECT_SAYS(message(Bytes{0x28, 0xb5, 0x2f, 0xfd}), "unzstd");
  EXPECT_SAYS(message(text("070701000")), "--initrd");
  EXPECT_SAYS(message(text("QFI\xfb")), "qcow2");
  auto mz = Bytes(1024);
  mz[0] = 'M', mz[1] = 'Z';
  EXPECT_SAYS(message(mz), "EFI");
  mz[0] = 0, mz[510] = 0x55, mz[511] = 0xaa;
  EXPECT_SAYS(message(mz), "boot sector");
  EXPECT_SAYS(message(Bytes(1000, 0xff)), "not a kernel");
}

// Mutations of valid images, and noise: any result will do, but nothing may be written outside RAM
// (the sanitizer builds see that, and the guard pages here) and no message may be empty.
TEST_F(Boot, HostileImages) {
  resize(u64{32} << 20);
  give_initrd(0x1000);
  const Bytes seeds[] = {bzimage(4096), elf64(), elf32_multiboot(), flat_multiboot(), Bytes(600, 0)};
  std::mt19937_64 rng(20);
  const u64 interesting[] = {0, 1, 0x7f, 0x80, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, ~u64{0}, u64{1} << 63, 0x90000, 0x100000, u64{3} << 30};
  int loaded = 0;
  for (int i = 0; i < 20000; i++) {
    Bytes b = seeds[rng() % std::size(seeds)];
    for (u64 n = rng() % 6; n > 0; n--) {
      const u64 where = rng() % 2 ? 0x1f0 + rng() % 0xa0 : rng() % b.size();
      const u64 at = rng() % 2 ? where % b.size() : rng() % std::min<u64>(b.size(), 0xb0);
      const u64 v = rng() % 2 ? interesting[rng() % std::size(interesting)] : rng();
      const u64 width = u64{1} << (rng() % 4);
      for (u64 k = 0; k < width && at + k < b.size(); k++) b[at + k] = static_cast<u8>(v >> (8 * k));
    }
    if (rng() % 4 == 0) b.resize(rng() % b.size());
    auto r = load(b);
    if (r) {
      loaded++;
    } else {
      ASSERT_FALSE(r.error().message.empty());
      ASSERT_EQ(r.error().message.find('\n'), std::string::npos);
    }
  }
  EXPECT_GT(loaded, 100);
  EXPECT_LT(loaded, 19000);
}

TEST_F(Boot, SmallMemoryNeverOverflows) {
  for (u64 memory : {u64{0x100000}, u64{0x101000}, u64{0x200000}, u64{0x403000}}) {
    resize(memory);
    for (const auto& b : {bzimage(4096), elf64(), elf32_multiboot(), flat_multiboot()}) (void)load(b);
  }
}

struct TempDir {
  char path[32] = "/tmp/ring3-boot-XXXXXX";
  TempDir() { EXPECT_NE(mkdtemp(path), nullptr); }
  ~TempDir() { EXPECT_EQ(std::system(("rm -r " + std::string(path)).c_str()), 0); }
  std::string file(const std::string& name, const std::string& content) {
    const std::string p = std::string(path) + "/" + name;
    std::ofstream(p) << content;
    return p;
  }
};

TEST(ImageFile, SaysWhatIsWrong) {
  TempDir dir;
  const auto why = [](const std::string& p, u64 limit = 1 << 20) {
    auto f = ImageFile::open(p, "kernel", limit);
    return f ? std::string("(opened)") : f.error().message;
  };
  EXPECT_SAYS(why(std::string(dir.path) + "/none"), "No such file");
  EXPECT_SAYS(why(dir.path), "directory");
  EXPECT_SAYS(why(dir.file("empty", "")), "empty");
  EXPECT_SAYS(why("/dev/null"), "regular");
  EXPECT_SAYS(why(dir.file("big", std::string(3 << 20, 'x'))), "--memory");
  const std::string fifo = std::string(dir.path) + "/fifo";
  ASSERT_EQ(mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_SAYS(why(fifo), "regular");
  EXPECT_SAYS(why(dir.file("good", "abc")), "(opened)");
}

TEST(ImageFile, NoticesThatTheFileShrank) {
  TempDir dir;
  const auto p = dir.file("k", "0123456789");
  auto f = ImageFile::open(p, "kernel", 100);
  ASSERT_TRUE(f.ok());
  u8 part[4] = {};
  ASSERT_TRUE(f->read(6, part).ok());
  EXPECT_EQ(std::string(part, part + 4), "6789");
  ASSERT_EQ(truncate(p.c_str(), 8), 0);
  auto again = f->read(6, part);
  ASSERT_FALSE(again.ok());
  EXPECT_SAYS(again.error().message, "shorter");
}

// A file that others write to is read in parts: one that fails ends the load with its own message.
TEST_F(Boot, WhatCannotBeReadIsSaid) {
  const Bytes kernel = bzimage(1 << 20);
  Request r;
  r.kernel = File::of("vmlinuz", kernel);
  r.memory = memory_;
  const auto whole = r.kernel.read;
  for (const u64 end : {u64{0}, detail::Kernel::kHead, kernel.size() - 1}) {
    r.kernel.read = [&](u64 at, std::span<u8> into) -> Status {
      return at + into.size() > end ? Status(Error::of(EIO, "kernel vmlinuz became shorter")) : whole(at, into);
    };
    const auto loaded = load_kernel(r, ram());
    ASSERT_FALSE(loaded.ok());
    EXPECT_EQ(loaded.error().code, EIO);
  }
}

// Headers and notes of a large ELF file may stand anywhere in it.
TEST_F(Boot, ElfHeadersBehindTheHeadOfTheFile) {
  constexpr u64 kHeaders = 2 * detail::Kernel::kHead, kNote = 3 * detail::Kernel::kHead;
  Bytes b = elf64();
  auto h = get<Elf64_Ehdr>(b, 0);
  auto load_header = get<Elf64_Phdr>(b, h.e_phoff), note = get<Elf64_Phdr>(b, h.e_phoff + sizeof(Elf64_Phdr));
  const Bytes note_bytes(b.begin() + 0x400, b.begin() + 0x400 + static_cast<std::ptrdiff_t>(note.p_filesz));
  std::fill(b.begin() + sizeof h, b.begin() + 0x800, u8{0});
  h.e_phoff = kHeaders;
  note.p_offset = kNote;
  put(b, 0, h);
  put(b, kHeaders, load_header);
  put(b, kHeaders + sizeof load_header, note);
  b.resize(kNote);
  b.insert(b.end(), note_bytes.begin(), note_bytes.end());
  auto e = load(b);
  ASSERT_TRUE(e.ok()) << e.error().message;
  EXPECT_EQ(e->format, "ELF, PVH entry");
  EXPECT_EQ(e->rip, 0x100020u);
  EXPECT_EQ(ram_.data()[0x100000], 0xf4);
  b.resize(kNote + 8);  // the note is cut off
  EXPECT_EQ(load(b)->format, "ELF, Linux 64-bit entry");
}

}  // namespace
}  // namespace ring3::boot
