#include <gtest/gtest.h>

#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// Flags across indirect jumps: every way to set them, what comes between, every kind of jump, and every kind of block that
/// the jump leads to; the translator beside the interpreter.
namespace ring3::engine {
namespace {

using test::Bytes;
using test::hex;
using test::TestMachine;
using test::TestMode;

constexpr u64 kCode = TestMachine::kCode;

Bytes& operator+=(Bytes& a, const Bytes& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

struct Machine : TestMachine {
  explicit Machine(const TranslatorVcpu::Options* options, bool user) : TestMachine(TestMode::Long64, user) {
    if (options != nullptr) {
      auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), *options);
      CHECK(v.ok());
      vcpu = std::move(*v);
      runner = [this](u64 budget) { return vcpu->run(budget); };
    }
    s.gpr[RBX] = TestMachine::kData;
    store<u64>(TestMachine::kData, 0x8000000012345678);
    s.gpr[R13] = s.gpr[RSP];
    s.gpr[RSI] = 0x123456789abcdef1;
    s.gpr[RDI] = 0xfedcba9876543211;
  }
  ~Machine() { vcpu.reset(); }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

const char* const kSetters[] = {
    "21 fe",                 // and esi, edi
    "40 08 fe",              // or sil, dil
    "4d 31 f9",              // xor r9, r15
    "66 85 fe",              // test si, di
    "41 f6 c2 5a",           // test r10b, 0x5a
    "4c 39 de",              // cmp rsi, r11
    "41 81 f9 34 12 00 00",  // cmp r9d, 0x1234
    "49 01 ff",              // add r15, rdi
    "81 ee 77 07 00 00",     // sub esi, 0x777
    "4c 01 cf",              // add rdi, r9
    "4d 29 d3",              // sub r11, r10
    "40 38 fe",              // cmp sil, dil
    "4d 85 f9",              // test r9, r15
    "4d 39 da",              // cmp r10, r11
    "01 fe",                 // add esi, edi
    "41 83 ea fd",           // sub r10d, -3
    "48 ff c6",              // inc rsi
    "48 c1 e7 03",           // shl rdi, 3
    "66 41 83 f9 fe",        // cmp r9w, -2
    "49 21 f7",              // and r15, rsi
    "48 f7 df",              // neg rdi
    "48 29 ff",              // sub rdi, rdi
    "4d 01 c9",              // add r9, r9
};
const char* const kBetween[] = {
    "",
    "4c 8b 03",           // mov r8, [rbx]
    "4c 8b 0b",           // mov r9, [rbx]
    "4d 8d 14 33",        // lea r10, [r11+rsi]
    "7a 00",              // jp: to what comes next
    "4c 8b 03 0f b6 43 08 48 89 43 10",  // mov r8, [rbx]; movzx eax, byte [rbx+8]; mov [rbx+16], rax
    "41 50 41 58",        // push r8; pop r8
    "0f a2",              // cpuid: the interpreter's
};
const char* const kJumps[] = {
    "41 ff e4",  // jmp r12
    "ff 63 08",  // jmp [rbx+8]
    "41 ff d4",  // call r12
    "ff 53 08",  // call [rbx+8]
    "41 54 c3",  // push r12; ret
};
const char* const kReaders[] = {
    "9c 5a",              // pushfq; pop rdx
    "49 83 d6 00",        // adc r14, 0
    "41 0f 92 c6 9c 5a",  // setc r14b; pushfq; pop rdx
    "4c 8b 03 9c 5a",     // mov r8, [rbx]; pushfq; pop rdx
};

void put32(Bytes* code, u64 value) {
  for (unsigned n = 0; n < 4; n++) code->push_back(static_cast<u8>(value >> (8 * n)));
}

/// One program for each setter: its parts, one for all that may follow, stand kPart bytes apart, loop kRounds times, and
/// leave a digest of the flags at kDigests.
constexpr u64 kPart = 0x190, kJumpTo = 0x80, kDigests = TestMachine::kData + 0x100;

Bytes part(const std::string& setter, const std::string& between, const std::string& jump, const std::string& reader, u64 index) {
  Bytes code = hex("4c 89 ec 4c 8d 25");  // mov rsp, r13; lea r12, [target]
  put32(&code, kJumpTo - code.size() - 4);
  code += hex("4c 89 63 08 b9 14 00 00 00");  // mov [rbx+8], r12; mov ecx, 20
  const std::size_t loop = code.size();
  // imul rsi, rsi, 5851f42dh; add rdi, rsi; xor r9, rsi; add r10, rdi; xor r11, r9; add r15, r10
  code += hex("48 69 f6 2d f4 51 58 48 01 f7 49 31 f1 49 01 fa 4d 31 cb 4d 01 d7");
  const bool cpuid = between == "0f a2";
  if (cpuid) code += hex("51 53");  // push rcx; push rbx
  code += hex(setter);
  code += hex(between);
  if (cpuid) code += hex("5b 59");  // pop rbx; pop rcx
  code += hex(jump);
  code.resize(kJumpTo, 0xf4);
  code += hex(reader);
  code += hex("49 c1 c6 07 49 31 d6 48 ff c9 0f 85");  // rol r14, 7; xor r14, rdx; dec rcx; jnz loop
  put32(&code, loop - code.size() - 4);
  code += hex("4c 89 b3");  // mov [rbx+digest], r14
  put32(&code, kDigests - TestMachine::kData + 8 * index);
  code += hex("e9");  // jmp: the next
  put32(&code, kPart - code.size() - 4);
  code.resize(kPart, 0xf4);
  return code;
}

void sweep(const TranslatorVcpu::Options& options, bool user) {
  for (const char* setter : kSetters) {
    Bytes code;
    std::vector<std::string> names;
    for (const char* between : kBetween)
      for (const char* jump : kJumps)
        for (const char* reader : kReaders) {
          code += part(setter, between, jump, reader, names.size());
          names.push_back(std::string(between) + " | " + jump + " | " + reader);
        }
    code.push_back(0xf4);
    ASSERT_LE(code.size(), TestMachine::kData - kCode);
    Machine t(&options, user), i(nullptr, user);
    for (Machine* m : {&t, &i}) {
      m->load_code(code);
      m->s.rip = kCode;
      (void)m->resume(1000000);
      ASSERT_EQ(m->s.rip, kCode + code.size() - (user ? 1 : 0)) << setter;  // HLT, which faults in user code
    }
    for (std::size_t n = 0; n < names.size(); n++)
      EXPECT_EQ(t.load<u64>(kDigests + 8 * n), i.load<u64>(kDigests + 8 * n)) << setter << " | " << names[n];
    for (unsigned n = 0; n < 16; n++) EXPECT_EQ(t.s.gpr[n], i.s.gpr[n]) << "register " << n;
    EXPECT_EQ(t.s.rflags, i.s.rflags);
  }
}

TEST(Flags, AcrossIndirectJumps) { sweep({.arena_bytes = 1u << 20}, true); }
TEST(Flags, AcrossIndirectJumpsInSupervisorCode) { sweep({.arena_bytes = 1u << 20}, false); }
TEST(Flags, AcrossIndirectJumpsInPositionIndependentCode) { sweep({.arena_bytes = 1u << 20, .fixed_below = 0}, true); }
TEST(Flags, AcrossIndirectJumpsOfSmallBlocks) { sweep({.arena_bytes = 1u << 20, .max_insns = 3}, true); }
TEST(Flags, AcrossIndirectJumpsThroughWindows) { sweep({.arena_bytes = 1u << 20, .window_samples = 1}, true); }

}  // namespace
}  // namespace ring3::engine
