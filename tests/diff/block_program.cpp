#include "block_program.hpp"

#include <Zydis/Zydis.h>

#include <cstring>
#include <initializer_list>

#include "engine/translate/liveness.hpp"

namespace ring3::diff {

using namespace engine;  // NOLINT: a test of that room

bool is_pointer(BlockMode mode, u8 reg) {
  if (reg == RBX || reg == RBP || reg == RSP) return true;
  return mode != BlockMode::User32 && (reg == R12 || reg == R13 || reg == R15);
}

u64 pointer_value(Random& rng) {
  // Mostly inside a page, at times near an end of one, of the read-only page or of what there is.
  const u64 page = kData + 0x1000 * rng.below(kBlockDataPages);
  switch (rng.below(16)) {
    case 0: return page + 0x1000 - rng.below(64);
    case 1: return kBlockReadOnly + 0x100 + rng.below(0xe00);
    case 2: return rng.one_in(4) ? kBlockReadOnly + 0xfc0 + rng.below(128) : page + 0x800;
    default: return page + ((0x100 + rng.below(0xe00)) & ~31ull);
  }
}

namespace {

class Writer {
 public:
  Writer(BlockMode mode, Random& rng) : mode_(mode), rng_(rng), long64_(mode != BlockMode::User32) {}

  Program program() {
    const unsigned blocks = 6 + static_cast<unsigned>(rng_.below(30));
    at_ = static_cast<unsigned>(rng_.below(0x1000));
    p_.code.assign(kBlockCodePages * 0x1000, 0x90);
    for (unsigned n = 0; n < blocks && at_ < 0x3c00; n++) block();
    // Where the last block falls through: back to the first.
    p_.entries.push_back(at_);
    put({0xe9});
    targets_.push_back({at_, 4, 0});
    at_ += 4;
    for (const Target& t : targets_) {
      const unsigned to = p_.entries[t.entry % p_.entries.size()];
      const i32 rel = static_cast<i32>(to) - static_cast<i32>(t.at + 4);
      const u32 absolute = static_cast<u32>(kCode) + to;
      std::memcpy(&p_.code[t.at], t.absolute ? static_cast<const void*>(&absolute) : &rel, 4);
    }
    for (const Patch& patch : patches_) {
      // Immediates only: a block that changes what its next instructions do with flags is docs/adr/0004's matter.
      const u64 to = movable_.empty() ? kData : kCode + movable_[patch.target % movable_.size()];
      const u32 value = static_cast<u32>(long64_ ? to - (kCode + patch.at + 4 + patch.behind) : to);
      std::memcpy(&p_.code[patch.at], &value, 4);
    }
    return std::move(p_);
  }

 private:
  struct Target {
    unsigned at, size, entry;
    bool absolute = false;
  };
  struct Patch {
    unsigned at, behind;
    u64 target;
  };

  void put(std::initializer_list<unsigned> bytes) {
    for (unsigned b : bytes) p_.code[at_++] = static_cast<u8>(b);
  }
  void put32(u64 value) {
    const u32 v = static_cast<u32>(value);
    std::memcpy(&p_.code[at_], &v, 4);
    at_ += 4;
  }
  /// A register that is no pointer.
  unsigned scratch() {
    static constexpr u8 kLow[] = {RAX, RCX, RDX, RSI, RDI}, kAll[] = {RAX, RCX, RDX, RSI, RDI, R8, R9, R10, R11, R14};
    return long64_ ? kAll[rng_.below(10)] : kLow[rng_.below(5)];
  }
  void define_flags() { put({0x39, 0xc8}); }  // cmp eax, ecx

  void block() {
    p_.entries.push_back(at_);
    const unsigned start = at_;
    const unsigned items = 1 + static_cast<unsigned>(rng_.below(rng_.one_in(8) ? 40 : 12));
    for (unsigned n = 0; n < items && at_ < 0x3d00; n++) item();
    terminator(start);
    if (rng_.one_in(6)) at_ += static_cast<unsigned>(rng_.below(48));  // NOPs between
  }

  void item() {
    switch (rng_.below(40)) {
      case 0: case 1: string(); return;
      case 2:  // a MOV whose immediate others write
        put({0xb8 + (scratch() & 7)});
        movable_.push_back(at_ + static_cast<unsigned>(rng_.below(4)));
        put32(rng_.next());
        return;
      case 3:  // mov byte [code], imm8
        if (!rng_.one_in(3)) break;
        put({0xc6, 0x05});
        patches_.push_back({at_, 1, rng_.next()});
        put32(0);
        put({static_cast<unsigned>(rng_.below(256))});
        return;
      case 4: {  // a pointer anew
        u8 reg;
        do reg = static_cast<u8>(rng_.below(long64_ ? 16 : 8));
        while (reg == RSP || !is_pointer(mode_, reg));
        if (long64_) put({0x48u | (reg >> 3), 0xc7, 0xc0u | (reg & 7)});
        else put({0xb8u | reg});
        put32(pointer_value(rng_));
        return;
      }
      case 5:  // the device
        if (!rng_.one_in(3)) break;
        put({rng_.below(2) ? 0x8bu : 0x89u, 0x04, 0x25});
        put32(kBlockDevice + 8 * rng_.below(64));
        return;
      case 6: case 7: case 8: {  // PUSH and POP in runs
        const unsigned run = 1 + static_cast<unsigned>(rng_.below(5));
        for (unsigned k = 0; k < run; k++) stack(0x50, k);
        if (rng_.one_in(3)) plain();
        for (unsigned k = 0; k < run; k++) stack(0x58, k);
        return;
      }
      case 9:
        put({0x9c, 0x9d});  // pushf; popf
        return;
      case 14:
        if (mode_ != BlockMode::Window64) break;
        stack_pointer();
        return;
      case 10:
        if (mode_ != BlockMode::Kernel64) break;
        put({rng_.below(2) ? 0xfau : 0xfbu});  // cli, sti
        return;
      case 11:
        if (rng_.below(2)) put({rng_.below(4) ? 0xfcu : 0xfdu});  // cld, std
        else define_flags(), put({0x9f, 0x9e});                   // lahf; sahf
        return;
      case 12: case 13:
        if (!x87_) break;
        x87_state();
        return;
      default: break;
    }
    plain();
  }

  /// Out to memory at RBX and, most of the time, in again.
  /// rSP elsewhere, and back most often.
  void stack_pointer() {
    const unsigned by = 8 * static_cast<unsigned>(rng_.below(16));
    switch (rng_.below(8)) {
      case 0: put({0x48, 0x83, 0xec, by}), plain(), put({0x48, 0x83, 0xc4, by}); return;              // sub rsp, by; …; add rsp, by
      case 1: put({0x48, 0x8d, 0x64, 0x24, by}), plain(), put({0x48, 0x8d, 0x64, 0x24, (0u - by) & 0xff}); return;  // lea rsp, [rsp ± by]
      case 2: put({0x48, 0x83, 0xe4, 0xf0}); return;                                                   // and rsp, -16
      case 3: put({0x4c, 0x8d, 0x04, 0x24, 0x48, 0x89, 0xec, 0x50, 0x58}), plain(), put({0x4c, 0x89, 0xc4}); return;  // lea r8, [rsp]; mov rsp, rbp; push rax; pop rax; …; mov rsp, r8
      case 4: put({0x48, 0x87, 0xdc, 0x52, 0x5a, 0x48, 0x87, 0xdc}); return;                           // xchg rsp, rbx; push rdx; pop rdx; and back
      case 5: put({0x55, 0x48, 0x8d, 0x6c, 0x24, 0xf0}), plain(), put({0x48, 0x8d, 0x6c, 0x24, 0x00, 0xc9}); return;  // push rbp; lea rbp, [rsp - 16]; …; lea rbp, [rsp]; leave
      case 6: put({0x54, 0x5c}); return;                                                               // push rsp; pop rsp
      default: put({0x48, 0x81, 0xec}), put32(0x7000000), put({0x48, 0x81, 0xc4}), put32(0x7000000);     // sub rsp, large; add rsp, large
    }
  }

  void x87_state() {
    static constexpr u8 kForms[][2] = {{0xae, 0}, {0xdd, 6}, {0xd9, 6}, {0xd9, 7}};  // FXSAVE, FNSAVE, FNSTENV, FNSTCW
    const auto form = [&](u8 opcode, u8 reg) {
      if (opcode == 0xae) put({0x0f});
      put({opcode, 3u | reg * 8u});
    };
    const u8* out = kForms[rng_.below(4)];
    form(out[0], out[1]);
    if (rng_.below(4) == 0) return;
    const unsigned between = static_cast<unsigned>(rng_.below(4));
    for (unsigned n = 0; n < between; n++) plain();
    form(out[0], out[0] == 0xae ? 1 : out[1] - 2);
  }

  void stack(unsigned opcode, unsigned k) {
    // Never into a pointer register.
    unsigned reg = opcode == 0x50 && rng_.one_in(4) ? static_cast<unsigned>(rng_.below(long64_ ? 16 : 8)) : scratch();
    if (long64_ && rng_.one_in(12) && k == 0) put({0x49});  // a REX.W prefix changes nothing
    else if (reg >= 8) put({0x41});
    put({opcode | (reg & 7)});
  }

  /// String instructions on places that exist.
  void string() {
    const auto place = [&](unsigned reg) {  // mov e?i, imm32
      put({0xb8 | reg});
      put32(rng_.one_in(8) ? pointer_value(rng_) : kData + 0x400 + rng_.below((kBlockDataPages - 1) * 0x1000 - 0x800));
    };
    place(6), place(7);
    put({0xb9});
    put32(rng_.one_in(10) ? 2000 : rng_.below(80));
    if (rng_.below(4)) put({rng_.below(2) ? 0xf2u : 0xf3u});
    if (rng_.one_in(6)) put({0x66});
    if (long64_ && rng_.below(3) == 0) put({0x48});
    static constexpr u8 kStrings[] = {0xa4, 0xa5, 0xaa, 0xab, 0xa4, 0xa5, 0xaa, 0xab, 0xa6, 0xa7, 0xac, 0xad, 0xae, 0xaf};
    put({kStrings[rng_.below(14)]});
  }

  bool acceptable(const Case& c) {
    const DecodedInsn& i = c.insn;
    switch (i.op) {
      case Op::Div: case Op::Idiv:
        if (!rng_.one_in(20)) return false;
        break;
      case Op::Aaa: case Op::Aad: case Op::Aam: case Op::Aas: case Op::Daa: case Op::Das:  // read or make AF
      case Op::Lahf: case Op::Sahf: case Op::Std: case Op::Ldmxcsr: case Op::Pushf: case Op::Popf: case Op::Leave:
      case Op::Enter: case Op::Cli: case Op::Sti: case Op::Hlt: case Op::Xlat: case Op::Maskmov:
        return false;
      default: break;
    }
    if (i.has(kEndsBlock)) return false;
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Gpr && (o.access & kWrite) && is_pointer(mode_, o.reg)) return false;
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::GprHigh && (o.access & kWrite) && o.reg == RBX) return false;
    if (!i.has(kHasMem)) return true;
    const MemOperand& m = i.mem;
    if (i.addrsize == 2) return false;
    if (long64_ && i.addrsize == 4 && m.base < 16 && m.base == RSP) return false;
    u8 size = 0;
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Mem) size = o.size;
    const bool bits = i.op >= Op::Bt && i.op <= Op::Btc && i.operands[1].kind == OperandKind::Gpr;
    if (bits && !rng_.one_in(8)) return false;
    if (i.op == Op::Lea || rng_.one_in(60)) return true;
    if (m.seg == FS || m.seg == GS) return m.base == kNoReg && m.index == kNoReg && i.disp >= 0 && i.disp < 0x4000;
    if (m.index != kNoReg) return false;
    if (m.base == RSP && !rng_.one_in(4)) return false;
    if (m.base != kNoReg && m.base != kRipBase && !(m.base < 16 && is_pointer(mode_, m.base))) return false;
    const bool aligned = i.has(kAligned) || i.op == Op::Cmpxchg16b;
    if (aligned && m.base < 16 && (i.disp & (size - 1)) != 0 && !rng_.one_in(20)) return false;
    return true;
  }

  void plain() {
    static constexpr Family kFamilies[] = {Family::Integer, Family::Integer, Family::Integer, Family::Integer, Family::Integer,
                                           Family::Integer, Family::Shift,   Family::Shift,   Family::Bmi,     Family::Sse,
                                           Family::Sse,     Family::Avx,     Family::Avx,     Family::X87,     Family::Mmx,
                                           Family::Avx512,  Family::Avx512,  Family::Avx512};
    // Whole blocks stay without vectors at times: then they stay unloaded in kernel code.
    Family family = kFamilies[rng_.below(!vectors_ ? 9 : host_has_avx512() ? 18 : 15)];
    if (rng_.one_in(20)) vectors_ = !vectors_;
    if (x87_ && rng_.below(2)) family = rng_.below(4) ? Family::X87 : Family::Mmx;
    if (rng_.one_in(40)) x87_ = !x87_;
    Case c;
    for (unsigned attempt = 0; attempt < 400; attempt++) {
      generate_instruction(family, !long64_, rng_, &c);
      if (acceptable(c)) break;
      if (attempt == 399) return;
    }
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, long64_ ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
                     long64_ ? ZYDIS_STACK_WIDTH_64 : ZYDIS_STACK_WIDTH_32);
    ZydisDecodedInstruction z;
    ZydisDecodedOperand zo[ZYDIS_MAX_OPERAND_COUNT];
    if (c.insn.has(kHasMem) && c.insn.mem.base == kRipBase &&
        ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, c.bytes, c.size, &z, zo)) && z.raw.disp.size == 32) {
      // Often in the page of the one before.
      u64 target = kData + 64 + (rng_.one_in(2) ? near_ + rng_.below(kPageSize) : rng_.below(0xf000));
      near_ = (target - kData) % 0xe000 & kPageMask;
      if (c.insn.has(kAligned)) target &= ~31ull;
      const u32 disp = static_cast<u32>(target - (kCode + at_ + c.size));
      std::memcpy(c.bytes + z.raw.disp.offset, &disp, 4);
    }
    std::memcpy(&p_.code[at_], c.bytes, c.size);
    at_ += c.size;
    u64 undefined = flags_left_undefined(c.insn);
    if (c.insn.op == Op::HostX87 || (c.insn.op >= Op::Rol && c.insn.op <= Op::Shrd)) undefined |= rflags::OF;
    if (undefined & ~rflags::AF) define_flags();
  }

  void branch_to(u64 entry) {
    targets_.push_back({at_, 4, static_cast<unsigned>(entry)});
    at_ += 4;
  }

  void terminator(unsigned start) {
    switch (rng_.below(12)) {
      case 0: put({0xe9}), branch_to(rng_.next()); return;
      case 1: case 2: put({0xe8}), branch_to(rng_.next()); return;
      case 3: {  // a loop around this block
        const unsigned back = at_ + 7 - start;
        if (back > 120) break;
        // mov ecx, imm32 would make it endless: the counter is masked instead.
        put({0x83, 0xe1, 0x0f});  // and ecx, 15
        static constexpr u8 kLoops[] = {0xe0, 0xe1, 0xe2, 0xe2};
        const unsigned opcode = kLoops[rng_.below(4)];
        put({opcode, static_cast<unsigned>(static_cast<u8>(-static_cast<int>(at_ + 2 - start)))});
        return;
      }
      case 4:
        put({0xe3, 0x00});  // jrcxz to the next instruction
        return;
      case 5: case 6:
        if (rng_.below(3) == 0) put({0xc3});  // where a CALL came from, or a fault
        return;
      case 7: {  // indirect
        if (long64_) {
          put({0x48, 0x8d, 0x05});  // lea rax, [rip + target]
          branch_to(rng_.next());
        } else {
          put({0xb8});
          targets_.push_back({at_, 4, static_cast<unsigned>(rng_.next()), true});
          at_ += 4;
        }
        if (rng_.below(2)) {
          put({0xff, rng_.below(2) ? 0xe0u : 0xd0u});  // jmp rax, call rax
          return;
        }
        if (long64_) put({0x48});
        put({0x89, 0x44, 0x24, 0xf8});                            // mov [rsp-8], rax
        put({0xff, rng_.below(2) ? 0x64u : 0x54u, 0x24, 0xf8});  // jmp [rsp-8], call [rsp-8]
        return;
      }
      case 8: return;  // falls through
      default: break;
    }
    put({0x0f, static_cast<unsigned>(0x80 | rng_.below(16))});
    branch_to(rng_.next());
  }

  BlockMode mode_;
  Random& rng_;
  bool long64_;
  u64 near_ = 0;  ///< page of the last operand relative to RIP
  bool vectors_ = false;
  bool x87_ = rng_.one_in(3);  ///< much of it
  unsigned at_ = 0;
  Program p_;
  std::vector<Target> targets_;
  std::vector<Patch> patches_;
  std::vector<unsigned> movable_;
};

}  // namespace

Program generate_program(BlockMode mode, Random& rng) { return Writer(mode, rng).program(); }

}  // namespace ring3::diff
