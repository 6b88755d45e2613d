#include "engine/interp/operand.hpp"

namespace ring3::engine {
namespace {

/// Data writes to seg need no check in legacy modes (SDM vol. 3A 5.3): base 0, limit 4 GiB, writable, expand-up.
bool is_flat(const Segment& seg) {
  return !seg.unusable && seg.present && seg.base == 0 && seg.limit == 0xffffffff && (seg.type & 0xe) == 2;
}

}  // namespace

void Context::mode_changed() {
  const bool v86 = s.v8086() && s.protected_mode();
  long_mode = s.long_mode();
  code64 = s.code64();
  protected_mode = s.protected_mode() && !v86;
  cpl = v86 ? 3 : s.protected_mode() ? s.cpl() : 0;
  code_mode = code64 ? CodeMode::Bits64 : s.seg[CS].db ? CodeMode::Bits32 : CodeMode::Bits16;
  stack_size = code64 ? 8 : s.seg[SS].db ? 4 : 2;
  flat_segments = 0;
  if (!code64)
    for (unsigned i = 0; i < kSegCount; i++)
      if (is_flat(s.seg[i])) flat_segments = static_cast<u8>(flat_segments | 1u << i);
  const bool breakpoints = (guest_debug_hw_bp ? guest_dr7 : s.dr7) & 0xff;
  slow_step = (s.rflags & rflags::TF) || breakpoints || guest_debug_step;
  fpu_ok = !(s.cr0 & (cr0::EM | cr0::TS));
  fetch_key = static_cast<u32>(code_mode) | (protected_mode ? 0u : 4u) | (cpl == 3 ? 8u : 0u);
  mmu.mode_changed();
  if (guest_debug_hw_bp || breakpoints_overridden) {
    breakpoints_overridden = guest_debug_hw_bp;
    mmu.override_breakpoints(guest_debug_hw_bp ? guest_dr : nullptr, guest_dr7);
  }
}

/// Segmentation with all of its checks (SDM vol. 3A 5.3, 5.4).
bool Context::linear_slow(Seg seg, u64 offset, unsigned size, bool write, u64* out) {
  const Segment& g = s.seg[seg];
  const u8 violation = seg == SS ? vec::SS : vec::GP;
  u64 lin;
  if (code64) {
    lin = seg < FS ? offset : offset + g.base;
  } else {
    if (protected_mode) {
      const bool code = g.type & 8;
      if (g.unusable || !g.present || (write && (code || !(g.type & 2))) || (!write && code && !(g.type & 2))) {
        fault(violation, 0);
        return false;
      }
    }
    const u64 last = offset + size - 1;
    bool inside;
    if (protected_mode && (g.type & 0xc) == 4) {  // expand-down: valid above the limit
      inside = offset > g.limit && last <= (g.db ? 0xffffffffull : 0xffffull);
    } else {
      inside = last <= g.limit;
    }
    if (!inside) {
      fault(violation, 0);
      return false;
    }
    lin = static_cast<u32>(g.base + offset);
  }
  *out = lin;
  return true;
}

}  // namespace ring3::engine
