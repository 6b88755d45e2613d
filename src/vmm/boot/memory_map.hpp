#pragma once
#include <vector>

#include "base/types.hpp"

namespace ring3::boot {

/// E820 types (ACPI 6.4, table 15.2).
enum class MemoryType : u32 { kUsable = 1, kReserved = 2 };

struct MemoryRange {
  Gpa start;
  u64 size;
  MemoryType type;
};

/// The fixed places of the machine's address space.
namespace layout {
inline constexpr u64 kHoleStart = u64{3} << 30;    ///< RAM below it, then devices up to 4 GiB
inline constexpr u64 kHoleEnd = u64{4} << 30;      ///< and RAM again
inline constexpr u64 kEbda = 0x9fc00;
inline constexpr u64 kAcpiTables = 0xe0000;        ///< to 1 MiB; the RSDP at its start, where scans look too
inline constexpr u64 kHighMemory = 0x100000;

// What the loader leaves for the guest. Kernels may not be loaded over it, nor up to 1 MiB.
inline constexpr u64 kBootArea = 0x90000;
inline constexpr u64 kZeroPage = 0x90000;
inline constexpr u64 kGdt = 0x91000;
inline constexpr u64 kPageTables = 0x92000;        ///< PML4, PDPT, four page directories
inline constexpr u64 kStartInfo = 0x98000;         ///< PVH start info or multiboot information, one page
inline constexpr u64 kCommandLine = 0x99000;
inline constexpr u64 kCommandLineMax = 0x6000;     ///< with the final 0
inline constexpr u64 kBootStack = 0x90000;         ///< grows down
}  // namespace layout

/// The map for `memory` bytes of RAM, sorted.
std::vector<MemoryRange> memory_map(u64 memory);

}  // namespace ring3::boot
