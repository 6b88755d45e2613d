#include "engine/translate/foresight.hpp"

#include <gtest/gtest.h>

#include <initializer_list>
#include <map>
#include <vector>

#include "engine/decode/decoder.hpp"

namespace ring3::engine {
namespace {

constexpr u64 kRip = 0x5555'5555'4000;  // region 0x15
constexpr u64 kHeap = 0x5555'6000'0000, kLibrary = 0x7fff'f7a0'0000;
constexpr u8 kLow = 0, kMain = 0x15, kTop = 0x1f, kUnknown = Foresight::kUnknown;

struct ForesightTest : testing::Test {
  std::vector<DecodedInsn> insns;
  u64 registers[16] = {};
  std::map<u64, u64> memory;
  BlockRequest request;
  Foresight foresight;

  std::vector<u8> regions(std::initializer_list<std::vector<u8>> code) {
    insns.clear();
    for (const std::vector<u8>& bytes : code) {
      DecodedInsn i;
      EXPECT_EQ(decode(bytes.data(), static_cast<unsigned>(bytes.size()), CodeMode::Bits64, false, false, &i), DecodeResult::Ok);
      EXPECT_EQ(i.length, bytes.size());
      insns.push_back(i);
    }
    request.insns = insns;
    request.rip = kRip;
    request.registers = registers;
    request.fs_base = kLibrary;
    request.peek_context = &memory;
    request.peek = [](void* context, u64 linear, u64* to, unsigned size) {
      const auto& m = *static_cast<std::map<u64, u64>*>(context);
      const auto at = m.find(linear);
      if (at == m.end()) return false;
      *to = size == 8 ? at->second : at->second & ((1ull << 8 * size) - 1);
      return true;
    };
    foresight.look(request, insns.size());
    std::vector<u8> out;
    for (std::size_t n = 0; n < insns.size(); n++) out.push_back(foresight.region(n));
    return out;
  }
};

TEST_F(ForesightTest, LoadsAreFollowed) {
  registers[R13] = kLibrary;
  registers[RAX] = 1;  // not what the second instruction will find
  memory[kLibrary + 8] = kHeap;
  memory[kHeap] = 0x40'1000;
  // mov rax, [r13+8]; mov rcx, [rax]; movzx edx, byte [rcx]
  EXPECT_EQ(regions({{0x49, 0x8b, 0x45, 0x08}, {0x48, 0x8b, 0x08}, {0x0f, 0xb6, 0x11}}), (std::vector<u8>{kTop, kMain, kLow}));
}

TEST_F(ForesightTest, ArithmeticIsDone) {
  registers[RBX] = kHeap;
  registers[RDX] = 3;
  // lea rcx, [rip+0x100]; movzx edx, dl; lea rsi, [rcx+rdx*4]; mov eax, [rsi]; xor ecx, ecx; mov eax, [rcx+0x401000];
  // add rbx, 16; mov al, [rbx]; sub rbx, rbx; mov al, [rbx]
  EXPECT_EQ(regions({{0x48, 0x8d, 0x0d, 0, 1, 0, 0}, {0x0f, 0xb6, 0xd2}, {0x48, 0x8d, 0x34, 0x91}, {0x8b, 0x06}, {0x31, 0xc9},
                     {0x8b, 0x81, 0, 0x10, 0x40, 0}, {0x48, 0x83, 0xc3, 0x10}, {0x8a, 0x03}, {0x48, 0x29, 0xdb}, {0x8a, 0x03}}),
            (std::vector<u8>{kMain, kUnknown, kMain, kMain, kMain, kLow, kLow, kMain, kMain, kLow}));
}

TEST_F(ForesightTest, SegmentsAndTheStack) {
  registers[RSP] = kLibrary + 0x1000;
  memory[kLibrary + 0x1000] = kHeap;
  // mov rax, fs:[0x28]; pop rdx; mov eax, [rdx]
  EXPECT_EQ(regions({{0x64, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0}, {0x5a}, {0x8b, 0x02}}), (std::vector<u8>{kTop, kTop, kMain}));
}

TEST_F(ForesightTest, WhatIsNotKnownLiesNearTheLastData) {
  registers[RBX] = kHeap;
  // mul rcx; mov ecx, [rax]: nothing is known yet. mov ecx, [rbx]; mov ecx, [rdx]
  EXPECT_EQ(regions({{0x48, 0xf7, 0xe1}, {0x8b, 0x08}, {0x8b, 0x0b}, {0x8b, 0x0a}}),
            (std::vector<u8>{kUnknown, kUnknown, kMain, kMain}));
  // The instruction that is not listed takes all registers away: cpuid.
  EXPECT_EQ(regions({{0x0f, 0xa2}, {0x8b, 0x0b}}), (std::vector<u8>{kUnknown, kUnknown}));
  // Addresses of the upper half and beyond the instructions looked at.
  registers[RBX] = ~0ull;
  EXPECT_EQ(regions({{0x8b, 0x0b}}), (std::vector<u8>{kUnknown}));
  EXPECT_EQ(foresight.region(1), kUnknown);
  request.registers = nullptr;
  foresight.look(request, insns.size());
  EXPECT_EQ(foresight.region(0), kUnknown);
}

}  // namespace
}  // namespace ring3::engine
