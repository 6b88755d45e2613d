#pragma once
#include "engine/interp/operand.hpp"

/// Integer arithmetic as values: shared by the handlers of alu.cpp and by CMPS/SCAS.
namespace ring3::engine {

enum class Alu : u8 { Add, Or, Adc, Sbb, And, Sub, Xor, Cmp, Test, Inc, Dec, Neg, Not };

constexpr bool alu_writes(Alu op) { return op != Alu::Cmp && op != Alu::Test; }
constexpr bool alu_unary(Alu op) { return op >= Alu::Inc; }

/// Runs the very instruction on the host: d is destination and result, flags the guest's before; the
/// result is LAHF/SETO's AX for put_status().
template <Alu kOp, class T>
RING3_INLINE u32 alu(T& d, T s, u64 flags) {
  u32 ax = 0;
#define RING3_BINARY(name) asm(name " %2, %0\n\tlahf\n\tseto %%al" : "+r"(d), "=&a"(ax) : "r"(s) : "cc")
#define RING3_CARRY(name) \
  asm("bt $0, %3\n\t" name " %2, %0\n\tlahf\n\tseto %%al" : "+&r"(d), "=&a"(ax) : "r"(s), "r"(flags) : "cc")
#define RING3_UNARY(name) asm("bt $0, %2\n\t" name " %0\n\tlahf\n\tseto %%al" : "+&r"(d), "=&a"(ax) : "r"(flags) : "cc")
  if constexpr (kOp == Alu::Add) RING3_BINARY("add");
  if constexpr (kOp == Alu::Or) RING3_BINARY("or");
  if constexpr (kOp == Alu::And) RING3_BINARY("and");
  if constexpr (kOp == Alu::Sub) RING3_BINARY("sub");
  if constexpr (kOp == Alu::Xor) RING3_BINARY("xor");
  if constexpr (kOp == Alu::Cmp) RING3_BINARY("cmp");
  if constexpr (kOp == Alu::Test) RING3_BINARY("test");
  if constexpr (kOp == Alu::Adc) RING3_CARRY("adc");
  if constexpr (kOp == Alu::Sbb) RING3_CARRY("sbb");
  if constexpr (kOp == Alu::Inc) RING3_UNARY("inc");
  if constexpr (kOp == Alu::Dec) RING3_UNARY("dec");
  if constexpr (kOp == Alu::Neg) RING3_UNARY("neg");
  if constexpr (kOp == Alu::Not) d = static_cast<T>(~d);
#undef RING3_BINARY
#undef RING3_CARRY
#undef RING3_UNARY
  (void)s;
  (void)flags;
  return ax;
}

Handler select_muldiv(const DecodedInsn& insn);  // alu_muldiv.cpp: Mul..Das
Handler select_bmi(const DecodedInsn& insn);     // alu_bmi.cpp: Adcx..Shrx

}  // namespace ring3::engine
