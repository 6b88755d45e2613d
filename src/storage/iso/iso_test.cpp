#include "storage/iso/iso.hpp"
#include "base/temporary_directory.hpp"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

namespace ring3::iso {
namespace {

const std::vector<File> kSeed{{"user-data", "#cloud-config\npackages: []\n"}, {"meta-data", "instance-id: i-1\n"}, {"vendor-data", ""},
                              {"grüße", "x"}, {"network-config.yaml", std::string(5000, 'n')}};

std::string output_of(const std::string& command) {
  std::string text;
  std::FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return text;
  std::array<char, 4096> buffer;
  while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) text.append(buffer.data(), got);
  pclose(pipe);
  return text;
}

u32 le32(const std::vector<u8>& b, std::size_t at) { return b[at] | u32{b[at + 1]} << 8 | u32{b[at + 2]} << 16 | u32{b[at + 3]} << 24; }

TEST(Iso, TheDescriptorsAreWhereTheyBelong) {
  auto image = build("cidata", kSeed, 1'000'000'000);
  ASSERT_TRUE(image);
  const auto at = [&](std::size_t sector) { return image->data() + sector * 2048; };
  EXPECT_EQ(std::memcmp(at(16), "\1CD001\1", 7), 0);
  EXPECT_EQ(std::memcmp(at(16) + 40, "cidata          ", 16), 0);
  EXPECT_EQ(std::memcmp(at(17), "\2CD001\1", 7), 0);
  EXPECT_EQ(std::memcmp(at(17) + 88, "%/E", 3), 0);
  EXPECT_EQ(std::memcmp(at(18), "\377CD001\1", 7), 0);
  EXPECT_EQ(std::memcmp(at(16) + 813, "2001090901464000", 16), 0);  // made at
  // Numbers stand in both byte orders.
  EXPECT_EQ(le32(*image, 16 * 2048 + 80), image->size() / 2048);
  EXPECT_EQ(__builtin_bswap32(le32(*image, 16 * 2048 + 84)), image->size() / 2048);
}

TEST(Iso, EveryFileIsFoundThroughTheRootDirectory) {
  auto image = build("cidata", kSeed, 0);
  ASSERT_TRUE(image);
  for (const std::size_t volume : {16u, 17u}) {
    const u32 root = le32(*image, volume * 2048 + 156 + 2);
    const u32 size = le32(*image, volume * 2048 + 156 + 10);
    std::size_t found = 0;
    for (std::size_t at = root * 2048; at < root * 2048 + size;) {
      const u8 length = (*image)[at];
      if (length == 0) break;
      const std::string content(reinterpret_cast<const char*>(image->data()) + le32(*image, at + 2) * 2048, le32(*image, at + 10));
      if (((*image)[at + 25] & 2) == 0) {
        for (const File& file : kSeed) found += file.content == content;
      }
      at += length;
    }
    EXPECT_EQ(found, kSeed.size());
  }
}

TEST(Iso, ManyFilesFillSeveralSectorsOfTheDirectory) {
  std::vector<File> files;
  for (int i = 0; i < 200; i++) files.push_back({"a-long-name-number-" + std::to_string(i) + ".text", std::to_string(i)});
  auto image = build("many", files, 0);
  ASSERT_TRUE(image);
  const u32 root = le32(*image, 16 * 2048 + 158), size = le32(*image, 16 * 2048 + 166);
  EXPECT_GT(size, 8192u);
  int count = 0;
  std::string before;
  for (std::size_t at = root * 2048; at < (root * 2048 + size);) {
    const u8 length = (*image)[at];
    if (length == 0) {
      at = (at / 2048 + 1) * 2048;
      continue;
    }
    EXPECT_EQ(at / 2048, (at + length - 1) / 2048);
    const std::string name(reinterpret_cast<const char*>(image->data()) + at + 33, (*image)[at + 32]);
    if (count >= 2) {
      EXPECT_LT(before, name);  // sorted, and no two alike
      before = name;
    }
    count++;
    at += length;
  }
  EXPECT_EQ(count, 202);
}

TEST(Iso, TheSameInputGivesTheSameBytes) {
  auto one = build("cidata", kSeed, 5), two = build("cidata", kSeed, 5);
  ASSERT_TRUE(one && two);
  EXPECT_EQ(*one, *two);
}

TEST(Iso, WhatCannotBeWrittenIsRefused) {
  EXPECT_FALSE(build("", kSeed, 0));
  EXPECT_FALSE(build("a label that is too long", kSeed, 0));
  for (const std::string& name : {std::string(), std::string("a/b"), std::string("."), std::string(".."), std::string(65, 'x'), std::string("\xff"),
                                  std::string("\xc3"), std::string("a\0b", 3), std::string("\xf0\x9f\x98\x80")}) {
    const std::vector<File> files{{name, "x"}};
    EXPECT_FALSE(build("l", files, 0)) << name;
  }
  EXPECT_FALSE(build("l", std::vector<File>{{"a", "1"}, {"a", "2"}}, 0));
  EXPECT_EQ(build("l", std::vector<File>{{"a", std::string((64 << 20) + 1, 'x')}}, 0).error().code, EFBIG);
}

// Somebody else's reader agrees, where there is one (package genisoimage).
TEST(Iso, IsoinfoReadsIt) {
  if (std::system("command -v isoinfo > /dev/null 2>&1") != 0) GTEST_SKIP() << "isoinfo is not installed";
  auto image = build("cidata", kSeed, 1'000'000'000);
  ASSERT_TRUE(image);
  const TemporaryDirectory directory;
  ASSERT_FALSE(directory.path().empty());
  const std::string path = directory.path() + "/seed.iso";
  {
    std::ofstream file(path, std::ios::binary);
    ASSERT_TRUE(file.write(reinterpret_cast<const char*>(image->data()), static_cast<std::streamsize>(image->size())).flush());
  }
  const std::string about = output_of("isoinfo -d -i " + path);
  EXPECT_NE(about.find("Volume id: cidata"), std::string::npos) << about;
  EXPECT_NE(about.find("Joliet with UCS level 3 found"), std::string::npos) << about;
  EXPECT_NE(about.find("Rock Ridge signatures version 1 found"), std::string::npos) << about;
  EXPECT_EQ(output_of("isoinfo -R -x /user-data -i " + path), kSeed[0].content);
  EXPECT_EQ(output_of("isoinfo -J -x /meta-data -i " + path), kSeed[1].content);
  EXPECT_EQ(output_of("isoinfo -R -x /network-config.yaml -i " + path), kSeed[4].content);
  EXPECT_EQ(output_of("isoinfo -x '/USER_DAT.;1' -i " + path), kSeed[0].content);
}

}  // namespace
}  // namespace ring3::iso
