#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 kTop = TestMachine::kStackTop;

TEST(Stack, Push64) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = 0x1122'3344'5566'7788;
    m.s.gpr[R12] = 0xabcd;
    ASSERT_TRUE(m.run(hex("50 41 54 66 50 6a ff 68 00 00 00 80")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop - 8 - 8 - 2 - 8 - 8);
    EXPECT_EQ(m.load<u64>(kTop - 8), 0x1122'3344'5566'7788u);
    EXPECT_EQ(m.load<u64>(kTop - 16), 0xabcdu);
    EXPECT_EQ(m.load<u16>(kTop - 18), 0x7788u);
    EXPECT_EQ(m.load<u64>(kTop - 26), ~0ull);
    EXPECT_EQ(m.load<u64>(kTop - 34), 0xffff'ffff'8000'0000u);
    m.s.gpr[RSP] = kTop - 8;
    ASSERT_TRUE(m.run(hex("5b 54 5c")).halted());  // pop rbx; push rsp; pop rsp
    EXPECT_EQ(m.s.gpr[RBX], 0x1122'3344'5566'7788u);
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    EXPECT_EQ(m.load<u64>(kTop - 8), kTop);  // rSP as it was before the push
    m.store<u64>(kTop, 0x5000);
    ASSERT_TRUE(m.run(hex("5c")).halted());
    EXPECT_EQ(m.s.gpr[RSP], 0x5000u);
  });
}

TEST(Stack, MemoryOperands) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.store<u64>(kTop + 8, 0x77);
    ASSERT_TRUE(m.run(hex("ff 74 24 08")).halted());  // push [rsp + 8]: rSP from before
    EXPECT_EQ(m.load<u64>(kTop - 8), 0x77u);
    m.store<u64>(kTop - 8, 0x99);
    ASSERT_TRUE(m.run(hex("8f 44 24 10")).halted());  // pop [rsp + 16]: rSP from after
    EXPECT_EQ(m.load<u64>(kTop + 16), 0x99u);
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    // The destination faults: rSP stays.
    m.unmap(TestMachine::kData);
    m.s.gpr[RSI] = TestMachine::kData;
    EXPECT_TRUE(m.run(hex("8f 06")).raised(vec::PF, pferr::W));
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    m.s.gpr[RSP] = TestMachine::kData + 0x1000;
    EXPECT_TRUE(m.run(hex("50")).raised(vec::PF, pferr::W));
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kData + 0x1000);
    m.s.gpr[RSP] = 0x8000'0000'0000;  // not canonical
    EXPECT_TRUE(m.run(hex("58")).raised(vec::SS, 0));
  });
}

TEST(Stack, Width16) {
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.s.gpr[RSP] = 0xdead'0000'0000'0000;
    m.s.gpr[RAX] = 0x1234'5678;
    ASSERT_TRUE(m.run(hex("50")).halted());  // wraps below zero
    EXPECT_EQ(m.s.gpr[RSP], 0xdead'0000'0000'fffeu);
    EXPECT_EQ(m.load<u16>(TestMachine::kStackBase + 0xfffe), 0x5678u);
    m.s.gpr[RSP] = 0x100;
    ASSERT_TRUE(m.run(hex("66 50 66 5b")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 0x1234'5678u);
    m.s.gpr[RSP] = 1;
    EXPECT_TRUE(m.run(hex("50")).raised(vec::SS, 0));  // 0xffff + 2 bytes
    EXPECT_EQ(m.s.gpr[RSP], 1u);
  });
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.s.gpr[RAX] = 0xcafe'babe;
    ASSERT_TRUE(m.run(hex("50 66 50")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop - 6);
    m.s.seg[SS].limit = kTop - 8;
    EXPECT_TRUE(m.run(hex("50")).raised(vec::SS, 0));
    EXPECT_EQ(m.s.gpr[RSP], kTop - 6);
  });
}

TEST(Stack, PushAll) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    for (unsigned n = 0; n < 8; n++)
      if (n != RSP) m.s.gpr[n] = 0x1000 + n;
    ASSERT_TRUE(m.run(hex("60")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop - 32);
    for (unsigned n = 0; n < 8; n++) EXPECT_EQ(m.load<u32>(kTop - 4 * (n + 1)), n == RSP ? kTop : 0x1000 + n);
    for (unsigned n = 0; n < 8; n++)
      if (n != RSP) m.s.gpr[n] = 0;
    m.store<u32>(kTop - 20, 0xbad);  // the image of ESP is skipped
    ASSERT_TRUE(m.run(hex("61")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    EXPECT_EQ(m.s.gpr[RAX], 0x1000u);
    EXPECT_EQ(m.s.gpr[RDI], 0x1007u);
    ASSERT_TRUE(m.run(hex("66 60 66 61")).halted());
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    // A fault in the middle: nothing was written.
    m.map(0x6000'0, 0x6000'0, TestMachine::kPresent);
    m.s.gpr[RSP] = 0x61008;
    m.store<u32>(0x61004, 0x5a5a);
    const auto out = m.run(hex("60"));
    EXPECT_TRUE(out.raised(vec::PF, pferr::P | pferr::W));
    EXPECT_EQ(m.load<u32>(0x61004), 0x5a5au);
    EXPECT_EQ(m.s.gpr[RSP], 0x61008u);
  });
  TestMachine l(TestMode::Long64);
  EXPECT_TRUE(l.run(hex("60")).raised(vec::UD));
  EXPECT_TRUE(l.run(hex("61")).raised(vec::UD));
}

TEST(Stack, PushFlags) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags = 2 | rflags::CF | rflags::IF | rflags::AC | rflags::ID | rflags::RF;
    ASSERT_TRUE(m.run(hex("9c 58")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 2 | rflags::CF | rflags::IF | rflags::AC | rflags::ID);
    m.s.rflags = 2;
    ASSERT_TRUE(m.run(hex("6a ff 9d 9c 58")).raised(vec::DB));  // POPF set TF: the trap is after the instruction behind
    EXPECT_EQ(m.s.rip, TestMachine::kCode + 4);
  });
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = ~0ull & ~rflags::TF;
    ASSERT_TRUE(m.run(hex("50 9d")).halted());
    EXPECT_EQ(m.s.rflags, 2 | rflags::STATUS | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID);
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("50 66 9d")).halted());  // 16 bits: AC and ID stay
    EXPECT_EQ(m.s.rflags, 2 | rflags::AC | rflags::ID);
  });
  // CPL 3: IOPL never changes, IF only with IOPL 3.
  for (const u64 iopl : {0ull, 3ull}) {
    both_ways(TestMode::Long64, true, [&](TestMachine& m) {
      m.s.rflags = 2 | rflags::IF | iopl << 12;
      m.s.gpr[RAX] = (3 - iopl) << 12;
      ASSERT_TRUE(m.ended_at_hlt(m.run(hex("50 9d"))));
      EXPECT_EQ(m.s.rflags, 2 | (iopl == 3 ? 0 : rflags::IF) | iopl << 12);
    });
  }
}

TEST(Stack, FlagsInVirtual8086) {
  both_ways(TestMode::V8086, [](TestMachine& m) {
    m.s.rflags |= rflags::IF;
    m.s.gpr[RAX] = rflags::CF;
    ASSERT_TRUE(m.ended_at_hlt(m.run(hex("9c 59 50 9d"))));
    EXPECT_EQ(m.s.gpr[RCX], 2 | rflags::IOPL | rflags::IF);
    EXPECT_EQ(m.s.rflags, 2 | rflags::CF | rflags::IOPL | rflags::VM);
    m.s.rflags &= ~rflags::IOPL;
    EXPECT_TRUE(m.run(hex("9c")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("9d")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("66 9c")).raised(vec::GP, 0));
  });
}

TEST(Stack, EnterLeave) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBP] = 0x1234'5678'9abc;
    ASSERT_TRUE(m.run(hex("c8 20 00 00")).halted());
    EXPECT_EQ(m.s.gpr[RBP], kTop - 8);
    EXPECT_EQ(m.s.gpr[RSP], kTop - 8 - 0x20);
    EXPECT_EQ(m.load<u64>(kTop - 8), 0x1234'5678'9abcu);
    ASSERT_TRUE(m.run(hex("c9")).halted());
    EXPECT_EQ(m.s.gpr[RBP], 0x1234'5678'9abcu);
    EXPECT_EQ(m.s.gpr[RSP], kTop);
    // Nesting 3: rBP, two outer frame pointers, the new frame pointer.
    m.s.gpr[RBP] = TestMachine::kData + 0x100;
    m.store<u64>(TestMachine::kData + 0xf8, 0xaaa);
    m.store<u64>(TestMachine::kData + 0xf0, 0xbbb);
    ASSERT_TRUE(m.run(hex("c8 10 00 03")).halted());
    EXPECT_EQ(m.load<u64>(kTop - 16), 0xaaau);
    EXPECT_EQ(m.load<u64>(kTop - 24), 0xbbbu);
    EXPECT_EQ(m.load<u64>(kTop - 32), kTop - 8);
    EXPECT_EQ(m.s.gpr[RSP], kTop - 32 - 16);
    EXPECT_EQ(m.s.gpr[RBP], kTop - 8);
    // The final stack pointer must be writable.
    m.s.gpr[RSP] = TestMachine::kData + 0x1010;
    m.unmap(TestMachine::kData);
    EXPECT_TRUE(m.run(hex("c8 00 01 00")).raised(vec::PF, pferr::W));
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kData + 0x1010);
    EXPECT_EQ(m.s.gpr[RBP], kTop - 8);
    m.s.gpr[RBP] = TestMachine::kData;
    EXPECT_TRUE(m.run(hex("c9")).raised(vec::PF, 0));
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kData + 0x1010);
  });
  both_ways(TestMode::Prot16, [](TestMachine& m) {
    m.s.gpr[RBP] = 0x7777'4321;
    ASSERT_TRUE(m.run(hex("c8 04 00 01")).halted());
    EXPECT_EQ(m.s.gpr[RBP], 0x7777'0000u | ((kTop - 2) & 0xffff));
    EXPECT_EQ(m.load<u16>(kTop - 2), 0x4321u);
    EXPECT_EQ(m.load<u16>(kTop - 4), (kTop - 2) & 0xffff);
    EXPECT_EQ(m.s.gpr[RSP], (kTop & 0xffff) - 8);
  });
}

}  // namespace
}  // namespace ring3::engine::test
