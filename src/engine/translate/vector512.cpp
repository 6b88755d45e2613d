#include "engine/translate/builder.hpp"

/// AVX-512: EVEX instructions and opmask instructions are written again as they are (reencode.cpp), like VEX's.
///
/// State: ZMM16..31, k0..k7 and the upper halves of ZMM0..15 are in the host's registers from where code first needs them to
///        where the vectors are put away (JitFrame::zmm); each block with such instructions looks once. Blocks without them know
///        nothing of it.
/// Masks: an access is checked whole. Where that misses and a mask might spare what faults, the fill or the interpreter finds
///        out; a store under a mask is never filled for.
namespace ring3::engine {

bool BlockBuilder::masked_store(const DecodedInsn& i) {
  if (i.masked == MaskedMemory::Whole && i.op != Op::Vmaskmov) return false;
  for (const Operand& o : i.operands)
    if (o.kind == OperandKind::Mem && (o.access & kWrite) != 0) return true;
  return false;
}

void BlockBuilder::need_zmm() {
  if (zmm_in_) return;
  clobber_flags();
  interpret_label();
  zmm_loads_.push_back({{}, {}, interpret_.size() - 1});
  X87Load& l = zmm_loads_.back();
  e_.cmp32_imm(HostMem::frame(frame::kZmm), RING3_ZMM_AWAY);
  e_.jcc(4, l.entry);
  e_.bind(l.resume);
  zmm_in_ = true;
}

void BlockBuilder::finish_zmm() {
  for (X87Load& l : zmm_loads_) {
    e_.bind(l.entry);
    e_.cmp32_imm(HostMem::frame(frame::kAvx512), 0);
    e_.jcc(4, interpret_[l.insn].entry);
    e_.encode({.opcode = 0xff, .reg = 2, .memory = true, .mem = HostMem::frame(frame::kLoadZmm)});
    e_.jmp(l.resume);
  }
}

}  // namespace ring3::engine
