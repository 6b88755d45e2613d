#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 kD = TestMachine::kData;

TEST(Move, Registers) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = 0x1111'1111'1111'1111;
    m.s.gpr[RBX] = 0x8899'aabb'ccdd'eeff;
    ASSERT_TRUE(m.run(hex("88 d8")).halted());  // mov al, bl
    EXPECT_EQ(m.s.gpr[RAX], 0x1111'1111'1111'11ffu);
    ASSERT_TRUE(m.run(hex("88 fc")).halted());  // mov ah, bh
    EXPECT_EQ(m.s.gpr[RAX], 0x1111'1111'1111'eeffu);
    ASSERT_TRUE(m.run(hex("66 89 d8 90")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x1111'1111'1111'eeffu);
    ASSERT_TRUE(m.run(hex("89 d8")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xccdd'eeffu);
    ASSERT_TRUE(m.run(hex("49 89 df 4c 89 f8")).halted());  // mov r15, rbx; mov rax, r15
    EXPECT_EQ(m.s.gpr[RAX], m.s.gpr[RBX]);
    ASSERT_TRUE(m.run(hex("48 b8 08 07 06 05 04 03 02 01")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x0102'0304'0506'0708u);
    ASSERT_TRUE(m.run(hex("48 c7 c0 ff ff ff ff")).halted());
    EXPECT_EQ(m.s.gpr[RAX], ~0ull);
    ASSERT_TRUE(m.run(hex("b8 ff ff ff ff")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffffu);
    ASSERT_TRUE(m.run(hex("40 b4 07 b4 09")).halted());  // mov spl, 7; mov ah, 9
    EXPECT_EQ(m.s.gpr[RSP] & 0xff, 7u);
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'09ffu);
  });
}

TEST(Move, Addressing64) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.store<u64>(kD + 0x128, 0x1234'5678'9abc'def0);
    m.s.gpr[RBX] = kD;
    m.s.gpr[R13] = 0x20;
    ASSERT_TRUE(m.run(hex("4a 8b 84 eb 28 00 00 00")).halted());  // mov rax, [rbx + r13*8 + 0x28]
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("48 8b 05 21 01 01 00")).halted());  // [rip + 0x10121]
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("48 a1 28 01 05 00 00 00 00 00")).halted());  // moffs64
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    m.s.gpr[RBX] = 0xffff'ffff'0000'0000 | kD;  // 67h: 32-bit address
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("67 48 8b 83 28 01 00 00")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    m.s.seg[FS].base = kD + 0x100;
    m.s.gpr[RAX] = 0;
    ASSERT_TRUE(m.run(hex("64 48 8b 04 25 28 00 00 00")).halted());  // fs:[0x28]
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    m.s.seg[DS].base = 0x1000;  // ignored
    m.s.gpr[RBX] = kD + 0x128;
    ASSERT_TRUE(m.run(hex("3e 8a 03")).halted());
    EXPECT_EQ(m.s.gpr[RAX] & 0xff, 0xf0u);
    ASSERT_TRUE(m.run(hex("c7 43 04 ff 00 00 00  66 c7 03 34 12  c6 43 02 56")).halted());
    EXPECT_EQ(m.load<u64>(kD + 0x128), 0xff'9a56'1234u);
  });
}

TEST(Move, NonCanonical) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBX] = 0x8000'0000'0000;
    EXPECT_TRUE(m.run(hex("8b 03")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("89 03")).raised(vec::GP, 0));
    m.s.gpr[RBP] = 0x8000'0000'0000;
    EXPECT_TRUE(m.run(hex("8b 45 00")).raised(vec::SS, 0));  // rbp: the stack segment
    EXPECT_TRUE(m.run(hex("01 45 00")).raised(vec::SS, 0));
    EXPECT_TRUE(m.run(hex("67 8d 03")).halted());            // lea does not look
  });
}

TEST(Move, Addressing16) {
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.store<u16>(kD + 0x30, 0xbeef);
    m.s.gpr[RBX] = 0x77'0020;
    m.s.gpr[RSI] = 0x0e;
    ASSERT_TRUE(m.run(hex("8b 40 02")).halted());  // mov ax, [bx+si+2]
    EXPECT_EQ(m.s.gpr[RAX], 0xbeefu);
    m.s.gpr[RSI] = 0xfffe;  // wraps in 16 bits
    m.store<u16>(kD + 0x20, 0x1234);
    ASSERT_TRUE(m.run(hex("8b 40 02")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x1234u);
    m.s.gpr[RBP] = 0x10;  // bp: SS
    m.store<u16>(TestMachine::kStackBase + 0x10, 0x4321);
    ASSERT_TRUE(m.run(hex("8b 46 00")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x4321u);
    ASSERT_TRUE(m.run(hex("2e a1 00 00")).halted());  // cs:[0]: the code itself
    EXPECT_EQ(m.s.gpr[RAX], 0xa12eu);
  });
}

/// Limits, types and null segments in protected mode.
TEST(Move, SegmentChecks) {
  both_ways(TestMode::Prot32, [](TestMachine& m) {
    m.s.gpr[RBX] = kD;
    m.s.seg[DS].limit = kD + 2;
    EXPECT_TRUE(m.run(hex("8b 03")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("66 8b 03")).halted());
    EXPECT_TRUE(m.run(hex("89 03")).raised(vec::GP, 0));
    m.s.seg[DS].limit = 0xffffffff;
    m.s.seg[DS].type = 1;  // read-only
    EXPECT_TRUE(m.run(hex("8b 03")).halted());
    EXPECT_TRUE(m.run(hex("89 03")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("01 03")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("2e 89 03")).raised(vec::GP, 0));  // code is not writable
    EXPECT_TRUE(m.run(hex("2e 8b 03")).halted());
    m.s.seg[CS].type = 9;                                    // execute-only
    EXPECT_TRUE(m.run(hex("2e 8b 03")).raised(vec::GP, 0));
    m.s.seg[ES].unusable = 1;
    EXPECT_TRUE(m.run(hex("26 8b 03")).raised(vec::GP, 0));
    m.s.seg[SS].limit = kD - 1;
    EXPECT_TRUE(m.run(hex("36 8b 03")).raised(vec::SS, 0));
    // Expand-down: offsets above the limit.
    m.s.seg[FS].type = 7;
    m.s.seg[FS].limit = kD - 1;
    EXPECT_TRUE(m.run(hex("64 8b 03")).halted());
    m.s.seg[FS].limit = kD;
    EXPECT_TRUE(m.run(hex("64 8b 03")).raised(vec::GP, 0));
    m.s.seg[FS].limit = 0;
    m.s.seg[FS].db = 0;  // upper bound 64 KiB
    EXPECT_TRUE(m.run(hex("64 8b 03")).raised(vec::GP, 0));
    // A base: added, and wrapped at 4 GiB.
    m.s.seg[GS].base = 0xffff'f000;
    m.s.gpr[RBX] = kD + 0x1000;
    m.store<u32>(kD, 0x600d);
    EXPECT_TRUE(m.run(hex("65 8b 03")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x600du);
  });
}

TEST(Move, RealModeLimit) {
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.s.gpr[RBX] = 0xffff;
    EXPECT_TRUE(m.run(hex("8b 07")).raised(vec::GP, 0));
    EXPECT_TRUE(m.run(hex("8a 07")).halted());
    m.s.gpr[RBP] = 0xffff;
    EXPECT_TRUE(m.run(hex("8b 46 00")).raised(vec::SS, 0));
  });
}

TEST(Move, Extend) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBX] = 0xffff'ffff'8000'8180;
    m.store<u32>(kD, 0x8000'0080);
    m.s.gpr[RSI] = kD;
    ASSERT_TRUE(m.run(hex("0f b6 c3")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x80u);
    ASSERT_TRUE(m.run(hex("0f b6 c7")).halted());  // movzx eax, bh
    EXPECT_EQ(m.s.gpr[RAX], 0x81u);
    ASSERT_TRUE(m.run(hex("0f be c3")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ff80u);
    ASSERT_TRUE(m.run(hex("48 0f bf c3")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffff'ffff'8180u);
    ASSERT_TRUE(m.run(hex("48 63 c3")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffff'8000'8180u);
    ASSERT_TRUE(m.run(hex("63 c3")).halted());  // movsxd eax, ebx
    EXPECT_EQ(m.s.gpr[RAX], 0x8000'8180u);
    ASSERT_TRUE(m.run(hex("66 0f be 06")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x8000'ff80u);
    ASSERT_TRUE(m.run(hex("48 63 06")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffff'8000'0080u);
    m.s.gpr[RAX] = 0x8080;
    ASSERT_TRUE(m.run(hex("66 98")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xff80u);
    ASSERT_TRUE(m.run(hex("98")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ff80u);
    ASSERT_TRUE(m.run(hex("48 98")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffff'ffff'ff80u);
    m.s.gpr[RDX] = 5;
    ASSERT_TRUE(m.run(hex("99")).halted());
    EXPECT_EQ(m.s.gpr[RDX], 0xffff'ffffu);
    ASSERT_TRUE(m.run(hex("48 99")).halted());
    EXPECT_EQ(m.s.gpr[RDX], ~0ull);
    m.s.gpr[RAX] = 1;
    ASSERT_TRUE(m.run(hex("66 99")).halted());
    EXPECT_EQ(m.s.gpr[RDX], 0xffff'ffff'ffff'0000u);
  });
}

TEST(Move, Lea) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RBX] = 0xffff'ffff'ffff'fff0;
    m.s.gpr[RCX] = 0x10;
    m.s.seg[FS].base = 0x5000;
    ASSERT_TRUE(m.run(hex("64 48 8d 44 4b 01")).halted());  // no segment base
    EXPECT_EQ(m.s.gpr[RAX], 0x11u);
    ASSERT_TRUE(m.run(hex("8d 03")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'fff0u);
    ASSERT_TRUE(m.run(hex("67 48 8d 03")).halted());  // 32-bit address, 64-bit result
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'fff0u);
    ASSERT_TRUE(m.run(hex("66 8d 03")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xffff'fff0u);
    EXPECT_TRUE(m.run(hex("8d c3")).raised(vec::UD));
  });
}

TEST(Move, Exchange) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = 0xaaaa'aaaa'aaaa'aaaa;
    m.s.gpr[RBX] = 0xbbbb'bbbb'bbbb'bbbb;
    ASSERT_TRUE(m.run(hex("87 d8")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xbbbb'bbbbu);
    EXPECT_EQ(m.s.gpr[RBX], 0xaaaa'aaaau);
    m.s.gpr[RAX] = 0x1122;
    ASSERT_TRUE(m.run(hex("86 e0")).halted());  // xchg al, ah
    EXPECT_EQ(m.s.gpr[RAX], 0x2211u);
    m.s.gpr[RSI] = kD;
    m.store<u64>(kD, 0x1234'5678'9abc'def0);
    ASSERT_TRUE(m.run(hex("48 87 06")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x1234'5678'9abc'def0u);
    EXPECT_EQ(m.load<u64>(kD), 0x2211u);
    m.s.gpr[RAX] = ~0ull;
    ASSERT_TRUE(m.run(hex("90")).halted());  // NOP, not XCHG EAX, EAX
    EXPECT_EQ(m.s.gpr[RAX], ~0ull);
    ASSERT_TRUE(m.run(hex("49 90")).halted());  // xchg r8, rax
    EXPECT_EQ(m.s.gpr[R8], ~0ull);
    EXPECT_EQ(m.s.gpr[RAX], 0u);
  });
}

TEST(Move, Conditions) {
  // Each condition's definition on all 32 combinations of CF PF ZF SF OF.
  TestMachine m(TestMode::Long64);
  for (unsigned combination = 0; combination < 32; combination++) {
    const bool cf = combination & 1, pf = combination & 2, zf = combination & 4, sf = combination & 8, of = combination & 16;
    const bool even[8] = {of, cf, zf, cf || zf, sf, pf, sf != of, zf || sf != of};
    for (unsigned k = 0; k < 16; k++) {
      const bool want = even[k / 2] != static_cast<bool>(k & 1);
      m.s.rflags = 2 | (cf ? rflags::CF : 0) | (pf ? rflags::PF : 0) | (zf ? rflags::ZF : 0) | (sf ? rflags::SF : 0) |
                   (of ? rflags::OF : 0);
      m.s.gpr[RAX] = 0xffff;
      ASSERT_EQ(m.step({0x0f, static_cast<u8>(0x90 + k), 0xc0}), Exec::Next);  // setcc al
      ASSERT_EQ(m.s.gpr[RAX], want ? 0xff01u : 0xff00u) << k;
      m.s.gpr[RAX] = ~0ull;
      m.s.gpr[RBX] = 5;
      ASSERT_EQ(m.step({0x0f, static_cast<u8>(0x40 + k), 0xc3}), Exec::Next);  // cmovcc eax, ebx
      ASSERT_EQ(m.s.gpr[RAX], want ? 5u : 0xffff'ffffu) << k;
      ASSERT_EQ(m.step({static_cast<u8>(0x70 + k), 0x10}), Exec::Branch);
      ASSERT_EQ(m.s.rip, TestMachine::kCode + 2 + (want ? 0x10 : 0)) << k;
    }
  }
}

/// CMOVcc reads its memory operand whatever the condition.
TEST(Move, ConditionalMoveFaults) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.unmap(kD);
    m.s.gpr[RSI] = kD;
    m.s.gpr[RAX] = ~0ull;
    m.s.rflags = 2;
    EXPECT_TRUE(m.run(hex("0f 44 06")).raised(vec::PF, 0));
    EXPECT_EQ(m.s.gpr[RAX], ~0ull);
  });
}

TEST(Move, Rest) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.rflags = 2 | rflags::CF | rflags::ZF;
    m.s.gpr[RAX] = 0x5555;
    ASSERT_TRUE(m.run(hex("9f")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0x4355u);
    m.s.gpr[RAX] = 0xff00;
    m.s.rflags = 2 | rflags::OF;
    ASSERT_TRUE(m.run(hex("9e")).halted());
    EXPECT_EQ(m.s.rflags, 2 | (rflags::STATUS));
    m.s.gpr[RBX] = kD;
    m.s.gpr[RAX] = 0x1205;
    m.store<u8>(kD + 5, 0x77);
    ASSERT_TRUE(m.run(hex("d7")).halted());  // xlat
    EXPECT_EQ(m.s.gpr[RAX], 0x1277u);
    m.s.gpr[RSI] = kD;
    m.s.gpr[RAX] = 0x0102'0304'0506'0708;
    ASSERT_TRUE(m.run(hex("48 0f 38 f1 06 0f 38 f0 1e")).halted());  // movbe
    EXPECT_EQ(m.load<u64>(kD), 0x0807'0605'0403'0201u);
    EXPECT_EQ(m.s.gpr[RBX], 0x0102'0304u);
    ASSERT_TRUE(m.run(hex("66 0f 38 f0 1e")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 0x0102'0102u);
    ASSERT_TRUE(m.run(hex("48 0f c3 06")).halted());  // movnti
    EXPECT_EQ(m.load<u64>(kD), m.s.gpr[RAX]);
    m.unmap(kD);
    ASSERT_TRUE(m.run(hex("0f 18 06 0f 0d 0e 0f 1f 06 f3 90 f3 0f 1e fa")).halted());  // prefetches and NOPs touch nothing
    m.s.rflags |= rflags::DF;
    ASSERT_TRUE(m.run(hex("f8 fc f9 f5 f9 fd")).halted());
    EXPECT_TRUE(m.s.rflags & rflags::CF);
    EXPECT_TRUE(m.s.rflags & rflags::DF);
  });
  TestMachine m(TestMode::Prot32);
  m.s.rflags |= rflags::CF;
  ASSERT_TRUE(m.run(hex("d6")).halted());  // salc
  EXPECT_EQ(m.s.gpr[RAX], 0xffu);
}

/// MMIO: each access once, in its width; an answer that is not there yet leaves the instruction unexecuted.
TEST(Move, Mmio) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    const u64 linear = 0x800'0000;
    m.map(linear, 0xfee0'0000, TestMachine::kPresent | TestMachine::kWritable);
    m.s.gpr[RSI] = linear + 0x20;
    ASSERT_TRUE(m.run(hex("8b 06")).halted());
    ASSERT_EQ(m.env.mmio.size(), 1u);
    EXPECT_EQ(m.env.mmio[0].gpa, 0xfee0'0020u);
    EXPECT_EQ(m.env.mmio[0].size, 4u);
    EXPECT_EQ(m.s.gpr[RAX], 0x5566'7788u);
    m.env.exits_to_give = 1;
    auto out = m.run(hex("89 06"));
    EXPECT_EQ(out.result, Interpreter::Result::Exit);
    EXPECT_EQ(m.s.rip, TestMachine::kCode);
    EXPECT_EQ(m.env.mmio.size(), 1u);
    EXPECT_TRUE(m.resume().halted());
    ASSERT_EQ(m.env.mmio.size(), 2u);
    EXPECT_TRUE(m.env.mmio[1].write);
    EXPECT_EQ(m.env.retirements, 1u);
    m.env.mmio.clear();
    m.env.mmio_value = 7;
    ASSERT_TRUE(m.run(hex("ff 06")).halted());  // inc dword: a read and a write
    ASSERT_EQ(m.env.mmio.size(), 2u);
    EXPECT_EQ(m.env.mmio[1].value, 8u);
  });
}

}  // namespace
}  // namespace ring3::engine::test
