#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// System instructions that translated code runs without leaving: what they do, and that they are not
/// interpreted.
namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

struct Machine : TestMachine {
  Machine() : TestMachine(TestMode::Long64) {
    auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), {.arena_bytes = 1u << 20});
    CHECK(v.ok());
    vcpu = std::move(*v);
    runner = [this](u64 budget) { return vcpu->run(budget); };
  }
  ~Machine() { vcpu.reset(); }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

TEST(SystemOps, SwapgsExchangesTheBases) {
  Machine m;
  m.s.seg[GS].base = 0x50000;
  m.s.msr.kernel_gs_base = 0x51000;
  m.store(0x50008, 0x1111);
  m.store(0x51008, 0x2222);
  // swapgs; mov rax, gs:[8]; swapgs; mov rbx, gs:[8]; swapgs
  EXPECT_TRUE(m.run(hex("0f 01 f8 65 48 8b 04 25 08 00 00 00 0f 01 f8 65 48 8b 1c 25 08 00 00 00 0f 01 f8")).halted());
  EXPECT_EQ(m.s.gpr[RAX], 0x2222u);
  EXPECT_EQ(m.s.gpr[RBX], 0x1111u);
  EXPECT_EQ(m.s.seg[GS].base, 0x51000u);
  EXPECT_EQ(m.s.msr.kernel_gs_base, 0x50000u);
  EXPECT_EQ(m.vcpu->stats().interpreted, 1u);  // HLT
}

TEST(SystemOps, StacAndClacKeepTheStatusFlags) {
  Machine m;
  m.s.rflags |= rflags::CF | rflags::OF | rflags::ZF;
  const u64 flags = m.s.rflags;
  EXPECT_TRUE(m.run(hex("0f 01 cb")).halted());  // stac
  EXPECT_EQ(m.s.rflags, flags | rflags::AC);
  EXPECT_TRUE(m.run(hex("0f 01 ca")).halted());  // clac
  EXPECT_EQ(m.s.rflags, flags);
}

TEST(SystemOps, PopfTakesInterruptAndStatusFlags) {
  Machine m;
  m.s.gpr[RAX] = rflags::FIXED1 | rflags::IF | rflags::OF | rflags::SF | rflags::CF;
  EXPECT_TRUE(m.run(hex("50 9d")).halted());  // push rax; popf
  EXPECT_EQ(m.s.rflags, m.s.gpr[RAX]);
  m.s.gpr[RAX] = rflags::FIXED1 | rflags::ZF | rflags::AF | rflags::PF;
  EXPECT_TRUE(m.run(hex("50 9d")).halted());
  EXPECT_EQ(m.s.rflags, m.s.gpr[RAX]);
}

TEST(SystemOps, PopfThatOpensTheInterruptWindowEndsTheRun) {
  Machine m;
  m.s.gpr[RAX] = rflags::FIXED1 | rflags::IF;
  m.s.rflags &= ~rflags::IF;
  m.c().interrupt_window = true;
  m.load_code(hex("50 9d 90 90"));
  const u64 start = m.s.rip;
  EXPECT_EQ(m.vcpu->run(100), Interpreter::Result::Attention);
  EXPECT_EQ(m.s.rip, start + 2);
}

TEST(SystemOps, StiHoldsInterruptsForOneInstruction) {
  Machine m;
  m.s.rflags &= ~rflags::IF;
  m.c().interrupt_window = true;
  m.load_code(hex("fb 90 90 90"));  // sti; nop
  const u64 start = m.s.rip;
  EXPECT_EQ(m.vcpu->run(1000), Interpreter::Result::Attention);
  EXPECT_EQ(m.s.rip, start + 2);
  EXPECT_FALSE(m.s.sti_shadow);
}

TEST(SystemOps, ControlRegistersAndTheTimeStampCounterAreRead) {
  Machine m;
  m.s.cr2 = 0x123456789a;
  m.s.gpr[RAX] = m.s.gpr[RDX] = ~0ull;
  // mov r14, cr2; rdtsc; mov rbx, cr3
  EXPECT_TRUE(m.run(hex("41 0f 20 d6 0f 20 db 0f 31")).halted());
  EXPECT_EQ(m.s.gpr[R14], 0x123456789au);
  EXPECT_EQ(m.s.gpr[RBX], m.s.cr3);
  EXPECT_EQ(m.s.gpr[RAX] >> 32, 0u);
  EXPECT_EQ(m.s.gpr[RDX] >> 32, 0u);
  EXPECT_EQ(m.vcpu->stats().interpreted, 1u);
}

}  // namespace
}  // namespace ring3::engine
