#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

const Bytes kSyscall = {0x0f, 0x05}, kSysretq = {0x48, 0x0f, 0x07}, kSysretl = {0x0f, 0x07}, kSysenter = {0x0f, 0x34},
            kSysexit = {0x0f, 0x35}, kSysexitq = {0x48, 0x0f, 0x35};

struct Fixture : TestMachine {
  explicit Fixture(TestMode mode, bool user = false, bool amd = false) : TestMachine(mode, user) {
    s.msr.star = 0x0023'0010'0000'4000;
    s.msr.lstar = 0xffff'8000'0000'1000;
    s.msr.cstar = 0xffff'8000'0000'2000;
    s.msr.sfmask = rflags::IF | rflags::TF | rflags::DF;
    s.msr.sysenter_cs = 0x10;
    s.msr.sysenter_esp = 0xffff'8000'0000'3000;
    s.msr.sysenter_eip = 0xffff'8000'0000'4000;
    s.efer |= efer::SCE;
    c().features.amd = amd;
  }
  bool fault(Exec e, u8 vector) {
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(unsigned{c().stop().vector}, unsigned{vector});
    return e == Exec::Stop && c().stop().vector == vector;
  }
};

TEST(Syscall, LongMode) {
  Fixture m(TestMode::Long64, true);
  m.s.rflags |= rflags::IF | rflags::CF | rflags::RF;
  EXPECT_EQ(m.step(kSyscall), Exec::Branch);
  EXPECT_EQ(m.s.rip, m.s.msr.lstar);
  EXPECT_EQ(m.s.gpr[RCX], TestMachine::kCode + 2);
  EXPECT_EQ(m.s.gpr[R11], rflags::FIXED1 | rflags::IF | rflags::CF);
  EXPECT_EQ(m.s.rflags, rflags::FIXED1 | rflags::CF);
  EXPECT_EQ(m.s.seg[CS].selector, 0x10);
  EXPECT_EQ(m.s.seg[SS].selector, 0x18);
  EXPECT_EQ(m.s.seg[SS].limit, 0xffffffffu);
  EXPECT_EQ(m.c().cpl, 0);
  EXPECT_TRUE(m.c().code64);
}

TEST(Syscall, NeedsSceAndOnIntel64BitMode) {
  Fixture m(TestMode::Long64, true);
  m.s.efer &= ~efer::SCE;
  EXPECT_TRUE(m.fault(m.step(kSyscall), vec::UD));
  Fixture n(TestMode::Compat32, true);
  EXPECT_TRUE(n.fault(n.step(kSyscall), vec::UD));
  Fixture p(TestMode::Compat32, true, true);
  EXPECT_EQ(p.step(kSyscall), Exec::Branch);
  EXPECT_EQ(p.s.rip, p.s.msr.cstar);
  EXPECT_TRUE(p.c().code64);
}

TEST(Syscall, LegacyModeOnAmd) {
  Fixture m(TestMode::Prot32, true, true);
  m.s.rflags |= rflags::IF;
  EXPECT_EQ(m.step(kSyscall), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x4000u);
  EXPECT_EQ(m.s.gpr[RCX], TestMachine::kCode + 2);
  EXPECT_FALSE(m.s.rflags & rflags::IF);
  EXPECT_EQ(m.c().cpl, 0);
}

TEST(Sysret, ATrapFlagItSetsTrapsAtOnce) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RCX] = 0x5000;
  m.s.gpr[R11] = rflags::TF | 2;
  EXPECT_EQ(m.step(kSysretq), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Trap);
  EXPECT_EQ(m.c().stop().vector, vec::DB);
  EXPECT_EQ(m.s.rip, 0x5000u);
  EXPECT_EQ(m.c().cpl, 3);
}

TEST(Sysret, To64And32) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RCX] = 0x7fff'0000'1000;
  m.s.gpr[R11] = ~u64{rflags::TF};
  EXPECT_EQ(m.step(kSysretq), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x7fff'0000'1000u);
  EXPECT_EQ(m.s.rflags, 0x3c7ed7u);
  EXPECT_EQ(m.s.seg[CS].selector, 0x33);
  EXPECT_EQ(m.s.seg[SS].selector, 0x2b);
  EXPECT_EQ(m.c().cpl, 3);
  EXPECT_TRUE(m.c().code64);
  Fixture n(TestMode::Long64);
  n.s.gpr[RCX] = 0x1'0000'1000;
  EXPECT_EQ(n.step(kSysretl), Exec::Branch);
  EXPECT_EQ(n.s.rip, 0x1000u);
  EXPECT_EQ(n.s.seg[CS].selector, 0x23);
  EXPECT_EQ(n.c().code_mode, CodeMode::Bits32);
}

TEST(Sysret, SsAttributesByVendor) {
  for (bool amd : {false, true}) {
    Fixture m(TestMode::Long64, false, amd);
    m.s.seg[SS] = Segment{};
    m.s.seg[SS].unusable = 1;
    m.s.seg[SS].present = 0;
    m.s.gpr[RCX] = 0x1000;
    EXPECT_EQ(m.step(kSysretq), Exec::Branch);
    EXPECT_EQ(m.s.seg[SS].selector, 0x2b);
    EXPECT_EQ(m.s.seg[SS].unusable, amd ? 1 : 0);
    EXPECT_EQ(m.c().cpl, 3);
  }
}

TEST(Sysret, Faults) {
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.fault(user.step(kSysretq), vec::GP));
  Fixture m(TestMode::Long64);
  m.s.gpr[RCX] = 0x8000'0000'0000;
  EXPECT_TRUE(m.fault(m.step(kSysretq), vec::GP));
  EXPECT_EQ(m.c().cpl, 0);
  m.s.efer &= ~efer::SCE;
  EXPECT_TRUE(m.fault(m.step(kSysretq), vec::UD));
  Fixture amd(TestMode::Long64, false, true);  // there the fetch at CPL 3 faults
  amd.s.gpr[RCX] = 0x8000'0000'0000;
  EXPECT_EQ(amd.step(kSysretq), Exec::Branch);
  EXPECT_EQ(amd.c().cpl, 3);
  Fixture compat(TestMode::Compat32);
  EXPECT_TRUE(compat.fault(compat.step(kSysretl), vec::UD));
}

TEST(Sysenter, Modes) {
  Fixture m(TestMode::Prot32, true);
  m.s.rflags |= rflags::IF;
  EXPECT_EQ(m.step(kSysenter), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x4000u);
  EXPECT_EQ(m.s.gpr[RSP], 0x3000u);
  EXPECT_EQ(m.s.seg[CS].selector, 0x10);
  EXPECT_EQ(m.s.seg[SS].selector, 0x18);
  EXPECT_FALSE(m.s.rflags & rflags::IF);
  Fixture n(TestMode::Compat32, true);
  EXPECT_EQ(n.step(kSysenter), Exec::Branch);
  EXPECT_EQ(n.s.rip, n.s.msr.sysenter_eip);
  EXPECT_EQ(n.s.gpr[RSP], n.s.msr.sysenter_esp);
  EXPECT_TRUE(n.c().code64);
}

TEST(Sysenter, Faults) {
  Fixture m(TestMode::Prot32, true);
  m.s.msr.sysenter_cs = 3;
  EXPECT_TRUE(m.fault(m.step(kSysenter), vec::GP));
  for (TestMode mode : {TestMode::Long64, TestMode::Compat32}) {
    Fixture amd(mode, true, true);
    EXPECT_TRUE(amd.fault(amd.step(kSysenter), vec::UD));
  }
}

TEST(Sysexit, ModesAndFaults) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RCX] = 0x7fff'0000'2000;
  m.s.gpr[RDX] = 0x7fff'0000'1000;
  EXPECT_EQ(m.step(kSysexitq), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x7fff'0000'1000u);
  EXPECT_EQ(m.s.gpr[RSP], 0x7fff'0000'2000u);
  EXPECT_EQ(m.s.seg[CS].selector, 0x33);
  EXPECT_EQ(m.s.seg[SS].selector, 0x3b);
  Fixture n(TestMode::Prot32);
  n.s.gpr[RCX] = 0x2000;
  n.s.gpr[RDX] = 0x1000;
  EXPECT_EQ(n.step(kSysexit), Exec::Branch);
  EXPECT_EQ(n.s.seg[CS].selector, 0x23);
  EXPECT_EQ(n.s.seg[SS].selector, 0x2b);
  EXPECT_EQ(n.c().cpl, 3);
  Fixture bad(TestMode::Long64);
  bad.s.gpr[RDX] = 0x8000'0000'0000;
  EXPECT_TRUE(bad.fault(bad.step(kSysexitq), vec::GP));
  Fixture user(TestMode::Prot32, true);
  EXPECT_TRUE(user.fault(user.step(kSysexit), vec::GP));
}

TEST(Swapgs, SwapsAtCplZero) {
  Fixture m(TestMode::Long64);
  m.s.seg[GS].base = 1;
  m.s.msr.kernel_gs_base = 2;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xf8}), Exec::Next);
  EXPECT_EQ(m.s.seg[GS].base, 2u);
  EXPECT_EQ(m.s.msr.kernel_gs_base, 1u);
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.fault(user.step({0x0f, 0x01, 0xf8}), vec::GP));
  Fixture compat(TestMode::Compat32);
  EXPECT_TRUE(compat.fault(compat.step({0x0f, 0x01, 0xf8}), vec::UD));
}

TEST(FsGsBase, NeedsCr4AndCanonicalBases) {
  const Bytes rdfs = {0xf3, 0x48, 0x0f, 0xae, 0xc0}, wrgs = {0xf3, 0x48, 0x0f, 0xae, 0xd8},
              wrfs32 = {0xf3, 0x0f, 0xae, 0xd0};
  Fixture m(TestMode::Long64, true);
  EXPECT_TRUE(m.fault(m.step(rdfs), vec::UD));
  m.s.cr4 |= cr4::FSGSBASE;
  m.s.seg[FS].base = 0x7fff'1234'0000;
  EXPECT_EQ(m.step(rdfs), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0x7fff'1234'0000u);
  EXPECT_EQ(m.step(wrgs), Exec::Next);
  EXPECT_EQ(m.s.seg[GS].base, 0x7fff'1234'0000u);
  m.s.gpr[RAX] = 0x8000'1234'5678;
  EXPECT_TRUE(m.fault(m.step(wrgs), vec::GP));
  EXPECT_EQ(m.step(wrfs32), Exec::Next);
  EXPECT_EQ(m.s.seg[FS].base, 0x12345678u);
}

}  // namespace
}  // namespace ring3::engine::test
