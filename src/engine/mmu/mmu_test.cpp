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
                                Hva(reinterpret_cast<u64>(m.at(0x800000)))), 0);
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

}  // namespace
}  // namespace ring3::engine
