#include "devices/virtio/vsock/vsock.hpp"

#include <gtest/gtest.h>
#include <malloc.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <chrono>
#include <random>
#include <thread>

#include "devices/virtio/core/test_driver.hpp"

#ifdef __SANITIZE_ADDRESS__
extern "C" std::size_t __sanitizer_get_current_allocated_bytes();  // NOLINT: GCC comes without the header
#endif

namespace ring3::virtio {
namespace {

using test::Done;
using test::Driver;
using test::Guest;

struct Packet {
  u64 source_cid = 5, target_cid = 2;
  u32 source_port = 0, target_port = 0, length = 0;
  u16 type = 1, op = 0;
  u32 flags = 0, buffer = 65536, forwarded = 0;
} __attribute__((packed));
static_assert(sizeof(Packet) == 44);

constexpr u16 kRequest = 1, kResponse = 2, kReset = 3, kShutdown = 4, kData = 5, kCreditUpdate = 6, kCreditRequest = 7;

sockaddr_un address(const std::string& path) {
  sockaddr_un a{};
  a.sun_family = AF_UNIX;
  std::strcpy(a.sun_path, path.c_str());
  return a;
}

class VsockTest : public testing::Test {
 public:
  void SetUp() override {
    path = testing::TempDir() + "ring3-vsock-" + std::to_string(getpid());
    auto made = Vsock::create(5, path);
    ASSERT_TRUE(made) << made.error().message;
    device = std::move(*made);
    device->attach(transport);
    auto broken = std::make_shared<std::atomic<bool>>(false);
    for (u16 i = 0; i < 3; i++) {
      auto setup = Driver::layout(128, false, false, 0x1000 + 0x8000 * u64{i});
      setup.index = i;
      drivers.push_back(std::make_unique<Driver>(guest, setup));
      kicks.emplace_back(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
      Queue::Hooks hooks;
      hooks.broken = [this](const std::string& why) { transport.needs_reset(why); };
      hooks.device_broken = broken;
      auto queue = Queue::create(guest.memory(), setup, kicks.back().get(), hooks);
      ASSERT_TRUE(queue);
      queues.push_back(std::move(*queue));
    }
    for (u32 i = 0; i < 100; i++) give_buffer();
    std::vector<Queue*> all{queues[0].get(), queues[1].get(), queues[2].get()};
    device->start(0, all);
  }
  void TearDown() override {
    if (device) device->stop();
    EXPECT_TRUE(transport.broken.empty()) << transport.broken;
  }
  void kick(std::size_t queue) {
    const u64 one = 1;
    ASSERT_EQ(::write(kicks[queue].get(), &one, sizeof one), 8);
  }
  // Buffers of 4 KiB at 0x80000, one after the other; the device uses them in order.
  void give_buffer() {
    drivers[0]->add({{0x80000 + 0x1000 * u64{given++ % 100}, 4096, true}});
  }
  void send(Packet p, const std::string& data = "") {
    p.length = static_cast<u32>(data.size());
    std::memcpy(guest.at(0x60000), &p, sizeof p);
    std::memcpy(guest.at(0x61000), data.data(), data.size());
    if (data.empty()) drivers[1]->add({{0x60000, sizeof p, false}});
    else drivers[1]->add({{0x60000, sizeof p, false}, {0x61000, static_cast<u32>(data.size()), false}});
    kick(1);
    for (int i = 0; i < 2000; i++) {
      if (drivers[1]->take()) return;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    FAIL() << "a packet is not taken";
  }
  /// The next packet from the device; op 0 when none comes.
  Packet receive(std::string* data = nullptr, int patience_ms = 2000) {
    Packet p;
    p.op = 0;
    for (int i = 0; i < patience_ms; i++) {
      if (const auto done = drivers[0]->take()) {
        const u64 at = 0x80000 + 0x1000 * u64{taken++ % 100};
        std::memcpy(&p, guest.at(at), sizeof p);
        EXPECT_EQ(done->written, sizeof p + p.length);
        EXPECT_EQ(p.source_cid, 2u);
        EXPECT_EQ(p.target_cid, 5u);
        if (data != nullptr) *data = std::string(reinterpret_cast<char*>(guest.at(at + sizeof p)), p.length);
        give_buffer();
        kick(0);
        return p;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return p;
  }
  UniqueFd connect() {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const auto a = address(path);
    EXPECT_EQ(::connect(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a), 0);
    return fd;
  }
  static std::string read(int fd, int patience_ms = 2000) {
    pollfd p{fd, POLLIN, 0};
    if (::poll(&p, 1, patience_ms) != 1) return "(nothing)";
    char buffer[70000];
    const ssize_t n = ::recv(fd, buffer, sizeof buffer, MSG_DONTWAIT);
    if (n < 0) return "(error)";
    return n == 0 ? "(end)" : std::string(buffer, static_cast<std::size_t>(n));
  }
  static void write(int fd, const std::string& text) { ASSERT_EQ(::send(fd, text.data(), text.size(), 0), static_cast<ssize_t>(text.size())); }

  /// A connection from the host to the guest's port 80; the reply template for the guest.
  UniqueFd open(Packet* reply) {
    UniqueFd fd = connect();
    write(fd.get(), "CONNECT 80\n");
    const Packet request = receive();
    EXPECT_EQ(request.op, kRequest);
    EXPECT_EQ(request.target_port, 80u);
    *reply = Packet{};
    reply->source_port = 80;
    reply->target_port = request.source_port;
    reply->op = kResponse;
    send(*reply);
    EXPECT_EQ(read(fd.get()), "OK " + std::to_string(request.source_port) + "\n");
    reply->op = kData;
    return fd;
  }

  Guest guest;
  test::RecordingTransport transport;
  std::string path;
  std::unique_ptr<Vsock> device;
  std::vector<UniqueFd> kicks;
  std::vector<std::unique_ptr<Driver>> drivers;
  std::vector<std::unique_ptr<Queue>> queues;
  u32 given = 0, taken = 0;
};

TEST_F(VsockTest, TheConfigurationSaysTheCid) {
  u8 config[8] = {};
  device->read_config(0, config);
  EXPECT_EQ(config[0], 5);
  struct stat info {};
  ASSERT_EQ(::stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST_F(VsockTest, HostConnectsToTheGuest) {
  Packet p;
  UniqueFd fd = open(&p);
  send(p, "from the guest");
  EXPECT_EQ(read(fd.get()), "from the guest");
  write(fd.get(), "from the host");
  std::string data;
  EXPECT_EQ(receive(&data).op, kData);
  EXPECT_EQ(data, "from the host");
  // The host's end of file, then the guest's goodbye.
  ::shutdown(fd.get(), SHUT_WR);
  const Packet down = receive();
  EXPECT_EQ(down.op, kShutdown);
  EXPECT_EQ(down.flags, 2u);
  send(p, "last words");
  EXPECT_EQ(read(fd.get()), "last words");
  p.op = kShutdown;
  p.flags = 3;
  send(p);
  EXPECT_EQ(receive().op, kReset);
  EXPECT_EQ(read(fd.get()), "(end)");
}

TEST_F(VsockTest, GuestConnectsToTheHost) {
  const std::string where = path + "_1234";
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const auto a = address(where);
  ::unlink(where.c_str());
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a), 0);
  ASSERT_EQ(::listen(listener.get(), 4), 0);
  Packet p;
  p.source_port = 7000;
  p.target_port = 1234;
  p.op = kRequest;
  send(p);
  EXPECT_EQ(receive().op, kResponse);
  UniqueFd fd(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
  p.op = kData;
  send(p, "hello");
  EXPECT_EQ(read(fd.get()), "hello");
  // The program ends without a word.
  fd.reset();
  EXPECT_EQ(receive().op, kShutdown);
  p.op = kData;
  send(p, "is anybody there?");
  EXPECT_EQ(receive().op, kReset);
  // Nobody listens on another port.
  p.source_port = 7001;
  p.target_port = 99;
  p.op = kRequest;
  send(p);
  const Packet no = receive();
  EXPECT_EQ(no.op, kReset);
  EXPECT_EQ(no.source_port, 99u);
  ::unlink(where.c_str());
}

TEST_F(VsockTest, ARefusalEndsTheProgramsConnection) {
  UniqueFd fd = connect();
  write(fd.get(), "CONNECT 81\r\n");
  const Packet request = receive();
  Packet p;
  p.source_port = 81;
  p.target_port = request.source_port;
  p.op = kReset;
  send(p);
  EXPECT_EQ(read(fd.get()), "(end)");
}

TEST_F(VsockTest, LinesThatAreNone) {
  for (const char* bad : {"HELLO\n", "CONNECT\n", "CONNECT \n", "CONNECT x\n", "CONNECT 4294967295\n", "CONNECT -1\n", "CONNECT 99999999999\n",
                          "a line that is very much longer than any that connects to a port\n"}) {
    UniqueFd fd = connect();
    ::send(fd.get(), bad, std::strlen(bad), MSG_NOSIGNAL);
    const std::string answer = read(fd.get());
    EXPECT_TRUE(answer == "(end)" || answer == "(error)") << bad << answer;
  }
  // Many that say nothing: the oldest give way.
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 80; i++) silent.push_back(connect());
  EXPECT_EQ(read(silent[0].get()), "(end)");
  Packet p;
  UniqueFd fd = open(&p);
}

TEST_F(VsockTest, CreditHoldsTheHostBack) {
  Packet p;
  UniqueFd fd = open(&p);
  p.buffer = 1000;
  p.op = kCreditUpdate;
  send(p);
  write(fd.get(), std::string(5000, 'x'));
  std::string data, all;
  while (all.size() < 1000) {
    ASSERT_EQ(receive(&data).op, kData);
    all += data;
  }
  EXPECT_EQ(all.size(), 1000u);
  EXPECT_EQ(receive(nullptr, 50).op, 0);
  p.forwarded = 1000;
  send(p);
  while (all.size() < 2000) {
    ASSERT_EQ(receive(&data).op, kData);
    all += data;
  }
  EXPECT_EQ(all.size(), 2000u);
  p.forwarded = 1'000'000;  // a lie makes no credit
  send(p);
  EXPECT_EQ(receive(nullptr, 50).op, 0);
  // And the guest is told of its own when it asks.
  p.forwarded = 2000;
  p.buffer = 0;
  p.op = kCreditRequest;
  send(p);
  const Packet credit = receive();
  EXPECT_EQ(credit.op, kCreditUpdate);
  EXPECT_EQ(credit.buffer, 128u << 10);
}

TEST_F(VsockTest, AGuestThatIgnoresItsCreditIsCutOff) {
  Packet p;
  UniqueFd fd = open(&p);
  const std::string block(40000, 'y');
  bool cut = false;
  for (int i = 0; i < 60 && !cut; i++) {
    send(p, block);
    const Packet r = receive(nullptr, 1);
    cut = r.op == kReset;
  }
  EXPECT_TRUE(cut || receive().op == kReset);
}

TEST_F(VsockTest, SlowReaderGetsEverything) {
  Packet p;
  UniqueFd fd = open(&p);
  std::mt19937 r(1);
  std::string sent, got;
  u32 told = 0;
  while (sent.size() < 3'000'000) {
    if (sent.size() - told + 30000 <= (128u << 10)) {
      std::string block(30000, ' ');
      for (char& c : block) c = static_cast<char>(r());
      send(p, block);
      sent += block;
    } else {
      const std::string more = read(fd.get(), 1000);
      ASSERT_NE(more, "(nothing)");
      got += more;
    }
    for (Packet u = receive(nullptr, 1); u.op != 0; u = receive(nullptr, 1)) {
      ASSERT_EQ(u.op, kCreditUpdate);
      told = u.forwarded;
    }
  }
  while (got.size() < sent.size()) {
    const std::string more = read(fd.get());
    ASSERT_NE(more, "(nothing)");
    got += more;
  }
  EXPECT_TRUE(got == sent);
}

TEST_F(VsockTest, HostilePackets) {
  std::mt19937_64 r(3);
  Packet open_one;
  UniqueFd fd = open(&open_one);
  for (int i = 0; i < 3000; i++) {
    Packet p;
    for (std::size_t k = 0; k < sizeof p; k++) reinterpret_cast<u8*>(&p)[k] = static_cast<u8>(r());
    if (r() % 4 != 0) p.source_cid = 5;
    if (r() % 4 != 0) p.target_cid = 2;
    if (r() % 2 != 0) p.type = 1;
    p.op = static_cast<u16>(r() % 10);
    if (r() % 2 != 0) p.source_port = 80, p.target_port = open_one.target_port;
    std::memcpy(guest.at(0x60000), &p, sizeof p);
    drivers[1]->add({{0x60000, static_cast<u32>(r() % 60), false}, {0x61000, static_cast<u32>(r() % 3000), false}});
    kick(1);
    while (drivers[1]->take()) {}
    receive(nullptr, 0);
    if (r() % 8 == 0 && drivers[0]->take()) taken++, give_buffer(), kick(0);
  }
  // Still there for others.
  for (Packet p = receive(nullptr, 50); p.op != 0; p = receive(nullptr, 50)) {}
  while (drivers[1]->take()) {}
  Packet p;
  UniqueFd another = open(&p);
}

/// Bytes that are allocated.
std::size_t allocated() {
#ifdef __SANITIZE_ADDRESS__
  return __sanitizer_get_current_allocated_bytes();
#else
  return mallinfo2().uordblks;
#endif
}

// A guest that connects and resets, and takes no answer to either, costs nothing that stays.
TEST_F(VsockTest, ConnectionsThatAreGoneWaitForNothing) {
  UniqueFd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  const std::string name = path + "_9";
  ::unlink(name.c_str());
  const auto a = address(name);
  ASSERT_EQ(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a), 0);
  ASSERT_EQ(::listen(listener.get(), 64), 0);
  // No buffer is left to the device.
  Packet p;
  p.source_port = 7, p.target_port = 8, p.op = kRequest;
  for (int i = 0; i < 100; i++) send(p);
  const auto round = [&](u32 first) {
    constexpr u32 kPairs = 30;
    for (u32 i = 0; i < 2 * kPairs; i++) {
      p.source_port = first + i / 2, p.target_port = 9, p.op = i % 2 == 0 ? kRequest : kReset;
      const u64 at = 0x60000 + 64 * u64{i};
      std::memcpy(guest.at(at), &p, sizeof p);
      ASSERT_TRUE(drivers[1]->add({{at, sizeof p, false}}));
    }
    kick(1);
    u32 back = 0;
    for (int i = 0; i < 20000 && back < 2 * kPairs; i++) {
      if (drivers[1]->take()) back++;
      else std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    ASSERT_EQ(back, 2 * kPairs);
    u32 came = 0;
    while (UniqueFd(::accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC))) came++;
    ASSERT_EQ(came, kPairs);
  };
  for (u32 i = 0; i < 5; i++) ASSERT_NO_FATAL_FAILURE(round(1000));
  const std::size_t before = allocated();
  for (u32 i = 0; i < 100; i++) ASSERT_NO_FATAL_FAILURE(round(1000 + 40 * i));
  EXPECT_LT(allocated(), before + (u32{64} << 10)) << "3000 connections came and went";
  ::unlink(name.c_str());
}

TEST(VsockPath, InUseStaleAndTooLong) {
  const std::string path = testing::TempDir() + "ring3-vsock-path-" + std::to_string(getpid());
  auto first = Vsock::create(3, path);
  ASSERT_TRUE(first);
  auto second = Vsock::create(3, path);
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, EADDRINUSE);
  first->reset();
  struct stat info {};
  EXPECT_NE(::stat(path.c_str(), &info), 0);
  {  // left behind by a process that was killed
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const auto a = address(path);
    ASSERT_EQ(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a), 0);
  }
  EXPECT_TRUE(Vsock::create(3, path));
  EXPECT_FALSE(Vsock::create(2, path));
  EXPECT_FALSE(Vsock::create(3, std::string(100, 'a')));
  EXPECT_FALSE(Vsock::create(3, ""));
}

}  // namespace
}  // namespace ring3::virtio
