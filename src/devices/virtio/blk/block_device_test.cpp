#include "devices/virtio/blk/block_device.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spdlog/spdlog.h>
#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <random>
#include <thread>

#include "base/temporary_directory.hpp"
#include "devices/virtio/blk/uring.hpp"
#include "devices/virtio/pci/test_bus.hpp"
#include "storage/block/host_file.hpp"
#include "storage/block/memory_file.hpp"
#include "storage/block/raw.hpp"

namespace ring3::virtio {
namespace {

using storage::MemoryFile;
using storage::RawImage;

constexpr u64 kDisk = u64{1} << 20;
constexpr u64 kHeader = 0x40000, kStatus = 0x40100, kData = 0x50000;
constexpr u64 kBase = feature::kVersion1 | u64{1} << BlockDevice::kFlush | u64{1} << BlockDevice::kDiscard | u64{1} << BlockDevice::kWriteZeroes;

struct Block : testing::TestWithParam<u64> {
  void make(bool read_only = false, u64 features = kBase | GetParam()) {
    auto owned = std::make_unique<MemoryFile>(std::vector<u8>(kDisk));
    file = owned.get();
    BlockDevice::Config c;
    c.image = std::make_shared<RawImage>(std::move(owned), kDisk, !read_only);
    c.serial = "SERIAL-0123456789-too-long";
    c.queues = 2;
    make(std::move(c), features);
  }
  void make(BlockDevice::Config c, u64 features) {
    spdlog::set_level(spdlog::level::off);
    bus = std::make_unique<test::TestBus>();
    device = std::make_shared<BlockDevice>(std::move(c));
    ASSERT_TRUE(bus->add(device));
    ASSERT_TRUE(bus->start(1, features, 2, 64));
  }
  ~Block() override { spdlog::set_level(spdlog::level::info); }

  /// Sends one request; false when the ring is full.
  bool send(u32 type, u64 sector, std::vector<test::Buffer> data, u16 queue = 0) {
    bus->guest.put<u32>(kHeader, type);
    bus->guest.put<u32>(kHeader + 4, 0);
    bus->guest.put<u64>(kHeader + 8, sector);
    bus->guest.put<u8>(kStatus, 0xee);
    data.insert(data.begin(), {kHeader, 16, false});
    data.push_back({kStatus, 1, true});
    if (!bus->drivers[queue]->add(data)) return false;
    bus->kick(1, queue);
    return true;
  }
  /// Sends one request and waits; the status byte, 255 when nothing comes back, 254 when there is no room.
  int request(u32 type, u64 sector, std::vector<test::Buffer> data, u16 queue = 0) {
    if (!send(type, sector, std::move(data), queue)) return 254;
    return bus->wait(queue) ? bus->guest.get<u8>(kStatus) : 255;
  }
  std::shared_ptr<BlockDevice> device;
  std::unique_ptr<test::TestBus> bus;
  MemoryFile* file = nullptr;
};

TEST_P(Block, WritesAndReads) {
  make();
  EXPECT_EQ(bus->read<u64>(bus->bar(1) + 0x2000), kDisk / 512);
  EXPECT_EQ(bus->read<u16>(bus->bar(1) + 0x2000 + 34), 2);
  std::memset(bus->guest.at(kData), 0xab, 4096);
  EXPECT_EQ(request(1, 8, {{kData, 1024, false}, {kData + 1024, 3072, false}}), 0);
  EXPECT_EQ(file->bytes()[8 * 512], 0xab);
  EXPECT_EQ(file->bytes()[8 * 512 + 4095], 0xab);
  EXPECT_EQ(file->bytes()[8 * 512 + 4096], 0);
  EXPECT_EQ(request(0, 7, {{kData + 0x2000, 1024, true}}, 1), 0);
  EXPECT_EQ(bus->guest.get<u8>(kData + 0x2000 + 511), 0);
  EXPECT_EQ(bus->guest.get<u8>(kData + 0x2000 + 512), 0xab);
  EXPECT_EQ(request(4, 0, {}), 0);
  EXPECT_EQ(request(8, 0, {{kData, 20, true}}), 0);
  EXPECT_EQ(std::memcmp(bus->guest.at(kData), "SERIAL-0123456789-to", 20), 0);
}

TEST_P(Block, DiscardAndWriteZeroes) {
  make();
  std::fill(file->bytes().begin(), file->bytes().end(), u8{1});
  const auto range = [&](int i, u64 sector, u32 sectors, u32 flags) {
    bus->guest.put<u64>(kData + 16 * u64(i), sector);
    bus->guest.put<u32>(kData + 16 * u64(i) + 8, sectors);
    bus->guest.put<u32>(kData + 16 * u64(i) + 12, flags);
  };
  range(0, 16, 8, 0);
  range(1, 100, 1, 0);
  EXPECT_EQ(request(11, 0, {{kData, 32, false}}), 0);
  EXPECT_EQ(file->bytes()[16 * 512], 0);
  EXPECT_EQ(file->bytes()[24 * 512], 1);
  EXPECT_EQ(file->bytes()[100 * 512 + 511], 0);
  range(0, 0, 1, 1);
  EXPECT_EQ(request(11, 0, {{kData, 16, false}}), 2);  // discard knows no flags
  EXPECT_EQ(request(13, 0, {{kData, 16, false}}), 0);
  EXPECT_EQ(file->bytes()[0], 0);
  range(0, kDisk / 512 - 1, 2, 0);
  EXPECT_EQ(request(13, 0, {{kData, 16, false}}), 1);
  range(0, ~u64{0}, 2, 0);
  EXPECT_EQ(request(11, 0, {{kData, 16, false}}), 1);
  EXPECT_EQ(request(11, 0, {{kData, 15, false}}), 1);
  EXPECT_EQ(request(11, 0, {}), 1);
  EXPECT_EQ(request(11, 0, {{kData, 65 * 16, false}}), 1);
}

TEST_P(Block, RangesOutsideOfTheDisk) {
  make();
  EXPECT_EQ(request(0, kDisk / 512, {{kData, 512, true}}), 1);
  EXPECT_EQ(request(0, kDisk / 512 - 1, {{kData, 1024, true}}), 1);
  EXPECT_EQ(request(0, ~u64{0}, {{kData, 512, true}}), 1);
  EXPECT_EQ(request(0, u64{1} << 55, {{kData, 512, true}}), 1);
  EXPECT_EQ(request(1, 0, {{kData, 100, false}}), 1);
  EXPECT_EQ(request(0, 0, {}), 0);
  EXPECT_EQ(request(77, 0, {{kData, 512, false}}), 2);
  EXPECT_EQ(request(0, kDisk / 512 - 1, {{kData, 512, true}}), 0);
}

TEST_P(Block, ReadOnlyIsReadOnly) {
  make(true, feature::kVersion1 | u64{1} << BlockDevice::kReadOnly | GetParam());
  EXPECT_EQ(request(1, 0, {{kData, 512, false}}), 1);
  EXPECT_EQ(request(11, 0, {{kData, 16, false}}), 2);
  EXPECT_EQ(request(13, 0, {{kData, 16, false}}), 2);
  EXPECT_EQ(request(0, 0, {{kData, 512, true}}), 0);
}

TEST_P(Block, TheHostsErrorsReachTheGuest) {
  make();
  file->fail_every(1, ENOSPC);
  EXPECT_EQ(request(1, 0, {{kData, 512, false}}), 1);
  EXPECT_EQ(request(0, 0, {{kData, 512, true}}), 1);
  EXPECT_EQ(request(4, 0, {}), 1);
  file->fail_every(0, 0);
  EXPECT_EQ(request(1, 0, {{kData, 512, false}}), 0);
  EXPECT_EQ(bus->status(1), 15);
}

TEST_P(Block, WithoutFlushEachWriteIsFlushed) {
  make(false, feature::kVersion1 | GetParam());
  file->record(true);
  EXPECT_EQ(request(1, 0, {{kData, 512, false}}), 0);
  ASSERT_EQ(file->log().size(), 2u);
  EXPECT_TRUE(file->log()[1].sync);
}

TEST_P(Block, BadRequestsBreakTheDeviceOnly) {
  for (const auto& bad : std::vector<std::vector<test::Buffer>>{{{kHeader, 15, false}, {kStatus, 1, true}}, {{kHeader, 16, false}}, {{kStatus, 1, true}}}) {
    make();
    ASSERT_TRUE(bus->drivers[0]->add(bad));
    bus->kick(1, 0);
    for (int i = 0; i < 4000 && (bus->status(1) & 64) == 0; i++) usleep(500);
    EXPECT_EQ(bus->status(1), 15 | 64);
    ASSERT_TRUE(bus->start(1, kBase | GetParam(), 2, 64));
    EXPECT_EQ(request(0, 0, {{kData, 512, true}}), 0);
  }
}

// A real file, with io_uring and without, buffered and O_DIRECT, many requests in flight, against a copy in memory.
TEST_P(Block, ManyRequestsOnAFile) {
  for (int kind = 0; kind < 4; kind++) {
    char path[] = "/var/tmp/ring3-blk-XXXXXX";
    const int fd = mkstemp(path);
    ASSERT_GE(fd, 0);
    ASSERT_EQ(ftruncate(fd, kDisk), 0);
    close(fd);
    storage::HostFile::Options o;
    o.writable = true;
    o.direct = (kind & 1) != 0;
    auto host = storage::HostFile::open(path, o);
    unlink(path);
    if (!host && o.direct) continue;  // a file system without O_DIRECT
    ASSERT_TRUE(host) << host.error().message;
    BlockDevice::Config c;
    c.image = std::make_shared<RawImage>(std::move(*host), kDisk, true);
    c.queues = 2;
    c.direct = o.direct;
    c.io_uring = (kind & 2) != 0;
    make(std::move(c), kBase | GetParam());

    std::vector<u8> model(kDisk);
    std::mt19937 random(9);
    struct Flying {
      u64 slot, sector, sectors;
      bool write;
    };
    std::map<u16, Flying> flying;
    const auto finish = [&] {
      const auto done = bus->wait(0);
      ASSERT_TRUE(done);
      const Flying f = flying.at(done->id);
      flying.erase(done->id);
      ASSERT_EQ(bus->guest.get<u8>(0x60000 + 32 * f.slot + 16), 0);
      if (!f.write) {
        ASSERT_EQ(std::memcmp(bus->guest.at(0x80000 + 0x1000 * f.slot), &model[f.sector * 512], f.sectors * 512), 0);
      }
    };
    for (int i = 0; i < 1500; i++) {
      u64 slot = 0;
      const auto used = [&](u64 s) { return std::any_of(flying.begin(), flying.end(), [&](auto& f) { return f.second.slot == s; }); };
      while (used(slot)) slot++;
      const u64 sectors = 1 + random() % 8, sector = random() % (kDisk / 512 - 8);
      const auto overlaps = [&](auto& f) { return sector < f.second.sector + f.second.sectors && f.second.sector < sector + sectors; };
      if (slot >= 16 || bus->drivers[0]->free() < 3 || std::any_of(flying.begin(), flying.end(), overlaps)) {
        finish();
        if (HasFatalFailure()) return;
        continue;
      }
      const u64 header = 0x60000 + 32 * slot, data = 0x80000 + 0x1000 * slot;
      const bool write = random() % 2 == 0;
      bus->guest.put<u32>(header, write ? 1 : 0);
      bus->guest.put<u64>(header + 8, sector);
      if (write) {
        for (u64 k = 0; k < sectors * 512; k++) *bus->guest.at(data + k) = model[sector * 512 + k] = static_cast<u8>(random());
      }
      const auto id = bus->drivers[0]->add({{header, 16, false}, {data, static_cast<u32>(sectors * 512), !write}, {header + 16, 1, true}});
      ASSERT_TRUE(id);
      flying[*id] = {slot, sector, sectors, write};
      bus->kick(1, 0);
    }
    while (!flying.empty() && !HasFatalFailure()) finish();
  }
}

// Reads alone are served, O_DIRECT accesses alone are sent, by the thread that kicks, the others not; all of them in order, also while
// vCPUs that have nothing to do look for their ends.
TEST_P(Block, OneAtATime) {
  for (const int kind : {0, 1, 3}) {
    const bool direct = (kind & 1) != 0, looking = (kind & 2) != 0;
    const TemporaryDirectory place;
    storage::HostFile::Options o;
    o.writable = true;
    {
      std::ofstream out(place.path() + "/disk", std::ios::binary);
      for (u64 i = 0; i < kDisk; i += 512) out << std::string(512, static_cast<char>('a' + i / 512 % 26));
    }
    o.direct = direct;
    auto host = storage::HostFile::open(place.path() + "/disk", o);
    if (!host && direct) continue;  // a file system without O_DIRECT
    ASSERT_TRUE(host) << host.error().message;
    BlockDevice::Config c;
    c.image = std::make_shared<RawImage>(std::move(*host), kDisk, true);
    c.queues = 2;
    c.direct = direct;
    make(std::move(c), kBase | GetParam());
    std::mt19937 random(5);
    std::atomic<bool> stop{false};
    std::vector<std::thread> vcpus;
    const auto look = [&](unsigned seed) {
      for (std::minstd_rand own(seed); !stop;) {
        for (auto n = own() % 200; n != 0; n--) device->look(true);
        device->look(false);
        if (own() % 4 == 0) usleep(own() % 300);
      }
    };
    for (unsigned n = 0; looking && n < 2; n++) vcpus.emplace_back(look, n + 1);
    const struct Join {
      std::atomic<bool>& stop;
      std::vector<std::thread>& threads;
      ~Join() {
        stop = true;
        for (std::thread& t : threads) t.join();
      }
    } join{stop, vcpus};
    std::vector<u8> model(kDisk);
    for (u64 i = 0; i < kDisk; i++) model[i] = static_cast<u8>('a' + i / 512 % 26);
    for (int i = 0; i < 3000; i++) {
      const u32 sectors = 1 + random() % 40;  // also more than is served at once
      const u64 sector = random() % (kDisk / 512);
      const bool fits = sector + sectors <= kDisk / 512;
      if (random() % 8 == 0) {
        for (u32 k = 0; k < sectors * 512; k++) *bus->guest.at(kData + k) = static_cast<u8>(i);
        ASSERT_EQ(request(1, sector, {{kData, sectors * 512, false}}), fits ? 0 : 1);
        if (fits) std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(sector * 512), sectors * 512, static_cast<u8>(i));
        continue;
      }
      if (random() % 50 == 0) {
        ASSERT_EQ(request(4, 0, {}), 0);
        ASSERT_EQ(request(0, sector, {{kData, 100, true}}), 1);  // no whole sector
      }
      std::memset(bus->guest.at(kData), 0, sectors * 512);
      ASSERT_EQ(request(0, sector, {{kData, sectors * 512, true}}), fits ? 0 : 1) << i;
      if (!fits) continue;
      ASSERT_EQ(std::memcmp(bus->guest.at(kData), &model[sector * 512], sectors * 512), 0) << i;
    }
  }
}

TEST_P(Block, TheVcpusThreadServesSingleCachedReads) {
  const TemporaryDirectory place;
  std::ofstream(place.path() + "/disk", std::ios::binary) << std::string(kDisk, 'x');
  auto host = storage::HostFile::open(place.path() + "/disk", {});
  ASSERT_TRUE(host) << host.error().message;
  {  // A host that cannot say whether it has to wait.
    std::array<char, 512> b;
    iovec v{b.data(), b.size()};
    const UniqueFd fd(open((place.path() + "/disk").c_str(), O_RDONLY | O_CLOEXEC));
    if (preadv2(fd.get(), &v, 1, 0, RWF_NOWAIT) != 512) GTEST_SKIP() << "no RWF_NOWAIT in /var/tmp";
  }
  BlockDevice::Config c;
  c.image = std::make_shared<RawImage>(std::move(*host), kDisk, false);
  c.queues = 2;
  make(std::move(c), (kBase | GetParam()) & ~(u64{1} << BlockDevice::kDiscard | u64{1} << BlockDevice::kWriteZeroes));
  for (int i = 0; i < 20; i++) ASSERT_EQ(request(0, 8, {{kData, 4096, true}}), 0);
  // By now it is there when the kick returns.
  int at_once = 0;
  for (int i = 0; i < 20; i++) {
    ASSERT_TRUE(send(0, 16, {{kData, 4096, true}}));
    if (bus->drivers[0]->take()) {
      at_once++;
    } else {
      ASSERT_TRUE(bus->wait(0));
    }
    EXPECT_EQ(bus->guest.get<u8>(kStatus), 0);
  }
  EXPECT_GT(at_once, 10);
}

/// Direct reads of it come from a pipe: they end when the test says so.
class PipedImage final : public storage::Image {
 public:
  PipedImage() { EXPECT_EQ(::pipe2(ends_, O_CLOEXEC), 0); }
  ~PipedImage() override {
    ::close(ends_[0]);
    ::close(ends_[1]);
  }
  void let_end() {
    const std::array<u8, 4096> bytes{};
    ASSERT_EQ(::write(ends_[1], bytes.data(), bytes.size()), 4096);
  }
  const char* format() const override { return "pipe"; }
  u64 size() const override { return kDisk; }
  bool writable() const override { return false; }
  u32 cluster_size() const override { return 4096; }
  int read(u64, std::span<const iovec>) override { return 0; }
  int write(u64, std::span<const iovec>) override { return -EROFS; }
  int write_zeroes(u64, u64, bool) override { return -EROFS; }
  int discard(u64, u64) override { return -EROFS; }
  int flush() override { return 0; }
  int map(u64, u64, Extent&) override { return -ENOTSUP; }
  Direct begin_direct(bool, u64, std::span<const iovec>) override { return {ends_[0], 0, 0}; }

 private:
  int ends_[2] = {-1, -1};
};

// What the kicking thread has sent is its own to look for: the device's thread is not told while it does, and is again afterwards.
// Where the host has no io_uring, that thread answers everything.
TEST_P(Block, WhoLooksIsNotTold) {
  const bool has_ring = Uring::create(4) != nullptr;
  const auto image = std::make_shared<PipedImage>();
  const auto let_end = [&] {  // else nobody takes it out of the pipe
    if (has_ring) image->let_end();
  };
  BlockDevice::Config c;
  c.image = image;
  c.direct = true;
  c.queues = 2;
  make(std::move(c), (kBase | GetParam()) & ~(u64{1} << BlockDevice::kDiscard | u64{1} << BlockDevice::kWriteZeroes));
  for (int i = 0; i < 20; i++) {
    ASSERT_TRUE(send(0, 8, {{kData, 4096, true}}));
    let_end();
    ASSERT_TRUE(bus->wait(0));
  }
  for (int i = 0; i < 20; i++) {
    ASSERT_TRUE(send(0, 8 * static_cast<u64>(i), {{kData, 4096, true}}));
    device->look(true);
    let_end();
    usleep(5000);
    if (has_ring) {
      EXPECT_FALSE(bus->drivers[0]->take()) << "it has ended, and nobody was told";
      device->look(i % 2 == 0);
      EXPECT_TRUE(bus->drivers[0]->take()) << i;
    } else {
      EXPECT_TRUE(bus->wait(0)) << i;
    }
    EXPECT_EQ(bus->guest.get<u8>(kStatus), 0);
    device->look(false);
  }
  // After the last look the thread is told again.
  ASSERT_TRUE(send(0, 8, {{kData, 4096, true}}));
  device->look(true);
  device->look(false);
  let_end();
  EXPECT_TRUE(bus->wait(0));
}

INSTANTIATE_TEST_SUITE_P(All, Block, testing::Values(0, feature::kPacked | feature::kEventIndex), [](const auto& i) {
  return std::string(i.param == 0 ? "Split" : "Packed");
});

}  // namespace
}  // namespace ring3::virtio
