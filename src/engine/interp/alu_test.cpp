#include <gtest/gtest.h>

#include <random>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 CF = rflags::CF, PF = rflags::PF, AF = rflags::AF, ZF = rflags::ZF, SF = rflags::SF, OF = rflags::OF;

/// RAX, RBX and flags before, code, RAX and flags after. Long mode.
struct Case {
  const char* code;
  u64 rax, rbx, flags, want_rax, want_flags;
  u64 mask = rflags::STATUS;  ///< flags that are defined
};

void check(const Case& k) {
  SCOPED_TRACE(k.code);
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.s.gpr[RAX] = k.rax;
    m.s.gpr[RBX] = k.rbx;
    m.s.gpr[RSI] = TestMachine::kData;
    m.store<u64>(TestMachine::kData, k.rbx);
    m.s.rflags = (m.s.rflags & ~rflags::STATUS) | k.flags;
    ASSERT_TRUE(m.run(hex(k.code)).halted());
    EXPECT_EQ(m.s.gpr[RAX], k.want_rax);
    EXPECT_EQ(m.s.rflags & k.mask, k.want_flags & k.mask);
  });
}

TEST(Alu, Results) {
  const u64 logic = rflags::STATUS & ~AF;
  for (const Case& k : {
           Case{"48 01 d8", ~0ull, 1, 0, 0, CF | PF | AF | ZF},                     // add rax, rbx
           Case{"01 d8", 0xffff'ffff'7fff'ffff, 1, 0, 0x8000'0000, PF | AF | SF | OF},  // 32 bits clear the upper half
           Case{"66 01 d8", 0x1234'ffff, 1, 0, 0x1234'0000, CF | PF | AF | ZF},
           Case{"00 d8", 0x1280, 0x80, 0, 0x1200, CF | PF | ZF | OF},
           Case{"00 dc", 0x7f00, 1, 0, 0x8000, AF | SF | OF},                        // add ah, bl
           Case{"00 f8", 0x01, 0x0200, 0, 0x03, PF},                                 // add al, bh
           Case{"48 11 d8", 1, 1, CF, 3, PF},                                        // adc
           Case{"48 11 d8", ~0ull, 0, CF, 0, CF | PF | AF | ZF},
           Case{"48 19 d8", 0, 0, CF, ~0ull, CF | PF | AF | SF},                     // sbb
           Case{"19 d8", 5, 5, 0, 0, PF | ZF},
           Case{"48 29 d8", 0x8000'0000'0000'0000, 1, 0, 0x7fff'ffff'ffff'ffff, PF | AF | OF},
           Case{"48 39 d8", 1, 2, 0, 1, CF | PF | AF | SF},                          // cmp
           Case{"48 21 d8", 0xf0f0, 0x0ff0, CF | OF, 0x00f0, PF, logic},
           Case{"48 09 d8", 0x8000'0000'0000'0000, 0, CF, 0x8000'0000'0000'0000, PF | SF, logic},
           Case{"31 c0", ~0ull, 0, CF, 0, PF | ZF, logic},                           // xor eax, eax
           Case{"48 85 d8", 1, 2, OF, 1, PF | ZF, logic},                            // test
           Case{"a8 80", 0x80, 0, 0, 0x80, SF, logic},                               // test al, imm
           Case{"48 ff c0", 0x7fff'ffff'ffff'ffff, 0, CF, 0x8000'0000'0000'0000, CF | PF | AF | SF | OF},  // inc keeps CF
           Case{"ff c8", 0, 0, CF, 0xffff'ffff, CF | PF | AF | SF},                  // dec
           Case{"fe c4", 0xff00, 0, 0, 0, PF | AF | ZF},                             // inc ah
           Case{"48 f7 d8", 1, 0, 0, ~0ull, CF | PF | AF | SF},                      // neg
           Case{"f6 d8", 0x80, 0, 0, 0x80, CF | SF | OF},
           Case{"48 f7 d0", 0, 0, CF | ZF, ~0ull, CF | ZF},                          // not: no flags
           Case{"f7 d0", 0, 0, CF, 0xffff'ffff, CF},
           Case{"48 03 06", 2, 3, 0, 5, PF},                                         // add rax, [rsi]
           Case{"48 83 c0 ff", 1, 0, 0, 0, CF | PF | AF | ZF},                       // sign-extended imm8
           Case{"48 05 00 00 00 80", 0, 0, 0, 0xffff'ffff'8000'0000, PF | SF},       // sign-extended imm32
           Case{"05 00 00 00 80", 0, 0, 0, 0x8000'0000, PF | SF},
       })
    check(k);
}

TEST(Alu, CompareAndExchange) {
  for (const bool amd : {false, true}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      m.c().features.amd = amd;
      m.s.gpr[RAX] = 0xaaaa'aaaa'0000'0001;
      m.s.gpr[RBX] = 0xbbbb'bbbb'0000'0002;
      m.s.gpr[RCX] = 0xcccc'cccc'0000'0003;
      ASSERT_TRUE(m.run(hex("0f b1 cb")).halted());  // cmpxchg ebx, ecx: differs
      EXPECT_EQ(m.s.gpr[RAX], 2u);
      EXPECT_EQ(m.s.gpr[RBX], 0xbbbb'bbbb'0000'0002u);  // not written
      EXPECT_FALSE(m.s.rflags & ZF);
      m.s.gpr[RAX] = 0xaaaa'aaaa'0000'0002;
      ASSERT_TRUE(m.run(hex("0f b1 cb")).halted());  // equal
      EXPECT_EQ(m.s.gpr[RAX], 0xaaaa'aaaa'0000'0002u);
      EXPECT_EQ(m.s.gpr[RBX], 3u);
      EXPECT_TRUE(m.s.rflags & ZF);
    });
  }
}

TEST(Alu, MultiplyDivide) {
  const u64 product = CF | OF;
  for (const Case& k : {
           Case{"48 f7 e3", 1ull << 63, 2, 0, 0, product, product},                  // mul rbx
           Case{"f7 e3", 0xffff'ffff'0000'0003, 5, product, 15, 0, product},
           Case{"f6 e3", 0xaa10, 0x10, 0, 0x100, product, product},                  // AX = AL * BL
           Case{"f6 eb", 0xff, 0xff, product, 1, 0, product},                        // -1 * -1
           Case{"48 f7 eb", ~0ull, 2, 0, ~0ull - 1, 0, product},
           Case{"48 0f af c3", 1ull << 62, 4, 0, 0, product, product},
           Case{"48 6b c3 f0", 0, 3, 0, static_cast<u64>(-48), 0, product},
           Case{"66 69 c3 00 10", 0xdead'0000, 0x10, 0, 0xdead'0000, product, product},
           Case{"31 d2 48 f7 f3", 100, 7, 0, 14, 0, 0},                              // div
           Case{"31 d2 f7 f3", 0xffff'ffff'0000'0064, 7, 0, 14, 0, 0},
           Case{"f6 f3", 0x0107, 8, 0, 0x0720, 0, 0},                                // AH = 7, AL = 0x20
           Case{"48 99 48 f7 fb", static_cast<u64>(-100), 7, 0, static_cast<u64>(-14), 0, 0},  // cqo; idiv
           Case{"f6 fb", 0xff9c, 0xf9, 0, 0xfe0e, 0, 0},                             // -100 / -7 = 14 rest -2
           Case{"66 99 66 f7 fb", 0x8000, 1, 0, 0x8000, 0, 0},
       })
    check(k);
}

TEST(Alu, DivideErrors) {
  struct Fault { const char* code; u64 rax, rdx, rbx; };
  for (const Fault& k : {Fault{"48 f7 f3", 1, 0, 0}, Fault{"48 f7 f3", 0, 5, 5}, Fault{"f7 f3", 0, 1, 1},
                         Fault{"f6 f3", 0x200, 0, 2}, Fault{"48 f7 fb", 0, 1ull << 63, ~0ull},
                         Fault{"48 f7 fb", 1ull << 63, ~0ull, ~0ull}, Fault{"f7 fb", 0x8000'0000, 0xffff'ffff, 0xffff'ffff},
                         Fault{"66 f7 fb", 0x8000, 0, 1}, Fault{"f6 fb", 0x80, 0, 1}, Fault{"f6 fb", 0xff80, 0, 0xff}}) {
    SCOPED_TRACE(k.code);
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      m.s.gpr[RAX] = k.rax;
      m.s.gpr[RDX] = k.rdx;
      m.s.gpr[RBX] = k.rbx;
      const auto out = m.run(hex(k.code));
      EXPECT_TRUE(out.raised(vec::DE));
      EXPECT_EQ(m.s.rip, TestMachine::kCode);
      EXPECT_EQ(m.s.gpr[RAX], k.rax);
      EXPECT_EQ(m.s.gpr[RDX], k.rdx);
    });
  }
}

TEST(Alu, DivideRandom) {
  std::mt19937_64 random(1);
  TestMachine m(TestMode::Long64);
  for (int n = 0; n < 3000; n++) {
    const u64 high = random() >> (random() & 63), low = random(), d = random() >> (random() & 63);
    const bool is_signed = n & 1;
    m.s.gpr[RDX] = high;
    m.s.gpr[RAX] = low;
    m.s.gpr[RBX] = d;
    const auto e = m.step(hex(is_signed ? "48 f7 fb" : "48 f7 f3"));
    const u128 dividend = static_cast<u128>(high) << 64 | low;
    if (is_signed) {
      const i128 a = static_cast<i128>(dividend), b = static_cast<i64>(d);
      const bool overflow = b == 0 || (b == -1 && dividend >> 127 && dividend << 1 == 0) || a / b != static_cast<i64>(a / b);
      ASSERT_EQ(e == Exec::Stop, overflow) << high << ' ' << low << ' ' << d;
      if (!overflow) {
        ASSERT_EQ(m.s.gpr[RAX], static_cast<u64>(a / b));
        ASSERT_EQ(m.s.gpr[RDX], static_cast<u64>(a % b));
      }
    } else {
      const bool overflow = d == 0 || (dividend / d) >> 64 != 0;
      ASSERT_EQ(e == Exec::Stop, overflow);
      if (!overflow) {
        ASSERT_EQ(m.s.gpr[RAX], static_cast<u64>(dividend / d));
        ASSERT_EQ(m.s.gpr[RDX], static_cast<u64>(dividend % d));
      }
    }
  }
}

/// ADD, ADC, SUB, SBB of every width against the definitions of the flags.
TEST(Alu, FlagsByDefinition) {
  std::mt19937_64 random(2);
  TestMachine m(TestMode::Long64);
  const char* const prefix[] = {"", "66", "", "48"};
  const u8 opcode[] = {0x01, 0x11, 0x29, 0x19};
  for (int n = 0; n < 8000; n++) {
    const unsigned w = n & 3, bits = 8u << w, op = n >> 2 & 3;
    const u64 mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
    const u64 a = (n & 64 ? random() : random() >> 60), b = (n & 128 ? random() : random() % 3 - 1);
    const bool carry = random() & 1, subtract = op >= 2;
    const u64 in = (op & 1) && carry;
    m.s.gpr[RAX] = a;
    m.s.gpr[RBX] = b;
    m.s.rflags = (random() & rflags::STATUS & ~CF) | (carry ? CF : 0) | 2;
    Bytes code = hex(prefix[w]);
    code.push_back(static_cast<u8>(opcode[op] - (w == 0)));
    code.push_back(0xd8);
    ASSERT_EQ(m.step(code), Exec::Next);
    const u64 x = a & mask, y = b & mask;
    const u64 r = (subtract ? x - y - in : x + y + in) & mask;
    const u128 wide = static_cast<u128>(x) + y + in;
    u64 want = 0;
    if (subtract ? static_cast<u128>(x) < static_cast<u128>(y) + in : (wide >> bits) & 1) want |= CF;
    if (!__builtin_parity(static_cast<u8>(r))) want |= PF;
    if ((x ^ y ^ r) & 0x10) want |= AF;
    if (r == 0) want |= ZF;
    if (r >> (bits - 1)) want |= SF;
    if ((subtract ? (x ^ y) & (x ^ r) : ~(x ^ y) & (x ^ r)) >> (bits - 1) & 1) want |= OF;
    ASSERT_EQ(m.s.rflags & rflags::STATUS, want) << "op " << op << " bits " << bits;
    const u64 full = bits == 64 ? r : bits == 32 ? r : (a & ~mask) | r;
    ASSERT_EQ(m.s.gpr[RAX], full);
  }
}

TEST(Alu, MemoryDestination) {
  for (const char* lock : {"", "f0 "}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      m.s.gpr[RSI] = TestMachine::kData;
      m.s.gpr[RBX] = 5;
      m.store<u64>(TestMachine::kData, 0xffff'ffff'ffff'fffe);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "48 01 1e")).halted());
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 3u);
      EXPECT_EQ(m.s.rflags & rflags::STATUS, CF | PF | AF);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "66 81 2e 04 00")).halted());  // sub word [rsi], 4
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 0xffffu);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "fe 06")).halted());  // inc byte [rsi]: CF stays
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 0xff00u);
      EXPECT_EQ(m.s.rflags & rflags::STATUS, CF | PF | AF | ZF);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "f7 16")).halted());  // not dword [rsi]
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 0xffff00ffu);
    });
  }
}

/// Across a page end, locked: the split lock path. A fault on the second page changes nothing.
TEST(Alu, PageCrossing) {
  for (const char* code : {"48 01 1e", "f0 48 01 1e"}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      const u64 at = TestMachine::kData + 0xffc;
      m.s.gpr[RSI] = at;
      m.s.gpr[RBX] = 0x1'0000'0001;
      m.store<u64>(at, 0xffff'ffff);
      ASSERT_TRUE(m.run(hex(code)).halted());
      EXPECT_EQ(m.load<u64>(at), 0x2'0000'0000u);
      m.map(TestMachine::kData + 0x1000, TestMachine::kData + 0x1000, TestMachine::kPresent | TestMachine::kUser);
      const auto out = m.run(hex(code));
      EXPECT_TRUE(out.raised(vec::PF, pferr::P | pferr::W));
      EXPECT_EQ(out.event.payload, TestMachine::kData + 0x1000);
      EXPECT_EQ(m.load<u64>(at), 0x2'0000'0000u);
      EXPECT_EQ(m.s.rip, TestMachine::kCode);
    });
  }
}

/// A read-modify-write of a read-only page faults as a write, before it reads.
TEST(Alu, ReadOnlyPage) {
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.map(TestMachine::kData, TestMachine::kData, TestMachine::kPresent | TestMachine::kUser);
    m.s.gpr[RSI] = TestMachine::kData;
    const u64 flags = m.s.rflags;
    for (const char* code : {"01 06", "f0 01 06", "ff 06", "0f c1 06", "0f b1 1e", "f0 0f c7 0e", "0f ab 06", "d1 06"}) {
      SCOPED_TRACE(code);
      const auto out = m.run(hex(code));
      EXPECT_TRUE(out.raised(vec::PF, pferr::P | pferr::W));
      EXPECT_EQ(out.event.payload, TestMachine::kData);
      EXPECT_EQ(m.s.rflags, flags);
    }
    EXPECT_TRUE(m.run(hex("39 06")).halted());  // cmp only reads
    EXPECT_TRUE(m.run(hex("0f a3 06")).halted());  // and so does bt
  });
}

TEST(Alu, ExchangeAdd) {
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.s.gpr[RAX] = 5;
    m.s.gpr[RBX] = 7;
    ASSERT_TRUE(m.run(hex("48 0f c1 d8")).halted());  // xadd rax, rbx
    EXPECT_EQ(m.s.gpr[RAX], 12u);
    EXPECT_EQ(m.s.gpr[RBX], 5u);
    ASSERT_TRUE(m.run(hex("48 0f c1 c0")).halted());  // xadd rax, rax: the destination is written last
    EXPECT_EQ(m.s.gpr[RAX], 24u);
    m.s.gpr[RSI] = TestMachine::kData;
    m.store<u32>(TestMachine::kData, 100);
    m.s.gpr[RBX] = ~0ull;
    ASSERT_TRUE(m.run(hex("f0 0f c1 1e")).halted());
    EXPECT_EQ(m.load<u32>(TestMachine::kData), 99u);
    EXPECT_EQ(m.s.gpr[RBX], 100u);
  });
}

TEST(Alu, CompareExchange) {
  for (const char* lock : {"", "f0 "}) {
    both_ways(TestMode::Long64, [&](TestMachine& m) {
      m.s.gpr[RSI] = TestMachine::kData;
      m.store<u32>(TestMachine::kData, 10);
      m.s.gpr[RAX] = 0xffff'ffff'0000'000a;
      m.s.gpr[RBX] = 20;
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f b1 1e")).halted());
      EXPECT_EQ(m.load<u32>(TestMachine::kData), 20u);
      EXPECT_EQ(m.s.gpr[RAX], 0xffff'ffff'0000'000a);  // untouched on a match
      EXPECT_TRUE(m.s.rflags & ZF);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f b1 1e")).halted());
      EXPECT_EQ(m.s.gpr[RAX], 20u);
      EXPECT_FALSE(m.s.rflags & ZF);
      EXPECT_TRUE(m.s.rflags & CF);  // 10 - 20

      m.store<u64>(TestMachine::kData, 0x1111'2222'3333'4444);
      m.s.gpr[RAX] = 0x3333'4444;
      m.s.gpr[RDX] = 0x1111'2222;
      m.s.gpr[RBX] = 1;
      m.s.gpr[RCX] = 2;
      m.s.rflags = 2 | CF | OF;
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f c7 0e")).halted());
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 0x2'0000'0001u);
      EXPECT_EQ(m.s.rflags & rflags::STATUS, CF | OF | ZF);
      ASSERT_TRUE(m.run(hex(std::string(lock) + "0f c7 0e")).halted());
      EXPECT_EQ(m.s.gpr[RAX], 1u);
      EXPECT_EQ(m.s.gpr[RDX], 2u);
      EXPECT_EQ(m.s.rflags & rflags::STATUS, CF | OF);

      m.store<u64>(TestMachine::kData, 7);
      m.store<u64>(TestMachine::kData + 8, 8);
      m.s.gpr[RAX] = 7;
      m.s.gpr[RDX] = 8;
      m.s.gpr[RBX] = 9;
      m.s.gpr[RCX] = 10;
      ASSERT_TRUE(m.run(hex(std::string(lock) + "48 0f c7 0e")).halted());
      EXPECT_EQ(m.load<u64>(TestMachine::kData), 9u);
      EXPECT_EQ(m.load<u64>(TestMachine::kData + 8), 10u);
      EXPECT_TRUE(m.s.rflags & ZF);
      m.s.gpr[RSI] += 8;
      EXPECT_TRUE(m.run(hex(std::string(lock) + "48 0f c7 0e")).raised(vec::GP, 0));  // not 16-byte aligned
    });
  }
}

TEST(Alu, LockNeedsMemoryDestination) {
  TestMachine m(TestMode::Long64);
  m.s.gpr[RSI] = TestMachine::kData;
  for (const char* code : {"f0 01 d8", "f0 48 03 06", "f0 39 06", "f0 89 06", "f0 90", "f0 0f a3 06", "f0 d1 06"}) {
    SCOPED_TRACE(code);
    EXPECT_TRUE(m.run(hex(code)).raised(vec::UD));
  }
}

TEST(Alu, Decimal) {
  struct Row { const char* code; u16 ax; u64 flags; u16 want; u64 want_flags, mask; };
  const u64 ac = AF | CF;
  for (const Row& k : {Row{"37", 0x000f, 0, 0x0105, ac, ac}, Row{"37", 0x0005, AF, 0x010b & 0xff0f, ac, ac},
                       Row{"37", 0x00f9, 0, 0x0009, 0, ac}, Row{"3f", 0x0203, AF, 0x000d, ac, ac},
                       Row{"3f", 0x0005, CF, 0x0005, 0, ac}, Row{"27", 0x009a, 0, 0x0000, CF | AF | ZF | PF, ac | ZF | PF | SF},
                       Row{"27", 0x0079, AF, 0x007f, AF, ac}, Row{"2f", 0x0000, AF, 0x00fa, ac | SF | PF, ac | SF | PF | ZF},
                       Row{"2f", 0x0066, 0, 0x0066, PF, ac | ZF | PF | SF}, Row{"d5 0a", 0x0205, 0, 0x0019, 0, ZF | SF | PF},
                       Row{"d4 0a", 0x0049, 0, 0x0703, PF, ZF | SF | PF}, Row{"d4 10", 0x00ff, 0, 0x0f0f, PF, ZF | SF | PF}}) {
    SCOPED_TRACE(k.code);
    both_ways(TestMode::Prot32, [&](TestMachine& m) {
      m.s.gpr[RAX] = 0x7700'0000u | k.ax;
      m.s.rflags = 2 | k.flags;
      ASSERT_TRUE(m.run(hex(k.code)).halted());
      EXPECT_EQ(m.s.gpr[RAX], 0x7700'0000u | k.want);
      EXPECT_EQ(m.s.rflags & k.mask, k.want_flags);
    });
  }
  TestMachine m(TestMode::Prot32);
  EXPECT_TRUE(m.run(hex("d4 00")).raised(vec::DE));
  TestMachine l(TestMode::Long64);
  for (const char* code : {"37", "3f", "27", "2f", "d5 0a", "d4 0a"}) EXPECT_TRUE(l.run(hex(code)).raised(vec::UD));
}

TEST(Bmi, Results) {
  for (const Case& k : {
           Case{"c4 e2 f8 f2 c3", 0x0f, 0xff, CF | OF, 0xf0, 0, CF | OF | ZF | SF},   // andn rax, rax, rbx
           Case{"c4 e2 f8 f3 db", 0, 0x58, 0, 0x08, CF, CF | ZF | SF | OF},            // blsi rax, rbx
           Case{"c4 e2 f8 f3 d3", 0, 0x58, 0, 0x0f, 0, CF | ZF | SF | OF},             // blsmsk
           Case{"c4 e2 f8 f3 cb", 0, 0x58, 0, 0x50, 0, CF | ZF | SF | OF},             // blsr
           Case{"c4 e2 f8 f3 cb", 0, 0, 0, 0, CF | ZF, CF | ZF | SF | OF},
           Case{"c4 e3 fb f0 c3 04", 0, 0x1f, CF, 0xf000'0000'0000'0001, CF},          // rorx rax, rbx, 4
           Case{"c4 e3 7b f0 c3 04", 0, 0xffff'ffff'0000'001f, 0, 0xf000'0001, 0},
       })
    check(k);
}

TEST(Bmi, ThreeOperands) {
  both_ways(TestMode::Long64, [&](TestMachine& m) {
    m.s.gpr[RBX] = 0x1234'5678'9abc'def0;
    m.s.gpr[RCX] = 0x0804;
    ASSERT_TRUE(m.run(hex("c4 e2 f0 f7 c3")).halted());  // bextr rax, rbx, rcx: 8 bits from bit 4
    EXPECT_EQ(m.s.gpr[RAX], 0xefu);
    m.s.gpr[RCX] = 12;
    ASSERT_TRUE(m.run(hex("c4 e2 f0 f5 c3")).halted());  // bzhi rax, rbx, rcx
    EXPECT_EQ(m.s.gpr[RAX], 0xef0u);
    ASSERT_TRUE(m.run(hex("c4 e2 f1 f7 c3")).halted());  // shlx rax, rbx, rcx
    EXPECT_EQ(m.s.gpr[RAX], 0x4567'89ab'cdef'0000u);
    ASSERT_TRUE(m.run(hex("c4 e2 f3 f7 c3")).halted());  // shrx
    EXPECT_EQ(m.s.gpr[RAX], 0x0001'2345'6789'abcdu);
    m.s.gpr[RBX] = 1ull << 63;
    ASSERT_TRUE(m.run(hex("c4 e2 f2 f7 c3")).halted());  // sarx
    EXPECT_EQ(m.s.gpr[RAX], 0xfff8'0000'0000'0000u);
    m.s.gpr[RBX] = 0b1011;
    m.s.gpr[RCX] = 0xf0f0;
    ASSERT_TRUE(m.run(hex("c4 e2 e3 f5 c1")).halted());  // pdep rax, rbx, rcx
    EXPECT_EQ(m.s.gpr[RAX], 0x00b0u);
    m.s.gpr[RBX] = 0xabcd;
    ASSERT_TRUE(m.run(hex("c4 e2 e2 f5 c1")).halted());  // pext
    EXPECT_EQ(m.s.gpr[RAX], 0xacu);
    m.s.gpr[RDX] = ~0ull;
    m.s.gpr[RSI] = 3;
    ASSERT_TRUE(m.run(hex("c4 e2 fb f6 de")).halted());  // mulx rbx, rax, rsi
    EXPECT_EQ(m.s.gpr[RBX], 2u);
    EXPECT_EQ(m.s.gpr[RAX], ~0ull - 2);
    ASSERT_TRUE(m.run(hex("c4 e2 fb f6 c6")).halted());  // mulx rax, rax, rsi: the high half stays
    EXPECT_EQ(m.s.gpr[RAX], 2u);
    m.s.rflags = 2 | CF | OF;
    m.s.gpr[RAX] = ~0ull;
    m.s.gpr[RBX] = 0;
    ASSERT_TRUE(m.run(hex("66 48 0f 38 f6 c3")).halted());  // adcx rax, rbx
    EXPECT_EQ(m.s.gpr[RAX], 0u);
    EXPECT_EQ(m.s.rflags & rflags::STATUS, CF | OF);
    ASSERT_TRUE(m.run(hex("f3 0f 38 f6 c3")).halted());  // adox eax, ebx
    EXPECT_EQ(m.s.gpr[RAX], 1u);
    EXPECT_EQ(m.s.rflags & rflags::STATUS, CF);
  });
}

TEST(Bmi, AbsentFeatures) {
  TestMachine m(TestMode::Long64);
  m.s.gpr[RBX] = 0x10;
  for (Feature f : {Feature::Bmi1, Feature::Bmi2, Feature::Adx, Feature::Lzcnt, Feature::Popcnt})
    m.c().features.has.reset(static_cast<unsigned>(f));
  EXPECT_TRUE(m.run(hex("c4 e2 f8 f3 cb")).raised(vec::UD));
  EXPECT_TRUE(m.run(hex("c4 e3 fb f0 c3 04")).raised(vec::UD));
  EXPECT_TRUE(m.run(hex("66 48 0f 38 f6 c3")).raised(vec::UD));
  EXPECT_TRUE(m.run(hex("f3 48 0f b8 c3")).raised(vec::UD));
  ASSERT_TRUE(m.run(hex("f3 48 0f bc c3")).halted());  // BSF with an ignored prefix
  EXPECT_EQ(m.s.gpr[RAX], 4u);
  ASSERT_TRUE(m.run(hex("f3 48 0f bd c3")).halted());  // BSR, where LZCNT would give 59
  EXPECT_EQ(m.s.gpr[RAX], 4u);
}

}  // namespace
}  // namespace ring3::engine::test
