#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cinttypes>
#include <cstdio>
#include <set>

#include "engine/mmu/window.hpp"
#include "engine/translate/test_pair.hpp"

/// Windowed code whose rSP is in the stacks' region, or has been, or comes there (TranslateMode::stacked, windows.cpp).
namespace ring3::engine {
namespace {

using namespace test;

constexpr u64 kFar = 0x7ffd'0000'0000;  ///< the pages of the test machine once more, in the region of stacks
constexpr u64 kBottom = Window::kStacks << Window::kRegionShift;

/// rSP goes anywhere here: not to the page tables, which the test machine lets the guest reach, nor to its code.
void map_far(Pair& pair) {
  for (Side* side : {&pair.interpreted(), &pair.translated()}) {
    for (u64 page = 0; page < kLow - 0x1000; page += 0x1000) side->m.map(page, page, TestMachine::kPresent | (page < TestMachine::kCode ? 0 : TestMachine::kUser));
    for (u64 page = kLow; page < kHigh; page += 0x1000) {
      const u64 bits = page | TestMachine::kPresent | TestMachine::kWritable | TestMachine::kUser;
      side->m.map(kFar + page, page, bits & 0xfff);
      if (page < kLow + 0x2000) side->m.map(kBottom + page - kLow, page, bits & 0xfff);
    }
  }
}

Bytes stack_code(Random& rng, unsigned length) {
  Bytes code;
  const auto add = [&](std::initializer_list<unsigned> bytes) {
    for (unsigned b : bytes) code.push_back(static_cast<u8>(b));
  };
  for (unsigned n = 0; n < length; n++) {
    const unsigned disp = static_cast<unsigned>(8 * rng.below(15)), reg = static_cast<unsigned>(rng.below(4) == 3 ? 6 : rng.below(3));
    switch (rng.below(33)) {
      case 0: case 1: add({0x50 + reg}); break;                                // push
      case 2: case 3: add({0x58 + reg}); break;                                // pop
      case 4: add({0x41, 0x51, 0x41, 0x5a}); break;                            // push r9; pop r10
      case 5: add({0x48, 0x8b, 0x44 + 8 * reg, 0x24, disp}); break;            // mov reg, [rsp + disp]
      case 6: add({0x48, 0x89, 0x44 + 8 * reg, 0x24, disp}); break;            // mov [rsp + disp], reg
      case 7: add({0x48, 0x11, 0x44, 0x24, disp}); break;                      // adc [rsp + disp], rax
      case 8: add({0x4c, 0x8b, 0x4c, 0x24, disp}); break;                      // mov r9, [rsp + disp]
      case 9: add({0x0f, 0x10, 0x4c, 0x24, disp}); break;                      // movups xmm1, [rsp + disp]
      case 10: add({0x66, 0x0f, 0x7f, 0x54, 0x24, disp & 0x70}); break;        // movdqa [rsp + disp], xmm2
      case 11: add({0x48, 0x0f, 0x44, 0x54, 0x24, disp}); break;               // cmove rdx, [rsp + disp]
      case 12: add({0xf0, 0x48, 0x0f, 0xc1, 0x44, 0x24, disp}); break;         // lock xadd [rsp + disp], rax
      case 13: add({0x48, 0x8b, 0x14, 0x04}); break;                           // mov rdx, [rsp + rax]
      case 14: add({0x48, 0x0f, 0xa3, 0x4c, 0x24, disp}); break;               // bt [rsp + disp], rcx
      case 15: add({0x48, 0x83, 0xec, disp}); break;                           // sub rsp, disp
      case 16: add({0x48, 0x83, 0xc4, disp}); break;                           // add rsp, disp
      case 17: add({0x48, 0x8d, 0x64, 0x24, (0u - disp) & 0xff}); break;       // lea rsp, [rsp - disp]
      case 18: add({0x48, 0x83, 0xe4, 0xf0}); break;                           // and rsp, -16
      case 19: add({0x48, 0x89, 0xdc}); break;                                 // mov rsp, rbx
      case 20: add({0x48, 0x87, 0xdc}); break;                                 // xchg rsp, rbx
      case 21: add({0x48, 0x8d, 0x6c, 0x24, 0xf0, 0xc9}); break;               // lea rbp, [rsp - 16]; leave
      case 22: add({0xc9}); break;                                             // leave
      case 23: add({0x54, 0x5c}); break;                                       // push rsp; pop rsp
      case 24: add({0xe8, 0, 0, 0, 0}); break;                                 // call what follows
      case 25: add({0x9c, 0x9d}); break;                                       // pushf; popf
      case 26: add({0x72, 0x00}); break;                                       // jc to what follows
      case 27: add({0x64, 0x48, 0x8b, 0x04, 0x25, disp, 0, 0, 0}); break;                // mov rax, fs:[disp]
      case 28: add({0x64, 0x48, 0x89, 0x14, 0x25, (0u - disp) & 0xff, 0xff, 0xff, 0xff}); break;  // mov fs:[-disp], rdx
      case 29: add({0x64, 0x48, 0x11, 0x04, 0x25, disp, 0, 0, 0}); break;                // adc fs:[disp], rax
      case 30: add({0x64, 0x0f, 0x11, 0x0c, 0x25, disp, 0, 0, 0}); break;                // movups fs:[disp], xmm1
      case 31:
        if (rng.one_in(3)) add({0xf3, 0x48, 0x0f, 0xae, 0xd3});                          // wrfsbase rbx
        else add({0x64, 0x48, 0x8b, 0x14, 0x01});                                        // mov rdx, fs:[rcx + rax]
        break;
      default: add({0x48, 0x01, 0xc8}); break;                                 // add rax, rcx
    }
  }
  code.push_back(0xf4);
  return code;
}

TEST(TranslatedCode, StacksInTheirRegionAndOut) {
  Pair pair(64, true);
  Random memory(9);
  pair.randomise_memory(memory);
  map_far(pair);
  unsigned failures = 0, halted = 0, faulted = 0;
  for (unsigned n = 0; n < rounds(3000) && failures < 10; n++) {
    Random rng(first_seed() * 7000003 + n);
    const Bytes code = stack_code(rng, 4 + static_cast<unsigned>(rng.below(20)));
    pair.load(code);
    for (unsigned time = 0; time < 3; time++) {
      pair.randomise(rng, DecodedInsn{}, TestMachine::kCode);
      VcpuState& s = pair.interpreted().m.s;
      for (u8 reg : {RSP, RBX, RBP}) {
        s.gpr[reg] = kLow + 0x200 + rng.below(0xc00) + 0x1000 * rng.below(8);
        if (rng.below(4) != 0) s.gpr[reg] &= ~15ull;
        if (rng.below(3) != 0) s.gpr[reg] += kFar;
        if (rng.one_in(24)) s.gpr[reg] = kBottom + rng.below(64);
        if (rng.one_in(24)) s.gpr[reg] = rng.below(2) ? (1ull << 47) - rng.below(64) : random_value(rng) | 1ull << 32;
      }
      s.gpr[RAX] = rng.below(64);
      s.gpr[RCX] = rng.below(2048);
      if (rng.below(3) != 0) s.seg[FS].base = kFar + kLow + 0x3000 + 8 * rng.below(0x400);
      for (Side* side : {&pair.interpreted(), &pair.translated()}) {
        side->m.s.seg[FS].base = s.seg[FS].base;
        side->m.s.cr4 |= cr4::FSGSBASE;
      }
      std::memcpy(pair.translated().m.s.gpr, s.gpr, sizeof s.gpr);
      pair.run(1000);
      const bool whole = s.rip == TestMachine::kCode + code.size() - 1;  // HLT
      halted += whole;
      faulted += !whole;
      std::string d = pair.difference(whole ? rflags::STATUS : 0);  // docs/adr/0004: where it faults some are nobody's
      if (s.seg[FS].base != pair.translated().m.s.seg[FS].base) d = "FS base";
      if (!d.empty()) {
        std::string text;
        char hex[4];
        for (u8 b : code) std::snprintf(hex, sizeof hex, " %02x", b), text += hex;
        ADD_FAILURE() << "case " << n << ", time " << time << ": " << d << "; code" << text;
        pair.heal();
        failures++;
        break;
      }
    }
  }
  EXPECT_GT(2 * halted, faulted);
  EXPECT_GT(faulted, 100u);
  EXPECT_GT(pair.translated().vcpu->stats().window_faults, 0u);
}

/// Where the reserved host addresses of the stacks' region and its guards begin: those of its twin lie as far below as it does.
u64 reserved() {
  std::set<u64> begins;
  u64 end = 0;
  FILE* const maps = std::fopen("/proc/self/maps", "r");
  char line[512];
  while (std::fgets(line, sizeof line, maps) != nullptr) {
    u64 from, to;
    if (std::sscanf(line, "%" SCNx64 "-%" SCNx64, &from, &to) != 2) continue;
    if (from != end) begins.insert(from);
    end = to;
  }
  std::fclose(maps);
  for (u64 from : begins)
    if (begins.count(from - ((Window::kStacks - Window::kPrograms) << Window::kRegionShift)) != 0) return from;
  return 0;
}

/// A page of the process's own just behind the guard, at either end: the guest leads rSP there in every way, which is no address
/// of its memory.
TEST(TranslatedCode, RspDoesNotLeaveItsRegionUnseen) {
  Pair pair(64, true);
  map_far(pair);
  constexpr u64 kCanary = 1u << 16;
  const auto once = [&](const Bytes& code, u64 rsp, u64 rax, u64 rcx) {
    pair.load(code);
    for (Side* side : {&pair.interpreted(), &pair.translated()}) {
      VcpuState& s = side->m.s;
      s.gpr[RSP] = rsp;
      s.gpr[RAX] = rax;
      s.gpr[RBX] = rax;
      s.gpr[RBP] = rax;
      s.gpr[RCX] = rcx;
      s.gpr[RDX] = 0x1234;
      s.rflags = rflags::FIXED1;
      s.rip = TestMachine::kCode;
    }
    pair.run(~0ull);
    EXPECT_EQ(pair.difference(0), "");
  };
  once({0x50, 0x58, 0xf4}, kFar + kLow + 0x800, 0, 0);  // push; pop; hlt
  ASSERT_GT(pair.translated().vcpu->stats().window_faults, 0u);
  const u64 begin = reserved();
  ASSERT_NE(begin, 0u);
  const u64 delta = begin + Window::kGuard - kBottom;
  unsigned placed = 0;
  for (const u64 at : {begin - kCanary, begin + 2 * Window::kGuard + Window::kRegionSize}) {
    u64* const canary = static_cast<u64*>(
        ::mmap(reinterpret_cast<void*>(at), kCanary, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
    if (reinterpret_cast<u64>(canary) != at) continue;  // something of the process stands there
    placed++;
    std::fill_n(canary, kCanary / 8, 0x5a5a5a5a5a5a5a5a);
    const u64 there = at + kCanary / 2 - delta;  // what the guest would have to have in rSP
    const bool below = there < kBottom;
    const u64 start = below ? kBottom + 0x1000 : kFar + kLow + 0x1000;
    const Bytes ways[] = {
        {0x48, 0x89, 0xc4, 0x52, 0xf4},                    // mov rsp, rax; push rdx
        {0x48, 0x94, 0x52, 0xf4},                          // xchg rsp, rax; push rdx
        {0x50, 0x5c, 0x52, 0xf4},                          // push rax; pop rsp; push rdx
        {0x50, 0x5c, 0x48, 0x89, 0x14, 0x24, 0xf4},        // push rax; pop rsp; mov [rsp], rdx
        {0x52, 0x48, 0x89, 0xc4, 0x0f, 0x11, 0x04, 0x24, 0xf4},  // push rdx; mov rsp, rax; movups [rsp], xmm0
        {0xc9, 0x52, 0xf4},                                // leave; push rdx
        {0x48, 0x0f, 0x43, 0xe0, 0x52, 0xf4},              // cmovnc rsp, rax; push rdx
        {0x48, 0x8d, 0x20, 0xe8, 0, 0, 0, 0, 0xf4},        // lea rsp, [rax]; call
        {0x48, 0x29, 0xc4, 0x48, 0xf7, 0xdc, 0x48, 0x01, 0xc4, 0x52, 0xf4},
    };
    for (const Bytes& way : ways) once(way, start, there, 0);
    // By small steps, without a store: 4 GiB and more of them.
    const u64 steps = (below ? start - there : there - start) / 0x1000;
    if (steps < 3u << 20) {
      const u8 op = below ? 0xec : 0xc4;
      const Bytes walks[] = {
          {0x48, 0x81, op, 0x00, 0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf5, 0x52, 0xf4},        // l: sub rsp, 4096; dec ecx; jnz l; push rdx
          {0x48, 0x8d, 0xa4, 0x24, 0x00, below ? u8{0xf0} : u8{0x10}, below ? u8{0xff} : u8{0}, below ? u8{0xff} : u8{0}, 0xff, 0xc9, 0x75, 0xf4, 0x52, 0xf4},  // lea
          // l: sub rsp, 4096; nop; test ecx, ecx; jz out; dec ecx; jmp l; out: push rdx
          {0x48, 0x81, op, 0x00, 0x10, 0, 0, 0x90, 0x85, 0xc9, 0x74, 0x04, 0xff, 0xc9, 0xeb, 0xf0, 0x52, 0xf4},
      };
      for (const Bytes& walk : walks) once(walk, start, 0, steps);
      EXPECT_TRUE(below);
    }
    for (u64 n = 0; n < kCanary / 8; n++) ASSERT_EQ(canary[n], 0x5a5a5a5a5a5a5a5a) << at << " " << n;
    ::munmap(canary, kCanary);
  }
  EXPECT_GT(placed, 0u);
}

}  // namespace
}  // namespace ring3::engine
