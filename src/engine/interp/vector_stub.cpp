#include "engine/interp/vector_stub.hpp"

#include <cstddef>
#include <cstring>
#include <initializer_list>

#include "engine/decode/decoder.hpp"

namespace ring3::engine {
namespace {

static_assert(offsetof(StubFrame, host_mxcsr) == kFrameMxcsr && offsetof(StubFrame, host_fcw) == kFrameFcw &&
              offsetof(StubFrame, flags) == kFrameFlags);

// ---- opcode sets ----

struct OpcodeSet {
  u64 bits[4] = {};
  constexpr OpcodeSet(std::initializer_list<std::array<u8, 2>> ranges) {
    for (const auto& r : ranges)
      for (unsigned i = r[0]; i <= r[1]; ++i) bits[i >> 6] |= 1ull << (i & 63);
  }
  constexpr bool has(u8 op) const { return bits[op >> 6] >> (op & 63) & 1; }
};

using R = std::array<u8, 2>;
// Left out on purpose: MASKMOV (implicit [rDI]), VMASKMOV and gathers (fault suppression), EMMS and
// VZEROUPPER, everything that is not MMX, SSE or AVX.
constexpr OpcodeSet kLegacy0F{R{0x10, 0x17}, R{0x28, 0x2f}, R{0x50, 0x76}, R{0x78, 0x79}, R{0x7c, 0x7f},
                              R{0xc2, 0xc2}, R{0xc4, 0xc6}, R{0xd0, 0xf6}, R{0xf8, 0xfe}};
constexpr OpcodeSet kLegacy0F38{R{0x00, 0x0b}, R{0x10, 0x10}, R{0x14, 0x15}, R{0x17, 0x17}, R{0x1c, 0x1e},
                                R{0x20, 0x25}, R{0x28, 0x2b}, R{0x30, 0x35}, R{0x37, 0x41}, R{0xc8, 0xcd},
                                R{0xcf, 0xcf}, R{0xdb, 0xdf}};
constexpr OpcodeSet kLegacy0F3A{R{0x08, 0x0f}, R{0x14, 0x17}, R{0x20, 0x22}, R{0x40, 0x42}, R{0x44, 0x44},
                                R{0x60, 0x63}, R{0xcc, 0xcc}, R{0xce, 0xcf}, R{0xdf, 0xdf}};
constexpr OpcodeSet kVex0F{R{0x10, 0x17}, R{0x28, 0x2f}, R{0x50, 0x76}, R{0x7c, 0x7f}, R{0xc2, 0xc2},
                           R{0xc4, 0xc6}, R{0xd0, 0xf6}, R{0xf8, 0xfe}};
constexpr OpcodeSet kVex0F38{R{0x00, 0x0f}, R{0x13, 0x13}, R{0x16, 0x1a}, R{0x1c, 0x1e}, R{0x20, 0x25},
                             R{0x28, 0x2b}, R{0x30, 0x41}, R{0x45, 0x47}, R{0x58, 0x5a}, R{0x78, 0x79},
                             R{0x96, 0x9f}, R{0xa6, 0xaf}, R{0xb6, 0xbf}, R{0xcf, 0xcf}, R{0xdb, 0xdf}};
constexpr OpcodeSet kVex0F3A{R{0x00, 0x02}, R{0x04, 0x06}, R{0x08, 0x0f}, R{0x14, 0x19}, R{0x1d, 0x1d},
                             R{0x20, 0x22}, R{0x38, 0x39}, R{0x40, 0x42}, R{0x44, 0x44}, R{0x46, 0x46},
                             R{0x4a, 0x4c}, R{0x60, 0x63}, R{0xce, 0xcf}, R{0xdf, 0xdf}};

// 2A, 2C-2F: CVT*, COMIS; 51-53: sqrt, rsqrt, rcp; 58-5F: arithmetic and conversions; 7C, 7D, D0: horizontal,
// ADDSUB; C2: CMP; E6: CVT*.
constexpr OpcodeSet kMxcsr0F{R{0x2a, 0x2a}, R{0x2c, 0x2f}, R{0x51, 0x53}, R{0x58, 0x5f}, R{0x7c, 0x7d},
                             R{0xc2, 0xc2}, R{0xd0, 0xd0}, R{0xe6, 0xe6}};
constexpr OpcodeSet kMxcsr0F38{R{0x13, 0x13}, R{0x96, 0x9f}, R{0xa6, 0xaf}, R{0xb6, 0xbf}};
constexpr OpcodeSet kMxcsr0F3A{R{0x08, 0x0b}, R{0x1d, 0x1d}, R{0x40, 0x41}};

const OpcodeSet* allowed(bool vex, unsigned map) {
  switch (map) {
    case 1: return vex ? &kVex0F : &kLegacy0F;
    case 2: return vex ? &kVex0F38 : &kLegacy0F38;
    case 3: return vex ? &kVex0F3A : &kLegacy0F3A;
    default: return nullptr;
  }
}

// ---- reading the guest's bytes ----

struct Parsed {
  bool vex = false;
  unsigned map = 0;      ///< 0: one-byte opcodes
  u8 pp = 0;             ///< 0 none, 1 66h, 2 F3h, 3 F2h
  bool w = false, r = false, b = false;  ///< as values, not inverted
  u8 vvvv = 15;          ///< as encoded (inverted)
  bool l = false;
  u8 opcode = 0, modrm = 0;
  u8 imm[4] = {};
  u8 imm_size = 0;
  bool memory() const { return modrm < 0xc0; }
  u8 reg() const { return modrm >> 3 & 7; }
};

bool parse(const DecodedInsn& insn, CodeMode mode, Parsed* p) {
  const bool m64 = mode == CodeMode::Bits64;
  const unsigned n = insn.length <= 15 ? insn.length : 15;
  unsigned i = 0;
  u8 rex = 0;
  bool p66 = false;
  u8 rep = 0;
  for (; i < n; ++i) {
    const u8 c = insn.raw[i];
    if (c == 0x66) {
      p66 = true;
    } else if (c == 0xf2 || c == 0xf3) {
      rep = c;
    } else if (c == 0x26 || c == 0x2e || c == 0x36 || c == 0x3e || c == 0x64 || c == 0x65 || c == 0x67) {
    } else if (m64 && (c & 0xf0) == 0x40) {
      rex = c;
      continue;
    } else {
      break;
    }
    rex = 0;  // a REX prefix counts only right before the opcode
  }
  const auto next = [&](u8* out) {
    if (i >= n) return false;
    *out = insn.raw[i++];
    return true;
  };
  u8 c = 0;
  if (!next(&c)) return false;
  p->vex = insn.has(kVex);
  if (p->vex) {
    u8 v1 = 0, v2 = 0;
    if (c == 0xc4) {
      if (!next(&v1) || !next(&v2)) return false;
      p->map = v1 & 0x1f;
      p->r = !(v1 & 0x80);
      p->b = !(v1 & 0x20);
      p->w = v2 & 0x80;
    } else if (c == 0xc5) {
      if (!next(&v2)) return false;
      p->map = 1;
      p->r = !(v2 & 0x80);
    } else {
      return false;
    }
    p->vvvv = v2 >> 3 & 15;
    p->l = v2 & 4;
    p->pp = v2 & 3;
    if (!m64) {
      p->r = p->b = false;
      p->vvvv |= 8;
    }
    if (!next(&p->opcode)) return false;
  } else {
    p->r = rex & 4;
    p->b = rex & 1;
    p->w = rex & 8;
    p->pp = rep == 0xf3 ? 2 : rep == 0xf2 ? 3 : p66 ? 1 : 0;
    if (c == 0x0f) {
      p->map = 1;
      if (!next(&c)) return false;
      if (c == 0x38 || c == 0x3a) {
        p->map = c == 0x38 ? 2 : 3;
        if (!next(&c)) return false;
      }
    }
    p->opcode = c;
  }
  if (insn.op == Op::Emms) return true;
  if (!next(&p->modrm)) return false;
  const u8 mod = p->modrm >> 6, rm = p->modrm & 7;
  if (mod != 3) {
    if (insn.addrsize == 2) {
      i += mod == 1 ? 1 : mod == 2 || rm == 6 ? 2 : 0;
    } else {
      u8 base = rm;
      if (rm == 4) {
        if (!next(&base)) return false;
        base &= 7;
      }
      i += mod == 1 ? 1 : mod == 2 || base == 5 ? 4 : 0;
    }
  }
  if (i > n || n - i > sizeof p->imm) return false;
  while (i < n) p->imm[p->imm_size++] = insn.raw[i++];
  return true;
}

// ---- writing ----

class Emitter {
 public:
  explicit Emitter(StubCode* out) : out_(out) {}
  void bytes(std::initializer_list<u8> list) {
    for (u8 b : list) byte(b);
  }
  void byte(u8 b) {
    if (out_->size < out_->bytes.size()) {
      out_->bytes[out_->size++] = b;
    } else {
      overflow_ = true;
    }
  }
  void imm32(u32 v) {
    for (int i = 0; i < 4; ++i) byte(static_cast<u8>(v >> (8 * i)));
  }
  bool overflow() const { return overflow_; }

  // [rsi + offset] with an opcode extension or register
  void frame_op(std::initializer_list<u8> opcode, unsigned reg, u32 offset) {
    bytes(opcode);
    byte(static_cast<u8>(0x86 | reg << 3));
    imm32(offset);
  }
  void save_host_mxcsr() { frame_op({0x0f, 0xae}, 3, kFrameMxcsr); }
  void load_host_mxcsr() { frame_op({0x0f, 0xae}, 2, kFrameMxcsr); }
  void load_guest_mxcsr() { bytes({0x0f, 0xae, 0x57, 24}); }
  void save_guest_mxcsr() { bytes({0x0f, 0xae, 0x5f, 24}); }
  void fault_class(u32 bits) {  // mov r10d, bits: what the fault exit must undo
    bytes({0x41, 0xba});
    imm32(bits);
  }
  void load_gpr(unsigned host, unsigned guest) { bytes({0x49, 0x8b, modrm_r9(host), disp(guest)}); }
  void store_gpr(unsigned host, unsigned guest) { bytes({0x49, 0x89, modrm_r9(host), disp(guest)}); }
  void load_flags() {
    frame_op({0x8b}, 0, kFrameFlags);   // mov eax, flags
    bytes({0x04, 0x7f, 0x9e});          // add al, 7Fh (OF); sahf
  }
  void save_flags() {
    bytes({0x9f, 0x0f, 0x90, 0xc0});    // lahf; seto al
    frame_op({0x89}, 0, kFrameFlags);
  }
  void load_xmm(unsigned n) { sse_move(0x10, n); }
  void store_xmm(unsigned n) { sse_move(0x11, n); }
  void vload(unsigned n, bool high) {
    vex(1, n, 15, false, 0, 0x10, XsaveArea::kXmm + 16 * n);
    if (high) {
      vex(3, n, ~n & 15, true, 1, 0x18, XsaveArea::kYmmHigh + 16 * n);  // vinsertf128 n, n, [..], 1
      byte(1);
    }
  }
  void vstore(unsigned n) {
    vex(1, n, 15, false, 0, 0x11, XsaveArea::kXmm + 16 * n);
    vex(3, n, 15, true, 1, 0x19, XsaveArea::kYmmHigh + 16 * n);  // vextractf128 [..], n, 1
    byte(1);
  }
  void load_mm(unsigned n) {
    bytes({0x0f, 0x6f, static_cast<u8>(0x87 | n << 3)});
    imm32(32 + 16 * n);
  }
  void store_mm(unsigned n) {  // a write to MM n sets the exponent field to ones
    bytes({0x0f, 0x7f, static_cast<u8>(0x87 | n << 3)});
    imm32(32 + 16 * n);
    bytes({0x66, 0xc7, 0x87});
    imm32(32 + 16 * n + 8);
    bytes({0xff, 0xff});
  }
  void emms() { bytes({0x0f, 0x77}); }
  void vzeroupper() { bytes({0xc5, 0xf8, 0x77}); }
  void ret_ok() { bytes({0x31, 0xc0, 0xc3}); }

 private:
  static u8 modrm_r9(unsigned reg) { return static_cast<u8>(0x41 | reg << 3); }
  static u8 disp(unsigned guest) { return static_cast<u8>(guest * 8); }
  void sse_move(u8 opcode, unsigned n) {
    if (n >= 8) byte(0x44);
    bytes({0x0f, opcode, static_cast<u8>(0x87 | (n & 7) << 3)});
    imm32(XsaveArea::kXmm + 16 * n);
  }
  void vex(u8 map, unsigned reg, unsigned vvvv, bool l, u8 pp, u8 opcode, u32 offset) {
    bytes({0xc4, static_cast<u8>((reg < 8 ? 0x80 : 0) | 0x60 | map),
           static_cast<u8>(vvvv << 3 | (l ? 4 : 0) | pp), opcode, static_cast<u8>(0x87 | (reg & 7) << 3)});
    imm32(offset);
  }
  StubCode* out_;
  bool overflow_ = false;
};


// ---- the instruction itself ----

/// In which ModRM field a general register stands, for instructions that have one.
bool gpr_in_reg_field(unsigned map, u8 opcode) {
  return map == 1 && (opcode == 0x2c || opcode == 0x2d || opcode == 0x50 || opcode == 0xc5 || opcode == 0xd7);
}
bool gpr_in_rm_field(unsigned map, u8 opcode) {
  if (map == 1) return opcode == 0x2a || opcode == 0x6e || opcode == 0x7e || opcode == 0xc4;
  return map == 3 && ((opcode >= 0x14 && opcode <= 0x17) || opcode == 0x20 || opcode == 0x22);
}
/// VEX.W chooses the width of a general register or its memory form; ignored outside 64-bit mode.
bool w_is_gpr_width(unsigned map, u8 opcode) {
  return gpr_in_rm_field(map, opcode) || (map == 1 && (opcode == 0x2c || opcode == 0x2d));
}

bool rebuild(const DecodedInsn& insn, const Parsed& p, CodeMode mode, StubCode* out) {
  const bool m64 = mode == CodeMode::Bits64;
  bool gpr = false;
  for (const Operand& o : insn.operands) {
    if (o.kind == OperandKind::Gpr) gpr = true;
    if (o.kind == OperandKind::GprHigh) return false;
  }
  bool r = p.r, b = p.b, w = p.w;
  u8 modrm = p.modrm;
  if (gpr && insn.op != Op::HostX87) {
    if (gpr_in_reg_field(p.map, p.opcode)) {
      modrm &= 0xc7;  // RAX
      r = false;
    } else if (gpr_in_rm_field(p.map, p.opcode) && !p.memory()) {
      modrm &= 0xf8;
      b = false;
    } else {
      return false;
    }
  }
  if (p.memory()) {
    modrm = static_cast<u8>((modrm & 0x38) | 6);  // [rsi]
    b = false;
  }
  // PCMPESTRI and PCMPESTRM take their lengths from RAX and RDX under W.
  const bool explicit_length = p.map == 3 && (p.opcode == 0x60 || p.opcode == 0x61);
  if (!m64 && (!p.vex || explicit_length || w_is_gpr_width(p.map, p.opcode))) w = false;

  auto& code = out->host_insn;
  u8& n = out->host_insn_size;
  const auto put = [&](u8 c) { code[n++] = c; };
  if (p.vex) {
    put(0xc4);
    put(static_cast<u8>((r ? 0 : 0x80) | 0x40 | (b ? 0 : 0x20) | p.map));
    put(static_cast<u8>((w ? 0x80 : 0) | p.vvvv << 3 | (p.l ? 4 : 0) | p.pp));
  } else {
    if (p.map != 0) {
      if (p.pp) put(p.pp == 1 ? 0x66 : p.pp == 2 ? 0xf3 : 0xf2);
      const u8 rex = static_cast<u8>((w ? 8 : 0) | (r ? 4 : 0) | (b ? 1 : 0));
      if (rex) put(0x40 | rex);
      put(0x0f);
      if (p.map == 2) put(0x38);
      if (p.map == 3) put(0x3a);
    }
  }
  put(p.opcode);
  if (insn.op != Op::Emms) put(modrm);
  const bool is4 = p.vex && p.map == 3 && p.opcode >= 0x4a && p.opcode <= 0x4c;  // a register in imm[7:4]
  for (unsigned i = 0; i < p.imm_size; ++i) put(is4 && !m64 ? p.imm[i] & 0x7f : p.imm[i]);
  return true;
}

/// The rebuilt bytes, read as host code, say what the guest's said and reach no memory but [RSI].
bool verify(const DecodedInsn& insn, const StubCode& stub) {
  DecodedInsn host;
  if (decode(stub.host_insn.data(), stub.host_insn_size, CodeMode::Bits64, false, false, &host) != DecodeResult::Ok)
    return false;
  if (host.op != insn.op || host.length != stub.host_insn_size || host.has(kLock)) return false;
  for (unsigned i = 0; i < 4; ++i) {
    const Operand &g = insn.operands[i], &h = host.operands[i];
    if (g.kind != h.kind) return false;
    switch (g.kind) {
      case OperandKind::Vec: case OperandKind::Mmx: case OperandKind::St:
        if (g.reg != h.reg || g.size != h.size) return false;
        break;
      case OperandKind::Gpr:
        if (h.reg != RAX) return false;
        break;
      case OperandKind::Mem:
        if (g.size != h.size && insn.op != Op::HostX87) return false;  // x87 environments vary with the mode
        break;
      default: break;
    }
  }
  if (host.has(kHasMem) &&
      (host.mem.base != RSI || host.mem.index != kNoReg || host.disp != 0 || host.addrsize != 8 || host.mem.seg != DS))
    return false;
  return host.has(kHasMem) == insn.has(kHasMem);
}

u16 x87_environment_size(u8 opcode, u8 reg, u8 opsize) {
  if (opcode == 0xd9 && (reg == 4 || reg == 6)) return opsize == 2 ? 14 : 28;
  if (opcode == 0xdd && (reg == 4 || reg == 6)) return opsize == 2 ? 94 : 108;
  return 0;
}

void describe_x87(const DecodedInsn& insn, const Parsed& p, StubCode* out) {
  out->fop = static_cast<u16>((p.opcode & 7) << 8 | p.modrm);
  const u8 reg = p.reg();
  if (p.memory()) {
    const bool d9 = p.opcode == 0xd9, dd = p.opcode == 0xdd;
    if ((d9 && reg >= 4) || (dd && (reg == 4 || reg >= 6))) out->flags |= kStubX87Control;
    if ((d9 && reg >= 6) || (dd && reg >= 6)) out->flags |= kStubX87NoWait;
    if (const u16 size = x87_environment_size(p.opcode, reg, insn.opsize)) out->mem_size = size;
    return;
  }
  if (p.opcode == 0xdb && (p.modrm & 0xe0) == 0xe0 && p.modrm <= 0xe7)  // FNENI FNDISI FNCLEX FNINIT FNSETPM
    out->flags |= kStubX87Control | kStubX87NoWait;
  if (p.opcode == 0xdf && p.modrm == 0xe0) out->flags |= kStubX87Control | kStubX87NoWait;  // FNSTSW AX
  const bool fcmov = (p.opcode == 0xda || p.opcode == 0xdb) && p.modrm < 0xe0;
  const bool fcomi = (p.opcode == 0xdb || p.opcode == 0xdf) && p.modrm >= 0xe8 && p.modrm <= 0xf7;
  if (fcmov || fcomi) out->flags |= kStubReadsFlags;
  if (fcomi) out->flags |= kStubWritesFlags;
}

}  // namespace

bool uses_mxcsr(unsigned map, u8 opcode) {
  return map == 1 ? kMxcsr0F.has(opcode) : map == 2 ? kMxcsr0F38.has(opcode) : map == 3 && kMxcsr0F3A.has(opcode);
}

bool runs_on_host(bool vex, unsigned map, u8 opcode) {
  const OpcodeSet* set = allowed(vex, map);
  return set != nullptr && set->has(opcode);
}

std::optional<StubCode> make_stub(const DecodedInsn& insn, CodeMode mode, bool avx) {
  StubCode out;
  Parsed p;
  if (insn.op == Op::HostVec && insn.has(kEvex | kOpmask)) return make_evex_stub(insn, mode);
  if (insn.has(kLock) || !parse(insn, mode, &p)) return std::nullopt;
  bool x87 = false;
  switch (insn.op) {
    case Op::HostX87:
      if (p.vex || p.map != 0 || p.opcode < 0xd8 || p.opcode > 0xdf || p.imm_size != 0) return std::nullopt;
      x87 = true;
      break;
    case Op::Emms:
      if (p.vex || p.map != 1 || p.opcode != 0x77) return std::nullopt;
      p.pp = 0;
      p.w = p.r = p.b = false;
      p.imm_size = 0;
      x87 = true;
      break;
    case Op::HostMmx:
    case Op::HostVec: {
      const OpcodeSet* set = allowed(p.vex, p.map);
      if (set == nullptr || !set->has(p.opcode) || (p.vex && !avx)) return std::nullopt;
      x87 = insn.op == Op::HostMmx;
      if (x87 && p.vex) return std::nullopt;
      break;
    }
    default:
      return std::nullopt;
  }
  if (p.memory() != insn.has(kHasMem) && insn.op != Op::Emms) return std::nullopt;
  if (!rebuild(insn, p, mode, &out) || !verify(insn, out)) return std::nullopt;

  // What it reads and writes.
  u32 loads = 0, stores = 0, mm_loads = 0, mm_stores = 0;
  unsigned gpr = 0;
  bool gpr_read = false, gpr_write = false;
  for (const Operand& o : insn.operands) {
    switch (o.kind) {
      case OperandKind::Vec:
        if (!p.vex || (o.access & kRead)) loads |= 1u << (o.reg & 15);
        if (o.access & kWrite) stores |= 1u << (o.reg & 15);
        out.flags |= kStubTouchesXmm;
        break;
      case OperandKind::Mmx:
        mm_loads |= 1u << (o.reg & 7);
        if (o.access & kWrite) mm_stores |= 1u << (o.reg & 7);
        break;
      case OperandKind::Gpr:
        gpr = o.reg & 15;
        gpr_read = o.access & kRead;
        gpr_write = o.access & kWrite;
        break;
      case OperandKind::Mem:
        out.mem_size = o.size;
        if (o.access & kRead) out.flags |= kStubMemRead;
        if (o.access & kWrite) out.flags |= kStubMemWrite;
        break;
      default: break;
    }
  }
  if (insn.op == Op::HostX87) describe_x87(insn, p, &out);
  if (insn.has(kHasMem) && (out.mem_size == 0 || out.mem_size > sizeof StubFrame::buffer ||
                            !(out.flags & (kStubMemRead | kStubMemWrite))))
    return std::nullopt;
  if (insn.has(kAligned) || (insn.op == Op::HostMmx && out.mem_size == 16)) out.flags |= kStubAligned;
  bool pcmp = false;
  if (insn.op == Op::HostVec) {
    if (!p.vex && p.map == 2 && (p.opcode == 0x10 || p.opcode == 0x14 || p.opcode == 0x15 || p.opcode == 0xcb)) loads |= 1;
    pcmp = p.map == 3 && p.opcode >= 0x60 && p.opcode <= 0x63;
    if (pcmp && !(p.opcode & 1)) stores |= 1;  // PCMPxSTRM: XMM0
    if (pcmp && !(p.opcode & 1) && !p.vex) loads |= 1;
    const bool test = p.map == 2 && (p.opcode == 0x17 || (p.vex && (p.opcode == 0x0e || p.opcode == 0x0f)));
    const bool comis = p.map == 1 && (p.opcode == 0x2e || p.opcode == 0x2f);
    if (pcmp || test || comis) out.flags |= kStubWritesFlags;
    if (uses_mxcsr(p.map, p.opcode)) out.flags |= kStubMxcsr;
  }

  if (p.vex) out.stores = static_cast<u16>(stores);

  // CVTPS2PI and its like belong to SSE also when their other operand is in memory.
  if (insn.op == Op::HostMmx && uses_mxcsr(p.map, p.opcode)) out.flags |= kStubTouchesXmm;
  // Without an XMM register beside them, the MMX registers alone are moved.
  const bool mmx_alone = insn.op == Op::HostMmx && !(out.flags & kStubTouchesXmm);
  if (mmx_alone) x87 = false;
  if (x87) out.flags |= kStubX87;

  Emitter e(&out);
  const bool mxcsr = out.flags & kStubMxcsr;
  const bool uses_gpr = gpr_read || gpr_write || pcmp;
  if (x87) {
    e.save_host_mxcsr();
    e.frame_op({0xd9}, 7, kFrameFcw);  // fnstcw
  } else if (mxcsr) {
    e.save_host_mxcsr();
    e.load_guest_mxcsr();
  }
  e.fault_class(x87 ? kUndoX87 | kUndoMxcsr : mxcsr ? kUndoMxcsr : mmx_alone ? kUndoX87 : 0);
  if (uses_gpr) e.bytes({0x49, 0x89, 0xd1});  // mov r9, rdx
  if (gpr_read) e.load_gpr(RAX, gpr);
  if (pcmp && p.opcode <= 0x61) {
    e.load_gpr(RAX, RAX);
    e.load_gpr(RDX, RDX);
  }
  if (x87) {
    e.bytes({0x48, 0x0f, 0xae, 0x0f});  // fxrstor64 [rdi]
    if (out.flags & kStubReadsFlags) e.load_flags();
  } else {
    for (unsigned n = 0; n < 16; ++n) {
      if (!(loads >> n & 1)) continue;
      if (p.vex) {
        e.vload(n, p.l);
      } else {
        e.load_xmm(n);
      }
    }
    for (unsigned n = 0; n < 8; ++n)
      if (mm_loads >> n & 1) e.load_mm(n);
  }
  for (unsigned i = 0; i < out.host_insn_size; ++i) e.byte(out.host_insn[i]);
  if (out.flags & kStubWritesFlags) e.save_flags();
  if (gpr_write) e.store_gpr(RAX, gpr);
  if (pcmp && (p.opcode & 1)) e.store_gpr(RCX, RCX);
  if (x87) {
    e.bytes({0x48, 0x0f, 0xae, 0x07});  // fxsave64 [rdi]
    e.bytes({0xdb, 0xe3});              // fninit
    e.frame_op({0xd9}, 5, kFrameFcw);   // fldcw
    e.load_host_mxcsr();
  } else {
    for (unsigned n = 0; n < 16; ++n) {
      if (!(stores >> n & 1)) continue;
      if (p.vex) {
        e.vstore(n);
      } else {
        e.store_xmm(n);
      }
    }
    if (mxcsr) {
      e.save_guest_mxcsr();
      e.load_host_mxcsr();
    }
    for (unsigned n = 0; n < 8; ++n)
      if (mm_stores >> n & 1) e.store_mm(n);
    if (mmx_alone) e.emms();
    if (p.vex) e.vzeroupper();
  }
  e.ret_ok();
  if (e.overflow()) return std::nullopt;
  return out;
}

StubCode make_fault_exit(bool avx, unsigned* exit_other) {
  StubCode out;
  Emitter e(&out);
  e.save_guest_mxcsr();  // the exception's flags are set in it
  *exit_other = out.size;
  e.bytes({0x41, 0xf6, 0xc2, kUndoX87});  // test r10b, 1
  e.bytes({0x74, 8});                     // jz
  e.bytes({0xdb, 0xe3});                  // fninit
  e.frame_op({0xd9}, 5, kFrameFcw);       // fldcw
  e.bytes({0x41, 0xf6, 0xc2, kUndoMxcsr});
  e.bytes({0x74, 7});
  e.load_host_mxcsr();
  if (avx) e.vzeroupper();
  e.byte(0xc3);
  return out;
}

}  // namespace ring3::engine
