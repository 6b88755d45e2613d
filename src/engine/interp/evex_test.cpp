#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>

#include "engine/codecache/code_arena.hpp"
#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/interp/vector.hpp"
#include "engine/interp/xstate.hpp"

/// AVX-512: every EVEX and opmask encoding in a few operand forms, its own bytes executed on the host with all of the guest's
/// registers against the engine; and the state's rules (SDM vol. 1 ch. 13).
namespace ring3::engine {
namespace {

using test::Bytes;
using test::hex;
using test::TestMachine;
using test::TestMode;

constexpr u64 kData = TestMachine::kData;

void switch_on(TestMachine& m) {
  GuestFeatures& f = m.c().features;
  for (unsigned n = static_cast<unsigned>(Feature::Avx512f); n <= static_cast<unsigned>(Feature::Avx512bf16); n++) f.has.set(n);
  f.has.set(static_cast<unsigned>(Feature::Gfni));
  f.xcr0_supported = 0xe7;
  m.s.xcr0 = 0xe7;
}

/// As the native run loads and stores it, in the host's own layout.
struct alignas(64) Native {
  u8 area[4096];
  u64 gpr[16];
  u64 rflags;
};

void to_host(const XsaveArea& from, u8* area) {
  std::memset(area, 0, 4096);
  std::memcpy(area, from.bytes, 416);
  std::memset(area + 6, 0, 18);
  area[512] = 0xe7;
  for (const XstateComponent& x : xstate_components()) std::memcpy(area + x.standard, from.bytes + x.in_area, x.size);
}

class NativeRunner {
 public:
  NativeRunner() {
    auto arena = CodeArena::create(4096);
    if (arena) arena_ = std::move(*arena);
  }
  bool run(const Bytes& insn, Native* state) {
    std::vector<u8> c;
    const auto put = [&](std::initializer_list<u8> b) { c.insert(c.end(), b); };
    const auto off = [&](u32 v) { for (int i = 0; i < 4; ++i) c.push_back(static_cast<u8>(v >> (8 * i))); };
    const auto gpr = [&](u8 opcode, unsigned n) {
      put({static_cast<u8>(n < 8 ? 0x48 : 0x4c), opcode, static_cast<u8>(0x87 | (n & 7) << 3)});
      off(static_cast<u32>(offsetof(Native, gpr) + 8 * n));
    };
    put({0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x57});       // pushes
    put({0xb8, 0xe7, 0, 0, 0, 0x31, 0xd2, 0x48, 0x0f, 0xae, 0x2f, 0xff, 0xb7});    // mov eax, 0xe7; xor edx, edx; xrstor64 [rdi]; push rflags
    off(offsetof(Native, rflags));
    put({0x9d});
    for (unsigned n = 0; n < 16; ++n)
      if (n != RSP && n != RDI) gpr(0x8b, n);
    gpr(0x8b, RDI);
    c.insert(c.end(), insn.begin(), insn.end());
    put({0x48, 0x87, 0x3c, 0x24});  // xchg rdi, [rsp]
    for (unsigned n = 0; n < 16; ++n)
      if (n != RSP && n != RDI) gpr(0x89, n);
    put({0x9c, 0x8f, 0x87});
    off(offsetof(Native, rflags));
    put({0x8f, 0x87});
    off(static_cast<u32>(offsetof(Native, gpr) + 8 * RDI));
    put({0xfc, 0xb8, 0xe7, 0, 0, 0, 0x31, 0xd2, 0x48, 0x0f, 0xae, 0x27});  // cld; mov eax, 0xe7; xor edx, edx; xsave64 [rdi]
    put({0xdb, 0xe3, 0xc5, 0xf8, 0x77, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3});
    if (arena_ == nullptr) return false;
    arena_->clear();
    const u8* at = arena_->append(c);
    if (at == nullptr) return false;
    u32 mxcsr = 0;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr));
    void (*f)(Native*) = nullptr;
    std::memcpy(&f, &at, sizeof f);
    f(state);
    __asm__ volatile("ldmxcsr %0" : : "m"(mxcsr));
    return true;
  }

 private:
  std::unique_ptr<CodeArena> arena_;
};

class EvexSweep : public ::testing::Test {
 protected:
  TestMachine m{TestMode::Long64};
  GuestFeatures host = host_features();
  NativeRunner native;
  std::mt19937_64 rng{20260512};
  std::set<u32> forms;
  unsigned compared = 0;

  void SetUp() override {
    if (!host[Feature::Avx512f]) GTEST_SKIP() << "the host's CPU or kernel has no AVX-512";
    switch_on(m);
  }

  void random_bytes(u8* p, unsigned size) {
    static constexpr u64 kSpecial[] = {0, 0x8000000000000000, 0x3ff0000000000000, 0x7ff0000000000000, 0x7ff8000000000001, 1,
                                       0x3f80000040490fdb, 0x7f800000ff800000, 0x3c00c0007c000001, 0x7fffffff7fffffff};
    for (unsigned i = 0; i < size; i += 8) {
      const u64 v = rng() % 3 == 0 ? kSpecial[rng() % std::size(kSpecial)] : rng();
      std::memcpy(p + i, &v, 8);
    }
  }

  void one(const Bytes& code) {
    DecodedInsn insn;
    if (decode(code.data(), static_cast<unsigned>(code.size()), CodeMode::Bits64, false, false, &insn) != DecodeResult::Ok) return;
    if (insn.op != Op::HostVec || !insn.has(kEvex | kOpmask) || insn.length != code.size()) return;
    if (!host.allows(insn) || !m.c().features.allows(insn)) return;
    if (insn.has(kHasMem) && (insn.mem.base != RDI || insn.mem.index != kNoReg || insn.disp != 0)) return;
    for (const Operand& o : insn.operands)
      if (o.kind == OperandKind::Gpr && (o.reg == RSP || o.reg == RDI)) return;
    VcpuState& s = m.s;
    random_bytes(s.xsave.xmm(0), 256);
    random_bytes(s.xsave.ymm_high(0), 256);
    random_bytes(s.xsave.bytes + XsaveArea::kOpmask, 64 + 512 + 1024);
    s.xsave.fcw() = 0x37f;
    s.xsave.mxcsr() = 0x1f80 | (rng() & 0xe07f);
    for (u64& g : s.gpr) g = rng();
    s.rflags = rflags::FIXED1 | (rng() & rflags::STATUS);
    alignas(64) u8 memory[128];
    random_bytes(memory, sizeof memory);
    std::memcpy(m.ram(kData), memory, sizeof memory);
    s.gpr[RDI] = kData;
    Native n;
    to_host(s.xsave, n.area);
    std::memcpy(n.gpr, s.gpr, sizeof n.gpr);
    n.gpr[RDI] = reinterpret_cast<u64>(memory);
    n.rflags = s.rflags;
    std::string text;
    for (u8 b : code) {
      char t[4];
      std::snprintf(t, sizeof t, "%02x ", b);
      text += t;
    }
    if (m.step(code) != Exec::Next) {
      ADD_FAILURE() << text << "did not execute: vector " << int{m.c().stop().vector};
      return;
    }
    ASSERT_TRUE(native.run(code, &n));
    ++compared;
    forms.insert(static_cast<u32>(insn.flags) << 16 | insn.opcode);
    u64 bv;
    std::memcpy(&bv, n.area + 512, 8);
    EXPECT_EQ(std::memcmp(n.area + 24, s.xsave.bytes + 24, 4), 0) << text << "MXCSR";
    EXPECT_EQ(std::memcmp(n.area + 160, s.xsave.xmm(0), 256), 0) << text << "XMM";
    for (const XstateComponent& x : xstate_components()) {
      if (!(bv >> x.number & 1)) std::memset(n.area + x.standard, 0, x.size);
      EXPECT_EQ(std::memcmp(n.area + x.standard, s.xsave.bytes + x.in_area, x.size), 0) << text << "component " << int{x.number};
    }
    for (unsigned i = 0; i < 16; ++i)
      if (i != RSP && i != RDI) {
        EXPECT_EQ(n.gpr[i], s.gpr[i]) << text << "gpr" << i;
      }
    EXPECT_EQ((n.rflags ^ s.rflags) & rflags::STATUS, 0u) << text << "flags";
    EXPECT_EQ(std::memcmp(memory, m.ram(kData), sizeof memory), 0) << text << "memory";
  }
};

TEST_F(EvexSweep, EvexMaps) {
  for (const unsigned map : {1u, 2u, 3u, 5u, 6u})
    for (unsigned wpp = 0; wpp < 8; ++wpp)
      for (unsigned length = 0; length < 4; ++length)
        for (const bool b : {false, true})
          for (unsigned opcode = 0; opcode < 256; ++opcode)
            for (const bool vvvv : {false, true})
              for (unsigned form = 0; form < 4; ++form) {
                // Registers with and without the high sixteen; memory; masks, merging and zeroing.
                const unsigned mask = form == 0 ? 0 : 1 + static_cast<unsigned>(rng() % 7);
                const bool z = form == 3, high = form == 1, memory = form >= 2;
                const u8 p0 = static_cast<u8>((high ? 0x20 : 0xf0) | map);
                const u8 p1 = static_cast<u8>((wpp & 4 ? 0x80 : 0) | (vvvv ? 6 : 15) << 3 | 4 | (wpp & 3));
                const u8 p2 = static_cast<u8>((z ? 0x80 : 0) | length << 5 | (b ? 0x10 : 0) | (vvvv && high ? 0 : 8) | mask);
                Bytes code{0x62, p0, p1, p2, static_cast<u8>(opcode), static_cast<u8>((memory ? 0x07 : 0xc2) | (rng() & 7) << 3)};
                one(code);
                code.push_back(static_cast<u8>(rng()));
                one(code);
              }
  std::printf("  %u instructions compared, %zu opcodes\n", compared, forms.size());
  EXPECT_GT(compared, 8000u);
}

TEST_F(EvexSweep, OpmaskRegisters) {
  for (const unsigned map : {1u, 3u})
    for (unsigned wlpp = 0; wlpp < 16; ++wlpp)
      for (const unsigned vvvv : {15u, 12u})
        for (unsigned opcode = 0x30; opcode < 0xa0; ++opcode)
          for (const u8 modrm : {0xd3, 0x0f, 0x17}) {
            Bytes code{0xc4, static_cast<u8>(0xe0 | map), static_cast<u8>((wlpp & 8 ? 0x80 : 0) | vvvv << 3 | (wlpp & 7)),
                       static_cast<u8>(opcode), modrm};
            one(code);
            code.push_back(static_cast<u8>(rng()));
            one(code);
          }
  std::printf("  %u instructions compared\n", compared);
  EXPECT_GT(compared, 90u);
}

class EvexState : public ::testing::Test {
 protected:
  TestMachine m{TestMode::Long64};
  VcpuState& s = m.s;
  void SetUp() override { switch_on(m); }
  Exec step(const char* code) { return m.step(hex(code)); }
  int fault(const char* code) {
    if (step(code) != Exec::Stop || m.c().stop().kind != Stop::Kind::Fault) return -1;
    return m.c().stop().vector;
  }
};

constexpr const char* kAdd = "62 f1 74 48 58 c2";  // vaddps zmm0, zmm1, zmm2
constexpr const char* kKmov = "c5 f8 90 ca";       // kmovw k1, k2
constexpr const char* kXsetbv = "0f 01 d1";

TEST_F(EvexState, UndefinedUntilSwitchedOn) {
  for (const u64 xcr0 : {1ull, 3ull, 7ull}) {
    s.xcr0 = xcr0;
    EXPECT_EQ(fault(kAdd), vec::UD);
    EXPECT_EQ(fault(kKmov), vec::UD);
  }
  s.xcr0 = 0xe7;
  s.cr0 |= cr0::TS;
  m.c().mode_changed();
  EXPECT_EQ(fault(kAdd), vec::NM);
  EXPECT_EQ(fault(kKmov), vec::NM);
  s.cr0 &= ~cr0::TS;
  s.cr4 &= ~cr4::OSXSAVE;
  m.c().mode_changed();
  EXPECT_EQ(fault(kAdd), vec::UD);
}

TEST_F(EvexState, LengthsNeedVl) {
  m.c().features.has.reset(static_cast<unsigned>(Feature::Avx512vl));
  EXPECT_EQ(fault("62 f1 74 28 58 c2"), vec::UD);  // 256 bits
  EXPECT_EQ(fault("62 f1 74 08 58 c2"), vec::UD);
  m.c().features.has.reset(static_cast<unsigned>(Feature::Avx512f));
  EXPECT_EQ(fault(kAdd), vec::UD);
}

TEST_F(EvexState, Xcr0) {
  const auto set = [&](u64 v) {
    s.gpr[RAX] = v, s.gpr[RDX] = 0, s.gpr[RCX] = 0;
    return step(kXsetbv) == Exec::Branch;
  };
  EXPECT_TRUE(set(0xe7));
  EXPECT_EQ(s.xcr0, 0xe7u);
  for (const u64 bad : {0x27ull, 0x47ull, 0x87ull, 0x67ull, 0xe3ull, 0xe1ull, 0xe5ull, 0x1e7ull}) {
    EXPECT_FALSE(set(bad)) << bad;
    EXPECT_EQ(m.c().stop().vector, vec::GP);
  }
  EXPECT_TRUE(set(7));
  m.c().features.xcr0_supported = 7;
  EXPECT_FALSE(set(0xe7));
}

TEST_F(EvexState, SavedAndRestored) {
  for (unsigned i = XsaveArea::kOpmask; i < XsaveArea::kEnd; ++i) s.xsave.bytes[i] = static_cast<u8>(i * 7 + i / 256 + 1);
  const XsaveArea full = s.xsave;
  s.gpr[RBX] = kData;
  for (const bool compact : {false, true}) {
    std::memset(m.ram(kData), 0, 4096);
    s.xsave = full;
    s.gpr[RAX] = 0xe0, s.gpr[RDX] = 0;
    ASSERT_EQ(step(compact ? "48 0f c7 23" : "48 0f ae 23"), Exec::Next);
    EXPECT_EQ(m.load<u64>(kData + 512), 0xe0u);
    EXPECT_EQ(m.load<u64>(kData + 520), compact ? 0x80000000000000e0u : 0u);
    u32 at = 576;
    for (const XstateComponent& x : xstate_components()) {
      if (x.number == 2) continue;
      EXPECT_EQ(std::memcmp(m.ram(kData) + (compact ? at : x.standard), full.bytes + x.in_area, x.size), 0) << int{x.number};
      at += x.size;
    }
    EXPECT_EQ(xstate_size(0xe0, compact), compact ? at : xstate_components()[3].standard + 1024u);
    std::memset(s.xsave.bytes + XsaveArea::kOpmask, 0x55, XsaveArea::kEnd - XsaveArea::kOpmask);
    ASSERT_EQ(step("48 0f ae 2b"), Exec::Next);  // xrstor64
    EXPECT_EQ(std::memcmp(s.xsave.bytes, full.bytes, XsaveArea::kEnd), 0);
    // Asked for and not in the image: initialised.
    m.store<u64>(kData + 512, 0x20);
    ASSERT_EQ(step("48 0f ae 2b"), Exec::Next);
    EXPECT_EQ(std::memcmp(s.xsave.bytes + XsaveArea::kOpmask, full.bytes + XsaveArea::kOpmask, 64), 0);
    EXPECT_EQ(xstate_in_use(s.xsave) & 0xe0, 0x20u);
  }
  s.xcr0 = 7;  // what XCR0 lacks is not in a header
  m.store<u64>(kData + 512, 0x40);
  m.store<u64>(kData + 520, 0);
  EXPECT_EQ(fault("48 0f ae 2b"), vec::GP);
}

TEST_F(EvexState, VexClearsWhatIsAbove) {
  if (!host_features()[Feature::Avx]) GTEST_SKIP() << "the host has no AVX";
  const auto fill = [&] { std::memset(s.xsave.zmm_high(0), 0x77, 512); };
  fill();
  ASSERT_EQ(step("c5 f4 58 c2"), Exec::Next);  // vaddps ymm0, ymm1, ymm2
  EXPECT_EQ(s.xsave.zmm_high(0)[31], 0);
  EXPECT_EQ(s.xsave.zmm_high(1)[0], 0x77);
  ASSERT_EQ(step("0f 58 ca"), Exec::Next);  // addps xmm1, xmm2
  EXPECT_EQ(s.xsave.zmm_high(1)[0], 0x77);
  ASSERT_EQ(step("c5 f8 77"), Exec::Next);  // vzeroupper
  EXPECT_EQ(xstate_in_use(s.xsave) & 0x40, 0u);
}

TEST_F(EvexState, MasksSpareFaults) {
  if (!host_features()[Feature::Avx512f]) GTEST_SKIP() << "the host's CPU or kernel has no AVX-512";
  s.xsave.opmask(1) = 0;
  s.gpr[RBX] = 0x0000'7000'0000'0000;  // nothing there
  std::memset(s.xsave.xmm(0), 0x11, 16);
  EXPECT_EQ(step("62 f1 fe 49 6f 03"), Exec::Next);  // vmovdqu64 zmm0{k1}, [rbx]
  EXPECT_EQ(s.xsave.xmm(0)[0], 0x11);
  EXPECT_EQ(step("62 f1 fe 49 7f 03"), Exec::Next);  // and to there
  EXPECT_EQ(step("62 f2 fd 49 8a 03"), Exec::Next);  // vcompresspd [rbx]{k1}, zmm0
  s.xsave.opmask(1) = 4;
  EXPECT_EQ(fault("62 f1 fe 49 6f 03"), vec::PF);
  EXPECT_EQ(m.c().stop().payload, s.gpr[RBX] + 16);
  EXPECT_EQ(fault("62 f1 fe 49 7f 03"), vec::PF);
  EXPECT_EQ(fault("62 f2 fd 49 8a 03"), vec::PF);
  EXPECT_EQ(m.c().stop().payload, s.gpr[RBX]);
}

}  // namespace
}  // namespace ring3::engine
