#include <initializer_list>

#include "engine/decode/decoder.hpp"
#include "engine/interp/vector_stub.hpp"

/// Stubs of AVX-512: EVEX instructions, and the VEX ones on opmask registers. As vector_stub.cpp's; every register that the
/// instruction names is loaded whole, since masks merge, and what it writes is stored whole.
///
/// Spec: Intel SDM vol. 2, 2.7 (EVEX), chapter 15 of vol. 1.
namespace ring3::engine {
namespace {

class Writer {
 public:
  explicit Writer(StubCode* out) : out_(out) {}
  bool overflow() const { return overflow_; }
  void byte(unsigned b) {
    if (out_->size < out_->bytes.size()) {
      out_->bytes[out_->size++] = static_cast<u8>(b);
    } else {
      overflow_ = true;
    }
  }
  void bytes(std::initializer_list<unsigned> list) {
    for (const unsigned b : list) byte(b);
  }
  void imm32(u32 v) {
    for (unsigned i = 0; i < 4; ++i) byte(v >> (8 * i) & 0xff);
  }
  void load(unsigned n) {
    if (n >= 16) return evex(1, 2, n, 0, 0x6f, XsaveArea::kHi16 + 64 * (n - 16));  // vmovdqu64
    vex(1, n, 0, false, 0, 0x10, XsaveArea::kXmm + 16 * n);                        // vmovups
    vex(3, n, n, true, 1, 0x18, XsaveArea::kYmmHigh + 16 * n);                     // vinsertf128
    byte(1);
    evex(3, 1, n, n, 0x3a, XsaveArea::kZmmHigh + 32 * n);  // vinserti64x4
    byte(1);
  }
  void store(unsigned n) {
    if (n >= 16) return evex(1, 2, n, 0, 0x7f, XsaveArea::kHi16 + 64 * (n - 16));
    vex(1, n, 0, false, 0, 0x11, XsaveArea::kXmm + 16 * n);
    vex(3, n, 0, true, 1, 0x19, XsaveArea::kYmmHigh + 16 * n);  // vextractf128
    byte(1);
    evex(3, 1, n, 0, 0x3b, XsaveArea::kZmmHigh + 32 * n);  // vextracti64x4
    byte(1);
  }
  void load_mask(unsigned n) { kmovq(0x90, n); }
  void store_mask(unsigned n) { kmovq(0x91, n); }
  /// [rsi + offset], of the frame
  void frame(std::initializer_list<unsigned> opcode, unsigned reg, u32 offset) {
    bytes(opcode);
    byte(0x86 | reg << 3);
    imm32(offset);
  }
  void gpr(unsigned opcode, unsigned guest) { bytes({0x49, opcode, 0x41, guest * 8}); }  // rax, [r9 + 8 * guest]

 private:
  /// W1, 512 bits, [rdi + offset]
  void evex(unsigned map, unsigned pp, unsigned reg, unsigned vvvv, unsigned opcode, u32 offset) {
    bytes({0x62, (reg & 8 ? 0u : 0x80u) | 0x60 | (reg & 16 ? 0u : 0x10u) | map, 0x80 | (~vvvv & 15) << 3 | 4 | pp, 0x48, opcode,
           0x87 | (reg & 7) << 3});
    imm32(offset);
  }
  void vex(unsigned map, unsigned reg, unsigned vvvv, bool l, unsigned pp, unsigned opcode, u32 offset) {
    bytes({0xc4, (reg < 8 ? 0x80u : 0u) | 0x60 | map, (~vvvv & 15) << 3 | (l ? 4u : 0u) | pp, opcode, 0x87 | (reg & 7) << 3});
    imm32(offset);
  }
  void kmovq(unsigned opcode, unsigned n) {
    bytes({0xc4, 0xe1, 0xf8, opcode, 0x87 | n << 3});
    imm32(XsaveArea::kOpmask + 8 * n);
  }

  StubCode* out_;
  bool overflow_ = false;
};

bool is_prefix(u8 c) {
  switch (c) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x67:
      return true;
    default:
      return false;
  }
}

/// What stands behind ModRM at raw[i]: SIB and displacement are passed over, immediates taken.
bool behind_modrm(const DecodedInsn& insn, unsigned i, u8 modrm, u8* imm, u8* imm_size) {
  const unsigned n = insn.length <= 15 ? insn.length : 15;
  const u8 mod = modrm >> 6, rm = modrm & 7;
  if (mod != 3) {
    if (insn.addrsize == 2) {
      i += mod == 1 ? 1 : mod == 2 || rm == 6 ? 2 : 0;
    } else {
      u8 base = rm;
      if (rm == 4) {
        if (i >= n) return false;
        base = insn.raw[i++] & 7;
      }
      i += mod == 1 ? 1 : mod == 2 || base == 5 ? 4 : 0;
    }
  }
  if (i > n || n - i > 4) return false;
  while (i < n) imm[(*imm_size)++] = insn.raw[i++];
  return true;
}

/// VEX instructions on opmask registers.
struct OpmaskParts {
  u8 map = 0, pp = 0, vvvv = 0, opcode = 0, modrm = 0;
  bool w = false, l = false, b = false, r = false;
  u8 imm[4] = {};
  u8 imm_size = 0;
};

bool parse_opmask(const DecodedInsn& insn, CodeMode mode, OpmaskParts* p) {
  unsigned i = 0;
  while (i < 11 && is_prefix(insn.raw[i])) ++i;
  const u8 c = insn.raw[i++];
  u8 last;
  if (c == 0xc4) {
    const u8 first = insn.raw[i++];
    last = insn.raw[i++];
    p->map = first & 0x1f;
    p->r = !(first & 0x80) && mode == CodeMode::Bits64;
    p->b = !(first & 0x20) && mode == CodeMode::Bits64;
    p->w = last & 0x80;
  } else if (c == 0xc5) {
    last = insn.raw[i++];
    p->map = 1;
    p->r = !(last & 0x80) && mode == CodeMode::Bits64;
  } else {
    return false;
  }
  p->vvvv = ~(last >> 3) & 15;
  p->l = last & 4;
  p->pp = last & 3;
  if (mode != CodeMode::Bits64) p->vvvv &= 7;
  if (i + 2 > insn.length) return false;
  p->opcode = insn.raw[i++];
  p->modrm = insn.raw[i++];
  const bool known = p->map == 1 ? (p->opcode >= 0x41 && p->opcode <= 0x4b) || (p->opcode >= 0x90 && p->opcode <= 0x93) ||
                                       p->opcode == 0x98 || p->opcode == 0x99
                                 : p->map == 3 && p->opcode >= 0x30 && p->opcode <= 0x33;
  return known && behind_modrm(insn, i, p->modrm, p->imm, &p->imm_size);
}

/// The rebuilt bytes, read as host code, say what the guest's said and reach no memory but [RSI].
bool verify(const DecodedInsn& insn, const StubCode& stub) {
  DecodedInsn host;
  if (decode(stub.host_insn.data(), stub.host_insn_size, CodeMode::Bits64, false, false, &host) != DecodeResult::Ok) return false;
  if (host.op != insn.op || host.length != stub.host_insn_size || host.opcode != insn.opcode) return false;
  constexpr u16 kSame = kVex | kEvex | kOpmask | kHasMem;
  if ((host.flags & kSame) != (insn.flags & kSame) || host.has(kLock) || host.mask != insn.mask || host.feature != insn.feature)
    return false;
  for (unsigned i = 0; i < 4; ++i) {
    const Operand &g = insn.operands[i], &h = host.operands[i];
    if (g.kind != h.kind) return false;
    if (g.size != h.size && g.kind != OperandKind::Imm && g.kind != OperandKind::Gpr) return false;
    if ((g.kind == OperandKind::Vec || g.kind == OperandKind::Mask) && g.reg != h.reg) return false;
    if (g.kind == OperandKind::Gpr && h.reg != RAX) return false;
  }
  return !host.has(kHasMem) ||
         (host.mem.base == RSI && host.mem.index == kNoReg && host.disp == 0 && host.addrsize == 8 && host.mem.seg == DS);
}

bool rebuild_evex(const DecodedInsn& insn, CodeMode mode, StubCode* out) {
  EvexParts p;
  if (!parse_evex(insn, mode, &p) || !evex_runs_on_host(p.map, p.opcode)) return false;
  bool gpr = false;
  for (const Operand& o : insn.operands) gpr |= o.kind == OperandKind::Gpr;
  const u8 field = evex_gpr_field(p.map, p.pp, p.opcode);
  if (gpr) {
    if (field == 1) p.reg = RAX;
    if (field == 2 && !p.memory) p.rm = RAX;
    if (field == 0 || (field == 2 && p.memory)) return false;
  }
  if (mode != CodeMode::Bits64 && field != 0 && (gpr || p.memory)) p.w = false;  // ignored there, where it is a register's width
  auto& code = out->host_insn;
  u8& n = out->host_insn_size;
  const auto put = [&](unsigned b) { code[n++] = static_cast<u8>(b); };
  const bool x = !p.memory && (p.rm & 16), b = !p.memory && (p.rm & 8);
  put(0x62);
  put((p.reg & 8 ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20) | (p.reg & 16 ? 0 : 0x10) | p.map);
  put((p.w ? 0x80 : 0) | (~p.vvvv & 15) << 3 | 4 | p.pp);
  put(p.p2 | (p.vvvv & 16 ? 0 : 8));
  put(p.opcode);
  put((p.memory ? 0x06 : 0xc0 | (p.rm & 7)) | (p.reg & 7) << 3);  // [rsi]
  for (unsigned i = 0; i < p.imm_size; ++i) put(p.imm[i]);
  return true;
}

bool rebuild_opmask(const DecodedInsn& insn, CodeMode mode, StubCode* out) {
  OpmaskParts p;
  if (!parse_opmask(insn, mode, &p)) return false;
  bool gpr = false;
  for (const Operand& o : insn.operands) gpr |= o.kind == OperandKind::Gpr;
  bool b = p.b, r = p.r;
  if (gpr) {
    if (p.map != 1 || (p.opcode != 0x92 && p.opcode != 0x93)) return false;
    p.modrm = static_cast<u8>(p.opcode == 0x92 ? p.modrm & 0xf8 : p.modrm & 0xc7);
    (p.opcode == 0x92 ? b : r) = false;
    if (mode != CodeMode::Bits64) p.w = false;  // a register's width
  }
  if (p.modrm < 0xc0) {
    p.modrm = static_cast<u8>((p.modrm & 0x38) | 6);
    b = false;
  }
  auto& code = out->host_insn;
  u8& n = out->host_insn_size;
  const auto put = [&](unsigned v) { code[n++] = static_cast<u8>(v); };
  put(0xc4);
  put((r ? 0 : 0x80) | 0x40 | (b ? 0 : 0x20) | p.map);
  put((p.w ? 0x80 : 0) | (~p.vvvv & 15) << 3 | (p.l ? 4 : 0) | p.pp);
  put(p.opcode);
  put(p.modrm);
  for (unsigned i = 0; i < p.imm_size; ++i) put(p.imm[i]);
  return true;
}

}  // namespace

bool parse_evex(const DecodedInsn& insn, CodeMode mode, EvexParts* out) {
  if (!insn.has(kEvex)) return false;
  unsigned i = 0;
  while (i < 9 && is_prefix(insn.raw[i])) ++i;
  if (insn.raw[i] != 0x62 || i + 6 > insn.length) return false;
  const u8 p0 = insn.raw[i + 1], p1 = insn.raw[i + 2], p2 = insn.raw[i + 3], modrm = insn.raw[i + 5];
  EvexParts& p = *out;
  p = EvexParts{};
  p.map = p0 & 7;
  p.pp = p1 & 3;
  p.w = p1 & 0x80;
  p.p2 = p2 & 0xf7;
  p.opcode = insn.raw[i + 4];
  p.memory = modrm < 0xc0;
  p.reg = static_cast<u8>((modrm >> 3 & 7) | (p0 & 0x80 ? 0 : 8) | (p0 & 0x10 ? 0 : 16));
  p.rm = static_cast<u8>((modrm & 7) | (p0 & 0x20 ? 0 : 8) | (p0 & 0x40 ? 0 : 16));
  p.vvvv = static_cast<u8>((~(p1 >> 3) & 15) | (p2 & 8 ? 0 : 16));
  if (mode != CodeMode::Bits64) {
    p.reg &= 7;
    p.rm &= 7;
    p.vvvv &= 7;
  }
  return behind_modrm(insn, i + 6, modrm, p.imm, &p.imm_size);
}

u8 evex_gpr_field(unsigned map, unsigned pp, u8 opcode) {
  if (map == 1 || map == 5) {
    if (pp >= 2) {  // scalar conversions
      if (opcode == 0x2c || opcode == 0x2d || opcode == 0x78 || opcode == 0x79) return 1;
      return opcode == 0x2a || opcode == 0x7b ? 2 : 0;
    }
    if (pp != 1) return 0;
    return opcode == 0xc5 ? 1 : opcode == 0x6e || opcode == 0x7e || opcode == 0xc4 ? 2 : 0;
  }
  if (pp != 1) return 0;
  if (map == 2) return opcode >= 0x7a && opcode <= 0x7c ? 2 : 0;
  return map == 3 && ((opcode >= 0x14 && opcode <= 0x17) || opcode == 0x20 || opcode == 0x22) ? 2 : 0;
}

bool evex_runs_on_host(unsigned map, u8 opcode) {
  if (map == 2) return !((opcode >= 0x90 && opcode <= 0x93) || (opcode >= 0xa0 && opcode <= 0xa3) || opcode == 0xc6 || opcode == 0xc7);
  return map == 1 || map == 3 || map == 5 || map == 6;
}

std::optional<StubCode> make_evex_stub(const DecodedInsn& insn, CodeMode mode) {
  StubCode out;
  const bool evex = insn.has(kEvex);
  if (!(evex ? rebuild_evex(insn, mode, &out) : rebuild_opmask(insn, mode, &out)) || !verify(insn, out)) return std::nullopt;

  u32 loads = 0, stores = 0, mask_loads = insn.mask != 0 ? 1u << insn.mask : 0, mask_stores = 0;
  unsigned gpr = 0;
  bool gpr_read = false, gpr_write = false;
  for (const Operand& o : insn.operands) {
    switch (o.kind) {
      case OperandKind::Vec:
        loads |= 1u << (o.reg & 31);
        if (o.access & kWrite) stores |= 1u << (o.reg & 31);
        break;
      case OperandKind::Mask:
        mask_loads |= 1u << (o.reg & 7);
        if (o.access & kWrite) mask_stores |= 1u << (o.reg & 7);
        break;
      case OperandKind::Gpr:
        gpr = o.reg & 15;
        gpr_read |= (o.access & kRead) != 0;
        gpr_write |= (o.access & kWrite) != 0;
        break;
      case OperandKind::Mem:
        out.mem_size = o.size;
        if (o.access & kRead) out.flags |= kStubMemRead;
        if (o.access & kWrite) out.flags |= kStubMemWrite;
        break;
      default: break;
    }
  }
  // VP2INTERSECT writes a pair of masks, of which the operand is one.
  if (insn.feature == Feature::Avx512vp2intersect) {
    mask_stores |= mask_stores >> 1 & 0x55u;
    mask_stores |= (mask_stores & 0x55u) << 1;
    mask_loads |= mask_stores;
  }
  if (insn.has(kHasMem) && (out.mem_size == 0 || out.mem_size > 64 || !(out.flags & (kStubMemRead | kStubMemWrite)))) return std::nullopt;
  // A store under a mask leaves the buffer's other bytes; they do not get to the guest.
  if (out.flags & kStubMemWrite) out.flags &= static_cast<u16>(~kStubMemRead);
  if (insn.has(kAligned)) out.flags |= kStubAligned;
  const u8 map_byte = out.host_insn[1] & 7;
  const u8 pp = out.host_insn[2] & 3;
  // VCVTPH2PS, VCVTPS2PH: exceptions of type 11, as VEX's.
  if (evex && pp == 1 && ((map_byte == 2 && insn.opcode == 0x13) || (map_byte == 3 && insn.opcode == 0x1d))) out.flags |= kStubUnaligned;
  const bool comis = evex && (map_byte == 1 || map_byte == 5) && (insn.opcode == 0x2e || insn.opcode == 0x2f);
  const bool test = !evex && (insn.opcode == 0x98 || insn.opcode == 0x99);
  if (comis || test) out.flags |= kStubWritesFlags;
  if (evex) out.flags |= kStubMxcsr;  // it does not matter where no exception can be

  Writer w(&out);
  if (evex) {
    w.frame({0x0f, 0xae}, 3, kFrameMxcsr);   // stmxcsr
    w.bytes({0x0f, 0xae, 0x57, 24});         // ldmxcsr, the guest's
  }
  w.bytes({0x41, 0xba});                     // mov r10d: what a fault undoes
  w.imm32(evex ? kUndoMxcsr : 0);
  if (gpr_read || gpr_write) w.bytes({0x49, 0x89, 0xd1});  // mov r9, rdx
  if (gpr_read) w.gpr(0x8b, gpr);
  for (unsigned n = 0; n < 32; ++n)
    if (loads >> n & 1) w.load(n);
  for (unsigned n = 0; n < 8; ++n)
    if (mask_loads >> n & 1) w.load_mask(n);
  for (unsigned i = 0; i < out.host_insn_size; ++i) w.byte(out.host_insn[i]);
  if (out.flags & kStubWritesFlags) {
    w.bytes({0x9f, 0x0f, 0x90, 0xc0});  // lahf; seto al
    w.frame({0x89}, 0, kFrameFlags);
  }
  if (gpr_write) w.gpr(0x89, gpr);
  for (unsigned n = 0; n < 32; ++n)
    if (stores >> n & 1) w.store(n);
  for (unsigned n = 0; n < 8; ++n)
    if (mask_stores >> n & 1) w.store_mask(n);
  if (evex) {
    w.bytes({0x0f, 0xae, 0x5f, 24});
    w.frame({0x0f, 0xae}, 2, kFrameMxcsr);
  }
  w.bytes({0xc5, 0xf8, 0x77});        // vzeroupper
  w.bytes({0x31, 0xc0, 0xc3});        // xor eax, eax; ret
  if (w.overflow()) return std::nullopt;
  return out;
}

}  // namespace ring3::engine
