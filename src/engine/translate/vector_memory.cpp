#include <cstddef>

#include "engine/translate/builder.hpp"

/// VGATHER* and VPGATHER*, VEX-encoded, in 64-bit code.
///
/// Way:    indices, mask and destination go to the frame; each element that the mask selects has the TLB's check of its own and
///         comes from memory into the destination's copy; then the destination is loaded, and the mask becomes zero. Nothing of the
///         guest's changes before the last element, so that the first one the TLB does not have leaves the instruction to
///         the interpreter, which also knows what a fault half-way leaves behind.
/// Windows: code of host windows goes by the TLB here too.
///
/// VMASKMOV* and VPMASKMOV* are executed as they are (plain.cpp), their operand checked whole.
namespace ring3::engine {
namespace {

constexpr u8 kNotSign = 9, kAbove = 7;

}  // namespace

bool BlockBuilder::gather(const DecodedInsn& i) {
  constexpr u32 kData = offsetof(JitFrame, bounce), kIndices = kData + 32, kMask = frame::kScratch;
  Reencoding r;
  if (code32() || i.has(kEvex) || i.addrsize != 8 || i.mem.seg == FS || i.mem.seg == GS || !take_apart(i, false, &r)) return false;
  const u8 to = r.e.reg, mask = r.e.vvvv, index = i.mem.index & 15, base = i.mem.base;
  if (to == index || to == mask || index == mask) return false;  // #UD
  if (i.mem.index > 15 || (base > 15 && base != kNoReg) || i.disp != static_cast<i32>(i.disp)) return false;
  const u8 element = r.e.w ? 8 : 4, index_size = r.e.opcode & 1 ? 8 : 4, total = r.e.l ? 32 : 16;
  const unsigned count = total / (element > index_size ? element : index_size);

  clobber_flags();
  Label& interpret = interpret_label();
  const auto vector = [&](u8 pp, u8 opcode, u8 reg, u32 at, bool whole) {
    e_.encode({.vex = true, .l = whole, .pp = pp, .map = 1, .opcode = opcode, .vectors = true, .reg = reg, .memory = true, .mem = HostMem::frame(at)});
  };
  vector(2, 0x7f, index, kIndices, r.e.l);  // vmovdqu
  vector(2, 0x7f, mask, kMask, r.e.l);
  vector(2, 0x7f, to, kData, r.e.l);
  const auto load_index = [&](unsigned n) {
    const HostMem at = HostMem::frame(kIndices + n * index_size);
    index_size == 8 ? e_.load(kScratch0, at)
                    : (void)e_.encode({.w = true, .opcode = 0x63, .reg = kScratch0, .memory = true, .mem = at});  // movsxd
  };
  for (unsigned n = 0; n < count; n++) {
    Label spared;
    e_.cmp32_imm(HostMem::frame(kMask + n * element + element - 4u), 0);
    e_.jcc(kNotSign, spared);
    HostMem at{kHostNone, kScratch0, static_cast<u8>(i.mem.scale_log2 & 3), false, static_cast<i32>(i.disp)};
    load_index(n);
    if (base != kNoReg) {
      if (special(base)) e_.load(kScratch1, slot(base));
      at.base = special(base) ? u8{kScratch1} : host(base);
    }
    e_.lea(kScratch0, at);
    emit_rorx(kScratch1, kScratch0, frame::kTlbShift);
    emit_tlb_mask();
    e_.xor_(kScratch0, tlb(kScratch1, frame::kTlbReadTag));
    emit_start_compare(element);
    e_.jcc(kAbove, interpret);
    e_.load(kScratch1, tlb(kScratch1, frame::kTlbAddend));
    if (base != kNoReg) {
      Encoding add{.w = true, .opcode = 0x03, .reg = kScratch1};
      add.memory = special(base);
      if (special(base)) add.mem = slot(base);
      else add.rm = host(base);
      e_.encode(add);
    }
    load_index(n);
    at.base = kScratch1;
    const HostMem copy = HostMem::frame(kData + n * element);
    if (element == 8) {
      e_.load(kScratch0, at);
      e_.store(copy, kScratch0);
    } else {
      e_.load32(kScratch0, at);
      e_.store32(copy, kScratch0);
    }
    e_.bind(spared);
  }
  // What is above the elements becomes zero, in both.
  const unsigned bytes = count * element;
  bytes == 8 ? vector(2, 0x7e, to, kData, false) : vector(2, 0x6f, to, kData, bytes == 32);  // vmovq, vmovdqu
  return e_.encode({.vex = true, .pp = 1, .vvvv = mask, .map = 1, .opcode = 0xef, .vectors = true, .reg = mask, .rm = mask});  // vpxor
}

}  // namespace ring3::engine
