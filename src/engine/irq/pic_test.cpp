#include "engine/irq/pic.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

#include "engine/irq/test_machine.hpp"

namespace ring3::engine {
namespace {

struct PicTest : testing::Test {
  int raised = 0;
  std::vector<unsigned> acked;
  u32 unmasked = 0;
  Pic pic{[this] { ++raised; }, [this](unsigned i) { acked.push_back(i); }, [this](u32 m) { unmasked |= m; }};

  PicTest() { init(0x01); }
  void init(u8 icw4) {
    for (const u16 port : {u16{0x20}, u16{0xa0}}) {
      pic.write(port, 0x11);
      pic.write(port + 1, port == 0x20 ? 0x30 : 0x38);
      pic.write(port + 1, port == 0x20 ? 4 : 2);
      pic.write(port + 1, icw4);
      pic.write(port + 1, 0);
    }
    acked.clear();
    unmasked = 0;
  }
  int line(unsigned irq, bool level) { return pic.set_line(irq, 0, level); }
  void pulse(unsigned irq) {
    line(irq, true);
    line(irq, false);
  }
  u8 isr(u16 port) {
    pic.write(port, 0x0b);
    return pic.read(port);
  }
  u8 irr(u16 port) {
    pic.write(port, 0x0a);
    return pic.read(port);
  }
};

TEST_F(PicTest, FixedPriority) {
  pulse(5);
  pulse(1);
  pulse(12);
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.ack(), 0x31);
  EXPECT_FALSE(pic.output());
  pic.write(0x20, 0x20);
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.ack(), 0x3c) << "the slave comes before 3 to 7";
  EXPECT_EQ(isr(0x20), 0x04);
  EXPECT_EQ(isr(0xa0), 0x10);
  pulse(0);
  EXPECT_EQ(pic.ack(), 0x30) << "higher interrupts the lower";
  pic.write(0x20, 0x20);
  pic.write(0xa0, 0x20);
  pic.write(0x20, 0x20);
  EXPECT_EQ(pic.ack(), 0x35);
  EXPECT_EQ(acked, (std::vector<unsigned>{1, 0, 12, 2}));
}

TEST_F(PicTest, EdgeNeedsANewEdge) {
  EXPECT_EQ(line(3, true), 1);
  EXPECT_EQ(line(3, true), 1);
  EXPECT_EQ(pic.ack(), 0x33);
  pic.write(0x20, 0x63);  // specific EOI
  EXPECT_FALSE(pic.output()) << "still high, but no edge";
  line(3, false);
  EXPECT_EQ(line(3, true), 1);
  line(3, false);
  EXPECT_EQ(line(3, true), 0) << "coalesced";
  EXPECT_EQ(pic.ack(), 0x33);
}

TEST_F(PicTest, LevelStaysWhileHigh) {
  pic.write(0x4d0, 0xff);
  EXPECT_EQ(pic.read(0x4d0), 0xf8) << "lines 0 to 2 are edge triggered for ever";
  pic.write(0x4d1, 0xff);
  EXPECT_EQ(pic.read(0x4d1), 0xde);
  line(5, true);
  EXPECT_EQ(pic.ack(), 0x35);
  pic.write(0x20, 0x20);
  EXPECT_TRUE(pic.output());
  line(5, false);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, Spurious) {
  pic.write(0x4d0, 0xf8);
  line(5, true);
  line(5, false);
  EXPECT_EQ(pic.ack(), 0x37);
  EXPECT_EQ(isr(0x20), 0) << "nothing goes into service";
  pic.write(0x4d1, 0xde);
  line(10, true);
  line(10, false);  // the master has latched the cascade's edge
  EXPECT_EQ(pic.ack(), 0x3f);
  EXPECT_EQ(isr(0xa0), 0);
  EXPECT_EQ(isr(0x20), 4);
}

TEST_F(PicTest, Masks) {
  pic.write(0x21, 0x02);
  EXPECT_EQ(pic.read(0x21), 2);
  EXPECT_EQ(line(1, true), -1);
  EXPECT_FALSE(pic.output());
  pic.write(0x21, 0);
  EXPECT_TRUE(pic.output()) << "the request was kept";
  EXPECT_EQ(unmasked, 2u);
  EXPECT_EQ(raised, 1);
}

TEST_F(PicTest, AutomaticEoi) {
  init(0x03);
  pulse(4);
  EXPECT_EQ(pic.ack(), 0x34);
  EXPECT_EQ(isr(0x20), 0);
  EXPECT_EQ(acked, (std::vector<unsigned>{4}));
  pic.write(0x20, 0x80);  // rotate on automatic EOI
  pulse(4);
  EXPECT_EQ(pic.ack(), 0x34);
  pulse(3);
  pulse(6);
  EXPECT_EQ(pic.ack(), 0x36) << "5 is highest now";
  EXPECT_EQ(pic.ack(), 0x33);
  pic.write(0x20, 0x00);
}

TEST_F(PicTest, Rotation) {
  pic.write(0x20, 0xc3);  // 3 is lowest: 4 highest
  pulse(1);
  pulse(6);
  EXPECT_EQ(pic.ack(), 0x36);
  pic.write(0x20, 0xa0);  // rotate on non-specific EOI: 6 lowest
  EXPECT_EQ(pic.ack(), 0x31);
  pic.write(0x20, 0xe1);  // rotate on specific EOI: 1 lowest
  pulse(1);
  pulse(2);
  pulse(0);
  EXPECT_EQ(pic.ack() & 0xf8, 0x38) << "2 is the cascade";
  pic.write(0x20, 0x62);
  EXPECT_EQ(pic.ack(), 0x30);
}

TEST_F(PicTest, SpecialMaskMode) {
  pulse(1);
  EXPECT_EQ(pic.ack(), 0x31);
  pulse(6);
  EXPECT_FALSE(pic.output());
  pic.write(0x20, 0x68);  // set special mask
  pic.write(0x21, 0x02);  // the masked line in service blocks nobody
  EXPECT_TRUE(pic.output());
  EXPECT_EQ(pic.ack(), 0x36);
  pic.write(0x20, 0x20);  // ends 6: the masked one is skipped
  EXPECT_EQ(isr(0x20), 0x02);
  pic.write(0x20, 0x48);  // reset special mask
  pulse(7);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, SpecialFullyNestedMode) {
  init(0x11);
  pulse(12);
  EXPECT_EQ(pic.ack(), 0x3c);
  pulse(9);
  EXPECT_TRUE(pic.output()) << "a higher line of the slave gets through its own service";
  EXPECT_EQ(pic.ack(), 0x39);
  init(0x01);
  pulse(12);
  EXPECT_EQ(pic.ack(), 0x3c);
  pulse(9);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, Poll) {
  pulse(6);
  pulse(3);
  pic.write(0x20, 0x0c);
  EXPECT_EQ(pic.read(0x20), 0x83);
  EXPECT_EQ(isr(0x20), 0x08);
  EXPECT_EQ(irr(0x20), 0x40);
  pic.write(0x20, 0x20);
  pic.write(0x20, 0x0c);
  EXPECT_EQ(pic.read(0x20), 0x86);
  pic.write(0x20, 0x20);
  pic.write(0x20, 0x0c);
  EXPECT_EQ(pic.read(0x20) & 0x80, 0);
  pulse(13);
  pic.write(0xa0, 0x0c);
  EXPECT_EQ(pic.read(0xa0), 0x85);
  EXPECT_FALSE(pic.output());
}

TEST_F(PicTest, SourcesAreOred) {
  pic.write(0x4d0, 0xf8);
  pic.set_line(5, 0, true);
  pic.set_line(5, 1, true);
  pic.set_line(5, 0, false);
  EXPECT_TRUE(pic.output());
  pic.set_line(5, 1, false);
  EXPECT_FALSE(pic.output());
  EXPECT_EQ(pic.set_line(16, 0, true), -1);
  EXPECT_EQ(pic.set_line(0, 32, true), -1);
}

TEST_F(PicTest, StateRoundTrips) {
  std::mt19937 rng(1);
  for (int round = 0; round < 1000; ++round) {
    for (unsigned chip = 0; chip < 2; ++chip) {
      kvm_pic_state in{}, out;
      in.last_irr = static_cast<u8>(rng());
      in.irr = static_cast<u8>(rng());
      in.imr = chip ? 0xff : static_cast<u8>(rng());  // the slave's request would enter the master
      in.isr = static_cast<u8>(rng());
      in.priority_add = rng() & 7;
      in.irq_base = rng() & 0xf8;
      in.read_reg_select = rng() & 1;
      in.special_mask = rng() & 1;
      in.init_state = rng() & 3;
      in.auto_eoi = rng() & 1;
      in.rotate_on_auto_eoi = rng() & 1;
      in.special_fully_nested_mode = rng() & 1;
      in.init4 = rng() & 1;
      in.elcr = static_cast<u8>(rng() & (chip ? 0xde : 0xf8));
      in.elcr_mask = chip ? 0xde : 0xf8;
      kvm_pic_state quiet{};
      quiet.imr = 0xff;
      if (!chip) pic.set_state(1, quiet);
      pic.set_state(chip, in);
      pic.get_state(chip, &out);
      ASSERT_EQ(std::memcmp(&in, &out, sizeof in), 0);
    }
  }
}

TEST_F(PicTest, HostileAccessesAreHarmless) {
  std::mt19937 rng(2);
  static constexpr u16 kPorts[] = {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1};
  for (int i = 0; i < 200'000; ++i) {
    const u16 port = kPorts[rng() % 6];
    switch (rng() % 5) {
      case 0:
        pic.read(port);
        break;
      case 1:
        pic.ack();
        break;
      case 2:
        pic.set_line(rng() % 16, rng() % 32, rng() & 1);
        break;
      default:
        pic.write(port, static_cast<u8>(rng()));
        break;
    }
    if (i % 1000 == 0) {
      kvm_pic_state s;
      for (size_t b = 0; b < sizeof s; ++b) reinterpret_cast<u8*>(&s)[b] = static_cast<u8>(rng());
      pic.set_state(rng() & 1, s);
    }
  }
}

}  // namespace
}  // namespace ring3::engine
