#pragma once
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "vmm/boot/memory_map.hpp"

namespace ring3::boot {

/// The state the boot processor starts in: flat segments, interrupts off.
struct Entry {
  enum class Mode { kProtected32, kLong64 };
  Mode mode = Mode::kProtected32;
  u64 rip = 0;
  u64 rsp = layout::kBootStack;
  u64 rax = 0, rbx = 0, rsi = 0;
  u64 cr3 = 0;  ///< kLong64: identity map of the first 4 GiB
  /// GDT at layout::kGdt: 0x10 code, 0x18 data, 0x20 TSS.
  static constexpr u16 kCode = 0x10, kData = 0x18, kTss = 0x20, kGdtLimit = 0x27;
  std::string format;  ///< for the log: "bzImage", "ELF (PVH)", "ELF (Linux 64-bit)", "multiboot"
};

/// A file whose content is wanted in guest memory: read straight into it, for host memory touched on the way costs as much as the guest's.
struct File {
  std::string name;  ///< for messages, and a kernel's is the first word of a multiboot command line
  u64 size = 0;      ///< bytes
  /// Fills `into` from byte `at` of the file on; at + into.size() <= size. Others may write the file meanwhile: what is read twice may differ.
  std::function<Status(u64 at, std::span<u8> into)> read;

  /// Of bytes that outlive it.
  static File of(std::string name, std::span<const u8> bytes);
};

struct Request {
  File kernel;
  const File* initrd = nullptr;     ///< the initial RAM disk, or the module of a multiboot kernel; not empty
  std::string command_line;
  u64 memory = 0;                   ///< bytes in all; `ram` is its part below the hole
  Gpa rsdp;
};

/// Loads a kernel into guest memory and says how to enter it. The format is found by its magic:
/// bzImage (Linux boot protocol 2.02 and later; 64-bit entry where offered), ELF with a PVH note,
/// a Linux vmlinux ELF64, multiboot-1 (ELF32 or address fields).
///
/// Spec:   Documentation/x86/boot.rst; Xen's pvh.pandoc and start_info.h; Multiboot Specification 0.6.96.
/// Memory: `ram` is guest memory from GPA 0, zeroed; nothing outside it is written.
/// Errors: EINVAL with one line that says what the file is, what is wrong with it and what to do.
/// Trust:  the files' content is hostile: every offset and size is checked before it is used.
Result<Entry> load_kernel(const Request& request, std::span<u8> ram);

}  // namespace ring3::boot
