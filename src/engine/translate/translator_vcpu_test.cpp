#include "engine/translate/translator_vcpu.hpp"

#include <gtest/gtest.h>

#include <thread>

#include "engine/interp/test_machine.hpp"

/// The run loop with a translator of a few instructions: whatever it leaves out is interpreted.
namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

void put(std::vector<u8>* code, u64 v, unsigned bytes) {
  for (unsigned i = 0; i < bytes; i++) code->push_back(static_cast<u8>(v >> (8 * i)));
}

/// NOP, register ADD/SUB/INC/DEC of rax..rbx (copied), JMP, Jcc and near indirect jumps through rax.
class TinyTranslator final : public BlockTranslator {
 public:
  explicit TinyTranslator(unsigned* made) : made_(made) {}
  bool translate(const BlockRequest& request, TranslatedBlock* out) override {
    if (request.edge != 0) return false;
    ++*made_;
    out_ = out;
    request_ = &request;
    rip_ = request.rip;
    for (const DecodedInsn& insn : request.insns) {
      const u64 next = rip_ + insn.length;
      if (insn.op == Op::Jmp || insn.op == Op::Jcc) {
        if (insn.operands[0].kind != OperandKind::Rel) break;
        const u64 target = next + static_cast<u64>(insn.imm);
        std::size_t patch = 0;
        if (insn.op == Op::Jcc) {
          out->code.insert(out->code.end(), {0x0f, static_cast<u8>(0x80 | (insn.opcode & 15))});
          patch = out->code.size();
          put(&out->code, 0, 4);
          leave(next);
          const u32 rel = static_cast<u32>(out->code.size() - patch - 4);
          std::memcpy(out->code.data() + patch, &rel, 4);
        }
        leave(target);
        count(insn);
        entries();
        return true;
      }
      const bool plain = (insn.op == Op::Add || insn.op == Op::Sub || insn.op == Op::Inc || insn.op == Op::Dec) &&
                         !insn.has(kHasMem) && insn.operands[0].kind == OperandKind::Gpr &&
                         insn.operands[0].reg < 4 && insn.operands[1].kind != OperandKind::GprHigh;
      const bool div = insn.op == Op::Div && !insn.has(kHasMem) && insn.operands[0].reg < 4;
      if (insn.op != Op::Nop && !plain && !div) break;
      if (div) out->faults.push_back({static_cast<u32>(out->code.size()), rip_});
      out->code.insert(out->code.end(), insn.raw, insn.raw + insn.length);
      count(insn);
    }
    if (out->insns == 0) return false;
    leave(rip_);
    entries();
    return true;
  }

 private:
  void count(const DecodedInsn& insn) {
    rip_ += insn.length;
    out_->insns++;
    out_->bytes += insn.length;
  }
  void jump_slot(u32 offset) {
    out_->code.insert(out_->code.end(), {0x41, 0xff, 0xa1});
    put(&out_->code, offset - RING3_FRAME_CENTRE, 4);
  }
  /// The entry with the flags in the frame, before all of it, and dead_stub.
  void entries() {
    std::vector<u8>& code = out_->code;
    std::vector<u8> prologue = {0x49, 0x89, 0xc6, 0x41, 0x8b, 0x81};  // mov r14, rax; mov eax, [flags]
    put(&prologue, frame::kFlags - RING3_FRAME_CENTRE, 4);
    prologue.insert(prologue.end(), {0x04, 0x7f, 0x9e, 0x4c, 0x89, 0xf0});  // add al, 7fh; sahf; mov rax, r14
    const u32 size = static_cast<u32>(prologue.size());
    code.insert(code.begin(), prologue.begin(), prologue.end());
    out_->entry = size;
    for (DirectExit& e : out_->exits) {
      e.field += size;
      e.slot += size;
      e.stub += size;
    }
    for (HostFaultPoint& f : out_->faults) f.offset += size;
    out_->cold = static_cast<u32>(code.size());
    out_->dead_stub = static_cast<u32>(code.size());
    code.insert(code.end(), {0x49, 0xbe});
    put(&code, request_->rip, 8);
    jump_slot(frame::kExitDeadFrame);
  }
  /// An exit to target, polling attention first.
  void leave(u64 target) {
    std::vector<u8>& code = out_->code;
    if ((target ^ request_->rip) >> kPageShift != 0) {
      // mov r14, rax; lahf; seto al; mov [flags], eax; mov rax, r14
      code.insert(code.end(), {0x49, 0x89, 0xc6, 0x9f, 0x0f, 0x90, 0xc0, 0x41, 0x89, 0x81});
      put(&code, frame::kFlags - RING3_FRAME_CENTRE, 4);
      code.insert(code.end(), {0x4c, 0x89, 0xf0, 0x49, 0xbe});
      put(&code, target, 8);
      code.insert(code.end(), {0x41, 0xbf});
      put(&code, frame::kNoTag, 4);
      jump_slot(frame::kExitCrossFrame);
      return;
    }
    // mov r15, rcx; mov ecx, [attention]; jrcxz ok
    code.insert(code.end(), {0x49, 0x89, 0xcf, 0x41, 0x8b, 0x89});
    put(&code, frame::kAttention - RING3_FRAME_CENTRE, 4);
    code.insert(code.end(), {0xe3, 20, 0x4c, 0x89, 0xf9, 0x49, 0xbe});
    put(&code, target, 8);
    jump_slot(frame::kExitAttention);
    code.insert(code.end(), {0x4c, 0x89, 0xf9});  // ok: mov rcx, r15
    DirectExit e;
    e.target = target;
    e.field = static_cast<u32>(code.size()) + 1;
    e.stub = e.field + 4;
    code.push_back(0xe9);
    put(&code, 0, 4);
    code.insert(code.end(), {0x49, 0xbe});
    put(&code, target, 8);
    code.insert(code.end(), {0x41, 0xbf});
    put(&code, request_->first_tag + out_->exits.size(), 4);
    jump_slot(frame::kExitNext);
    e.slot = static_cast<u32>(code.size()) - 4;
    out_->exits.push_back(e);
  }

  unsigned* made_;
  TranslatedBlock* out_ = nullptr;
  const BlockRequest* request_ = nullptr;
  u64 rip_ = 0;
};

struct Machine : TestMachine {
  explicit Machine(std::size_t arena = 1u << 20) : Machine(arena, nullptr) {}
  /// By this translator; null: a tiny one.
  Machine(std::size_t arena, std::unique_ptr<BlockTranslator> translator) : TestMachine(TestMode::Long64) {
    TranslatorVcpu::Options options;
    options.arena_bytes = arena;
    if (translator == nullptr) translator = std::make_unique<TinyTranslator>(&made);
    auto v = TranslatorVcpu::create(s, mmu(), interpreter(), std::move(translator), options);
    CHECK(v.ok());
    vcpu = std::move(*v);
    runner = [this](u64 budget) { return vcpu->run(budget); };
  }
  ~Machine() { vcpu.reset(); }
  unsigned made = 0;
  std::unique_ptr<TranslatorVcpu> vcpu;
};

TEST(TranslatorVcpu, RunsAndKeepsAllRegisters) {
  Machine m;
  u64 before[16];
  for (unsigned i = 0; i < 16; i++)
    if (i != RSP) m.s.gpr[i] = 0x1111111111111111ull * i + 5;
  m.s.rflags |= rflags::OF | rflags::AF | rflags::CF;
  std::memcpy(before, m.s.gpr, sizeof before);
  for (unsigned i = 0; i < 16; i++) {
    std::memset(m.s.xsave.xmm(i), static_cast<int>(0x10 + i), 16);
    std::memset(m.s.xsave.ymm_high(i), static_cast<int>(0x50 + i), 16);
  }
  const auto xsave = m.s.xsave;
  const u64 flags = m.s.rflags;
  EXPECT_TRUE(m.run(hex("90 90 90")).halted());
  EXPECT_EQ(std::memcmp(before, m.s.gpr, sizeof before), 0);
  EXPECT_EQ(std::memcmp(xsave.bytes, m.s.xsave.bytes, 1024), 0);
  EXPECT_EQ(m.s.rflags, flags);
  EXPECT_GE(m.vcpu->stats().entries, 1u);
}

TEST(TranslatorVcpu, FlagsAndInterpretedInstructionsMix) {
  Machine m;
  m.s.gpr[RAX] = ~0ull;
  m.s.gpr[RBX] = 1;
  // add rax, rbx; adc rcx, 0 (interpreted); inc rdx; seto bl (interpreted)
  m.s.gpr[RCX] = 5;
  m.s.gpr[RDX] = 0x7fffffffffffffff;
  EXPECT_TRUE(m.run(hex("48 01 d8 48 83 d1 00 48 ff c2 0f 90 c3")).halted());
  EXPECT_EQ(m.s.gpr[RAX], 0u);
  EXPECT_EQ(m.s.gpr[RCX], 6u);
  EXPECT_EQ(m.s.gpr[RBX] & 0xff, 1u);
}

TEST(TranslatorVcpu, LoopsAreLinked) {
  Machine m;
  m.s.gpr[RCX] = 100000;
  m.s.gpr[RAX] = 0;
  // l: add rax, rcx; dec rcx; jnz l
  EXPECT_TRUE(m.run(hex("48 01 c8 48 ff c9 75 f8")).halted());
  EXPECT_EQ(m.s.gpr[RAX], 100000ull * 100001 / 2);
  EXPECT_LT(m.vcpu->stats().entries, 10u);
  EXPECT_GE(m.vcpu->cache().stats().linked, 1u);
}

TEST(TranslatorVcpu, OtherPagesGoThroughTheJumpTable) {
  Machine m;
  m.s.gpr[RCX] = 1000;
  // Page 1: dec rcx; jmp page 2. Page 2: nop; jnz page 1; hlt
  m.load_code(hex("48 ff c9 e9 f8 0f 00 00"), TestMachine::kCode);
  m.load_code(hex("90 0f 85 f9 ef ff ff f4"), TestMachine::kCode + 0x1000);
  m.s.rip = TestMachine::kCode;
  EXPECT_TRUE(m.resume().halted());
  EXPECT_EQ(m.s.gpr[RCX], 0u);
  EXPECT_LT(m.vcpu->stats().entries, 20u + 2000 / RING3_CROSS_EXITS);  // two exits a turn, of which one in so many is offered to be linked
}

/// Two targets that take turns at one place of the jump table both stay; of three it is only correct.
TEST(TranslatorVcpu, TargetsWithOneIndexBothStayInTheJumpTable) {
  constexpr u64 kApart = u64{kJumpEntries} << 2, kFirst = TestMachine::kCode + 0x100;
  static_assert(jump_index(kFirst) == jump_index(kFirst + kApart) && kApart == 0x40000);
  for (const unsigned targets : {2u, 3u}) {
    Machine m;
    m.s.gpr[RCX] = 1000;
    m.load_code(hex("48 ff c9 e9 f8 ff 03 00"), kFirst);  // dec rcx; jmp the second
    if (targets == 2) {
      m.load_code(hex("90 0f 85 f9 ff fb ff f4"), kFirst + kApart);  // nop; jnz the first; hlt
    } else {
      m.load_code(hex("90 e9 fa ff 03 00"), kFirst + kApart);            // nop; jmp the third
      m.load_code(hex("90 0f 85 f9 ff f7 ff f4"), kFirst + 2 * kApart);  // nop; jnz the first; hlt
    }
    m.s.rip = kFirst;
    EXPECT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    if (targets == 2) {
      EXPECT_LT(m.vcpu->stats().entries, 20u + 2000 / RING3_CROSS_EXITS);
    }
  }
  // The same by the exits of translated indirect jumps.
  Machine m(1u << 20, create_block_translator());
  m.s.gpr[RCX] = 1000;
  m.s.gpr[RAX] = kFirst + kApart;
  m.s.gpr[RDX] = kFirst + 2 * kApart;
  m.s.gpr[RBX] = kFirst + 0x10;
  // l: dec rcx; jz end; xchg rax, rdx; jmp rax; end: hlt. Both: jmp rbx, to l
  m.load_code(hex("48 ff c9 74 04 48 92 ff e0 f4"), kFirst + 0x10);
  m.load_code(hex("ff e3"), kFirst + kApart);
  m.load_code(hex("ff e3"), kFirst + 2 * kApart);
  m.s.rip = kFirst + 0x10;
  EXPECT_TRUE(m.resume().halted());
  EXPECT_EQ(m.s.gpr[RCX], 0u);
  EXPECT_LT(m.vcpu->stats().entries, 20u);
}

/// Entry 0 of the jump table stays empty; targets whose place it would be, or its neighbour, have that one.
TEST(TranslatorVcpu, TargetsAtTheTablesBeginningGoThroughIt) {
  for (const u64 offset : {0u, 4u}) {
    Machine m(1u << 20, create_block_translator());
    constexpr u64 kHere = TestMachine::kCode + 0x100;
    const u64 there = ((kHere + 0x40000) & ~u64{0x3ffff}) + offset;
    ASSERT_EQ(jump_index(there), offset / 4);
    m.s.gpr[RCX] = 1000;
    m.s.gpr[RAX] = there;
    m.s.gpr[RBX] = kHere;
    m.load_code(hex("48 ff c9 74 02 ff e0 f4"), kHere);  // dec rcx; jz end; jmp rax; end: hlt
    m.load_code(hex("ff e3"), there);
    m.s.rip = kHere;
    EXPECT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RCX], 0u);
    EXPECT_LT(m.vcpu->stats().entries, 20u);
    EXPECT_EQ(m.vcpu->cache().jumps().entries[0].rip, ~0ull);
  }
}

/// Indirect jumps alone make this loop: they see what is raised while translated code runs.
TEST(TranslatorVcpu, AttentionEndsALoopOfIndirectJumps) {
  Machine m(1u << 20, create_block_translator());
  m.s.gpr[RAX] = TestMachine::kCode + 0x100;
  m.s.gpr[RBX] = TestMachine::kCode + 0x200;
  m.load_code(hex("ff e3"), TestMachine::kCode + 0x100);
  m.load_code(hex("ff e0"), TestMachine::kCode + 0x200);
  m.s.rip = TestMachine::kCode + 0x100;
  for (unsigned n = 0; n < 50; n++) {
    AttentionWord& attention = m.c().attention();
    std::thread other([&] {
      // What a raise() does late whose bits were taken before: the loop is left for nothing, and goes on.
      for (unsigned late = 0; late < n; late++) {
        attention.jump_mask = 0;
        while (attention.jump_mask == 0) std::this_thread::yield();
      }
      attention.raise(2);
    });
    EXPECT_EQ(m.resume(~0ull).result, Interpreter::Result::Attention);
    other.join();
    EXPECT_EQ(attention.take(), 2u);
    EXPECT_TRUE(m.s.rip == m.s.gpr[RAX] || m.s.rip == m.s.gpr[RBX]);
  }
  EXPECT_LT(m.vcpu->stats().entries, 3000u);
}

TEST(TranslatorVcpu, AttentionEndsALoop) {
  Machine m;
  m.load_code(hex("48 ff c0 eb fb"));
  m.s.rip = TestMachine::kCode;
  m.c().attention().raise(1);
  EXPECT_EQ(m.resume().result, Interpreter::Result::Attention);
  m.c().attention().take();
  // The loop itself sees it too: raised while translated code runs.
  std::atomic<bool> done{false};
  std::thread other([&] {
    while (!done) m.c().attention().raise(1);
  });
  EXPECT_EQ(m.resume(~0ull).result, Interpreter::Result::Attention);
  done = true;
  other.join();
  m.c().attention().take();
  EXPECT_TRUE(m.s.rip == TestMachine::kCode || m.s.rip == TestMachine::kCode + 3);
}

TEST(TranslatorVcpu, DivideErrorIsTheGuests) {
  Machine m;
  m.s.gpr[RAX] = 7;
  m.s.gpr[RDX] = 0;
  m.s.gpr[RCX] = 0;
  m.s.gpr[R13] = 0x1313;
  m.s.gpr[R14] = 0x1414;
  m.s.gpr[R15] = 0x1515;
  const auto out = m.run(hex("90 48 f7 f1"));
  EXPECT_TRUE(out.raised(vec::DE));
  EXPECT_EQ(m.s.rip, TestMachine::kCode + 1);
  EXPECT_EQ(m.s.gpr[RAX], 7u);
  EXPECT_EQ(m.s.gpr[R13], 0x1313u);
  EXPECT_EQ(m.s.gpr[R14], 0x1414u);
  EXPECT_EQ(m.s.gpr[R15], 0x1515u);
  EXPECT_EQ(m.vcpu->stats().faults, 1u);
}

TEST(TranslatorVcpu, SelfModifyingCode) {
  Machine m;
  // mov byte [rip+1], 0x00 makes "add eax, 1"'s... : the immediate of the next ADD is replaced (interpreted store).
  m.s.gpr[RAX] = 0;
  m.s.gpr[RCX] = 3;
  // l: add rax, 1; inc byte [rip - 7 -> imm]; dec rcx; jnz l
  EXPECT_TRUE(m.run(hex("48 83 c0 01 fe 05 f9 ff ff ff 48 ff c9 75 f1")).halted());
  EXPECT_EQ(m.s.gpr[RAX], 1u + 2 + 3);
  EXPECT_GE(m.vcpu->cache().stats().killed, 1u);
}

/// Stores beside code that ran go through the interpreter; a page that gets many is given up until code runs there again,
/// which is as it is then.
TEST(TranslatorVcpu, APageThatIsWrittenAgainAndAgainIsGivenUp) {
  Machine m(1u << 20, create_block_translator());
  constexpr u64 kOther = TestMachine::kCode + kPageSize;
  const u64 stack = m.s.gpr[RSP];
  m.load_code(hex("48 83 c0 01 c3"), kOther);  // add rax, 1; ret
  // call rdx; l: mov [rbx + rcx], cl; dec rcx; jnz l; mov [rdx + 3], sil; call rdx; hlt
  m.load_code(hex("ff d2 88 0c 0b 48 ff c9 75 f8 40 88 72 03 ff d2 f4"));
  u64 left = 0;
  for (u64 round = 0; round < 50; round++) {
    m.s.gpr[RAX] = 0;
    m.s.gpr[RBX] = kOther + 0x100;
    m.s.gpr[RCX] = 200;
    m.s.gpr[RDX] = kOther;
    m.s.gpr[RSI] = round + 2;
    m.s.gpr[RSP] = stack;
    m.s.rip = TestMachine::kCode;
    const u64 before = m.vcpu->stats().interpreted;
    ASSERT_TRUE(m.resume(~0ull).halted());
    EXPECT_EQ(m.s.gpr[RAX], (round == 0 ? 1 : round + 1) + round + 2);
    left = m.vcpu->stats().interpreted - before;
  }
  EXPECT_LT(left, 40u);
  for (u64 n = 1; n <= 200; n++) EXPECT_EQ(m.load<u8>(kOther + 0x100 + n), static_cast<u8>(n));
}

TEST(TranslatorVcpu, WritesUnseenByTheEngineAreFoundAtTheNextFetch) {
  Machine m;
  m.s.gpr[RAX] = 0;
  EXPECT_TRUE(m.run(hex("48 83 c0 01")).halted());
  m.store<u8>(TestMachine::kCode + 3, 5);
  m.mmu().expire_fetches();
  m.s.rip = TestMachine::kCode;
  EXPECT_TRUE(m.resume().halted());
  EXPECT_EQ(m.s.gpr[RAX], 6u);
}

TEST(TranslatorVcpu, AFullArenaIsEmptied) {
  Machine m(1);  // the least: 1 MiB
  std::vector<u8> code;
  for (int i = 0; i < 3000; i++) {
    const u8 step[] = {0x48, 0x83, 0xc0, 0x01, 0xeb, 0x00};  // add rax, 1; jmp next
    code.insert(code.end(), step, step + sizeof step);
  }
  m.s.gpr[RAX] = 0;
  const auto out = m.run(code, ~0ull);
  EXPECT_TRUE(out.halted());
  EXPECT_EQ(m.s.gpr[RAX], 3000u);
  for (int round = 0; round < 20; round++) {
    m.store<u8>(TestMachine::kCode + 3, static_cast<u8>(round));
    m.mmu().expire_fetches();
    for (u64 i = 0; i < 3000; i++) m.store<u8>(TestMachine::kCode + 6 * i + 3, static_cast<u8>(round));
    m.s.gpr[RAX] = 0;
    m.s.rip = TestMachine::kCode;
    ASSERT_TRUE(m.resume(~0ull).halted());
    ASSERT_EQ(m.s.gpr[RAX], 3000u * static_cast<unsigned>(round));
  }
  EXPECT_GE(m.vcpu->cache().stats().flushes, 1u);
}

TEST(TranslatorVcpu, BudgetEnds) {
  Machine m;
  EXPECT_EQ(m.run(hex("48 83 d0 01 48 83 d0 01"), 1).result, Interpreter::Result::Budget);
}

}  // namespace
}  // namespace ring3::engine
