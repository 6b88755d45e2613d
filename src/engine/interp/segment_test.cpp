#include <gtest/gtest.h>

#include "engine/interp/segment_load.hpp"
#include "engine/interp/test_machine.hpp"

/// Segment registers and descriptor tables, with every fault.
namespace ring3::engine::test {
namespace {

constexpr u16 kFree = 0x98;  // two slots of the GDT are free from here

struct Fixture : TestMachine {
  using TestMachine::TestMachine;
  bool faulted(Exec e, u8 vector, u32 error) {
    const Stop& stop = c().stop();
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(stop.kind, Stop::Kind::Fault);
    EXPECT_EQ(unsigned{stop.vector}, unsigned{vector});
    EXPECT_EQ(stop.error, error);
    return e == Exec::Stop && stop.vector == vector && stop.error == error;
  }
  bool undefined(Exec e) {
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(unsigned{c().stop().vector}, unsigned{vec::UD});
    return e == Exec::Stop && c().stop().vector == vec::UD && !c().stop().has_error;
  }
  Exec mov(Seg seg, u16 selector) {
    s.gpr[RAX] = selector;
    return step({0x8e, static_cast<u8>(0xc0 | seg << 3)});
  }
  u8 access(u16 selector) { return load<u8>(kGdt + (selector & ~7) + 5); }
};

TEST(MovSeg, LoadsADescriptor) {
  Fixture m(TestMode::Prot32);
  m.set_gdt(kFree, 0x12345678, 0x1234, 0x92, 0xc);
  EXPECT_EQ(m.mov(ES, kFree | 1), Exec::Stop);  // RPL 1 > DPL 0
  EXPECT_EQ(m.mov(ES, kFree), Exec::Branch);
  const Segment& g = m.s.seg[ES];
  EXPECT_EQ(g.base, 0x12345678u);
  EXPECT_EQ(g.limit, 0x1234fffu);
  EXPECT_EQ(g.type, 3);
  EXPECT_EQ(g.unusable, 0);
  EXPECT_EQ(m.access(kFree), 0x93);
  EXPECT_FALSE(m.s.mov_ss_shadow);
}

TEST(MovSeg, AccessedBitIsSetFromUserModeInASupervisorPage) {
  Fixture m(TestMode::Prot32, true);
  m.map(TestMachine::kGdt, TestMachine::kGdt, 3);
  m.set_gdt(kFree, 0, 0xfffff, 0xf2, 0xc);
  EXPECT_EQ(m.mov(ES, kFree | 3), Exec::Branch);
  EXPECT_EQ(m.access(kFree), 0xf3);
}

TEST(MovSeg, DataFaults) {
  struct Case { const char* what; bool user; u16 selector; u8 access; u8 vector; u32 error; };
  const Case cases[] = {
      {"beyond the GDT", false, 0x1001, 0, vec::GP, 0x1000},
      {"system descriptor", false, kFree, 0x82, vec::GP, kFree},
      {"execute-only code", false, kFree, 0x98, vec::GP, kFree},
      {"RPL", false, kFree | 3, 0x92, vec::GP, kFree},
      {"CPL", true, kFree, 0x92, vec::GP, kFree},
      {"not present", false, kFree, 0x12, vec::NP, kFree},
      {"beyond the LDT", false, 0x0f, 0, vec::GP, 0x0c},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Prot32, t.user);
    m.set_gdt(kFree, 0, 0xfffff, t.access, 0xc);
    const u16 before = m.s.seg[DS].selector;
    EXPECT_TRUE(m.faulted(m.mov(DS, t.selector), t.vector, t.error));
    EXPECT_EQ(m.s.seg[DS].selector, before);
  }
}

TEST(MovSeg, ConformingCodeIgnoresLevels) {
  Fixture m(TestMode::Prot32, true);
  m.set_gdt(kFree, 0, 0xfffff, 0x9f, 0xc);
  EXPECT_EQ(m.mov(DS, kFree | 3), Exec::Branch);
}

TEST(MovSeg, FromTheLdt) {
  Fixture m(TestMode::Prot32);
  m.s.ldtr.base = 0x9000;
  m.s.ldtr.limit = 15;
  m.s.ldtr.unusable = 0;
  m.store<u64>(0x9008, TestMachine::descriptor(0x777000, 0xf, 0x93, 0));
  EXPECT_EQ(m.mov(FS, 0x0c), Exec::Branch);
  EXPECT_EQ(m.s.seg[FS].base, 0x777000u);
  EXPECT_TRUE(m.faulted(m.mov(FS, 0x14), vec::GP, 0x14));
}

TEST(MovSeg, Null) {
  Fixture m(TestMode::Prot32);
  EXPECT_EQ(m.mov(GS, 3), Exec::Branch);
  EXPECT_TRUE(m.s.seg[GS].unusable);
  EXPECT_EQ(m.s.seg[GS].selector, 3);
  EXPECT_TRUE(m.faulted(m.mov(SS, 0), vec::GP, 0));
  // AMD parts without "null clears base" keep base and limit.
  Fixture n(TestMode::Long64);
  n.s.seg[FS].base = 0x123456;
  n.c().features.null_clears_base = false;
  EXPECT_EQ(n.mov(FS, 0), Exec::Branch);
  EXPECT_EQ(n.s.seg[FS].base, 0x123456u);
  n.c().features.null_clears_base = true;
  EXPECT_EQ(n.mov(FS, 0), Exec::Branch);
  EXPECT_EQ(n.s.seg[FS].base, 0u);
}

TEST(MovSeg, StackSegment) {
  Fixture m(TestMode::Prot32);
  EXPECT_EQ(m.mov(SS, sel::Data), Exec::Branch);
  EXPECT_TRUE(m.s.mov_ss_shadow);
  EXPECT_EQ(m.mov(SS, sel::Stack16), Exec::Branch);
  EXPECT_EQ(m.c().stack_size, 2);
  struct Case { const char* what; u16 selector; u8 access; u8 vector; };
  const Case cases[] = {
      {"RPL", kFree | 1, 0x93, vec::GP},  {"DPL", kFree, 0xf3, vec::GP},     {"read-only", kFree, 0x91, vec::GP},
      {"code", kFree, 0x9b, vec::GP},     {"system", kFree, 0x82, vec::GP}, {"not present", kFree, 0x13, vec::SS},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture n(TestMode::Prot32);
    n.set_gdt(kFree, 0, 0xfffff, t.access, 0xc);
    EXPECT_TRUE(n.faulted(n.mov(SS, t.selector), t.vector, kFree));
    EXPECT_FALSE(n.s.mov_ss_shadow);
  }
}

TEST(MovSeg, NullStackSegmentIn64BitMode) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.mov(SS, 0), Exec::Branch);
  EXPECT_TRUE(m.s.seg[SS].unusable);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_TRUE(m.faulted(m.mov(SS, 1), vec::GP, 0));
  Fixture n(TestMode::Long64, true);
  EXPECT_TRUE(n.faulted(n.mov(SS, 3), vec::GP, 0));
  Fixture p(TestMode::Compat32);
  EXPECT_TRUE(p.faulted(p.mov(SS, 0), vec::GP, 0));
}

TEST(MovSeg, RealModeKeepsTheLimit) {
  Fixture m(TestMode::Real16);
  m.s.seg[ES].limit = 0xffffffff;
  m.s.seg[ES].g = 1;
  EXPECT_EQ(m.mov(ES, 0x1234), Exec::Branch);
  EXPECT_EQ(m.s.seg[ES].base, 0x12340u);
  EXPECT_EQ(m.s.seg[ES].limit, 0xffffffffu);
  EXPECT_EQ(m.mov(SS, 0x1000), Exec::Branch);
  EXPECT_TRUE(m.s.mov_ss_shadow);
}

TEST(MovSeg, Virtual8086ResetsAttributes) {
  Fixture m(TestMode::V8086);
  m.s.seg[ES].limit = 0xffffffff;
  EXPECT_EQ(m.mov(ES, 0x1234), Exec::Branch);
  EXPECT_EQ(m.s.seg[ES].limit, 0xffffu);
  EXPECT_EQ(m.s.seg[ES].dpl, 3);
}

TEST(MovSeg, CsIsUndefined) {
  Fixture m(TestMode::Prot32);
  EXPECT_TRUE(m.undefined(m.step({0x8e, 0xc8})));
}

TEST(MovSeg, Store) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RAX] = ~0ull;
  EXPECT_EQ(m.step({0x8c, 0xd8}), Exec::Next);  // mov eax, ds
  EXPECT_EQ(m.s.gpr[RAX], sel::Data);
  m.s.gpr[RAX] = ~0ull;
  EXPECT_EQ(m.step({0x66, 0x8c, 0xd8}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0xffffffffffff0000 | sel::Data);
  m.store<u32>(TestMachine::kData, 0xffffffff);
  m.s.gpr[RBX] = TestMachine::kData;
  EXPECT_EQ(m.step({0x8c, 0x1b}), Exec::Next);
  EXPECT_EQ(m.load<u32>(TestMachine::kData), 0xffff0000u | sel::Data);
}

TEST(PushPopSeg, SizesAndVendors) {
  Fixture m(TestMode::Prot32);
  m.store<u32>(TestMachine::kStackTop - 4, 0xaaaaaaaa);
  EXPECT_EQ(m.step({0x1e}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 4);
  EXPECT_EQ(m.load<u32>(TestMachine::kStackTop - 4), 0xaaaa0000u | sel::Data);
  m.c().features.amd = true;
  m.s.gpr[RSP] += 4;
  EXPECT_EQ(m.step({0x1e}), Exec::Next);
  EXPECT_EQ(m.load<u32>(TestMachine::kStackTop - 4), u32{sel::Data});
  EXPECT_EQ(m.step({0x07}), Exec::Branch);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
  EXPECT_EQ(m.s.seg[ES].selector, sel::Data);

  Fixture n(TestMode::Long64);
  EXPECT_EQ(n.step({0x0f, 0xa0}), Exec::Next);
  EXPECT_EQ(n.s.gpr[RSP], TestMachine::kStackTop - 8);
  EXPECT_EQ(n.step({0x66, 0x0f, 0xa8}), Exec::Next);
  EXPECT_EQ(n.s.gpr[RSP], TestMachine::kStackTop - 10);
}

TEST(PushPopSeg, PopFaultLeavesTheStackPointer) {
  Fixture m(TestMode::Prot32);
  m.store<u32>(TestMachine::kStackTop, 0x1000);
  EXPECT_TRUE(m.faulted(m.step({0x1f}), vec::GP, 0x1000));
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
}

TEST(PushPopSeg, PopSsShadows) {
  Fixture m(TestMode::Prot32);
  m.store<u32>(TestMachine::kStackTop, sel::Data);
  EXPECT_EQ(m.step({0x17}), Exec::Branch);
  EXPECT_TRUE(m.s.mov_ss_shadow);
}

TEST(FarPointer, LoadsBothOrNeither) {
  Fixture m(TestMode::Prot32);
  m.store<u32>(TestMachine::kData, 0x11223344);
  m.store<u16>(TestMachine::kData + 4, sel::Data16);
  m.s.gpr[RBX] = TestMachine::kData;
  EXPECT_EQ(m.step({0x0f, 0xb4, 0x03}), Exec::Branch);  // lfs eax, [ebx]
  EXPECT_EQ(m.s.gpr[RAX], 0x11223344u);
  EXPECT_EQ(m.s.seg[FS].selector, sel::Data16);
  m.store<u16>(TestMachine::kData + 4, 0x1000);
  m.s.gpr[RAX] = 7;
  EXPECT_TRUE(m.faulted(m.step({0xc5, 0x03}), vec::GP, 0x1000));
  EXPECT_EQ(m.s.gpr[RAX], 7u);

  Fixture n(TestMode::Long64);
  n.store<u64>(TestMachine::kData, 0x1122334455667788);
  n.store<u16>(TestMachine::kData + 8, sel::Data);
  n.s.gpr[RBX] = TestMachine::kData;
  EXPECT_EQ(n.step({0x48, 0x0f, 0xb2, 0x03}), Exec::Branch);  // lss rax, [rbx]
  EXPECT_EQ(n.s.gpr[RAX], 0x1122334455667788u);
}

TEST(DescriptorTables, LoadAndStore) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RBX] = TestMachine::kData;
  m.store<u16>(TestMachine::kData, 0x123);
  m.store<u64>(TestMachine::kData + 2, 0x7fff'1234'5678);
  EXPECT_EQ(m.step({0x0f, 0x01, 0x1b}), Exec::Next);  // lidt
  EXPECT_EQ(m.s.idtr.limit, 0x123);
  EXPECT_EQ(m.s.idtr.base, 0x7fff'1234'5678u);
  m.store<u64>(TestMachine::kData + 2, 0x8000'0000'0000);
  EXPECT_TRUE(m.faulted(m.step({0x0f, 0x01, 0x13}), vec::GP, 0));
  EXPECT_EQ(m.s.gdtr.base, TestMachine::kGdt);
  EXPECT_EQ(m.step({0x0f, 0x01, 0x0b}), Exec::Next);  // sidt
  EXPECT_EQ(m.load<u64>(TestMachine::kData + 2), 0x7fff'1234'5678u);

  Fixture n(TestMode::Prot32);
  n.s.gpr[RBX] = TestMachine::kData;
  n.store<u16>(TestMachine::kData, 0x123);
  n.store<u32>(TestMachine::kData + 2, 0x98765432);
  EXPECT_EQ(n.step({0x66, 0x0f, 0x01, 0x1b}), Exec::Next);
  EXPECT_EQ(n.s.idtr.base, 0x765432u);
  EXPECT_EQ(n.step({0x0f, 0x01, 0x1b}), Exec::Next);
  EXPECT_EQ(n.s.idtr.base, 0x98765432u);
}

TEST(DescriptorTables, PrivilegeAndUmip) {
  Fixture m(TestMode::Long64, true);
  m.s.gpr[RBX] = TestMachine::kData;
  EXPECT_TRUE(m.faulted(m.step({0x0f, 0x01, 0x13}), vec::GP, 0));
  EXPECT_TRUE(m.faulted(m.step({0x0f, 0x01, 0x1b}), vec::GP, 0));
  const Bytes stores[] = {{0x0f, 0x01, 0x03}, {0x0f, 0x01, 0x0b}, {0x0f, 0x00, 0xc0}, {0x0f, 0x00, 0xc8}, {0x0f, 0x01, 0xe0}};
  for (const Bytes& code : stores) {
    m.s.cr4 &= ~cr4::UMIP;
    EXPECT_EQ(m.step(code), Exec::Next);
    m.s.cr4 |= cr4::UMIP;
    EXPECT_TRUE(m.faulted(m.step(code), vec::GP, 0));
  }
}

TEST(Lldt, LoadsAndChecks) {
  Fixture m(TestMode::Long64);
  const auto lldt = [&](u16 selector) {
    m.s.gpr[RAX] = selector;
    return m.step({0x0f, 0x00, 0xd0});
  };
  m.set_gdt(kFree, 0x12345678, 0xff, 0x82, 0);
  m.store<u64>(TestMachine::kGdt + kFree + 8, 0xffff8000);
  EXPECT_EQ(lldt(kFree), Exec::Next);
  EXPECT_EQ(m.s.ldtr.base, 0xffff800012345678u);
  EXPECT_EQ(lldt(0), Exec::Next);
  EXPECT_TRUE(m.s.ldtr.unusable);
  EXPECT_TRUE(m.faulted(lldt(kFree | 4), vec::GP, kFree | 4));
  EXPECT_TRUE(m.faulted(lldt(sel::Data), vec::GP, sel::Data));
  EXPECT_TRUE(m.faulted(lldt(0x1000), vec::GP, 0x1000));
  m.store<u64>(TestMachine::kGdt + kFree + 8, 0x8000);  // not canonical
  EXPECT_TRUE(m.faulted(lldt(kFree), vec::GP, kFree));
  m.store<u64>(TestMachine::kGdt + kFree + 8, 1ull << 40);  // a type in the upper half
  EXPECT_TRUE(m.faulted(lldt(kFree), vec::GP, kFree));
  m.store<u64>(TestMachine::kGdt + kFree + 8, 0);
  m.set_gdt(kFree, 0, 0xff, 0x02, 0);
  EXPECT_TRUE(m.faulted(lldt(kFree), vec::NP, kFree));
  EXPECT_TRUE(m.faulted(lldt(0xff8), vec::GP, 0xff8));  // the upper half lies outside
}

TEST(Ltr, LoadsAndChecks) {
  Fixture m(TestMode::Long64);
  const auto ltr = [&](u16 selector) {
    m.s.gpr[RAX] = selector;
    return m.step({0x0f, 0x00, 0xd8});
  };
  m.set_gdt(kFree, 0x5000, 0x67, 0x89, 0);
  EXPECT_EQ(ltr(kFree), Exec::Next);
  EXPECT_EQ(m.access(kFree), 0x8b);
  EXPECT_EQ(m.s.tr.base, 0x5000u);
  EXPECT_EQ(m.s.tr.type, kTss32Busy);
  EXPECT_TRUE(m.faulted(ltr(kFree), vec::GP, kFree));  // busy
  EXPECT_TRUE(m.faulted(ltr(0), vec::GP, 0));
  m.set_gdt(kFree, 0x5000, 0x67, 0x09, 0);
  EXPECT_TRUE(m.faulted(ltr(kFree), vec::NP, kFree));
  m.set_gdt(kFree, 0x5000, 0x67, 0x81, 0);
  EXPECT_TRUE(m.faulted(ltr(kFree), vec::GP, kFree));  // a 16-bit TSS in long mode
  Fixture n(TestMode::Prot32);
  n.set_gdt(kFree, 0x5000, 0x2b, 0x81, 0);
  n.s.gpr[RAX] = kFree;
  EXPECT_EQ(n.step({0x0f, 0x00, 0xd8}), Exec::Next);
  EXPECT_EQ(n.s.tr.type, kTss16Busy);
}

TEST(SystemSegments, PrivilegeAndMode) {
  const Bytes all[] = {{0x0f, 0x00, 0xd0}, {0x0f, 0x00, 0xd8}};  // lldt, ltr
  for (const Bytes& code : all) {
    Fixture user(TestMode::Prot32, true);
    EXPECT_TRUE(user.faulted(user.step(code), vec::GP, 0));
  }
  const Bytes protected_only[] = {{0x0f, 0x00, 0xd0}, {0x0f, 0x00, 0xd8}, {0x0f, 0x00, 0xc0}, {0x0f, 0x00, 0xc8},
                                  {0x0f, 0x02, 0xc0}, {0x0f, 0x03, 0xc0}, {0x0f, 0x00, 0xe0}, {0x0f, 0x00, 0xe8},
                                  {0x63, 0xc0}};
  for (TestMode mode : {TestMode::Real16, TestMode::V8086})
    for (const Bytes& code : protected_only) {
      Fixture m(mode);
      EXPECT_TRUE(m.undefined(m.step(code)));
    }
}

TEST(Lar, TypesLevelsAndModes) {
  Fixture m(TestMode::Prot32);
  const auto lar = [&](u16 selector) {
    m.s.gpr[RCX] = selector;
    m.s.gpr[RAX] = 0x1111;
    EXPECT_EQ(m.step({0x0f, 0x02, 0xc1}), Exec::Next);
    return (m.s.rflags & rflags::ZF) != 0;
  };
  EXPECT_TRUE(lar(sel::Code32));
  EXPECT_EQ(m.s.gpr[RAX], 0xcf9b00u);
  EXPECT_FALSE(lar(0));
  EXPECT_EQ(m.s.gpr[RAX], 0x1111u);
  EXPECT_FALSE(lar(0x1000));
  EXPECT_FALSE(lar(sel::Data | 3));
  m.set_gdt(kFree, 0, 0, 0x8c, 0);
  EXPECT_TRUE(lar(kFree));
  m.set_gdt(kFree, 0, 0, 0x8e, 0);  // an interrupt gate
  EXPECT_FALSE(lar(kFree));
  Fixture n(TestMode::Long64);
  n.set_gdt(kFree, 0, 0, 0x85, 0);
  n.s.gpr[RCX] = kFree;
  n.s.rflags |= rflags::ZF;
  EXPECT_EQ(n.step({0x0f, 0x02, 0xc1}), Exec::Next);
  EXPECT_FALSE(n.s.rflags & rflags::ZF);
}

TEST(Lsl, LimitsInBytes) {
  Fixture m(TestMode::Prot32);
  m.s.gpr[RCX] = sel::Code32;
  EXPECT_EQ(m.step({0x0f, 0x03, 0xc1}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0xffffffffu);
  m.s.gpr[RCX] = sel::Data16;
  EXPECT_EQ(m.step({0x0f, 0x03, 0xc1}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0xffffu);
  m.set_gdt(kFree, 0, 0, 0x8c, 0);
  m.s.gpr[RCX] = kFree;
  EXPECT_EQ(m.step({0x0f, 0x03, 0xc1}), Exec::Next);
  EXPECT_FALSE(m.s.rflags & rflags::ZF);  // a gate has no limit
}

TEST(Verify, ReadAndWrite) {
  Fixture m(TestMode::Prot32);
  const auto zf = [&](u8 modrm, u16 selector) {
    m.s.gpr[RAX] = selector;
    EXPECT_EQ(m.step({0x0f, 0x00, modrm}), Exec::Next);
    return (m.s.rflags & rflags::ZF) != 0;
  };
  EXPECT_TRUE(zf(0xe0, sel::Data));
  EXPECT_TRUE(zf(0xe8, sel::Data));
  EXPECT_TRUE(zf(0xe0, sel::Code32));
  EXPECT_FALSE(zf(0xe8, sel::Code32));
  EXPECT_FALSE(zf(0xe0, sel::Tss));
  EXPECT_FALSE(zf(0xe0, 0));
  m.set_gdt(kFree, 0, 0, 0x99, 0);
  EXPECT_FALSE(zf(0xe0, kFree));  // execute-only
}

TEST(Arpl, RaisesTheRpl) {
  Fixture m(TestMode::Prot32);
  m.s.gpr[RAX] = 0x10;
  m.s.gpr[RCX] = 0x23;
  EXPECT_EQ(m.step({0x63, 0xc8}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 0x13u);
  EXPECT_TRUE(m.s.rflags & rflags::ZF);
  EXPECT_EQ(m.step({0x63, 0xc8}), Exec::Next);
  EXPECT_FALSE(m.s.rflags & rflags::ZF);
  m.store<u16>(TestMachine::kData, 0x18);
  m.s.gpr[RBX] = TestMachine::kData;
  EXPECT_EQ(m.step({0x63, 0x0b}), Exec::Next);
  EXPECT_EQ(m.load<u16>(TestMachine::kData), 0x1b);
}

TEST(Arpl, NeedsToWriteOnlyWhatChanges) {
  for (const bool amd : {false, true}) {
    TestMachine m(TestMode::Compat32, true);
    m.c().features.amd = amd;
    m.store<u16>(TestMachine::kData, 0x1a);
    m.map(TestMachine::kData, TestMachine::kData, TestMachine::kPresent | TestMachine::kUser);
    m.s.gpr[RBX] = TestMachine::kData;
    m.s.gpr[RCX] = 0x22;
    m.s.rflags |= rflags::ZF;
    EXPECT_EQ(m.step({0x63, 0x0b}), Exec::Next);
    EXPECT_FALSE(m.s.rflags & rflags::ZF);
    m.s.gpr[RCX] = 0x23;
    EXPECT_EQ(m.step({0x63, 0x0b}), Exec::Stop);
    EXPECT_EQ(m.c().stop().vector, vec::PF);
    EXPECT_EQ(m.load<u16>(TestMachine::kData), 0x1a);
  }
}

}  // namespace
}  // namespace ring3::engine::test
