#include <cstring>

#include "engine/interp/operand.hpp"
#include "engine/interp/vector.hpp"

/// Vector instructions that touch memory element by element, or not at all where a mask says so.
namespace ring3::engine {
namespace {

u64 address_mask(const DecodedInsn& insn) {
  return insn.addrsize == 2 ? 0xffff : insn.addrsize == 4 ? 0xffffffff : ~0ull;
}
Seg segment_of(const DecodedInsn& insn) { return static_cast<Seg>(insn.mem.seg); }

/// A vector register's 32 bytes, out of its two halves and back.
struct Vector {
  u8 bytes[32];
  void load(VcpuState& s, unsigned n) {
    std::memcpy(bytes, s.xsave.xmm(n), 16);
    std::memcpy(bytes + 16, s.xsave.ymm_high(n), 16);
  }
  /// whole: as an instruction that writes the register, which clears what is above.
  void store(VcpuState& s, unsigned n, bool whole = true) const {
    std::memcpy(s.xsave.xmm(n), bytes, 16);
    std::memcpy(s.xsave.ymm_high(n), bytes + 16, 16);
    if (whole) std::memset(s.xsave.zmm_high(n), 0, 32);
  }
  bool sign(unsigned element, unsigned size) const { return bytes[element * size + size - 1] & 0x80; }
};

/// An element's accesses.
bool read_element(Context& c, u64 linear, u8* at, unsigned size, Seg seg) {
  return alignment_spared(c) ? read_unaligned(c, linear, at, size, seg) : c.mmu.read_bytes(linear, at, size, seg);
}
bool check_element(Context& c, u64 linear, unsigned size, Seg seg) {
  return alignment_spared(c) ? check_write_unaligned(c, linear, size, seg) : c.mmu.check_write(linear, size, seg);
}
bool write_element(Context& c, u64 linear, const u8* at, unsigned size, Seg seg) {
  return alignment_spared(c) ? write_unaligned(c, linear, at, size, seg) : c.mmu.write_bytes(linear, at, size, seg);
}

bool vex_w(const DecodedInsn& insn) {
  unsigned i = 0;
  while (i < 12 && insn.raw[i] != 0xc4 && insn.raw[i] != 0xc5) ++i;  // legacy prefixes are none of these
  return insn.raw[i] == 0xc4 && (insn.raw[i + 2] & 0x80);
}

/// MASKMOVQ mm, mm   0F F7;   (V)MASKMOVDQU xmm, xmm   66 0F F7
/// Memory:  bytes whose mask byte has bit 7 set, at seg:[rDI]; the others are not touched.
/// Faults:  all bytes are checked before the first is written, selected or not (SDM vol. 2 leaves that to implementations):
///          by AMD's processors (Zen 3) as one operand, by Intel's (Sapphire Rapids) in words of 8 bytes, the upper first.
Exec maskmov(Context& c, const DecodedInsn& insn) {
  const bool mmx = insn.operands[0].kind == OperandKind::Mmx;
  if (!(mmx ? mmx_available(c) : insn.has(kVex) ? avx_available(c) : sse_available(c))) return Exec::Stop;
  const unsigned size = mmx ? 8 : 16;
  const unsigned source = insn.operands[0].reg & 15, mask = insn.operands[1].reg & 15;
  u8 data[16], select[16];
  if (mmx) {
    const unsigned top = c.s.xsave.fsw() >> 11 & 7;
    std::memcpy(data, c.s.xsave.bytes + 32 + 16 * ((source - top) & 7), 8);
    std::memcpy(select, c.s.xsave.bytes + 32 + 16 * ((mask - top) & 7), 8);
  } else {
    std::memcpy(data, c.s.xsave.xmm(source), 16);
    std::memcpy(select, c.s.xsave.xmm(mask), 16);
  }
  const Seg seg = segment_of(insn);
  const u64 offset = c.s.gpr[RDI];
  const unsigned word = c.features.amd ? size : 8;
  for (unsigned at = size; at != 0; at -= word) {
    u64 start;
    if (!c.linear(seg, (offset + at - word) & address_mask(insn), word, true, &start) || !c.mmu.check_write(start, word, seg))
      return Exec::Stop;
  }
  // Byte by byte: an address may wrap, and the bytes have no alignment of their own.
  u64 linear[16];
  for (unsigned i = 0; i < size; ++i) {
    if (!(select[i] & 0x80)) continue;
    if (!c.linear(seg, (offset + i) & address_mask(insn), 1, true, &linear[i]) || !c.mmu.check_write(linear[i], 1, seg))
      return Exec::Stop;
  }
  for (unsigned i = 0; i < size; ++i)
    if ((select[i] & 0x80) && !c.mmu.write_bytes(linear[i], data + i, 1, seg)) return Exec::Stop;
  if (mmx) enter_mmx(c.s.xsave);
  return Exec::Next;
}

/// VMASKMOVPS/PD   VEX.66.0F38.W0 2C 2D (load) 2E 2F (store);   VPMASKMOVD/Q   8C (load) 8E (store), W
/// Memory:  elements whose mask element has its sign bit set; no fault for the others.
/// Faults:  nothing changes before the last possible one.
template <bool Store>
Exec vmaskmov(Context& c, const DecodedInsn& insn) {
  if (!avx_available(c)) return Exec::Stop;
  const unsigned total = insn.operands[Store ? 2 : 0].size == 32 ? 32 : 16;
  const bool integer = insn.opcode >= 0x8c;
  const unsigned size = integer ? (vex_w(insn) ? 8 : 4) : (insn.opcode & 1 ? 8 : 4);
  Vector mask, data;
  mask.load(c.s, insn.operands[1].reg & 15);
  const Seg seg = segment_of(insn);
  const u64 base = c.effective_address(insn);
  u64 linear[8];
  if (Store) {
    data.load(c.s, insn.operands[2].reg & 15);
  } else {
    std::memset(data.bytes, 0, sizeof data.bytes);
  }
  for (unsigned i = 0; i < total / size; ++i) {
    if (!mask.sign(i, size)) continue;
    if (!c.linear(seg, (base + i * size) & address_mask(insn), size, Store, &linear[i])) return Exec::Stop;
    if (Store ? !check_element(c, linear[i], size, seg) : !read_element(c, linear[i], data.bytes + i * size, size, seg))
      return Exec::Stop;
  }
  if (!Store) {
    data.store(c.s, insn.operands[0].reg & 15);
    return Exec::Next;
  }
  for (unsigned i = 0; i < total / size; ++i)
    if (mask.sign(i, size) && !write_element(c, linear[i], data.bytes + i * size, size, seg)) return Exec::Stop;
  return Exec::Next;
}

/// VGATHERDPS/DPD/QPS/QPD   VEX.66.0F38 92 93;   VPGATHERDD/DQ/QD/QQ   90 91; W chooses the element
/// Operands: destination, memory with vector index, mask.
/// Faults:   at a fault the elements before it are complete and their mask bits clear, so that the
///           restarted instruction goes on from there. #UD when two of the three registers are the same.
Exec vgather(Context& c, const DecodedInsn& insn) {
  if (!avx_available(c)) return Exec::Stop;
  const unsigned dest = insn.operands[0].reg & 15, index = insn.mem.index & 15, mask_reg = insn.operands[2].reg & 15;
  if (dest == index || dest == mask_reg || index == mask_reg) return c.ud();
  const unsigned element = vex_w(insn) ? 8 : 4;
  const unsigned index_size = insn.opcode & 1 ? 8 : 4;
  unsigned i0 = 0;
  while (i0 < 12 && insn.raw[i0] != 0xc4) ++i0;
  const unsigned total = insn.raw[i0 + 2] & 4 ? 32 : 16;  // VEX.L
  const unsigned count = total / (element > index_size ? element : index_size);

  Vector data, mask, indices;
  data.load(c.s, dest);
  mask.load(c.s, mask_reg);
  indices.load(c.s, index);
  for (unsigned i = 0; i < count; ++i) std::memset(mask.bytes + i * element, mask.sign(i, element) ? 0xff : 0, element);

  bool done = false;
  const Seg seg = segment_of(insn);
  u64 base = static_cast<u64>(insn.disp);
  if (insn.mem.base < 16) base += c.s.gpr[insn.mem.base];
  for (unsigned i = 0; i < count; ++i) {
    if (!mask.sign(i, element)) continue;
    const u64 offset = vsib_index(indices.bytes, i, index_size);
    u64 linear;
    if (!c.linear(seg, (base + (offset << insn.mem.scale_log2)) & address_mask(insn), element, false, &linear) ||
        !read_element(c, linear, data.bytes + element * i, element, seg)) {
      if (c.stop().kind == Stop::Kind::Fault) {  // an exit to the VMM is replayed from the first element instead
        // Of Intel's processors the mask is written before, and the destination with the first element, whole registers both.
        if (!c.features.amd) std::memset(mask.bytes + total, 0, sizeof mask.bytes - total);
        if (!c.features.amd && done) std::memset(data.bytes + total, 0, sizeof data.bytes - total);
        data.store(c.s, dest, done);
        mask.store(c.s, mask_reg);
      }
      return Exec::Stop;
    }
    std::memset(mask.bytes + element * i, 0, element);
    done = true;
  }
  // Above the elements: zero, in both.
  std::memset(mask.bytes, 0, sizeof mask.bytes);
  std::memset(data.bytes + count * element, 0, sizeof data.bytes - count * element);
  data.store(c.s, dest);
  mask.store(c.s, mask_reg);
  return Exec::Next;
}

}  // namespace

bool read_unaligned(Context& c, u64 linear, u8* buffer, unsigned size, Seg seg) {
  for (unsigned i = 0; i < size; ++i)
    if (!c.mmu.read_bytes(linear + i, buffer + i, 1, seg)) return false;
  return true;
}

bool check_write_unaligned(Context& c, u64 linear, unsigned size, Seg seg) {
  // CR2 is the first byte that cannot be written.
  const u64 last = linear + size - 1, second = last & kPageMask;
  return c.mmu.check_write(linear, 1, seg) && c.mmu.check_write(second > linear ? second : last, 1, seg);
}

bool write_unaligned(Context& c, u64 linear, const u8* buffer, unsigned size, Seg seg) {
  if (!check_write_unaligned(c, linear, size, seg)) return false;
  for (unsigned i = 0; i < size; ++i)
    if (!c.mmu.write_bytes(linear + i, buffer + i, 1, seg)) return false;
  return true;
}

void enter_mmx(XsaveArea& area) {
  const unsigned top = area.fsw() >> 11 & 7;
  if (top != 0) {
    u8 old[128];
    std::memcpy(old, area.bytes + 32, sizeof old);
    for (unsigned i = 0; i < 8; ++i) std::memcpy(area.bytes + 32 + 16 * ((top + i) & 7), old + 16 * i, 16);
  }
  area.fsw() &= static_cast<u16>(~0x3800);
  area.ftw_abridged() = 0xff;
}

Handler select_vector_memory(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Maskmov: return maskmov;
    case Op::Vmaskmov: return insn.operands[0].kind == OperandKind::Mem ? vmaskmov<true> : vmaskmov<false>;
    case Op::Vgather: case Op::Vscatter: return insn.has(kEvex) ? select_evex_memory(insn) : vgather;
    default: return nullptr;
  }
}

}  // namespace ring3::engine
