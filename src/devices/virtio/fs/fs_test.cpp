#include "devices/virtio/fs/fs.hpp"

#include <gtest/gtest.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <thread>

#include "base/temporary_directory.hpp"
#include "devices/virtio/core/test_driver.hpp"

namespace ring3::virtio {
namespace {

class FakeTransport final : public Transport {
 public:
  void config_changed() override {}
  void needs_reset(const std::string&) override { resets++; }
  std::atomic<int> resets{0};
};

/// The device with one queue, as a driver that sends FUSE requests; kicked by the vCPU's thread, or by the kick fd.
class FsDevice : public ::testing::TestWithParam<bool> {
 protected:
  static constexpr u64 kRequest = 0x20000, kReply = 0x60000;
  void SetUp() override {
    ASSERT_FALSE(root.empty());
    auto made = fs::ShareProcess::start({root, false, std::nullopt, 0});
    ASSERT_TRUE(made) << made.error().message;
    process = std::shared_ptr<fs::ShareProcess>(std::move(*made));
    device = std::make_unique<Fs>("tag", process);
    device->attach(transport);
    start();
  }
  void TearDown() override {
    device.reset();
    process.reset();
  }
  void start() {
    kick.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    const auto setup = test::Driver::layout(64, false, false);
    driver = std::make_unique<test::Driver>(guest, setup);
    Queue::Hooks hooks;
    hooks.interrupt = [this] { interrupts++; };
    hooks.broken = [this](const std::string& why) { transport.needs_reset(why); };
    hooks.device_broken = std::make_shared<std::atomic<bool>>(false);
    auto made = Queue::create(guest.memory(), setup, kick.get(), hooks);
    ASSERT_TRUE(made) << made.error().message;
    queue = std::move(*made);
    Queue* queues[2] = {nullptr, queue.get()};
    device->start(0, queues);
  }
  void ring() {
    if (GetParam()) {
      ASSERT_TRUE(device->kicked(queue->index()));
      return;
    }
    const u64 one = 1;
    ASSERT_EQ(::write(kick.get(), &one, sizeof one), static_cast<ssize_t>(sizeof one));
  }
  /// What the device has handed back, after at most two seconds.
  std::optional<test::Done> done() {
    for (int i = 0; i < 2000; i++) {
      if (auto d = driver->take()) return d;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return std::nullopt;
  }
  u32 put_request(u32 opcode, u64 node, const std::string& arguments) {
    fuse_in_header h{};
    h.len = static_cast<u32>(sizeof h + arguments.size());
    h.opcode = opcode;
    h.nodeid = node;
    h.unique = ++unique;
    std::memcpy(guest.at(kRequest), &h, sizeof h);
    std::memcpy(guest.at(kRequest + sizeof h), arguments.data(), arguments.size());
    return h.len;
  }
  /// One request; the error of the answer.
  int call(u32 opcode, u64 node, const std::string& arguments) {
    const u32 length = put_request(opcode, node, arguments);
    driver->add({{kRequest, 16, false}, {kRequest + 16, length - 16, false}, {kReply, 16, true}, {kReply + 16, 4096, true}});
    ring();
    const auto d = done();
    if (!d) return -1;
    fuse_out_header answer;
    std::memcpy(&answer, guest.at(kReply), sizeof answer);
    EXPECT_EQ(answer.unique, unique);
    EXPECT_EQ(answer.len, d->written);
    return answer.error;
  }
  int init() {
    const u32 words[4] = {7, 37, 1 << 20, ~0u};
    return call(FUSE_INIT, 0, std::string(reinterpret_cast<const char*>(words), sizeof words));
  }

  const TemporaryDirectory directory;
  const std::string root = directory.path();
  test::Guest guest;
  FakeTransport transport;
  std::shared_ptr<fs::ShareProcess> process;
  UniqueFd kick;
  std::unique_ptr<test::Driver> driver;
  std::unique_ptr<Queue> queue;
  std::unique_ptr<Fs> device;  // before the queue goes
  std::atomic<int> interrupts{0};
  u64 unique = 0;
};

TEST_P(FsDevice, Configuration) {
  u8 bytes[40] = {};
  device->read_config(0, bytes);
  EXPECT_EQ(std::memcmp(bytes, "tag\0", 4), 0);
  EXPECT_EQ(bytes[36], 1);
  EXPECT_EQ(device->type(), DeviceType::kFs);
}

TEST_P(FsDevice, RequestsAreAnswered) {
  EXPECT_EQ(init(), 0);
  EXPECT_EQ(call(FUSE_STATFS, 1, ""), 0);
  EXPECT_EQ(call(FUSE_LOOKUP, 1, std::string("x/y\0", 4)), -EINVAL);
  EXPECT_GT(interrupts, 0);
}

TEST_P(FsDevice, WhatNobodyWaitsForIsHandedBackAtOnce) {
  ASSERT_EQ(init(), 0);
  const auto files = [&] {
    return std::distance(std::filesystem::directory_iterator("/proc/" + std::to_string(process->pid()) + "/fd"), {});
  };
  const auto before = files();
  std::ofstream(root + "/x") << "content";
  ASSERT_EQ(call(FUSE_LOOKUP, 1, std::string("x\0", 2)), 0);
  const u64 node = guest.get<fuse_entry_out>(kReply + sizeof(fuse_out_header)).nodeid;
  const fuse_open_in open{O_RDONLY, 0};
  ASSERT_EQ(call(FUSE_OPEN, node, std::string(reinterpret_cast<const char*>(&open), sizeof open)), 0);
  fuse_release_in release{};
  release.fh = guest.get<fuse_open_out>(kReply + sizeof(fuse_out_header)).fh;
  EXPECT_EQ(files(), before + 2);
  EXPECT_EQ(call(FUSE_RELEASE, node, std::string(reinterpret_cast<const char*>(&release), sizeof release)), 0);
  // A FORGET has no answer, but its buffer comes back, and an interrupt for some together.
  const fuse_forget_in one{1};
  const u32 length = put_request(FUSE_FORGET, node, std::string(reinterpret_cast<const char*>(&one), sizeof one));
  const int told = interrupts;
  for (int i = 0; i < 40; i++) {
    ASSERT_TRUE(driver->add({{kRequest, length, false}}));
    ring();
    const auto d = done();
    ASSERT_TRUE(d) << i;
    EXPECT_EQ(d->written, 0u);
  }
  for (int i = 0; i < 2000 && (files() != before || interrupts == told); i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(files(), before);  // without another request
  EXPECT_GT(interrupts, told);
  EXPECT_EQ(call(FUSE_STATFS, 1, ""), 0);
}

TEST_P(FsDevice, AResetInBetweenForgetsWhatWasUnderWay) {
  ASSERT_EQ(init(), 0);
  for (int round = 0; round < 20; round++) {
    const u32 length = put_request(FUSE_STATFS, 1, "");
    for (int i = 0; i < 16; i++) driver->add({{kRequest, length, false}, {kReply, 4096, true}});
    ring();
    device->stop();
    queue.reset();
    start();
    ASSERT_EQ(init(), 0) << round;
  }
}

TEST_P(FsDevice, ADeadProcessEndsTheDeviceNotTheVm) {
  ASSERT_EQ(init(), 0);
  kill(process->pid(), SIGKILL);
  for (int i = 0; i < 2000 && transport.resets == 0; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(transport.resets, 1);
}

TEST_P(FsDevice, ARequestThatIsTooLargeBreaksTheQueue) {
  ASSERT_EQ(init(), 0);
  driver->add({{0x80000, 0x70000, false}, {0x80000, 0x70000, false}, {0x80000, 0x70000, false}, {kReply, 4096, true}});
  ring();
  for (int i = 0; i < 2000 && transport.resets == 0; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(transport.resets, 1);
}

TEST_P(FsDevice, ChainsOfAnyShapeAreHandedBack) {
  ASSERT_EQ(init(), 0);
  std::mt19937 random(11);
  for (int i = 0; i < 3000; i++) {
    for (int k = 0; k < 64; k++) guest.put<u8>(kRequest + static_cast<u64>(k), static_cast<u8>(random()));
    guest.put<u32>(kRequest, random() % 128);
    guest.put<u32>(kRequest + 4, random() % 60 == 50 ? 0 : random() % 56);  // opcode
    guest.put<u64>(kRequest + 16, random() % 4);                            // node
    if (guest.get<u32>(kRequest + 4) == FUSE_SYNCFS) continue;
    std::vector<test::Buffer> buffers;
    const int pieces = 1 + static_cast<int>(random() % 4);
    bool writable = false;
    for (int p = 0; p < pieces; p++) {
      writable |= random() % 3 == 0;
      buffers.push_back({writable ? kReply + random() % 4096 : kRequest + random() % 32, 1 + static_cast<u32>(random() % 200), writable});
    }
    ASSERT_TRUE(driver->add(buffers));
    ring();
    const auto d = done();
    ASSERT_TRUE(d) << i;
    u64 room = 0;
    for (const auto& b : buffers) room += b.writable ? b.length : 0;
    EXPECT_LE(d->written, room);
  }
  EXPECT_EQ(transport.resets, 0);
  EXPECT_EQ(init(), 0);
}

TEST_P(FsDevice, KicksOnSeveralThreadsBesideResets) {
  ASSERT_EQ(init(), 0);
  std::atomic<bool> end{false};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; i++) {
    threads.emplace_back([&, index = queue->index()] {
      while (!end) (void)device->kicked(index), (void)device->kicked(77);
    });
  }
  for (int round = 0; round < 50; round++) {
    const u32 length = put_request(FUSE_STATFS, 1, "");
    for (int i = 0; i < 10; i++) driver->add({{kRequest, length, false}, {kReply, 4096, true}});
    if (round % 2 == 0) {
      for (int i = 0; i < 10; i++) ASSERT_TRUE(done()) << round;
    }
    device->stop();
    EXPECT_FALSE(device->kicked(queue->index()));
    queue.reset();
    start();
    ASSERT_EQ(init(), 0) << round;
  }
  end = true;
  for (auto& t : threads) t.join();
  EXPECT_EQ(transport.resets, 0);
}

INSTANTIATE_TEST_SUITE_P(Kicks, FsDevice, ::testing::Values(false, true), [](const auto& p) { return p.param ? "Vcpu" : "Fd"; });

}  // namespace
}  // namespace ring3::virtio
