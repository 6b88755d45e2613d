#include <gtest/gtest.h>

#include <cstring>

#include "engine/translate/test_either.hpp"

/// Gathers and masked moves run translated, and do what the interpreter does.
namespace ring3::engine {
namespace {

using test::hex;
using test::Outcome;
using test::TestMachine;
using test::TestMode;

constexpr u64 kData = TestMachine::kData;

struct Machine : test::EitherMachine {
  Machine(bool translated, TestMode mode) : EitherMachine(translated, mode, true) {
    s.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
    s.xcr0 = 7;
    s.xsave.mxcsr() = 0x1f80;
    s.gpr[RBX] = data_offset();
    run(hex("88 03 88 83 00 10 00 00"));  // the first stores to pages
    for (u64 n = 0; n < 1024; n++) store<u64>(kData + 8 * n, 0x0123'4567'89ab'cdefu * (n + 1));
  }
  void vector(unsigned n, const u8* bytes) {
    std::memcpy(s.xsave.xmm(n), bytes, 16);
    std::memcpy(s.xsave.ymm_high(n), bytes + 16, 16);
  }
};

/// The same in the interpreter and translated: indices in vector 1 (or 14), the mask in 2 (or 13).
struct Both {
  explicit Both(TestMode mode = TestMode::Long64) : a(false, mode), b(true, mode) {}
  void prepare(u8 index_size, u32 selected, i64 last_index = 40) {
    for (Machine* m : {&a, &b}) {
      u8 indices[32] = {}, mask[32], data[32];
      for (unsigned n = 0; n < 32u / index_size; n++) {
        const i64 index = n == 32u / index_size - 1 ? last_index : static_cast<i64>(13 * n % 29) - 3;
        std::memcpy(indices + n * index_size, &index, index_size);
      }
      for (unsigned n = 0; n < 32; n++) mask[n] = selected >> (n / 4) & 1 ? 0xa5 : 0x5a;
      for (unsigned n = 0; n < 32; n++) data[n] = static_cast<u8>(n + 1);
      for (unsigned n : {1u, 14u}) m->vector(n, indices);
      for (unsigned n : {2u, 13u}) m->vector(n, mask);
      for (unsigned n : {0u, 9u, 15u}) m->vector(n, data);
      for (unsigned n : {RBX, R9, R10, R13}) m->s.gpr[n] = m->data_offset() + 0x100;
      m->s.rflags |= rflags::CF | rflags::OF;
    }
  }
  /// Ends at the HLT behind the code, having left that and `left` more to the interpreter.
  void run(const char* code, unsigned left = 0) {
    test::run_both(a, b, code, left);
    same(code);
  }
  void same(const char* code) {
    EXPECT_EQ(a.s.rip, b.s.rip) << code;
    for (unsigned n = 0; n < 16; n++) {
      EXPECT_EQ(a.s.gpr[n], b.s.gpr[n]) << code << ": register " << n;
      EXPECT_EQ(std::memcmp(a.s.xsave.xmm(n), b.s.xsave.xmm(n), 16), 0) << code << ": vector " << n;
      EXPECT_EQ(std::memcmp(a.s.xsave.ymm_high(n), b.s.xsave.ymm_high(n), 16), 0) << code << ": upper half of vector " << n;
    }
    EXPECT_EQ(a.s.rflags, b.s.rflags) << code;
    EXPECT_EQ(std::memcmp(a.ram(kData), b.ram(kData), 2 * kPageSize), 0) << code;
  }
  Machine a, b;
};

struct Form {
  const char* code;
  u8 index_size;
};

TEST(VectorMemory, GathersOfEachForm) {
  const Form forms[] = {
      {"c4 e2 6d 90 04 8b", 4},           // vpgatherdd ymm0, [rbx+ymm1*4], ymm2
      {"c4 e2 ed 90 04 cb", 4},           // vpgatherdq ymm0, [rbx+xmm1*8], ymm2
      {"c4 e2 6d 93 44 0b 10", 8},        // vgatherqps xmm0, [rbx+ymm1*1+16], xmm2
      {"c4 e2 69 93 04 8b", 8},           // vgatherqps xmm0, [rbx+xmm1*4], xmm2
      {"c4 c2 e9 92 04 49", 4},           // vgatherdpd xmm0, [r9+xmm1*2], xmm2
      {"c4 02 95 91 7c f5 f8", 8},        // vpgatherqq ymm15, [r13+ymm14*8-8], ymm13
      {"c4 e2 69 90 04 0d 00 02 05 00", 4},  // vpgatherdd xmm0, [xmm1*1+50200h], xmm2
  };
  for (const Form& f : forms) {
    Both m;
    for (u32 selected : {0xffu, 0u, 0x33u, 0xccu, 0x5au}) {
      m.prepare(f.index_size, selected);
      m.run(f.code);
    }
  }
}

TEST(VectorMemory, FlagsLiveOverAGather) {
  Both m;
  m.prepare(4, 0xff);
  m.run("39 d8 c4 e2 6d 90 04 8b 0f 92 c1 0f 90 c2");  // cmp eax, ebx; vpgatherdd; setb cl; seto dl
}

/// What the check does not let pass is the interpreter's, which begins anew.
TEST(VectorMemory, GathersAcrossAPageEnd) {
  Both m;
  m.prepare(4, 0xff, (0x1000 - 0x100 - 2));
  m.run("c4 e2 6d 90 04 0b", 1);  // vpgatherdd ymm0, [rbx+ymm1], ymm2
  m.prepare(4, 0x7f, (0x1000 - 0x100 - 2));
  m.run("c4 e2 6d 90 04 0b");  // the last one is spared
}

TEST(VectorMemory, GathersThatFaultKeepWhatTheyHave) {
  Both m;
  m.prepare(8, 0xff, 1ll << 47);
  const char* const code = "c4 e2 ed 91 04 0b";  // vpgatherqq ymm0, [rbx+ymm1], ymm2
  const Outcome x = m.a.run(hex(code)), y = m.b.run(hex(code));
  EXPECT_TRUE(x.has_event && x.event.vector == vec::GP);
  EXPECT_TRUE(y.has_event && y.event.vector == vec::GP);
  m.same(code);
}

TEST(VectorMemory, MaskedMoves) {
  const char* const forms[] = {
      "c4 e2 6d 8c 03",     // vpmaskmovd ymm0, ymm2, [rbx]
      "c4 e2 ed 8e 4b 20",  // vpmaskmovq [rbx+32], ymm2, ymm1
      "c4 62 69 2c 4b 04",  // vmaskmovps xmm9, xmm2, [rbx+4]
      "c4 e2 69 2f 4b 08",  // vmaskmovpd [rbx+8], xmm2, xmm1
      "c4 e2 ed 8c 03",     // vpmaskmovq ymm0, ymm2, [rbx]
  };
  for (TestMode mode : {TestMode::Long64, TestMode::Prot32}) {
    for (const char* code : forms) {
      if (mode == TestMode::Prot32 && std::strncmp(code, "c4 62", 5) == 0) continue;
      Both m(mode);
      for (u32 selected : {0xffu, 0u, 0x33u, 0xccu, 0x5au}) {
        m.prepare(4, selected);
        m.run(code);
      }
    }
  }
}

TEST(VectorMemory, MaskedMovesAtAPageEnd) {
  Both m;
  for (const char* code : {"c4 e2 6d 8c 83 f0 0e 00 00", "c4 e2 6d 8e 8b f0 0e 00 00"}) {  // vpmaskmovd, 16 bytes before the page's end
    for (u32 selected : {0xffu, 0x0fu, 0u}) {
      m.prepare(4, selected);
      m.b.run(hex("90"));
      m.a.run(hex("90"));
      const Outcome x = m.a.run(hex(code)), y = m.b.run(hex(code));
      EXPECT_TRUE(m.a.ended_at_hlt(x) && m.b.ended_at_hlt(y));
      m.same(code);
    }
  }
}

}  // namespace
}  // namespace ring3::engine
