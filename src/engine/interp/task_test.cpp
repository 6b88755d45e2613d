#include <gtest/gtest.h>

#include "engine/interp/segment_load.hpp"
#include "engine/interp/test_machine.hpp"

/// Hardware task switches.
namespace ring3::engine::test {
namespace {

constexpr u16 kNew = 0x98, kGate = 0xa0, kSpare = 0xa8;
constexpr u64 kNewTss = 0x3800;  // inside the first TSS's page

struct Fixture : TestMachine {
  explicit Fixture(bool user = false) : TestMachine(TestMode::Prot32, user) {
    s.tr.limit = 0x7ff;
    set_gdt(sel::Tss, kTss, 0x7ff, 0x8b, 0);
    set_gdt(kNew, kNewTss, 0x67, 0xe9, 0);
    store<u32>(kTss + 0x1c, kRoot);
    store<u32>(kNewTss + 0x1c, kRoot);
    store<u32>(kNewTss + 0x20, 0x5678);
    store<u32>(kNewTss + 0x24, 0x202);
    for (u32 i = 0; i < 8; ++i) store<u32>(kNewTss + 0x28 + 4 * i, 0x1000 + i * 0x100);
    set_selectors(sel::Data, sel::Code32, sel::Data, sel::Data, 0, 0);
    s.gpr[RCX] = 0xc0ffee;
    c().mode_changed();
  }
  void set_selectors(u16 es, u16 cs, u16 ss, u16 ds, u16 fs, u16 gs) {
    const u16 all[] = {es, cs, ss, ds, fs, gs};
    for (u32 i = 0; i < 6; ++i) store<u32>(kNewTss + 0x48 + 4 * i, all[i]);
  }
  Exec far(u8 modrm, u16 selector) {
    store<u32>(kData, 0);
    store<u16>(kData + 4, selector);
    s.gpr[RBX] = kData;
    return step({0xff, modrm});
  }
  Exec jmp(u16 selector) { return far(0x2b, selector); }
  Exec call(u16 selector) { return far(0x1b, selector); }
  u8 access(u16 selector) { return load<u8>(kGdt + selector + 5); }
  void expect_stop(Exec e, Stop::Kind kind, u8 vector, u32 error) {
    EXPECT_EQ(e, Exec::Stop);
    EXPECT_EQ(c().stop().kind, kind);
    EXPECT_EQ(unsigned{c().stop().vector}, unsigned{vector});
    EXPECT_EQ(c().stop().error, error);
  }
};

TEST(Task, JumpSavesAndLoads) {
  Fixture m;
  m.s.dr7 = 0x400 | 0x3ff;
  EXPECT_EQ(m.jmp(kNew), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x5678u);
  EXPECT_EQ(m.s.rflags, 0x202u);
  for (unsigned i = 0; i < 8; ++i) EXPECT_EQ(m.s.gpr[i], 0x1000u + i * 0x100);
  EXPECT_EQ(m.s.tr.selector, kNew);
  EXPECT_EQ(m.s.tr.base, kNewTss);
  EXPECT_EQ(m.access(kNew), 0xeb);
  EXPECT_EQ(m.access(sel::Tss), 0x89);  // no longer busy
  EXPECT_TRUE(m.s.cr0 & cr0::TS);
  EXPECT_EQ(m.s.dr7, 0x400u | 0x2aa);
  EXPECT_EQ(m.load<u32>(TestMachine::kTss + 0x20), m.code_offset() + 2);
  EXPECT_EQ(m.load<u32>(TestMachine::kTss + 0x28 + 4), 0xc0ffeeu);
  EXPECT_EQ(m.load<u16>(TestMachine::kTss + 0x4c), sel::Code32);
  EXPECT_EQ(m.load<u16>(kNewTss), 0);  // no back link
  EXPECT_TRUE(m.s.seg[FS].unusable);
}

TEST(Task, CallNestsAndIretReturns) {
  Fixture m;
  EXPECT_EQ(m.call(kNew), Exec::Branch);
  EXPECT_EQ(m.s.rflags, 0x202u | rflags::NT);
  EXPECT_EQ(m.load<u16>(kNewTss), sel::Tss);
  EXPECT_EQ(m.access(sel::Tss), 0x8b);
  EXPECT_EQ(m.step({0xcf}), Exec::Branch);
  EXPECT_EQ(m.s.tr.selector, sel::Tss);
  EXPECT_EQ(m.s.rip, m.code_offset() + 2);
  EXPECT_EQ(m.s.gpr[RCX], 0xc0ffeeu);
  EXPECT_EQ(m.access(kNew), 0xe9);
  EXPECT_FALSE(m.load<u32>(kNewTss + 0x24) & rflags::NT);
}

TEST(Task, IretWithABadBackLink) {
  Fixture m;
  m.s.rflags |= rflags::NT;
  m.store<u16>(TestMachine::kTss, kNew);  // not busy
  m.expect_stop(m.step({0xcf}), Stop::Kind::Fault, vec::TS, kNew);
  m.store<u16>(TestMachine::kTss, 0x1000);
  m.expect_stop(m.step({0xcf}), Stop::Kind::Fault, vec::TS, 0x1000);
}

TEST(Task, ToAnotherLevelAndByGate) {
  Fixture m(true);
  m.set_gdt(kGate, 0, 0, 0xe5, 0);
  m.store<u16>(TestMachine::kGdt + kGate + 2, kNew);
  EXPECT_EQ(m.call(kGate | 3), Exec::Branch);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.load<u16>(TestMachine::kTss + 0x4c), sel::Code32User);
}

TEST(Task, SixteenBit) {
  Fixture m;
  m.set_gdt(kNew, kNewTss, 0x2b, 0xe1, 0);
  m.store<u16>(kNewTss + 0x0e, 0x4321);
  m.store<u16>(kNewTss + 0x10, 2);
  for (u32 i = 0; i < 8; ++i) m.store<u16>(kNewTss + 0x12 + 2 * i, static_cast<u16>(0x10 + i));
  const u16 selectors[] = {sel::Data, sel::Code32, sel::Data, sel::Data};
  for (u32 i = 0; i < 4; ++i) m.store<u16>(kNewTss + 0x22 + 2 * i, selectors[i]);
  m.store<u16>(kNewTss + 0x2a, 0);
  EXPECT_EQ(m.jmp(kNew), Exec::Branch);
  EXPECT_EQ(m.s.rip, 0x4321u);
  EXPECT_EQ(m.s.gpr[RDI], 0x17u);
  EXPECT_EQ(m.s.tr.type, kTss16Busy);
}

TEST(Task, ToVirtual8086) {
  Fixture m;
  m.store<u32>(kNewTss + 0x24, 0x23202);
  m.set_selectors(0x1111, 0x2222, 0x3333, 0x4444, 0x5555, 0x6666);
  EXPECT_EQ(m.jmp(kNew), Exec::Branch);
  EXPECT_TRUE(m.s.v8086());
  EXPECT_EQ(m.s.seg[CS].base, 0x22220u);
  EXPECT_EQ(m.s.seg[GS].base, 0x66660u);
}

TEST(Task, FaultsInTheOldTask) {
  struct Case { const char* what; u16 selector; u8 access; u32 limit; u8 vector; u32 error; };
  const Case cases[] = {
      {"limit", kNew, 0xe9, 0x66, vec::TS, kNew},
      {"busy", kNew, 0xeb, 0x67, vec::GP, kNew},
      {"not present", kNew, 0x69, 0x67, vec::NP, kNew},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m;
    m.set_gdt(kNew, kNewTss, t.limit, t.access, 0);
    m.expect_stop(m.jmp(t.selector), Stop::Kind::Fault, t.vector, t.error);
    EXPECT_EQ(m.s.tr.selector, sel::Tss);
    EXPECT_EQ(m.access(sel::Tss), 0x8b);
    EXPECT_EQ(m.s.gpr[RCX], 0xc0ffeeu);
    EXPECT_EQ(m.s.rip, m.code_offset());
  }
  Fixture m(true);
  m.set_gdt(kNew, kNewTss, 0x67, 0x89, 0);
  m.expect_stop(m.jmp(kNew | 3), Stop::Kind::Fault, vec::GP, kNew);  // DPL
}

TEST(Task, PageFaultOnTheNewTss) {
  Fixture m;
  m.set_gdt(kNew, 0x900000, 0x67, 0xe9, 0);
  m.unmap(0x900000);
  m.expect_stop(m.jmp(kNew), Stop::Kind::Fault, vec::PF, 0);
  EXPECT_EQ(m.s.tr.selector, sel::Tss);
}

TEST(Task, FaultsInTheNewTask) {
  struct Case { const char* what; u16 cs, ss, ds, ldt; u8 spare; u8 vector; u32 error; };
  const Case cases[] = {
      {"null CS", 0, sel::Data, 0, 0, 0, vec::TS, 0},
      {"CS is data", sel::Data, sel::Data, 0, 0, 0, vec::TS, sel::Data},
      {"CS DPL", sel::Code32 | 3, sel::DataUser, 0, 0, 0, vec::TS, sel::Code32},
      {"CS not present", kSpare, sel::Data, 0, 0, 0x1b, vec::NP, kSpare},
      {"null SS", sel::Code32, 0, 0, 0, 0, vec::TS, 0},
      {"SS DPL", sel::Code32, sel::DataUser & ~3, 0, 0, 0, vec::TS, sel::DataUser & ~3},
      {"SS not present", sel::Code32, kSpare, 0, 0, 0x13, vec::SS, kSpare},
      {"DS execute-only", sel::Code32, sel::Data, kSpare, 0, 0x99, vec::TS, kSpare},
      {"DS not present", sel::Code32, sel::Data, kSpare, 0, 0x13, vec::NP, kSpare},
      {"LDT in the LDT", sel::Code32, sel::Data, 0, 0x84, 0, vec::TS, 0x84},
      {"LDT is no LDT", sel::Code32, sel::Data, 0, sel::Data, 0, vec::TS, sel::Data},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m;
    m.set_gdt(kSpare, 0, 0xfffff, t.spare, 0xc);
    m.set_selectors(0, t.cs, t.ss, t.ds, 0, 0);
    m.store<u16>(kNewTss + 0x60, t.ldt);
    m.expect_stop(m.jmp(kNew), Stop::Kind::Trap, t.vector, t.error);
    EXPECT_EQ(m.s.tr.selector, kNew);
    EXPECT_EQ(m.s.rip, 0x5678u);
  }
}

TEST(Task, TrapBit) {
  Fixture m;
  m.store<u16>(kNewTss + 0x64, 1);
  m.expect_stop(m.jmp(kNew), Stop::Kind::Trap, vec::DB, 0);
  EXPECT_EQ(m.c().stop().payload, 1u << 15);
  EXPECT_EQ(m.s.rip, 0x5678u);
}

TEST(Task, GateInTheIdtPushesTheErrorCode) {
  Fixture m;
  m.s.rip = 0x1234;
  m.store<u64>(TestMachine::kIdt + vec::GP * 8, static_cast<u64>(kNew) << 16 | 0x85ull << 40);
  Event e;
  e.vector = vec::GP;
  e.has_error = true;
  e.error = 0x58;
  EXPECT_EQ(deliver_event(m.c(), e), Delivered::Ok);
  EXPECT_EQ(m.s.tr.selector, kNew);
  EXPECT_EQ(m.s.gpr[RSP], 0x1400u - 4);
  EXPECT_EQ(m.load<u32>(0x13fc), 0x58u);
  EXPECT_TRUE(m.s.rflags & rflags::NT);
  EXPECT_EQ(m.load<u32>(TestMachine::kTss + 0x20), 0x1234u);
  EXPECT_EQ(m.load<u16>(kNewTss), sel::Tss);
}

TEST(Task, GateInTheIdtToABusyTask) {
  Fixture m;
  m.s.rip = 0x1234;
  m.store<u64>(TestMachine::kIdt + 0x40 * 8, static_cast<u64>(sel::Tss) << 16 | 0x85ull << 40);
  Event e;
  e.type = Event::Type::External;
  e.vector = 0x40;
  EXPECT_EQ(deliver_event(m.c(), e), Delivered::Ok);
  EXPECT_EQ(m.s.rip, TestMachine::kHandlers + vec::GP * 16);
  EXPECT_EQ(m.load<u32>(m.s.gpr[RSP]), sel::Tss | 1u);
}

}  // namespace
}  // namespace ring3::engine::test
