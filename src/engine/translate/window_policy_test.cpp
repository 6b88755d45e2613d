#include <gtest/gtest.h>

#include "engine/translate/test_pair.hpp"

/// Who gets a host window, and when (window_policy.cpp).
namespace ring3::engine {
namespace {

using namespace test;

constexpr unsigned kSamples = 8;
constexpr u64 kSpaces[] = {TestMachine::kRoot, 0x78000, 0x79000};

class Sampled {
 public:
  explicit Sampled(unsigned samples = kSamples) : m_(TestMode::Long64, true) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    options.window_samples = samples;
    auto made = TranslatorVcpu::create(m_.s, m_.mmu(), m_.interpreter(), create_block_translator(), options);
    CHECK(made.ok());
    vcpu_ = std::move(*made);
    m_.runner = [this](u64 budget) { return vcpu_->run(budget); };
    for (u64 space : kSpaces)
      if (space != TestMachine::kRoot) std::memcpy(m_.ram(space), m_.ram(TestMachine::kRoot), kPageSize);
    m_.s.cr4 |= cr4::PCIDE;
    m_.mmu().flush_all();
  }
  /// User code of this address space is found running here, some time after the last. Whether it has a window then.
  bool found(u64 rip, unsigned space = 0) {
    const u64 until = __builtin_ia32_rdtsc() + (3u << 20);
    while (__builtin_ia32_rdtsc() < until) {}
    return found_at_once(rip, space);
  }
  bool found_at_once(u64 rip, unsigned space = 0) {
    m_.s.cr3 = kSpaces[space] | (space + 1);
    m_.mmu().set_cr3(m_.s.cr3, true);
    m_.s.rip = rip;
    m_.c().attention() = 1;
    EXPECT_EQ(m_.resume(10).result, Interpreter::Result::Attention);
    m_.c().attention() = 0;
    return m_.mmu().window() != Mmu::WindowState::None;
  }

 private:
  TestMachine m_;
  std::unique_ptr<TranslatorVcpu> vcpu_;
};

constexpr u64 kHere = 0x40'0000;

TEST(WindowPolicy, TwiceAtOnePlace) {
  Sampled s;
  EXPECT_FALSE(s.found(kHere));
  EXPECT_FALSE(s.found_at_once(kHere)) << "too soon to count";
  EXPECT_TRUE(s.found(kHere + 0x800));
}

TEST(WindowPolicy, AllOverThePlace) {
  Sampled s;
  for (unsigned n = 0; n < kSamples; n++) EXPECT_FALSE(s.found(kHere + n * 0x1000)) << n;
  EXPECT_TRUE(s.found(kHere + kSamples * 0x1000));
}

TEST(WindowPolicy, TwoProgramsInTurn) {
  Sampled s;
  for (unsigned n = 0; n < 12; n++) EXPECT_FALSE(s.found(kHere, n % 2)) << n;
}

TEST(WindowPolicy, ThePlaceOfAnotherProgram) {
  Sampled s;
  for (unsigned n = 1; n < 5; n++) EXPECT_FALSE(s.found(kHere + n * 0x1000));
  EXPECT_FALSE(s.found(kHere, 1));
  EXPECT_FALSE(s.found(kHere)) << "where the other one was";
  EXPECT_TRUE(s.found(kHere));
}

TEST(WindowPolicy, TheNextProgramNeedNotWaitLong) {
  Sampled s;
  for (unsigned n = 0; n < 100; n++) s.found(kHere);
  unsigned n = 1;
  while (n < 20 && !s.found(kHere, 2)) n++;
  // Its predecessor's samples count half as much each time; the window that there is was another's.
  EXPECT_LE(n, 6u);
  EXPECT_GE(n, 2u);
}

TEST(WindowPolicy, NoneWhereNoneIsWanted) {
  Sampled s(0);
  for (unsigned n = 0; n < 12; n++) EXPECT_FALSE(s.found(kHere)) << n;
}

}  // namespace
}  // namespace ring3::engine
