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

/// The initial RAM disk, or the module of a multiboot kernel; read straight into guest memory.
struct Initrd {
  std::string name;
  u64 size = 0;  ///< > 0
  std::function<Status(std::span<u8>)> read;
};

struct Request {
  std::string kernel_name;          ///< for messages, and the first word of a multiboot command line
  std::span<const u8> kernel;       ///< the file
  const Initrd* initrd = nullptr;
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
