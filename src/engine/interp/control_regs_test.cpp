#include <gtest/gtest.h>

#include "engine/interp/system.hpp"
#include "engine/interp/test_machine.hpp"

/// Control and debug registers, XCR0, INVLPG, INVPCID.
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
  Exec mov_cr(u8 cr, u64 value) {
    s.gpr[RAX] = value;
    if (cr == 8) return step({0x44, 0x0f, 0x22, 0xc0});
    return step({0x0f, 0x22, static_cast<u8>(0xc0 | cr << 3)});
  }
  u64 read_cr(u8 cr) {
    EXPECT_EQ(step({0x0f, 0x20, static_cast<u8>(0xc0 | cr << 3)}), Exec::Next);
    return s.gpr[RAX];
  }
  Exec mov_dr(u8 dr, u64 value) {
    s.gpr[RAX] = value;
    return step({0x0f, 0x23, static_cast<u8>(0xc0 | dr << 3)});
  }
};

TEST(Cr0, Checks) {
  Fixture m(TestMode::Long64);
  const u64 base = m.s.cr0;
  EXPECT_TRUE(m.gp(m.mov_cr(0, base | 1ull << 32)));
  EXPECT_TRUE(m.gp(m.mov_cr(0, base | cr0::NW)));
  EXPECT_TRUE(m.gp(m.mov_cr(0, base & ~cr0::PE)));
  EXPECT_TRUE(m.gp(m.mov_cr(0, base & ~cr0::PG)));  // from 64-bit mode
  EXPECT_EQ(m.s.cr0, base);
  EXPECT_EQ(m.mov_cr(0, (base | cr0::TS | 0x40 /* reserved, ignored */) & ~cr0::ET), Exec::Branch);
  EXPECT_EQ(m.read_cr(0), base | cr0::TS);
  EXPECT_FALSE(m.c().fpu_ok);
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.mov_cr(0, base)));
}

TEST(Cr0, EntersLongMode) {
  Fixture m(TestMode::Prot32);
  m.s.cr0 &= ~cr0::PG;
  m.s.efer = efer::LME;
  m.s.cr3 = 0x20000;
  const u64 on = m.s.cr0 | cr0::PG;
  EXPECT_TRUE(m.gp(m.mov_cr(0, on)));  // CR4.PAE clear
  m.s.cr4 |= cr4::PAE;
  m.s.seg[CS].l = 1;
  EXPECT_TRUE(m.gp(m.mov_cr(0, on)));  // CS.L set
  m.s.seg[CS].l = 0;
  m.s.tr.type = 3;
  EXPECT_TRUE(m.gp(m.mov_cr(0, on)));  // a 16-bit TSS
  m.s.tr.type = 11;
  EXPECT_EQ(m.s.efer, efer::LME);
  EXPECT_EQ(m.mov_cr(0, on), Exec::Branch);
  EXPECT_EQ(m.s.efer, efer::LME | efer::LMA);
  EXPECT_TRUE(m.c().long_mode);
  EXPECT_FALSE(m.c().code64);
  // and leaves it again from compatibility mode
  EXPECT_EQ(write_cr0(m.c(), on & ~cr0::PG), true);
  EXPECT_EQ(m.s.efer, efer::LME);
}

TEST(Cr0, PgWithPcidCannotBeCleared) {
  Fixture m(TestMode::Compat32);
  m.s.cr4 |= cr4::PCIDE;
  EXPECT_TRUE(m.gp(m.mov_cr(0, m.s.cr0 & ~cr0::PG)));
}

TEST(Cr0, PaePdptesAreChecked) {
  Fixture m(TestMode::Prot32);
  m.s.cr0 &= ~cr0::PG;
  m.s.cr4 |= cr4::PAE;
  m.s.cr3 = 0x20000;
  m.store<u64>(0x20000, 1 | 2);  // a reserved bit
  EXPECT_TRUE(m.gp(m.mov_cr(0, m.s.cr0 | cr0::PG)));
  EXPECT_FALSE(m.s.cr0 & cr0::PG);
  m.store<u64>(0x20000, 0x21000 | 1);
  EXPECT_EQ(m.mov_cr(0, m.s.cr0 | cr0::PG), Exec::Branch);
  EXPECT_EQ(m.s.pdptr[0], 0x21001u);
}

TEST(Cr3, ReservedBitsAndPcid) {
  Fixture m(TestMode::Long64);
  EXPECT_TRUE(m.gp(m.mov_cr(3, 1ull << 40)));  // beyond MAXPHYADDR
  EXPECT_TRUE(m.gp(m.mov_cr(3, 1ull << 63 | TestMachine::kRoot)));
  EXPECT_EQ(m.mov_cr(3, TestMachine::kRoot | 0x18), Exec::Branch);
  m.s.cr3 = TestMachine::kRoot;
  m.s.cr4 |= cr4::PCIDE;
  EXPECT_EQ(m.mov_cr(3, 1ull << 63 | TestMachine::kRoot | 5), Exec::Branch);
  EXPECT_EQ(m.read_cr(3), TestMachine::kRoot | 5);
}

TEST(Cr3, PaeLoadFaultChangesNothing) {
  Fixture m(TestMode::Prot32);
  m.s.cr4 |= cr4::PAE;
  m.s.pdptr[0] = 0x23001;
  m.store<u64>(0x20000, 1 | 1ull << 45);
  const u64 before = m.s.cr3;
  m.c().stop() = Stop{};
  EXPECT_FALSE(write_cr3(m.c(), 0x20000));
  EXPECT_EQ(m.c().stop().vector, vec::GP);
  EXPECT_EQ(m.s.cr3, before);
  EXPECT_EQ(m.s.pdptr[0], 0x23001u);
}

TEST(Cr4, Checks) {
  Fixture m(TestMode::Long64);
  const u64 base = m.s.cr4;
  EXPECT_TRUE(m.gp(m.mov_cr(4, base | 1u << 23)));
  EXPECT_TRUE(m.gp(m.mov_cr(4, base | 1ull << 40)));
  EXPECT_TRUE(m.gp(m.mov_cr(4, base | cr4::LA57)));
  EXPECT_TRUE(m.gp(m.mov_cr(4, base & ~cr4::PAE)));
  m.s.cr3 |= 8;
  EXPECT_TRUE(m.gp(m.mov_cr(4, base | cr4::PCIDE)));  // CR3[11:0] must be zero
  m.s.cr3 &= ~8ull;
  EXPECT_EQ(m.mov_cr(4, base | cr4::PCIDE | cr4::PGE), Exec::Branch);
  EXPECT_EQ(m.read_cr(4), base | cr4::PCIDE | cr4::PGE);
  Fixture legacy(TestMode::Prot32);
  EXPECT_TRUE(legacy.gp(legacy.mov_cr(4, legacy.s.cr4 | cr4::PCIDE)));
}

TEST(Cr4, PermissionChangesTakeEffectAtOnce) {
  Fixture m(TestMode::Long64);
  u8 v;
  EXPECT_TRUE(m.mmu().read(0x700000, &v));  // a user page
  EXPECT_EQ(m.mov_cr(4, m.s.cr4 | cr4::SMAP), Exec::Branch);
  EXPECT_FALSE(m.mmu().read(0x700000, &v));
  EXPECT_EQ(m.c().stop().error, u32{pferr::P});
  EXPECT_EQ(m.step({0x0f, 0x01, 0xcb}), Exec::Next);  // stac
  EXPECT_TRUE(m.mmu().read(0x700000, &v));
  EXPECT_EQ(m.step({0x0f, 0x01, 0xca}), Exec::Next);  // clac
  EXPECT_FALSE(m.mmu().read(0x700000, &v));
}

TEST(Cr8, IsTheTaskPriority) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.mov_cr(8, 9), Exec::Branch);
  EXPECT_EQ(m.env.cr8, 9u);
  EXPECT_TRUE(m.gp(m.mov_cr(8, 16)));
  EXPECT_EQ(m.step({0x44, 0x0f, 0x20, 0xc0}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 9u);
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step({0x44, 0x0f, 0x20, 0xc0})));
}

TEST(ControlRegisters, OthersAreUndefined) {
  Fixture m(TestMode::Long64);
  for (u8 cr : {1, 5, 6, 7}) {
    EXPECT_TRUE(m.ud(m.mov_cr(cr, 0)));
    EXPECT_TRUE(m.ud(m.step({0x0f, 0x20, static_cast<u8>(0xc0 | cr << 3)})));
  }
  EXPECT_EQ(m.mov_cr(2, 0x1234567890ab), Exec::Next);
  EXPECT_EQ(m.read_cr(2), 0x1234567890abu);
}

TEST(Msw, LmswSetsPeOnly) {
  Fixture m(TestMode::Real16);
  m.s.gpr[RAX] = 0xffff;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xf0}), Exec::Branch);
  EXPECT_EQ(m.s.cr0 & 0xf, 0xfu);
  EXPECT_FALSE(m.s.cr0 & cr0::WP);
  m.s.gpr[RAX] = 0;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xf0}), Exec::Branch);
  EXPECT_EQ(m.s.cr0 & 0xf, u64{cr0::PE});
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step({0x0f, 0x01, 0xf0})));
}

TEST(Msw, SmswAndClts) {
  Fixture m(TestMode::Long64, true);
  EXPECT_EQ(m.step({0x0f, 0x01, 0xe0}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], m.s.cr0);
  EXPECT_TRUE(m.gp(m.step({0x0f, 0x06})));
  Fixture n(TestMode::Long64);
  n.s.cr0 |= cr0::TS;
  EXPECT_EQ(n.step({0x0f, 0x06}), Exec::Branch);
  EXPECT_FALSE(n.s.cr0 & cr0::TS);
  EXPECT_TRUE(n.c().fpu_ok);
}

TEST(DebugRegisters, ReadWrite) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.mov_dr(0, 0xffff'8000'1234'5678), Exec::Branch);
  EXPECT_EQ(m.s.dr[0], 0xffff'8000'1234'5678u);
  EXPECT_EQ(m.mov_dr(6, 0xffffffff), Exec::Next);
  EXPECT_EQ(m.s.dr6, 0xffffefffu);
  EXPECT_EQ(m.mov_dr(6, 0), Exec::Next);
  EXPECT_EQ(m.s.dr6, 0xffff0ff0u);
  EXPECT_EQ(m.mov_dr(7, 0xffffdfff), Exec::Branch);  // all but GD
  EXPECT_EQ(m.s.dr7, 0xffff07ffu);
  EXPECT_TRUE(m.c().slow_step);
  EXPECT_EQ(m.mov_dr(7, 0), Exec::Branch);
  EXPECT_EQ(m.s.dr7, 0x400u);
  EXPECT_FALSE(m.c().slow_step);
  EXPECT_TRUE(m.gp(m.mov_dr(6, 1ull << 32)));
  EXPECT_TRUE(m.gp(m.mov_dr(7, 1ull << 63)));
}

TEST(DebugRegisters, AliasesAndDe) {
  Fixture m(TestMode::Long64);
  EXPECT_EQ(m.mov_dr(5, 0x155), Exec::Branch);
  EXPECT_EQ(m.s.dr7, 0x555u);
  m.s.cr4 |= cr4::DE;
  EXPECT_TRUE(m.ud(m.mov_dr(4, 0)));
  EXPECT_TRUE(m.ud(m.step({0x0f, 0x21, 0xe8})));
}

TEST(DebugRegisters, PrivilegeAndGeneralDetect) {
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.mov_dr(0, 0)));
  Fixture m(TestMode::Long64);
  m.s.dr7 |= 1u << 13;
  EXPECT_EQ(m.mov_dr(0, 1), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Fault);
  EXPECT_EQ(m.c().stop().vector, vec::DB);
  EXPECT_EQ(m.c().stop().payload, 1u << 13);
  EXPECT_EQ(m.s.dr[0], 0u);
  EXPECT_EQ(m.step({0x0f, 0x21, 0xf8}), Exec::Stop);
}

TEST(Invlpg, DropsTheTranslation) {
  Fixture m(TestMode::Long64);
  u8 v;
  EXPECT_TRUE(m.mmu().read(0x700000, &v));
  // Unmapped behind the TLB's back.
  for (u64 t = TestMachine::kTables; t < TestMachine::kTablesEnd; t += 8)
    if ((m.load<u64>(t) & ~0xfffull) == 0x700000) m.store<u64>(t, 0);
  m.s.gpr[RAX] = 0x700123;
  EXPECT_EQ(m.step({0x0f, 0x01, 0x38}), Exec::Branch);
  EXPECT_FALSE(m.mmu().read(0x700000, &v));
  m.s.gpr[RAX] = 0x8000'0000'0000;  // not canonical: nothing
  EXPECT_EQ(m.step({0x0f, 0x01, 0x38}), Exec::Branch);
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step({0x0f, 0x01, 0x38})));
}

TEST(Invpcid, TypesAndFaults) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RBX] = TestMachine::kData;
  const auto invpcid = [&](u64 type, u64 pcid, u64 linear) {
    m.s.gpr[RAX] = type;
    m.store<u64>(TestMachine::kData, pcid);
    m.store<u64>(TestMachine::kData + 8, linear);
    return m.step({0x66, 0x0f, 0x38, 0x82, 0x03});
  };
  EXPECT_TRUE(m.gp(invpcid(4, 0, 0)));
  EXPECT_TRUE(m.gp(invpcid(0, 0x1000, 0)));
  EXPECT_TRUE(m.gp(invpcid(0, 1, 0)));                  // a PCID without CR4.PCIDE
  EXPECT_TRUE(m.gp(invpcid(1, 1, 0)));
  EXPECT_TRUE(m.gp(invpcid(0, 0, 0x8000'0000'0000)));
  for (u64 type : {0, 1, 2, 3}) EXPECT_EQ(invpcid(type, 0, 0x1000), Exec::Branch);
  m.s.cr4 |= cr4::PCIDE;
  for (u64 type : {0, 1, 2, 3}) EXPECT_EQ(invpcid(type, 7, 0x1000), Exec::Branch);
  m.unmap(TestMachine::kData);
  m.s.gpr[RAX] = 2;
  EXPECT_EQ(m.step({0x66, 0x0f, 0x38, 0x82, 0x03}), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::PF);
  Fixture user(TestMode::Long64, true);
  user.s.gpr[RBX] = TestMachine::kData;
  EXPECT_TRUE(user.gp(user.step({0x66, 0x0f, 0x38, 0x82, 0x03})));
}

TEST(Xcr0, Validity) {
  Fixture m(TestMode::Long64);
  const auto xsetbv = [&](u32 index, u64 value) {
    m.s.gpr[RCX] = index;
    m.s.gpr[RAX] = static_cast<u32>(value);
    m.s.gpr[RDX] = value >> 32;
    return m.step({0x0f, 0x01, 0xd1});
  };
  EXPECT_EQ(xsetbv(0, 3), Exec::Branch);
  EXPECT_EQ(m.s.xcr0, 3u);
  for (u64 bad : {0ull, 2ull, 5ull, 0xfull, 0xe7ull, 1ull | 1ull << 63}) EXPECT_TRUE(m.gp(xsetbv(0, bad))) << bad;
  EXPECT_TRUE(m.gp(xsetbv(1, 7)));
  m.s.gpr[RCX] = 0;
  EXPECT_EQ(m.step({0x0f, 0x01, 0xd0}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 3u);
  m.s.gpr[RCX] = 2;
  EXPECT_TRUE(m.gp(m.step({0x0f, 0x01, 0xd0})));
  m.s.cr4 &= ~cr4::OSXSAVE;
  EXPECT_TRUE(m.ud(xsetbv(0, 7)));
  EXPECT_TRUE(m.ud(m.step({0x0f, 0x01, 0xd0})));
  Fixture user(TestMode::Long64, true);
  EXPECT_TRUE(user.gp(user.step({0x0f, 0x01, 0xd1})));
}

}  // namespace
}  // namespace ring3::engine::test
