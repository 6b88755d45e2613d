#include "engine/decode/decode_cache.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace ring3::engine {
namespace {

bool same(const DecodedInsn& a, const DecodedInsn& b) {
  for (unsigned n = 0; n < 4; n++) {
    const Operand &x = a.operands[n], &y = b.operands[n];
    if (x.kind != y.kind || x.reg != y.reg || x.size != y.size || x.access != y.access) return false;
  }
  return a.op == b.op && a.length == b.length && a.opsize == b.opsize && a.addrsize == b.addrsize && a.feature == b.feature &&
         a.flags == b.flags && a.mem.base == b.mem.base && a.mem.index == b.mem.index && a.mem.scale_log2 == b.mem.scale_log2 &&
         a.mem.seg == b.mem.seg && a.disp == b.disp && a.imm == b.imm && a.opcode == b.opcode &&
         std::equal(std::begin(a.raw), std::end(a.raw), std::begin(b.raw));
}

/// Random instructions, each form many times with other numbers: what decode() says, whether it is remembered or not.
TEST(DecodeCache, IsDecode) {
  std::mt19937_64 rng(4711);
  DecodeCache cache;
  const u8 prefixes[] = {0x66, 0xf2, 0xf3, 0xf0, 0x64, 0x65, 0x2e, 0x67};
  for (int form = 0; form < 60000; form++) {
    u8 head[6];
    unsigned n = 0;
    while (n < 2 && rng() % 4 == 0) head[n++] = prefixes[rng() % sizeof prefixes];
    if (rng() % 2) head[n++] = static_cast<u8>(0x40 + rng() % 16);
    const unsigned map = rng() % 8;
    if (map == 0) head[n++] = static_cast<u8>(0xc4 + rng() % 2);
    if (map >= 1 && map <= 4) head[n++] = 0x0f;
    if (map == 2) head[n++] = rng() % 2 ? 0x38 : 0x3a;
    while (n < sizeof head) head[n++] = static_cast<u8>(rng());
    const bool amd = rng() % 2;
    for (int again = 0; again < 5; again++) {
      u8 bytes[15];
      std::copy(std::begin(head), std::end(head), bytes);
      for (unsigned k = sizeof head; k < 15; k++) bytes[k] = static_cast<u8>(rng());
      if (again >= 2) bytes[5] = static_cast<u8>(rng());
      if (again >= 3) bytes[4] = static_cast<u8>(rng());
      const unsigned size = again == 4 ? static_cast<unsigned>(rng() % 16) : 15;
      DecodedInsn a, b;
      const DecodeResult ra = decode(bytes, size, CodeMode::Bits64, false, amd, &a);
      const DecodeResult rb = cache.decode64(bytes, size, amd, &b);
      ASSERT_EQ(ra, rb);
      if (ra == DecodeResult::Ok) { ASSERT_TRUE(same(a, b)) << testing::PrintToString(std::vector<u8>(bytes, bytes + size)); }
    }
  }
  EXPECT_GT(cache.stats().hits, 30000u);
}

TEST(DecodeCache, ImmediatesThatChooseRegisters) {
  DecodeCache cache;
  for (unsigned imm = 0; imm < 256; imm++) {
    const u8 blend[15] = {0xc4, 0xe3, 0x71, 0x4b, 0xc2, static_cast<u8>(imm)};  // vblendvpd xmm0, xmm1, xmm2, imm8[7:4]
    DecodedInsn a, b;
    ASSERT_EQ(decode(blend, 15, CodeMode::Bits64, false, true, &a), DecodeResult::Ok);
    ASSERT_EQ(cache.decode64(blend, 15, true, &b), DecodeResult::Ok);
    ASSERT_TRUE(same(a, b)) << imm;
  }
}

}  // namespace
}  // namespace ring3::engine
