#include "engine/decode/decoder.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <vector>

namespace ring3::engine {
namespace {

DecodedInsn ok(std::vector<u8> bytes, CodeMode mode = CodeMode::Bits64, bool real = false, bool amd = false) {
  DecodedInsn insn;
  const unsigned size = bytes.size();
  bytes.resize(15, 0x90);
  EXPECT_EQ(decode(bytes.data(), 15, mode, real, amd, &insn), DecodeResult::Ok);
  if (insn.op != Op::Invalid) {
    EXPECT_EQ(insn.length, size);
  }
  return insn;
}

TEST(Decoder, AluForms) {
  auto i = ok({0x48, 0x01, 0xd8});  // add rax, rbx
  EXPECT_EQ(i.op, Op::Add);
  EXPECT_EQ(i.opsize, 8);
  EXPECT_EQ(i.operands[0].kind, OperandKind::Gpr);
  EXPECT_EQ(i.operands[0].reg, 0);
  EXPECT_EQ(i.operands[1].reg, 3);
  i = ok({0x80, 0xe4, 0xfe});  // and ah, 0xfe
  EXPECT_EQ(i.op, Op::And);
  EXPECT_EQ(i.opsize, 1);
  EXPECT_EQ(i.operands[0].kind, OperandKind::GprHigh);
  EXPECT_EQ(i.operands[0].reg, 0);
  i = ok({0x40, 0x80, 0xe4, 0xfe});  // and spl, 0xfe
  EXPECT_EQ(i.operands[0].kind, OperandKind::Gpr);
  EXPECT_EQ(i.operands[0].reg, 4);
  i = ok({0x48, 0x83, 0xc0, 0xff});  // add rax, -1
  EXPECT_EQ(i.imm, -1);
  i = ok({0xf0, 0x48, 0x0f, 0xb1, 0x0c, 0xd3});  // lock cmpxchg [rbx+rdx*8], rcx
  EXPECT_EQ(i.op, Op::Cmpxchg);
  EXPECT_TRUE(i.has(kLock));
  EXPECT_EQ(i.mem.base, 3);
  EXPECT_EQ(i.mem.index, 2);
  EXPECT_EQ(i.mem.scale_log2, 3);
  EXPECT_EQ(ok({0xf0, 0x48, 0x01, 0xd8}).op, Op::Invalid);  // lock with a register destination
}

TEST(Decoder, Memory) {
  auto i = ok({0x8b, 0x05, 0x10, 0, 0, 0});
  EXPECT_EQ(i.mem.base, kRipBase);
  EXPECT_EQ(i.disp, 0x10);
  i = ok({0x65, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0});  // mov rax, gs:[0x28]
  EXPECT_EQ(i.mem.seg, 5);
  EXPECT_EQ(i.mem.base, kNoReg);
  i = ok({0x2e, 0x8b, 0x00});  // CS override ignored in 64-bit mode
  EXPECT_EQ(i.mem.seg, 3);
  i = ok({0x8b, 0x42, 0xfe}, CodeMode::Bits16);  // mov ax, [bp+si-2]
  EXPECT_EQ(i.mem.base, 5);
  EXPECT_EQ(i.mem.index, 6);
  EXPECT_EQ(i.mem.seg, 2);
  EXPECT_EQ(i.addrsize, 2);
  EXPECT_EQ(i.disp, -2);
  i = ok({0x67, 0x8d, 0x04, 0x08});  // lea eax, [eax+ecx]
  EXPECT_EQ(i.op, Op::Lea);
  EXPECT_EQ(i.addrsize, 4);
  i = ok({0x48, 0xa1, 1, 2, 3, 4, 5, 6, 7, 8});  // mov rax, [moffs64]
  EXPECT_EQ(i.op, Op::Mov);
  EXPECT_EQ(static_cast<u64>(i.disp), 0x0807060504030201u);
}

TEST(Decoder, ControlAndSystem) {
  EXPECT_EQ(ok({0x74, 0x10}).op, Op::Jcc);
  EXPECT_EQ(ok({0x74, 0xfe}).imm, -2);
  EXPECT_EQ(ok({0x0f, 0x84, 1, 0, 0, 0}).opcode & 0xf, 4);
  EXPECT_EQ(ok({0xc3}).op, Op::Ret);
  EXPECT_EQ(ok({0xcb}).op, Op::RetFar);
  EXPECT_EQ(ok({0xff, 0x18}).op, Op::CallFar);
  auto i = ok({0x9a, 0x78, 0x56, 0x34, 0x12, 0x08, 0x00}, CodeMode::Bits32);
  EXPECT_EQ(i.op, Op::CallFar);
  EXPECT_EQ(i.operands[0].kind, OperandKind::FarPtr);
  EXPECT_EQ(i.imm, 0x12345678);
  EXPECT_EQ(i.disp, 8);
  EXPECT_EQ(ok({0x0f, 0x22, 0xd8}).op, Op::MovCr);
  EXPECT_EQ(ok({0x44, 0x0f, 0x22, 0xc0}).operands[0].reg, 8);
  EXPECT_EQ(ok({0x8e, 0xd0}).op, Op::MovSeg);
  EXPECT_EQ(ok({0x0f, 0xa1}).op, Op::PopSeg);
  EXPECT_EQ(ok({0x0f, 0x0b}).op, Op::Ud);
  EXPECT_EQ(ok({0x48, 0xcf}).opsize, 8);
  EXPECT_EQ(ok({0xcf}, CodeMode::Bits16, true).opsize, 2);
  EXPECT_EQ(ok({0xc8, 0x10, 0x00, 0x03}).disp, 3);
  EXPECT_EQ(ok({0x0f, 0x07}).opsize, 4);
  EXPECT_EQ(ok({0x48, 0x0f, 0x07}).opsize, 8);
}

TEST(Decoder, Strings) {
  auto i = ok({0xf3, 0x48, 0xa5});
  EXPECT_EQ(i.op, Op::Movs);
  EXPECT_EQ(i.opsize, 8);
  EXPECT_TRUE(i.has(kRep));
  i = ok({0xf2, 0xae});
  EXPECT_EQ(i.op, Op::Scas);
  EXPECT_TRUE(i.has(kRepne));
  i = ok({0xf2, 0xa4});
  EXPECT_TRUE(i.has(kRep));
  i = ok({0x64, 0xac});
  EXPECT_EQ(i.op, Op::Lods);
  EXPECT_EQ(i.mem.seg, 4);
  i = ok({0x66, 0x6d});
  EXPECT_EQ(i.op, Op::Ins);
  EXPECT_EQ(i.opsize, 2);
}

TEST(Decoder, ShiftsCarryTheirCount) {
  auto i = ok({0xd3, 0xe0});  // shl eax, cl
  EXPECT_EQ(i.operands[1].kind, OperandKind::Gpr);
  EXPECT_EQ(i.operands[1].reg, 1);
  i = ok({0xd1, 0xe0});  // shl eax, 1
  EXPECT_EQ(i.operands[1].kind, OperandKind::Imm);
  EXPECT_EQ(i.imm, 1);
  i = ok({0x6b, 0xc3, 0x05});
  EXPECT_EQ(i.op, Op::Imul3);
  EXPECT_EQ(ok({0x0f, 0xaf, 0xc3}).op, Op::Imul2);
  EXPECT_EQ(ok({0xf7, 0xeb}).op, Op::Imul1);
}

TEST(Decoder, HostUnits) {
  auto i = ok({0x0f, 0x28, 0x00});  // movaps xmm0, [rax]
  EXPECT_EQ(i.op, Op::HostVec);
  EXPECT_TRUE(i.has(kAligned));
  EXPECT_EQ(i.operands[1].size, 16);
  EXPECT_EQ(i.feature, Feature::Sse);
  EXPECT_FALSE(ok({0x0f, 0x10, 0x00}).has(kAligned));
  i = ok({0xc5, 0xfc, 0x58, 0xc1});  // vaddps ymm0, ymm0, ymm1
  EXPECT_EQ(i.op, Op::HostVec);
  EXPECT_EQ(i.feature, Feature::Avx);
  EXPECT_EQ(ok({0xc5, 0xf9, 0x6f, 0x00}).has(kAligned), true);  // vmovdqa
  EXPECT_EQ(ok({0xd9, 0xfe}).op, Op::HostX87);
  EXPECT_EQ(ok({0x0f, 0xfc, 0xc1}).op, Op::HostMmx);
  EXPECT_EQ(ok({0xf2, 0x0f, 0x10, 0x00}).op, Op::HostVec);  // movsd xmm, the SSE one
  EXPECT_EQ(ok({0xf2, 0x0f, 0xc2, 0x00, 0x01}).op, Op::HostVec);  // cmpsd
  EXPECT_EQ(ok({0xf3, 0x0f, 0x2d, 0x00}).op, Op::HostVec);        // cvtss2si eax, [rax]: no vector register
  EXPECT_EQ(ok({0xf2, 0x48, 0x0f, 0x2c, 0x00}).op, Op::HostVec);  // cvttsd2si rax, [rax]
  EXPECT_EQ(ok({0xc5, 0xfb, 0x2c, 0x00}).op, Op::HostVec);        // vcvttsd2si eax, [rax]
  EXPECT_TRUE(ok({0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1}).has(kEvex));
  EXPECT_EQ(ok({0xc4, 0xe2, 0x79, 0x2c, 0x00}).op, Op::Vmaskmov);
  EXPECT_EQ(ok({0xc4, 0xe2, 0x69, 0x92, 0x04, 0x08}).op, Op::Vgather);
  EXPECT_EQ(ok({0x9b}).op, Op::Fwait);
  EXPECT_EQ(ok({0x0f, 0xae, 0x00}).op, Op::Fxsave);
  EXPECT_EQ(ok({0x48, 0x0f, 0xae, 0x00}).opsize, 8);
  EXPECT_EQ(ok({0xc4, 0xe2, 0x70, 0xf2, 0xc2}).op, Op::Andn);
}

TEST(Decoder, HintsAreNops) {
  EXPECT_EQ(ok({0xf3, 0x0f, 0x1e, 0xfa}).op, Op::Nop);  // endbr64
  EXPECT_EQ(ok({0x0f, 0x1f, 0x44, 0x00, 0x00}).op, Op::Nop);
  EXPECT_EQ(ok({0xf3, 0x90}).op, Op::Pause);
  EXPECT_EQ(ok({0x90}).op, Op::Nop);
  EXPECT_EQ(ok({0x0f, 0x18, 0x08}).op, Op::Prefetch);
  EXPECT_EQ(ok({0x0f, 0x0d, 0x08}).op, Op::Prefetch);
}

TEST(Decoder, ShortAndLong) {
  DecodedInsn insn;
  const u8 mov[] = {0x48, 0xb8, 1, 2};
  EXPECT_EQ(decode(mov, 4, CodeMode::Bits64, false, false, &insn), DecodeResult::Short);
  EXPECT_EQ(decode(mov, 0, CodeMode::Bits64, false, false, &insn), DecodeResult::Short);
  u8 prefixes[16];
  for (u8& p : prefixes) p = 0x66;
  EXPECT_EQ(decode(prefixes, 15, CodeMode::Bits64, false, false, &insn), DecodeResult::TooLong);
  prefixes[14] = 0x90;
  EXPECT_EQ(decode(prefixes, 15, CodeMode::Bits64, false, false, &insn), DecodeResult::Ok);
  EXPECT_EQ(insn.length, 15);
}

TEST(Decoder, BranchWidthFollowsTheVendor) {
  EXPECT_EQ(ok({0x66, 0xe9, 0, 0, 0, 0}).opsize, 8);
  EXPECT_EQ(ok({0x66, 0xe9, 0, 0}, CodeMode::Bits64, false, true).opsize, 2);
}

TEST(Decoder, RepeatedNopWithRexBFollowsTheVendor) {
  EXPECT_EQ(ok({0xf3, 0x4d, 0x90}).op, Op::Pause);
  EXPECT_EQ(ok({0xf3, 0x66, 0x49, 0x90}).op, Op::Pause);
  const DecodedInsn swap = ok({0xf3, 0x4d, 0x90}, CodeMode::Bits64, false, true);
  EXPECT_EQ(swap.op, Op::Xchg);
  EXPECT_EQ(swap.opsize, 8);
  EXPECT_EQ(swap.operands[0].reg, 8);
  EXPECT_EQ(ok({0x4d, 0x90}).op, Op::Xchg);
}

TEST(Decoder, MovsxdToSixteenBitsReadsWhatTheVendorDoes) {
  EXPECT_EQ(ok({0x66, 0x63, 0x03}).operands[1].size, 2);
  EXPECT_EQ(ok({0x66, 0x63, 0x03}, CodeMode::Bits64, false, true).operands[1].size, 4);
  EXPECT_EQ(ok({0x63, 0x03}).operands[1].size, 4);
  EXPECT_EQ(ok({0x48, 0x63, 0x03}).operands[1].size, 4);
}

TEST(Decoder, RealModeRefusesVex) {
  EXPECT_EQ(ok({0xc5, 0xfc, 0x58, 0xc1}, CodeMode::Bits16, true).op == Op::HostVec, false);
  EXPECT_EQ(ok({0xc5, 0xfc, 0x58, 0xc1}, CodeMode::Bits16, false).op, Op::HostVec);
}

/// Any bytes: no crash, lengths in range, and an instruction decodes the same from just its own bytes.
TEST(Decoder, RandomBytes) {
  std::mt19937_64 rng(12345);
  for (int n = 0; n < 300000; ++n) {
    u8 bytes[15];
    for (u8& b : bytes) b = rng();
    const auto mode = static_cast<CodeMode>(n % 3);
    const bool real = n & 4, amd = n & 8;
    DecodedInsn a, b;
    const auto r = decode(bytes, 15, mode, real, amd, &a);
    if (r != DecodeResult::Ok || a.op == Op::Invalid) continue;
    ASSERT_GE(a.length, 1);
    ASSERT_LE(a.length, 15);
    ASSERT_EQ(decode(bytes, a.length, mode, real, amd, &b), DecodeResult::Ok);
    ASSERT_EQ(std::memcmp(&a.mem, &b.mem, sizeof(a.mem)), 0);
    ASSERT_EQ(a.op, b.op);
    ASSERT_NE(decode(bytes, a.length - 1u, mode, real, amd, &b), DecodeResult::TooLong);
    for (const Operand& o : a.operands) {
      if (o.kind == OperandKind::Gpr || o.kind == OperandKind::Vec) { ASSERT_LT(o.reg, 16); }
      if (o.kind == OperandKind::GprHigh) { ASSERT_LT(o.reg, 4); }
      if (o.kind == OperandKind::Seg) { ASSERT_LT(o.reg, 6); }
    }
    if (a.has(kHasMem)) { ASSERT_LT(a.mem.seg, 6); }
  }
}

}  // namespace
}  // namespace ring3::engine
