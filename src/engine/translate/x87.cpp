#include "engine/translate/builder.hpp"
#include "engine/interp/vector_stub.hpp"

/// x87 and MMX: the guest's instructions on the host's x87 registers.
///
/// State:      loaded when code first needs it (SystemOp::LoadX87) and there until translated code is left, across blocks
///             and ways between user and kernel. Each block with such instructions looks once; no other code knows of it.
/// Exceptions: the state is in the registers only while CR0.EM and TS are clear and all exceptions are masked in FCW.
///             #UD, #NM and #MF are therefore not to be looked for; what would unmask one is left to the interpreter.
/// Pointers:   FIP is the guest's, kept in the frame: the address of the last non-control instruction, written before
///             what may leave the block, and on the ways out of accesses. FDP and FOP change with unmasked exceptions only.
/// Left out:   FLDENV, FNSTENV, FRSTOR, FNSAVE, and what converts between MMX and XMM registers under MXCSR.
/// Spec:       Intel SDM vol. 1 ch. 8 and 9; as the interpreter's handlers (interp/vector.cpp).
namespace ring3::engine {
namespace {

constexpr u8 kEqual = 4, kNotEqual = 5;
constexpr u16 kMasks = 0x3f;  ///< of FCW

struct MemoryForm {
  u8 size = 0;  ///< 0: none that is translated
  bool store = false;
};

/// By opcode and ModRM.reg.
constexpr MemoryForm memory_form(u8 opcode, u8 reg) {
  const bool store = reg == 1 || reg == 2 || reg == 3;  // FISTTP, FST and FIST, FSTP and FISTP
  switch (opcode) {
    case 0xd8:
    case 0xda:
      return {4, false};
    case 0xdc:
      return {8, false};
    case 0xde:
      return {2, false};
    case 0xd9:
      if (reg == 0 || reg == 2 || reg == 3) return {4, store};
      return reg == 5 ? MemoryForm{2, false} : reg == 7 ? MemoryForm{2, true} : MemoryForm{};  // FLDCW, FNSTCW
    case 0xdb:
      if (reg < 4) return {4, store};
      return reg == 5 ? MemoryForm{10, false} : reg == 7 ? MemoryForm{10, true} : MemoryForm{};
    case 0xdd:
      if (reg < 4) return {8, store};
      return reg == 7 ? MemoryForm{2, true} : MemoryForm{};  // FNSTSW
    case 0xdf:
      if (reg < 4) return {2, store};
      return MemoryForm{static_cast<u8>(reg == 4 || reg == 6 ? 10 : 8), reg >= 6};  // FBLD, FILD, FBSTP, FISTP
    default:
      return {};
  }
}

/// Leaves the pointers as they are.
constexpr bool is_control(const Encoding& e) {
  if (e.memory) return (e.opcode == 0xd9 && e.reg >= 4) || (e.opcode == 0xdd && e.reg == 7);
  return (e.opcode == 0xdb && e.reg == 4) || (e.opcode == 0xdf && e.reg == 4 && e.rm == 0);
}

}  // namespace

void BlockBuilder::need_x87() {
  if (x87_.in) return;
  clobber_flags();
  interpret_label();
  x87_loads_.push_back({{}, {}, interpret_.size() - 1});
  X87Load& l = x87_loads_.back();
  e_.cmp32_imm(HostMem::frame(frame::kX87), 0);
  e_.jcc(kEqual, l.entry);
  e_.bind(l.resume);
  x87_.in = true;
}

void BlockBuilder::finish_x87() {
  for (X87Load& l : x87_loads_) {
    e_.bind(l.entry);
    e_.mov_imm(kScratch1, static_cast<u64>(SystemOp::LoadX87));
    e_.encode({.opcode = 0xff, .reg = 2, .memory = true, .mem = HostMem::frame(frame::kSystemOp)});
    e_.encode({.w = true, .opcode = 0x85, .reg = kScratch1, .rm = kScratch1});
    e_.jcc(kNotEqual, l.resume);
    e_.jmp(interpret_[l.insn].entry);
  }
}

void BlockBuilder::emit_fip(i64 offset) {
  emit_rip(kScratch0, offset);
  if (!code32()) {
    e_.store(HostMem::frame(frame::kX87Fip), kScratch0);
    return;
  }
  e_.store32(HostMem::frame(frame::kX87Fip), kScratch0);
  e_.load32(kScratch0, HostMem::frame(frame::kX87Selector));
  e_.store32(HostMem::frame(frame::kX87Fip + 4), kScratch0);
}

void BlockBuilder::store_fip() {
  if (x87_.fip) emit_fip(x87_.fip_offset);
  x87_.fip = false;
}

/// Leaves the block, if at all, by its own Interpret or a group's miss: these store FIP.
bool BlockBuilder::keeps_fip(const DecodedInsn& i) const {
  switch (i.op) {
    case Op::HostX87:
    case Op::HostMmx:
    case Op::Fwait:
    case Op::Emms:
    case Op::HostVec:
    case Op::Mov:
    case Op::Movzx:
    case Op::Movsx:
    case Op::Movsxd:
    case Op::Lea:
    case Op::Add:
    case Op::Sub:
    case Op::And:
    case Op::Or:
    case Op::Xor:
    case Op::Cmp:
    case Op::Test:
    case Op::Inc:
    case Op::Dec:
    case Op::Neg:
    case Op::Not:
    case Op::Shl:
    case Op::Shr:
    case Op::Sar:
    case Op::Imul2:
    case Op::Imul3:
    case Op::Cmovcc:
    case Op::Setcc:
    case Op::Sahf:
    case Op::Nop:
    case Op::Endbr:
    case Op::Push:
    case Op::Pop:
      return true;
    default:
      return false;
  }
}

bool BlockBuilder::x87(const DecodedInsn& i) {
  if (i.op == Op::Fwait) {
    need_x87();
    return true;
  }
  if (i.op == Op::Emms) {
    need_x87();
    e_.bytes({0x0f, 0x77});
    return true;
  }
  Reencoding r;
  if (i.has(kLock) || !take_apart(i, code32(), &r)) return false;
  if (r.e.vex || r.e.map != 0 || r.e.opcode < 0xd8 || r.e.opcode > 0xdf || r.e.imm_size != 0) return false;
  // Prefixes change nothing but the size of an environment.
  Encoding e{.opcode = r.e.opcode, .vectors = true, .reg = static_cast<u8>(r.e.reg & 7), .memory = r.e.memory,
             .rm = static_cast<u8>(r.e.rm & 7)};
  need_x87();
  if (e.memory) {
    const MemoryForm form = memory_form(e.opcode, e.reg);
    if (form.size == 0) return false;
    if (e.opcode == 0xd9 && e.reg == 5) return fldcw(i);
    if (!x87_memory(i, e, form.size, form.store)) return false;
  } else if (e.opcode == 0xdb && e.reg == 4) {
    if (e.rm == 3) {  // FNINIT
      e_.store_imm32(HostMem::frame(frame::kX87Fip), 0);
      e_.load(kScratch0, HostMem::frame(RING3_FRAME_STATE_XSAVE));
      e_.store_imm32(HostMem::at(kScratch0, 16), 0);
      e_.encode({.p66 = true, .opcode = 0xc7, .memory = true, .mem = HostMem::at(kScratch0, 6), .imm_size = 2});
      x87_.fip = false;
    } else if (e.rm != 2) {  // FNCLEX; FNENI and its like do nothing
      return false;
    }
    e_.encode(e);
  } else {
    need_flags(kScratch0);
    e_.encode(e);
  }
  if (!is_control(e)) {
    x87_.fip = true;
    x87_.fip_offset = page_offset(rip());
  }
  return true;
}

bool BlockBuilder::x87_memory(const DecodedInsn& i, Encoding& e, u8 size, bool store) {
  const Operand* mem = nullptr;
  for (const Operand& o : i.operands)
    if (o.kind == OperandKind::Mem) mem = &o;
  Address a;
  // Groups go by what the decoder says.
  if (mem == nullptr || mem->size != size || (mem->access & kReadWrite) != (store ? kWrite : kRead) || !address_of(i, &a))
    return false;
  Access at;
  if (!access(a, size, store ? Kind::Write : Kind::Read, false, &at)) return false;
  e.mem = at.mem;
  return e_.encode(e);
}

/// The value that was looked at is the one that is loaded.
bool BlockBuilder::fldcw(const DecodedInsn& i) {
  clobber_flags();
  Access at;
  if (!access_of(i, &at)) return false;
  clobber_flags();
  e_.encode({.map = 1, .opcode = 0xb7, .reg = kScratch0, .memory = true, .mem = at.mem});  // movzx
  e_.store32(HostMem::frame(kValueSlot), kScratch0);
  e_.and32(kScratch0, kMasks);
  e_.encode({.opcode = 0x83, .reg = 7, .rm = kScratch0, .imm_size = 1, .imm = {kMasks}});  // cmp
  e_.jcc(kNotEqual, interpret_label());
  return e_.encode({.opcode = 0xd9, .vectors = true, .reg = 5, .memory = true, .mem = HostMem::frame(kValueSlot)});
}

/// With an XMM register beside them they need SSE; those that convert may raise its exceptions.
bool BlockBuilder::mmx_runs(const DecodedInsn& i, bool sse) {
  bool vectors = false;
  for (const Operand& o : i.operands) {
    vectors |= o.kind == OperandKind::Vec;
    if (o.kind == OperandKind::Mem && o.size > 8) return false;
  }
  return !uses_mxcsr(1, i.opcode) && (!vectors || sse);
}

bool BlockBuilder::mmx(const DecodedInsn& i) {
  need_x87();
  return plain(i);
}

}  // namespace ring3::engine
