#include <gtest/gtest.h>

#include "engine/interp/segment_load.hpp"
#include "engine/interp/test_machine.hpp"

/// Event delivery: gates, stacks, flags, shadows, and what becomes of faults on the way.
namespace ring3::engine::test {
namespace {

using Type = Event::Type;

Event exception(u8 vector) { return {Type::Exception, vector, false, 0, 0}; }
Event exception(u8 vector, u32 error) { return {Type::Exception, vector, true, error, 0}; }
Event page_fault(u64 address, u32 error) { return {Type::Exception, vec::PF, true, error, address}; }
Event external(u8 vector) { return {Type::External, vector, false, 0, 0}; }
Event soft(u8 vector, u8 length = 2) { return {Type::Software, vector, false, 0, length}; }

/// A machine with helpers to edit its IDT.
struct Fixture : TestMachine {
  explicit Fixture(TestMode mode, bool user = false) : TestMachine(mode, user) {
    c().mode_changed();
    s.rip = 0x1234;
  }
  bool lm() const { return s.long_mode(); }
  u64 gate_at(u8 v) const { return kIdt + v * (lm() ? 16 : 8); }
  void gate(u8 v, u16 selector, u64 offset, u8 access, u8 ist = 0) {
    store<u64>(gate_at(v), (offset & 0xffff) | static_cast<u64>(selector) << 16 | static_cast<u64>(ist) << 32 |
                               static_cast<u64>(access) << 40 | (offset >> 16 & 0xffff) << 48);
    if (lm()) store<u64>(gate_at(v) + 8, offset >> 32);
  }
  Delivered deliver(const Event& e) {
    c().mode_changed();
    return deliver_event(c(), e);
  }
  u64 handler(u8 v) const { return kHandlers + v * 16; }
  u64 frame64(unsigned i) { return load<u64>(s.gpr[RSP] + 8 * i); }
  u32 frame32(unsigned i) { return load<u32>(s.gpr[RSP] + 4 * i); }
};

/// Everything that a failed delivery must leave alone.
struct Snapshot {
  explicit Snapshot(const VcpuState& s) : rip(s.rip), rflags(s.rflags) {
    for (unsigned i = 0; i < 16; ++i) gpr[i] = s.gpr[i];
    for (unsigned i = 0; i < kSegCount; ++i) selector[i] = s.seg[i].selector;
    cpl = s.cpl();
  }
  bool operator==(const Snapshot&) const = default;
  u64 rip, rflags, gpr[16];
  u16 selector[kSegCount];
  u8 cpl;
};

// ---- real mode ----

TEST(EventReal, PushesThreeWordsAndClearsFlags) {
  Fixture m(TestMode::Real16);
  m.s.rflags |= rflags::IF | rflags::TF | rflags::CF;
  EXPECT_EQ(m.deliver(external(0x21)), Delivered::Ok);
  EXPECT_EQ(m.s.seg[CS].selector, 0x3000);
  EXPECT_EQ(m.s.seg[CS].base, 0x30000u);
  EXPECT_EQ(m.s.rip, 0x210u);
  EXPECT_EQ(m.s.gpr[RSP], 0xff00u - 6);
  EXPECT_EQ(m.load<u16>(0x60000 + 0xff00 - 6), 0x1234);
  EXPECT_EQ(m.load<u16>(0x60000 + 0xff00 - 4), 0x4000);
  EXPECT_EQ(m.load<u16>(0x60000 + 0xff00 - 2), 0x303);
  EXPECT_EQ(m.s.rflags, rflags::FIXED1 | rflags::CF);
}

TEST(EventReal, StackPointerWraps) {
  Fixture m(TestMode::Real16);
  m.s.gpr[RSP] = 0xabcd0002;
  EXPECT_EQ(m.deliver(external(0x21)), Delivered::Ok);
  EXPECT_EQ(m.s.gpr[RSP], 0xabcdfffcu);
  EXPECT_EQ(m.load<u16>(0x60000), 0x0002);          // flags
  EXPECT_EQ(m.load<u16>(0x6fffe), 0x4000);
  EXPECT_EQ(m.load<u16>(0x6fffc), 0x1234);
}

TEST(EventReal, NoErrorCodeIsPushed) {
  Fixture m(TestMode::Real16);
  EXPECT_EQ(m.deliver(exception(vec::GP, 0)), Delivered::Ok);
  EXPECT_EQ(m.s.gpr[RSP], 0xff00u - 6);
}

TEST(EventReal, BeyondTheIvtIsAGeneralProtectionFaultAtTheInstruction) {
  Fixture m(TestMode::Real16);
  m.s.idtr.limit = 0x20 * 4 - 1;
  EXPECT_EQ(m.deliver(soft(0x20)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, 0xd0u);
  EXPECT_EQ(m.load<u16>(0x60000 + 0xff00 - 6), 0x1232);
}

TEST(EventReal, NoIvtAtAllIsATripleFault) {
  Fixture m(TestMode::Real16);
  m.s.idtr.limit = 0;
  EXPECT_EQ(m.deliver(exception(vec::UD)), Delivered::TripleFault);
}

// ---- long mode ----

TEST(Event64, SameLevelAlignsAndPushesSsRsp) {
  Fixture m(TestMode::Long64);
  m.s.gpr[RSP] = 0x6ff07;
  m.s.rflags |= rflags::IF | rflags::TF | rflags::NT;
  EXPECT_EQ(m.deliver(exception(vec::GP, 0x1238)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.s.gpr[RSP], 0x6ff00u - 48);
  EXPECT_EQ(m.frame64(0), 0x1238u);
  EXPECT_EQ(m.frame64(1), 0x1234u);
  EXPECT_EQ(m.frame64(2), sel::Code64);
  EXPECT_EQ(m.frame64(3), rflags::FIXED1 | rflags::IF | rflags::TF | rflags::NT | rflags::RF);
  EXPECT_EQ(m.frame64(4), 0x6ff07u);
  EXPECT_EQ(m.frame64(5), sel::Data);
  EXPECT_EQ(m.s.seg[SS].selector, sel::Data);
  EXPECT_EQ(m.s.rflags, rflags::FIXED1);
}

TEST(Event64, TrapGateKeepsIf) {
  Fixture m(TestMode::Long64);
  m.gate(0x40, sel::Code64, 0x30400, 0x8f);
  m.s.rflags |= rflags::IF;
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_TRUE(m.s.rflags & rflags::IF);
}

TEST(Event64, InnerLevelTakesRsp0AndANullSs) {
  Fixture m(TestMode::Long64, true);
  EXPECT_EQ(m.deliver(page_fault(0xdeadbeef000, 6)), Delivered::Ok);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.c().cpl, 0);
  EXPECT_EQ(m.s.seg[CS].selector, sel::Code64);
  EXPECT_EQ(m.s.seg[SS].selector, 0);
  EXPECT_TRUE(m.s.seg[SS].unusable);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStack0 - 48);
  EXPECT_EQ(m.frame64(0), 6u);
  EXPECT_EQ(m.frame64(2), sel::Code64User);
  EXPECT_EQ(m.frame64(4), TestMachine::kStackTop);
  EXPECT_EQ(m.frame64(5), sel::DataUser);
  EXPECT_EQ(m.s.cr2, 0xdeadbeef000u);
  EXPECT_EQ(m.s.seg[DS].selector, sel::DataUser);  // data segments stay
}

TEST(Event64, IstIsUsedAtEveryLevel) {
  for (bool user : {false, true}) {
    Fixture m(TestMode::Long64, user);
    m.gate(2, sel::Code64, 0x30020, 0x8e, 1);
    EXPECT_EQ(m.deliver({Type::Nmi, 2, false, 0, 0}), Delivered::Ok);
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kIst1 - 40);
    EXPECT_EQ(m.s.seg[SS].selector, user ? 0 : sel::Data);
    EXPECT_TRUE(m.s.nmi_blocked);
  }
}

TEST(Event64, IstBeyondTheTssIsTs) {
  Fixture m(TestMode::Long64);
  m.gate(0x40, sel::Code64, 0x30400, 0x8e, 7);
  m.s.tr.limit = 7 * 8 + 28 + 6;
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::TS));
  EXPECT_EQ(m.frame64(0), sel::Tss | 1u);
}

TEST(Event64, FromCompatibilityModeEntersSixtyFourBitCode) {
  Fixture m(TestMode::Compat32, true);
  m.s.gpr[RSP] = 0x6ff04;
  EXPECT_EQ(m.deliver(soft(0x80)), Delivered::Ok);
  EXPECT_TRUE(m.c().code64);
  EXPECT_EQ(m.frame64(0), 0x1234u);
  EXPECT_EQ(m.frame64(1), sel::Code32User);
  EXPECT_EQ(m.frame64(3), 0x6ff04u);
}

TEST(Event64, SoftInterruptNeedsTheGatesDpl) {
  Fixture m(TestMode::Long64, true);
  EXPECT_EQ(m.deliver(soft(0x20)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.frame64(0), 0x20u * 8 + 2);  // IDT, no EXT
  EXPECT_EQ(m.frame64(1), 0x1232u);        // the INT instruction itself
  EXPECT_TRUE(m.frame64(3) & rflags::RF);
}

TEST(Event64, HardwareIgnoresTheGatesDpl) {
  Fixture m(TestMode::Long64, true);
  EXPECT_EQ(m.deliver(external(0x20)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(0x20));
}

TEST(Event64, GateFaults) {
  struct Case { const char* what; u16 selector; u8 access; u8 vector; u32 error; };
  const Case cases[] = {
      {"not present", sel::Code64, 0x0e, vec::NP, 0x40 * 8 + 3},
      {"task gate", sel::Tss, 0x85, vec::GP, 0x40 * 8 + 3},
      {"16-bit gate", sel::Code64, 0x86, vec::GP, 0x40 * 8 + 3},
      {"code descriptor", sel::Code64, 0x9b, vec::GP, 0x40 * 8 + 3},
      {"null selector", 0, 0x8e, vec::GP, 1},
      {"null selector with RPL", 3, 0x8e, vec::GP, 1},
      {"beyond the GDT", 0x1000, 0x8e, vec::GP, 0x1001},
      {"data segment", sel::Data, 0x8e, vec::GP, sel::Data | 1},
      {"32-bit code", sel::Code32, 0x8e, vec::GP, sel::Code32 | 1},
      {"code of an outer level", sel::Code64User, 0x8e, vec::GP, (sel::Code64User & ~3u) | 1},
      {"LDT without an LDT", 0x0c, 0x8e, vec::GP, 0x0d},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Long64);
    m.gate(0x40, t.selector, 0x30400, t.access);
    EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
    EXPECT_EQ(m.s.rip, m.handler(t.vector));
    EXPECT_EQ(m.frame64(0), t.error);
    EXPECT_EQ(m.frame64(1), 0x1234u);
  }
}

TEST(Event64, CodeSegmentNotPresent) {
  Fixture m(TestMode::Long64);
  m.set_gdt(0x98, 0, 0xfffff, 0x1b, 0xa);
  m.gate(0x40, 0x98, 0x30400, 0x8e);
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::NP));
  EXPECT_EQ(m.frame64(0), 0x99u);
}

TEST(Event64, NonCanonicalHandlerAndStack) {
  Fixture m(TestMode::Long64);
  m.gate(0x40, sel::Code64, 0x8000'0000'0000, 0x8e);
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.frame64(0), 1u);

  Fixture n(TestMode::Long64);
  n.s.gpr[RSP] = 0x8000'0000'0100;
  n.gate(vec::SS, sel::Code64, 0x300c0, 0x8e, 1);
  EXPECT_EQ(n.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(n.s.rip, n.handler(vec::SS));
  EXPECT_EQ(n.frame64(0), 1u);
  EXPECT_EQ(n.frame64(4), 0x8000'0000'0100u);
}

TEST(Event64, PageFaultOnTheNewStackLeavesStateUnchangedUntilTheNextEvent) {
  // #GP from CPL 3 with RSP0 unmapped: contributory after benign #UD gives #PF; #PF also fails: #DF on an IST.
  Fixture m(TestMode::Long64, true);
  m.unmap(TestMachine::kStack0 - 0x1000);
  m.gate(vec::DF, sel::Code64, 0x30080, 0x8e, 1);
  EXPECT_EQ(m.deliver(exception(vec::UD)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::DF));
  EXPECT_EQ(m.frame64(0), 0u);
  EXPECT_EQ(m.frame64(1), 0x1234u);
  EXPECT_EQ(m.frame64(2), sel::Code64User);
  EXPECT_EQ(m.frame64(4), TestMachine::kStackTop);
  EXPECT_EQ(m.frame64(5), sel::DataUser);
  EXPECT_GE(m.s.cr2, TestMachine::kStack0 - 0x1000);
  EXPECT_LT(m.s.cr2, TestMachine::kStack0);
}

TEST(Event64, PageFaultDuringABenignEventIsDeliveredAsItself) {
  Fixture m(TestMode::Long64, true);
  m.unmap(TestMachine::kStack0 - 0x1000);
  m.gate(vec::PF, sel::Code64, 0x300e0, 0x8e, 1);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::PF));
  EXPECT_EQ(m.frame64(0), u64{pferr::W});  // a supervisor write
}

TEST(Event64, TripleFault) {
  Fixture m(TestMode::Long64, true);
  m.unmap(TestMachine::kStack0 - 0x1000);
  const Snapshot before(m.s);
  EXPECT_EQ(m.deliver(exception(vec::GP, 0)), Delivered::TripleFault);
  EXPECT_TRUE(before == Snapshot(m.s));
}

TEST(Event64, DoubleFaultTable) {
  // first, second (by a gate that is not present or not mapped), what must be delivered
  struct Case { const char* what; Event first; bool second_is_pf; u8 delivered; };
  const Case cases[] = {
      {"benign, contributory", exception(vec::UD), false, vec::NP},
      {"contributory, contributory", exception(vec::GP, 0), false, vec::DF},
      {"contributory, page fault", exception(vec::GP, 0), true, vec::PF},
      {"page fault, contributory", page_fault(0x1000, 0), false, vec::DF},
      {"page fault, page fault", page_fault(0x1000, 0), true, vec::DF},
      {"divide, contributory", exception(vec::DE), false, vec::DF},
      {"alignment check is benign", exception(vec::AC, 0), false, vec::NP},
      {"machine check is benign", exception(vec::MC), false, vec::NP},
      {"software interrupt is benign", soft(vec::GP), false, vec::NP},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Long64);
    if (t.second_is_pf) {
      // The first event's own handler stack is not mapped; the others' is an IST.
      m.gate(t.first.vector, sel::Code64, 0x30000, 0x8e, 2);
      m.store<u64>(TestMachine::kTss + 0x2c, 0x0000'1000'0000'0000);
      if (t.first.vector == vec::PF) m.gate(vec::DF, sel::Code64, m.handler(vec::DF), 0x8e, 1);
    } else {
      m.gate(t.first.vector, sel::Code64, 0x30000, 0x0e);
      if (t.first.type == Type::Software) m.gate(t.first.vector, sel::Code64, 0x30000, 0x6e);
    }
    EXPECT_EQ(m.deliver(t.first), Delivered::Ok);
    EXPECT_EQ(m.s.rip, m.handler(t.delivered));
  }
}

TEST(Event64, ReservedAndDebugFlags) {
  Fixture m(TestMode::Long64);
  m.s.dr7 = 0x400 | 1u << 13;
  m.s.dr6 = 0xffff0ff0 | 2;
  Event db = exception(vec::DB);
  db.payload = 1u << 14 | 1;
  EXPECT_EQ(m.deliver(db), Delivered::Ok);
  EXPECT_EQ(m.s.dr6, 0xffff4ff1u);
  EXPECT_EQ(m.s.dr7, 0x400u);
  EXPECT_FALSE(m.frame64(2) & rflags::RF);
}

TEST(Event64, RfIsPushedForFaultsOnly) {
  for (u8 v : {vec::DE, vec::UD, vec::NM, vec::PF}) {
    Fixture m(TestMode::Long64);
    Event e = exception(v);
    EXPECT_EQ(m.deliver(e), Delivered::Ok);
    EXPECT_TRUE(m.frame64(2) & rflags::RF) << unsigned{v};
  }
  for (const Event& e : {exception(vec::MC), external(0x30), soft(0x80), soft(vec::BP, 1)}) {
    Fixture m(TestMode::Long64);
    EXPECT_EQ(m.deliver(e), Delivered::Ok);
    EXPECT_FALSE(m.frame64(2) & rflags::RF) << unsigned{e.vector};
  }
}

TEST(Event64, ShadowsEnd) {
  Fixture m(TestMode::Long64);
  m.s.sti_shadow = m.s.mov_ss_shadow = true;
  EXPECT_EQ(m.deliver(exception(vec::UD)), Delivered::Ok);
  EXPECT_FALSE(m.s.sti_shadow);
  EXPECT_FALSE(m.s.mov_ss_shadow);
}

TEST(Event64, StackInMmioIsTriedAgain) {
  Fixture m(TestMode::Long64, true);
  m.map(0x800000, 0xf0000000, 7);
  m.store<u64>(TestMachine::kTss + 4, 0x800ff0);
  m.env.exits_to_give = 1;
  const Snapshot before(m.s);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Exit);
  EXPECT_TRUE(before == Snapshot(m.s));
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_FALSE(m.env.mmio.empty());
}

TEST(Event64, AccessedBitOfTheCodeSegmentIsSet) {
  Fixture m(TestMode::Long64);
  m.set_gdt(0x98, 0, 0xfffff, 0x9a, 0xa);
  m.gate(0x40, 0x98, 0x30400, 0x8e);
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.load<u8>(TestMachine::kGdt + 0x98 + 5), 0x9b);
  EXPECT_EQ(m.s.seg[CS].type, 11);
}

TEST(Event64, ConformingHandlerKeepsTheLevel) {
  Fixture m(TestMode::Long64, true);
  m.set_gdt(0x98, 0, 0xfffff, 0x9f, 0xa);
  m.gate(0x80, 0x98, 0x30800, 0xee);
  EXPECT_EQ(m.deliver(soft(0x80)), Delivered::Ok);
  EXPECT_EQ(m.s.cpl(), 3);
  EXPECT_EQ(m.s.seg[CS].selector, 0x9b);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 40);
}

TEST(Event64, InstructionBreakpointPushesTheRfItFinds) {
  Fixture m(TestMode::Long64);
  m.s.rflags |= rflags::RF;
  Event db = exception(vec::DB);
  db.payload = 1;
  EXPECT_EQ(m.deliver(db), Delivered::Ok);
  EXPECT_TRUE(m.frame64(2) & rflags::RF);
  EXPECT_FALSE(m.s.rflags & rflags::RF);
}

// ---- with the run loop: there and back ----

TEST(EventRun, InstructionBreakpointFiresOnceAndResumes) {
  for (TestMode mode : {TestMode::Prot32, TestMode::Long64}) {
    Fixture m(mode);
    m.deliver_events = true;
    const Bytes handler = mode == TestMode::Long64 ? hex("48 ff c3 48 cf") : hex("43 90 90 cf");  // inc rbx; iret
    std::memcpy(m.ram(m.handler(vec::DB)), handler.data(), handler.size());
    m.s.dr[0] = m.code_offset() + 1;
    m.s.dr7 = 0x401;
    EXPECT_TRUE(m.run(hex("90 90 90")).halted());
    EXPECT_EQ(m.s.gpr[RBX], 1u);
    EXPECT_EQ(m.s.dr6 & 0xf, 1u);
  }
}

TEST(EventRun, SoftwareInterruptReturnsBehindItself) {
  for (TestMode mode : {TestMode::Prot32, TestMode::Long64, TestMode::Compat32}) {
    Fixture m(mode);
    m.deliver_events = true;
    const Bytes handler = mode == TestMode::Prot32 ? hex("cf") : hex("48 cf");
    std::memcpy(m.ram(m.handler(0x80)), handler.data(), handler.size());
    EXPECT_TRUE(m.run(hex("cd 80 b1 07")).halted());
    EXPECT_EQ(m.s.gpr[RCX] & 0xff, 7u);
    EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop);
    EXPECT_EQ(m.s.rip, m.code_offset() + 5);
  }
}

TEST(EventRun, SoftwareInterruptWithoutPrivilegeFaultsAtItself) {
  Fixture m(TestMode::Long64, true);
  m.deliver_events = true;
  EXPECT_TRUE(m.run(hex("90 cd 20")).halted());
  EXPECT_EQ(m.s.rip, m.handler(vec::GP) + 1);
  EXPECT_EQ(m.frame64(0), 0x20u * 8 + 2);
  EXPECT_EQ(m.frame64(1), m.code_offset() + 1);
}

TEST(EventRun, NmiStaysBlockedUntilIret) {
  Fixture m(TestMode::Long64);
  m.deliver_events = true;
  std::memcpy(m.ram(m.handler(vec::NMI)), "\x48\xcf", 2);
  m.load_code(hex("f4"));
  m.s.rip = m.code_offset();
  EXPECT_EQ(m.deliver({Type::Nmi, vec::NMI, false, 0, 0}), Delivered::Ok);
  EXPECT_TRUE(m.s.nmi_blocked);
  EXPECT_TRUE(m.resume().halted());
  EXPECT_FALSE(m.s.nmi_blocked);
  EXPECT_EQ(m.env.nmi_unblocks, 1u);
}

TEST(EventRun, TripleFaultEndsTheRun) {
  Fixture m(TestMode::Long64);
  m.deliver_events = true;
  m.s.idtr.limit = 0;
  EXPECT_EQ(m.run(hex("0f 0b")).result, Interpreter::Result::TripleFault);
}

// ---- legacy protected mode ----

TEST(Event32, SameLevel) {
  Fixture m(TestMode::Prot32);
  m.s.rflags |= rflags::IF;
  EXPECT_EQ(m.deliver(exception(vec::NP, 0x20)), Delivered::Ok);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 16);
  EXPECT_EQ(m.frame32(0), 0x20u);
  EXPECT_EQ(m.frame32(1), 0x1234u);
  EXPECT_EQ(m.frame32(2), sel::Code32);
  EXPECT_EQ(m.frame32(3), 0x10202u);
}

TEST(Event32, InnerLevelTakesTheTssStack) {
  Fixture m(TestMode::Prot32, true);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.seg[SS].selector, sel::Data);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStack0 - 20);
  EXPECT_EQ(m.frame32(3), TestMachine::kStackTop);
  EXPECT_EQ(m.frame32(4), sel::DataUser);
}

TEST(Event32, SixteenBitGatePushesWords) {
  Fixture m(TestMode::Prot32);
  m.gate(0x40, sel::Code32, 0x1'8000, 0x86);
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, 0x8000u);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStackTop - 6);
  EXPECT_EQ(m.load<u16>(m.s.gpr[RSP]), 0x1234);
}

TEST(Event32, NewStackFaults) {
  struct Case { const char* what; u16 ss; u8 access; u8 vector; u32 error; };
  const Case cases[] = {
      {"null", 0, 0, vec::TS, 1},
      {"RPL", 0x9b, 0x93, vec::TS, 0x99},
      {"DPL", 0x98, 0xf3, vec::TS, 0x99},
      {"code", 0x98, 0x9b, vec::TS, 0x99},
      {"read-only", 0x98, 0x91, vec::TS, 0x99},
      {"system", 0x98, 0x82, vec::TS, 0x99},
      {"not present", 0x98, 0x13, vec::SS, 0x99},
      {"beyond the GDT", 0x1000, 0, vec::TS, 0x1001},
  };
  for (const Case& t : cases) {
    SCOPED_TRACE(t.what);
    Fixture m(TestMode::Prot32, true);
    m.set_gdt(0x98, 0, 0xfffff, t.access, 0xc);
    m.store<u32>(TestMachine::kTss + 8, t.ss);
    // The second event's handler runs at CPL 3, so that it needs no inner stack.
    m.set_gdt(0xa0, 0, 0xfffff, 0xff, 0xc);
    m.gate(t.vector, 0xa0, 0x30000 + t.vector * 16, 0x8e);
    EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
    EXPECT_EQ(m.s.rip, m.handler(t.vector));
    EXPECT_EQ(m.s.cpl(), 3);
    EXPECT_EQ(m.frame32(0), t.error);
  }
}

TEST(Event32, NewStackTooSmallIsSsWithItsSelector) {
  Fixture m(TestMode::Prot32, true);
  m.set_gdt(0x98, 0, 0xfff, 0x93, 0x4);
  m.store<u32>(TestMachine::kTss + 4, 8);
  m.store<u32>(TestMachine::kTss + 8, 0x98);
  m.set_gdt(0xa0, 0, 0xfffff, 0xff, 0xc);
  m.gate(vec::SS, 0xa0, m.handler(vec::SS), 0x8e);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::SS));
  EXPECT_EQ(m.frame32(0), 0x99u);
}

TEST(Event32, TssTooSmallIsTs) {
  Fixture m(TestMode::Prot32, true);
  m.s.tr.limit = 8;
  m.set_gdt(0xa0, 0, 0xfffff, 0xff, 0xc);
  m.gate(vec::TS, 0xa0, m.handler(vec::TS), 0x8e);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.frame32(0), sel::Tss | 1u);
}

TEST(Event32, SixteenBitTss) {
  Fixture m(TestMode::Prot32, true);
  m.s.tr.type = 3;
  m.store<u16>(TestMachine::kTss + 2, 0x7000);
  m.store<u16>(TestMachine::kTss + 4, sel::Data);
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.gpr[RSP], 0x7000u - 20);
}

TEST(Event32, StackOfSixteenBitsKeepsTheUpperHalf) {
  Fixture m(TestMode::Prot16);
  m.s.gpr[RSP] = 0x1234ff00;
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.gpr[RSP], 0x1234ff00u - 12);
  EXPECT_EQ(m.load<u32>(0x6fef4), 0x1234u);
}

TEST(Event32, HandlerBeyondTheCodeLimit) {
  Fixture m(TestMode::Prot32);
  m.set_gdt(0x98, 0, 0xffff, 0x9b, 0x4);
  m.gate(0x40, 0x98, 0x10000, 0x8e);
  EXPECT_EQ(m.deliver(external(0x40)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.frame32(0), 1u);
}

// ---- virtual-8086 ----

TEST(EventV86, EntersRingZeroWithNineDwords) {
  Fixture m(TestMode::V8086);
  m.s.rflags |= rflags::IF;
  EXPECT_EQ(m.deliver(exception(vec::GP, 0)), Delivered::Ok);
  EXPECT_FALSE(m.s.rflags & rflags::VM);
  EXPECT_EQ(m.s.cpl(), 0);
  EXPECT_EQ(m.s.gpr[RSP], TestMachine::kStack0 - 40);
  EXPECT_EQ(m.frame32(0), 0u);
  EXPECT_EQ(m.frame32(1), 0x1234u);
  EXPECT_EQ(m.frame32(2), 0x4000u);
  EXPECT_EQ(m.frame32(3), rflags::VM | rflags::RF | rflags::IOPL | rflags::IF | rflags::FIXED1);
  EXPECT_EQ(m.frame32(4), 0xff00u);
  EXPECT_EQ(m.frame32(5), 0x6000u);
  EXPECT_EQ(m.frame32(6), 0x5000u);
  EXPECT_EQ(m.frame32(9), 0x5000u);
  for (Seg r : {DS, ES, FS, GS}) {
    EXPECT_EQ(m.s.seg[r].selector, 0);
    EXPECT_TRUE(m.s.seg[r].unusable);
  }
}

TEST(EventV86, HandlerMustBeRingZeroCode) {
  Fixture m(TestMode::V8086);
  m.gate(0x80, sel::Code32User & ~3, 0x30800, 0xee);
  EXPECT_EQ(m.deliver(soft(0x80)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.frame32(0), sel::Code32User & ~3u);
}

// ---- limits of the IDT ----

TEST(EventLimits, VectorBeyondTheIdt) {
  Fixture m(TestMode::Prot32);
  m.s.idtr.limit = 0x30 * 8 - 1;
  EXPECT_EQ(m.deliver(external(0x30)), Delivered::Ok);
  EXPECT_EQ(m.s.rip, m.handler(vec::GP));
  EXPECT_EQ(m.frame32(0), 0x30u * 8 + 3);
}

TEST(EventLimits, EmptyIdtIsATripleFault) {
  for (TestMode mode : {TestMode::Prot32, TestMode::Long64, TestMode::V8086, TestMode::Compat32}) {
    Fixture m(mode);
    m.s.idtr.limit = 0;
    EXPECT_EQ(m.deliver(exception(vec::UD)), Delivered::TripleFault);
  }
}

}  // namespace
}  // namespace ring3::engine::test
