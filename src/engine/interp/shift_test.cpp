#include <gtest/gtest.h>

#include <random>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 CF = rflags::CF, PF = rflags::PF, ZF = rflags::ZF, SF = rflags::SF, OF = rflags::OF;
constexpr u64 kSzp = SF | ZF | PF;

struct Case {
  const char* code;
  u64 rax, rbx, rcx, flags, want_rax, want_flags, mask;
};
void check(const Case& k) {
  SCOPED_TRACE(k.code);
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.s.gpr[RAX] = k.rax;
    m.s.gpr[RBX] = k.rbx;
    m.s.gpr[RCX] = k.rcx;
    m.s.rflags = 2 | k.flags;
    ASSERT_TRUE(m.run(hex(k.code)).halted());
    EXPECT_EQ(m.s.gpr[RAX], k.want_rax);
    EXPECT_EQ(m.s.rflags & k.mask, k.want_flags);
  });
}

TEST(Shift, Results) {
  const u64 all = CF | OF | kSzp;
  for (const Case& k : {
           Case{"48 d1 e0", 1ull << 63, 0, 0, 0, 0, CF | OF | ZF | PF, all},           // shl rax, 1
           Case{"d1 e0", 0xffff'ffff'4000'0000, 0, 0, CF, 0x8000'0000, OF | SF | PF, all},
           Case{"48 d3 e0", 1, 0, 65, 0, 2, 0, CF | kSzp},                             // the count is masked
           Case{"d3 e0", 0xffff'ffff'0000'0001, 0, 32, CF | OF | ZF, 1, CF | OF | ZF, all},  // count 0: flags stay, width applies
           Case{"48 c1 e8 04", 0x18, 0, 0, 0, 1, CF, CF | kSzp},
           Case{"48 c1 f8 3f", 1ull << 63, 0, 0, 0, ~0ull, SF | PF, CF | kSzp},        // sar
           Case{"c0 e4 04", 0x0f00, 0, 0, 0, 0xf000, SF | PF, CF | kSzp},              // shl ah, 4
           Case{"66 c1 e0 11", 0xffff, 0, 0, 0, 0, ZF | PF, kSzp},                     // 16-bit by 17
           Case{"48 c1 c0 08", 0x12'0000'0000'0000'34, 0, 0, ZF | SF, 0x3412, ZF | SF, CF | kSzp},  // rol keeps ZF SF PF
           Case{"c1 c8 04", 0x1, 0, 0, ZF, 0x1000'0000, ZF, CF | kSzp},
           Case{"66 c1 c0 10", 0x1234, 0, 0, CF, 0x1234, 0, CF},                       // rotated once around: CF is bit 0
           Case{"48 d1 d0", 1ull << 63, 0, 0, CF | ZF, 1, CF | OF | ZF, all},          // rcl
           Case{"48 d1 d8", 1, 0, 0, 0, 0, CF, CF | OF},                               // rcr
           Case{"c0 d0 09", 0x5a, 0, 0, CF, 0x5a, CF, CF},                             // 9 bits around
           Case{"66 c1 d8 11", 0x1234, 0, 0, CF, 0x1234, CF, CF},
           Case{"48 0f a4 d8 08", 0x11, 0xab'0000'0000'0000'00, 0, 0, 0x11ab, 0, CF | ZF | SF},  // shld
           Case{"0f ad d8", 0x1'0000'0001, 0xf, 4, 0, 0xf000'0000, SF | PF, CF | kSzp},  // shrd eax, ebx, cl
           Case{"0f ad d8", 0xffff'ffff'0000'0001, 0xf, 0, CF | OF, 1, CF | OF, all},
       })
    check(k);
}

TEST(Shift, Bits) {
  for (const Case& k : {
           Case{"48 0f a3 d8", 1ull << 40, 104, 0, ZF, 1ull << 40, CF | ZF, CF | ZF},  // bt: modulo the width
           Case{"48 0f ab d8", 0, 3, 0, CF, 8, 0, CF},
           Case{"48 0f b3 d8", 8, 3, 0, 0, 0, CF, CF},
           Case{"48 0f ba f8 3f", 0, 0, 0, 0, 1ull << 63, 0, CF},                      // btc
           Case{"0f ba e8 00", 0xffff'ffff'0000'0000, 0, 0, 0, 1, 0, CF},              // bts eax clears the upper half
           Case{"48 0f bc c3", 7, 0x50, 0, ZF, 4, 0, ZF},
           Case{"48 0f bc c3", 7, 0, 0, 0, 7, ZF, ZF},                                 // the register stays
           Case{"48 0f bd c3", 7, 0x50, 0, 0, 6, 0, ZF},
           Case{"f3 48 0f bc c3", 7, 0, 0, 0, 64, CF, CF | ZF},                        // tzcnt
           Case{"f3 0f bc c3", 7, 1, 0, 0, 0, ZF, CF | ZF},
           Case{"f3 48 0f bd c3", 7, 1, 0, 0, 63, 0, CF | ZF},                         // lzcnt
           Case{"f3 66 0f bd c3", 0xf'0000, 1, 0, 0, 0xf'000f, 0, CF | ZF},
           Case{"f3 48 0f b8 c3", 7, ~0ull, 0, CF | OF | SF, 64, 0, CF | OF | SF | ZF},
           Case{"48 0f c8", 0x0102'0304'0506'0708, 0, 0, CF, 0x0807'0605'0403'0201, CF, CF},
           Case{"0f c8", 0xffff'ffff'0102'0304, 0, 0, 0, 0x0403'0201, 0, CF},
       })
    check(k);
}

TEST(Shift, Crc32c) {
  // CRC-32C of "123456789" is E3069283.
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    std::memcpy(m.ram(TestMachine::kData), "123456789", 9);
    m.s.gpr[RSI] = TestMachine::kData;
    m.s.gpr[RAX] = 0xffff'ffff'ffff'ffff;
    ASSERT_TRUE(m.run(hex("f2 48 0f 38 f1 06  f2 0f 38 f0 46 08  f7 d0")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xe306'9283u);
    m.s.gpr[RAX] = 0xffff'ffff;
    ASSERT_TRUE(m.run(hex("f2 0f 38 f1 06 f2 66 0f 38 f1 46 04 f2 66 0f 38 f1 46 06 f2 0f 38 f0 46 08 f7 d0")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 0xe306'9283u);
  });
}

TEST(Shift, Memory) {
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.s.gpr[RSI] = TestMachine::kData;
    m.store<u32>(TestMachine::kData, 0x8000'0001);
    ASSERT_TRUE(m.run(hex("d1 06")).halted());  // rol dword [rsi], 1
    EXPECT_EQ(m.load<u32>(TestMachine::kData), 3u);
    EXPECT_TRUE(m.s.rflags & CF);
    m.s.gpr[RCX] = 4;
    ASSERT_TRUE(m.run(hex("d2 26")).halted());  // shl byte [rsi], cl
    EXPECT_EQ(m.load<u32>(TestMachine::kData), 0x30u);
    m.s.gpr[RBX] = 0xffff'ffff;
    ASSERT_TRUE(m.run(hex("0f a5 1e")).halted());  // shld [rsi], ebx, cl
    EXPECT_EQ(m.load<u32>(TestMachine::kData), 0x30fu);
  });
}

/// A register bit offset is signed and reaches outside the operand.
TEST(Shift, BitStrings) {
  for (const char* lock : {"", "f0 "}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      const u64 at = TestMachine::kData + 0x800;
      m.s.gpr[RSI] = at;
      m.s.gpr[RBX] = 1000;
      ASSERT_TRUE(m.run(hex(std::string(lock) + "48 0f ab 1e")).halted());
      EXPECT_EQ(m.load<u8>(at + 125), 1);
      m.s.gpr[RBX] = static_cast<u64>(-1);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "48 0f ab 1e")).halted());
      EXPECT_EQ(m.load<u8>(at - 1), 0x80);
      EXPECT_FALSE(m.s.rflags & CF);
      m.s.gpr[RBX] = 0x1'ffff'fff8;  // 32-bit operand: -8
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f bb 1e")).halted());
      EXPECT_EQ(m.load<u8>(at - 1), 0x81);
      const auto out = m.run(hex("48 0f a3 1e"));  // 64-bit: 0x1fffffff8 bits away
      EXPECT_TRUE(out.raised(vec::PF, 0));
      EXPECT_EQ(out.event.payload, at + 0x3fff'fff8);
    });
    both_ways(TestMode::Real16, [&](TestMachine& m) {
      m.s.gpr[RSI] = 0x100;
      m.s.gpr[RAX] = 0xfff0;  // -16: one word below
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f ab 04")).halted());
      EXPECT_EQ(m.load<u16>(TestMachine::kData + 0xfe), 1);
      m.s.gpr[RSI] = 0;  // the offset wraps in 16 bits
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f ab 04")).halted());
      EXPECT_EQ(m.load<u16>(TestMachine::kData + 0xfffe), 1);
    });
  }
}

/// RCL and RCR of every width and count against their definition.
TEST(Shift, RotateThroughCarry) {
  std::mt19937_64 random(3);
  TestMachine m(TestMode::Long64);
  for (int n = 0; n < 4000; n++) {
    const unsigned w = n & 3, bits = 8u << w, count = random() & 0xff, masked = count & (bits == 64 ? 63 : 31);
    const bool left = n & 4;
    bool carry = random() & 1;
    u64 v = random();
    m.s.gpr[RAX] = v;
    m.s.gpr[RCX] = count;
    m.s.rflags = 2 | (carry ? CF : 0);
    Bytes code = hex(w == 1 ? "66" : w == 3 ? "48" : "");
    code.push_back(w == 0 ? 0xd2 : 0xd3);
    code.push_back(left ? 0xd0 : 0xd8);
    ASSERT_EQ(m.step(code), Exec::Next);
    const u64 mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
    u64 r = v & mask;
    for (unsigned k = 0; k < masked; k++) {
      if (left) {
        const bool out = r >> (bits - 1) & 1;
        r = (r << 1 | carry) & mask;
        carry = out;
      } else {
        const bool out = r & 1;
        r = r >> 1 | static_cast<u64>(carry) << (bits - 1);
        carry = out;
      }
    }
    ASSERT_EQ(m.s.gpr[RAX], bits >= 32 ? r : (v & ~mask) | r) << bits << ' ' << count;
    ASSERT_EQ((m.s.rflags & CF) != 0, carry);
  }
}

}  // namespace
}  // namespace ring3::engine::test
