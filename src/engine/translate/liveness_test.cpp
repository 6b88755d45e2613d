#include "engine/translate/liveness.hpp"

#include <gtest/gtest.h>

#include <initializer_list>

#include "engine/decode/decoder.hpp"
#include "engine/translate/block_translator.hpp"

namespace ring3::engine {
namespace {

using namespace rflags;

DecodedInsn insn(std::initializer_list<u8> bytes) {
  u8 b[15] = {};
  unsigned n = 0;
  for (u8 x : bytes) b[n++] = x;
  DecodedInsn i;
  EXPECT_EQ(decode(b, 15, CodeMode::Bits64, false, true, &i), DecodeResult::Ok);
  EXPECT_EQ(i.length, n);
  return i;
}
FlagUse use(std::initializer_list<u8> bytes) { return flag_use(insn(bytes)); }

TEST(Liveness, ArithmeticWritesAll) {
  EXPECT_EQ(use({0x01, 0xd8}).writes, STATUS);  // add eax, ebx
  EXPECT_EQ(use({0x01, 0xd8}).reads, 0u);
  EXPECT_EQ(use({0x11, 0xd8}).reads, CF);             // adc
  EXPECT_EQ(use({0xff, 0xc8}).writes, STATUS & ~CF);  // dec eax keeps CF
  EXPECT_FALSE(use({0xf7, 0xd0}).touches);            // not eax
  EXPECT_FALSE(use({0x8b, 0x03}).touches);            // mov eax, [rbx]
}

TEST(Liveness, ShiftsMayLeaveFlagsAlone) {
  EXPECT_EQ(use({0xd3, 0xe0}).writes, 0u);  // shl eax, cl
  EXPECT_TRUE(use({0xd3, 0xe0}).touches);
  EXPECT_EQ(use({0xc1, 0xe0, 0x00}).writes, 0u);       // shl eax, 0
  EXPECT_EQ(use({0xc1, 0xe0, 0x20}).writes, 0u);       // a count masked to 0
  EXPECT_EQ(use({0xc1, 0xe0, 0x03}).writes & CF, CF);  // shl eax, 3
  EXPECT_EQ(use({0xd1, 0xe0}).writes & OF, OF);        // by one: OF is defined
  EXPECT_EQ(use({0xd1, 0xd0}).reads, CF);              // rcl eax, 1
}

TEST(Liveness, Conditions) {
  EXPECT_EQ(use({0x74, 0x00}).reads, ZF);                  // je
  EXPECT_EQ(use({0x0f, 0x47, 0xc3}).reads, CF | ZF);       // cmova eax, ebx
  EXPECT_EQ(use({0x0f, 0x9f, 0xc0}).reads, SF | OF | ZF);  // setg al
  EXPECT_EQ(use({0x9c}).reads, STATUS);                    // pushfq
}

TEST(Liveness, VectorComparisons) {
  EXPECT_EQ(use({0x66, 0x0f, 0x2e, 0xc1}).writes, STATUS);        // ucomisd
  EXPECT_EQ(use({0x66, 0x0f, 0x38, 0x17, 0xc1}).writes, STATUS);  // ptest
  EXPECT_EQ(use({0xc4, 0xe2, 0x79, 0x17, 0xc1}).writes, STATUS);  // vptest
  EXPECT_FALSE(use({0x66, 0x0f, 0xef, 0xc1}).touches);            // pxor
}

TEST(Translation, FlagsReadBeforeWritten) {
  const DecodedInsn insns[] = {insn({0x8b, 0x03}), insn({0x11, 0xd8}), insn({0xc3})};  // mov; adc; ret
  const bool features[] = {true, true, true};
  BlockRequest request;
  request.insns = insns;
  request.has_feature = features;
  request.rip = 0x401000;
  TranslatedBlock out;
  ASSERT_TRUE(create_block_translator()->translate(request, &out));
  EXPECT_EQ(out.insns, 3u);
  EXPECT_EQ(out.bytes, 5u);
  EXPECT_EQ(out.flags_in, CF);
  for (const DirectExit& e : out.exits) EXPECT_TRUE(e.ungrouped);  // a return goes through the jump table
}

TEST(Translation, EndsBeforeWhatItLeavesOut) {
  const DecodedInsn insns[] = {insn({0x01, 0xd8}), insn({0x0f, 0xa2})};  // add; cpuid
  const bool features[] = {true, true};
  BlockRequest request;
  request.insns = insns;
  request.has_feature = features;
  request.rip = 0x401000;
  TranslatedBlock out;
  const auto translator = create_block_translator();
  ASSERT_TRUE(translator->translate(request, &out));
  EXPECT_EQ(out.insns, 1u);
  EXPECT_EQ(out.bytes, 2u);
  request.insns = std::span<const DecodedInsn>(insns).subspan(1);
  request.has_feature = std::span<const bool>(features).subspan(1);
  EXPECT_FALSE(translator->translate(request, &out));
}

TEST(Translation, DirectExitsToOtherPagesCompareTheBias) {
  const bool features[] = {true};
  TranslatedBlock out;
  const auto translator = create_block_translator();
  BlockRequest request;
  request.has_feature = features;
  request.first_tag = 7;
  const DecodedInsn near_jump[] = {insn({0x75, 0x10})};  // jne +16
  request.insns = near_jump;
  request.rip = 0x401000;
  ASSERT_TRUE(translator->translate(request, &out));
  ASSERT_EQ(out.exits.size(), 2u);
  EXPECT_EQ(out.exits[0].target, 0x401012u);
  EXPECT_EQ(out.exits[1].target, 0x401002u);
  for (const DirectExit& e : out.exits) {
    ASSERT_LT(e.field + 4, out.code.size());
    EXPECT_TRUE(out.code[e.field - 1] == 0xe9 || (out.code[e.field - 2] == 0x0f && (out.code[e.field - 1] & 0xf0) == 0x80));
    EXPECT_LT(e.stub, out.code.size());
  }
  EXPECT_EQ(out.exits[0].bias, DirectExit::kSamePage);
  EXPECT_EQ(out.exits[1].bias, DirectExit::kSamePage);
  request.rip = 0x401ff0;  // the target is in the next page: that exit compares the bias
  ASSERT_TRUE(translator->translate(request, &out));
  ASSERT_EQ(out.exits.size(), 2u);
  EXPECT_EQ(out.exits[0].target, 0x401ff2u);
  EXPECT_EQ(out.exits[0].bias, DirectExit::kSamePage);
  EXPECT_EQ(out.exits[1].target, 0x402002u);
  ASSERT_LT(out.exits[1].bias + 4, out.code.size());
}

}  // namespace
}  // namespace ring3::engine
