#include "engine/interp/families.hpp"

namespace ring3::engine {
namespace {

Exec undefined(Context& c, const DecodedInsn&) { return c.ud(); }

using Selector = Handler (*)(const DecodedInsn&);
constexpr Selector kFamilies[] = {select_alu,   select_shift, select_move,    select_stack,  select_branch, select_string,
                                  select_flags, select_far,   select_segment, select_system, select_vector, select_xstate};

}  // namespace

Handler select_handler(const GuestFeatures& features, const DecodedInsn& insn) {
  if (insn.op == Op::Invalid || insn.op == Op::Ud) return undefined;
  // MONITOR and MWAIT look for themselves.
  if (insn.feature != Feature::Base && insn.feature != Feature::Monitor && !features.allows(insn)) {
    // Without the feature these bytes are BSF and BSR with a prefix that is ignored.
    if (insn.op != Op::Tzcnt && insn.op != Op::Lzcnt) return undefined;
    DecodedInsn older = insn;
    older.op = insn.op == Op::Tzcnt ? Op::Bsf : Op::Bsr;
    return select_shift(older);
  }
  for (Selector select : kFamilies)
    if (Handler h = select(insn)) return h;
  return undefined;
}

}  // namespace ring3::engine
