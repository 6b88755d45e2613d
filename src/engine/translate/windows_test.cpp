#include <gtest/gtest.h>

#include <array>

#include "engine/translate/test_pair.hpp"

/// Blocks of windowed code whose operands stand off several registers by turns (windows.cpp, "certain" regions): the
/// registers point into regions of which the block was made for some, into others, and where nothing is mapped.
namespace ring3::engine {
namespace {

using namespace test;

/// The same pages once more, in the regions where programs have their stacks, where position-independent ones are, and in
/// one of no particular use.
constexpr u64 kFar = 0x7ffd'0000'0000, kProgram = 0x5580'0000'0000, kElsewhere = 0x2000'0000'0000;

class Code {
 public:
  explicit Code(Random& rng) : rng_(rng) {}
  /// Registers that operands stand off, in the host's registers and in the frame.
  static constexpr u8 kBases[] = {RBX, RBP, RSI, RDI, R12, R13, R9, R10};

  void access() {
    const u8 base = rng_.one_in(12) ? kBases[6 + rng_.below(2)] : kBases[rng_.below(6)];
    static constexpr u8 kRegisters[] = {RAX, RCX, RDX, R8, R11, R15};
    const u8 reg = kRegisters[rng_.below(6)];
    const u64 kind = rng_.below(7);
    const u8 rex = static_cast<u8>(0x48 | (reg >> 3) << 2 | base >> 3);
    switch (kind) {
      case 0: op({rex, 0x8b}, reg, base); break;                            // mov reg, [base]
      case 1: op({rex, 0x89}, reg, base); break;                            // mov [base], reg
      case 2: op({rex, 0x03}, reg, base); break;                            // add reg, [base]
      case 3: op({rex, 0x11}, reg, base); break;                            // adc [base], reg: flags live before it
      case 4: op({rex, 0x0f, 0xb6}, reg, base); break;                      // movzx reg, byte [base]
      case 5: op({rex, 0x3b}, reg, base); break;                            // cmp reg, [base]
      default: op({static_cast<u8>(0x40 | base >> 3), 0x0f, 0x10}, 2, base);  // movups xmm2, [base]
    }
  }
  void between() {
    switch (rng_.below(6)) {
      case 0: add({0x0f, 0x92, 0xc0}); break;  // setc al
      case 1: add({0x48, 0x83, static_cast<u8>(0xc0 | kBases[rng_.below(4)]), 8}); break;  // add base, 8
      case 2: add({0x4d, 0x01, 0xd9}); break;        // add r9, r11
      case 3: add({0x49, 0xff, 0xc7}); break;        // inc r15
      case 4: add({0x72, 0x00}); break;              // jc to what follows
      default: add({0x50, 0x5a}); break;             // push rax; pop rdx
    }
  }
  Bytes take() {
    add({0xf4});
    return std::move(code_);
  }

 private:
  void add(std::initializer_list<u8> bytes) { code_.insert(code_.end(), bytes); }
  void op(std::initializer_list<u8> opcode, u8 reg, u8 base) {
    add(opcode);
    add({static_cast<u8>(0x40 | (reg & 7) << 3 | (base & 7))});
    if ((base & 7) == 4) add({0x24});
    add({static_cast<u8>(rng_.below(16) * 8 - 64)});
  }
  Random& rng_;
  Bytes code_;
};

TEST(TranslatedCode, RegionsThatAreCertainAreSo) {
  Pair pair(64, true);
  Random memory(9);
  pair.randomise_memory(memory);
  for (Side* side : {&pair.interpreted(), &pair.translated()})
    for (u64 far : {kFar, kProgram, kElsewhere})
      for (u64 page = kLow; page < kHigh; page += 0x1000)
        side->m.map(far + page, page, TestMachine::kPresent | TestMachine::kWritable | TestMachine::kUser);
  unsigned failures = 0, halted = 0, faulted = 0;
  for (unsigned n = 0; n < rounds(1500) && failures < 10; n++) {
    Random rng(first_seed() * 7000003 + n);
    Code code(rng);
    for (unsigned k = 0; k < 26; k++) rng.below(4) ? code.access() : code.between();
    const Bytes bytes = code.take();
    pair.load(bytes);
    for (unsigned time = 0; time < 4; time++) {
      pair.randomise(rng, DecodedInsn{}, TestMachine::kCode);
      VcpuState& s = pair.interpreted().m.s;
      // The first time, as the block is made for; later ones differ from it in some registers.
      for (u8 base : Code::kBases) {
        const u64 at = kLow + 0x200 + rng.below(0xc00) + 0x1000 * rng.below(8);
        s.gpr[base] = (rng.one_in(16) ? kElsewhere : std::array{u64{0}, kFar, kProgram}[n % 2 != 0 ? rng.below(3) : 1 + rng.below(2)]) + at;
        if (time != 0 && rng.one_in(24)) s.gpr[base] = rng.below(2) ? 0x5500'0000'0000 + at : random_value(rng);
      }
      std::memcpy(pair.translated().m.s.gpr, s.gpr, sizeof s.gpr);
      if (time == 2) pair.translated().m.interpreter().code_flush();  // from here on it is what was kept
      pair.run(1000);
      const bool whole = s.rip == TestMachine::kCode + bytes.size() - 1;  // HLT
      halted += whole;
      faulted += !whole;
      const std::string d = pair.difference(whole ? rflags::STATUS : 0);  // docs/adr/0004: where it faults some are nobody's
      if (!d.empty()) {
        ADD_FAILURE() << "case " << n << ", time " << time << ": " << d;
        pair.heal();
        failures++;
        break;
      }
    }
  }
  EXPECT_GT(halted, faulted);
  EXPECT_GT(faulted, 100u);
  EXPECT_GT(pair.translated().vcpu->stats().window_faults, 0u);
  EXPECT_GT(pair.translated().kept->stats().found, halted / 4);
}

}  // namespace
}  // namespace ring3::engine
