#include <gtest/gtest.h>

#include "engine/interp/msr.hpp"
#include "engine/interp/test_machine.hpp"

namespace ring3::engine::test {
namespace {

struct Core {
  VcpuState s;
  GuestFeatures f;
  Core() {
    s.reset();
    f.has.set();
    f.efer_reserved = ~(efer::SCE | efer::LME | efer::LMA | efer::NX);
  }
  MsrAccess wr(u32 index, u64 v, bool host = false) { return write_msr(s, f, index, v, host); }
  MsrAccess rd(u32 index, u64* v, bool host = false) { return read_msr(s, f, index, host, v); }
  u64 get(u32 index, bool host = false) {
    u64 v = 0;
    EXPECT_EQ(rd(index, &v, host), MsrAccess::Ok) << std::hex << index;
    return v;
  }
};

TEST(Msr, PlainStorage) {
  Core m;
  for (u32 index : {msr::STAR, msr::SYSENTER_CS, msr::MCG_STATUS, msr::MISC_ENABLE}) {
    EXPECT_EQ(m.wr(index, 0x1234567890abcdef), MsrAccess::Ok);
    EXPECT_EQ(m.get(index), 0x1234567890abcdefu);
  }
  EXPECT_EQ(m.wr(msr::SFMASK, 0xffffffffffffffff), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::SFMASK), 0xffffffffu);
}

TEST(Msr, CanonicalAddresses) {
  Core m;
  for (u32 index : {msr::LSTAR, msr::CSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::SYSENTER_ESP,
                    msr::SYSENTER_EIP}) {
    EXPECT_EQ(m.wr(index, 0xffff'8000'0000'0000), MsrAccess::Ok);
    EXPECT_EQ(m.get(index), 0xffff'8000'0000'0000u);
    EXPECT_EQ(m.wr(index, 0x0000'8000'0000'0000), MsrAccess::Fault);
    EXPECT_EQ(m.get(index), 0xffff'8000'0000'0000u);
  }
  EXPECT_EQ(m.s.seg[FS].base, 0xffff'8000'0000'0000u);
  m.f.amd = true;
  EXPECT_EQ(m.wr(msr::SYSENTER_EIP, 0x0000'8000'1234'5678), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::SYSENTER_EIP), 0x12345678u);
}

TEST(Msr, Efer) {
  Core m;
  EXPECT_EQ(m.wr(msr::EFER, efer::SCE | efer::NX | efer::LME | efer::LMA), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::EFER), efer::SCE | efer::NX | efer::LME);  // LMA follows paging
  EXPECT_EQ(m.wr(msr::EFER, efer::SVME), MsrAccess::Fault);
  m.s.cr0 |= cr0::PG | cr0::PE;
  m.s.efer |= efer::LMA;
  EXPECT_EQ(m.wr(msr::EFER, efer::SCE), MsrAccess::Fault);  // LME with paging on
  EXPECT_EQ(m.wr(msr::EFER, efer::LME), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::EFER), efer::LME | efer::LMA);
  EXPECT_EQ(m.wr(msr::EFER, efer::SCE, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::EFER, efer::SCE | 1u << 1, true), MsrAccess::Fault);  // the VMM too
  EXPECT_EQ(m.wr(msr::EFER, ~0ull, true), MsrAccess::Fault);
}

TEST(Msr, Pat) {
  Core m;
  EXPECT_EQ(m.get(msr::PAT), 0x0007040600070406u);
  EXPECT_EQ(m.wr(msr::PAT, 0x0007050600070106), MsrAccess::Ok);
  for (u64 bad : {2ull, 3ull, 8ull, 0xffull << 56, 2ull << 24}) EXPECT_EQ(m.wr(msr::PAT, bad), MsrAccess::Fault);
  EXPECT_EQ(m.get(msr::PAT), 0x0007050600070106u);
}

TEST(Msr, Mtrrs) {
  Core m;
  EXPECT_EQ(m.get(msr::MTRRCAP), 0x508u);
  EXPECT_EQ(m.wr(msr::MTRRCAP, 0), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MTRR_DEF_TYPE, 0xc06), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::MTRR_DEF_TYPE, 0x1c06), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MTRR_DEF_TYPE, 0xc02), MsrAccess::Fault);
  for (u32 index : {0x250u, 0x258u, 0x259u, 0x268u, 0x26fu}) {
    EXPECT_EQ(m.wr(index, 0x0606060606060606), MsrAccess::Ok);
    EXPECT_EQ(m.get(index), 0x0606060606060606u);
    EXPECT_EQ(m.wr(index, 0x0606060606060602), MsrAccess::Fault);
  }
  EXPECT_EQ(m.wr(0x200, 0x80000006), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x200, 0x80000106), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x200, 0x80000002), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x201, 0xff80000800), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x201, 0xff80000400), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x201, 1ull << 40), MsrAccess::Fault);  // MAXPHYADDR is 40
  EXPECT_EQ(m.wr(0x20f, 0x800), MsrAccess::Ok);
  u64 v;
  EXPECT_EQ(m.rd(0x210, &v), MsrAccess::Unknown);
  EXPECT_EQ(m.rd(0x251, &v), MsrAccess::Unknown);
}

TEST(Msr, MachineCheck) {
  Core m;
  u64 v;
  EXPECT_EQ(m.rd(0x400, &v), MsrAccess::Fault);  // no banks
  EXPECT_EQ(m.rd(msr::MCG_CTL, &v), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MCG_CAP, 0x10a), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MCG_CAP, 0x10a, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::MCG_CTL, ~0ull), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::MCG_CTL, 1), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x400, ~0ull), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x400, ~0ull & ~(1ull << 10)), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x400, 5), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x401, 0), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x401, 1), MsrAccess::Fault);
  EXPECT_EQ(m.wr(0x401, 1ull << 63, true), MsrAccess::Ok);
  EXPECT_EQ(m.get(0x401), 1ull << 63);
  EXPECT_EQ(m.wr(0x402, 0x1234), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x400 + 39, 1), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x400 + 40, 1), MsrAccess::Fault);
  m.f.amd = true;
  EXPECT_EQ(m.wr(msr::AMD_HWCR, 1u << 18), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x401, 1), MsrAccess::Ok);
  // A bank count beyond what is kept must not reach past the array.
  EXPECT_EQ(m.wr(msr::MCG_CAP, 0xff, true), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MCG_CAP, 33, true), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MCG_CAP, 32, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(0x47f, 0), MsrAccess::Ok);
  EXPECT_EQ(m.rd(0x480, &v), MsrAccess::Unknown);
}

TEST(Msr, FeatureGates) {
  Core m;
  u64 v;
  for (bool host : {false, true}) {
    const MsrAccess gated = host ? MsrAccess::Ok : MsrAccess::Fault;
    m.f.has.reset();
    EXPECT_EQ(m.rd(msr::SPEC_CTRL, &v, host), gated);
    EXPECT_EQ(m.wr(msr::SPEC_CTRL, 1, host), gated);
    EXPECT_EQ(m.wr(msr::PRED_CMD, 1, host), gated);
    EXPECT_EQ(m.wr(msr::FLUSH_CMD, 1, host), gated);
    EXPECT_EQ(m.rd(msr::TSC_AUX, &v, host), gated);
    EXPECT_EQ(m.wr(msr::XSS, 0, host), gated);
    EXPECT_EQ(m.rd(msr::ARCH_CAPABILITIES, &v, host), gated);
    EXPECT_EQ(m.rd(msr::SMBASE, &v, host), gated);
  }
  m.f.spec_ctrl = m.f.ibpb = true;
  EXPECT_EQ(m.wr(msr::SPEC_CTRL, 7), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::SPEC_CTRL, 8), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::SPEC_CTRL, 0x401), MsrAccess::Ok);
  m.f.amd = true;
  EXPECT_EQ(m.wr(msr::SPEC_CTRL, 0x401), MsrAccess::Fault);
  m.f.amd = false;
  EXPECT_EQ(m.wr(msr::PRED_CMD, 2), MsrAccess::Fault);
  EXPECT_EQ(m.rd(msr::PRED_CMD, &v), MsrAccess::Fault);  // write-only
  m.f.has.set();
  EXPECT_EQ(m.wr(msr::TSC_AUX, 1ull << 32), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::XSS, 1), MsrAccess::Fault);
}

TEST(Msr, CpuidFaulting) {
  Core m;
  EXPECT_EQ(m.get(msr::PLATFORM_INFO), 1u << 31);
  EXPECT_EQ(m.wr(msr::PLATFORM_INFO, 0), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MISC_FEATURES, 1), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::MISC_FEATURES, 2), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::PLATFORM_INFO, 0, true), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::MISC_FEATURES, 0), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::PLATFORM_INFO, 0, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::MISC_FEATURES, 1), MsrAccess::Fault);
}

TEST(Msr, MicrocodeRevision) {
  Core m;
  EXPECT_EQ(m.wr(msr::UCODE_REV, 0x100000000, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::UCODE_REV, 0), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::UCODE_REV), 0x100000000u);
}

TEST(Msr, DebugctlIsAcceptedAndNotKept) {
  Core m;
  EXPECT_EQ(m.wr(msr::DEBUGCTL, 3), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::DEBUGCTL), 0u);
  EXPECT_EQ(m.wr(msr::DEBUGCTL, 0x40), MsrAccess::Fault);
}

TEST(Msr, Amd) {
  Core m;
  u64 v;
  EXPECT_EQ(m.rd(msr::AMD_HWCR, &v), MsrAccess::Fault);
  EXPECT_EQ(m.rd(0xc0010010, &v), MsrAccess::Unknown);
  m.f.amd = true;
  EXPECT_EQ(m.wr(msr::AMD_HWCR, 0x148), MsrAccess::Ok);  // ignored bits
  EXPECT_EQ(m.get(msr::AMD_HWCR), 0u);
  EXPECT_EQ(m.wr(msr::AMD_HWCR, 1u << 24), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::AMD_HWCR, 1), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::AMD_DE_CFG, 2), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::AMD_DE_CFG, 0), MsrAccess::Fault);  // a guest cannot make LFENCE weaker
  EXPECT_EQ(m.wr(msr::AMD_DE_CFG, 0, true), MsrAccess::Ok);
  EXPECT_EQ(m.wr(msr::AMD_DE_CFG, 1), MsrAccess::Fault);
  EXPECT_EQ(m.rd(msr::AMD_OSVW_LENGTH, &v), MsrAccess::Fault);
  m.f.osvw = true;
  EXPECT_EQ(m.wr(msr::AMD_OSVW_LENGTH, 4), MsrAccess::Fault);
  EXPECT_EQ(m.wr(msr::AMD_OSVW_LENGTH, 4, true), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::AMD_OSVW_LENGTH), 4u);
  EXPECT_EQ(m.wr(msr::AMD_SYSCFG, 1), MsrAccess::Ok);
  EXPECT_EQ(m.get(msr::AMD_SYSCFG), 0u);
}

TEST(Msr, EveryListedOneRoundTrips) {
  for (bool amd : {false, true}) {
    Core m;
    m.f.amd = amd;
    EXPECT_LE(saved_msrs().size(), 128u);
    for (u32 index : saved_msrs()) {
      const u64 v = m.get(index, true);
      EXPECT_EQ(m.wr(index, v, true), MsrAccess::Ok) << std::hex << index;
      EXPECT_EQ(m.get(index, true), v);
    }
  }
}

TEST(Msr, ReadEveryIndexTwice) {
  // What a host reads it can write back; nothing reaches outside the state.
  for (bool amd : {false, true}) {
    Core m;
    m.f.amd = amd;
    m.s.msr.mcg_cap = 0x11f;
    const auto check = [&](u32 index) {
      u64 v = 0, again = 0;
      if (m.rd(index, &v, true) != MsrAccess::Ok) return;
      EXPECT_EQ(m.wr(index, v, true), MsrAccess::Ok) << std::hex << index;
      EXPECT_EQ(m.rd(index, &again, true), MsrAccess::Ok);
      EXPECT_EQ(v, again) << std::hex << index;
    };
    for (u32 i = 0; i < 0x2000; ++i) check(i);
    for (u32 i = 0; i < 0x200; ++i) check(0xc0000000 + i);
    for (u32 i = 0; i < 0x2000; ++i) check(0xc0010000 + i);
  }
}

// ---- the instructions ----

TEST(MsrInstructions, PrivilegeFaultsAndEnvironment) {
  TestMachine m(TestMode::Long64);
  m.env.msrs[0x4b564d01] = 7;
  m.s.gpr[RCX] = 0xffffffff'4b564d01;
  EXPECT_EQ(m.step({0x0f, 0x32}), Exec::Next);
  EXPECT_EQ(m.s.gpr[RAX], 7u);
  m.s.gpr[RAX] = 0xffffffff'00000001;
  m.s.gpr[RDX] = 2;
  EXPECT_EQ(m.step({0x0f, 0x30}), Exec::Branch);
  EXPECT_EQ(m.env.msrs[0x4b564d01], 0x2'0000'0001u);
  m.s.gpr[RCX] = 0x12345;
  EXPECT_EQ(m.step({0x0f, 0x32}), Exec::Stop);
  EXPECT_EQ(m.c().stop().vector, vec::GP);
  EXPECT_EQ(m.step({0x0f, 0x30}), Exec::Stop);
  EXPECT_EQ(m.c().stop().error, 0u);
  m.env.exits_to_give = 1;
  EXPECT_EQ(m.step({0x0f, 0x30}), Exec::Stop);
  EXPECT_EQ(m.c().stop().kind, Stop::Kind::Exit);
  TestMachine user(TestMode::Long64, true);
  user.s.gpr[RCX] = msr::PAT;
  EXPECT_EQ(user.step({0x0f, 0x32}), Exec::Stop);
  EXPECT_EQ(user.c().stop().vector, vec::GP);
  EXPECT_EQ(user.step({0x0f, 0x30}), Exec::Stop);
}

TEST(MsrInstructions, EferNxTakesEffect) {
  TestMachine m(TestMode::Long64);
  m.map(0x700000, 0x700000, 7 | TestMachine::kNx);
  u8 v;
  EXPECT_TRUE(m.mmu().read(0x700000, &v));
  m.s.gpr[RCX] = msr::EFER;
  m.s.gpr[RAX] = efer::LME | efer::SCE;
  m.s.gpr[RDX] = 0;
  EXPECT_EQ(m.step({0x0f, 0x30}), Exec::Branch);
  EXPECT_FALSE(m.mmu().read(0x700000, &v));  // bit 63 is reserved without NXE
  EXPECT_EQ(m.c().stop().error, pferr::P | pferr::RSVD);
}

}  // namespace
}  // namespace ring3::engine::test
