#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// The ways between user and kernel code that do not leave translated code: that they are taken, and that everything is
/// as the interpreter has it, above all vectors, which stay in the host's registers. What is refused: the same.
namespace ring3::engine {
namespace {

using test::Bytes;
using test::hex;
using test::Outcome;
using test::TestMachine;
using test::TestMode;

constexpr u64 kEntry = 0x80000, kRounds = 100;

Bytes operator+(Bytes a, const Bytes& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Machine : TestMachine {
  Machine(bool translated, bool amd) : TestMachine(TestMode::Long64, true) {
    if (translated) {
      auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), {.arena_bytes = 1u << 20});
      CHECK(v.ok());
      vcpu = std::move(*v);
      runner = [this](u64 budget) { return vcpu->run(budget); };
    }
    s.msr.star = 0x0023'0010'0000'0000;
    s.msr.lstar = kEntry;
    s.msr.sfmask = rflags::IF | rflags::TF | rflags::DF | rflags::CF | rflags::AC;
    c().features.amd = amd;
    s.gpr[RBX] = kRounds;
    s.gpr[R13] = 0x100000;
    for (unsigned n = 0; n < 256; n++) {
      s.xsave.bytes[XsaveArea::kXmm + n] = static_cast<u8>(n * 7 + 1);
      s.xsave.bytes[XsaveArea::kYmmHigh + n] = static_cast<u8>(n * 5 + 3);
    }
  }
  ~Machine() { vcpu.reset(); }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

void expect_same(Machine& a, Machine& b) {
  for (unsigned n = 0; n < 16; n++) EXPECT_EQ(a.s.gpr[n], b.s.gpr[n]) << "register " << n;
  EXPECT_EQ(a.s.rip, b.s.rip);
  EXPECT_EQ(a.s.rflags, b.s.rflags);
  EXPECT_EQ(a.c().cpl, b.c().cpl);
  EXPECT_EQ(a.s.xsave.mxcsr(), b.s.xsave.mxcsr());
  for (unsigned seg = 0; seg < kSegCount; seg++) {
    const Segment &x = a.s.seg[seg], &y = b.s.seg[seg];
    EXPECT_EQ(x.selector, y.selector);
    EXPECT_EQ(x.base, y.base);
    EXPECT_EQ(x.limit, y.limit);
    EXPECT_EQ(x.type, y.type);
    EXPECT_EQ(x.dpl, y.dpl);
    EXPECT_EQ(x.present, y.present);
    EXPECT_EQ(x.unusable, y.unusable);
    EXPECT_EQ(x.s * 16 + x.l * 8 + x.db * 4 + x.g * 2 + x.avl, y.s * 16 + y.l * 8 + y.db * 4 + y.g * 2 + y.avl);
  }
  for (unsigned n = 0; n < 256; n++) {
    EXPECT_EQ(a.s.xsave.bytes[XsaveArea::kXmm + n], b.s.xsave.bytes[XsaveArea::kXmm + n]) << "XMM byte " << n;
    EXPECT_EQ(a.s.xsave.bytes[XsaveArea::kYmmHigh + n], b.s.xsave.bytes[XsaveArea::kYmmHigh + n]) << "YMM byte " << n;
  }
}

/// User code that computes with vectors and calls `kernel` kRounds times. Both machines end in the same way.
struct Result {
  u64 transitions = 0, interpreted = 0;
  Outcome end;
};
Result run(const Bytes& kernel, bool amd = false, const std::function<void(Machine&)>& prepare = {}, u64 budget = 100000) {
  // paddb xmm1, xmm0; vpaddb ymm3, ymm2, ymm3; mov eax, ebx; add al, 80h; syscall; setc al; movzx eax, al; add r14, rax;
  // dec rbx; jnz
  const Bytes user = hex("66 0f fc c8 c5 ed fc db 89 d8 04 80 0f 05 0f 92 c0 0f b6 c0 49 01 c6 48 ff cb 75 e4 f4");
  Machine machines[2] = {Machine(true, amd), Machine(false, amd)};
  Result r;
  for (Machine& m : machines) {
    m.load_code(user);
    m.load_code(kernel, kEntry);
    m.s.rip = TestMachine::kCode;
    if (prepare) prepare(m);
    const Outcome end = m.resume(budget);
    if (m.vcpu == nullptr) {
      EXPECT_EQ(end.result, r.end.result);
      EXPECT_EQ(end.has_event, r.end.has_event);
      EXPECT_EQ(end.event.vector, r.end.event.vector);
      EXPECT_EQ(end.event.error, r.end.event.error);
    } else {
      r.end = end;
      r.transitions = m.vcpu->stats().transitions;
      r.interpreted = m.vcpu->stats().interpreted;
    }
  }
  expect_same(machines[0], machines[1]);
  return r;
}

/// Kernel code that does `last` the last time it is called, and `always` each time.
Bytes at_last(const Bytes& last, const Bytes& always) {
  Bytes skip = hex("48 83 fb 01 75");  // cmp rbx, 1; jne
  skip.push_back(static_cast<u8>(last.size()));
  return skip + last + always;
}
const Bytes kSysret = hex("48 0f 07");

TEST(Transitions, SystemCallsDoNotLeave) {
  for (bool amd : {false, true}) {
    const Result r = run(hex("49 ff c4") + kSysret, amd);  // inc r12
    EXPECT_TRUE(r.end.raised(vec::GP, 0));                 // HLT
    EXPECT_GE(r.transitions, 2 * kRounds - 4);
    EXPECT_LE(r.interpreted, 5u);
  }
}

TEST(Transitions, TheKernelsTlbMissesPutVectorsAway) {
  // add r13, 4096; mov [r13], rcx
  const Result r = run(hex("49 81 c5 00 10 00 00 49 89 4d 00") + kSysret);
  EXPECT_GE(r.transitions, 2 * kRounds - 4);
}

TEST(Transitions, TheKernelUsesVectors) {
  // paddb xmm0, xmm3, each time and the last time only
  const Bytes vector = hex("66 0f fc c3");
  EXPECT_GE(run(vector + kSysret).transitions, kRounds);
  EXPECT_GE(run(at_last(vector, kSysret)).transitions, 2 * kRounds - 6);
}

TEST(Transitions, TheKernelReadsTheClockAndChangesAc) {
  // rdtsc; mov eax, 5; xor edx, edx; stac; clac; cli
  const Result r = run(hex("0f 31 b8 05 00 00 00 31 d2 0f 01 cb 0f 01 ca fa") + kSysret);
  EXPECT_GE(r.transitions, 2 * kRounds - 4);
  EXPECT_LE(r.interpreted, 5u);
}

TEST(Transitions, UnmaskedExceptionsKeepVectorsAway) {
  const Result r = run(kSysret, false, [](Machine& m) { m.s.xsave.mxcsr() = 0x1f00; });
  EXPECT_TRUE(r.end.raised(vec::GP, 0));
}

TEST(Transitions, ASystemCallFromTheKernel) {
  // The first one: a system call from there, to the other branch. test r12d, r12d; jnz; mov r8, rcx; mov r10, r11; inc
  // r12d; syscall; (second time) dec r12d; mov rcx, r8; mov r11, r10
  const Result r = run(hex("45 85 e4 75 0b 49 89 c8 4d 89 da 41 ff c4 0f 05 41 ff cc 4c 89 c1 4d 89 d3") + kSysret);
  EXPECT_TRUE(r.end.raised(vec::GP, 0));
  EXPECT_GE(r.transitions, 3 * kRounds - 8);
}

TEST(Transitions, TrapFlagStepsTheReturn) {
  const Result r = run(at_last(hex("49 81 cb 00 01 00 00"), kSysret));  // or r11, 100h
  EXPECT_TRUE(r.end.has_event);
  EXPECT_EQ(r.end.event.vector, vec::DB);
}

TEST(Transitions, AReturnToNowhereFaults) {
  for (bool amd : {false, true}) {
    const Result r = run(at_last(hex("48 0f ba e9 2f"), kSysret), amd);  // bts rcx, 47
    EXPECT_TRUE(r.end.raised(vec::GP, 0));
  }
}

TEST(Transitions, TheUpperHalfIsReturnedTo) {
  // It is not mapped: or rcx, -1 << 47 by shl, bts, sar
  const Result r = run(at_last(hex("48 c1 e1 10 48 0f ba e9 3f 48 c1 f9 10"), kSysret));
  EXPECT_TRUE(r.end.has_event);
  EXPECT_EQ(r.end.event.vector, vec::PF);
}

TEST(Transitions, A32BitReturn) {
  const Result r = run(at_last(hex("0f 07"), kSysret));
  EXPECT_TRUE(r.end.has_event);
}

TEST(Transitions, WithoutTheFeatureItIsUndefined) {
  const Result r = run(kSysret, false, [](Machine& m) { m.s.efer &= ~efer::SCE; });
  EXPECT_TRUE(r.end.raised(vec::UD));
  EXPECT_EQ(r.transitions, 0u);
}

TEST(Transitions, AnInterruptWindowThatOpensEndsTheRun) {
  const Result r = run(at_last(hex("49 81 cb 00 02 00 00"), kSysret), false,  // or r11, 200h
                       [](Machine& m) { m.c().interrupt_window = true; });
  EXPECT_EQ(r.end.result, Interpreter::Result::Attention);
  EXPECT_EQ(r.transitions, 0u);
}

TEST(Transitions, ReturnFlagsThatAreKept) {
  // or r11, ID|AC|NT|IOPL|DF|OF|SF|ZF|AF|PF; with CR0.AM not set AC is a flag like others.
  const Result r = run(at_last(hex("49 81 cb d4 7c 24 00"), kSysret));
  EXPECT_TRUE(r.end.raised(vec::GP, 0));
}

TEST(Transitions, AlignmentChecksAfterTheReturn) {
  // or r11, AC: from then on user accesses are checked one by one.
  const Result r = run(at_last(hex("49 81 cb 00 00 04 00"), kSysret), false, [](Machine& m) { m.s.cr0 |= cr0::AM; });
  EXPECT_TRUE(r.end.raised(vec::GP, 0));
}

// mov r8, rsp; push 2bh; push r8; push r11; push 33h; push rcx; iretq
const Bytes kIret = hex("49 89 e0 6a 2b 41 50 41 53 6a 33 51 48 cf");

TEST(Transitions, InterruptReturnsDoNotLeave) {
  const Result r = run(hex("49 ff c4") + kIret);  // inc r12
  EXPECT_TRUE(r.end.raised(vec::GP, 0));                                // HLT
  EXPECT_GE(r.transitions, 2 * kRounds - 8);
  // With vectors in place: paddb xmm0, xmm3
  EXPECT_GE(run(hex("66 0f fc c3") + kIret).transitions, kRounds);
}

TEST(Transitions, AnInterruptReturnToItself) {
  // lea r9, [rip + there]; mov r8, rsp; push ss; push r8; pushfq; push cs; push r9; iretq; there:
  const auto kernel = [](const char* stack, const char* code) {
    return hex("4c 8d 0d 0e 00 00 00 49 89 e0 6a") + hex(stack) + hex("41 50 9c 6a") + hex(code) + hex("41 51 48 cf") + kSysret;
  };
  EXPECT_GE(run(kernel("18", "10")).transitions, 3 * kRounds - 12);
  EXPECT_GE(run(kernel("00", "10")).transitions, 3 * kRounds - 12);
}

TEST(Transitions, InterruptReturnsThatAreRare) {
  const auto expect = [](const Bytes& last, u8 vector, u32 error, const std::function<void(Machine&)>& prepare = {}) {
    const Result r = run(at_last(last, kIret), false, prepare);
    EXPECT_TRUE(r.end.has_event);
    EXPECT_EQ(r.end.event.vector, vector);
    EXPECT_EQ(r.end.event.error, error);
  };
  expect(hex("48 0f ba e9 2f"), vec::GP, 0);        // bts rcx, 47
  expect(hex("49 81 cb 00 01 00 00"), vec::DB, 0);  // or r11, TF
  expect(hex("49 81 cb 00 02 24 00"), vec::GP, 0);  // or r11, ID|AC|IF: fine
  const auto with = [](u16 selector, u8 access, u8 flags) {
    return [=](Machine& m) { m.set_gdt(selector, 0, 0xfffff, access, flags); };
  };
  expect({}, vec::NP, 0x30, with(0x30, 0x7b, 0xa));
  expect({}, vec::SS, 0x28, with(0x28, 0x73, 0xc));
  expect({}, vec::GP, 0x30, with(0x30, 0xf3, 0xc));  // data
  expect({}, vec::GP, 0x28, with(0x28, 0x93, 0xc));  // DPL 0
  expect({}, vec::GP, 0x30, [](Machine& m) { m.s.gdtr.limit = 0x2f; });
  expect({}, vec::GP, 0, with(0x30, 0xfa, 0xa));  // not accessed yet: fine, HLT
  expect({}, vec::GP, 0, [](Machine& m) {          // segments that user code may not hold
    for (Seg seg : {ES, DS, FS, GS}) m.s.seg[seg] = TestMachine::segment(0x18, 0, 0xffffffff, 3, 0, true, false, true);
  });
}

TEST(Transitions, TheBudgetHolds) {
  Machine m(true, false);
  m.load_code(hex("0f 05 eb fc"));  // syscall, for ever
  m.load_code(kSysret, kEntry);
  m.s.rip = TestMachine::kCode;
  EXPECT_EQ(m.resume(1000).result, Interpreter::Result::Budget);
  EXPECT_GT(m.vcpu->stats().transitions, 100u);
}

}  // namespace
}  // namespace ring3::engine
