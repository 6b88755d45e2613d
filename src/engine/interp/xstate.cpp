#include <cpuid.h>

#include <array>
#include <cstring>

#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"
#include "engine/interp/vector.hpp"
#include "engine/interp/xstate.hpp"

namespace ring3::engine {
namespace {

constexpr u64 kX87 = 1, kSse = 2, kAvx = 4;
constexpr u32 kMxcsrInit = 0x1f80;
constexpr u64 kCompacted = 1ull << 63;

Seg segment_of(const DecodedInsn& insn) { return static_cast<Seg>(insn.mem.seg); }

template <class T>
T get(const u8* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
void put(u8* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

unsigned registers(const Context& c) { return c.code64 ? 16 : 8; }

bool all_zero(const u8* p, unsigned size) {
  for (unsigned i = 0; i < size; ++i)
    if (p[i]) return false;
  return true;
}

/// The linear address of the operand, aligned; false: stop() is set.
bool locate(Context& c, const DecodedInsn& insn, unsigned size, bool write, unsigned alignment, u64* linear) {
  if (!c.linear(segment_of(insn), c.effective_address(insn), size, write, linear)) return false;
  if (*linear & (alignment - 1)) {
    c.gp0();
    return false;
  }
  return true;
}

// ---- the legacy region, both ways ----

/// Bytes 0..23 of the image in the guest's format: with REX.W 64-bit pointers, otherwise offset and selector.
void save_control(const Context& c, bool wide, u8* out) {
  std::memcpy(out, c.s.xsave.bytes, 24);
  out[5] = 0;
  if (wide) return;
  for (unsigned at : {8u, 16u}) {
    if (c.long_mode) put<u16>(out + at + 4, 0);  // FCS and FDS are not kept in IA-32e mode
    put<u16>(out + at + 6, 0);
  }
}

void load_control(Context& c, bool wide, const u8* in) {
  XsaveArea& area = c.s.xsave;
  std::memcpy(area.bytes, in, 24);
  area.bytes[5] = 0;
  put<u16>(area.bytes + 6, get<u16>(in + 6) & 0x7ff);
  if (!wide) {
    for (unsigned at : {8u, 16u}) {
      if (c.long_mode) put<u16>(area.bytes + at + 4, 0);
      put<u16>(area.bytes + at + 6, 0);
    }
  }
  normalise_x87(area);
}

void save_st(const Context& c, u8* out) {  // out: 128 bytes, ST(0) first
  for (unsigned i = 0; i < 8; ++i) {
    std::memcpy(out + 16 * i, c.s.xsave.bytes + 32 + 16 * i, 10);
    std::memset(out + 16 * i + 10, 0, 6);
  }
}

void load_st(Context& c, const u8* in) {
  for (unsigned i = 0; i < 8; ++i) {
    std::memcpy(c.s.xsave.bytes + 32 + 16 * i, in + 16 * i, 10);
    std::memset(c.s.xsave.bytes + 32 + 16 * i + 10, 0, 6);
  }
}

void init_x87(XsaveArea& area) {
  std::memset(area.bytes, 0, 24);
  area.fcw() = 0x37f;
  std::memset(area.bytes + 32, 0, 128);
}

u32 mxcsr_mask(const Context& c) { return c.features.mxcsr_mask; }

// ---- FXSAVE, FXRSTOR ----

bool fxsr_available(Context& c) {
  if (c.fpu_ok) return true;
  // CR0.EM: #UD on AMD, #NM on Intel.
  c.fault((c.s.cr0 & cr0::EM) && c.features.amd ? vec::UD : vec::NM);
  return false;
}

/// AMD's fast FXSAVE leaves the XMM registers out in ring 0.
bool fast_fxsr(const Context& c) { return (c.s.efer & efer::FFXSR) && c.code64 && c.cpl == 0; }

/// FXSAVE m512   0F AE /0. Bytes 416..511, and XMM8..15's outside 64-bit mode, are left alone.
Exec fxsave(Context& c, const DecodedInsn& insn) {
  if (!fxsr_available(c)) return Exec::Stop;
  u64 linear;
  if (!locate(c, insn, 512, true, 16, &linear) || !c.mmu.check_write(linear, 512, segment_of(insn))) return Exec::Stop;
  u8 image[416];
  save_control(c, insn.opsize == 8, image);
  put<u32>(image + 24, c.s.xsave.mxcsr());
  put<u32>(image + 28, mxcsr_mask(c));
  save_st(c, image + 32);
  std::memcpy(image + 160, c.s.xsave.xmm(0), 256);
  const unsigned size = fast_fxsr(c) ? 160 : 160 + 16 * registers(c);
  return c.mmu.write_bytes(linear, image, size, segment_of(insn)) ? Exec::Next : Exec::Stop;
}

/// FXRSTOR m512   0F AE /1. #GP(0) for reserved MXCSR bits.
Exec fxrstor(Context& c, const DecodedInsn& insn) {
  if (!fxsr_available(c)) return Exec::Stop;
  u64 linear;
  u8 image[512];
  if (!locate(c, insn, 512, false, 16, &linear) || !c.mmu.read_bytes(linear, image, 512, segment_of(insn))) return Exec::Stop;
  const u32 mxcsr = get<u32>(image + 24);
  if (mxcsr & ~mxcsr_mask(c)) return c.gp0();
  load_control(c, insn.opsize == 8, image);
  load_st(c, image + 32);
  c.s.xsave.mxcsr() = mxcsr;
  if (!fast_fxsr(c)) std::memcpy(c.s.xsave.xmm(0), image + 160, 16 * registers(c));
  return Exec::Next;
}

// ---- LDMXCSR, STMXCSR ----

bool mxcsr_available(Context& c, const DecodedInsn& insn) { return insn.has(kVex) ? avx_available(c) : sse_available(c); }

/// LDMXCSR m32   0F AE /2, VEX.LZ.0F.WIG AE /2. #GP(0) for reserved bits.
Exec ldmxcsr(Context& c, const DecodedInsn& insn) {
  if (!mxcsr_available(c, insn)) return Exec::Stop;
  u64 linear;
  u32 value;
  if (!locate(c, insn, 4, false, 1, &linear) || !c.mmu.read(linear, &value, segment_of(insn))) return Exec::Stop;
  if (value & ~mxcsr_mask(c)) return c.gp0();
  c.s.xsave.mxcsr() = value;
  return Exec::Next;
}

/// STMXCSR m32   0F AE /3, VEX.LZ.0F.WIG AE /3.
Exec stmxcsr(Context& c, const DecodedInsn& insn) {
  if (!mxcsr_available(c, insn)) return Exec::Stop;
  u64 linear;
  if (!locate(c, insn, 4, true, 1, &linear)) return Exec::Stop;
  return c.mmu.write(linear, c.s.xsave.mxcsr(), segment_of(insn)) ? Exec::Next : Exec::Stop;
}

// ---- the XSAVE family ----
// State components x87, SSE, AVX and AVX-512's three. No supervisor components exist, so XSAVES is XSAVEC at CPL 0.

using Components = std::array<XstateComponent, 4>;

/// Where a component stands on the host. Intel's and AMD's processors do not agree on AVX-512's.
Components host_components() {
  Components all{{{2, 256, XsaveArea::kYmmHigh, XsaveArea::kYmmHigh},
                  {5, 64, XsaveArea::kOpmask, XsaveArea::kOpmask},
                  {6, 512, XsaveArea::kZmmHigh, XsaveArea::kZmmHigh},
                  {7, 1024, XsaveArea::kHi16, XsaveArea::kHi16}}};
  for (XstateComponent& x : all) {
    u32 a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(0xd, x.number, &a, &b, &c, &d) == 0 || a != x.size) continue;
    if (b >= 576 && b + a <= XsaveArea::kSize) x.standard = static_cast<u16>(b);
  }
  return all;
}
const Components kComponents = host_components();

/// The component's place in an area with these components. None needs alignment in the compacted format.
u32 place_of(const XstateComponent& x, u64 components, bool compact) {
  if (!compact) return x.standard;
  u32 at = 576;
  for (const XstateComponent& y : kComponents)
    if (y.number < x.number && (components >> y.number & 1)) at += y.size;
  return at;
}

/// Bytes of the component that this mode's registers have: eight outside 64-bit mode, and none of ZMM16..31.
u32 size_in_mode(const Context& c, const XstateComponent& x) {
  if (c.code64 || x.number == 5) return x.size;
  return x.number == 7 ? 0 : x.size / 2;
}

u64 requested(const Context& c) {
  return ((c.s.gpr[RDX] & 0xffffffff) << 32 | (c.s.gpr[RAX] & 0xffffffff)) & c.s.xcr0;
}

enum class Save { Plain, Opt, Compact, Supervisor };

/// XSAVE 0F AE /4, XSAVEOPT 0F AE /6, XSAVEC 0F C7 /4, XSAVES 0F C7 /5.
/// Init optimisation: all but XSAVE leave out components in their initial configuration. There is no
/// modified optimisation.
/// Faults: the whole area is checked before its first byte is written.
template <Save Kind>
Exec xsave(Context& c, const DecodedInsn& insn) {
  if (!xstate_available(c, 0)) return Exec::Stop;
  if (Kind == Save::Supervisor && c.cpl != 0) return c.gp0();
  constexpr bool compact = Kind == Save::Compact || Kind == Save::Supervisor;
  const u64 rfbm = requested(c);
  const u64 in_use = xstate_in_use(c.s.xsave);
  const unsigned size = xstate_size(rfbm, compact);
  const Seg seg = segment_of(insn);
  u64 linear;
  if (!locate(c, insn, size, true, 64, &linear) || !c.mmu.check_write(linear, size, seg)) return Exec::Stop;

  u8 header[16];
  u64 save = rfbm & in_use;
  if (compact) {
    put<u64>(header, save);
    put<u64>(header + 8, rfbm | kCompacted);
  } else {
    u64 old;
    if (!c.mmu.read(linear + XsaveArea::kHeader, &old, seg)) return Exec::Stop;
    put<u64>(header, (old & ~rfbm) | save);
    if (Kind == Save::Plain) save = rfbm;
  }

  if (save & kX87) {
    u8 image[160];
    save_control(c, insn.opsize == 8, image);
    save_st(c, image + 32);
    if (!c.mmu.write_bytes(linear, image, 24, seg) || !c.mmu.write_bytes(linear + 32, image + 32, 128, seg)) return Exec::Stop;
  }
  if (compact ? (save & kSse) != 0 : (rfbm & (kSse | kAvx)) != 0) {
    u8 mxcsr[8];
    put<u32>(mxcsr, c.s.xsave.mxcsr());
    put<u32>(mxcsr + 4, mxcsr_mask(c));
    if (!c.mmu.write_bytes(linear + 24, mxcsr, 8, seg)) return Exec::Stop;
  }
  if ((save & kSse) && !c.mmu.write_bytes(linear + XsaveArea::kXmm, c.s.xsave.xmm(0), 16 * registers(c), seg)) return Exec::Stop;
  for (const XstateComponent& x : kComponents) {
    const u32 bytes = size_in_mode(c, x);
    if (!(save >> x.number & 1) || bytes == 0) continue;
    if (!c.mmu.write_bytes(linear + place_of(x, rfbm, compact), c.s.xsave.bytes + x.in_area, bytes, seg)) return Exec::Stop;
  }
  return c.mmu.write_bytes(linear + XsaveArea::kHeader, header, compact ? 16 : 8, seg) ? Exec::Next : Exec::Stop;
}

/// XRSTOR 0F AE /5, XRSTORS 0F C7 /3.
/// Faults: #GP(0) for a header or MXCSR with reserved bits; nothing is loaded before the last fault.
template <bool Supervisor>
Exec xrstor(Context& c, const DecodedInsn& insn) {
  if (!xstate_available(c, 0)) return Exec::Stop;
  if (Supervisor && c.cpl != 0) return c.gp0();
  const u64 rfbm = requested(c);
  const Seg seg = segment_of(insn);
  u64 linear;
  u8 image[XsaveArea::kSize];
  if (!locate(c, insn, 576, false, 64, &linear) || !c.mmu.read_bytes(linear, image, 576, seg)) return Exec::Stop;
  const u64 bv = get<u64>(image + XsaveArea::kHeader), comp = get<u64>(image + XsaveArea::kHeader + 8);
  const bool compact = comp & kCompacted;
  if (compact || Supervisor) {
    if (!compact || !(c.features[Feature::Xsavec] || c.features[Feature::Xsaves])) return c.gp0();
    if (((comp & ~kCompacted) & ~c.s.xcr0) || (bv & ~(comp & ~kCompacted))) return c.gp0();
    if (!all_zero(image + XsaveArea::kHeader + 16, 48)) return c.gp0();
  } else {
    if ((bv & ~c.s.xcr0) || !all_zero(image + XsaveArea::kHeader + 8, 16)) return c.gp0();
  }
  const u64 load = rfbm & bv, init = rfbm & ~bv;
  // The compacted form has MXCSR in the SSE component; the standard form loads it whenever SSE or AVX is asked for.
  const bool load_mxcsr = compact ? (load & kSse) != 0 : (rfbm & (kSse | kAvx)) != 0;
  const u32 mxcsr = get<u32>(image + 24);
  if (load_mxcsr && (mxcsr & ~mxcsr_mask(c))) return c.gp0();
  const u64 laid_out = compact ? comp & ~kCompacted : load;
  for (const XstateComponent& x : kComponents) {
    if (!(load >> x.number & 1)) continue;
    const u32 at = place_of(x, laid_out, compact);
    u64 whole;
    if (!c.linear(seg, c.effective_address(insn), at + x.size, false, &whole) ||
        !c.mmu.read_bytes(linear + at, image + at, x.size, seg))
      return Exec::Stop;
  }

  if (load & kX87) {
    load_control(c, insn.opsize == 8, image);
    load_st(c, image + 32);
  } else if (init & kX87) {
    init_x87(c.s.xsave);
  }
  const unsigned bytes = 16 * registers(c);
  if (load_mxcsr) {
    c.s.xsave.mxcsr() = mxcsr;
  } else if (compact && (init & kSse)) {
    c.s.xsave.mxcsr() = kMxcsrInit;
  }
  if (load & kSse) {
    std::memcpy(c.s.xsave.xmm(0), image + XsaveArea::kXmm, bytes);
  } else if (init & kSse) {
    std::memset(c.s.xsave.xmm(0), 0, bytes);
  }
  for (const XstateComponent& x : kComponents) {
    u8* const at = c.s.xsave.bytes + x.in_area;
    const u32 size = size_in_mode(c, x);
    if (load >> x.number & 1) {
      std::memcpy(at, image + place_of(x, laid_out, compact), size);
    } else if (init >> x.number & 1) {
      std::memset(at, 0, size);
    }
  }
  return Exec::Next;
}

}  // namespace

void normalise_x87(XsaveArea& area) {
  area.fcw() = static_cast<u16>((area.fcw() & 0x1f7f) | 0x40);
  const bool pending = area.fsw() & ~area.fcw() & 0x3f;
  area.fsw() = static_cast<u16>((area.fsw() & 0x7f7f) | (pending ? 0x8080 : 0));
}

void sanitise_xsave(XsaveArea& area, u32 mxcsr_mask) {
  normalise_x87(area);
  area.mxcsr() &= mxcsr_mask;
}

u64 xstate_in_use(const XsaveArea& area) {
  u64 in_use = 0;
  static constexpr u8 kZero[1024] = {};
  const bool control_init = get<u16>(area.bytes) == 0x37f && all_zero(area.bytes + 2, 22);
  if (!control_init || std::memcmp(area.bytes + 32, kZero, 128) != 0) in_use |= kX87;
  if (get<u32>(area.bytes + 24) != kMxcsrInit || std::memcmp(area.bytes + XsaveArea::kXmm, kZero, 256) != 0) in_use |= kSse;
  for (const XstateComponent& x : kComponents)
    if (std::memcmp(area.bytes + x.in_area, kZero, x.size) != 0) in_use |= u64{1} << x.number;
  return in_use;
}

std::span<const XstateComponent> xstate_components() { return kComponents; }

u32 xstate_size(u64 components, bool compact) {
  u32 size = 576;
  for (const XstateComponent& x : kComponents) {
    if (!(components >> x.number & 1)) continue;
    const u32 end = place_of(x, components, compact) + x.size;
    if (end > size) size = end;
  }
  return size;
}

Handler select_xstate(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Fxsave: return fxsave;
    case Op::Fxrstor: return fxrstor;
    case Op::Xsave: return xsave<Save::Plain>;
    case Op::Xsaveopt: return xsave<Save::Opt>;
    case Op::Xsavec: return xsave<Save::Compact>;
    case Op::Xsaves: return xsave<Save::Supervisor>;
    case Op::Xrstor: return xrstor<false>;
    case Op::Xrstors: return xrstor<true>;
    case Op::Ldmxcsr: return ldmxcsr;
    case Op::Stmxcsr: return stmxcsr;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
