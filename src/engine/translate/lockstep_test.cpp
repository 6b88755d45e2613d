#include "engine/translate/lockstep.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "engine/interp/test_machine.hpp"
#include "engine/translate/perf_map.hpp"
#include "engine/translate/translator_vcpu.hpp"

namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

/// Translates as the real one does, but for a register operation in which it takes another opcode.
class Wrong final : public BlockTranslator {
 public:
  bool translate(const BlockRequest& request, TranslatedBlock* out) override {
    std::vector<DecodedInsn> insns(request.insns.begin(), request.insns.end());
    for (DecodedInsn& i : insns) {
      if (i.op != Op::Xor) continue;
      i.op = Op::Or;
      for (u8& b : i.raw)
        if (b == 0x31) b = 0x09;
      i.opcode = 0x09;
    }
    BlockRequest changed = request;
    changed.insns = insns;
    return real_->translate(changed, out);
  }

 private:
  std::unique_ptr<BlockTranslator> real_ = create_block_translator();
};

struct Checked {
  explicit Checked(std::unique_ptr<BlockTranslator> translator) : m(TestMode::Long64) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    options.lockstep_every = 1;
    options.lockstep_sink = [this](const std::string& text) { reports.push_back(text); };
    auto made = TranslatorVcpu::create(m.s, m.mmu(), m.interpreter(), std::move(translator), options);
    CHECK(made.ok());
    vcpu = std::move(*made);
    m.runner = [this](u64 budget) { return vcpu->run(budget); };
  }
  TestMachine m;
  std::unique_ptr<TranslatorVcpu> vcpu;
  std::vector<std::string> reports;
};

// mov [0x50000], rax; add rax, 5; xor rbx, rax; push rbx; pop rcx; inc dword [0x50008]
const char* const kCode = "48 89 04 25 00 00 05 00  48 83 c0 05  48 31 c3  53  59  ff 04 25 08 00 05 00";

TEST(Lockstep, WhatIsRightIsNotReported) {
  Checked c(create_block_translator());
  c.m.s.gpr[RAX] = 7;
  c.m.s.gpr[RBX] = 3;
  EXPECT_TRUE(c.m.run(hex(kCode)).halted());
  EXPECT_TRUE(c.reports.empty()) << c.reports[0];
  EXPECT_GT(c.vcpu->lockstep()->stats().compared, 0u);
  EXPECT_EQ(c.m.s.gpr[RCX], 12u ^ 3u);
  EXPECT_EQ(c.m.load<u64>(0x50000), 7u);
  EXPECT_EQ(c.m.load<u32>(0x50008), 1u);  // once, though it ran twice
}

// A block that is left in its middle, and one that goes on behind a branch that is not taken.
TEST(Lockstep, BranchesInsideABlock) {
  Checked c(create_block_translator());
  c.m.s.gpr[RAX] = 1;
  // test eax, eax; jz +2; inc ebx; inc ebx; cmp eax, 1; je +4; inc ebx; inc ebx; lea ecx, [rbx+rbx]
  EXPECT_TRUE(c.m.run(hex("85 c0  74 04  ff c3 ff c3  83 f8 01  74 04  ff c3 ff c3  8d 0c 1b")).halted());
  EXPECT_TRUE(c.reports.empty()) << c.reports[0];
  EXPECT_EQ(c.m.s.gpr[RCX], 4u);
}

// A block that has walked page tables runs translated once more: with the rights it began with, not those that CLAC left.
TEST(Lockstep, ABlockThatChangesRights) {
  Checked c(create_block_translator());
  c.m.s.cr4 |= cr4::SMAP;
  c.m.interpreter().context().mode_changed();
  // stac; lock inc dword [0x50008]; add dword [0x50008], 2; clac
  EXPECT_TRUE(c.m.run(hex("0f 01 cb  f0 ff 04 25 08 00 05 00  83 04 25 08 00 05 00 02  0f 01 ca")).halted());
  EXPECT_TRUE(c.reports.empty()) << c.reports[0];
  EXPECT_EQ(c.m.load<u32>(0x50008), 3u);
}

TEST(Lockstep, NamesTheFirstInstructionThatDiffers) {
  Checked c(std::make_unique<Wrong>());
  c.m.s.gpr[RAX] = 7;
  c.m.s.gpr[RBX] = 8;
  EXPECT_TRUE(c.m.run(hex(kCode)).halted());
  ASSERT_EQ(c.reports.size(), 1u);
  const std::string& r = c.reports[0];
  EXPECT_NE(r.find("first difference after\n  000000000004000c  48 31 c3  xor rbx, rax"), std::string::npos) << r;
  EXPECT_NE(r.find("rbx: interpreted 4, translated c"), std::string::npos) << r;
  // The guest has what the interpreter made.
  EXPECT_EQ(c.m.s.gpr[RBX], 4u);
  EXPECT_EQ(c.m.s.gpr[RCX], 4u);
  EXPECT_EQ(c.m.load<u32>(0x50008), 1u);
}

TEST(PerfMap, ALineForEachBlock) {
  std::string path;
  {
    auto map = PerfMap::create("/tmp");
    ASSERT_TRUE(map.ok());
    path = (*map)->path();
    (*map)->add(reinterpret_cast<const void*>(0x1000), 0x20, 0xffffffff81000000, false);
    (*map)->add(reinterpret_cast<const void*>(0x1020), 0x8, 0x401000, true);
  }
  std::FILE* f = std::fopen(path.c_str(), "r");
  ASSERT_NE(f, nullptr);
  char text[200] = {};
  const std::size_t n = std::fread(text, 1, sizeof text - 1, f);
  std::fclose(f);
  std::remove(path.c_str());
  EXPECT_EQ(std::string(text, n), "1000 20 guest_ffffffff81000000\n1020 8 guest_user_401000\n");
}

}  // namespace
}  // namespace ring3::engine
