#include <gtest/gtest.h>

#include <array>

#include "engine/translate/test_pair.hpp"

/// User code in several pages while these are mapped elsewhere, address spaces take turns, and code is changed where the
/// engine does not see it: links between pages of windowed code, which compare nothing (CodeCache::hold()), and blocks that one
/// address space has made and another one runs (CodeCache::common_table()).
namespace ring3::engine {
namespace {

using namespace test;

constexpr u64 kFrames = 0x200000;
constexpr unsigned kPages = 6, kVariants = 3, kSpaces = 2, kRounds = 8, kApart = 64;
constexpr u64 kUserPage = TestMachine::kPresent | TestMachine::kWritable | TestMachine::kUser;

struct Kind {
  bool fixed, indirect, windowed;
  u64 first() const { return fixed ? 0x400000 : 0x5580'0000'0000; }
};
constexpr Kind kKinds[] = {{true, false, true},  {true, true, true},   {true, false, false}, {true, true, false},
                           {false, false, true}, {false, true, true},  {false, false, false}, {false, true, false}};

/// A ring of pages: each has a piece of code for every time that the way comes round, which leads to the next page's.
class Ring {
 public:
  explicit Ring(Kind kind) : kind_(kind), m_(TestMode::Long64, true) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 4u << 20;
    options.window_samples = kind.windowed;
    auto made = TranslatorVcpu::create(m_.s, m_.mmu(), m_.interpreter(), create_block_translator(), options);
    CHECK(made.ok());
    vcpu_ = std::move(*made);
    m_.runner = [this](u64 budget) { return vcpu_->run(budget); };
    for (unsigned page = 0; page < kPages; page++)
      for (unsigned variant = 0; variant < kVariants; variant++) write(page, variant, 1 + page * 16 + variant);
    for (unsigned page = 0; page < kPages; page++) m_.map(kind_.first() + page * kPageSize, frame(page, 0), kUserPage);
    // The other address space has tables of its own for the ring, and shares the rest.
    static constexpr u64 kTables[] = {0x78000, 0x79000, 0x7a000, 0x7b000};
    u64 from = TestMachine::kRoot;
    for (unsigned level = 0; level < 4; level++) {
      std::memcpy(m_.ram(kTables[level]), m_.ram(from), kPageSize);
      last_[0] = from;
      const u64 index = kind_.first() >> (39 - 9 * level) & 0x1ff;
      from = m_.load<u64>(from + 8 * index) & 0xffffffffff000ull;
      if (level < 3) m_.store<u64>(kTables[level] + 8 * index, kTables[level + 1] | kUserPage);
    }
    last_[1] = kTables[3];
    roots_ = {TestMachine::kRoot, kTables[0]};
    m_.s.cr4 |= cr4::PCIDE;
    m_.mmu().flush_all();
    go_to(0, false);
  }

  /// Runs so many pieces from this one on.
  void run(unsigned piece, unsigned count) {
    u64 expected = 7;
    for (unsigned n = 0; n < count; n++) {
      const unsigned page = (piece + n) % kPages;
      expected = expected * 33 + numbers_[page][now(page)];
    }
    m_.s.gpr[RAX] = 7;
    m_.s.gpr[RCX] = count;
    m_.s.rip = at(piece);
    ASSERT_TRUE(m_.resume(1000000).raised(vec::GP, 0)) << "HLT";
    ASSERT_EQ(m_.s.gpr[RAX], expected);
  }
  void remap(unsigned page, unsigned variant, bool one) {
    mapped_[space_][page] = variant;
    m_.store<u64>(last_[space_] + 8 * (kind_.first() >> 12 & 0x1ff) + 8 * page, frame(page, variant) | kUserPage);
    if (one) {
      m_.mmu().flush_page(kind_.first() + page * kPageSize);
    } else {
      m_.mmu().set_cr3(m_.s.cr3, false);
    }
  }
  void go_to(unsigned space, bool keep) {
    space_ = space;
    m_.s.cr3 = roots_[space] | (space + 1);
    m_.mmu().set_cr3(m_.s.cr3, keep);
  }
  /// As a device would.
  void change(unsigned page, unsigned variant, u32 number) {
    write(page, variant, number);
    m_.mmu().expire_fetches();
  }
  unsigned now(unsigned page) const { return mapped_[space_][page]; }
  u64 entries() const { return vcpu_->stats().entries; }
  u64 translated() const { return vcpu_->stats().translated; }
  bool windowed() { return m_.mmu().window() != Mmu::WindowState::None; }

 private:
  static u64 frame(unsigned page, unsigned variant) { return kFrames + (page * kVariants + variant) * kPageSize; }
  u64 at(unsigned piece) const {
    return kind_.first() + piece % kPages * kPageSize + piece / kPages % kRounds * kApart;
  }
  void write(unsigned page, unsigned variant, u32 number) {
    numbers_[page][variant] = number;
    // imul rax, rax, 33; add rax, number; dec rcx; jz to HLT;
    Bytes code = hex("48 6b c0 21 48 05 00 00 00 00 48 ff c9 74");
    std::memcpy(code.data() + 6, &number, 4);
    const Bytes direct = hex("05 e9 00 00 00 00 f4");                   // jmp; hlt
    const Bytes indirect = hex("09 48 8d 15 00 00 00 00 ff e2 f4");  // lea rdx, [rip + x]; jmp rdx; hlt
    const Bytes& on = kind_.indirect ? indirect : direct;
    code.insert(code.end(), on.begin(), on.end());
    const std::size_t field = kind_.indirect ? 18 : 16;
    for (unsigned round = 0; round < kRounds; round++) {
      const u64 piece = round * kPages + page;
      const i32 distance = static_cast<i32>(at(static_cast<unsigned>(piece + 1)) - at(static_cast<unsigned>(piece)) - field - 4);
      std::memcpy(code.data() + field, &distance, 4);
      std::memcpy(m_.ram(frame(page, variant)) + round * kApart, code.data(), code.size());
    }
  }

  Kind kind_;
  TestMachine m_;
  std::unique_ptr<TranslatorVcpu> vcpu_;
  unsigned space_ = 0;
  std::array<u64, kSpaces> roots_{}, last_{};
  unsigned mapped_[kSpaces][kPages] = {};
  u32 numbers_[kPages][kVariants] = {};
};

TEST(AddressSpaces, LinksToOtherPagesCostNoEntries) {
  for (const Kind& kind : kKinds) {
    if (kind.fixed && !kind.windowed && !kind.indirect) continue;  // compares the address space alone: seen below
    Ring ring(kind);
    ring.run(0, 500);
    EXPECT_EQ(ring.windowed(), kind.windowed);
    const u64 before = ring.entries();
    ring.run(0, 6000);
    EXPECT_LT(ring.entries() - before, 10u);
    // One page is another: its links are made again, once.
    ring.remap(3, 1, true);
    ring.run(0, 500);
    const u64 again = ring.entries();
    ring.run(0, 6000);
    EXPECT_LT(ring.entries() - again, 10u);
  }
}

/// The second process of a program enters by the run loop once for each page, not for each piece of code.
TEST(AddressSpaces, BlocksAreFoundByTheirPhysicalAddress) {
  for (const Kind& kind : kKinds) {
    if (!kind.indirect) continue;
    Ring ring(kind);
    ring.run(0, 500);
    const u64 before = ring.entries(), made = ring.translated();
    ring.go_to(1, false);
    ring.run(0, 500);
    EXPECT_LT(ring.entries() - before, 2 * kPages) << kind.fixed << kind.windowed;
    EXPECT_EQ(ring.translated(), made);
    ring.go_to(0, false);
    ring.remap(2, 1, false);
    ring.run(0, 500);
    EXPECT_EQ(ring.translated(), made + kRounds) << "the other page's";
  }
}

TEST(AddressSpaces, TheCodeThatRunsIsThePageTables) {
  for (unsigned n = 0; n < rounds(40); n++) {
    Random rng(first_seed() * 1000003 + n);
    Ring ring(kKinds[n % std::size(kKinds)]);
    for (unsigned k = 0; k < 250; k++) {
      const unsigned page = static_cast<unsigned>(rng.below(kPages)), variant = static_cast<unsigned>(rng.below(kVariants));
      switch (rng.below(6)) {
        case 0: ring.remap(page, variant, true); break;
        case 1: ring.remap(page, variant, false); break;
        case 2: ring.go_to(static_cast<unsigned>(rng.below(kSpaces)), true); break;
        case 3: ring.go_to(static_cast<unsigned>(rng.below(kSpaces)), false); break;
        case 4: ring.change(page, variant, static_cast<u32>(rng.below(1u << 30))); break;
        default: break;
      }
      ring.run(static_cast<unsigned>(rng.below(kPages * kRounds)), 1 + static_cast<unsigned>(rng.below(60)));
      if (testing::Test::HasFatalFailure()) {
        ADD_FAILURE() << "round " << n << ", step " << k;
        return;
      }
    }
  }
}

/// One page at several addresses: below 4 GiB, where code is position-independent, and where it must not be.
TEST(AddressSpaces, OnePageAtSeveralAddresses) {
  constexpr u64 kPlaces[] = {0x400000, 0x600000, 0x5580'0000'0000, 0x7f00'0000'0000, 0x7fff'ffff'0000};
  for (const bool windowed : {false, true}) {
    TestMachine m(TestMode::Long64, true);
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    options.window_samples = windowed;
    auto made = TranslatorVcpu::create(m.s, m.mmu(), m.interpreter(), create_block_translator(), options);
    CHECK(made.ok());
    m.runner = [&](u64 budget) { return (*made)->run(budget); };
    // lea rax, [rip]; jmp rsi
    const Bytes code = hex("48 8d 05 00 00 00 00 ff e6");
    std::memcpy(m.ram(kFrames), code.data(), code.size());
    for (u64 place : kPlaces) m.map(place, kFrames, kUserPage);
    // jmp rdx; hlt
    const Bytes start = hex("ff e2 f4");
    std::memcpy(m.ram(TestMachine::kCode), start.data(), start.size());
    Random rng(5);
    for (unsigned n = 0; n < 400; n++) {
      const u64 place = kPlaces[rng.below(std::size(kPlaces))];
      if (rng.one_in(4)) m.mmu().set_cr3(m.s.cr3, false);
      if (rng.one_in(8)) m.mmu().expire_fetches();
      m.s.gpr[RDX] = place;
      m.s.gpr[RSI] = TestMachine::kCode + 2;
      m.s.rip = TestMachine::kCode;
      ASSERT_TRUE(m.resume().raised(vec::GP, 0)) << "HLT";
      ASSERT_EQ(m.s.gpr[RAX], place + 7);
    }
  }
}

}  // namespace
}  // namespace ring3::engine
