#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "engine/interp/test_machine.hpp"

/// The run loop and the block cache: self-modifying code, fetches, shadows, stepping, breakpoints, replay.
namespace ring3::engine::test {
namespace {

using Result = Interpreter::Result;
constexpr u64 kCode = TestMachine::kCode, kD = TestMachine::kData;

TEST(Run, BudgetIsExact) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const auto code = hex("ff c0 ff c3 48 01 c3 eb f7");
    for (u64 n = 0; n < 12; n++) {
      const u64 before = m.c().retired;
      EXPECT_EQ(m.run(code, n).result, Result::Budget);
      EXPECT_EQ(m.c().retired - before, n);
    }
    m.s.gpr[RAX] = 0;
    m.run(code, 4001);
    EXPECT_EQ(m.s.gpr[RAX], 1001u);
    EXPECT_EQ(m.s.rip, kCode + 2);
  });
}

TEST(Run, RetiredCountsFaultsRight) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 before = m.c().retired;
    EXPECT_TRUE(m.run(hex("90 90 0f 0b 90")).raised(vec::UD));
    EXPECT_EQ(m.c().retired - before, 2u);
    EXPECT_EQ(m.s.rip, kCode + 2);
  });
}

TEST(Run, Attention) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.c().attention().raise(2);
    EXPECT_EQ(m.run(hex("90")).result, Result::Attention);
    EXPECT_EQ(m.s.rip, kCode);
    m.c().attention().take();
    EXPECT_TRUE(m.resume().halted());
  });
}

/// The back-edge of a loop polls: another thread's flag ends an endless loop, also one of linked blocks.
TEST(Run, AttentionEndsALoop) {
  for (const char* code : {"eb fe", "ff c0 eb 00 ff c3 eb f8"}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      m.c().attention().take();
      std::thread raiser([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        m.c().attention().raise(1);
      });
      EXPECT_EQ(m.run(hex(code), ~0ull).result, Result::Attention);
      raiser.join();
      EXPECT_GT(m.c().retired, 1000u);
    });
  }
}

TEST(Run, InterruptWindow) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.c().interrupt_window = true;
    m.s.rflags &= ~rflags::IF;
    // sti; nop; nop: the window opens after the instruction behind STI.
    EXPECT_EQ(m.run(hex("90 fb 90 90")).result, Result::Attention);
    EXPECT_EQ(m.s.rip, kCode + 3);
    m.s.rflags &= ~rflags::IF;
    EXPECT_EQ(m.run(hex("90 68 02 02 00 00 9d 90")).result, Result::Attention);  // popf with IF
    EXPECT_EQ(m.s.rip, kCode + 7);
    EXPECT_EQ(m.run(hex("90")).result, Result::Attention);  // already open
    EXPECT_EQ(m.s.rip, kCode);
    m.c().interrupt_window = false;
    EXPECT_TRUE(m.resume().halted());
  });
}

TEST(Run, ShadowsHoldAttention) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags &= ~rflags::IF;
    EXPECT_EQ(m.run(hex("fb 90 90"), 1).result, Result::Budget);
    EXPECT_TRUE(m.s.sti_shadow);
    m.c().attention().raise(1);
    EXPECT_EQ(m.resume().result, Result::Attention);
    EXPECT_EQ(m.s.rip, kCode + 2);
    EXPECT_FALSE(m.s.sti_shadow);
    m.c().attention().take();
    m.s.gpr[RAX] = sel::Data;
    EXPECT_EQ(m.run(hex("8e d0 90 90"), 1).result, Result::Budget);
    EXPECT_TRUE(m.s.mov_ss_shadow);
    m.c().attention().raise(1);
    EXPECT_EQ(m.resume().result, Result::Attention);
    EXPECT_EQ(m.s.rip, kCode + 3);
    EXPECT_FALSE(m.s.mov_ss_shadow);
    m.c().attention().take();
  });
}

/// A fault inside the shadow ends it; an exit to the VMM keeps it.
TEST(Run, ShadowAndStops) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags &= ~rflags::IF;
    EXPECT_TRUE(m.run(hex("fb 0f 0b")).raised(vec::UD));
    m.s.rflags &= ~rflags::IF;
    m.env.exits_to_give = 1;
    EXPECT_EQ(m.run(hex("fb ec 90")).result, Result::Exit);
    EXPECT_TRUE(m.s.sti_shadow);
    EXPECT_EQ(m.s.rip, kCode + 1);
    EXPECT_TRUE(m.resume().halted());
    EXPECT_FALSE(m.s.sti_shadow);
  });
}

TEST(Run, Replay) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.env.exits_to_give = 1;
    m.s.gpr[RDX] = 0x60;
    m.env.port_default = 0x5a;
    auto out = m.run(hex("ff c3 ec ff c3"));
    EXPECT_EQ(out.result, Result::Exit);
    EXPECT_EQ(m.s.rip, kCode + 2);
    EXPECT_EQ(m.env.retirements, 0u);
    EXPECT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RBX], 2u);
    EXPECT_EQ(m.s.gpr[RAX], 0x5au);
    EXPECT_EQ(m.env.retirements, 1u);
    EXPECT_FALSE(m.env.replaying);
  });
}

// ---- self-modifying code ----

TEST(Smc, NextInstructionOfTheSameBlock) {
  for (const auto mode : {TestMode::Long64, TestMode::Prot32, TestMode::Real16}) {
    both_ways(mode, [](TestMachine& m) {
      m.s.gpr[RBX] = m.code_offset() + (m.is16() ? 4 : 3);
      // mov byte cs/ds:[rbx], 0x43 turns the instruction behind (40/inc …) into another.
      Bytes code = m.is16() ? hex("2e c6 07 b3 b0 07") : hex("c6 03 b3 b0 07");
      if (m.mode() == TestMode::Real16) m.s.seg[DS].base = m.s.seg[CS].base;
      ASSERT_TRUE(m.run(code).halted());
      EXPECT_EQ(m.s.gpr[RBX] & 0xff, 7u);  // mov bl, 7 instead of mov al, 7
      EXPECT_EQ(m.s.gpr[RAX] & 0xff, 0u);
    });
  }
}

TEST(Smc, LoopThatPatchesItself) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBX] = kCode + 1;  // the immediate of mov al, imm8
    m.s.gpr[RCX] = 100;
    // mov al, 0; add rdx, rax; inc byte [rbx]; dec ecx; jnz
    ASSERT_TRUE(m.run(hex("b0 00 48 01 c2 fe 03 ff c9 75 f5")).halted());
    EXPECT_EQ(m.s.gpr[RDX], 4950u);
  });
}

TEST(Smc, StringStoreOverItself) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RDI] = kCode;
    m.s.gpr[RAX] = 0x90;
    m.s.gpr[RCX] = 6;
    // rep stosb over itself and over ud2, ud2: the repetition is already decoded and goes on.
    ASSERT_TRUE(m.run(hex("f3 aa 0f 0b 0f 0b")).halted());
    EXPECT_EQ(m.load<u32>(kCode), 0x90909090u);
  });
}

TEST(Smc, ThroughAnotherMapping) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 alias = 0x4000'0000;
    m.map(alias, kCode, 7);
    m.s.gpr[RBX] = alias + 3;
    ASSERT_TRUE(m.run(hex("c6 03 b3 b0 07")).halted());
    EXPECT_EQ(m.s.gpr[RBX] & 0xff, 7u);
  });
}

TEST(Smc, DataBesideCode) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBX] = kCode + 0x40;  // the next chunk, and the same one, without touching the instructions
    m.s.gpr[RSI] = kCode + 0x30;
    m.s.gpr[RCX] = 1000;
    ASSERT_TRUE(m.run(hex("ff 03 ff 06 ff c9 75 f8")).halted());
    EXPECT_EQ(m.load<u32>(kCode + 0x40), 1000u);
    EXPECT_EQ(m.load<u32>(kCode + 0x30), 1000u);
  });
}

TEST(Smc, CallIntoPatchedFunction) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 function = kCode + 0x2000;
    m.s.gpr[RBX] = function + 1;
    m.s.gpr[RSI] = function;
    m.s.gpr[RCX] = 10;
    m.load_code(hex("b0 00 c3"), function);
    // call rsi; add rdx, rax; inc byte [rbx]; dec ecx; jnz
    ASSERT_TRUE(m.run(hex("ff d6 48 01 c2 fe 03 ff c9 75 f5")).halted());
    EXPECT_EQ(m.s.gpr[RDX], 45u);
  });
}

TEST(Smc, HostWriteIsFoundByValidation) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    ASSERT_TRUE(m.run(hex("b0 01")).halted());
    *m.ram(kCode + 1) = 9;  // as a device's DMA: unseen
    m.mmu().expire_fetches();
    m.s.rip = kCode;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 9u);
  });
}

TEST(Smc, RemappedCodePage) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 linear = 0x4000'0000;
    m.load_code(hex("b0 01 f4"), 0x90000);
    m.load_code(hex("b0 02 f4"), 0x91000);
    m.map(linear, 0x90000, 7);
    m.s.rip = linear;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 1u);
    m.map(linear, 0x91000, 7);
    m.s.rip = linear;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 2u);
  });
}

// ---- fetches ----

TEST(Fetch, InstructionAcrossPages) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 at = kCode + 0x1000 - 3;
    m.load_code(hex("48 b8 11 22 33 44 55 66 77 88 f4"), at);
    m.s.rip = at;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x8877'6655'4433'2211u);
    // The second page changes, by a store of the guest.
    m.s.gpr[RBX] = kCode + 0x1000;
    m.load_code(hex("c6 03 99 e9 f5 0f 00 00"), kCode);
    m.s.rip = kCode;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x8877'6655'4433'9911u);
    // It is mapped elsewhere.
    std::memcpy(m.ram(0x90000), m.ram(kCode + 0x1000), 0x100);
    m.store<u8>(0x90000, 0xaa);
    m.map(kCode + 0x1000, 0x90000, 7);
    m.s.rip = at;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x8877'6655'4433'aa11u);
    // And not at all: CR2 is the second page.
    m.unmap(kCode + 0x1000);
    m.s.rip = at;
    const auto out = m.resume();
    EXPECT_TRUE(out.raised(vec::PF, pferr::I));
    EXPECT_EQ(out.event.payload, kCode + 0x1000);
    EXPECT_EQ(m.s.rip, at);
    // An instruction that ends with the page needs nothing of the next.
    m.load_code(hex("90 b0 05"), at);
    m.s.rip = at;
    EXPECT_TRUE(m.resume().raised(vec::PF, pferr::I));
    EXPECT_EQ(m.s.gpr[RAX] & 0xff, 5u);
    EXPECT_EQ(m.s.rip, kCode + 0x1000);
  });
}

TEST(Fetch, TooLong) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    EXPECT_TRUE(m.run(hex("90 66 66 66 66 66 66 66 66 66 66 66 66 66 90")).halted());  // 14 bytes
    EXPECT_TRUE(m.run(hex("90 66 66 66 66 66 66 66 66 66 66 66 66 66 66 66 90")).raised(vec::GP, 0));
    EXPECT_EQ(m.s.rip, kCode + 1);
    // Across a page end, the second page absent: 15 bytes are in reach before the fault.
    const u64 at = kCode + 0x1000 - 4;
    m.load_code(hex("66 66 66 66 66 66 66 66 66 66 66 66 66 66 66 90"), at);
    m.s.rip = at;
    EXPECT_TRUE(m.resume().raised(vec::GP, 0));
    m.unmap(kCode + 0x1000);
    m.s.rip = at;
    EXPECT_TRUE(m.resume().raised(vec::PF, pferr::I));
  });
}

TEST(Fetch, NoExecuteAndNonCanonical) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.map(kCode + 0x1000, kCode + 0x1000, 7 | TestMachine::kNx);
    m.load_code(hex("90 90"), kCode + 0xffe);
    m.s.rip = kCode + 0xffe;
    const auto out = m.resume();
    EXPECT_TRUE(out.raised(vec::PF, pferr::P | pferr::I));
    EXPECT_EQ(m.s.rip, kCode + 0x1000);
    // Running past the canonical half.
    m.map(0x7fff'ffff'f000, kCode, 7);
    m.load_code(hex("90 90"), kCode + 0xffe);
    m.s.rip = 0x7fff'ffff'fffe;
    EXPECT_TRUE(m.resume().raised(vec::GP, 0));
    EXPECT_EQ(m.s.rip, 0x8000'0000'0000u);
  });
}

TEST(Fetch, CodeSegmentLimit) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.s.seg[CS].limit = kCode + 4;
    EXPECT_TRUE(m.run(hex("90 90 90 90 90 90")).raised(vec::GP, 0));
    EXPECT_EQ(m.s.rip, kCode + 5);
    EXPECT_TRUE(m.run(hex("90 90 90 b8 01 00 00 00")).raised(vec::GP, 0));  // its last bytes
    EXPECT_EQ(m.s.rip, kCode + 3);
  });
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.s.seg[CS].base = 0x80000;
    m.load_code(hex("90 90 90"), 0x8fffe);
    m.s.rip = 0xfffe;
    EXPECT_TRUE(m.resume().raised(vec::GP, 0));  // no wrap of IP
    EXPECT_EQ(m.s.rip, 0x10000u);
  });
}

TEST(Fetch, OutsideRam) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.map(0x4000'0000, 0xfed0'0000, 7);
    m.env.mmio_value = 0xf4f4'f4f4'f4f4'f4f4;
    m.s.rip = 0x4000'0000;
    const auto out = m.resume(1000);
    // HLT through the device, or a clean refusal: never host memory.
    EXPECT_TRUE(out.result == Result::Halted || out.result == Result::Exit || out.has_event);
  });
}

/// The mode is part of what code means: the same bytes in another mode are decoded again.
TEST(Fetch, SameBytesInTwoModes) {
  TestMachine m(TestMode::Long64);
  const auto code = hex("48 ff c0");  // 64-bit: inc rax; 32-bit: dec eax, inc eax
  m.s.gpr[RAX] = 0xffff'ffff;
  ASSERT_TRUE(m.run(code).halted());
  EXPECT_EQ(m.s.gpr[RAX], 0x1'0000'0000u);
  m.s.seg[CS] = TestMachine::segment(sel::Code32, 0, 0xffffffff, 11, 0, true, false, true);
  m.s.rip = kCode;
  m.s.gpr[RAX] = 5;
  ASSERT_TRUE(m.resume().halted());
  EXPECT_EQ(m.s.gpr[RAX], 5u);
}

/// More code than the cache holds: everything is dropped and decoded again, without a trace.
TEST(Cache, Overflow) {
  TestMachine m(TestMode::Long64);
  Bytes code;
  for (unsigned n = 0; n < 40000; n++) code.insert(code.end(), {0xff, 0xc0, 0xeb, 0x00});  // inc eax; jmp +0
  std::memcpy(m.ram(0x100000), code.data(), code.size());
  *m.ram(0x100000 + code.size()) = 0xf4;
  for (int round = 0; round < 2; round++) {
    m.s.gpr[RAX] = 0;
    m.s.rip = 0x100000;
    ASSERT_TRUE(m.resume(1000000).halted());
    EXPECT_EQ(m.s.gpr[RAX], 40000u);
  }
}

// ---- stepping and breakpoints ----

constexpr u64 kBs = 1u << 14;

TEST(Debug, SingleStep) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags |= rflags::TF;
    auto out = m.run(hex("ff c0 ff c0 ff c0"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.payload, kBs);
    EXPECT_EQ(m.s.rip, kCode + 2);
    EXPECT_TRUE(m.resume().raised(vec::DB));
    EXPECT_EQ(m.s.rip, kCode + 4);
    EXPECT_EQ(m.s.gpr[RAX], 2u);
    // A fault: no trap. POPF that clears TF still traps; one that sets it does not yet.
    EXPECT_TRUE(m.run(hex("0f 0b")).raised(vec::UD));
    out = m.run(hex("9d"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(m.s.rip, kCode + 1);
    EXPECT_FALSE(m.s.rflags & rflags::TF);
  });
}

TEST(Debug, SingleStepAndMovSs) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = sel::Data;
    m.s.rflags |= rflags::TF;
    EXPECT_TRUE(m.run(hex("8e d0 90 90")).raised(vec::DB));
    EXPECT_EQ(m.s.rip, kCode + 3);  // after the instruction behind MOV SS
    m.s.rflags |= rflags::TF;
    EXPECT_TRUE(m.run(hex("8e d8 90")).raised(vec::DB));  // MOV DS has no shadow
    EXPECT_EQ(m.s.rip, kCode + 2);
  });
}

TEST(Debug, SingleStepStrings) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags |= rflags::TF;
    m.s.gpr[RSI] = kD;
    m.s.gpr[RDI] = kD + 0x100;
    m.s.gpr[RCX] = 3;
    for (u64 left : {2, 1, 0}) {
      const auto out = left == 2 ? m.run(hex("f3 a4 90")) : m.resume();
      EXPECT_TRUE(out.raised(vec::DB));
      EXPECT_EQ(m.s.gpr[RCX], left);
      EXPECT_EQ(m.s.rip, kCode + (left == 0 ? 2 : 0));
    }
  });
}

TEST(Debug, CodeBreakpoint) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.dr[1] = kCode + 2;
    m.s.dr7 = 0x400 | 1u << 2;
    auto out = m.run(hex("ff c0 ff c0 ff c0"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.payload, 2u);
    EXPECT_EQ(m.s.rip, kCode + 2);
    EXPECT_EQ(m.s.gpr[RAX], 1u);
    m.s.rflags |= rflags::RF;  // what the handler's IRET brings: once past it
    EXPECT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RAX], 3u);
    EXPECT_FALSE(m.s.rflags & rflags::RF);
    // Under a MOV SS shadow it is not recognised, but on AMD it is.
    for (const bool amd : {false, true}) {
      m.c().features.amd = amd;
      m.s.gpr[RAX] = sel::Data;
      out = m.run(hex("8e d0 ff c3"));
      EXPECT_EQ(out.raised(vec::DB), amd);
      EXPECT_EQ(out.halted(), !amd);
    }
    m.c().features.amd = false;
    // A breakpoint and a step on the instruction before it: two events.
    m.s.rflags |= rflags::TF;
    out = m.run(hex("ff c0 ff c0"));
    EXPECT_EQ(out.event.payload, kBs);
    m.s.rflags &= ~rflags::TF;
    EXPECT_EQ(m.resume().event.payload, 2u);
  });
}

TEST(Debug, ATrapFlagThatSysretSetsTrapsAtItsTarget) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.efer |= efer::SCE;
    m.s.msr.star = 0x0023'0008'0000'0000;
    m.s.gpr[RCX] = kCode;
    m.s.gpr[R11] = rflags::TF | 2;
    const auto out = m.run(hex("48 0f 07"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.payload, kBs);
    EXPECT_EQ(m.s.rip, kCode);
    EXPECT_EQ(m.c().cpl, 3);
  });
}

TEST(Debug, ResumeFlagLastsOneInstruction) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags |= rflags::RF;
    ASSERT_TRUE(m.run(hex("9c 90")).halted());
    EXPECT_FALSE(m.s.rflags & rflags::RF);
  });
}

TEST(Debug, DataBreakpoint) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.dr[0] = kD + 4;
    m.s.dr7 = 0x400 | 1u | 1u << 16 | 3u << 18;  // write, 4 bytes
    m.s.gpr[RSI] = kD;
    auto out = m.run(hex("8b 46 04 89 06 88 46 07 90"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.payload, 1u);
    EXPECT_EQ(m.s.rip, kCode + 8);  // a trap: after the store
    // With TF: one event with both causes.
    m.s.rflags |= rflags::TF;
    out = m.run(hex("89 46 04 90"));
    EXPECT_EQ(out.event.payload, 1u | kBs);
    m.s.rflags &= ~rflags::TF;
    // Of a string, after the iteration.
    m.s.gpr[RDI] = kD;
    m.s.gpr[RCX] = 16;
    out = m.run(hex("f3 aa"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(m.s.gpr[RCX], 11u);
    EXPECT_EQ(m.s.rip, kCode);
    // MOV SS from the watched place: held until after the next instruction.
    m.s.dr7 = 0x400 | 1u | 3u << 16 | 3u << 18;
    m.store<u16>(kD + 4, sel::Data);
    out = m.run(hex("8e 56 04 90 90"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.payload & 0xf, 1u);
    EXPECT_EQ(m.s.rip, kCode + 4);
  });
}

/// An instruction that reads the watched place and then faults raises its fault alone.
TEST(Debug, DataBreakpointAndFault) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.dr[0] = kD + 4;
    m.s.dr7 = 0x400 | 1u | 3u << 16 | 3u << 18;
    m.s.gpr[RSI] = kD;
    m.s.gpr[RSP] = 0x4000'0000;  // not mapped
    EXPECT_TRUE(m.run(hex("ff 76 04 90")).raised(vec::PF, pferr::W));  // push [rsi + 4]
    m.s.gpr[RSP] = TestMachine::kStackTop;
    const auto out = m.run(hex("90 ff 76 04 90"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(m.s.rip, kCode + 4);
  });
}

TEST(Debug, DeliveredStep) {
  TestMachine m(TestMode::Long64);
  m.deliver_events = true;
  m.s.rflags |= rflags::TF;
  ASSERT_TRUE(m.run(hex("90 90")).halted());  // the handler's HLT
  EXPECT_EQ(m.s.rip, TestMachine::kHandlers + 16 * vec::DB + 1);
  EXPECT_TRUE(m.s.dr6 & kBs);
  EXPECT_FALSE(m.s.rflags & rflags::TF);
  EXPECT_EQ(m.load<u64>(m.s.gpr[RSP]), kCode + 1);                       // RIP
  EXPECT_TRUE(m.load<u64>(m.s.gpr[RSP] + 16) & rflags::TF);              // RFLAGS
}

TEST(Debug, ByTheVmm) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.c().guest_debug_step = true;
    auto out = m.run(hex("ff c0 ff c0"));
    EXPECT_EQ(out.result, Result::Debug);
    EXPECT_FALSE(out.has_event);
    EXPECT_EQ(m.interpreter().debug_vector(), vec::DB);
    EXPECT_EQ(m.interpreter().debug_dr6() & kBs, kBs);
    EXPECT_EQ(m.s.rip, kCode + 2);
    EXPECT_FALSE(m.s.rflags & rflags::TF);
    m.c().guest_debug_step = false;
    m.c().guest_debug_sw_bp = true;
    out = m.run(hex("90 cc"));
    EXPECT_EQ(out.result, Result::Debug);
    EXPECT_EQ(m.interpreter().debug_vector(), vec::BP);
    EXPECT_EQ(m.s.rip, kCode + 1);
    m.c().guest_debug_sw_bp = false;
    m.c().guest_debug_hw_bp = true;
    m.c().guest_dr[2] = kCode + 1;
    m.c().guest_dr7 = 0x400 | 1u << 4;
    out = m.run(hex("90 90"));
    EXPECT_EQ(out.result, Result::Debug);
    EXPECT_EQ(m.interpreter().debug_dr6(), 4u);
    EXPECT_EQ(m.s.rip, kCode + 1);
    m.c().guest_dr[2] = kD;
    m.c().guest_dr7 = 0x400 | 1u << 4 | 1u << 24;  // one byte, write
    m.s.gpr[RSI] = kD;
    out = m.run(hex("c6 06 05 90"));
    EXPECT_EQ(out.result, Result::Debug);
    EXPECT_FALSE(out.has_event);
    EXPECT_EQ(m.interpreter().debug_dr6(), 4u);
    EXPECT_EQ(m.s.rip, kCode + 3);
    m.c().guest_debug_hw_bp = false;
    EXPECT_TRUE(m.run(hex("c6 06 05 90")).halted());
  });
}

/// Every mode runs the same loop to the same result, also under TF with a handler that counts.
TEST(Modes, ALoopInEach) {
  for (const TestMode mode : kAllModes) {
    both_ways(mode, [](TestMachine& m) {
      m.s.gpr[RCX] = 1000;
      // add ax/eax, cx; dec (two-byte form); jnz
      const auto out = m.run(hex("01 c8 ff c9 75 fa"));
      EXPECT_TRUE(m.ended_at_hlt(out));
      EXPECT_EQ(m.s.gpr[RAX] & 0xffff, 500500u & 0xffff);
    });
  }
}

}  // namespace
}  // namespace ring3::engine::test
