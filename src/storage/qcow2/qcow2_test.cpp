#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <optional>
#include <random>
#include <thread>

#include "base/temporary_directory.hpp"
#include "storage/block/host_file.hpp"
#include "storage/block/memory_file.hpp"
#include "storage/block/raw.hpp"
#include "storage/qcow2/qcow2_image.hpp"

namespace ring3::storage::qcow2 {
namespace {

constexpr u64 kSector = 512;

std::unique_ptr<MemoryFile> empty_image(const CreateOptions& o) {
  auto file = std::make_unique<MemoryFile>();
  EXPECT_TRUE(Qcow2Image::create(*file, o));
  return file;
}

CreateOptions small(u64 size = u64{1} << 20, u32 bits = 12) {
  CreateOptions o;
  o.size = size;
  o.cluster_bits = bits;
  return o;
}

std::unique_ptr<Qcow2Image> open_rw(std::unique_ptr<MemoryFile> file) {
  auto image = Qcow2Image::open(std::move(file), "test", {true, false});
  EXPECT_TRUE(image) << (image ? "" : image.error().message);
  return image ? std::move(*image) : nullptr;
}

void expect_sound(const std::vector<u8>& bytes, bool leaks_allowed) {
  auto image = Qcow2Image::open(std::make_unique<MemoryFile>(bytes), "test", {false, true});
  ASSERT_TRUE(image) << image.error().message;
  auto report = (*image)->check(Repair::kNone);
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_EQ(report->corruptions, 0u) << (report->messages.empty() ? "" : report->messages[0]);
  if (!leaks_allowed) {
    EXPECT_EQ(report->leaks, 0u) << (report->messages.empty() ? "" : report->messages[0]);
  }
}

/// Random operations against a plain array.
struct Model {
  explicit Model(u64 size, u64 seed, std::vector<u8> start = {}) : random(seed), now(std::move(start)) { now.resize(size); }

  int step(Qcow2Image& image) {
    const u64 sectors = now.size() / kSector;
    const u64 first = random() % sectors;
    const u64 count = std::min<u64>(sectors - first, 1 + random() % (random() % 4 == 0 ? 64 : 6));
    const u64 offset = first * kSector, length = count * kSector;
    switch (random() % 8) {
      case 0: {
        const int r = image.write_zeroes(offset, length, random() % 2 == 0);
        if (r == 0) std::fill_n(now.begin() + static_cast<long>(offset), length, u8{0});
        else unknown(offset, length);
        return r;
      }
      case 1: {
        const int r = image.discard(offset, length);
        if (r < 0) {
          unknown(offset, length);
          return r;
        }
        return image.read(offset, std::span(now).subspan(offset, length));  // either is right
      }
      default: {
        std::vector<u8> data(length);
        for (u64 i = 0; i < length; i++) data[i] = static_cast<u8>(random() | 1);
        const int r = image.write(offset, std::span<const u8>(data));
        if (r == 0) std::copy(data.begin(), data.end(), now.begin() + static_cast<long>(offset));
        else unknown(offset, length);
        return r;
      }
    }
  }
  void unknown(u64 offset, u64 length) {
    for (u64 s = offset / kSector; s < (offset + length) / kSector; s++) lost[s] = true;
  }
  void compare(Qcow2Image& image) {
    std::vector<u8> got(now.size());
    ASSERT_EQ(image.read(0, std::span<u8>(got)), 0);
    for (u64 s = 0; s < now.size() / kSector; s++) {
      if (lost.count(s) != 0) continue;
      ASSERT_EQ(std::memcmp(&got[s * kSector], &now[s * kSector], kSector), 0) << "sector " << s;
    }
  }

  std::mt19937_64 random;
  std::vector<u8> now;
  std::map<u64, bool> lost;  // sectors whose write failed
};

struct Variant {
  const char* name;
  u32 version, bits, order;
  bool extended, backing;
};

class Variants : public ::testing::TestWithParam<Variant> {
 protected:
  std::vector<u8> below() const {
    std::vector<u8> b(GetParam().backing ? size() / 2 : 0);
    for (u64 i = 0; i < b.size(); i++) b[i] = static_cast<u8>(i / kSector * 7 + 1);
    return b;
  }
  u64 size() const { return (u64{1} << 20) + 3 * kSector; }
  std::unique_ptr<Qcow2Image> image() const {
    const Variant& v = GetParam();
    CreateOptions o = small(size(), v.bits);
    o.version = v.version;
    o.refcount_order = v.order;
    o.extended_l2 = v.extended;
    if (v.backing) o.backing_file = "below", o.backing_format = "raw";
    return with_backing(open_rw(empty_image(o)));
  }
  std::unique_ptr<Qcow2Image> with_backing(std::unique_ptr<Qcow2Image> i) const {
    if (i && GetParam().backing) {
      auto b = below();
      const u64 n = b.size();
      i->set_backing(std::make_unique<RawImage>(std::make_unique<MemoryFile>(std::move(b)), n, false));
    }
    return i;
  }
  static std::vector<u8>& bytes(Qcow2Image& i) { return dynamic_cast<MemoryFile&>(i.file()).bytes(); }
};

TEST_P(Variants, BehavesAsAnArray) {
  for (u64 seed = 1; seed <= 4; seed++) {
    auto i = image();
    Model model(size(), seed, below());
    for (int n = 0; n < 600; n++) {
      ASSERT_EQ(model.step(*i), 0);
      if (n % 50 == 49) { ASSERT_EQ(i->flush(), 0); }
      if (n % 200 == 199) {
        model.compare(*i);
        ASSERT_EQ(i->close(), 0);
        expect_sound(bytes(*i), false);
        i = with_backing(open_rw(std::make_unique<MemoryFile>(bytes(*i))));
        model.compare(*i);
      }
    }
  }
}

TEST_P(Variants, EveryNthHostOperationFails) {
  for (const int code : {EIO, ENOSPC}) {
    for (u64 every = 2; every < 60; every += 3) {
      auto i = image();
      auto& file = dynamic_cast<MemoryFile&>(i->file());
      Model model(size(), every, below());
      file.fail_every(every, code);
      u64 failures = 0;
      for (int n = 0; n < 80; n++) {
        failures += model.step(*i) < 0;
        if (n % 10 == 9) failures += i->flush() < 0;
      }
      EXPECT_GT(failures, 0u);
      file.fail_every(0, 0);
      model.compare(*i);
      ASSERT_EQ(i->close(), 0);
      expect_sound(bytes(*i), true);
    }
  }
}

// Power fails: of what was written since the last sync, any sectors arrive, in any order.
TEST_P(Variants, FlushedDataSurvivesLostAndReorderedWrites) {
  for (u64 seed = 1; seed <= 3; seed++) {
    auto i = image();
    auto& file = dynamic_cast<MemoryFile&>(i->file());
    std::vector<u8> disk = file.bytes();
    file.record(true);
    Model model(size(), seed, below());
    std::vector<u8> flushed = model.now;
    std::map<u64, std::vector<std::vector<u8>>> since;  // sector: what it held since the flush
    std::mt19937_64 random(seed + 100);
    std::vector<MemoryFile::Write> pending;  // not synced yet
    for (int n = 0; n < 120; n++) {
      const std::vector<u8> before = model.now;
      ASSERT_EQ(model.step(*i), 0);
      for (u64 s = 0; s < model.now.size() / kSector; s++) {
        if (std::memcmp(&before[s * kSector], &model.now[s * kSector], kSector) != 0) {
          since[s].emplace_back(&model.now[s * kSector], &model.now[s * kSector] + kSector);
        }
      }
      const bool flush = n % 7 == 6;
      if (flush) { ASSERT_EQ(i->flush(), 0); }
      // The crash may come anywhere in this step's writes.
      std::vector<MemoryFile::Write> log = std::move(file.log());
      file.log().clear();
      const auto apply = [](std::vector<u8>& to, const MemoryFile::Write& w, std::mt19937_64* pick) {
        if (w.sync) return;
        if (w.bytes.empty()) {
          to.resize(w.offset);
          return;
        }
        if (to.size() < w.offset + w.bytes.size()) to.resize(w.offset + w.bytes.size());
        for (u64 at = 0; at < w.bytes.size(); at += kSector) {
          if (pick != nullptr && (*pick)() % 2 == 0) continue;
          std::memcpy(&to[w.offset + at], &w.bytes[at], std::min<u64>(kSector, w.bytes.size() - at));
        }
      };
      const auto crash = [&] {
        std::vector<u8> after = disk;
        std::vector<MemoryFile::Write> some = pending;
        std::shuffle(some.begin(), some.end(), random);
        for (const auto& w : some) apply(after, w, &random);
        expect_sound(after, true);
        auto reopened = with_backing(open_rw(std::make_unique<MemoryFile>(after)));
        ASSERT_TRUE(reopened);
        std::vector<u8> got(size());
        ASSERT_EQ(reopened->read(0, std::span<u8>(got)), 0);
        for (u64 s = 0; s < size() / kSector; s++) {
          bool fine = std::memcmp(&got[s * kSector], &flushed[s * kSector], kSector) == 0;
          const auto it = since.find(s);
          // A discard may have let any of the older contents through; what was flushed and untouched may not change.
          if (!fine && it != since.end()) {
            for (const auto& v : it->second) fine = fine || std::memcmp(&got[s * kSector], v.data(), kSector) == 0;
          }
          ASSERT_TRUE(fine) << "sector " << s << " step " << n << " seed " << seed;
        }
      };
      for (const auto& w : log) {
        if (w.sync) {
          crash();
          for (const auto& p : pending) apply(disk, p, nullptr);
          pending.clear();
        } else {
          pending.push_back(w);
        }
      }
      crash();
      if (HasFatalFailure()) return;
      if (flush) {
        flushed = model.now;
        since.clear();
      }
    }
  }
}

TEST_P(Variants, ThreadsOnTheirOwnParts) {
  auto i = image();
  constexpr u64 kPart = u64{256} << 10;
  std::vector<std::thread> threads;
  std::vector<std::vector<u8>> want(4, std::vector<u8>(kPart));
  for (u64 t = 0; t < 4; t++) {
    ASSERT_EQ(i->read(t * kPart, std::span<u8>(want[t])), 0);
  }
  for (u64 t = 0; t < 4; t++) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(t);
      for (int n = 0; n < 200; n++) {
        // Interleaved: sector k of the disk belongs to thread k % 4.
        const u64 s = random() % (kPart / kSector);
        std::vector<u8> data(kSector, static_cast<u8>(random()));
        const u64 disk = (s * 4 + t) * kSector;
        EXPECT_EQ(i->write(disk, std::span<const u8>(data)), 0);
        std::vector<u8> back(kSector);
        EXPECT_EQ(i->read(disk, std::span<u8>(back)), 0);
        EXPECT_EQ(back, data);
        if (n % 40 == 0) { EXPECT_EQ(i->flush(), 0); }
      }
    });
  }
  for (auto& t : threads) t.join();
  ASSERT_EQ(i->close(), 0);
  expect_sound(bytes(*i), false);
}

INSTANTIATE_TEST_SUITE_P(All, Variants,
                         ::testing::Values(Variant{"v3", 3, 12, 4, false, false}, Variant{"tiny", 3, 9, 6, false, false},
                                           Variant{"v2_backing", 2, 12, 4, false, true}, Variant{"v3_backing", 3, 13, 4, false, true},
                                           Variant{"extended", 3, 14, 4, true, true}, Variant{"one_bit", 3, 12, 0, false, false}),
                         [](const auto& p) { return p.param.name; });

TEST(Qcow2, SnapshotsKeepAndGiveBack) {
  for (const bool extended : {false, true}) {
    CreateOptions o = small(u64{1} << 20, 14);
    o.extended_l2 = extended;
    auto i = open_rw(empty_image(o));
    Model model(o.size, 5);
    for (int n = 0; n < 40; n++) ASSERT_EQ(model.step(*i), 0);
    const auto kept = model.now;
    ASSERT_TRUE(i->create_snapshot("one", 1, 2));
    EXPECT_FALSE(i->create_snapshot("one", 1, 2));
    for (int n = 0; n < 40; n++) ASSERT_EQ(model.step(*i), 0);
    model.compare(*i);
    ASSERT_TRUE(i->create_snapshot("two", 1, 2));
    ASSERT_EQ(i->close(), 0);
    auto& file = dynamic_cast<MemoryFile&>(i->file());
    expect_sound(file.bytes(), false);
    ASSERT_TRUE(i->apply_snapshot("one"));
    std::vector<u8> got(o.size);
    ASSERT_EQ(i->read(0, std::span<u8>(got)), 0);
    EXPECT_EQ(got, kept);
    expect_sound(file.bytes(), false);
    ASSERT_TRUE(i->delete_snapshot("one"));
    ASSERT_TRUE(i->delete_snapshot("2"));
    EXPECT_FALSE(i->delete_snapshot("two"));
    expect_sound(file.bytes(), false);
  }
}

// Each kind of damage: refused, or an error where it is met; and a repair leaves nothing corrupt.
TEST(Qcow2, HostileImages) {
  auto good = open_rw(empty_image(small()));
  Model model(good->size(), 9);
  for (int n = 0; n < 100; n++) ASSERT_EQ(model.step(*good), 0);
  ASSERT_TRUE(good->create_snapshot("s", 0, 0));
  for (int n = 0; n < 20; n++) ASSERT_EQ(model.step(*good), 0);
  ASSERT_EQ(good->close(), 0);
  const std::vector<u8> clean = dynamic_cast<MemoryFile&>(good->file()).bytes();
  const Header h = good->header();
  const u64 l2 = get64(&clean[h.l1_offset]) & kOffsetMask;
  const u64 block = get64(&clean[h.refcount_table_offset]);
  const u64 places[] = {4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 76, 96, 100, 104, 112, 116,
                        h.l1_offset, h.l1_offset + 4, h.refcount_table_offset, h.refcount_table_offset + 4,
                        l2, l2 + 4, l2 + 8, l2 + 16, block, block + 2, h.snapshots_offset, h.snapshots_offset + 8,
                        h.snapshots_offset + 12, h.snapshots_offset + 36};
  const u32 values[] = {0, 1, 2, 0x7fffffff, 0x80000000, 0xffffffff, 0x40000000, 0x1000, 0x1001, 0x80001000,
                        static_cast<u32>(h.l1_offset), static_cast<u32>(l2), 0x200000};
  u64 kinds = 0, refused = 0;
  for (const u64 at : places) {
    for (const u32 v : values) {
      std::vector<u8> bytes = clean;
      put32(&bytes[at], v);
      kinds++;
      if (auto image = Qcow2Image::open(std::make_unique<MemoryFile>(bytes), "hostile", {true, false})) {
        Model any(std::min<u64>((*image)->size(), 1 << 20) / kSector * kSector, 3);
        for (int n = 0; n < 20 && any.now.size() >= kSector; n++) (void)any.step(**image);
        (void)(*image)->snapshots();
        (void)(*image)->close();
      } else {
        refused++;
      }
      if (auto image = Qcow2Image::open(std::make_unique<MemoryFile>(bytes), "hostile", {true, true})) {
        auto first = (*image)->check(Repair::kAll);
        if (first && first->corruptions_left() == 0) {
          auto again = (*image)->check(Repair::kAll);
          if (again) {
            EXPECT_EQ(again->corruptions_left(), 0u) << "place " << at << " value " << v;
          }
        }
      }
    }
  }
  EXPECT_GE(kinds, 400u);
  EXPECT_GE(refused, 100u);
}

// The difference to the right one may be more than a signed number holds.
TEST(Qcow2, RefcountsOf64BitsAreMended) {
  for (const u64 wrong : {u64{1} << 63, ~u64{0}, (u64{1} << 63) + 1}) {
    CreateOptions o = small(u64{1} << 20, 9);
    o.refcount_order = 6;
    auto image = open_rw(empty_image(o));
    Model model(image->size(), 5);
    for (int n = 0; n < 20; n++) ASSERT_EQ(model.step(*image), 0);
    ASSERT_EQ(image->close(), 0);
    std::vector<u8> bytes = dynamic_cast<MemoryFile&>(image->file()).bytes();
    const u64 block = get64(&bytes[image->header().refcount_table_offset]), per_block = image->header().cluster_size() / 8;
    put64(&bytes[block], wrong);                        // of a cluster that is in use
    put64(&bytes[block + 8 * (per_block - 1)], wrong);  // of one that is perhaps not
    auto again = Qcow2Image::open(std::make_unique<MemoryFile>(bytes), "wrong", {true, true});
    ASSERT_TRUE(again) << again.error().message;
    auto report = (*again)->check(Repair::kAll);
    ASSERT_TRUE(report) << report.error().message;
    EXPECT_EQ(report->corruptions_left(), 0u);
    model.compare(**again);
    EXPECT_EQ((*again)->close(), 0);
    expect_sound(dynamic_cast<MemoryFile&>((*again)->file()).bytes(), false);
  }
}

TEST(Qcow2, BackingNamesThatAreNoPlainFiles) {
  for (const char* name : {"nbd://host/x", "json:{}", "file:/etc/passwd", "fd:3", "http://x/y", ""}) EXPECT_FALSE(plain_path(name)) << name;
  for (const char* name : {"base.raw", "/a/b", "./a:b", "dir/a:b"}) EXPECT_TRUE(plain_path(name)) << name;
}

TEST(Check, TellsHowFarItIs) {
  auto file = std::make_unique<MemoryFile>(std::vector<u8>());
  CreateOptions create;
  create.size = u64{64} << 30;  // 128 tables
  ASSERT_TRUE(Qcow2Image::create(*file, create));
  auto image = Qcow2Image::open(std::move(file), "image", {true, false});
  ASSERT_TRUE(image) << image.error().message;
  std::vector<u64> told;
  ASSERT_TRUE((*image)->check(Repair::kNone, [&](u64 done) { told.push_back(done); }));
  ASSERT_EQ(told.size(), 128u);
  EXPECT_TRUE(std::is_sorted(told.begin(), told.end()));
  EXPECT_EQ(told[64], create.size / 2);
  EXPECT_LE(told.back(), create.size);
}

TEST(Direct, LeadsToTheImageThatHasTheData) {
  // Three images: raw, and two overlays, the upper larger than what is below.
  const TemporaryDirectory place;
  constexpr u64 kBelow = 1 << 18, kAbove = 1 << 19;
  std::string pattern(kBelow, 0);
  for (u64 i = 0; i < kBelow; i++) pattern[i] = static_cast<char>(i / 512 * 7);
  std::ofstream(place.path() + "/raw", std::ios::binary) << pattern;
  HostFile::Options o;
  auto raw_file = HostFile::open(place.path() + "/raw", o);
  ASSERT_TRUE(raw_file);
  std::unique_ptr<Image> below = std::make_unique<RawImage>(std::move(*raw_file), kBelow, false);
  for (const char* name : {"/middle", "/top"}) {
    std::ofstream(place.path() + name).flush();
    o.writable = true;
    auto file = HostFile::open(place.path() + name, o);
    ASSERT_TRUE(file) << file.error().message;
    CreateOptions create;
    create.size = kAbove;
    create.backing_file = "below";
    create.backing_format = "raw";
    ASSERT_TRUE(Qcow2Image::create(**file, create));
    auto image = Qcow2Image::open(std::move(*file), name, {true, false});
    ASSERT_TRUE(image) << image.error().message;
    (*image)->set_backing(std::move(below));
    below = std::move(*image);
  }
  Image& top = *below;
  const auto directly = [&](u64 offset, std::size_t length) -> std::optional<std::string> {
    std::string bytes(length, 0);
    const iovec v{bytes.data(), bytes.size()};
    const auto direct = top.begin_direct(false, offset, std::span(&v, 1));
    if (direct.fd < 0) return std::nullopt;
    EXPECT_EQ(pread(direct.fd, bytes.data(), length, static_cast<off_t>(direct.host_offset)), static_cast<ssize_t>(length));
    top.end_direct(direct);
    return bytes;
  };
  EXPECT_EQ(directly(4096, 8192), pattern.substr(4096, 8192));  // two images down
  const std::vector<u8> mine(65536, 'm');
  ASSERT_GE(top.write(65536, std::span<const u8>(mine)), 0);
  EXPECT_EQ(directly(65536, 4096), std::string(4096, 'm'));
  EXPECT_EQ(directly(4096, 4096), pattern.substr(4096, 4096));   // its table is there now, the cluster is not
  EXPECT_FALSE(directly(65536 - 512, 1024));                     // half here, half below
  EXPECT_FALSE(directly(kBelow - 512, 1024));                    // beyond the end of what is below
  EXPECT_FALSE(directly(kBelow, 512));
  const iovec v{const_cast<u8*>(mine.data()), 512};
  EXPECT_LT(top.begin_direct(true, 4096, std::span(&v, 1)).fd, 0);  // what is below is never written
  // What flies below does not hold up what is done here: nothing of it moves.
  std::string bytes(512, 0);
  const iovec w{bytes.data(), bytes.size()};
  const auto flying = top.begin_direct(false, 8192, std::span(&w, 1));
  ASSERT_GE(flying.fd, 0);
  EXPECT_GE(top.write(8192, std::span(mine).first(512)), 0);
  EXPECT_GE(top.discard(65536, 65536), 0);
  EXPECT_GE(top.flush(), 0);
  top.end_direct(flying);
  EXPECT_EQ(directly(8192, 512), std::string(512, 'm'));
}

}  // namespace
}  // namespace ring3::storage::qcow2
