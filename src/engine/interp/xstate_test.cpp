#include "engine/interp/xstate.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

constexpr u64 kArea = TestMachine::kData;

constexpr const char* kFxsave = "0f ae 03", *kFxsave64 = "48 0f ae 03", *kFxrstor = "0f ae 0b", *kFxrstor64 = "48 0f ae 0b",
                      *kXsave64 = "48 0f ae 23", *kXrstor64 = "48 0f ae 2b", *kXsaveopt64 = "48 0f ae 33",
                      *kXsavec64 = "48 0f c7 23", *kXsaves64 = "48 0f c7 2b", *kXrstors64 = "48 0f c7 1b";

class XstateTest : public ::testing::Test {
 protected:
  TestMachine m{TestMode::Long64};
  VcpuState& s = m.s;

  void SetUp() override {
    s.gpr[RBX] = kArea;
    request(7);
    fill();
  }
  void request(u64 components) {
    s.gpr[RAX] = components & 0xffffffff;
    s.gpr[RDX] = components >> 32;
  }
  void fill() {
    for (unsigned i = 0; i < 256; ++i) {
      s.xsave.bytes[160 + i] = static_cast<u8>(i + 1);
      s.xsave.bytes[576 + i] = static_cast<u8>(i * 3 + 7);
    }
    for (unsigned i = 0; i < 8; ++i) std::memset(s.xsave.bytes + 32 + 16 * i, static_cast<int>(i + 1), 10);
    s.xsave.fcw() = 0x27f;
    s.xsave.fsw() = 0x3800;
    s.xsave.ftw_abridged() = 0x81;
    s.xsave.mxcsr() = 0x1fa0;
    put<u16>(6, 0x123);
    put<u64>(8, 0xffffffff81234567);
    put<u64>(16, 0xffff888012345678);
  }
  template <class T>
  void put(unsigned at, T v) { std::memcpy(s.xsave.bytes + at, &v, sizeof v); }
  void init() {
    s.xsave = XsaveArea{};
    s.xsave.fcw() = 0x37f;
    s.xsave.mxcsr() = 0x1f80;
  }
  Exec step(const char* code) { return m.step(hex(code)); }
  bool ok(const char* code) { return step(code) == Exec::Next; }
  int fault(const char* code) {
    if (step(code) != Exec::Stop || m.c().stop().kind != Stop::Kind::Fault) return -1;
    return m.c().stop().vector;
  }
  bool state_is(const XsaveArea& other) {
    return std::memcmp(s.xsave.bytes, other.bytes, 28) == 0 && std::memcmp(s.xsave.bytes + 32, other.bytes + 32, 384) == 0 &&
           std::memcmp(s.xsave.bytes + 576, other.bytes + 576, 256) == 0;
  }
};

TEST_F(XstateTest, FxsaveFormats) {
  std::memset(m.ram(kArea), 0xcc, 1024);
  ASSERT_TRUE(ok(kFxsave64));
  EXPECT_EQ(m.load<u16>(kArea), 0x27f);
  EXPECT_EQ(m.load<u8>(kArea + 4), 0x81);
  EXPECT_EQ(m.load<u64>(kArea + 8), 0xffffffff81234567u);
  EXPECT_EQ(m.load<u32>(kArea + 24), 0x1fa0u);
  EXPECT_EQ(m.load<u32>(kArea + 28), 0xffffu);
  EXPECT_EQ(m.load<u8>(kArea + 160 + 255), 0);
  EXPECT_EQ(m.load<u8>(kArea + 160 + 254), 255);
  EXPECT_EQ(m.load<u8>(kArea + 416), 0xcc);
  ASSERT_TRUE(ok(kFxsave));
  EXPECT_EQ(m.load<u64>(kArea + 8), 0x81234567u);   // FCS is not kept in IA-32e mode
  EXPECT_EQ(m.load<u64>(kArea + 16), 0x12345678u);
  const XsaveArea before = s.xsave;
  ASSERT_TRUE(ok(kFxsave64));
  init();
  ASSERT_TRUE(ok(kFxrstor64));
  std::memset(s.xsave.ymm_high(0), 0, 256);
  XsaveArea expected = before;
  std::memset(expected.ymm_high(0), 0, 256);
  EXPECT_TRUE(state_is(expected));
}

TEST(XstateModes, FxsaveInProtectedMode) {
  TestMachine m(TestMode::Prot32);
  m.s.gpr[RBX] = kArea;
  m.s.xsave.fcw() = 0x37f;
  m.s.xsave.ftw_abridged() = 0;
  std::memset(m.s.xsave.xmm(0), 0x5a, 256);
  std::memset(m.ram(kArea), 0xcc, 512);
  m.store<u32>(kArea, 1);
  m.s.xsave.fcw() = 0x37d;                      // DM clear
  ASSERT_EQ(m.step(hex("d9 03")), Exec::Next);  // fld dword [ebx]: denormal
  ASSERT_TRUE(m.s.xsave.fsw() & 0x80);
  ASSERT_EQ(m.step(hex("0f ae 03")), Exec::Next);
  EXPECT_EQ(m.load<u16>(kArea + 6), 0x103);
  EXPECT_EQ(m.load<u32>(kArea + 8), TestMachine::kCode);
  EXPECT_EQ(m.load<u16>(kArea + 12), test::sel::Code32);
  EXPECT_EQ(m.load<u32>(kArea + 16), kArea);
  EXPECT_EQ(m.load<u16>(kArea + 20), test::sel::Data);
  EXPECT_EQ(m.load<u8>(kArea + 160 + 127), 0x5a);
  EXPECT_EQ(m.load<u8>(kArea + 160 + 128), 0xcc);  // XMM8 and up do not exist here
  std::memset(m.ram(kArea + 160), 0x11, 256);
  ASSERT_EQ(m.step(hex("0f ae 0b")), Exec::Next);
  EXPECT_EQ(m.s.xsave.xmm(7)[0], 0x11);
  EXPECT_EQ(m.s.xsave.xmm(8)[0], 0x5a);
}

TEST_F(XstateTest, FxsaveFaults) {
  s.gpr[RBX] = kArea + 8;
  EXPECT_EQ(fault(kFxsave), vec::GP);
  s.gpr[RBX] = kArea + 0xf00;
  m.unmap(kArea + 0x1000);
  std::memset(m.ram(kArea + 0xf00), 0xcc, 256);
  EXPECT_EQ(fault(kFxsave), vec::PF);
  EXPECT_EQ(m.load<u8>(kArea + 0xf00), 0xcc);
  s.gpr[RBX] = kArea;
  const XsaveArea before = s.xsave;
  std::memset(m.ram(kArea), 0, 512);
  m.store<u32>(kArea + 24, 0x10000);
  EXPECT_EQ(fault(kFxrstor), vec::GP);
  EXPECT_TRUE(state_is(before));
  s.cr0 |= cr0::TS;
  EXPECT_EQ(fault(kFxsave), vec::NM);
  s.cr0 = (s.cr0 & ~cr0::TS) | cr0::EM;
  m.c().features.amd = false;
  EXPECT_EQ(fault(kFxsave), vec::NM);
  m.c().features.amd = true;
  EXPECT_EQ(fault(kFxsave), vec::UD);
}

TEST_F(XstateTest, FastFxsaveLeavesXmmOut) {
  s.efer |= efer::FFXSR;
  std::memset(m.ram(kArea), 0xcc, 512);
  ASSERT_TRUE(ok(kFxsave64));
  EXPECT_EQ(m.load<u32>(kArea + 24), 0x1fa0u);
  EXPECT_EQ(m.load<u8>(kArea + 160), 0xcc);
  ASSERT_TRUE(ok(kFxrstor64));
  EXPECT_EQ(s.xsave.xmm(0)[0], 1);
}

TEST_F(XstateTest, LoadedControlWordsAreNormalised) {
  std::memset(m.ram(kArea), 0, 512);
  m.store<u16>(kArea, 0xfffe);      // IM clear, reserved bits set
  m.store<u16>(kArea + 2, 0x0001);  // IE
  m.store<u32>(kArea + 24, 0x1f80);
  ASSERT_TRUE(ok(kFxrstor64));
  EXPECT_EQ(s.xsave.fcw(), 0x1f7e);
  EXPECT_EQ(s.xsave.fsw(), 0x8081);
  EXPECT_EQ(fault("d9 e8"), vec::MF);
}

TEST_F(XstateTest, Mxcsr) {
  m.store<u32>(kArea, 0x3f80);
  ASSERT_TRUE(ok("0f ae 13"));
  EXPECT_EQ(s.xsave.mxcsr(), 0x3f80u);
  ASSERT_TRUE(ok("0f ae 5b 04"));
  EXPECT_EQ(m.load<u32>(kArea + 4), 0x3f80u);
  m.store<u32>(kArea, 0x10000);
  EXPECT_EQ(fault("0f ae 13"), vec::GP);
  EXPECT_EQ(s.xsave.mxcsr(), 0x3f80u);
  ASSERT_TRUE(ok("c5 f8 ae 5b 08"));  // vstmxcsr
  EXPECT_EQ(m.load<u32>(kArea + 8), 0x3f80u);
  s.cr4 &= ~cr4::OSFXSR;
  EXPECT_EQ(fault("0f ae 13"), vec::UD);
}

TEST_F(XstateTest, XsaveRoundTrips) {
  const XsaveArea full = s.xsave;
  for (const char* save : {kXsave64, kXsaveopt64, kXsavec64, kXsaves64}) {
    std::memset(m.ram(kArea), 0, 1024);
    s.xsave = full;
    ASSERT_TRUE(ok(save)) << save;
    const bool compact = save == kXsavec64 || save == kXsaves64;
    EXPECT_EQ(m.load<u64>(kArea + 512), 7u);
    EXPECT_EQ(m.load<u64>(kArea + 520), compact ? 0x8000000000000007u : 0u);
    init();
    ASSERT_TRUE(ok(save == kXsaves64 ? kXrstors64 : kXrstor64)) << save;
    EXPECT_TRUE(state_is(full)) << save;
  }
}

TEST_F(XstateTest, PartialRequests) {
  std::memset(m.ram(kArea), 0, 1024);
  m.store<u64>(kArea + 512, 3);
  request(4);
  ASSERT_TRUE(ok(kXsave64));
  EXPECT_EQ(m.load<u64>(kArea + 512), 7u);           // the others' bits stay
  EXPECT_EQ(m.load<u8>(kArea + 160), 0);
  EXPECT_EQ(m.load<u32>(kArea + 24), 0x1fa0u);       // MXCSR goes with AVX too
  EXPECT_EQ(m.load<u8>(kArea + 576), 7);
  s.xcr0 = 3;  // what XCR0 lacks is not touched
  request(~0ull);
  m.store<u8>(kArea + 576, 0xee);
  ASSERT_TRUE(ok(kXsave64));
  EXPECT_EQ(m.load<u8>(kArea + 576), 0xee);
}

TEST_F(XstateTest, InitOptimisation) {
  init();
  std::memset(m.ram(kArea), 0xcc, 1024);
  std::memset(m.ram(kArea + 512), 0, 64);
  ASSERT_TRUE(ok(kXsaveopt64));
  EXPECT_EQ(m.load<u64>(kArea + 512), 0u);
  EXPECT_EQ(m.load<u8>(kArea), 0xcc);
  EXPECT_EQ(m.load<u8>(kArea + 160), 0xcc);
  ASSERT_TRUE(ok(kXsave64));
  EXPECT_EQ(m.load<u16>(kArea), 0x37f);  // XSAVE writes it all the same
  EXPECT_EQ(m.load<u64>(kArea + 512), 0u);
  s.xsave.mxcsr() = 0x1fa0;  // counts as SSE in use
  ASSERT_TRUE(ok(kXsavec64));
  EXPECT_EQ(m.load<u64>(kArea + 512), 2u);
  // Restoring with clear bits initialises.
  fill();
  m.store<u64>(kArea + 512, 0);
  ASSERT_TRUE(ok(kXrstor64));
  EXPECT_EQ(s.xsave.fcw(), 0x37f);
  EXPECT_EQ(s.xsave.ftw_abridged(), 0);
  EXPECT_EQ(xstate_in_use(s.xsave), 0u);  // compacted: MXCSR was initialised with SSE
}

TEST_F(XstateTest, StandardFormLoadsMxcsrThoughSseIsInit) {
  std::memset(m.ram(kArea), 0, 1024);
  m.store<u32>(kArea + 24, 0x1fbf);
  request(2);
  ASSERT_TRUE(ok(kXrstor64));
  EXPECT_EQ(s.xsave.mxcsr(), 0x1fbfu);
  EXPECT_EQ(s.xsave.xmm(0)[0], 0);
  EXPECT_EQ(s.xsave.fcw(), 0x27f);
  m.store<u32>(kArea + 24, 0x80000000);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
}

TEST_F(XstateTest, HeaderFaults) {
  const XsaveArea full = s.xsave;
  const auto header = [&](u64 bv, u64 comp) {
    std::memset(m.ram(kArea), 0, 1024);
    m.store<u32>(kArea + 24, 0x1f80);
    m.store<u64>(kArea + 512, bv);
    m.store<u64>(kArea + 520, comp);
  };
  header(8, 0);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(0, 1);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(0, 0);
  m.store<u8>(kArea + 528, 1);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(4, 0x8000000000000003);  // a component that XCOMP_BV does not have
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(1, 0x8000000000000009);  // one that XCR0 does not have
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(1, 0x8000000000000001);
  m.store<u8>(kArea + 575, 1);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  header(1, 0);
  EXPECT_EQ(fault(kXrstors64), vec::GP);  // wants the compacted form
  EXPECT_TRUE(state_is(full));
  s.xcr0 = 3;
  header(4, 0);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
}

TEST_F(XstateTest, AvailabilityAndAlignment) {
  s.gpr[RBX] = kArea + 16;
  EXPECT_EQ(fault(kXsave64), vec::GP);
  EXPECT_EQ(fault(kXrstor64), vec::GP);
  s.gpr[RBX] = kArea;
  s.cr0 |= cr0::TS;
  EXPECT_EQ(fault(kXsave64), vec::NM);
  s.cr4 &= ~cr4::OSXSAVE;
  EXPECT_EQ(fault(kXsave64), vec::UD);
}

TEST_F(XstateTest, PageFaultsAreAtomic) {
  s.gpr[RBX] = kArea + 0xe00;  // the header is on the next page
  m.unmap(kArea + 0x1000);
  std::memset(m.ram(kArea + 0xe00), 0xcc, 512);
  EXPECT_EQ(fault(kXsave64), vec::PF);
  EXPECT_EQ(m.load<u8>(kArea + 0xe00), 0xcc);
  EXPECT_EQ(m.load<u8>(kArea + 0xfff), 0xcc);
  // AVX part on an unmapped page: only when it is to be loaded.
  s.gpr[RBX] = kArea + 0x1000 - 576;
  std::memset(m.ram(kArea + 0x1000 - 576), 0, 576);
  m.store<u32>(kArea + 0x1000 - 576 + 24, 0x1f80);
  const XsaveArea full = s.xsave;
  m.store<u64>(kArea + 0x1000 - 64, 4);
  EXPECT_EQ(fault(kXrstor64), vec::PF);
  EXPECT_TRUE(state_is(full));
  m.store<u64>(kArea + 0x1000 - 64, 0);
  EXPECT_TRUE(ok(kXrstor64));
}

TEST(XstateUser, SupervisorFormsNeedRingZero) {
  TestMachine m(TestMode::Long64, true);
  m.s.gpr[RBX] = kArea;
  m.s.gpr[RAX] = 7;
  EXPECT_EQ(m.step(hex("48 0f c7 2b")), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::GP);
  EXPECT_EQ(m.step(hex("48 0f c7 1b")), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::GP);
  EXPECT_EQ(m.step(hex("48 0f c7 23")), Exec::Next);
}

}  // namespace
}  // namespace ring3::engine
