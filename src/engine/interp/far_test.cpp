#include <gtest/gtest.h>

#include "engine/interp/segment_load.hpp"
#include "engine/interp/test_machine.hpp"

/// Far transfers and IRET, to every mode and with every fault.
namespace ring3::engine::test {
namespace {

constexpr u16 kGate = 0x98, kTarget = 0xa0, kOther = 0xb0;  // free GDT slots; a long-mode gate takes two

struct Fixture : TestMachine {
  using TestMachine::TestMachine;
  bool lm() const { return s.long_mode(); }
  void call_gate(u16 selector, u16 target, u64 offset, u8 access, u8 parameters = 0, u32 upper_type = 0) {
    store<u64>(kGdt + (selector & ~7), (offset & 0xffff) | static_cast<u64>(target) << 16 |
                                           static_cast<u64>(parameters) << 32 | static_cast<u64>(access) << 40 |
                                           (offset >> 16 & 0xffff) << 48);
    if (lm()) store<u64>(kGdt + (selector & ~7) + 8, offset >> 32 | static_cast<u64>(upper_type) << 40);
  }
  /// CALL/JMP m16:32 through DS:[data].
  Exec far_indirect(bool call, u16 selector, u32 offset) {
    store<u32>(kData, offset);
    store<u16>(kData + 4, selector);
    s.gpr[RBX] = data_offset();
    const u8 modrm = call ? 0x1b : 0x2b;
    if (is16()) return step({0x66, 0x67, 0xff, modrm});
    return step({0xff, modrm});
  }
  Exec call(u16 selector, u32 offset) { return far_indirect(true, selector, offset); }
  Exec jmp(u16 selector, u32 offset) { return far_indirect(false, selector, offset); }
  u64 stack_linear() { return s.seg[SS].base + s.gpr[RSP]; }
  template <class T>
  void stack(std::initializer_list<u64> values) {
    u64 at = s.seg[SS].base + s.gpr[RSP];
    for (u64 v : values) {
      store<T>(at, static_cast<T>(v));
      at += sizeof(T);
    }
  }
  bool faulted(Exec e, u8 vector, u32 error) {
    const Stop& stop = c().stop();
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(stop.kind, Stop::Kind::Fault);
    EXPECT_EQ(unsigned{stop.vector}, unsigned{vector});
    EXPECT_EQ(stop.error, error);
    EXPECT_EQ(s.rip, code_offset());
    return e == Exec::Stop && stop.vector == vector && stop.error == error;
  }
};

const Bytes kIretd = {0xcf}, kIretq = {0x48, 0xcf}, kRetf = {0xcb}, kRetfq = {0x48, 0xcb};

// ---- real mode ----

TEST(FarReal, DirectJumpAndCall) {
  Fixture m(TestMode::Real16);
  EXPECT_EQ(m.step({0xea, 0x34, 0x12, 0x00, 0x20}), Exec::Branch);
  EXPECT_EQ(m.s.seg[CS].selector, 0x2000);
  EXPECT_EQ(m.s.seg[CS].base, 0x20000u);
  EXPECT_EQ(m.s.rip, 0x1234u);

  Fixture n(TestMode::Real16);
  EXPECT_EQ(n.step({0x9a, 0x34, 0x12, 0x00, 0x20}), Exec::Branch);
  EXPECT_EQ(n.s.gpr[RSP], 0xff00u - 4);
  EXPECT_EQ(n.load<u16>(0x6fefc), 5);
  EXPECT_EQ(n.load<u16>(0x6fefe), 0x4000);
}

TEST(FarReal, TargetBeyondTheLimit) {
  Fixture m(TestMode::Real16);
  EXPECT_TRUE(m.faulted(m.step({0x66, 0xea, 0x00, 0x00, 0x01, 0x00, 0x00, 0x20}), vec::GP, 0));
  EXPECT_EQ(m.s.seg[CS].selector, 0x4000);
}

TEST(FarReal, ReturnWithImmediate) {
  Fixture m(TestMode::Real16);
  m.stack<u16>({0x1111, 0x2222});
  EXPECT_EQ(m.step({0xca, 0x08, 0x00}), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x1111u);
  EXPECT_EQ(m.s.seg[CS].base, 0x22220u);
  EXPECT_EQ(m.s.gpr[RSP], 0xff00u + 12);
}

TEST(FarReal, Iret) {
  Fixture m(TestMode::Real16);
  m.stack<u16>({0x1111, 0x2222, 0xffff});
  EXPECT_EQ(m.step({0xcf}), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x1111u);
  EXPECT_EQ(m.s.rflags, 0x7fd7u);
  EXPECT_EQ(m.s.gpr[RSP], 0xff06u);
}

TEST(FarReal, IretdKeepsVmAndVif) {
  Fixture m(TestMode::Real16);
  m.stack<u32>({0x1111, 0x2222, 0xffffffff});
  EXPECT_EQ(m.step({0x66, 0xcf}), Exec::Branch);
  EXPECT_EQ(m.s.rflags, 0x257fd7u);
}

// ---- code segments ----

TEST(FarCode, JumpAndCallKeepTheLevel) {
  Fixture m(TestMode::Prot32, true);
  EXPECT_EQ(m.jmp(sel::Code32User & ~3, 0x5678), Exec::Branch);
  EXPECT_EQ(m.s.seg[CS].selector, sel::Code32User);
  EXPECT_EQ(m.s.rip, 0x5678u);

  Fixture n(TestMode::Prot32);
  EXPECT_EQ(n.call(sel::Code32, 0x5678), Exec::Branch);
  EXPECT_EQ(n.load<u32>(n.s.gpr[RSP]), n.code_offset() + 2);
  EXPECT_EQ(n.load<u32>(n.s.gpr[RSP] + 4), sel::Code32);
}

TEST(FarCode, Faults) {
  struct Case { const char* what; u16 selector; u8 access; u8 flags; u32 offset; u8 vector; u32 error; };
  const Case cases[] = {
      {"null", 3, 0, 0, 0, vec::GP, 0},
      {"beyond the GDT", 0x1000, 0, 0, 0, vec::GP, 0x1000},
      {"no LDT", 0x9c, 0, 0, 0, vec::GP, 0x9c},
      {"data", kTarget, 0x93, 0xc, 0, vec::GP, kTarget},
      {"RPL above CPL", kTarget | 1, 0x9b, 0xc, 0, vec::GP, kTarget},
      {"DPL above CPL", kTarget, 0xfb, 0xc, 0, vec::GP, kTarget},
      {"conforming, DPL above CPL", kTarget, 0xff, 0xc, 0, vec::GP, kTarget},
      {"not present", kTarget, 0x1b, 0xc, 0, vec::NP, kTarget},
      {"offset beyond the limit", kTarget, 0x9b, 0x4, 0x100000, vec::GP, 0},
      {"LDT descriptor", kTarget, 0x82, 0, 0, vec::GP, kTarget},
      {"interrupt gate", kTarget, 0x8e, 0, 0, vec::GP, kTarget},
      {"busy TSS", kTarget, 0x8b, 0, 0, vec::GP, kTarget},
      {"TSS not present", kTarget, 0x09, 0, 0, vec::NP, kTarget},
  };
  for (const Case& t : cases) {
    for (bool call : {false, true}) {
      SCOPED_TRACE(t.what);
      Fixture m(TestMode::Prot32);
      m.s.ldtr.unusable = 1;
      m.set_gdt(kTarget, 0, 0xfffff, t.access, t.flags);
      EXPECT_TRUE(m.faulted(m.far_indirect(call, t.selector, t.offset), t.vector, t.error));
      EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
      EXPECT_EQ(m.s.seg[CS].selector, sel::Code32);
    }
  }
}

TEST(FarCode, LongModeReservedBitsAndModeSwitch) {
  Fixture m(TestMode::Long64);
  m.set_gdt(kTarget, 0, 0xfffff, 0x9b, 0xe);  // L and D
  EXPECT_TRUE(m.faulted(m.jmp(kTarget, 0), vec::GP, kTarget));
  EXPECT_EQ(m.jmp(sel::Code32, 0x1000), Exec::Branch);  // to compatibility mode
  EXPECT_FALSE(m.c().code64);
  EXPECT_EQ(m.c().code_mode, CodeMode::Bits32);
  Fixture n(TestMode::Compat32);
  EXPECT_EQ(n.jmp(sel::Code64, 0x1000), Exec::Branch);
  EXPECT_TRUE(n.c().code64);
}

TEST(FarCode, SixtyFourBitOperand) {
  Fixture m(TestMode::Long64);
  m.store<u64>(TestMachine::kData, 0x7fff'1234'5678);
  m.store<u16>(TestMachine::kData + 8, sel::Code64);
  m.s.gpr[RBX] = TestMachine::kData;
  EXPECT_EQ(m.step({0x48, 0xff, 0x2b}), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x7fff'1234'5678u);
  m.store<u64>(TestMachine::kData, 0x8000'0000'0000);
  EXPECT_TRUE(m.faulted(m.step({0x48, 0xff, 0x1b}), vec::GP, 0));
}

TEST(FarCode, CallWithAnUnmappedStackChangesNothing) {
  Fixture m(TestMode::Prot32);
  m.s.gpr[RSP] = 0x900000;
  m.unmap(0x8ff000);
  EXPECT_TRUE(m.faulted(m.call(sel::Code32, 0), vec::PF, pferr::W));
  EXPECT_EQ(m.c().stop().payload, 0x8ffff8u);
  EXPECT_EQ(m.s.gpr[RSP], 0x900000u);
}

TEST(FarCode, AccessedBit) {
  Fixture m(TestMode::Prot32);
  m.set_gdt(kTarget, 0, 0xfffff, 0x9a, 0xc);
  EXPECT_EQ(m.jmp(kTarget, 0), Exec::Branch);
  EXPECT_EQ(m.load<u8>(TestMachine::kGdt + kTarget + 5), 0x9b);
}

// ---- call gates ----

TEST(CallGate, SameLevel) {
  Fixture m(TestMode::Prot32);
  m.call_gate(kGate, sel::Code32, 0x12345, 0x8c);
  EXPECT_EQ(m.call(kGate, 0xdeadbeef), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x12345u);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 8);
  Fixture n(TestMode::Prot32);
  n.call_gate(kGate, sel::Code32, 0x12345, 0x84);  // 16-bit
  EXPECT_EQ(n.call(kGate, 0), Exec::Branch);
  EXPECT_EQ(n.s.rip, 0x2345u);
  EXPECT_EQ(n.s.gpr[RSP], TestMachine::kStackTop - 4);
}

TEST(CallGate, InnerLevelCopiesParameters) {
  Fixture m(TestMode::Prot32, true);
  m.call_gate(kGate, sel::Code32, 0x12345, 0xec, 3);
  m.stack<u32>({11, 22, 33, 44});
  EXPECT_EQ(m.call(kGate | 3, 0), Exec::Branch);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStack0 - 28);
  const u32 expected[] = {static_cast<u32>(m.code_offset() + 2), sel::Code32User, 11, 22, 33, TestMachine::kStackTop,
                          sel::DataUser};
  for (unsigned i = 0; i < 7; ++i) EXPECT_EQ(m.load<u32>(m.s.gpr[RSP] + 4 * i), expected[i]) << i;

  // and back, with the parameters released on both stacks
  EXPECT_EQ(m.step({0xca, 12, 0}), Exec::Branch);
  EXPECT_EQ(m.s.cpl(), 3);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop + 12u);
  EXPECT_EQ(m.s.seg[SS].selector, sel::DataUser);
}

TEST(CallGate, InnerLevelLongMode) {
  Fixture m(TestMode::Long64, true);
  m.call_gate(kGate, sel::Code64, 0x7fff'0000'0010, 0xec);
  EXPECT_EQ(m.call(kGate | 3, 0), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x7fff'0000'0010u);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.s.seg[SS].selector, 0);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStack0 - 32);
  EXPECT_EQ(m.load<u64>(m.s.gpr[RSP] + 24), sel::DataUser);
}

TEST(CallGate, FromCompatibilityModePushes64Bits) {
  Fixture m(TestMode::Compat32);
  m.call_gate(kGate, sel::Code64, 0x12345, 0x8c);
  EXPECT_EQ(m.call(kGate, 0), Exec::Branch);
  EXPECT_TRUE(m.c().code64);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 16);
}

TEST(CallGate, JumpDoesNotChangeTheLevel) {
  Fixture m(TestMode::Prot32, true);
  m.call_gate(kGate, sel::Code32, 0, 0xec);
  EXPECT_TRUE(m.faulted(m.jmp(kGate | 3, 0), vec::GP, sel::Code32));
}

TEST(CallGate, Faults) {
  struct Case { const char* what; TestMode mode; u16 rpl; u16 target; u64 offset; u8 access; u32 upper; u8 vector; u32 error; };
  const Case cases[] = {
      {"gate DPL", TestMode::Prot32, 3, sel::Code32, 0, 0x8c, 0, vec::GP, kGate},
      {"gate not present", TestMode::Prot32, 3, sel::Code32, 0, 0x6c, 0, vec::NP, kGate},
      {"null target", TestMode::Prot32, 3, 2, 0, 0xec, 0, vec::GP, 0},
      {"target beyond the GDT", TestMode::Prot32, 3, 0x1000, 0, 0xec, 0, vec::GP, 0x1000},
      {"data target", TestMode::Prot32, 3, sel::Data, 0, 0xec, 0, vec::GP, sel::Data},
      {"target not present", TestMode::Prot32, 3, kOther, 0, 0xec, 0, vec::NP, kOther},
      {"type of the upper half", TestMode::Long64, 3, sel::Code64, 0, 0xec, 0xc, vec::GP, kGate},
      {"32-bit target in long mode", TestMode::Long64, 3, sel::Code32, 0, 0xec, 0, vec::GP, sel::Code32},
      {"non-canonical target", TestMode::Long64, 3, sel::Code64, 0x8000'0000'0000, 0xec, 0, vec::GP, 0},
      {"16-bit gate in long mode", TestMode::Long64, 3, sel::Code64, 0, 0xe4, 0, vec::GP, kGate},
      {"task gate in long mode", TestMode::Long64, 3, sel::Tss, 0, 0xe5, 0, vec::GP, kGate},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(t.mode, true);
    m.set_gdt(kOther, 0, 0xfffff, 0x1b, 0xc);
    m.call_gate(kGate, t.target, t.offset, t.access, 0, t.upper);
    EXPECT_TRUE(m.faulted(m.call(static_cast<u16>(kGate | t.rpl), 0), t.vector, t.error));
    EXPECT_EQ(m.s.cpl(), 3);
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
  }
}

TEST(CallGate, NewStackFaults) {
  struct Case { const char* what; u32 ss; u32 esp; u8 access; u8 vector; u32 error; };
  const Case cases[] = {
      {"null SS", 0, 0x1000, 0, vec::TS, 0},
      {"RPL", kOther | 1, 0x1000, 0x93, vec::TS, kOther},
      {"read-only", kOther, 0x1000, 0x91, vec::TS, kOther},
      {"not present", kOther, 0x1000, 0x13, vec::SS, kOther},
      {"beyond its limit", kOther, 0xff00'0000, 0x93, vec::SS, kOther},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Prot32, true);
    m.set_gdt(kOther, 0, 0xffff, t.access, 0x4);
    m.store<u32>(TestMachine::kTss + 4, t.esp);
    m.store<u32>(TestMachine::kTss + 8, t.ss);
    m.call_gate(kGate, sel::Code32, 0, 0xec);
    EXPECT_TRUE(m.faulted(m.call(kGate | 3, 0), t.vector, t.error));
    EXPECT_EQ(m.s.cpl(), 3);
  }
  Fixture m(TestMode::Prot32, true);
  m.s.tr.limit = 8;
  m.call_gate(kGate, sel::Code32, 0, 0xec);
  EXPECT_TRUE(m.faulted(m.call(kGate | 3, 0), vec::TS, sel::Tss));
}

TEST(CallGate, PageFaultOnTheNewStackChangesNothing) {
  Fixture m(TestMode::Prot32, true);
  m.call_gate(kGate, sel::Code32, 0, 0xec, 2);
  m.unmap(TestMachine::kStack0 - 0x1000);
  EXPECT_TRUE(m.faulted(m.call(kGate | 3, 0), vec::PF, pferr::W));  // as a supervisor write
  EXPECT_EQ(m.s.cpl(), 3);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
  EXPECT_EQ(m.s.seg[SS].selector, sel::DataUser);
}

// ---- RETF ----

TEST(RetFar, SameAndOuterLevel) {
  Fixture m(TestMode::Prot32);
  m.stack<u32>({0x5678, sel::Code32});
  EXPECT_EQ(m.step(kRetf), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x5678u);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop + 8u);

  Fixture n(TestMode::Prot32);
  n.stack<u32>({0x5678, sel::Code32User, 0x1000, sel::DataUser});
  EXPECT_EQ(n.step(kRetf), Exec::Branch);
  EXPECT_EQ(n.s.cpl(), 3);
  EXPECT_EQ(n.s.gpr[RSP], 0x1000u);
  for (Seg r : {DS, ES, FS, GS}) EXPECT_TRUE(n.s.seg[r].unusable);  // DPL 0 data may not stay
}

TEST(RetFar, LongMode) {
  Fixture m(TestMode::Long64);
  m.stack<u64>({0x7fff'0000'1000, sel::Code64User, 0x7fff'0000'2000, sel::DataUser});
  EXPECT_EQ(m.step(kRetfq), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x7fff'0000'1000u);
  EXPECT_EQ(m.s.gpr[RSP], 0x7fff'0000'2000u);
  Fixture n(TestMode::Long64);
  n.stack<u64>({0x8000'0000'0000, sel::Code64});
  EXPECT_TRUE(n.faulted(n.step(kRetfq), vec::GP, 0));
}

TEST(RetFar, Faults) {
  struct Case { const char* what; u16 cs; u8 access; u16 ss; u8 ss_access; u8 vector; u32 error; };
  const Case cases[] = {
      {"null CS", 0, 0, 0, 0, vec::GP, 0},
      {"CS beyond the GDT", 0x1003, 0, 0, 0, vec::GP, 0x1000},
      {"CS is data", kTarget, 0x93, 0, 0, vec::GP, kTarget},
      {"CS DPL is not its RPL", kTarget | 3, 0x9b, 0, 0, vec::GP, kTarget},
      {"conforming CS, DPL above RPL", kTarget | 1, 0xdf, 0, 0, vec::GP, kTarget},
      {"CS not present", kTarget | 3, 0x7b, 0, 0, vec::NP, kTarget},
      {"null SS", kTarget | 3, 0xfb, 0, 0, vec::GP, 0},
      {"SS RPL", kTarget | 3, 0xfb, kOther, 0xf3, vec::GP, kOther},
      {"SS DPL", kTarget | 3, 0xfb, kOther | 3, 0x93, vec::GP, kOther},
      {"SS read-only", kTarget | 3, 0xfb, kOther | 3, 0xf1, vec::GP, kOther},
      {"SS not present", kTarget | 3, 0xfb, kOther | 3, 0x73, vec::SS, kOther},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Prot32);
    m.set_gdt(kTarget, 0, 0xfffff, t.access, 0xc);
    m.set_gdt(kOther, 0, 0xfffff, t.ss_access, 0xc);
    m.stack<u32>({0x5678, t.cs, 0x1000, t.ss});
    EXPECT_TRUE(m.faulted(m.step(kRetf), t.vector, t.error));
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
    // IRET checks the same.
    m.stack<u32>({0x5678, t.cs, 2, 0x1000, t.ss});
    EXPECT_TRUE(m.faulted(m.step(kIretd), t.vector, t.error));
  }
}

TEST(RetFar, NotToAnInnerLevel) {
  Fixture m(TestMode::Prot32, true);
  m.stack<u32>({0x5678, sel::Code32});
  EXPECT_TRUE(m.faulted(m.step(kRetf), vec::GP, sel::Code32));
}

TEST(RetFar, StackLimit) {
  Fixture m(TestMode::Prot32);
  m.s.seg[SS].limit = TestMachine::kStackTop + 6;
  m.stack<u32>({0x5678, sel::Code32});
  EXPECT_TRUE(m.faulted(m.step(kRetf), vec::SS, 0));
}

// ---- IRET ----

TEST(Iret, SameLevelProtected) {
  Fixture m(TestMode::Prot32);
  m.s.nmi_blocked = true;
  m.stack<u32>({0x5678, sel::Code32, 0x3dffd7});
  EXPECT_EQ(m.step(kIretd), Exec::Branch);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop + 12u);
  EXPECT_FALSE(m.s.nmi_blocked);
  EXPECT_EQ(m.env.nmi_unblocks, 1u);
}

TEST(Iret, FlagsByLevel) {
  // CPL 0 may change everything but VM (and VM only with a stack to return to).
  Fixture m(TestMode::Prot32);
  m.stack<u32>({0x5678, sel::Code32, 0x3fffff & ~0x20000});
  EXPECT_EQ(m.step(kIretd), Exec::Branch);
  EXPECT_EQ(m.s.rflags, 0x3d7fd7u);
  // CPL 3 with IOPL 0 changes neither IF nor IOPL, VIF, VIP.
  Fixture n(TestMode::Prot32, true);
  n.stack<u32>({0x5678, sel::Code32User, 0x3fffff});
  EXPECT_EQ(n.step(kIretd), Exec::Branch);
  EXPECT_EQ(n.s.rflags, 0x254dd7u);
  // A 16-bit IRET leaves the upper half.
  Fixture p(TestMode::Prot32);
  p.s.rflags |= rflags::AC | rflags::ID;
  p.stack<u16>({0x5678, sel::Code32, 0});
  EXPECT_EQ(p.step({0x66, 0xcf}), Exec::Branch);
  EXPECT_EQ(p.s.rflags, rflags::AC | rflags::ID | rflags::FIXED1);
}

TEST(Iret, OuterLevelProtected) {
  Fixture m(TestMode::Prot32);
  m.stack<u32>({0x5678, sel::Code32User, 0x202, 0x9000, sel::DataUser});
  EXPECT_EQ(m.step(kIretd), Exec::Branch);
  EXPECT_EQ(m.s.cpl(), 3);
  EXPECT_EQ(m.c().cpl, 3);
  EXPECT_EQ(m.s.gpr[RSP], 0x9000u);
  EXPECT_EQ(m.s.rflags, 0x202u);
  EXPECT_TRUE(m.s.seg[DS].unusable);
}

TEST(Iret, ToVirtual8086) {
  Fixture m(TestMode::Prot32);
  m.stack<u32>({0x5678, 0x1111, 0x23202, 0xfff0, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666});
  EXPECT_EQ(m.step(kIretd), Exec::Branch);
  EXPECT_TRUE(m.s.v8086());
  EXPECT_EQ(m.c().cpl, 3);
  EXPECT_EQ(m.s.rip, 0x5678u);
  EXPECT_EQ(m.s.seg[CS].base, 0x11110u);
  EXPECT_EQ(m.s.gpr[RSP], 0xfff0u);
  EXPECT_EQ(m.s.seg[SS].selector, 0x2222);
  EXPECT_EQ(m.s.seg[ES].selector, 0x3333);
  EXPECT_EQ(m.s.seg[DS].selector, 0x4444);
  EXPECT_EQ(m.s.seg[FS].selector, 0x5555);
  EXPECT_EQ(m.s.seg[GS].selector, 0x6666);
  EXPECT_EQ(m.s.seg[GS].limit, 0xffffu);
  EXPECT_EQ(m.c().code_mode, CodeMode::Bits16);

  Fixture n(TestMode::Prot32);
  n.stack<u32>({0x10000, 0x1111, 0x23202, 0xfff0, 0x2222, 0, 0, 0, 0});
  EXPECT_TRUE(n.faulted(n.step(kIretd), vec::GP, 0));
  EXPECT_FALSE(n.s.v8086());
}

TEST(Iret, InVirtual8086NeedsIopl) {
  Fixture m(TestMode::V8086);
  m.stack<u16>({0x5678, 0x1111, 0x0202});
  EXPECT_EQ(m.step({0xcf}), Exec::Branch);
  EXPECT_EQ(m.s.rflags, rflags::VM | rflags::IOPL | rflags::IF | rflags::FIXED1);
  Fixture n(TestMode::V8086);
  n.s.rflags &= ~rflags::IOPL;
  n.stack<u16>({0x5678, 0x1111, 0x0202});
  EXPECT_TRUE(n.faulted(n.step({0xcf}), vec::GP, 0));
}

TEST(Iret, LongModeAlwaysPopsTheStack) {
  Fixture m(TestMode::Long64);
  m.stack<u64>({0x7fff'0000'1000, sel::Code64, 0x202, 0x7fff'0000'2000, sel::Data});
  EXPECT_EQ(m.step(kIretq), Exec::Branch);
  EXPECT_EQ(m.s.gpr[RSP], 0x7fff'0000'2000u);
  // A null SS is legal when the return stays below CPL 3 in 64-bit mode.
  Fixture n(TestMode::Long64);
  n.stack<u64>({0x1000, sel::Code64, 0x202, 0x2000, 0});
  EXPECT_EQ(n.step(kIretq), Exec::Branch);
  EXPECT_TRUE(n.s.seg[SS].unusable);
  EXPECT_EQ(n.s.cpl(), 0);
  // but not at CPL 3, nor for compatibility mode
  Fixture p(TestMode::Long64);
  p.stack<u64>({0x1000, sel::Code64User, 0x202, 0x2000, 3});
  EXPECT_TRUE(p.faulted(p.step(kIretq), vec::GP, 0));
  Fixture q(TestMode::Long64);
  q.stack<u64>({0x1000, sel::Code32, 0x202, 0x2000, 0});
  EXPECT_TRUE(q.faulted(q.step(kIretq), vec::GP, 0));
}

TEST(Iret, LongModeToUserAndCompatibility) {
  Fixture m(TestMode::Long64);
  m.s.seg[FS].selector = 0;
  m.s.seg[FS].unusable = 1;
  m.s.seg[FS].base = 0x1234'5678'9000;
  m.s.seg[GS].selector = 3;
  m.s.seg[GS].unusable = 1;
  m.stack<u64>({0x7fff'0000'1000, sel::Code64User, 0x202, 0x7fff'0000'2000, sel::DataUser});
  EXPECT_EQ(m.step(kIretq), Exec::Branch);
  EXPECT_EQ(m.s.cpl(), 3);
  EXPECT_TRUE(m.c().code64);
  EXPECT_EQ(m.s.seg[FS].base, 0x1234'5678'9000u);  // a null FS keeps the base that an MSR gave it
  EXPECT_EQ(m.s.seg[GS].selector, 0);              // and null is 0 to the outer level

  Fixture n(TestMode::Long64);
  n.stack<u64>({0x1000, sel::Code32User, 0x202, 0x2000, sel::DataUser});
  EXPECT_EQ(n.step(kIretq), Exec::Branch);
  EXPECT_FALSE(n.c().code64);
  EXPECT_EQ(n.c().code_mode, CodeMode::Bits32);
}

TEST(Iret, ToASixteenBitStackLoadsSpOnly) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RSP] = 0x6fe00;
  m.stack<u64>({0x1000, sel::Code32User, 0x202, 0xabcd1234, sel::Stack16User});
  EXPECT_EQ(m.step(kIretq), Exec::Branch);
  EXPECT_EQ(m.s.gpr[RSP], 0x61234u);
}

TEST(Iret, LongModeFaults) {
  Fixture m(TestMode::Long64);
  m.stack<u64>({0x8000'0000'0000, sel::Code64, 0x202, 0x1000, sel::Data});
  EXPECT_TRUE(m.faulted(m.step(kIretq), vec::GP, 0));
  Fixture n(TestMode::Long64);
  n.s.rflags |= rflags::NT;
  EXPECT_TRUE(n.faulted(n.step(kIretq), vec::GP, 0));
}

TEST(Iret, PageFaultLeavesStateButUnblocksNmis) {
  Fixture m(TestMode::Long64);
  m.s.nmi_blocked = true;
  m.s.gpr[RSP] = 0x7ffff0;
  m.unmap(0x800000);
  EXPECT_TRUE(m.faulted(m.step(kIretq), vec::PF, 0));
  EXPECT_EQ(m.s.gpr[RSP], 0x7ffff0u);
  EXPECT_FALSE(m.s.nmi_blocked);
}

TEST(Iret, WaitingForTheVmmIsNoAttempt) {
  Fixture m(TestMode::Long64);
  m.map(0x800000, 0xf0000000, 7);
  m.s.nmi_blocked = true;
  m.s.gpr[RSP] = 0x800000;
  m.env.exits_to_give = 1;
  EXPECT_EQ(m.step(kIretq), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Exit);
  EXPECT_TRUE(m.s.nmi_blocked);
}

// ---- INT ----

TEST(SoftwareInterrupt, IsATrapWithItsLength) {
  Fixture m(TestMode::Prot32);
  EXPECT_EQ(m.step({0xcd, 0x80}), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Trap);
  EXPECT_TRUE(m.c().stop().soft);
  EXPECT_EQ(m.c().stop().vector, 0x80);
  EXPECT_EQ(m.c().stop().payload, 2u);
  EXPECT_EQ(m.s.rip, m.code_offset() + 2);
  EXPECT_EQ(m.step({0xcc}), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::BP);
  EXPECT_EQ(m.step({0xf1}), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::DB);
  EXPECT_FALSE(m.c().stop().soft);
}

TEST(SoftwareInterrupt, IntoAndVirtual8086) {
  Fixture m(TestMode::Prot32);
  EXPECT_EQ(m.step({0xce}), Exec::Next);
  m.s.rflags |= rflags::OF;
  EXPECT_EQ(m.step({0xce}), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::OF);
  Fixture n(TestMode::V8086);
  n.s.rflags &= ~rflags::IOPL;
  EXPECT_TRUE(n.faulted(n.step({0xcd, 0x21}), vec::GP, 0));
  EXPECT_EQ(n.step({0xcc}), Exec::Stop);  // INT3 does not ask IOPL
  EXPECT_EQ(n.c().stop().kind, Stop::Kind::Trap);
}

}  // namespace
}  // namespace ring3::engine::test
