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
    m_.c().attention().raise(1);
    EXPECT_EQ(m_.resume(10).result, Interpreter::Result::Attention);
    m_.c().attention().take();
    return m_.mmu().window() != Mmu::WindowState::None;
  }
  /// It reads a byte of each of so many pages that the TLB does not know.
  void goes_to_new_pages(unsigned count) {
    const Bytes code = hex("48 8b 07 48 81 c7 00 10 00 00 ff c9 75 f3 f4");  // mov rax, [rdi]; add rdi, 4096; dec ecx; jnz; hlt
    std::memcpy(m_.ram(TestMachine::kCode), code.data(), code.size());
    m_.mmu().flush_all();
    m_.s.gpr[RDI] = 0x100000;
    m_.s.gpr[RCX] = count;
    m_.s.rip = TestMachine::kCode;
    const u64 before = vcpu_->stats().fills;
    EXPECT_TRUE(m_.resume(100000).raised(vec::GP, 0)) << "HLT";
    EXPECT_GE(vcpu_->stats().fills - before, count);
  }

 private:
  TestMachine m_;
  std::unique_ptr<TranslatorVcpu> vcpu_;
};

constexpr u64 kHere = 0x40'0000;

/// Tries again where the machine was busy with others meanwhile, which counts as time here.
template <class F>
void within(u64 ticks, F f) {
  for (unsigned n = 0; n < 50; n++) {
    Sampled s;
    EXPECT_FALSE(s.found(kHere));
    const u64 start = __builtin_ia32_rdtsc();
    const bool early = f(s);
    if (__builtin_ia32_rdtsc() - start >= ticks) continue;
    EXPECT_FALSE(early);
    EXPECT_TRUE(s.found(kHere + 0x800));
    return;
  }
  FAIL() << "never left alone for long enough";
}

TEST(WindowPolicy, TwiceAtOnePlace) {
  within(1u << 20, [](Sampled& s) { return s.found_at_once(kHere); });  // too soon to count
}

TEST(WindowPolicy, ALoopThatGoesToNewPagesWaits) {
  constexpr unsigned kPages = 3000;
  within(u64{kPages - 100} << 14, [](Sampled& s) {
    s.goes_to_new_pages(kPages);
    return s.found(kHere);
  });
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
