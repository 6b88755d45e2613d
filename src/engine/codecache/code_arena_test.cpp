#include "engine/codecache/code_arena.hpp"

#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>

namespace ring3::engine {
namespace {

const u8 kReturn42[] = {0xb8, 42, 0, 0, 0, 0xc3};

int call(const u8* code) {
  int (*f)() = nullptr;
  std::memcpy(&f, &code, sizeof f);
  return f();
}

TEST(CodeArena, RunsWhatWasAppended) {
  auto arena = CodeArena::create(4096);
  ASSERT_TRUE(arena.ok()) << arena.error().message;
  const u8* a = (*arena)->append(kReturn42);
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(call(a), 42);
  u8 seven[] = {0xb8, 7, 0, 0, 0, 0xc3};
  const u8* b = (*arena)->append(seven);
  ASSERT_NE(b, nullptr);
  EXPECT_NE(a, b);
  EXPECT_EQ(call(b), 7);
  EXPECT_EQ(call(a), 42);
}

TEST(CodeArena, IsBounded) {
  auto arena = CodeArena::create(4096);
  ASSERT_TRUE(arena.ok());
  int n = 0;
  while ((*arena)->append(kReturn42) != nullptr) n++;
  EXPECT_EQ(n, 4096 / 16);
  (*arena)->clear();
  EXPECT_NE((*arena)->append(kReturn42), nullptr);
}

TEST(CodeArena, NoMappingIsWritableAndExecutable) {
  auto arena = CodeArena::create(1 << 20);
  ASSERT_TRUE(arena.ok());
  std::ifstream maps("/proc/self/maps");
  std::string line;
  int seen = 0;
  while (std::getline(maps, line)) {
    if (line.find("ring3-code") == std::string::npos) continue;
    seen++;
    const std::string perms = line.substr(line.find(' ') + 1, 4);
    EXPECT_FALSE(perms[1] == 'w' && perms[2] == 'x') << line;
  }
  EXPECT_EQ(seen, 2);
}

}  // namespace
}  // namespace ring3::engine
