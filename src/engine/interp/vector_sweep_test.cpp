#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <random>
#include <set>

#include "engine/codecache/code_arena.hpp"
#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/interp/vector.hpp"

/// Every encoding of the SSE, AVX, MMX and x87 opcode maps in a few operand forms: the instruction's
/// own bytes executed on the host with all of the guest's registers, against the engine.
namespace ring3::engine {
namespace {

using test::Bytes;
using test::TestMachine;
using test::TestMode;

/// All user-visible state, as the native run loads and stores it. RSP is the host's.
struct alignas(64) Native {
  u8 fx[512];
  u8 ymm_high[256];
  u64 gpr[16];
  u64 rflags;
};

class NativeRunner {
 public:
  explicit NativeRunner(bool avx) : avx_(avx) {
    auto arena = CodeArena::create(4096);
    if (arena) arena_ = std::move(*arena);
  }
  bool run(const Bytes& insn, Native* state) {
    std::vector<u8> c;
    const auto put = [&](std::initializer_list<u8> b) { c.insert(c.end(), b); };
    const auto off = [&](u32 v) { for (int i = 0; i < 4; ++i) c.push_back(static_cast<u8>(v >> (8 * i))); };
    const auto gpr = [&](u8 opcode, unsigned n) {
      put({static_cast<u8>(n < 8 ? 0x48 : 0x4c), opcode, static_cast<u8>(0x87 | (n & 7) << 3)});
      off(offsetof(Native, gpr) + 8 * n);
    };
    put({0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x57, 0x48, 0x0f, 0xae, 0x0f});  // pushes; fxrstor64 [rdi]
    for (unsigned n = 0; avx_ && n < 16; ++n) {
      put({0xc4, static_cast<u8>(n < 8 ? 0xe3 : 0x63), static_cast<u8>((~n & 15) << 3 | 5), 0x18, static_cast<u8>(0x87 | (n & 7) << 3)});
      off(offsetof(Native, ymm_high) + 16 * n);
      put({1});
    }
    put({0xff, 0xb7});
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
    off(offsetof(Native, gpr) + 8 * RDI);
    put({0xfc});
    for (unsigned n = 0; avx_ && n < 16; ++n) {
      put({0xc4, static_cast<u8>(n < 8 ? 0xe3 : 0x63), 0x7d, 0x19, static_cast<u8>(0x87 | (n & 7) << 3)});
      off(offsetof(Native, ymm_high) + 16 * n);
      put({1});
    }
    put({0x48, 0x0f, 0xae, 0x07, 0xdb, 0xe3});  // fxsave64 [rdi]; fninit
    if (avx_) put({0xc5, 0xf8, 0x77});
    put({0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3});
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
  bool avx_;
  std::unique_ptr<CodeArena> arena_;
};

constexpr u64 kData = TestMachine::kData;

class Sweep : public ::testing::Test {
 protected:
  TestMachine m{TestMode::Long64};
  GuestFeatures host = host_features();
  NativeRunner native{host[Feature::Avx]};
  std::mt19937_64 rng{20240607};
  std::set<u32> forms;  ///< distinct opcodes compared
  unsigned compared = 0, refused = 0;

  /// Values that provoke: random bits, small integers, ordinary and special floats.
  void random_vector(u8* p, unsigned size) {
    static constexpr u64 kSpecial[] = {0, 0x8000000000000000, 0x3ff0000000000000, 0x7ff0000000000000, 0x7ff8000000000001,
                                       0x7ff0000000000001, 1, 0x4059000000000000, 0x3f80000040490fdb, 0x7f800000ff800000,
                                       0x0000000180000001, 0x7fffffff7fffffff};
    for (unsigned i = 0; i < size; i += 8) {
      const u64 v = rng() % 3 == 0 ? kSpecial[rng() % std::size(kSpecial)] : rng();
      std::memcpy(p + i, &v, 8);
    }
  }

  void one(const Bytes& code) {
    DecodedInsn insn;
    if (decode(code.data(), static_cast<unsigned>(code.size()), CodeMode::Bits64, false, m.c().features.amd, &insn) != DecodeResult::Ok) return;
    switch (insn.op) {
      case Op::HostVec: case Op::HostMmx: case Op::HostX87: case Op::Maskmov: case Op::Vmaskmov: case Op::Emms:
      case Op::Vzeroall: case Op::Vzeroupper:
        break;
      default: return;
    }
    if (insn.length != code.size() || !host[insn.feature] || !m.c().features[insn.feature]) return;
    const bool pointers = insn.op == Op::HostX87 && insn.has(kHasMem) && (code[0] == 0xd9 || code[0] == 0xdd) &&
                          ((code[1] >> 3 & 7) == 4 || (code[1] >> 3 & 7) == 6);
    if (pointers) return;  // environments hold addresses
    if (insn.has(kHasMem) && (insn.mem.base != RDI || insn.disp != 0)) return;
    for (const Operand& o : insn.operands)
      if (o.kind == OperandKind::Gpr && (o.reg == RSP || o.reg == RDI)) return;

    VcpuState& s = m.s;
    Native n;
    std::memset(&n, 0, sizeof n);
    random_vector(s.xsave.xmm(0), 256);
    random_vector(s.xsave.ymm_high(0), 256);
    for (unsigned i = 0; i < 8; ++i) {
      u8* p = s.xsave.bytes + 32 + 16 * i;
      std::memset(p, 0, 16);
      random_vector(p, 8);
      const u16 e = rng() & 1 ? static_cast<u16>(0x3fff + rng() % 8) : static_cast<u16>(rng());
      if (rng() & 3) p[7] |= 0x80;
      std::memcpy(p + 8, &e, 2);
    }
    s.xsave.fcw() = static_cast<u16>(0x37f & ~(rng() & 0xc00));
    s.xsave.fsw() = static_cast<u16>(rng() & 0x7f00);
    s.xsave.ftw_abridged() = rng() & 1 ? 0xff : static_cast<u8>(rng());
    s.xsave.mxcsr() = 0x1f80 | (rng() & 0xe07f);
    for (unsigned i = 0; i < 16; ++i) s.gpr[i] = rng();
    s.rflags = rflags::FIXED1 | (rng() & rflags::STATUS);
    alignas(64) u8 memory[128];
    random_vector(memory, sizeof memory);
    if (insn.op == Op::HostX87 && rng() % 2) {  // an 80-bit value now and then
      const u16 e = static_cast<u16>(0x3ff0 + rng() % 32);
      memory[7] |= 0x80;
      std::memcpy(memory + 8, &e, 2);
    }
    if (insn.op == Op::HostX87 && insn.has(kHasMem) && code[0] == 0xd9 && (code[1] >> 3 & 7) == 5) {  // FLDCW: masked
      const u16 cw = static_cast<u16>(0x7f | (rng() & 0xf00));
      std::memcpy(memory, &cw, 2);
    }
    std::memcpy(m.ram(kData), memory, sizeof memory);
    s.gpr[RDI] = kData;
    std::memcpy(n.fx, s.xsave.bytes, 512);
    std::memset(n.fx + 6, 0, 18);
    std::memcpy(n.ymm_high, s.xsave.ymm_high(0), 256);
    std::memcpy(n.gpr, s.gpr, sizeof n.gpr);
    n.gpr[RDI] = reinterpret_cast<u64>(memory);
    n.rflags = s.rflags;
    const u64 rsp = s.gpr[RSP];

    std::string text;
    for (u8 b : code) {
      char t[4];
      std::snprintf(t, sizeof t, "%02x ", b);
      text += t;
    }
    const Exec e = m.step(code);
    if (e != Exec::Next) {
      ++refused;
      ADD_FAILURE() << text << "did not execute: vector " << int{m.c().stop().vector};
      return;
    }
    ASSERT_TRUE(native.run(code, &n));
    ++compared;
    forms.insert(static_cast<u32>(insn.op) << 16 | (insn.has(kVex) ? 0x100u : 0) | insn.opcode);
    EXPECT_EQ(std::memcmp(n.fx, s.xsave.bytes, 6), 0) << text << "x87 control";
    EXPECT_EQ(std::memcmp(n.fx + 24, s.xsave.bytes + 24, 4), 0) << text << "MXCSR";
    EXPECT_EQ(std::memcmp(n.fx + 32, s.xsave.bytes + 32, 128), 0) << text << "ST/MM";
    for (unsigned i = 0; i < 16; ++i) {
      EXPECT_EQ(std::memcmp(n.fx + 160 + 16 * i, s.xsave.xmm(i), 16), 0) << text << "xmm" << i;
      if (host[Feature::Avx]) {
        EXPECT_EQ(std::memcmp(n.ymm_high + 16 * i, s.xsave.ymm_high(i), 16), 0) << text << "ymm" << i;
      }
      if (i != RSP && i != RDI) {
        EXPECT_EQ(n.gpr[i], s.gpr[i]) << text << "gpr" << i;
      }
    }
    EXPECT_EQ(s.gpr[RSP], rsp) << text;
    EXPECT_EQ((n.rflags ^ s.rflags) & rflags::STATUS, 0u) << text << "flags";
    EXPECT_EQ(std::memcmp(memory, m.ram(kData), sizeof memory), 0) << text << "memory";
  }

  /// Register and memory forms of one opcode; tail bytes for an immediate where one is decoded.
  void forms_of(const Bytes& head, bool all_modrm) {
    for (unsigned modrm = all_modrm ? 0xc0 : 0; modrm < (all_modrm ? 0x100u : 16u); ++modrm) {
      Bytes code = head;
      if (all_modrm) {
        code.push_back(static_cast<u8>(modrm));
      } else {
        // /0../7 with a register operand (2, or 5) and with [rdi]
        code.push_back(static_cast<u8>(modrm < 8 ? 0xc2 | modrm << 3 : 0x07 | (modrm & 7) << 3));
      }
      one(code);
      const u8 imm = static_cast<u8>(rng());
      code.push_back(imm);
      one(code);
    }
  }
};

TEST_F(Sweep, LegacyMaps) {
  for (unsigned map = 1; map <= 3; ++map)
    for (u8 prefix : {0x00, 0x66, 0xf3, 0xf2})
      for (u8 rex : {0x00, 0x48, 0x45})
        for (unsigned opcode = 0; opcode < 256; ++opcode) {
          Bytes head;
          if (prefix) head.push_back(prefix);
          if (rex) head.push_back(rex);
          head.push_back(0x0f);
          if (map > 1) head.push_back(map == 2 ? 0x38 : 0x3a);
          head.push_back(static_cast<u8>(opcode));
          if (map == 1 && opcode == 0x77 && prefix == 0) one(head);
          // With REX.B the memory base would be R15.
          if (rex != 0x45) {
            forms_of(head, false);
          } else {
            head.push_back(0xca);
            one(head);
            head.push_back(0x5a);
            one(head);
          }
        }
  RecordProperty("compared", static_cast<int>(compared));
  std::printf("  %u instructions compared, %zu opcodes\n", compared, forms.size());
  EXPECT_GT(compared, 3000u);
}

TEST_F(Sweep, VexMaps) {
  if (!host[Feature::Avx]) GTEST_SKIP() << "the host has no AVX";
  for (unsigned map = 1; map <= 3; ++map)
    for (unsigned w = 0; w < 2; ++w)
      for (unsigned lpp = 0; lpp < 8; ++lpp)
        for (u8 vvvv : {15, 12})
          for (unsigned opcode = 0; opcode < 256; ++opcode)
            for (u8 rxb : {0xe0, 0x60})
              forms_of({0xc4, static_cast<u8>(rxb | map), static_cast<u8>(w << 7 | vvvv << 3 | lpp), static_cast<u8>(opcode)}, false);
  std::printf("  %u instructions compared, %zu opcodes\n", compared, forms.size());
  EXPECT_GT(compared, 10000u);
}

TEST_F(Sweep, X87) {
  for (unsigned round = 0; round < 8; ++round)
    for (unsigned opcode = 0xd8; opcode <= 0xdf; ++opcode) {
      forms_of({static_cast<u8>(opcode)}, true);
      for (unsigned reg = 0; reg < 8; ++reg) one({static_cast<u8>(opcode), static_cast<u8>(0x07 | reg << 3)});
    }
  std::printf("  %u instructions compared\n", compared);
  EXPECT_GT(compared, 3000u);
}

}  // namespace
}  // namespace ring3::engine
