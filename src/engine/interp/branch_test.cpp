#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 kCode = TestMachine::kCode, kTop = TestMachine::kStackTop;

TEST(Branch, Jumps) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    ASSERT_TRUE(m.run(hex("eb 03 b0 01 f4 b3 02")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0u);
    EXPECT_EQ(m.s.gpr[RBX], 2u);
    ASSERT_TRUE(m.run(hex("e9 01 00 00 00 f4 b3 03")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 3u);
    m.s.gpr[RAX] = kCode + 3;
    ASSERT_TRUE(m.run(hex("ff e0 f4 b3 04")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 4u);
    m.s.gpr[RSI] = TestMachine::kData;
    m.store<u64>(TestMachine::kData, kCode + 3);
    ASSERT_TRUE(m.run(hex("ff 26 f4 b3 05")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 5u);
  });
}

TEST(Branch, CallReturn) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    // call +3; hlt; nop nop; mov bl, 1; ret
    ASSERT_TRUE(m.run(hex("e8 03 00 00 00 f4 90 90 b3 01 c3")).halted());
    EXPECT_EQ(m.s.rip, kCode + 6);
    EXPECT_EQ(m.s.gpr[RBX], 1u);
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    EXPECT_EQ(m.load<u64>(kTop - 8), kCode + 5);
    m.store<u64>(kTop, kCode + 4);
    ASSERT_TRUE(m.run(hex("c2 10 00 f4 90")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop + 24);
    m.s.gpr[RSP] = kTop;
    m.s.gpr[RAX] = kCode + 4;
    ASSERT_TRUE(m.run(hex("ff d0 f4 90 90")).halted());
    EXPECT_EQ(m.load<u64>(kTop - 8), kCode + 2);
  });
}

/// A target that is not canonical: #GP(0) at the branch, the stack untouched.
TEST(Branch, NonCanonicalTargets) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = 0x8000'0000'0000;
    m.store<u64>(kTop, 0x8000'0000'0000);
    for (const char* code : {"ff e0", "ff d0", "c3", "c2 08 00"}) {
      SCOPED_TRACE(code);
      EXPECT_TRUE(m.run(hex(code)).raised(vec::GP, 0));
      EXPECT_EQ(m.s.rip, kCode);
      EXPECT_EQ(m.s.gpr[RSP], kTop);
    }
  });
}

TEST(Branch, LimitInLegacyModes) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.s.seg[CS].limit = kCode + 0xfff;
    m.s.gpr[RAX] = kCode + 0x1000;
    m.store<u32>(kTop, kCode + 0x1000);
    for (const char* code : {"ff e0", "ff d0", "c3", "e9 fb 0f 00 00"}) {
      SCOPED_TRACE(code);
      EXPECT_TRUE(m.run(hex(code)).raised(vec::GP, 0));
      EXPECT_EQ(m.s.rip, kCode);
      EXPECT_EQ(m.s.gpr[RSP], kTop);
    }
    m.s.rflags |= rflags::ZF;
    EXPECT_TRUE(m.run(hex("75 00 0f 84 f8 0f 00 00")).raised(vec::GP, 0));
    m.s.rflags &= ~rflags::ZF;
    EXPECT_TRUE(m.run(hex("0f 84 fa 0f 00 00")).halted());  // not taken: no check
  });
}

TEST(Branch, Width16) {
  both_ways(TestMode::Real16, [](TestMachine& m) {
    // At offset fff0: jmp +0x20 wraps to 0x12.
    m.s.seg[CS].base = 0x80000;
    m.s.seg[CS].selector = 0x8000;
    m.load_code(hex("eb 20"), 0x8fff0);
    m.load_code(hex("b3 07 f4"), 0x80012);
    m.s.rip = 0xfff0;
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RBX], 7u);
    EXPECT_EQ(m.s.rip, 0x15u);
    // A 32-bit displacement beyond the limit.
    m.load_code(hex("66 e9 00 00 01 00"), 0x80100);
    m.s.rip = 0x100;
    EXPECT_TRUE(m.resume().raised(vec::GP, 0));
    EXPECT_EQ(m.s.rip, 0x100u);
  });
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.load_code(hex("b3 09 f4"), 0x0800);
    m.store<u16>(kTop, 0x0800);
    ASSERT_TRUE(m.run(hex("66 c3")).halted());  // 16-bit return
    EXPECT_EQ(m.s.gpr[RBX], 9u);
    EXPECT_EQ(m.s.gpr[RSP], kTop + 2);
  });
}

TEST(Branch, Loops) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RCX] = 5;
    ASSERT_TRUE(m.run(hex("ff c0 e2 fc")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 5u);
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    m.s.gpr[RCX] = 0xffff'ffff'0000'0002;
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("ff c0 67 e2 fb")).halted());  // ECX
    EXPECT_EQ(m.s.gpr[RAX], 2u);
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    m.s.gpr[RCX] = 10;
    m.s.rflags |= rflags::ZF;
    ASSERT_TRUE(m.run(hex("83 f9 08 e1 fb")).halted());  // loope: cmp ecx, 8
    EXPECT_EQ(m.s.gpr[RCX], 9u);
    ASSERT_TRUE(m.run(hex("83 f9 06 e0 fb")).halted());  // loopne
    EXPECT_EQ(m.s.gpr[RCX], 5u);
    m.s.gpr[RCX] = 0;
    ASSERT_TRUE(m.run(hex("e3 01 f4 b3 01")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 1u);
    m.s.gpr[RCX] = 1ull << 32;
    ASSERT_TRUE(m.run(hex("e3 03 67 e3 01 f4 b3 02")).halted());  // rcx is not zero, ecx is
    EXPECT_EQ(m.s.gpr[RBX], 2u);
  });
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.s.gpr[RCX] = 0x5'0000;  // CX = 0: 65536 iterations
    ASSERT_TRUE(m.run(hex("66 40 e2 fc"), 200000).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x10000u);
    EXPECT_EQ(m.s.gpr[RCX], 0x5'0000u);
  });
}

TEST(Branch, Bound) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.s.gpr[RSI] = TestMachine::kData;
    m.store<u32>(TestMachine::kData, static_cast<u32>(-5));
    m.store<u32>(TestMachine::kData + 4, 10);
    for (const auto& [index, inside] : {std::pair<u32, bool>{0, true}, {10, true}, {11, false}, {static_cast<u32>(-5), true},
                                        {static_cast<u32>(-6), false}}) {
      m.s.gpr[RAX] = index;
      const auto out = m.run(hex("62 06"));
      EXPECT_EQ(out.halted(), inside) << index;
      EXPECT_EQ(out.raised(vec::BR), !inside) << index;
      if (!inside) {
        EXPECT_EQ(m.s.rip, kCode);
      }
    }
  });
}

TEST(Branch, BoundReadsTheUpperBoundLast) {
  const u64 at = TestMachine::kData + 0x1000 - 4;
  for (const bool amd : {false, true}) {
    TestMachine m(TestMode::Compat32);
    m.c().features.amd = amd;
    m.store<u32>(at, 5);
    m.unmap(TestMachine::kData + 0x1000);
    m.s.gpr[RSI] = at;
    m.s.gpr[RAX] = 4;
    const auto below = m.run(hex("62 06"));
    EXPECT_TRUE(amd ? below.raised(vec::PF, 0) : below.raised(vec::BR));
    m.s.gpr[RAX] = 5;
    EXPECT_TRUE(m.run(hex("62 06")).raised(vec::PF, 0));
  }
}

TEST(Branch, SoftwareInterrupts) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    auto out = m.run(hex("90 cd 80"));
    EXPECT_TRUE(out.raised(0x80));
    EXPECT_EQ(out.event.type, Event::Type::Software);
    EXPECT_EQ(m.s.rip, kCode + 3);
    out = m.run(hex("cc"));
    EXPECT_TRUE(out.raised(vec::BP));
    EXPECT_EQ(out.event.type, Event::Type::SoftwareException);
    EXPECT_EQ(m.s.rip, kCode + 1);
    m.s.rflags &= ~rflags::OF;
    EXPECT_TRUE(m.run(hex("ce")).halted());
    m.s.rflags |= rflags::OF;
    EXPECT_TRUE(m.run(hex("ce")).raised(vec::OF));
    EXPECT_TRUE(m.run(hex("0f 0b")).raised(vec::UD));
    EXPECT_EQ(m.s.rip, kCode);
    out = m.run(hex("f1"));
    EXPECT_TRUE(out.raised(vec::DB));
    EXPECT_EQ(out.event.type, Event::Type::PrivilegedSoftware);
  });
}

}  // namespace
}  // namespace ring3::engine::test
