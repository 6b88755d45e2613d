#include "engine/translate/foresight.hpp"

#include <algorithm>

#include "engine/translate/builder.hpp"

namespace ring3::engine {
namespace {

constexpr u64 ones(unsigned bytes) { return bytes >= 8 ? ~0ull : (1ull << 8 * bytes) - 1; }
u64 extended(u64 v, unsigned bytes) {
  const unsigned shift = 64 - 8 * std::min(bytes, 8u);
  return static_cast<u64>(static_cast<i64>(v << shift) >> shift);
}

}  // namespace

void Foresight::look(const BlockRequest& request, std::size_t count) {
  request_ = &request;
  count_ = 0;
  if (request.registers == nullptr) return;
  for (unsigned r = 0; r < 16; r++) gpr_[r] = {request.registers[r], true};
  u64 rip = request.rip;
  count_ = std::min(count, regions_.size());
  u8 last = kUnknown;  // of what is not known: data lies near data
  for (std::size_t n = 0; n < count_; n++) {
    const DecodedInsn& i = request.insns[n];
    rip += i.length;
    const Value at = address(i, rip);
    const bool known = at.known && at.bits >> 47 == 0;
    regions_[n] = known ? static_cast<u8>(at.bits >> frame::kRegionShift) : last;
    if (known && i.op != Op::Lea && i.mem.base != RSP && i.mem.base != kRipBase) last = regions_[n];
    execute(i, at);
  }
}

/// Of an index that is not known nothing is added: it is small, as a rule.
Foresight::Value Foresight::address(const DecodedInsn& i, u64 next_rip) const {
  const MemOperand& m = i.mem;
  if (!i.has(kHasMem)) return {};
  Value v{static_cast<u64>(i.disp), true};
  if (m.base == kRipBase) {
    v.bits += next_rip;
  } else if (m.base != kNoReg) {
    if (m.base > 15 || !gpr_[m.base].known) return {};
    v.bits += gpr_[m.base].bits;
  }
  if (m.index < 16 && gpr_[m.index].known) v.bits += gpr_[m.index].bits << m.scale_log2;
  if (i.addrsize == 4) v.bits = static_cast<u32>(v.bits);
  if (m.seg == FS) v.bits += request_->fs_base;
  if (m.seg == GS) v.bits += request_->gs_base;
  return v;
}

Foresight::Value Foresight::load(const Value& at, unsigned size) const {
  Value v;
  if (!at.known || size == 0 || size > 8 || request_->peek == nullptr) return v;
  v.known = request_->peek(request_->peek_context, at.bits, &v.bits, size);
  return v;
}

Foresight::Value Foresight::operand(const DecodedInsn& i, std::size_t n, const Value& at) const {
  const Operand& o = i.operands[n];
  switch (o.kind) {
    case OperandKind::Gpr: return o.reg < 16 ? Value{gpr_[o.reg].bits & ones(o.size), gpr_[o.reg].known} : Value{};
    case OperandKind::Imm: return {static_cast<u64>(i.imm), true};
    case OperandKind::Mem: return load(at, o.size);
    default: return {};
  }
}

void Foresight::set(const Operand& o, const Value& v) {
  if (o.kind != OperandKind::Gpr || o.reg > 15) return;
  Value& to = gpr_[o.reg];
  if (o.size >= 4) {
    to = {v.bits & ones(o.size), v.known};
  } else {
    to = {(to.bits & ~ones(o.size)) | (v.bits & ones(o.size)), to.known && v.known};
  }
}

void Foresight::forget(const DecodedInsn& i) {
  u32 written = 0;
  const bool listed = BlockBuilder::written_registers(i, &written);
  for (unsigned r = 0; r < 16; r++)
    if (!listed || (written >> r & 1) != 0) gpr_[r].known = false;
}

void Foresight::execute(const DecodedInsn& i, const Value& at) {
  const Operand& to = i.operands[0];
  const auto binary = [&](auto f) {
    if (to.kind != OperandKind::Gpr) return;
    const Value a = operand(i, 0, at), b = operand(i, 1, at);
    set(to, {f(a.bits, b.bits), a.known && b.known});
  };
  switch (i.op) {
    case Op::Mov: set(to, operand(i, 1, at)); return;
    case Op::Movzx: set(to, operand(i, 1, at)); return;
    case Op::Movsx:
    case Op::Movsxd: {
      const Value v = operand(i, 1, at);
      set(to, {extended(v.bits, i.operands[1].size), v.known});
      return;
    }
    case Op::Lea: {
      Value v = at;
      if (i.mem.seg == FS) v.bits -= request_->fs_base;
      if (i.mem.seg == GS) v.bits -= request_->gs_base;
      set(to, v);
      return;
    }
    case Op::Add: binary([](u64 a, u64 b) { return a + b; }); return;
    case Op::Sub: binary([](u64 a, u64 b) { return a - b; }); return;
    case Op::And: binary([](u64 a, u64 b) { return a & b; }); return;
    case Op::Or: binary([](u64 a, u64 b) { return a | b; }); return;
    case Op::Xor:
      if (to.kind == OperandKind::Gpr && i.operands[1].kind == OperandKind::Gpr && to.reg == i.operands[1].reg) {
        set(to, {0, true});
        return;
      }
      binary([](u64 a, u64 b) { return a ^ b; });
      return;
    case Op::Inc:
    case Op::Dec: {
      const Value a = operand(i, 0, at);
      set(to, {i.op == Op::Inc ? a.bits + 1 : a.bits - 1, a.known});
      return;
    }
    case Op::Shl:
    case Op::Shr:
      if (i.operands[1].kind != OperandKind::Imm) break;
      binary([&](u64 a, u64 b) { return b > 63 ? 0 : i.op == Op::Shl ? a << b : a >> b; });
      return;
    case Op::Cmovcc: {
      // Whichever looks like an address.
      const Value a = operand(i, 0, at), b = operand(i, 1, at);
      if (b.known && (!a.known || a.bits >> 20 == 0)) set(to, b);
      return;
    }
    case Op::Push: gpr_[RSP].bits -= i.opsize; return;
    case Op::Pop:
      set(to, load(gpr_[RSP], i.opsize));
      if (to.kind != OperandKind::Gpr || to.reg != RSP) gpr_[RSP].bits += i.opsize;
      return;
    default: break;
  }
  forget(i);
}

}  // namespace ring3::engine
