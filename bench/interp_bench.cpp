#include <ctime>
#include <cstdio>
#include <cstdlib>

#include "engine/interp/test_machine.hpp"

/// Guest instructions a second of the interpreter, one vCPU, on small loops.
///
/// Method: the loop runs in the unit tests' machine for a fixed number of guest instructions; the time is
///         the thread's CPU time; the best of five runs is printed, so that a busy host changes little.
/// Usage:  interp_bench [million instructions a run, default 100]
namespace {

using namespace ring3;
using namespace ring3::engine;
using namespace ring3::engine::test;

struct Loop {
  const char* name;
  TestMode mode;
  const char* code;
};

constexpr Loop kLoops[] = {
    // add rax, rcx; dec rcx; jnz
    {"integer sum", TestMode::Long64, "48 01 c8 48 ff c9 75 f8"},
    // xor eax, ecx; add rbx, rax; lea rdx, [rbx + rax*2]; test dl, 1; jz; shr rdx; cmp rdx, rbx; dec rcx; jnz
    {"integer and branches", TestMode::Long64,
     "31 c8 48 01 c3 48 8d 14 43 f6 c2 01 74 03 48 d1 ea 48 39 da 48 ff c9 75 e7"},
    // the same in 32 bits
    {"integer and branches, 32-bit", TestMode::Prot32, "31 c8 01 c3 8d 14 43 f6 c2 01 74 02 d1 ea 39 da 49 75 ed"},
    // mov rax, [rsi]; add rax, rcx; mov [rdi], rax; add [rsi], rax; dec rcx; jnz
    {"memory", TestMode::Long64, "48 8b 06 48 01 c8 48 89 07 48 01 06 48 ff c9 75 ef"},
    // call; dec rcx; jnz; (push rax; pop rax; ret)
    {"call, push, pop, ret", TestMode::Long64, "e8 08 00 00 00 48 ff c9 75 f6 90 90 90 50 58 c3"},
    // lock inc dword [rsi]; dec rcx; jnz
    {"locked increment", TestMode::Long64, "f0 ff 06 48 ff c9 75 f8"},
    // real mode: add ax, cx; mov [bx], ax; dec cx; jmp
    {"real mode", TestMode::Real16, "01 c8 89 07 49 eb f9"},
};

double seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace

int main(int argc, char** argv) {
  const u64 instructions = (argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 100) * 1'000'000;
  std::printf("%-32s %10s\n", "loop", "M insn/s");
  for (const Loop& loop : kLoops) {
    double best = 0;
    for (int round = 0; round < 5; round++) {
      TestMachine m(loop.mode);
      m.s.gpr[RCX] = 1ull << 40;
      m.s.gpr[RSI] = m.data_offset();
      m.s.gpr[RDI] = m.data_offset() + 512;
      const double start = seconds();
      const Outcome out = m.run(hex(loop.code), instructions);
      const double time = seconds() - start;
      if (out.result != Interpreter::Result::Budget) {
        std::fprintf(stderr, "%s: ended early at %llx\n", loop.name, static_cast<unsigned long long>(m.s.rip));
        return 1;
      }
      if (static_cast<double>(instructions) / time > best) best = static_cast<double>(instructions) / time;
    }
    std::printf("%-32s %10.1f\n", loop.name, best / 1e6);
  }
  return 0;
}
