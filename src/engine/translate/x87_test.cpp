#include <gtest/gtest.h>

#include "engine/translate/test_either.hpp"

/// x87 and MMX instructions run translated, and all of their state is as the interpreter has it, wherever it is looked at.
namespace ring3::engine {
namespace {

using test::Bytes;
using test::hex;
using test::Outcome;
using test::TestMachine;
using test::TestMode;

constexpr u64 kData = TestMachine::kData, kCode = TestMachine::kCode, kEntry = 0x80000;

struct Machine : test::EitherMachine {
  explicit Machine(bool translated, TestMode mode = TestMode::Long64, bool user = false) : EitherMachine(translated, mode, user) {
    s.cr4 |= cr4::OSFXSR;
    s.xsave.fcw() = 0x37f;
    s.xsave.fsw() = 0;
    s.xsave.ftw_abridged() = 0;
    s.xsave.mxcsr() = 0x1f80;
    s.gpr[RBX] = data_offset();
    run(hex("88 03 88 83 00 10 00 00"));  // the first stores to pages
    for (unsigned n = 0; n < 16; n++) store<double>(kData + 0x100 + 8 * n, 1.25 * n + 0.3);
    for (unsigned n = 0; n < 16; n++) store<u64>(kData + 0x200 + 8 * n, 0x0123'4567'89ab'cdef * (n + 1));
  }
};

/// The same in the interpreter and translated.
struct Both {
  explicit Both(TestMode mode = TestMode::Long64, bool user = false) : a(false, mode, user), b(true, mode, user) {}
  template <class F>
  void prepare(F f) {
    f(a);
    f(b);
  }
  /// Ends at the HLT behind the code, having left that alone to the interpreter, or `left` more.
  void run(const char* code, unsigned left = 0) {
    test::run_both(a, b, code, left);
    same(code);
  }
  void raises(const char* code, u8 vector) {
    const Outcome x = a.run(hex(code)), y = b.run(hex(code));
    EXPECT_TRUE(x.has_event && x.event.vector == vector) << code;
    EXPECT_TRUE(y.has_event && y.event.vector == vector) << code;
    same(code);
  }
  void same(const char* code) {
    EXPECT_EQ(a.s.rip, b.s.rip) << code;
    for (unsigned n = 0; n < 16; n++) EXPECT_EQ(a.s.gpr[n], b.s.gpr[n]) << code << ": register " << n;
    EXPECT_EQ(a.s.rflags & ~rflags::AF, b.s.rflags & ~rflags::AF) << code;
    for (unsigned n = 0; n < 416; n++) EXPECT_EQ(a.s.xsave.bytes[n], b.s.xsave.bytes[n]) << code << ": byte " << n << " of the state";
    EXPECT_EQ(std::memcmp(a.ram(kData), b.ram(kData), 2 * kPageSize), 0) << code;
  }
  Machine a, b;
};

TEST(X87, EachMemoryForm) {
  for (TestMode mode : {TestMode::Long64, TestMode::Prot32, TestMode::Compat32}) {
    Both m(mode);
    for (unsigned opcode = 0xd8; opcode <= 0xdf; opcode++) {
      for (unsigned reg = 0; reg < 8; reg++) {
        const bool environment = (opcode == 0xd9 || opcode == 0xdd) && (reg == 4 || reg == 6);
        const bool undefined = (opcode == 0xd9 && reg == 1) || (opcode == 0xdb && (reg == 4 || reg == 6)) || (opcode == 0xdd && reg == 5);
        if (undefined || environment || (opcode == 0xd9 && reg == 5)) continue;
        char code[96];  // fld qword [rbx+100h]; fld1; the form, off [rbx+108h]
        std::snprintf(code, sizeof code, "dd 83 00 01 00 00 d9 e8 %x %x 08 01 00 00", opcode, 0x83 | reg << 3);
        m.run(code);
      }
    }
  }
}

TEST(X87, RegisterForms) {
  Both m;
  m.prepare([](Machine& x) { x.s.rflags |= rflags::CF; });
  for (unsigned opcode = 0xd8; opcode <= 0xdf; opcode++) {
    for (unsigned modrm = 0xc0; modrm < 0x100; modrm++) {
      const u8 bytes[2] = {static_cast<u8>(opcode), static_cast<u8>(modrm)};
      DecodedInsn i;
      if (decode(bytes, 2, CodeMode::Bits64, false, false, &i) != DecodeResult::Ok || i.op != Op::HostX87) continue;
      if (opcode == 0xdb && (modrm == 0xe0 || modrm == 0xe1 || modrm == 0xe4)) continue;  // do nothing, and are left
      char code[96];  // fld qword [rbx+108h]; fld qword [rbx+110h]; cmp eax, ecx; the form; setp dl; setb cl
      std::snprintf(code, sizeof code, "dd 83 08 01 00 00 dd 83 10 01 00 00 39 c8 %x %x 0f 9a c2 0f 92 c1", opcode, modrm);
      m.run(code);
    }
  }
}

TEST(X87, ALoopKeepsTheStackInRegisters) {
  Both m;
  // mov ecx, 1000; fldz; 1: fld qword [rbx+100h]; fld st; fmulp; faddp; fld tbyte [rbx+20h]; fxch; fstp tbyte [rbx+20h];
  // fnstsw ax; dec ecx; jnz 1b; fstp qword [rbx]
  m.run("b9 e8 03 00 00 d9 ee dd 83 00 01 00 00 d9 c0 de c9 de c1 db 6b 20 d9 c9 db 7b 20 df e0 ff c9 75 e7 dd 1b");
  EXPECT_LT(m.b.vcpu->stats().entries, 20u);
}

TEST(X87, ControlWordsThatUnmaskAreLeft) {
  Both m;
  m.prepare([](Machine& x) {
    x.store<u16>(kData, 0xf7f);   // round to zero
    x.store<u16>(kData + 2, 0x37e);  // IM clear
    x.store<double>(kData + 8, -2.75);
  });
  m.run("d9 2b dd 43 08 db 5b 10 d9 7b 04");  // fldcw [rbx]; fld qword [rbx+8]; fistp dword [rbx+16]; fnstcw [rbx+4]
  EXPECT_EQ(m.b.load<i32>(kData + 16), -2);
  EXPECT_EQ(m.b.load<u16>(kData + 4), 0xf7f);
  m.raises("d9 6b 02 d9 ee d9 fa d9 ee de f1 90 9b", vec::MF);  // fldcw [rbx+2]; fldz; fsqrt; fldz; fdivrp; nop; fwait
  EXPECT_EQ(m.b.s.rip, kCode + 12);
  m.raises("0f 77", vec::MF);  // emms
  m.run("db e2 d9 2b d9 e8", 2);  // fnclex; fldcw [rbx]; fld1
}

TEST(X87, AvailabilityIsLookedAtEachTime) {
  Both m;
  m.run("d9 e8");
  for (u64 bit : {cr0::TS, cr0::EM}) {
    m.prepare([&](Machine& x) { x.s.cr0 |= bit; });
    m.raises("d9 e8", vec::NM);
    m.raises("0f fc c1", bit == cr0::TS ? vec::NM : vec::UD);
    m.raises("0f 77", bit == cr0::TS ? vec::NM : vec::UD);
    m.prepare([&](Machine& x) { x.s.cr0 |= cr0::MP; });
    if (bit == cr0::TS) m.raises("9b", vec::NM);
    else m.run("9b", 1);
    // Set and clear in the middle: mov rax, cr0; or al, 8; fld1; mov cr0, rax; fld1
    m.prepare([&](Machine& x) { x.s.cr0 &= ~(bit | cr0::MP); });
    m.raises("0f 20 c0 0c 08 d9 e8 0f 22 c0 d9 e8", vec::NM);
    EXPECT_EQ(m.b.s.rip, kCode + 10);
    m.prepare([&](Machine& x) { x.s.cr0 &= ~cr0::TS; });
  }
}

TEST(X87, AFaultInTenBytesIsPrecise) {
  Both m;
  m.prepare([](Machine& x) {
    x.unmap(kData + kPageSize);
    x.s.gpr[RBX] = kData + kPageSize - 9;
  });
  m.raises("d9 e8 d9 eb 31 c0 db 2b", vec::PF);  // fld1; fldpi; xor eax, eax; fld tbyte [rbx]
  EXPECT_EQ(m.b.s.rip, kCode + 6);
  EXPECT_EQ(m.b.s.gpr[RAX], 0u);
  m.raises("d9 e8 d9 eb d9 c1 db 3b", vec::PF);  // fstp tbyte [rbx]
  m.raises("d9 e8 df 33", vec::PF);              // fbstp
  // In two pages that are both there: from a copy, or by the interpreter.
  m.prepare([](Machine& x) { x.map(kData + kPageSize, kData + kPageSize, TestMachine::kPresent | TestMachine::kWritable); });
  m.run("db e3 d9 eb db 3b db 2b");
  m.prepare([](Machine& x) { x.map(kData + kPageSize, kData + 5 * kPageSize, TestMachine::kPresent | TestMachine::kWritable); });
  m.run("db e3 d9 eb db 3b db 2b", 1);
}

TEST(X87, StateInMemorySeesTheRegisters) {
  Both m;
  // fld1; fldpi; nop; fxsave64 [rbx+400h]; fld tbyte... : the images hold FIP
  m.run("d9 e8 d9 eb 90 48 0f ae 83 00 04 00 00", 1);
  EXPECT_EQ(m.b.load<u64>(kData + 0x408), kCode + 2);
  m.run("d9 e8 dd b3 00 04 00 00 d9 e8 dd a3 00 04 00 00 d8 c0 d9 b3 00 06 00 00", 3);  // fnsave; frstor; fadd; fnstenv
  EXPECT_EQ(m.b.load<u32>(kData + 0x60c), kCode + 16);
  // fld1; fnsave; fninit: no pointers
  m.run("d9 e8 db e3 0f ae 83 00 04 00 00", 1);
  EXPECT_EQ(m.b.load<u64>(kData + 0x408), 0u);
}

TEST(X87, FipOnEveryWayOut) {
  for (TestMode mode : {TestMode::Long64, TestMode::Prot32, TestMode::Compat32}) {
    for (bool user : {false, true}) {
      Both m(mode, user);
      m.run("d9 e8 8b 03 90 eb 00 90");  // fld1; mov eax, [rbx]; nop; jmp; nop
      m.run("d9 e8 39 c0 75 02 d9 e8 90");  // a branch that is not taken
      m.run("39 c0 74 02 d9 e8 90");
      m.run("b9 03 00 00 00 d9 e8 dd d8 ff c9 75 f8 d9 eb ff c1");
      m.prepare([](Machine& x) { x.s.gpr[RSI] = kData + 16 * kPageSize; });
      m.prepare([](Machine& x) { x.unmap(kData + 16 * kPageSize); });
      m.raises("d9 e8 d9 eb 8b 06 d9 e8", vec::PF);         // an access
      m.raises("d9 e8 8b 03 8b 43 04 d9 eb 8b 46 08 8b 06", vec::PF);  // one of a group
      m.raises("d9 e8 31 d2 31 c0 31 c9 f7 f1", vec::DE);  // a division
    }
  }
}

TEST(X87, MmxIsTheSameRegisters) {
  Both m;
  // fld1; movq mm0, [rbx+200h]; paddd mm0, [rbx+208h]; pshufw mm1, mm0, 1bh; movd eax, mm1; pmovmskb ecx, mm0;
  // movq [rbx], mm0; punpcklbw mm2, [rbx]; fxch st(3)
  m.run("d9 e8 0f 6f 83 00 02 00 00 0f fe 83 08 02 00 00 0f 70 c8 1b 0f 7e c8 0f d7 c8 0f 7f 03 0f 60 13 d9 cb");
  m.run("0f 77 d9 e8");                       // emms; fld1
  m.run("d9 f7 d9 f7 0f ef c0 0f 6e db");     // fincstp twice; pxor mm0, mm0; movd mm3, ebx
  m.run("41 0f 7e d9 4c 0f 6e f9 4d 0f c5 ff 02");  // movd r9d, mm3; movq mm7, rcx; pextrw r15, mm7, 2
  // movq2dq xmm0, mm3; movdq2q mm5, xmm3; emms: with vectors loaded, as user code is entered
  m.run("f3 0f d6 c3 f2 0f d6 eb 0f 77", 2);
  Both user(TestMode::Long64, true);
  user.run("f3 0f d6 c3 f2 0f d6 eb 0f 77");
  user.run("0f 2a c1 0f 2d d0", 2);  // cvtpi2ps, cvtps2pi
}

TEST(X87, UserStateStaysOverTheWayThroughTheKernel) {
  Machine machines[2] = {Machine(false, TestMode::Long64, true), Machine(true, TestMode::Long64, true)};
  for (Machine& m : machines) {
    m.s.efer |= efer::SCE;
    m.s.msr.star = 0x0023'0010'0000'0000;
    m.s.msr.lstar = kEntry;
    m.s.msr.sfmask = rflags::IF;
    m.load_code(hex("48 ff c6 48 0f 07"), kEntry);  // inc rsi; sysretq
    // fld1; fldz; mov ebx, 100; 1: fadd st, st(1); syscall; dec ebx; jnz 1b; fstp st(1); then fld
    const Bytes code = hex("d9 e8 d9 ee bb 64 00 00 00 d8 c1 0f 05 ff cb 75 f8 dd d9");
    std::memcpy(m.ram(kEntry), hex("48 ff c6 48 0f 07").data(), 6);
    EXPECT_TRUE(m.ended_at_hlt(m.run(code)));
    long double v = 0;
    std::memcpy(&v, m.s.xsave.bytes + 32, 10);
    EXPECT_EQ(static_cast<double>(v), 100.0);
  }
  EXPECT_EQ(std::memcmp(machines[0].s.xsave.bytes, machines[1].s.xsave.bytes, 160), 0);
  EXPECT_GT(machines[1].vcpu->stats().transitions, 150u);
}

TEST(X87, TheThreadsOwnStateIsLeftAlone) {
  u16 own = 0x27f, now = 0;
  asm volatile("fldcw %0" : : "m"(own));
  {
    Both m;
    m.prepare([](Machine& x) { x.store<u16>(kData, 0xc7f); });
    m.run("d9 2b d9 e8 d9 eb d9 ee");  // fldcw [rbx]; three values
    EXPECT_EQ(m.b.s.xsave.fcw(), 0xc7f);
  }
  u8 environment[28];
  asm volatile("fnstcw %0; fnstenv %1" : "=m"(now), "=m"(environment));
  EXPECT_EQ(now, own);
  EXPECT_EQ(environment[8], 0xff);  // all empty
  EXPECT_EQ(environment[9], 0xff);
  own = 0x37f;
  asm volatile("fldcw %0" : : "m"(own));
}

}  // namespace
}  // namespace ring3::engine
