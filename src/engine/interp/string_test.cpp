#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

constexpr u64 kD = TestMachine::kData;

void fill(TestMachine& m, u64 at, unsigned n, u8 first = 1) {
  for (unsigned i = 0; i < n; i++) *m.ram(at + i) = static_cast<u8>(first + i);
}

TEST(String, MoveForwardAndBackward) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    fill(m, kD, 64);
    m.s.gpr[RSI] = kD;
    m.s.gpr[RDI] = kD + 0x100;
    m.s.gpr[RCX] = 8;
    ASSERT_TRUE(m.run(hex("f3 48 a5")).halted());
    EXPECT_EQ(0, std::memcmp(m.ram(kD), m.ram(kD + 0x100), 64));
    EXPECT_EQ(m.s.gpr[RSI], kD + 64);
    EXPECT_EQ(m.s.gpr[RDI], kD + 0x140);
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    m.s.rflags |= rflags::DF;
    m.s.gpr[RSI] = kD + 63;
    m.s.gpr[RDI] = kD + 0x23f;
    m.s.gpr[RCX] = 64;
    ASSERT_TRUE(m.run(hex("f3 a4")).halted());
    EXPECT_EQ(0, std::memcmp(m.ram(kD), m.ram(kD + 0x200), 64));
    EXPECT_EQ(m.s.gpr[RSI], kD - 1);
    ASSERT_TRUE(m.run(hex("66 a5")).halted());  // once, backwards
    EXPECT_EQ(m.s.gpr[RSI], kD - 3);
    m.s.gpr[RCX] = 0;
    const u64 rdi = m.s.gpr[RDI];
    ASSERT_TRUE(m.run(hex("f3 a4")).halted());
    EXPECT_EQ(m.s.gpr[RDI], rdi);
  });
}

/// Overlapping copies are element by element: a pattern spreads.
TEST(String, OverlapIsExact) {
  for (const unsigned distance : {1u, 2u, 3u, 7u, 8u, 100u}) {
    for (const char* code : {"f3 a4", "f3 a5", "f3 48 a5"}) {
      const unsigned size = code[3] == '4' ? 8 : code[4] == '4' ? 1 : 4;
      both_ways(TestMode::Long64, [&](TestMachine& m) {
        fill(m, kD, 0x400);
        Bytes model(m.ram(kD), m.ram(kD) + 0x800);
        const unsigned n = 0x200 / size;
        for (unsigned k = 0; k < n; k++) {
          u8 element[8];
          std::memcpy(element, &model[k * size], size);
          std::memcpy(&model[distance + k * size], element, size);
        }
        m.s.gpr[RSI] = kD;
        m.s.gpr[RDI] = kD + distance;
        m.s.gpr[RCX] = n;
        ASSERT_TRUE(m.run(hex(code)).halted());
        EXPECT_EQ(0, std::memcmp(model.data(), m.ram(kD), 0x800)) << code << distance;
        // And downwards, where the ranges overlap the other way.
        fill(m, kD, 0x400);
        model.assign(m.ram(kD), m.ram(kD) + 0x800);
        for (unsigned k = 0; k < n; k++) {
          u8 element[8];
          std::memcpy(element, &model[distance + k * size], size);
          std::memcpy(&model[k * size], element, size);
        }
        m.s.gpr[RSI] = kD + distance;
        m.s.gpr[RDI] = kD;
        m.s.gpr[RCX] = n;
        ASSERT_TRUE(m.run(hex(code)).halted());
        EXPECT_EQ(0, std::memcmp(model.data(), m.ram(kD), 0x800));
      });
    }
  }
}

/// The same with DF set, over the end of a page, whose elements may lie in both.
TEST(String, OverlapIsExactBackwards) {
  for (const int distance : {1, 2, 7, 8, 100, 0x2f8, -1, -3, -8, -100, -0x2f8}) {
    for (const unsigned size : {1u, 2u, 4u, 8u}) {
      for (const unsigned skew : {0u, 3u}) {
        both_ways(TestMode::Long64, [&](TestMachine& m) {
          constexpr unsigned kBytes = 0x1800;
          const unsigned n = 0x600 / size, source = 0xc00 + skew, target = source + static_cast<unsigned>(distance);
          for (unsigned k = 0; k < kBytes; k++) *m.ram(kD + k) = static_cast<u8>(k * 31 ^ k >> 7);
          Bytes model(m.ram(kD), m.ram(kD) + kBytes);
          for (unsigned k = n; k-- > 0;) {
            u8 element[8];
            std::memcpy(element, &model[source + k * size], size);
            std::memcpy(&model[target + k * size], element, size);
          }
          m.s.rflags |= rflags::DF;
          m.s.gpr[RSI] = kD + source + (n - 1) * size;
          m.s.gpr[RDI] = kD + target + (n - 1) * size;
          m.s.gpr[RCX] = n;
          ASSERT_TRUE(m.run(hex(size == 1 ? "f3 a4" : size == 2 ? "66 f3 a5" : size == 4 ? "f3 a5" : "f3 48 a5")).halted());
          EXPECT_EQ(0, std::memcmp(model.data(), m.ram(kD), kBytes)) << distance << " " << size;
          EXPECT_EQ(m.s.gpr[RSI], kD + source - size);
          EXPECT_EQ(m.s.gpr[RDI], kD + target - size);
          EXPECT_EQ(m.s.gpr[RCX], 0u);
        });
      }
    }
  }
}

/// A fault in the middle: everything before it is committed, and the registers stand at the element.
TEST(String, FaultInTheMiddle) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    fill(m, kD, 0x1000);
    m.unmap(kD + 0x3000);
    m.s.gpr[RSI] = kD;
    m.s.gpr[RDI] = kD + 0x3000 - 0x14;  // five elements fit, the sixth is cut by the page
    m.s.gpr[RCX] = 100;
    m.s.gpr[RDI] -= 2;
    auto out = m.run(hex("f3 a5"));
    EXPECT_TRUE(out.raised(vec::PF, pferr::W));
    EXPECT_EQ(out.event.payload, kD + 0x3000);
    EXPECT_EQ(m.s.gpr[RCX], 95u);
    EXPECT_EQ(m.s.gpr[RSI], kD + 20);
    EXPECT_EQ(m.s.gpr[RDI], kD + 0x3000 - 2);
    EXPECT_EQ(m.s.rip, TestMachine::kCode);
    EXPECT_EQ(0, std::memcmp(m.ram(kD), m.ram(kD + 0x3000 - 0x16), 20));
    EXPECT_EQ(m.load<u16>(kD + 0x3000 - 2), 0);  // the cut element wrote nothing
    m.map(kD + 0x3000, kD + 0x3000, 7);
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    EXPECT_EQ(0, std::memcmp(m.ram(kD), m.ram(kD + 0x3000 - 0x16), 400));

    m.unmap(kD + 0x2000);
    m.s.gpr[RSI] = kD + 0x1ffe;
    m.s.gpr[RDI] = kD;
    m.s.gpr[RCX] = 5;
    out = m.run(hex("f3 a4"));
    EXPECT_TRUE(out.raised(vec::PF, 0));
    EXPECT_EQ(m.s.gpr[RCX], 3u);
    EXPECT_EQ(m.s.gpr[RDI], kD + 2);
  });
}

TEST(String, StoreAcrossPages) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.s.gpr[RAX] = 0x1122'3344'5566'7788;
    m.s.gpr[RDI] = kD + 3;
    m.s.gpr[RCX] = 0x600;
    ASSERT_TRUE(m.run(hex("f3 48 ab")).halted());
    for (unsigned k = 0; k < 0x600; k++) ASSERT_EQ(m.load<u64>(kD + 3 + 8 * k), m.s.gpr[RAX]);
    EXPECT_EQ(m.load<u8>(kD + 2), 0);
    EXPECT_EQ(m.load<u8>(kD + 3 + 8 * 0x600), 0);
    m.s.gpr[RDI] = kD;
    m.s.gpr[RCX] = 0xffff'ffff'0000'0002;
    ASSERT_TRUE(m.run(hex("f3 67 aa")).halted());  // ECX, EDI
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    EXPECT_EQ(m.s.gpr[RDI], kD + 2);
  });
}

TEST(String, CompareAndScan) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    fill(m, kD, 16);
    fill(m, kD + 0x100, 16);
    *m.ram(kD + 0x105) = 0xff;
    m.s.gpr[RSI] = kD;
    m.s.gpr[RDI] = kD + 0x100;
    m.s.gpr[RCX] = 16;
    ASSERT_TRUE(m.run(hex("f3 a6")).halted());  // repe cmpsb: stops at the sixth
    EXPECT_EQ(m.s.gpr[RCX], 10u);
    EXPECT_EQ(m.s.gpr[RSI], kD + 6);
    EXPECT_FALSE(m.s.rflags & rflags::ZF);
    EXPECT_TRUE(m.s.rflags & rflags::CF);  // 6 - 0xff
    m.s.gpr[RDI] = kD;
    m.s.gpr[RAX] = 9;
    m.s.gpr[RCX] = 100;
    ASSERT_TRUE(m.run(hex("f2 ae")).halted());  // repne scasb
    EXPECT_EQ(m.s.gpr[RDI], kD + 9);
    EXPECT_EQ(m.s.gpr[RCX], 91u);
    EXPECT_TRUE(m.s.rflags & rflags::ZF);
    m.s.gpr[RCX] = 0;
    m.s.rflags = 2 | rflags::CF;
    ASSERT_TRUE(m.run(hex("f3 a6")).halted());  // no iteration, no flags
    EXPECT_EQ(m.s.rflags & rflags::STATUS, rflags::CF);
    // Not found until the fault: flags from before.
    m.unmap(kD + 0x1000);
    m.s.gpr[RDI] = kD + 0xff0;
    m.s.gpr[RAX] = 0x55;
    m.s.gpr[RCX] = 100;
    EXPECT_TRUE(m.run(hex("f2 ae")).raised(vec::PF, 0));
    EXPECT_EQ(m.s.gpr[RCX], 84u);
    EXPECT_EQ(m.s.rflags & rflags::STATUS, rflags::CF);
    m.s.gpr[RSI] = kD + 2;
    ASSERT_TRUE(m.run(hex("66 ad")).halted());  // lodsw
    EXPECT_EQ(m.s.gpr[RAX], 0x0403u);
  });
}

TEST(String, Segments16) {
  both_ways(TestMode::Real16, [](TestMachine& m) {
    m.s.seg[ES].base = 0x70000;
    fill(m, kD + 0xfffe, 2);
    m.s.gpr[RSI] = 0xfffe;
    m.s.gpr[RDI] = 0xaa'0000;
    m.s.gpr[RCX] = 0xbb'0003;
    *m.ram(kD) = 0x42;
    ASSERT_TRUE(m.run(hex("f3 a4")).halted());  // SI wraps, upper halves stay
    EXPECT_EQ(m.load<u8>(0x70000), 1);
    EXPECT_EQ(m.load<u8>(0x70002), 0x42);
    EXPECT_EQ(m.s.gpr[RSI], 1u);
    EXPECT_EQ(m.s.gpr[RDI], 0xaa'0003u);
    EXPECT_EQ(m.s.gpr[RCX], 0xbb'0000u);
    m.s.gpr[RSI] = 0;
    ASSERT_TRUE(m.run(hex("2e ac")).halted());  // cs: lodsb reads the code
    EXPECT_EQ(m.s.gpr[RAX] & 0xff, 0x2eu);
    m.s.gpr[RDI] = 0xfff0;
    m.s.gpr[RCX] = 20;
    EXPECT_TRUE(m.run(hex("f3 ab")).halted());  // even addresses: wraps without a fault
    m.s.gpr[RDI] = 0xfff1;
    m.s.gpr[RCX] = 20;
    EXPECT_TRUE(m.run(hex("f3 ab")).raised(vec::GP, 0));  // the word at 0xffff
    EXPECT_EQ(m.s.gpr[RCX] & 0xffff, 13u);
    EXPECT_EQ(m.s.gpr[RDI] & 0xffff, 0xffffu);
  });
}

/// Attention between iterations: RIP stays at the instruction.
TEST(String, Attention) {
  TestMachine m(TestMode::Long64);
  m.c().attention().raise(1);
  m.s.gpr[RSI] = kD;
  m.s.gpr[RDI] = kD + 0x100;
  m.s.gpr[RCX] = 100;
  ASSERT_EQ(m.step(hex("f3 ac")), Exec::Branch);
  EXPECT_EQ(m.s.rip, TestMachine::kCode);
  EXPECT_EQ(m.s.gpr[RCX], 99u);
  EXPECT_EQ(m.s.gpr[RSI], kD + 1);
  m.c().attention().take();
}

TEST(String, Ports) {
  both_ways(TestMode::Long64, [](TestMachine& m) {
    m.env.port_values = {0x11, 0x22, 0x33};
    m.s.gpr[RDX] = 0x3f8;
    m.s.gpr[RDI] = kD;
    m.s.gpr[RCX] = 3;
    ASSERT_TRUE(m.run(hex("f3 6c")).halted());
    EXPECT_EQ(m.load<u32>(kD), 0x332211u);
    ASSERT_EQ(m.env.ports.size(), 3u);
    EXPECT_EQ(m.env.ports[0].port, 0x3f8);
    m.s.gpr[RSI] = kD;
    m.s.gpr[RCX] = 2;
    ASSERT_TRUE(m.run(hex("f3 6e")).halted());
    EXPECT_TRUE(m.env.ports[4].out);
    EXPECT_EQ(m.env.ports[4].value, 0x22u);
    // The VMM answers later: nothing is done twice.
    m.env.ports.clear();
    m.env.exits_to_give = 1;
    m.s.gpr[RSI] = kD;
    m.s.gpr[RCX] = 3;
    auto out = m.run(hex("f3 6e"));
    EXPECT_EQ(out.result, Interpreter::Result::Exit);
    EXPECT_EQ(m.s.gpr[RCX], 3u);
    EXPECT_EQ(m.s.rip, TestMachine::kCode);
    ASSERT_TRUE(m.resume().halted());
    EXPECT_EQ(m.env.ports.size(), 3u);
    EXPECT_EQ(m.env.retirements, 1u);
    // The destination is checked before the port is read.
    m.env.ports.clear();
    m.unmap(kD);
    m.s.gpr[RDI] = kD;
    EXPECT_TRUE(m.run(hex("6d")).raised(vec::PF, pferr::W));
    EXPECT_TRUE(m.env.ports.empty());
  });
}

}  // namespace
}  // namespace ring3::engine::test
