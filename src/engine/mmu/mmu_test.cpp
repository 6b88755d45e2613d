#include "engine/mmu/mmu.hpp"

#include <gtest/gtest.h>
#include <linux/kvm.h>

#include "engine/mmu/test_support.hpp"

/// Data accesses and fetches beyond the walk: crossings, devices, breakpoints, alignment, the TLB's flushes.
namespace ring3::engine {
namespace {

using namespace test;
using Mode = PageTables::Mode;

constexpr u64 kRW = pte::P | pte::W;
constexpr u64 kRWU = pte::P | pte::W | pte::U;

void expect_stop(Machine& m, u8 vector, u32 error) {
  EXPECT_EQ(m.mmu->stop().kind, Stop::Kind::Fault);
  EXPECT_EQ(m.mmu->stop().vector, vector);
  EXPECT_EQ(m.mmu->stop().error, error);
  m.mmu->stop() = Stop{};
}

TEST(Mmu, RealModeIsPhysical) {
  Machine m;
  ASSERT_TRUE(m.mmu->write<u32>(0x1234, 0xdeadbeef));
  EXPECT_EQ(m.peek<u32>(0x1234), 0xdeadbeef);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0x1234, &v));
  EXPECT_EQ(v, 0xdeadbeef);
  u8 b = 0;
  ASSERT_TRUE(m.mmu->read(1, &b));  // low addresses do not look like an empty entry
  u16 w = 0;
  ASSERT_TRUE(m.mmu->write<u16>(1, 0x5566));
  ASSERT_TRUE(m.mmu->read(1, &w));
  EXPECT_EQ(w, 0x5566);
}

struct LongTest : testing::Test {
  Machine m;
  PageTables t{m, Mode::Long};
  LongTest() { t.activate(); }
};

// Entries that were never filled are zeroes: no page's address looks like one of them, nor page 0 like another page of its entry.
TEST_F(LongTest, NoAddressLooksLikeAnEmptyEntry) {
  constexpr u64 kSameEntry = u64{Mmu::kTlbSize} << kPageShift;
  u8 b = 0;
  for (const u64 linear : {u64{0}, u64{kPageSize}, 7 * kPageSize, kSameEntry, kSameEntry + kPageSize, 0 - kSameEntry, 0 - kPageSize}) {
    EXPECT_FALSE(m.mmu->read(linear, &b)) << linear;
    EXPECT_FALSE(m.mmu->write<u8>(linear + 1, 1)) << linear;
    Gpa gpa;
    const u8* host;
    EXPECT_FALSE(m.mmu->fetch(linear, &gpa, &host)) << linear;
    m.mmu->stop() = Stop{};
  }
  // Page 0 and the next one of its entry take turns, and each is forgotten when it is told.
  for (u64 frame = 0x10000; frame < 0x18000; frame += 2 * kPageSize) {
    m.poke<u8>(frame, static_cast<u8>(frame >> kPageShift));
    m.poke<u8>(frame + kPageSize, static_cast<u8>((frame >> kPageShift) + 1));
    t.map(0, frame, kRW);
    t.map(kSameEntry, frame + kPageSize, kRW);
    m.mmu->flush_page(0);
    m.mmu->flush_page(kSameEntry);
    for (unsigned turn = 0; turn < 3; turn++) {
      ASSERT_TRUE(m.mmu->read(turn % 2 * kSameEntry, &b));
      EXPECT_EQ(b, (frame >> kPageShift) + turn % 2);
    }
  }
}

TEST_F(LongTest, CrossingReadsAndWrites) {
  t.map(0x400000, 0x10000, kRW);
  t.map(0x401000, 0x30000, kRW);
  for (unsigned off = 0xff9; off < 0x1000; off++) {
    const u64 value = 0x0102030405060708 * (off & 0xf);
    ASSERT_TRUE(m.mmu->write<u64>(0x400000 + off, value));
    u64 back = 0;
    ASSERT_TRUE(m.mmu->read(0x400000 + off, &back));
    EXPECT_EQ(back, value);
  }
  EXPECT_EQ(m.peek<u8>(0x30006), (0x0102030405060708 * 0xf) >> 56);
  EXPECT_EQ(m.peek<u8>(0x11000), 0);
}

TEST_F(LongTest, CrossingFaultChangesNothing) {
  t.map(0x400000, 0x10000, kRW);
  EXPECT_FALSE(m.mmu->write<u64>(0x400ffc, ~0ull));
  EXPECT_EQ(m.mmu->stop().payload, 0x401000u);
  expect_stop(m, vec::PF, pferr::W);
  EXPECT_EQ(m.peek<u32>(0x10ffc), 0u);
  t.map(0x401000, 0x30000, pte::P);
  EXPECT_FALSE(m.mmu->write<u64>(0x400ffc, ~0ull));
  expect_stop(m, vec::PF, pferr::W | pferr::P);
  EXPECT_EQ(m.peek<u32>(0x10ffc), 0u);
  Mmu::Rmw rmw;
  EXPECT_FALSE(m.mmu->rmw_begin(0x400ffc, 8, DS, &rmw));
  expect_stop(m, vec::PF, pferr::W | pferr::P);
  u8 big[64];
  std::memset(big, 0xaa, sizeof big);
  EXPECT_FALSE(m.mmu->write_bytes(0x400fe0, big, sizeof big));
  EXPECT_EQ(m.peek<u32>(0x10ffc), 0u);
}

TEST_F(LongTest, NonCanonical) {
  u64 v;
  EXPECT_FALSE(m.mmu->read(0x0000800000000000, &v));
  expect_stop(m, vec::GP, 0);
  EXPECT_FALSE(m.mmu->read(0x0000800000000000, &v, SS));
  expect_stop(m, vec::SS, 0);
  EXPECT_FALSE(m.mmu->read(0xffff7fffffffffff, &v));
  expect_stop(m, vec::GP, 0);
  EXPECT_FALSE(m.mmu->write<u64>(0x00007ffffffffffc, 0));  // its end is outside
  expect_stop(m, vec::GP, 0);
  t.map(0xfffffffffffff000, 0x10000, kRW);
  t.map(0, 0x11000, kRW);
  EXPECT_TRUE(m.mmu->write<u64>(0xfffffffffffffffc, 0x1122334455667788));  // wraps to 0
  EXPECT_EQ(m.peek<u32>(0x11000), 0x11223344u);
  Gpa gpa;
  const u8* host;
  EXPECT_FALSE(m.mmu->fetch(0x0000800000000000, &gpa, &host));
  expect_stop(m, vec::GP, 0);
}

TEST_F(LongTest, RmwFormsAndSplits) {
  t.map(0x400000, 0x10000, kRW);
  t.map(0x401000, 0x30000, kRW);
  t.map(0x402000, 0x31000, kRW);
  Mmu::Rmw a;
  ASSERT_TRUE(m.mmu->rmw_begin(0x400010, 8, DS, &a));
  EXPECT_EQ(a.host, m.at(0x10010));
  EXPECT_TRUE(m.mmu->rmw_end(a, nullptr, 8));
  Mmu::Rmw b;
  m.poke<u32>(0x10ffc, 0x44332211);
  m.poke<u32>(0x30000, 0x88776655);
  ASSERT_TRUE(m.mmu->rmw_begin(0x400ffc, 8, DS, &b));
  EXPECT_EQ(b.host, nullptr);
  u64 v;
  std::memcpy(&v, b.buffer, 8);
  EXPECT_EQ(v, 0x8877665544332211);
  v = 0x1111111122222222;
  EXPECT_TRUE(m.mmu->rmw_end(b, &v, 8));
  EXPECT_EQ(m.peek<u32>(0x10ffc), 0x22222222u);
  EXPECT_EQ(m.peek<u32>(0x30000), 0x11111111u);
  Mmu::Rmw c;  // contiguous in the host
  ASSERT_TRUE(m.mmu->rmw_begin(0x401ffc, 8, DS, &c));
  EXPECT_EQ(c.host, m.at(0x30ffc));
}

TEST_F(LongTest, BulkPointers) {
  t.map(0x400000, 0x10000, kRW);
  t.map(0x401000, 0x11000, pte::P);
  t.map(0x402000, 0xf0000000, kRW);
  m.mmu->stop() = Stop::fault(99);
  EXPECT_EQ(m.mmu->bulk_pointer(0x400800, true, 0x800), m.at(0x10800));
  EXPECT_EQ(m.mmu->bulk_pointer(0x400800, true, 0x801), nullptr);
  EXPECT_EQ(m.mmu->bulk_pointer(0x401000, true, 1), nullptr);
  EXPECT_EQ(m.mmu->bulk_pointer(0x401000, false, 1), m.at(0x11000));
  EXPECT_EQ(m.mmu->bulk_pointer(0x402000, false, 1), nullptr);
  EXPECT_EQ(m.mmu->bulk_pointer(0x403000, false, 1), nullptr);
  EXPECT_EQ(m.mmu->stop().vector, 99);
}

TEST_F(LongTest, DevicesGetPiecesOfEight) {
  FakePort port;
  m.mmu->set_port(&port);
  t.map(0x400000, 0xf0000000, kRW);
  t.map(0x401000, 0x30000, kRW);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0x400010, &v));
  EXPECT_EQ(v, 0x13121110u);
  u8 data[32] = {};
  for (unsigned i = 0; i < 32; i++) data[i] = static_cast<u8>(i);
  ASSERT_TRUE(m.mmu->write_bytes(0x400fec, data, 32));  // 20 bytes of the device, 12 of RAM
  ASSERT_EQ(port.log.size(), 4u);
  EXPECT_EQ(port.log[1].gpa, 0xf0000fecu);
  EXPECT_EQ(port.log[1].size, 8u);
  EXPECT_EQ(port.log[3].size, 4u);
  EXPECT_EQ(m.peek<u8>(0x3000b), 31);
  port.log.clear();
  port.refuse_after = 1;
  m.poke<u8>(0x3000b, 0);
  EXPECT_FALSE(m.mmu->write_bytes(0x400fec, data, 32));
  EXPECT_EQ(m.mmu->stop().kind, Stop::Kind::Exit);
  EXPECT_EQ(m.peek<u8>(0x3000b), 0);
  port.refuse_after = ~0u;
  Mmu::Rmw rmw;
  ASSERT_TRUE(m.mmu->rmw_begin(0x400040, 4, DS, &rmw));
  EXPECT_EQ(rmw.host, nullptr);
  EXPECT_EQ(rmw.buffer[1], 0x41);
  const u32 w = 0xcafe;
  ASSERT_TRUE(m.mmu->rmw_end(rmw, &w, 4));
  EXPECT_EQ(port.log.back().data, 0xcafeu);
  EXPECT_TRUE(port.log.back().write);
  m.mmu->set_port(nullptr);
  ASSERT_TRUE(m.mmu->read(0x400010, &v));
  EXPECT_EQ(v, ~0u);
}

TEST_F(LongTest, ReadOnlySlotsWriteToDevice) {
  FakePort port;
  m.mmu->set_port(&port);
  ASSERT_EQ(m.memory.set_region(0, 0, Gpa(0), 0, Hva(0)), 0);
  ASSERT_EQ(m.memory.set_region(0, 0, Gpa(0), 0x800000, Hva(reinterpret_cast<u64>(m.at(0)))), 0);
  ASSERT_EQ(m.memory.set_region(1, KVM_MEM_READONLY, Gpa(0xe0000000), 0x1000,
                                Hva(reinterpret_cast<u64>(m.at(0x800000)))),
            0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  m.poke<u32>(0x800000, 0x55);
  t.map(0x400000, 0xe0000000, kRW);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_EQ(v, 0x55u);
  ASSERT_TRUE(m.mmu->write<u32>(0x400000, 0x66));
  EXPECT_EQ(m.peek<u32>(0x800000), 0x55u);
  ASSERT_EQ(port.log.size(), 1u);
  EXPECT_EQ(port.log[0].gpa, 0xe0000000u);
  EXPECT_EQ(port.log[0].data, 0x66u);
}

// ---- data breakpoints ----

struct BreakpointTest : LongTest {
  BreakpointTest() {
    t.map(0x400000, 0x10000, kRW);
    t.map(0x401000, 0x30000, kRW);
  }
  /// Breakpoint n: type 1 write, 3 read or write; length code as in DR7.
  void arm(unsigned n, u64 at, u64 type, u64 length_code) {
    m.state.dr[n] = at;
    m.state.dr7 |= 1ull << (2 * n + 1) | type << (16 + 4 * n) | length_code << (18 + 4 * n);
    m.mmu->mode_changed();
  }
};

TEST_F(BreakpointTest, HitsByTypeAndLength) {
  ASSERT_TRUE(m.mmu->write<u32>(0x400104, 1));  // a write tag exists before
  arm(1, 0x400104, 1, 3);
  arm(2, 0x400200, 3, 2);
  u32 v;
  ASSERT_TRUE(m.mmu->read(0x400104, &v));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  ASSERT_TRUE(m.mmu->write<u32>(0x400104, 2));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 2u);
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  ASSERT_TRUE(m.mmu->write<u8>(0x400107, 2));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 2u);
  ASSERT_TRUE(m.mmu->write<u8>(0x400108, 2));
  ASSERT_TRUE(m.mmu->write<u32>(0x400100, 2));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  ASSERT_TRUE(m.mmu->write<u32>(0x400101, 2));  // overlaps by one byte
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 2u);
  u8 b;
  ASSERT_TRUE(m.mmu->read(0x400207, &b));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 4u);
  ASSERT_TRUE(m.mmu->write<u32>(0x400104, 2));
  ASSERT_TRUE(m.mmu->read(0x400200, &v));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 6u);  // they add up
  Mmu::Rmw rmw;
  ASSERT_TRUE(m.mmu->rmw_begin(0x400200, 4, DS, &rmw));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 4u);
  EXPECT_EQ(m.mmu->bulk_pointer(0x400800, false, 8), nullptr);
  EXPECT_NE(m.mmu->bulk_pointer(0x401800, false, 8), nullptr);
}

TEST_F(BreakpointTest, DisabledAndExecutionBreakpointsDoNotHit) {
  arm(0, 0x400104, 0, 0);  // execution
  arm(1, 0x400104, 2, 0);  // I/O
  EXPECT_TRUE(m.mmu->write<u32>(0x400104, 1));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  arm(2, 0x400104, 3, 0);
  EXPECT_TRUE(m.mmu->write<u32>(0x400104, 1));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 4u);
  m.state.dr7 = 0x400;
  m.mmu->mode_changed();
  EXPECT_TRUE(m.mmu->write<u32>(0x400104, 1));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  EXPECT_NE(m.mmu->bulk_pointer(0x400800, false, 8), nullptr);
}

TEST_F(BreakpointTest, CrossingsFaultsAndTheDebuggersOwn) {
  arm(3, 0x401000, 1, 0);
  ASSERT_TRUE(m.mmu->write<u64>(0x400ffc, 1));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 8u);
  t.unmap(0x401000);
  m.mmu->flush_all();
  EXPECT_FALSE(m.mmu->write<u64>(0x400ffc, 1));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
  const u64 dr[4] = {0x400008, 0, 0, 0};
  m.mmu->override_breakpoints(dr, 1 | 3ull << 16);
  u8 b;
  EXPECT_TRUE(m.mmu->read(0x400008, &b));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 1u);
  m.mmu->override_breakpoints(nullptr, 0);
  EXPECT_TRUE(m.mmu->read(0x400008, &b));
  EXPECT_EQ(m.mmu->take_breakpoint_hits(), 0u);
}

// ---- alignment checks ----

TEST_F(LongTest, AlignmentChecksNeedAllThree) {
  t.map(0x400000, 0x10000, kRWU);
  const auto set = [&](u8 cpl, bool am, bool ac) {
    m.state.cr0 = am ? m.state.cr0 | cr0::AM : m.state.cr0 & ~cr0::AM;
    m.set_ac(ac);
    m.set_cpl(cpl);
  };
  u32 v;
  for (unsigned i = 0; i < 8; i++) {
    set(i & 1 ? 3 : 0, i & 2, i & 4);
    EXPECT_TRUE(m.mmu->read(0x400004, &v));
    m.mmu->stop() = Stop{};
    EXPECT_EQ(m.mmu->read(0x400006, &v), i != 7) << i;
    EXPECT_EQ(m.mmu->write<u32>(0x400001, 1), i != 7) << i;
    if (i == 7) expect_stop(m, vec::AC, 0);
  }
  u8 b;
  u16 w;
  u64 q;
  EXPECT_TRUE(m.mmu->read(0x400003, &b));
  EXPECT_TRUE(m.mmu->read(0x400002, &w));
  EXPECT_FALSE(m.mmu->read(0x400003, &w));
  EXPECT_FALSE(m.mmu->read(0x400004, &q));
  EXPECT_TRUE(m.mmu->read(0x400008, &q));
  u8 ten[10];
  EXPECT_TRUE(m.mmu->read_bytes(0x400008, ten, 10));
  EXPECT_FALSE(m.mmu->read_bytes(0x400004, ten, 10));
  u8 vector[32];
  for (const bool amd : {false, true}) {  // unaligned SSE and AVX operands are #AC for AMD alone
    m.mmu->set_features(40, true, true, true, amd);
    EXPECT_TRUE(m.mmu->read_bytes(0x400010, vector, 32));
    EXPECT_EQ(m.mmu->read_bytes(0x400008, vector, 16), !amd);
    EXPECT_EQ(m.mmu->read_bytes(0x400001, vector, 32), !amd);
    EXPECT_EQ(m.mmu->write<u32>(0x400001, 1), false);
  }
  EXPECT_TRUE(m.mmu->read_bytes(0x400001, ten, 8, DS, Privilege::System));
  Mmu::Rmw rmw;
  EXPECT_FALSE(m.mmu->rmw_begin(0x400002, 4, DS, &rmw));
  EXPECT_EQ(m.mmu->bulk_pointer(0x400000, false, 8), nullptr);
  Gpa gpa;
  const u8* host;
  EXPECT_TRUE(m.mmu->fetch(0x400001, &gpa, &host));
}

// ---- 32-bit address space ----

TEST(Mmu, LegacyAddressesWrapAtFourGiB) {
  Machine m;
  PageTables t(m, Mode::Legacy);
  t.map(0xfffff000, 0x10000, kRW);
  t.map(0, 0x30000, kRW);
  t.activate();
  ASSERT_TRUE(m.mmu->write<u32>(0xfffffffe, 0x44332211));
  EXPECT_EQ(m.peek<u16>(0x10ffe), 0x2211);
  EXPECT_EQ(m.peek<u16>(0x30000), 0x4433);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0xfffffffe, &v));
  EXPECT_EQ(v, 0x44332211u);
}

// ---- memslots and the dirty log ----

TEST_F(LongTest, MemslotChangesAreSeen) {
  t.map(0x400000, 0x80000000, kRW);
  FakePort port;
  m.mmu->set_port(&port);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_EQ(port.log.size(), 1u);
  Mapping extra = std::move(Mapping::anonymous(0x4000)).value();
  extra.data()[0] = 42;
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(0x80000000), 0x4000, Hva(reinterpret_cast<u64>(extra.data()))), 0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  ASSERT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_EQ(v, 42u);
  EXPECT_EQ(port.log.size(), 1u);
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(0x80000000), 0, Hva(0)), 0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  ASSERT_TRUE(m.mmu->read(0x400000, &v));
  EXPECT_EQ(port.log.size(), 2u);
}

TEST_F(LongTest, DirtyLogSeesEveryFirstWrite) {
  Mapping extra = std::move(Mapping::anonymous(0x4000)).value();
  const Hva hva(reinterpret_cast<u64>(extra.data()));
  t.map(0x400000, 0x80000000, kRW);
  t.map(0x401000, 0x80001000, kRW);
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(0x80000000), 0x4000, hva), 0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  ASSERT_TRUE(m.mmu->write<u32>(0x400000, 1));
  ASSERT_EQ(m.memory.set_region(1, KVM_MEM_LOG_DIRTY_PAGES, Gpa(0x80000000), 0x4000, hva), 0);
  m.tracker.memslots_changed();
  m.mmu->serve_requests();
  const auto log = [&] {
    u64 bits = 0;
    EXPECT_EQ(m.memory.get_dirty_log(1, &bits, false), 0);
    m.tracker.dirty_log_changed();
    m.mmu->serve_requests();
    return bits;
  };
  EXPECT_EQ(log(), 0u);
  u32 v = 0;
  ASSERT_TRUE(m.mmu->read(0x401000, &v));
  EXPECT_EQ(log(), 0u);
  for (unsigned i = 0; i < 3; i++) {
    ASSERT_TRUE(m.mmu->write<u32>(0x400000, i));
    ASSERT_TRUE(m.mmu->write<u32>(0x400004, i));
    EXPECT_EQ(log(), 1u);
  }
  ASSERT_TRUE(m.mmu->write<u64>(0x400ffc, 1));
  EXPECT_EQ(log(), 3u);
  // A read does not, of a page either whose dirty flag stands.
  t.map(0x403000, 0x80003000, kRWU | pte::A | pte::D);
  m.set_cpl(3);
  ASSERT_TRUE(m.mmu->read(0x403000, &v));
  EXPECT_EQ(log(), 0u);
  ASSERT_TRUE(m.mmu->write<u32>(0x403000, 1));
  EXPECT_EQ(log(), 8u);
  m.set_cpl(0);
  // Page tables: an accessed flag dirties their page.
  t.map(0x402000, 0x9000, kRW);
  const u64 table_gpa = t.entry(0x402000, 1) & kPageMask;
  std::memcpy(extra.data() + 0x2000, m.at(table_gpa), 0x1000);
  t.store(t.entry(0x402000, 2), 0x80002000 | kRW);
  m.mmu->flush_all();
  ASSERT_TRUE(m.mmu->read(0x402000, &v));
  EXPECT_EQ(log(), 4u);
}

}  // namespace
}  // namespace ring3::engine
