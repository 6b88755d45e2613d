#pragma once
#include <gtest/gtest.h>

#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// For tests of single instructions: a machine in which they are interpreted or translated, and the same code in one of each.
namespace ring3::engine::test {

struct EitherMachine : TestMachine {
  EitherMachine(bool translated, TestMode mode, bool user) : TestMachine(mode, user) {
    if (translated) {
      auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), {.arena_bytes = 1u << 20});
      CHECK(v.ok());
      vcpu = std::move(*v);
      runner = [this](u64 budget) { return vcpu->run(budget); };
    } else {
      runner = [this](u64 budget) { return interpreter().run(budget); };
    }
    c().features = host_features();
  }
  ~EitherMachine() { vcpu.reset(); }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

/// Both end at the HLT behind the code, the translated one having left that and `left` more instructions to the interpreter.
inline void run_both(EitherMachine& interpreted, EitherMachine& translated, const char* code, unsigned left) {
  const u64 before = translated.vcpu->stats().interpreted;
  const Outcome x = interpreted.run(hex(code)), y = translated.run(hex(code));
  EXPECT_TRUE(interpreted.ended_at_hlt(x) && translated.ended_at_hlt(y)) << code;
  EXPECT_EQ(translated.vcpu->stats().interpreted - before, left + 1) << code;
}

}  // namespace ring3::engine::test
