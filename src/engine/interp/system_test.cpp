#include <gtest/gtest.h>

#include "engine/interp/msr.hpp"
#include "engine/interp/system.hpp"
#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

struct Fixture : TestMachine {
  using TestMachine::TestMachine;
  bool gp(Exec e) {
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(unsigned{c().stop().vector}, unsigned{vec::GP});
    EXPECT_EQ(c().stop().error, 0u);
    return e == Exec::Stop && c().stop().vector == vec::GP && c().stop().has_error;
  }
  bool ud(Exec e) {
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(unsigned{c().stop().vector}, unsigned{vec::UD});
    return e == Exec::Stop && c().stop().vector == vec::UD;
  }
};

const Bytes kCli = {0xfa}, kSti = {0xfb}, kHlt = {0xf4}, kIn8 = {0xe4, 0x60}, kRdtsc = {0x0f, 0x31};

TEST(InterruptFlag, ByIopl) {
  for (TestMode mode : kAllModes) {
    for (bool user : {false, true}) {
      if (user && (mode == TestMode::Real16 || mode == TestMode::V8086)) continue;
      for (u64 iopl = 0; iopl < 4; ++iopl) {
        Fixture m(mode, user);
        m.s.rflags = (m.s.rflags & ~rflags::IOPL) | iopl << 12 | rflags::IF;
        const u8 cpl = user || mode == TestMode::V8086 ? 3 : 0;
        const bool allowed = mode == TestMode::Real16 || cpl <= iopl;
        if (allowed) {
          EXPECT_EQ(m.step(kCli), Exec::Next);
          EXPECT_FALSE(m.s.rflags & rflags::IF);
          EXPECT_EQ(m.step(kSti), Exec::Branch);
          EXPECT_TRUE(m.s.rflags & rflags::IF);
        } else {
          EXPECT_TRUE(m.gp(m.step(kCli)));
          EXPECT_TRUE(m.gp(m.step(kSti)));
        }
      }
    }
  }
}

TEST(InterruptFlag, StiShadowOnlyWhenItOpens) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.step(kSti), Exec::Branch);
  EXPECT_TRUE(m.s.sti_shadow);
  m.s.sti_shadow = false;
  EXPECT_EQ(m.step(kSti), Exec::Branch);
  EXPECT_FALSE(m.s.sti_shadow);
}

TEST(InterruptFlag, ShadowLastsOneInstruction) {
  Fixture m(TestMode::Long64);
  EXPECT_TRUE(m.run({0xfb, 0x90}).halted());
  EXPECT_FALSE(m.s.sti_shadow);
  EXPECT_TRUE(m.run({0x8e, 0xd0, 0x90}).raised(vec::GP, 0) || !m.s.mov_ss_shadow);
  m.s.gpr[RAX] = sel::Data;
  EXPECT_TRUE(m.run({0x8e, 0xd0, 0x90}).halted());
  EXPECT_FALSE(m.s.mov_ss_shadow);
}

TEST(Hlt, NeedsCplZero) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.step(kHlt), Exec::Halt);
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step(kHlt)));
  Fixture v86(TestMode::V8086);
  EXPECT_TRUE(v86.gp(v86.step(kHlt)));
}

TEST(Smap, ClacStacNeedCplZero) {
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.ud(user.step({0x0f, 0x01, 0xca})));
  EXPECT_TRUE(user.ud(user.step({0x0f, 0x01, 0xcb})));
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.step({0x0f, 0x01, 0xcb}), Exec::Next);
  EXPECT_TRUE(m.s.rflags & rflags::AC);
  EXPECT_EQ(m.step({0x0f, 0x01, 0xca}), Exec::Next);
  EXPECT_FALSE(m.s.rflags & rflags::AC);
}

// ---- I/O ports ----

TEST(Ports, WidthsAndRegisters) {
  Fixture m(TestMode::Long64);
  m.env.port_values = {0x11223344, 0x55667788, 0x99aabbcc};
  m.s.gpr[RAX] = ~0ull;
  m.s.gpr[RDX] = 0xfffff0cf8;
  EXPECT_EQ(m.step({0xec}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0xffffffffffffff44u);
  EXPECT_EQ(m.step({0x66, 0xed}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0xffffffffffff7788u);
  EXPECT_EQ(m.step({0x48, 0xed}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0x99aabbccu);
  EXPECT_EQ(m.step({0xe6, 0x80}), Exec::Next);
  EXPECT_EQ(m.step({0x66, 0xe7, 0x81}), Exec::Next);
  EXPECT_EQ(m.step({0xef}), Exec::Next);
  const auto& p = m.env.ports;
  ASSERT_EQ(p.size(), 6u);
  EXPECT_EQ(p[0].port, 0x0cf8);
  EXPECT_EQ(p[1].size, 2u);
  EXPECT_EQ(p[2].size, 4u);
  EXPECT_EQ(p[3].port, 0x80);
  EXPECT_EQ(p[3].value, 0xccu);
  EXPECT_EQ(p[4].value, 0xbbccu);
  EXPECT_EQ(p[5].value, 0x99aabbccu);
}

TEST(Ports, ExitChangesNothing) {
  Fixture m(TestMode::Long64);
  m.env.exits_to_give = 1;
  m.s.gpr[RAX] = 1;
  EXPECT_EQ(m.step(kIn8), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Exit);
  EXPECT_EQ(m.s.gpr[RAX], 1u);
  EXPECT_EQ(m.s.rip, m.code_offset());
}

TEST(Ports, Bitmap) {
  Fixture m(TestMode::Long64, true);
  EXPECT_EQ(m.step(kIn8), Exec::Next);
  m.store<u8>(TestMachine::kTss + 0x68 + 12, 1);  // port 0x60
  EXPECT_TRUE(m.gp(m.step(kIn8)));
  EXPECT_TRUE(m.gp(m.step({0xe6, 0x60})));
  EXPECT_EQ(m.step({0xe5, 0x61}), Exec::Next);
  EXPECT_TRUE(m.gp(m.step({0x66, 0xe5, 0x5f})));  // the second of two ports
  m.s.rflags |= rflags::IOPL;
  EXPECT_EQ(m.step(kIn8), Exec::Next);
}

TEST(Ports, BitmapAcrossItsEnd) {
  Fixture m(TestMode::Long64, true);
  m.c().mode_changed();
  m.s.tr.limit = 0x68 + 12;  // the byte after port 0x60's must be inside, too
  EXPECT_FALSE(io_allowed(m.c(), 0x60, 1));
  EXPECT_EQ(m.c().stop().vector, vec::GP);
  m.s.tr.limit = 0x68 + 13;
  EXPECT_TRUE(io_allowed(m.c(), 0x60, 1));
  m.s.tr.limit = 0x66;
  EXPECT_FALSE(io_allowed(m.c(), 0, 1));
  m.s.tr.limit = 0x1fff;
  EXPECT_FALSE(io_allowed(m.c(), 0xffff, 1));  // bytes past 0x1fff
  m.store<u16>(TestMachine::kTss + 0x66, 0xffff);
  EXPECT_FALSE(io_allowed(m.c(), 0, 1));
  m.s.tr.type = 3;
  EXPECT_FALSE(io_allowed(m.c(), 0, 1));
}

TEST(Ports, Virtual8086AsksTheBitmapAlways) {
  Fixture m(TestMode::V8086);
  m.store<u8>(TestMachine::kTss + 0x68 + 12, 1);
  EXPECT_TRUE(m.gp(m.step(kIn8)));  // though IOPL is 3
  Fixture real(TestMode::Real16);
  EXPECT_EQ(real.step(kIn8), Exec::Next);
}

TEST(Ports, UnmappedBitmapIsAPageFault) {
  Fixture m(TestMode::Long64, true);
  m.s.tr.base = 0x900000;
  m.unmap(0x900000);
  EXPECT_EQ(m.step(kIn8), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::PF);
  EXPECT_EQ(m.c().stop().error, 0u);  // a supervisor read
}

// ---- time and identification ----

TEST(Time, TscAndTsd) {
  Fixture m(TestMode::Long64, true);
  m.env.tsc = 0x1'0000'0000;
  m.s.msr.tsc_aux = 42;
  EXPECT_EQ(m.step(kRdtsc), Exec::Next);
  EXPECT_EQ(m.s.gpr[RDX], 1u);
  EXPECT_EQ(m.s.gpr[RAX], 10u);
  EXPECT_EQ(m.step({0x0f, 0x01, 0xf9}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RCX], 42u);
  EXPECT_EQ(m.step({0xf3, 0x0f, 0xc7, 0xf8}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 42u);
  m.s.cr4 |= cr4::TSD;
  EXPECT_TRUE(m.gp(m.step(kRdtsc)));
  EXPECT_TRUE(m.gp(m.step({0x0f, 0x01, 0xf9})));
  Fixture kernel(TestMode::Long64);
  kernel.s.cr4 |= cr4::TSD;
  EXPECT_EQ(kernel.step(kRdtsc), Exec::Next);
  EXPECT_TRUE(kernel.gp(kernel.step({0x0f, 0x33})));  // RDPMC: no counter exists
}

TEST(Cpuid, LiveBits) {
  Fixture m(TestMode::Long64);
  m.env.leaves[1] = {1, 2, 0, 1u << 9};
  m.env.leaves[7] = {0, 0, 0, 0};
  m.env.msrs[msr::APIC_BASE] = 0xfee00800;
  m.s.gpr[RAX] = 1;
  EXPECT_EQ(m.step({0x0f, 0xa2}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RCX], 1u << 27);
  EXPECT_EQ(m.s.gpr[RDX], 1u << 9);
  m.s.cr4 &= ~cr4::OSXSAVE;
  m.env.msrs[msr::APIC_BASE] = 0xfee00000;
  m.s.gpr[RAX] = 0xffffffff'00000001;
  EXPECT_EQ(m.step({0x0f, 0xa2}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 1u);
  EXPECT_EQ(m.s.gpr[RBX], 2u);
  EXPECT_EQ(m.s.gpr[RCX], 0u);
  EXPECT_EQ(m.s.gpr[RDX], 0u);
  m.s.cr4 |= cr4::PKE;
  m.s.gpr[RAX] = 7;
  m.s.gpr[RCX] = 0;
  EXPECT_EQ(m.step({0x0f, 0xa2}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RCX], 1u << 4);
}

/// Leaf 0xd by subleaf, which TestEnvironment does not tell apart.
class XsaveEnvironment final : public Environment {
 public:
  Answer port_in(u16, unsigned, u32*) override { return Answer::Fault; }
  Answer port_out(u16, unsigned, u32) override { return Answer::Fault; }
  Answer rdmsr(u32, u64*) override { return Answer::Fault; }
  Answer wrmsr(u32, u64) override { return Answer::Fault; }
  void cpuid(u32, u32 subleaf, u32 out[4]) override {
    const u32 rows[4][4] = {{7, 0, 832, 0}, {0xf, 0, 0, 0}, {256, 576, 0, 0}, {64, 960, 2, 0}};
    for (unsigned i = 0; i < 4; ++i) out[i] = subleaf == 0 || subleaf < 4 ? rows[subleaf][i] : 0;
  }
  u64 rdtsc() override { return 0; }
  u64 get_cr8() override { return 0; }
  void set_cr8(u64) override {}
  Answer hypercall(u64, const u64[4], u64*) override { return Answer::Done; }
  void nmi_unblocked() override {}
  void retired() override {}
  bool mmio_read(Gpa, void*, unsigned) override { return false; }
  bool mmio_write(Gpa, const void*, unsigned) override { return false; }
};

TEST(Cpuid, XsaveSizes) {
  Fixture m(TestMode::Long64);
  XsaveEnvironment env;
  Context c(m.s, m.mmu(), env);
  u32 r[4];
  m.s.xcr0 = 3;
  guest_cpuid(c, 0xd, 0, r);
  EXPECT_EQ(r[1], 576u);
  EXPECT_EQ(r[2], 832u);
  m.s.xcr0 = 7;
  guest_cpuid(c, 0xd, 0, r);
  EXPECT_EQ(r[1], 832u);
  guest_cpuid(c, 0xd, 1, r);
  EXPECT_EQ(r[1], 832u);
  m.s.xcr0 = 0xf;
  guest_cpuid(c, 0xd, 0, r);
  EXPECT_EQ(r[1], 1024u);
  guest_cpuid(c, 0xd, 1, r);
  EXPECT_EQ(r[1], 896u);
  m.s.xcr0 = 9;
  guest_cpuid(c, 0xd, 1, r);
  EXPECT_EQ(r[1], 640u);
}

TEST(Cpuid, Faulting) {
  Fixture m(TestMode::Long64, true);
  m.s.msr.misc_features = 1;
  EXPECT_TRUE(m.gp(m.step({0x0f, 0xa2})));
  Fixture kernel(TestMode::Long64);
  kernel.s.msr.misc_features = 1;
  EXPECT_EQ(kernel.step({0x0f, 0xa2}), Exec::Next);
}

TEST(Random, SetsCarryAndValues) {
  Fixture m(TestMode::Long64, true);
  m.s.rflags |= rflags::ZF | rflags::OF;
  u64 seen = 0;
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(m.step({0x48, 0x0f, 0xc7, 0xf0}), Exec::Next);
    EXPECT_EQ(m.s.rflags & rflags::STATUS, u64{rflags::CF});
    seen |= m.s.gpr[RAX];
  }
  EXPECT_NE(seen >> 32, 0u);
  m.s.gpr[RAX] = ~0ull;
  EXPECT_EQ(m.step({0x0f, 0xc7, 0xf8}), Exec::Next);  // rdseed eax
  EXPECT_EQ(m.s.gpr[RAX] >> 32, 0u);
}

// ---- caches ----

TEST(Caches, PrivilegeAndPermissions) {
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step({0x0f, 0x08})));
  EXPECT_TRUE(user.gp(user.step({0x0f, 0x09})));
  user.unmap(0x700000);
  user.s.gpr[RBX] = 0x700000;
  for (const Bytes& code : {Bytes{0x0f, 0xae, 0x3b}, Bytes{0x66, 0x0f, 0xae, 0x3b}, Bytes{0x66, 0x0f, 0xae, 0x33}}) {
    EXPECT_EQ(user.step(code), Exec::Stop);
    EXPECT_EQ(user.c().stop().vector, vec::PF);
    EXPECT_EQ(user.c().stop().error, u32{pferr::U});
  }
  user.s.gpr[RBX] = TestMachine::kData;
  for (const Bytes& code : {Bytes{0x0f, 0xae, 0x3b}, Bytes{0x66, 0x0f, 0xae, 0x3b}, Bytes{0x66, 0x0f, 0xae, 0x33},
                            Bytes{0x0f, 0xae, 0xe8}, Bytes{0x0f, 0xae, 0xf0}, Bytes{0x0f, 0xae, 0xf8}})
    EXPECT_EQ(user.step(code), Exec::Next);
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.step({0x0f, 0x09}), Exec::Next);
}

TEST(Caches, ClzeroClearsTheLine) {
  Fixture m(TestMode::Long64);
  std::memset(m.ram(TestMachine::kData), 0xff, 256);
  m.s.gpr[RAX] = TestMachine::kData + 64 + 13;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xfc}), Exec::Next);
  for (u32 i = 0; i < 256; ++i) EXPECT_EQ(m.load<u8>(TestMachine::kData + i), i >= 64 && i < 128 ? 0 : 0xff);
  m.map(0x700000, 0x700000, 5);
  m.s.gpr[RAX] = 0x700000;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xfc}), Exec::Stop);
  EXPECT_EQ(m.c().stop().error, pferr::P | pferr::W);
}

TEST(Monitor, PrivilegeFeatureAndHints) {
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.ud(user.step({0x0f, 0x01, 0xc8})));
  EXPECT_TRUE(user.ud(user.step({0x0f, 0x01, 0xc9})));
  Fixture m(TestMode::Long64);
  m.s.gpr[RAX] = TestMachine::kData;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xc8}), Exec::Next);
  EXPECT_EQ(m.step({0x0f, 0x01, 0xc9}), Exec::Branch);
  m.s.gpr[RCX] = 2;
  EXPECT_TRUE(m.gp(m.step({0x0f, 0x01, 0xc8})));
  EXPECT_TRUE(m.gp(m.step({0x0f, 0x01, 0xc9})));
  m.c().features.has.reset(static_cast<unsigned>(Feature::Monitor));
  EXPECT_TRUE(m.ud(m.step({0x0f, 0x01, 0xc8})));
}

// ---- virtual machines ----

TEST(Hypercall, ArgumentsAndPrivilege) {
  for (const Bytes& code : {Bytes{0x0f, 0x01, 0xc1}, Bytes{0x0f, 0x01, 0xd9}}) {
    Fixture m(TestMode::Long64);
    m.env.hypercall_result = static_cast<u64>(-1000);
    m.s.gpr[RAX] = 5;
    m.s.gpr[RBX] = 1;
    m.s.gpr[RCX] = 2;
    m.s.gpr[RDX] = 3;
    m.s.gpr[RSI] = 0xffffffff00000004;
    EXPECT_EQ(m.step(code), Exec::Branch);
    EXPECT_EQ(m.s.gpr[RAX], static_cast<u64>(-1000));
    EXPECT_EQ(m.env.hypercalls[0], (std::array<u64, 5>{5, 1, 2, 3, 0xffffffff00000004}));
    Fixture legacy(TestMode::Prot32);
    legacy.env.hypercall_result = static_cast<u64>(-1000);
    EXPECT_EQ(legacy.step(code), Exec::Branch);
    EXPECT_EQ(legacy.s.gpr[RAX], static_cast<u32>(-1000));
    Fixture user(TestMode::Long64, true);
    EXPECT_EQ(user.step(code), Exec::Branch);
    EXPECT_EQ(user.s.gpr[RAX], static_cast<u64>(-1));  // -KVM_EPERM
    EXPECT_TRUE(user.env.hypercalls.empty());
  }
}

TEST(Undefined, RsmOutsideSmm) {
  for (TestMode mode : kAllModes) {
    Fixture m(mode);
    EXPECT_TRUE(m.ud(m.step({0x0f, 0xaa})));
  }
}

TEST(OperandSize, ByModeAndPrefixes) {
  struct Case { TestMode mode; Bytes code; unsigned size; };
  const Case cases[] = {
      {TestMode::Real16, {0xcb}, 2},           {TestMode::Real16, {0x66, 0xcb}, 4},
      {TestMode::Prot32, {0xcb}, 4},           {TestMode::Prot32, {0x66, 0xcb}, 2},
      {TestMode::Long64, {0xcb}, 4},           {TestMode::Long64, {0x48, 0xcb}, 8},
      {TestMode::Long64, {0x66, 0xcb}, 2},     {TestMode::Long64, {0x66, 0x48, 0xcb}, 8},
      {TestMode::Long64, {0x48, 0x66, 0xcb}, 2}  // a REX prefix before another prefix is ignored
  };
  for (const Case& t : cases) {
    Fixture m(t.mode);
    m.c().mode_changed();
    DecodedInsn insn;
    ASSERT_EQ(decode(t.code.data(), static_cast<unsigned>(t.code.size()), m.c().code_mode, !m.c().protected_mode, false, &insn),
              DecodeResult::Ok);
    EXPECT_EQ(far_operand_size(m.c(), insn), t.size);
  }
}

}  // namespace
}  // namespace ring3::engine::test
