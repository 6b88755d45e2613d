#include "devices/legacy/uart.hpp"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace ring3::devices {
namespace {

struct Port {
  std::string out;
  bool line = false;
  int edges = 0;
  int room_calls = 0;
  Uart uart{{[this](bool level) { line = level, edges++; }, [this](u8 b) { out.push_back(static_cast<char>(b)); },
             [this] { room_calls++; }}};
  u8 in(u64 offset) {
    u8 v = 0xff;
    uart.read(offset, std::span(&v, 1));
    return v;
  }
  void outb(u64 offset, u8 v) { uart.write(offset, std::span(&v, 1)); }
  std::size_t receive(const std::string& s) {
    return uart.receive(std::span(reinterpret_cast<const u8*>(s.data()), s.size()));
  }
};

TEST(Uart, TransmitsInOrderAndReportsEmpty) {
  Port p;
  EXPECT_EQ(p.in(5), 0x60);
  for (char c : std::string("hello")) p.outb(0, static_cast<u8>(c));
  EXPECT_EQ(p.out, "hello");
  EXPECT_EQ(p.in(5), 0x60);
}

TEST(Uart, DivisorLatchHidesDataAndEnable) {
  Port p;
  p.outb(3, 0x83);
  p.outb(0, 0x34);
  p.outb(1, 0x12);
  EXPECT_EQ(p.out, "");
  EXPECT_EQ(p.in(0), 0x34);
  EXPECT_EQ(p.in(1), 0x12);
  p.outb(3, 0x03);
  EXPECT_EQ(p.in(1), 0x00);
}

TEST(Uart, FifoIdentification) {
  Port p;
  EXPECT_EQ(p.in(2), 0x01);
  p.outb(2, 0x01);
  EXPECT_EQ(p.in(2), 0xc1);
  p.outb(2, 0x00);
  EXPECT_EQ(p.in(2), 0x01);
}

TEST(Uart, ThreInterruptOnEnableAndAfterEachByte) {
  Port p;
  p.outb(1, 0x02);
  EXPECT_TRUE(p.line);
  EXPECT_EQ(p.in(2), 0x02);  // reading IIR clears it
  EXPECT_FALSE(p.line);
  EXPECT_EQ(p.in(2), 0x01);
  p.outb(0, 'x');
  EXPECT_TRUE(p.line);
  p.outb(1, 0x00);
  EXPECT_FALSE(p.line);
  p.outb(1, 0x02);
  EXPECT_EQ(p.in(2), 0x02);
}

TEST(Uart, ReceiveInterruptPriorityAndTimeout) {
  Port p;
  p.outb(2, 0x81);  // FIFO, trigger 8
  p.outb(1, 0x03);
  EXPECT_EQ(p.receive("abc"), 3u);
  EXPECT_TRUE(p.line);
  EXPECT_EQ(p.in(2), 0xcc);  // below the trigger: character time-out, above THRE
  EXPECT_EQ(p.receive("defgh"), 5u);
  EXPECT_EQ(p.in(2), 0xc4);
  EXPECT_EQ(p.in(5) & 1, 1);
  std::string got;
  while (p.in(5) & 1) got.push_back(static_cast<char>(p.in(0)));
  EXPECT_EQ(got, "abcdefgh");
  EXPECT_EQ(p.in(2), 0xc2);
  EXPECT_EQ(p.in(0), 0);  // empty
}

TEST(Uart, HoldsInputUntilTheGuestIsReady) {
  Port p;
  EXPECT_EQ(p.receive("early"), 5u);
  EXPECT_EQ(p.in(5) & 1, 0);
  p.outb(2, 0x07);  // clearing the FIFO loses nothing
  p.outb(4, 0x0b);  // DTR, RTS, OUT2
  EXPECT_EQ(p.in(5) & 1, 1);
  std::string got;
  while (p.in(5) & 1) got.push_back(static_cast<char>(p.in(0)));
  EXPECT_EQ(got, "early");
}

TEST(Uart, BackPressure) {
  Port p;
  EXPECT_EQ(p.uart.room(), Uart::kQueue);
  EXPECT_EQ(p.receive(std::string(Uart::kQueue + 100, 'x')), Uart::kQueue);
  EXPECT_EQ(p.uart.room(), 0u);
  EXPECT_EQ(p.receive("y"), 0u);
  p.outb(2, 0x01);
  p.outb(4, 0x02);
  std::size_t n = 0;
  while (p.in(5) & 1) {
    EXPECT_EQ(p.in(0), 'x');
    n++;
  }
  EXPECT_EQ(n, Uart::kQueue);
  EXPECT_EQ(p.room_calls, 1);
  EXPECT_EQ(p.uart.room(), Uart::kQueue);
}

TEST(Uart, LoopbackProbe) {
  Port p;
  p.outb(4, 0x1a);  // the probe of Linux: LOOP, OUT2, RTS
  EXPECT_EQ(p.in(6) & 0xf0, 0x90);
  p.outb(0, 'L');
  EXPECT_EQ(p.out, "");
  EXPECT_EQ(p.in(5) & 1, 1);
  p.outb(0, 'M');  // one-byte receiver: overrun
  EXPECT_EQ(p.in(5) & 2, 2);
  EXPECT_EQ(p.in(5) & 2, 0);
  EXPECT_EQ(p.in(0), 'L');
  p.outb(4, 0x00);
  EXPECT_EQ(p.in(6) & 0xf0, 0xb0);
}

TEST(Uart, ModemStatusDeltasAndInterrupt) {
  Port p;
  p.outb(4, 0x10);
  p.in(6);
  p.outb(1, 0x08);
  p.outb(4, 0x12);  // CTS rises in the loop
  EXPECT_TRUE(p.line);
  EXPECT_EQ(p.in(2), 0x00);
  EXPECT_EQ(p.in(6), 0x11);
  EXPECT_FALSE(p.line);
  p.outb(4, 0x16);  // RI rises: no delta
  EXPECT_EQ(p.in(6) & 0x0f, 0);
  p.outb(4, 0x12);  // RI falls: trailing edge
  EXPECT_EQ(p.in(6) & 0x0f, 4);
}

TEST(Uart, StateRoundTrip) {
  Port p;
  p.outb(2, 0x01);
  p.outb(4, 0x0b);
  p.outb(7, 0x5a);
  p.outb(1, 0x01);
  p.receive(std::string(40, 'q'));
  Port q;
  q.uart.restore(p.uart.state());
  EXPECT_TRUE(q.line);
  EXPECT_EQ(q.in(7), 0x5a);
  int n = 0;
  while (q.in(5) & 1) n += q.in(0) == 'q';
  EXPECT_EQ(n, 40);
  Uart::State bad;
  bad.fifo.assign(1000, 1);
  bad.queue.assign(Uart::kQueue * 2, 1);
  q.uart.restore(bad);
  EXPECT_EQ(q.uart.room(), 0u);
}

TEST(Uart, AnyAccessIsHarmless) {
  Port p;
  std::mt19937 rng(1);
  for (int i = 0; i < 200000; i++) {
    u8 bytes[8];
    for (u8& b : bytes) b = static_cast<u8>(rng());
    const std::size_t n = 1 + rng() % 8;
    const u64 offset = rng() % 16;
    switch (rng() % 3) {
      case 0: p.uart.read(offset, std::span(bytes, n)); break;
      case 1: p.uart.write(offset, std::span<const u8>(bytes, n)); break;
      default: p.uart.receive(std::span<const u8>(bytes, n)); break;
    }
    ASSERT_LE(p.uart.state().fifo.size(), Uart::kFifo);
    p.out.clear();
  }
}

}  // namespace
}  // namespace ring3::devices
