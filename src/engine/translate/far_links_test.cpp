#include <gtest/gtest.h>

#include <array>

#include "engine/translate/test_pair.hpp"

/// Links between pages of windowed code, which compare nothing (CodeCache::hold()): a ring of pages, of which each jumps to the
/// next, while pages are mapped elsewhere, address spaces take turns, and code is changed where the engine does not see it.
namespace ring3::engine {
namespace {

using namespace test;

constexpr u64 kRing = 0x400000, kFrames = 0x200000;
constexpr unsigned kPages = 6, kVariants = 3, kSpaces = 2;
constexpr u64 kUserPage = TestMachine::kPresent | TestMachine::kWritable | TestMachine::kUser;

class Ring {
 public:
  Ring() : side_(true, 64, true) {
    TestMachine& m = side_.m;
    for (unsigned page = 0; page < kPages; page++)
      for (unsigned variant = 0; variant < kVariants; variant++) write(page, variant, 1 + page * 16 + variant);
    for (unsigned page = 0; page < kPages; page++) m.map(kRing + page * kPageSize, frame(page, 0), kUserPage);
    // The other address space has tables of its own for the ring, and shares the rest.
    static constexpr u64 kTables[] = {0x78000, 0x79000, 0x7a000, 0x7b000};
    u64 from = TestMachine::kRoot;
    for (unsigned level = 0; level < 4; level++) {
      std::memcpy(m.ram(kTables[level]), m.ram(from), kPageSize);
      last_[0] = from;
      const unsigned index = kRing >> (39 - 9 * level) & 0x1ff;
      from = m.load<u64>(from + 8 * index) & 0xffffffffff000ull;
      if (level < 3) m.store<u64>(kTables[level] + 8 * index, kTables[level + 1] | kUserPage);
    }
    last_[1] = kTables[3];
    roots_ = {TestMachine::kRoot, kTables[0]};
    m.s.cr4 |= cr4::PCIDE;
    m.mmu().flush_all();
  }

  /// Runs so many pages of the ring from this one on; what RAX should hold then, and whether it does.
  void run(unsigned page, unsigned turns) {
    VcpuState& s = side_.m.s;
    u64 expected = 7;
    for (unsigned n = 0, at = page; n < turns; n++, at = (at + 1) % kPages) expected = expected * 33 + numbers_[at][now(at)];
    s.gpr[RAX] = 7;
    s.gpr[RCX] = turns;
    s.rip = kRing + page * kPageSize;
    side_.run(100000);
    ASSERT_TRUE(side_.has_event && side_.vector == vec::GP) << "HLT";
    ASSERT_EQ(s.gpr[RAX], expected);
  }
  void remap(unsigned page, unsigned variant, bool one) {
    mapped_[space_][page] = variant;
    side_.m.store<u64>(last_[space_] + 8 * (kRing >> 12 & 0x1ff) + 8 * page, frame(page, variant) | kUserPage);
    if (one) {
      side_.m.mmu().flush_page(kRing + page * kPageSize);
    } else {
      side_.m.mmu().set_cr3(side_.m.s.cr3, false);
    }
  }
  void go_to(unsigned space, bool keep) {
    space_ = space;
    side_.m.s.cr3 = roots_[space] | (space + 1);
    side_.m.mmu().set_cr3(side_.m.s.cr3, keep);
  }
  /// As a device would.
  void change(unsigned page, unsigned variant, u32 number) {
    write(page, variant, number);
    side_.m.mmu().expire_fetches();
  }
  unsigned now(unsigned page) const { return mapped_[space_][page]; }
  u64 entries() const { return side_.vcpu->stats().entries; }
  bool windowed() { return side_.m.mmu().window() != Mmu::WindowState::None; }

 private:
  static u64 frame(unsigned page, unsigned variant) { return kFrames + (page * kVariants + variant) * kPageSize; }
  void write(unsigned page, unsigned variant, u32 number) {
    numbers_[page][variant] = number;
    // imul rax, rax, 33; add rax, number; dec rcx; jz to HLT; jmp to the next page; hlt
    Bytes code = hex("48 6b c0 21 48 05 00 00 00 00 48 ff c9 74 05 e9 00 00 00 00 f4");
    std::memcpy(code.data() + 6, &number, 4);
    const i32 distance = static_cast<i32>(((page + 1) % kPages) * kPageSize) - static_cast<i32>(page * kPageSize) - 20;
    std::memcpy(code.data() + 16, &distance, 4);
    std::memcpy(side_.m.ram(frame(page, variant)), code.data(), code.size());
  }

  Side side_;
  unsigned space_ = 0;
  std::array<u64, kSpaces> roots_{}, last_{};
  unsigned mapped_[kSpaces][kPages] = {};
  u32 numbers_[kPages][kVariants] = {};
};

TEST(TranslatedCode, LinksToOtherPagesCostNoEntries) {
  Ring ring;
  ring.go_to(0, false);
  ring.run(0, 100);
  EXPECT_TRUE(ring.windowed());
  const u64 before = ring.entries();
  ring.run(0, 6000);
  EXPECT_LT(ring.entries() - before, 10u);
  // One page is another: its links are made again, once.
  ring.remap(3, 1, true);
  ring.run(0, 100);
  const u64 again = ring.entries();
  ring.run(0, 6000);
  EXPECT_LT(ring.entries() - again, 10u);
}

TEST(TranslatedCode, LinksToOtherPagesFollowThePageTables) {
  for (unsigned n = 0; n < rounds(20); n++) {
    Random rng(first_seed() * 1000003 + n);
    Ring ring;
    ring.go_to(0, false);
    for (unsigned k = 0; k < 300; k++) {
      const unsigned page = static_cast<unsigned>(rng.below(kPages)), variant = static_cast<unsigned>(rng.below(kVariants));
      switch (rng.below(6)) {
        case 0: ring.remap(page, variant, true); break;
        case 1: ring.remap(page, variant, false); break;
        case 2: ring.go_to(static_cast<unsigned>(rng.below(kSpaces)), true); break;
        case 3: ring.go_to(static_cast<unsigned>(rng.below(kSpaces)), false); break;
        case 4: ring.change(page, variant, static_cast<u32>(rng.below(1u << 30))); break;
        default: break;
      }
      ring.run(static_cast<unsigned>(rng.below(kPages)), 1 + static_cast<unsigned>(rng.below(40)));
      if (testing::Test::HasFatalFailure()) {
        ADD_FAILURE() << "round " << n << ", step " << k;
        return;
      }
    }
  }
}

}  // namespace
}  // namespace ring3::engine
