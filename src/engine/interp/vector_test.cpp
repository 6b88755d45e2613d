#include "engine/interp/vector.hpp"

#include <gtest/gtest.h>
#include <signal.h>

#include <cmath>
#include <cstring>

#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"

namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

constexpr u64 kData = TestMachine::kData;

class VectorTest : public ::testing::Test {
 protected:
  TestMachine m{TestMode::Long64};
  VcpuState& s = m.s;

  void SetUp() override {
    m.s.xsave.fcw() = 0x37f;
    m.s.xsave.ftw_abridged() = 0;
    s.gpr[RBX] = kData;
  }
  Exec step(const char* code) { return m.step(hex(code)); }
  bool ok(const char* code) { return step(code) == Exec::Next; }
  /// The vector of the fault that code raises; -1 when it raises none.
  int fault(const char* code) {
    if (step(code) != Exec::Stop || m.c().stop().kind != Stop::Kind::Fault) return -1;
    return m.c().stop().vector;
  }
  template <class T>
  void xmm(unsigned n, std::initializer_list<T> v) {
    std::memset(s.xsave.xmm(n), 0, 16);
    std::memcpy(s.xsave.xmm(n), v.begin(), v.size() * sizeof(T));
  }
  template <class T>
  T lane(unsigned n, unsigned i) {
    T v;
    const u8* p = i * sizeof(T) < 16 ? s.xsave.xmm(n) + i * sizeof(T) : s.xsave.ymm_high(n) + i * sizeof(T) - 16;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  void fill(unsigned n, u8 v) {
    std::memset(s.xsave.xmm(n), v, 16);
    std::memset(s.xsave.ymm_high(n), v, 16);
  }
  double st(unsigned i) {
    long double v = 0;
    std::memcpy(&v, s.xsave.bytes + 32 + 16 * i, 10);
    return static_cast<double>(v);
  }
  template <class T>
  T area(unsigned at) {
    T v;
    std::memcpy(&v, s.xsave.bytes + at, sizeof v);
    return v;
  }
};

TEST_F(VectorTest, SseArithmeticAndMoves) {
  xmm<double>(1, {1.5, 7});
  xmm<double>(2, {2.25, 9});
  fill(1, 0), xmm<double>(1, {1.5, 7});
  ASSERT_TRUE(ok("f2 0f 58 ca"));  // addsd xmm1, xmm2
  EXPECT_EQ(lane<double>(1, 0), 3.75);
  EXPECT_EQ(lane<double>(1, 1), 7);
  m.store<double>(kData + 8, 0.25);
  ASSERT_TRUE(ok("f2 44 0f 10 4b 08"));  // movsd xmm9, [rbx+8]
  EXPECT_EQ(lane<double>(9, 0), 0.25);
  EXPECT_EQ(lane<double>(9, 1), 0);
  ASSERT_TRUE(ok("0f 29 4b 10"));  // movaps [rbx+16], xmm1
  EXPECT_EQ(m.load<double>(kData + 16), 3.75);
  EXPECT_EQ(m.load<double>(kData + 24), 7);
}

TEST_F(VectorTest, LegacyKeepsAndVexClearsUpperHalf) {
  if (!host_features()[Feature::Avx]) GTEST_SKIP() << "the host has no AVX";
  fill(1, 0x11), fill(2, 0x22), fill(3, 0x33);
  ASSERT_TRUE(ok("66 0f ef ca"));  // pxor xmm1, xmm2
  EXPECT_EQ(lane<u64>(1, 0), 0x3333333333333333u);
  EXPECT_EQ(lane<u64>(1, 2), 0x1111111111111111u);
  ASSERT_TRUE(ok("c5 e9 ef cb"));  // vpxor xmm1, xmm2, xmm3
  EXPECT_EQ(lane<u64>(1, 0), 0x1111111111111111u);
  EXPECT_EQ(lane<u64>(1, 2), 0u);
  EXPECT_EQ(lane<u64>(1, 3), 0u);
  ASSERT_TRUE(ok("c5 6d ef d3"));  // vpxor ymm10, ymm2, ymm3
  for (unsigned i = 0; i < 4; ++i) EXPECT_EQ(lane<u64>(10, i), 0x1111111111111111u);
  ASSERT_TRUE(ok("c5 7d 7f 53 20"));  // vmovdqa [rbx+32], ymm10
  EXPECT_EQ(m.load<u64>(kData + 56), 0x1111111111111111u);
}

TEST_F(VectorTest, GeneralRegisters) {
  s.gpr[R12] = static_cast<u64>(-3);
  ASSERT_TRUE(ok("f2 49 0f 2a cc"));  // cvtsi2sd xmm1, r12
  EXPECT_EQ(lane<double>(1, 0), -3);
  s.gpr[R13] = ~0ull;
  ASSERT_TRUE(ok("f2 44 0f 2c e9"));  // cvttsd2si r13d, xmm1
  EXPECT_EQ(s.gpr[R13], 0xfffffffdu);
  fill(2, 0x80);
  ASSERT_TRUE(ok("66 0f d7 e2"));  // pmovmskb esp, xmm2
  EXPECT_EQ(s.gpr[RSP], 0xffffu);
  ASSERT_TRUE(ok("66 0f 3a 16 d6 02"));  // pextrd esi, xmm2, 2
  EXPECT_EQ(s.gpr[RSI], 0x80808080u);
}

TEST_F(VectorTest, Flags) {
  s.rflags |= rflags::STATUS | rflags::DF;
  xmm<double>(1, {1});
  xmm<double>(2, {2});
  ASSERT_TRUE(ok("66 0f 2f ca"));  // comisd xmm1, xmm2
  EXPECT_EQ(s.rflags & rflags::STATUS, rflags::CF);
  EXPECT_TRUE(s.rflags & rflags::DF);
  // pcmpistri xmm1, xmm2, 0 (equal any): "needle" in "b.."
  std::memcpy(s.xsave.xmm(1), "xyz\0............", 16);
  std::memcpy(s.xsave.xmm(2), "abcy\0...........", 16);
  ASSERT_TRUE(ok("66 0f 3a 63 ca 00"));
  EXPECT_EQ(s.gpr[RCX], 3u);
  EXPECT_EQ(s.rflags & rflags::STATUS, rflags::CF | rflags::ZF | rflags::SF);
  ASSERT_TRUE(ok("66 0f 3a 62 ca 40"));  // pcmpistrm: byte mask in xmm0
  EXPECT_EQ(lane<u64>(0, 0), 0xff000000u);
  s.gpr[RAX] = 3, s.gpr[RDX] = 4;
  ASSERT_TRUE(ok("66 0f 3a 61 ca 00"));  // pcmpestri
  EXPECT_EQ(s.gpr[RCX], 3u);
}

TEST_F(VectorTest, ImplicitXmm0) {
  fill(0, 0), fill(1, 0x11), fill(2, 0x22);
  s.xsave.xmm(0)[3] = 0x80;
  ASSERT_TRUE(ok("66 0f 38 10 ca"));  // pblendvb xmm1, xmm2
  EXPECT_EQ(lane<u32>(1, 0), 0x22111111u);
}

TEST_F(VectorTest, AlignmentAndPageCrossing) {
  fill(1, 0x55);
  EXPECT_EQ(fault("0f 28 4b 08"), vec::GP);  // movaps xmm1, [rbx+8]
  EXPECT_EQ(lane<u64>(1, 0), 0x5555555555555555u);
  m.store<u64>(kData + 0xff8, 1);
  m.store<u64>(kData + 0x1000, 2);
  s.gpr[RBX] = kData + 0xff8;
  ASSERT_TRUE(ok("0f 10 0b"));  // movups xmm1, [rbx]
  EXPECT_EQ(lane<u64>(1, 1), 2u);
  m.unmap(kData + 0x1000);
  fill(2, 0x77);
  EXPECT_EQ(fault("f3 0f 6f 13"), vec::PF);
  EXPECT_EQ(m.c().stop().payload, kData + 0x1000);
  EXPECT_EQ(lane<u64>(2, 0), 0x7777777777777777u);
  EXPECT_EQ(fault("f3 0f 7f 13"), vec::PF);
  EXPECT_EQ(m.load<u64>(kData + 0xff8), 1u);
}

TEST_F(VectorTest, AvailabilityFaults) {
  s.cr0 |= cr0::TS;
  EXPECT_EQ(fault("0f 58 ca"), vec::NM);
  EXPECT_EQ(fault("c5 e8 58 cb"), vec::NM);
  EXPECT_EQ(fault("d9 e8"), vec::NM);
  EXPECT_EQ(fault("0f fc ca"), vec::NM);
  EXPECT_EQ(fault("0f 77"), vec::NM);
  EXPECT_TRUE(ok("9b"));
  s.cr0 |= cr0::MP;
  EXPECT_EQ(fault("9b"), vec::NM);
  s.cr0 = (s.cr0 & ~cr0::TS) | cr0::EM;
  EXPECT_EQ(fault("0f 58 ca"), vec::UD);
  EXPECT_EQ(fault("0f fc ca"), vec::UD);
  EXPECT_EQ(fault("d9 e8"), vec::NM);
  s.cr0 &= ~cr0::EM;
  s.cr4 &= ~cr4::OSFXSR;
  EXPECT_EQ(fault("0f 58 ca"), vec::UD);
  EXPECT_EQ(fault("0f 2a ca"), vec::UD);  // cvtpi2ps
  EXPECT_EQ(fault("0f 2c 0b"), vec::UD);  // cvttps2pi mm1, [rbx]
  EXPECT_TRUE(ok("0f fc ca"));
  s.cr4 |= cr4::OSFXSR;
  s.xcr0 = 3;
  EXPECT_EQ(fault("c5 e8 58 cb"), vec::UD);
  EXPECT_EQ(fault("c5 f8 77"), vec::UD);
  s.xcr0 = 7;
  s.cr4 &= ~cr4::OSXSAVE;
  EXPECT_EQ(fault("c5 e8 58 cb"), vec::UD);
}

TEST_F(VectorTest, UnmaskedSimdException) {
  s.xsave.mxcsr() = 0x1f80 & ~0x200u;  // ZM clear
  xmm<double>(1, {1, 5});
  xmm<double>(2, {0, 0});
  EXPECT_EQ(fault("f2 0f 5e ca"), vec::XM);  // divsd
  EXPECT_EQ(s.xsave.mxcsr(), (0x1f80u & ~0x200u) | 4);
  EXPECT_EQ(lane<double>(1, 0), 1);
  s.xsave.mxcsr() &= ~4u;
  m.store<double>(kData, 0);
  EXPECT_EQ(fault("f2 0f 5e 0b"), vec::XM);  // divsd xmm1, [rbx]
  EXPECT_EQ(lane<double>(1, 0), 1);
  if (host_features()[Feature::Avx]) {
    EXPECT_EQ(fault("c5 f3 5e ca"), vec::XM);
  }
  s.cr4 &= ~cr4::OSXMMEXCPT;
  EXPECT_EQ(fault("f2 0f 5e ca"), vec::UD);
  // The host's own environment is as it was.
  volatile double zero = 0, one = 1;
  EXPECT_TRUE(std::isinf(one / zero));
}

TEST_F(VectorTest, ConvertingStoreMeetsItsExceptionsInTheVendorsOrder) {
  if (!host_features()[Feature::F16c]) GTEST_SKIP() << "the host has no F16C";
  const char* const store = "c4 e3 79 1d 0b 00";  // vcvtps2ph [rbx], xmm1, 0
  xmm<u32>(1, {0x7f800001});                      // a signalling NaN: #I
  s.gpr[RBX] = kData + 0x1000;
  m.unmap(kData + 0x1000);
  for (const bool amd : {false, true}) {
    m.c().features.amd = amd;
    s.xsave.mxcsr() = 0x1f80;
    EXPECT_EQ(fault(store), vec::PF);
    EXPECT_EQ(s.xsave.mxcsr(), amd ? 0x1f80u : 0x1f81u);
    s.xsave.mxcsr() = 0x1f00;
    EXPECT_EQ(fault(store), amd ? vec::PF : vec::XM);
    // The same with an address that is none.
    s.gpr[RBX] = u64{1} << 62;
    s.xsave.mxcsr() = 0x1f80;
    EXPECT_EQ(fault(store), vec::GP);
    EXPECT_EQ(s.xsave.mxcsr(), amd ? 0x1f80u : 0x1f81u);
    s.gpr[RBX] = kData + 0x1000;
  }
}

TEST_F(VectorTest, MaskedExceptionsSetFlags) {
  xmm<double>(1, {1});
  xmm<double>(2, {3});
  ASSERT_TRUE(ok("f2 0f 5e ca"));
  EXPECT_EQ(s.xsave.mxcsr(), 0x1fa0u);  // PE
  s.xsave.mxcsr() = 0x1f80 | 0x6000;    // round to zero
  xmm<double>(1, {-1.9});
  ASSERT_TRUE(ok("f2 48 0f 2d c1"));  // cvtsd2si rax, xmm1
  EXPECT_EQ(s.gpr[RAX], static_cast<u64>(-1));
}

TEST_F(VectorTest, OtherSignalsGoToTheOldHandler) {
  static volatile sig_atomic_t seen;
  seen = 0;
  ASSERT_TRUE(ok("0f 58 ca"));  // the unit, and with it our handler, is there
  struct sigaction ours, theirs, now;
  ASSERT_EQ(sigaction(SIGFPE, nullptr, &ours), 0);
  std::memset(&theirs, 0, sizeof theirs);
  theirs.sa_handler = [](int) { seen = 1; };
  ASSERT_EQ(sigaction(SIGFPE, &theirs, nullptr), 0);
  // The embedding program has replaced our handler: unmasked exceptions take it back and chain.
  s.xsave.mxcsr() = 0;
  xmm<float>(1, {1});
  xmm<float>(2, {0});
  EXPECT_EQ(fault("f3 0f 5e ca"), vec::XM);
  EXPECT_EQ(seen, 0);
  raise(SIGFPE);
  EXPECT_EQ(seen, 1);
  ASSERT_EQ(sigaction(SIGFPE, nullptr, &now), 0);
  EXPECT_EQ(now.sa_sigaction, ours.sa_sigaction);
}

TEST_F(VectorTest, X87ArithmeticAndPointers) {
  ASSERT_TRUE(ok("d9 e8"));  // fld1
  EXPECT_EQ(st(0), 1);
  EXPECT_EQ(area<u16>(6), 0);  // no exception
  EXPECT_EQ(area<u64>(8), TestMachine::kCode);
  m.store<double>(kData + 8, 2.5);
  ASSERT_TRUE(ok("dc 43 08"));  // fadd qword [rbx+8]
  EXPECT_EQ(st(0), 3.5);
  EXPECT_EQ(area<u64>(16), 0u);
  m.store<u16>(kData, 0x35f);  // PM clear
  ASSERT_TRUE(ok("d9 2b"));  // fldcw [rbx]
  m.store<double>(kData + 8, 1e-300);
  ASSERT_TRUE(ok("dc 43 08"));
  EXPECT_EQ(area<u16>(6), 0x443);
  EXPECT_EQ(area<u64>(16), kData + 8);
  m.store<u16>(kData, 0x37f);
  EXPECT_EQ(fault("d9 2b"), vec::MF);
  ASSERT_TRUE(ok("db e2"));  // fnclex
  ASSERT_TRUE(ok("d9 2b"));  // a control instruction leaves the pointers
  EXPECT_EQ(area<u64>(16), kData + 8);
  ASSERT_TRUE(ok("dd 5b 10"));  // fstp qword [rbx+16]
  EXPECT_EQ(m.load<double>(kData + 16), 3.5);
  EXPECT_EQ(s.xsave.ftw_abridged(), 0);
  ASSERT_TRUE(ok("df e0"));  // fnstsw ax
  EXPECT_EQ(s.gpr[RAX] & 0xffff, s.xsave.fsw());
  ASSERT_TRUE(ok("db e3"));  // fninit
  EXPECT_EQ(area<u64>(8), 0u);
  EXPECT_EQ(area<u64>(16), 0u);
}

TEST_F(VectorTest, X87UnmaskedExceptionIsPendingUntilTheNextWaitingInstruction) {
  m.store<u16>(kData, 0x37b);  // ZM clear
  ASSERT_TRUE(ok("d9 2b"));
  ASSERT_TRUE(ok("d9 e8"));
  ASSERT_TRUE(ok("d9 ee"));   // fldz
  ASSERT_TRUE(ok("d8 f9"));   // fdivr st0, st1: 1/0; recorded, not delivered
  EXPECT_EQ(s.xsave.fsw() & 0x8084, 0x8084);
  EXPECT_EQ(area<u16>(6), 0x0f9);
  EXPECT_EQ(fault("d9 e8"), vec::MF);
  EXPECT_EQ(fault("9b"), vec::MF);
  EXPECT_EQ(fault("0f fc ca"), vec::MF);
  EXPECT_EQ(area<u16>(6), 0x0f9);
  EXPECT_TRUE(ok("d9 7b 04"));  // fnstcw does not wait
  EXPECT_TRUE(ok("df e0"));
  EXPECT_TRUE(ok("db e2"));     // fnclex
  EXPECT_TRUE(ok("9b"));
  EXPECT_TRUE(ok("d9 e8"));
}

TEST_F(VectorTest, X87SuppressedStore) {
  m.store<u16>(kData, 0x37e);  // IM clear
  ASSERT_TRUE(ok("d9 2b"));
  m.store<double>(kData + 8, 1e10);
  ASSERT_TRUE(ok("dd 43 08"));
  m.store<u16>(kData + 16, 0xabcd);
  ASSERT_TRUE(ok("df 5b 10"));  // fistp word: does not fit
  EXPECT_EQ(m.load<u16>(kData + 16), 0xabcd);
  EXPECT_EQ(s.xsave.fsw() & 0x81, 0x81);
  EXPECT_EQ(st(0), 1e10);  // not popped
}

TEST_F(VectorTest, X87StoreFaultChangesNothing) {
  ASSERT_TRUE(ok("d9 e8"));
  m.unmap(kData);
  const XsaveArea before = s.xsave;
  EXPECT_EQ(fault("dd 1b"), vec::PF);  // fstp qword [rbx]
  EXPECT_EQ(fault("dd 33"), vec::PF);  // fnsave
  EXPECT_EQ(std::memcmp(before.bytes, s.xsave.bytes, 512), 0);
}

TEST_F(VectorTest, X87FlagsInAndOut) {
  ASSERT_TRUE(ok("d9 e8"));
  ASSERT_TRUE(ok("d9 ee"));
  s.rflags |= rflags::CF;
  ASSERT_TRUE(ok("da c1"));  // fcmovb st0, st1: CF set
  EXPECT_EQ(st(0), 1);
  s.rflags &= ~rflags::STATUS;
  ASSERT_TRUE(ok("db f1"));  // fcomi: equal
  EXPECT_EQ(s.rflags & rflags::STATUS, rflags::ZF);
}

TEST_F(VectorTest, EnvironmentFormats) {
  ASSERT_TRUE(ok("d9 e8"));
  ASSERT_TRUE(ok("dc 43 08"));
  const u16 opcode = 0x443;
  const u64 operand = kData + 8;
  std::memcpy(s.xsave.bytes + 6, &opcode, 2);
  std::memcpy(s.xsave.bytes + 16, &operand, 8);
  ASSERT_TRUE(ok("d9 73 40"));  // fnstenv [rbx+64]
  EXPECT_EQ(m.load<u32>(kData + 64), 0xffff037fu);
  EXPECT_EQ(m.load<u32>(kData + 64 + 12), TestMachine::kCode);
  EXPECT_EQ(m.load<u32>(kData + 64 + 16), 0x4430000u);
  EXPECT_EQ(m.load<u32>(kData + 64 + 20), kData + 8);
  ASSERT_TRUE(ok("66 d9 73 40"));  // 14 bytes
  EXPECT_EQ(m.load<u16>(kData + 64), 0x37f);
  EXPECT_EQ(m.load<u16>(kData + 64 + 6), TestMachine::kCode & 0xffff);
  EXPECT_EQ(m.load<u16>(kData + 64 + 10), (kData + 8) & 0xffff);
  const XsaveArea before = s.xsave;
  ASSERT_TRUE(ok("dd 73 40"));  // fnsave
  EXPECT_EQ(s.xsave.fcw(), 0x37f);
  EXPECT_EQ(s.xsave.ftw_abridged(), 0);
  EXPECT_EQ(area<u64>(8), 0u);
  ASSERT_TRUE(ok("dd 63 40"));  // frstor
  EXPECT_EQ(std::memcmp(before.bytes, s.xsave.bytes, 160), 0);
}

TEST(VectorModes, EnvironmentInRealMode) {
  TestMachine m(TestMode::Real16);
  m.s.xsave.fcw() = 0x37d;  // DM clear
  m.s.xsave.ftw_abridged() = 0;
  m.store<u32>(kData + 0x234, 1);
  ASSERT_EQ(m.step(hex("d9 06 34 02")), Exec::Next);  // fld dword [234h]: denormal
  ASSERT_EQ(m.step(hex("d9 36 00 01")), Exec::Next);  // fnstenv [100h]
  EXPECT_EQ(m.load<u16>(kData + 0x106), 0x0000);       // CS 4000h: linear 40000h
  EXPECT_EQ(m.load<u16>(kData + 0x108), 0x4106);       // 19:16 and the opcode
  EXPECT_EQ(m.load<u16>(kData + 0x10a), 0x0234);
  EXPECT_EQ(m.load<u16>(kData + 0x10c), 0x5000);
  ASSERT_EQ(m.step(hex("66 d9 36 00 01")), Exec::Next);  // 32-bit format
  EXPECT_EQ(m.load<u32>(kData + 0x10c), 0u);
  EXPECT_EQ(m.load<u32>(kData + 0x110), 0x4106u);
  EXPECT_EQ(m.load<u32>(kData + 0x118), 0x5000u);
}

TEST(VectorModes, ThirtyTwoBitEncodings) {
  TestMachine m(TestMode::Prot32);
  m.s.gpr[RBX] = kData;
  m.store<u32>(kData + 4, 0x01020304);
  ASSERT_EQ(m.step(hex("66 0f 6e 4b 04")), Exec::Next);  // movd xmm1, [ebx+4]
  EXPECT_EQ(m.s.xsave.xmm(1)[0], 4);
  if (!host_features()[Feature::Avx]) return;
  std::memset(m.s.xsave.xmm(2), 0x22, 16);
  std::memset(m.s.xsave.xmm(3), 0x33, 16);
  ASSERT_EQ(m.step(hex("c4 e1 e9 ef cb")), Exec::Next);  // vpxor xmm1, xmm2, xmm3
  EXPECT_EQ(m.s.xsave.xmm(1)[0], 0x11);
  std::memset(m.s.xsave.xmm(4), 0x80, 16);
  ASSERT_EQ(m.step(hex("c4 e3 69 4c cb c0")), Exec::Next);  // vpblendvb xmm1, xmm2, xmm3, xmm4: imm bit 7 ignored
  EXPECT_EQ(m.s.xsave.xmm(1)[0], 0x33);
}

TEST_F(VectorTest, Mmx) {
  ASSERT_TRUE(ok("d9 e8"));  // TOP = 7: ST0 is R7
  m.store<u64>(kData, 0x0101010101010101);
  ASSERT_TRUE(ok("0f 6f 13"));     // movq mm2, [rbx]
  ASSERT_TRUE(ok("0f fc d2"));     // paddb mm2, mm2
  ASSERT_TRUE(ok("0f 7f 53 08"));  // movq [rbx+8], mm2
  EXPECT_EQ(m.load<u64>(kData + 8), 0x0202020202020202u);
  EXPECT_EQ(s.xsave.ftw_abridged(), 0xff);
  EXPECT_EQ(s.xsave.fsw() & 0x3800, 0);
  EXPECT_EQ(area<u16>(32 + 16 * 2 + 8), 0xffff);
  EXPECT_EQ(area<u64>(32 + 16 * 7), 0x8000000000000000u);  // the 1.0 is MM7 now
  s.gpr[RDI] = kData + 32;
  m.store<u64>(kData + 32, 0);
  m.store<u64>(kData, 0x80000000000000ff);
  ASSERT_TRUE(ok("0f 6f 1b"));
  ASSERT_TRUE(ok("0f f7 d3"));  // maskmovq mm2, mm3
  EXPECT_EQ(m.load<u64>(kData + 32), 0x0200000000000002u);
  ASSERT_TRUE(ok("0f 77"));
  EXPECT_EQ(s.xsave.ftw_abridged(), 0);
}

TEST_F(VectorTest, MaskmovChecksBytesThatAreNotSelected) {
  fill(1, 0x11);
  const u64 page = kData + 0x1000;
  m.unmap(page);
  const struct {
    const char* code;
    u64 rdi, amd, intel;  // where the fault is
  } cases[] = {{"0f f7 ca", page - 7, page, page},         // maskmovq mm1, mm2
               {"0f f7 ca", page + 3, page + 3, page + 3},
               {"66 0f f7 ca", page - 8, page, page},      // maskmovdqu xmm1, xmm2
               {"66 0f f7 ca", page - 3, page, page + 5},
               {"66 0f f7 ca", page, page, page + 8},
               {"66 0f f7 ca", page + 0xff8, page + 0xff8, page + 0xff8}};
  for (const auto& k : cases) {
    SCOPED_TRACE(k.code);
    for (const bool amd : {false, true}) {
      m.c().features.amd = amd;
      for (const u8 select : {0, 0xff}) {
        fill(2, 0);
        s.xsave.xmm(2)[0] = select;
        std::memset(s.xsave.bytes + 32 + 16 * 2, 0, 8);
        s.xsave.bytes[32 + 16 * 2] = select;
        m.store<u64>(page - 8, 0);
        s.gpr[RDI] = k.rdi;
        EXPECT_EQ(fault(k.code), vec::PF);
        EXPECT_EQ(m.c().stop().payload, amd ? k.amd : k.intel);
        EXPECT_EQ(m.load<u64>(page - 8), 0u);
      }
    }
  }
  s.gpr[RDI] = page - 16;
  std::memset(s.xsave.xmm(2), 0xff, 8);
  m.store<u64>(page - 8, 0);
  ASSERT_TRUE(ok("66 0f f7 ca"));
  EXPECT_EQ(m.load<u64>(page - 16), 0x1111111111111111u);
  EXPECT_EQ(m.load<u64>(page - 8), 0u);
}

TEST(VectorAlignment, SomeOperandsAreSparedByIntelsChecks) {
  if (!host_features()[Feature::F16c]) GTEST_SKIP() << "the host has no F16C";
  for (const bool amd : {false, true}) {
    TestMachine m(TestMode::Long64, true);
    m.c().features.amd = amd;
    m.mmu().set_features(40, true, true, true, amd);
    m.s.cr0 |= cr0::AM;
    m.s.rflags |= rflags::AC;
    m.s.gpr[RBX] = kData + 1;
    m.s.gpr[RDI] = kData + 1;
    const auto spared = [&](const char* code) {
      std::memset(m.s.xsave.xmm(2), 0xff, 16);  // the mask
      std::memset(m.s.xsave.xmm(3), 0, 16);     // the index
      if (m.step(hex(code)) == Exec::Next) return true;
      EXPECT_EQ(m.c().stop().vector, vec::AC) << code;
      return false;
    };
    m.store<u32>(kData + 1, 0x12345678);
    EXPECT_EQ(spared("c4 e2 69 2c 0b"), !amd);     // vmaskmovps xmm1, xmm2, [rbx]
    if (!amd) {
      u32 lane;
      std::memcpy(&lane, m.s.xsave.xmm(1), 4);
      EXPECT_EQ(lane, 0x12345678u);
    }
    EXPECT_EQ(spared("c4 e2 69 2e 0b"), !amd);     // and the store
    EXPECT_EQ(spared("c4 e2 69 92 0c 9b"), !amd);  // vgatherdps xmm1, [rbx+4*xmm3], xmm2
    EXPECT_EQ(spared("c4 e2 79 13 0b"), !amd);     // vcvtph2ps xmm1, [rbx]
    EXPECT_EQ(spared("c4 e3 79 1d 0b 00"), !amd);  // vcvtps2ph [rbx], xmm1, 0
    EXPECT_FALSE(spared("f3 0f 7e 0b"));           // movq xmm1, [rbx]
    EXPECT_FALSE(spared("66 0f f7 ca"));           // maskmovdqu xmm1, xmm2
    if (amd) continue;
    // Across the end of what can be written: CR2 is the first byte behind it.
    m.unmap(kData + 0x1000);
    m.s.gpr[RBX] = kData + 0xffb;
    EXPECT_EQ(m.step(hex("c4 e3 79 1d 0b 00")), Exec::Stop);
    EXPECT_EQ(m.c().stop().vector, vec::PF);
    EXPECT_EQ(m.c().stop().payload, kData + 0x1000);
  }
}

TEST_F(VectorTest, X87StoreThatDoesNotHappenFaultsOnAmdOnly) {
  m.unmap(kData + 0x1000);
  s.gpr[RBX] = kData + 0x1000;
  for (const bool amd : {false, true}) {
    m.c().features.amd = amd;
    s.xsave.fcw() = 0x37e;  // #I unmasked
    s.xsave.fsw() = 0;
    s.xsave.ftw_abridged() = 0;                        // empty
    EXPECT_EQ(fault("d9 1b"), amd ? vec::PF : -1);     // fstp dword [rbx]
    EXPECT_EQ(s.xsave.fsw() & 0x80, amd ? 0 : 0x80);
    s.xsave.fcw() = 0x37f;
    s.xsave.fsw() = 0;
    EXPECT_EQ(fault("d9 1b"), vec::PF);
    EXPECT_EQ(s.xsave.fsw(), 0);
  }
}

TEST_F(VectorTest, VmaskmovSuppressesFaults) {
  m.unmap(kData + 0x1000);
  s.gpr[RBX] = kData + 0xff0;
  for (u32 i = 0; i < 4; ++i) m.store<u32>(kData + 0xff0 + 4 * i, i + 1);
  fill(2, 0), fill(1, 0x99);
  xmm<u32>(2, {0x80000000, 0, 0x80000000, 0xffffffff});
  ASSERT_TRUE(ok("c4 e2 6d 2c 0b"));  // vmaskmovps ymm1, ymm2, [rbx]
  EXPECT_EQ(lane<u32>(1, 0), 1u);
  EXPECT_EQ(lane<u32>(1, 1), 0u);
  EXPECT_EQ(lane<u32>(1, 3), 4u);
  EXPECT_EQ(lane<u64>(1, 2), 0u);
  fill(1, 0x99);
  ASSERT_TRUE(ok("c4 e2 6d 2e 0b"));  // store
  EXPECT_EQ(m.load<u32>(kData + 0xff0), 0x99999999u);
  EXPECT_EQ(m.load<u32>(kData + 0xff4), 2u);
  s.xsave.ymm_high(2)[3] = 0x80;
  EXPECT_EQ(fault("c4 e2 6d 2e 0b"), vec::PF);
  fill(1, 0x42);
  EXPECT_EQ(fault("c4 e2 6d 2c 0b"), vec::PF);
  EXPECT_EQ(lane<u32>(1, 0), 0x42424242u);
}

TEST_F(VectorTest, GatherMakesProgressUpToTheFault) {
  for (u32 i = 0; i < 1024; ++i) m.store<u32>(kData + 4 * i, i);
  fill(1, 0x55), fill(2, 0xff), fill(3, 0);
  xmm<u32>(3, {5, 7, 0x400, 9});
  m.unmap(kData + 0x1000);
  EXPECT_EQ(fault("c4 e2 69 90 0c 9b"), vec::PF);  // vpgatherdd xmm1, [rbx+xmm3*4], xmm2
  EXPECT_EQ(lane<u32>(1, 0), 5u);
  EXPECT_EQ(lane<u32>(1, 1), 7u);
  EXPECT_EQ(lane<u32>(1, 2), 0x55555555u);
  EXPECT_EQ(lane<u32>(2, 1), 0u);
  EXPECT_EQ(lane<u32>(2, 2), 0xffffffffu);
  m.map(kData + 0x1000, kData + 0x1000, TestMachine::kPresent | TestMachine::kWritable);
  m.store<u32>(kData + 0x1000, 0x400);
  m.store<u32>(kData + 20, 0xdead);  // done already: not read again
  ASSERT_TRUE(ok("c4 e2 69 90 0c 9b"));
  EXPECT_EQ(lane<u32>(1, 0), 5u);
  EXPECT_EQ(lane<u32>(1, 2), 0x400u);
  EXPECT_EQ(lane<u32>(1, 3), 9u);
  EXPECT_EQ(lane<u64>(1, 2), 0u);
  for (unsigned i = 0; i < 4; ++i) EXPECT_EQ(lane<u64>(2, i), 0u);
  // 64-bit indices, 32-bit elements: two of them; negative index
  fill(2, 0xff);
  xmm<u64>(3, {3, static_cast<u64>(-1)});
  s.gpr[RBX] = kData + 0x100;
  ASSERT_TRUE(ok("c4 e2 69 91 0c 9b"));  // vpgatherqd
  EXPECT_EQ(lane<u32>(1, 0), 0x43u);
  EXPECT_EQ(lane<u32>(1, 1), 0x3fu);
  EXPECT_EQ(lane<u64>(1, 1), 0u);
  EXPECT_EQ(fault("c4 e2 71 90 0c 9b"), vec::UD);  // mask and destination the same
}

TEST_F(VectorTest, Vzero) {
  for (unsigned i = 0; i < 16; ++i) fill(i, 0x77);
  ASSERT_TRUE(ok("c5 f8 77"));
  EXPECT_EQ(lane<u64>(15, 0), 0x7777777777777777u);
  EXPECT_EQ(lane<u64>(15, 2), 0u);
  ASSERT_TRUE(ok("c5 fc 77"));
  EXPECT_EQ(lane<u64>(15, 0), 0u);
}

TEST_F(VectorTest, NotForTheHost) {
  EXPECT_EQ(fault("62 f1 74 08 58 c2"), vec::UD);  // EVEX
  EXPECT_EQ(fault("0f 0f c1 9e"), vec::UD);        // 3DNow!
  // A DecodedInsn that claims what its bytes do not say gives no stub.
  DecodedInsn insn;
  const auto bytes = hex("0f 58 ca");
  ASSERT_EQ(decode(bytes.data(), 3, CodeMode::Bits64, false, false, &insn), DecodeResult::Ok);
  ASSERT_TRUE(make_stub(insn, CodeMode::Bits64, false).has_value());
  for (const char* evil : {"0f 05 90", "0f a2 90", "0f ae f8", "0f c7 f0", "0f 77 90", "90 90 90", "0f 0b 90"}) {
    const auto b = hex(evil);
    std::memcpy(insn.raw, b.data(), 3);
    EXPECT_FALSE(make_stub(insn, CodeMode::Bits64, true).has_value()) << evil;
  }
}

TEST_F(VectorTest, StubsAreBounded) {
  // Every immediate and register pair of two instructions: more than the arena holds at once.
  ASSERT_TRUE(ok("66 0f 70 ca 00"));
  std::size_t most = 0;
  for (unsigned imm = 0; imm < 256; ++imm) {
    for (unsigned modrm = 0xc0; modrm < 0x100; ++modrm) {
      xmm<u32>(modrm & 7, {1, 2, 3, 4});
      const test::Bytes code = {0x66, 0x0f, 0x70, static_cast<u8>(modrm), static_cast<u8>(imm)};
      ASSERT_EQ(m.step(code), Exec::Next);
      ASSERT_EQ(lane<u32>(modrm >> 3 & 7, 0), (imm & 3) + 1);
      most = std::max(most, m.c().vector_unit->stub_count());
    }
  }
  EXPECT_LT(most, 16384u);
  EXPECT_GT(most, 1000u);
}

TEST_F(VectorTest, MmioOperandIsReplayed) {
  m.map(0x5000000, 0x9000000, TestMachine::kPresent | TestMachine::kWritable);  // no memory there
  s.gpr[RBX] = 0x5000000;
  fill(1, 0x31);
  m.env.exits_to_give = 1;
  EXPECT_EQ(step("0f 10 0b"), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Exit);
  EXPECT_EQ(lane<u32>(1, 0), 0x31313131u);
  ASSERT_TRUE(ok("0f 10 0b"));
  EXPECT_EQ(lane<u64>(1, 1), m.env.mmio_value);
  // A popping x87 store that must wait for the VMM pops nothing.
  ASSERT_TRUE(ok("d9 e8"));
  const XsaveArea before = s.xsave;
  m.env.exits_to_give = 1;
  EXPECT_EQ(step("dd 1b"), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Exit);
  EXPECT_EQ(std::memcmp(before.bytes, s.xsave.bytes, 416), 0);
  ASSERT_TRUE(ok("dd 1b"));
  EXPECT_EQ(s.xsave.ftw_abridged(), 0);
}

}  // namespace
}  // namespace ring3::engine
