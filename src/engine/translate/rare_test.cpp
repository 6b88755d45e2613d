#include <gtest/gtest.h>

#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// Instructions of no family run translated, and do what the interpreter does.
namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

struct Machine : TestMachine {
  explicit Machine(TestMode mode = TestMode::Long64) : TestMachine(mode) {
    auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), {.arena_bytes = 1u << 20});
    CHECK(v.ok());
    vcpu = std::move(*v);
    runner = [this](u64 budget) { return vcpu->run(budget); };
  }
  ~Machine() { vcpu.reset(); }
  u64 interpreted() const { return vcpu->stats().interpreted; }
  u64 translated() const { return vcpu->stats().translated; }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

constexpr u64 kData = TestMachine::kData, kCode = TestMachine::kCode;

TEST(Rare, TheInstructionBehindStiRunsTranslated) {
  Machine m;
  m.s.rflags &= ~rflags::IF;
  m.s.gpr[RAX] = 1;
  EXPECT_TRUE(m.run(hex("fb 48 01 c0 48 01 c0")).halted());  // sti; add rax, rax; add rax, rax
  EXPECT_EQ(m.s.gpr[RAX], 4u);
  EXPECT_TRUE(m.s.rflags & rflags::IF);
  EXPECT_FALSE(m.s.sti_shadow);
  EXPECT_EQ(m.interpreted(), 1u);  // HLT
}

TEST(Rare, ALeftInstructionBehindStiIsInTheShadow) {
  Machine m;
  m.s.rflags &= ~rflags::IF;
  m.s.gpr[RBX] = kCode;
  // A store to a code page is interpreted. Attention is raised meanwhile: it waits for the instruction.
  m.load_code(hex("fb 88 43 20 90 90 90"));  // sti; mov [rbx+20h], al; nop
  const u64 start = m.s.rip;
  m.c().event_filter = [](const Event&) { return true; };
  EXPECT_EQ(m.vcpu->run(2), Interpreter::Result::Budget);
  EXPECT_EQ(m.s.rip, start + 4);
  EXPECT_FALSE(m.s.sti_shadow);
}

TEST(Rare, PopToMemoryUsesTheNewStackPointer) {
  Machine m;
  m.s.gpr[RBX] = kData;
  m.s.gpr[RAX] = 0x1122334455667788;
  m.s.gpr[RCX] = 0x99;
  const u64 rsp = m.s.gpr[RSP];
  EXPECT_TRUE(m.run(hex("50 8f 43 08 51 50 8f 04 24")).halted());  // push rax; pop [rbx+8]; push rcx; push rax; pop [rsp]
  EXPECT_EQ(m.load<u64>(kData + 8), 0x1122334455667788u);
  EXPECT_EQ(m.s.gpr[RSP], rsp - 8);
  EXPECT_EQ(m.load<u64>(rsp - 8), 0x1122334455667788u);
  EXPECT_EQ(m.interpreted(), 1u);
}

/// 1: add eax, IMM, the last two bytes in the next page; dec ecx; jnz 1b; hlt
struct EdgeLoop : Machine {
  static constexpr u64 kAt = 0x2000ffd;
  EdgeLoop() {
    load_code(hex("05 01 00"), 0x800ffd);
    load_code(hex("00 00 ff c9 75 f7 f4"), 0x801000);
    load_code(hex("01 00 ff c9 75 f7 f4"), 0x802000);
    map(kAt, 0x800000, kPresent | kWritable);
  }
  u64 go() {
    s.gpr[RAX] = 0;
    s.gpr[RCX] = 1000;
    s.rip = kAt;
    const u64 before = interpreted();
    EXPECT_TRUE(resume().halted());
    return interpreted() - before;
  }
};

TEST(Rare, AnInstructionAtAPageEndIsTranslatedOnceTheNextPageIsThere) {
  EdgeLoop m;
  m.s.rip = EdgeLoop::kAt;
  EXPECT_TRUE(m.resume().raised(vec::PF, pferr::I));
  m.map(0x2001000, 0x801000, TestMachine::kPresent);
  EXPECT_LE(m.go(), 2u);
  EXPECT_EQ(m.s.gpr[RAX], 1000u);
}

TEST(Rare, AnInstructionAtAPageEndIsTranslatedAnewForAnotherNextPage) {
  EdgeLoop m;
  m.map(0x2001000, 0x801000, TestMachine::kPresent);
  EXPECT_LE(m.go(), 2u);
  m.map(0x2001000, 0x802000, TestMachine::kPresent);
  EXPECT_LE(m.go(), 4u);
  EXPECT_EQ(m.s.gpr[RAX], 1000u * 0x10001);
  EXPECT_LE(m.go(), 2u);
}

TEST(Rare, AnInstructionAtAPageEndStaysTranslatedWhereTheTlbForgets) {
  EdgeLoop m;
  m.map(0x2001000, 0x801000, TestMachine::kPresent);
  m.go();
  const u64 before = m.translated();
  for (unsigned n = 0; n < 500; n++) {
    m.mmu().flush_all();
    EXPECT_LE(m.go(), 2u);
  }
  EXPECT_EQ(m.translated(), before);
}

TEST(Rare, MovWithAnOffset) {
  Machine m;
  m.store<u64>(kData, 0x1122334455667788);
  // mov rax, [moffs kData]; mov [moffs kData + 16], eax
  EXPECT_TRUE(m.run(hex("48 a1 00 00 05 00 00 00 00 00 a3 10 00 05 00 00 00 00 00")).halted());
  EXPECT_EQ(m.s.gpr[RAX], 0x1122334455667788u);
  EXPECT_EQ(m.load<u64>(kData + 16), 0x55667788u);
  EXPECT_EQ(m.interpreted(), 1u);
}

TEST(Rare, MxcsrIsLoadedAndStored) {
  Machine m;
  m.c().features = host_features();
  m.s.cr4 |= cr4::OSFXSR;
  m.s.gpr[RBX] = kData;
  m.store<u32>(kData, 0x7fa0);  // round to zero, one flag up
  // mov [rbx+16], eax; ldmxcsr [rbx]; cvtss2si eax, [rbx+8]; stmxcsr [rbx+4]
  m.store<float>(kData + 8, 2.75f);
  const auto out = m.run(hex("89 43 10 0f ae 13 f3 0f 2d 43 08 0f ae 5b 04"));
  EXPECT_TRUE(out.halted());
  EXPECT_EQ(m.interpreted(), 1u);
  EXPECT_EQ(m.s.gpr[RAX], 2u);
  EXPECT_EQ(m.load<u32>(kData + 4), 0x7fa0u);
  // Unmasked: the interpreter goes on with it.
  m.store<u32>(kData, 0x1f00);
  EXPECT_TRUE(m.run(hex("0f ae 13 0f ae 5b 04")).halted());
  EXPECT_EQ(m.load<u32>(kData + 4), 0x1f00u);
  m.store<u32>(kData, 0x10000);
  EXPECT_TRUE(m.run(hex("0f ae 13")).raised(vec::GP, 0));
}

TEST(Rare, SelectorsAndBasesAreRead) {
  Machine m;
  m.s.cr4 |= cr4::FSGSBASE;
  m.s.seg[DS].selector = 0x2b;
  m.s.gpr[RBX] = 0x7fff12345678;
  m.s.gpr[R13] = ~0ull;
  m.s.gpr[RCX] = ~0ull;
  // mov r13d, ds; mov cx, ds; wrfsbase rbx; rdfsbase r14; rdfsbase edx
  EXPECT_TRUE(m.run(hex("41 8c dd 66 8c d9 f3 48 0f ae d3 f3 49 0f ae c6 f3 0f ae c2")).halted());
  EXPECT_EQ(m.s.gpr[R13], 0x2bu);
  EXPECT_EQ(m.s.gpr[RCX], 0xffffffffffff002bu);
  EXPECT_EQ(m.s.seg[FS].base, 0x7fff12345678u);
  EXPECT_EQ(m.s.gpr[R14], 0x7fff12345678u);
  EXPECT_EQ(m.s.gpr[RDX], 0x12345678u);
  EXPECT_EQ(m.interpreted(), 1u);
  m.s.gpr[RBX] = 1ull << 63;
  EXPECT_TRUE(m.run(hex("f3 48 0f ae d3")).raised(vec::GP, 0));
  m.s.cr4 &= ~cr4::FSGSBASE;
  EXPECT_TRUE(m.run(hex("f3 48 0f ae c3")).raised(vec::UD));
}

TEST(Rare, AnInstructionInTwoPagesFollowsItsBytes) {
  for (unsigned here = 1; here < 6; here++) {
    Machine m;
    std::vector<u8> code(kPageSize - here, 0x90);
    const u8 add[] = {0x48, 0x05, 1, 2, 3, 4};  // add rax, 04030201h
    code.insert(code.end(), add, add + sizeof add);
    const u64 last = kCode + kPageSize - here + sizeof add - 1;
    u64 before = 0;
    for (u8 top = 4; top < 8; top++) {
      m.s.gpr[RAX] = 0;
      m.s.rip = kCode;
      if (top == 4) {
        EXPECT_TRUE(m.run(code, ~0ull).halted());
      } else {
        m.store<u8>(last, top);  // as a device would: nobody is told
        m.mmu().expire_fetches();
        EXPECT_TRUE(m.resume(~0ull).halted());
      }
      EXPECT_EQ(m.s.gpr[RAX], 0x30201u + (u64{top} << 24)) << here;
      before = m.interpreted();
    }
    m.s.rip = kCode;
    EXPECT_TRUE(m.resume(~0ull).halted());
    m.s.rip = kCode;
    EXPECT_TRUE(m.resume(~0ull).halted());
    EXPECT_GT(m.interpreted(), before);
  }
}

TEST(Rare, WhatWasUndefinedIsLookedAtAgain) {
  Machine m;
  m.s.gpr[RAX] = kData;
  // nop; c7 /7 with a displacement is undefined, c7 /0 is none: a byte behind the first one changes.
  EXPECT_TRUE(m.run(hex("90 48 c7 b8 08 00 00 00 44 33 22 11")).raised(vec::UD));
  m.store<u8>(kCode + 3, 0x80);  // as a device would: nobody is told
  m.mmu().expire_fetches();
  m.s.rip = kCode;
  EXPECT_TRUE(m.resume().halted());
  EXPECT_EQ(m.load<u64>(kData + 8), 0x11223344u);
  // By its own code, from a block that ran before: dec rcx; jz +5; mov byte [rdx], 80h; jmp +0; nop; c7 /7
  Machine n;
  n.s.gpr[RAX] = kData;
  n.s.gpr[RDX] = kCode + 13;
  n.s.gpr[RCX] = 1;
  EXPECT_TRUE(n.run(hex("48 ff c9 74 05 c6 02 80 eb 00 90 48 c7 b8 08 00 00 00 44 33 22 11")).raised(vec::UD));
  n.s.rip = kCode;
  n.s.gpr[RCX] = 2;
  EXPECT_TRUE(n.resume().halted());
  EXPECT_EQ(n.load<u64>(kData + 8), 0x11223344u);
}

}  // namespace
}  // namespace ring3::engine
