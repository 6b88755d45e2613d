#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

/// CLC STC CMC CLD STD.
namespace ring3::engine {
namespace {

template <u64 kClear, u64 kSet, u64 kFlip>
Exec change(Context& c, const DecodedInsn&) {
  c.s.rflags = ((c.s.rflags & ~kClear) | kSet) ^ kFlip;
  return Exec::Next;
}

}  // namespace

Handler select_flags(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Clc: return change<rflags::CF, 0, 0>;
    case Op::Stc: return change<0, rflags::CF, 0>;
    case Op::Cmc: return change<0, 0, rflags::CF>;
    case Op::Cld: return change<rflags::DF, 0, 0>;
    case Op::Std: return change<0, rflags::DF, 0>;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
