#include "engine/translate/emitter.hpp"

#include <cstring>

namespace ring3::engine {

void Emitter::truncate(u32 size) {
  size_ = size;
  forget();
  while (!relatives_.empty() && relatives_.back() >= size) relatives_.pop_back();
}
void Emitter::imm32(u32 v) {
  u8* at = begin();
  std::memcpy(at, &v, 4);
  end(at + 4);
}
void Emitter::imm64(u64 v) {
  u8* at = begin();
  std::memcpy(at, &v, 8);
  end(at + 8);
}
void Emitter::patch32(u32 at, u32 v) { std::memcpy(code_.data() + at, &v, 4); }

u8* Emitter::memory_operand(u8* at, u8 reg, const HostMem& m, bool byte_disp) {
  const unsigned field = (reg & 7u) << 3;
  const bool no_base = m.base == kHostNone;
  const unsigned base = no_base ? 5 : m.base & 7u;
  const bool small = byte_disp && m.disp >= -128 && m.disp <= 127;
  const unsigned mod = no_base || (m.disp == 0 && base != 5) ? 0 : small ? 1 : 2;
  if (no_base || m.index != kHostNone || base == 4) {
    *at++ = static_cast<u8>(mod << 6 | field | 4);
    *at++ = static_cast<u8>(static_cast<unsigned>(m.scale_log2) << 6 | (m.index == kHostNone ? 4 : m.index & 7u) << 3 | base);
  } else {
    *at++ = static_cast<u8>(mod << 6 | field | base);
  }
  std::memcpy(at, &m.disp, 4);
  return at + (mod == 1 ? 1 : mod == 2 || no_base ? 4 : 0);
}

/// Which of its operands an instruction may write: of what is not known here, all.
void Emitter::note_writes(const Encoding& e) {
  const bool calls = e.map == 0 && e.opcode == 0xff && e.has_modrm && (e.reg == 2 || e.reg == 3);
  if (calls) {
    forget();
    return;
  }
  bool reg = true, rm = true;
  if (!e.vex && !e.evex && e.has_modrm && e.map == 0) {
    const u8 op = e.opcode;
    if (op < 0x40) {
      const bool compares = op >= 0x38;
      reg = !compares && (op & 2) != 0;
      rm = !compares && (op & 2) == 0;
    } else if (op == 0x84 || op == 0x85) {
      reg = rm = false;
    } else if (op >= 0x88 && op <= 0x8b) {
      reg = (op & 2) != 0;
      rm = !reg;
    } else if (op == 0x63 || op == 0x69 || op == 0x6b) {
      rm = false;
    } else if (op == 0x80 || op == 0x81 || op == 0x83) {
      reg = false;
      rm = e.reg != 7;
    } else if (op == 0xf6 || op == 0xf7) {
      reg = false;
      rm = e.reg == 2 || e.reg == 3;
    } else if (op == 0xff && e.reg == 4) {
      reg = rm = false;
    }
  } else if (!e.vex && !e.evex && e.has_modrm && e.map == 1 && (e.opcode == 0xaf || (e.opcode & 0xf6) == 0xb6 || (e.opcode & 0xf0) == 0x40)) {
    rm = false;  // IMUL, MOVZX and MOVSX, CMOVcc
  }
  if (e.vectors) {  // reg and rm are no general registers
    if (e.memory && is_guest_slot(e.mem)) forget();
    return;
  }
  if (reg && e.has_modrm) lost(e.reg);
  if (e.vex || e.evex) lost(e.vvvv);
  if (!rm) return;
  if (e.memory && e.has_modrm) {
    lost(e.mem);
  } else {
    lost(e.rm);
  }
}

bool Emitter::encode(const Encoding& e) {
  note_writes(e);
  u8* at = begin();
  const auto put = [&](unsigned b) { *at++ = static_cast<u8>(b); };
  const bool r = e.has_modrm && (e.reg & 8);
  const bool x = e.memory && e.mem.index != kHostNone && (e.mem.index & 8);
  const bool b = e.memory ? e.mem.base != kHostNone && (e.mem.base & 8) : (e.rm & 8) != 0;

  if (e.memory && e.mem.gs) put(0x65);
  if (e.lock) put(0xf0);
  if (e.evex) {
    put(0x62);
    put((r ? 0 : 0x80) | (x || (!e.memory && (e.rm & 16)) ? 0 : 0x40) | (b ? 0 : 0x20) | (e.reg & 16 ? 0 : 0x10) | e.map);
    put((e.w ? 0x80 : 0) | (~e.vvvv & 15) << 3 | 4 | e.pp);
    put(e.p2 | (e.vvvv & 16 ? 0 : 8));
  } else if (e.vex) {
    if (e.map == 1 && !e.w && !x && !b) {
      put(0xc5);
      put((r ? 0 : 0x80) | (~e.vvvv & 15) << 3 | (e.l ? 4 : 0) | e.pp);
    } else {
      put(0xc4);
      put((r ? 0 : 0x80) | (x ? 0 : 0x40) | (b ? 0 : 0x20) | e.map);
      put((e.w ? 0x80 : 0) | (~e.vvvv & 15) << 3 | (e.l ? 4 : 0) | e.pp);
    }
  } else {
    if (e.p66) put(0x66);
    if (e.rep) put(e.rep);
    const u8 rex = static_cast<u8>((e.w ? 8 : 0) | (r ? 4 : 0) | (x ? 2 : 0) | (b ? 1 : 0));
    if (rex || e.rex_forced) {
      if (e.rex_barred) return false;
      put(0x40 | rex);
    }
    if (e.map != 0) put(0x0f);
    if (e.map == 2) put(0x38);
    if (e.map == 3) put(0x3a);
  }
  if (!e.has_modrm) {
    put(e.opcode | (e.rm & 7));
  } else {
    put(e.opcode);
    if (e.memory) {
      at = memory_operand(at, e.reg, e.mem, !e.evex);  // EVEX's bytes count in units of the operand
    } else {
      put(0xc0 | (e.reg & 7u) << 3 | (e.rm & 7u));
    }
  }
  std::memcpy(at, e.imm, sizeof e.imm);
  end(at + e.imm_size);
  return true;
}

void Emitter::op_rm(bool w, u8 opcode, u8 reg, const HostMem& m) {
  if (opcode == 0x89 || opcode == 0xc7) {
    lost(m);
  } else if (opcode != 0x3b && opcode != 0x81 && opcode != 0x83) {
    lost(reg);
  }
  u8* at = begin();
  if (m.gs) *at++ = 0x65;
  unsigned rex = (w ? 8 : 0) | (reg & 8) >> 1;
  if (m.index != kHostNone) rex |= (m.index & 8) >> 2;
  if (m.base != kHostNone) rex |= (m.base & 8) >> 3;
  if (rex != 0) *at++ = static_cast<u8>(0x40 | rex);
  *at++ = opcode;
  end(memory_operand(at, reg, m));
}
void Emitter::op_rr(bool w, u8 opcode, u8 reg, u8 rm) {
  lost(rm);  // of the opcodes used here
  u8* at = begin();
  const unsigned rex = (w ? 8u : 0) | (reg & 8u) >> 1 | (rm & 8u) >> 3;
  if (rex != 0) *at++ = static_cast<u8>(0x40 | rex);
  *at++ = opcode;
  *at++ = static_cast<u8>(0xc0 | (reg & 7) << 3 | (rm & 7));
  end(at);
}

void Emitter::mov(u8 to, u8 from) { op_rr(true, 0x89, from, to); }
void Emitter::mov32(u8 to, u8 from) { op_rr(false, 0x89, from, to); }
void Emitter::mov_imm(u8 to, u64 value) {
  lost(to);
  u8* at = begin();
  const u8 high = to & 8 ? 1 : 0, low = to & 7;
  u32 size = 4;
  if (value <= 0xffffffff) {
    if (high != 0) *at++ = 0x41;
    *at++ = 0xb8 | low;
  } else if (static_cast<u64>(static_cast<i64>(static_cast<i32>(value))) == value) {
    *at++ = 0x48 | high;
    *at++ = 0xc7;
    *at++ = 0xc0 | low;
  } else {
    *at++ = 0x48 | high;
    *at++ = 0xb8 | low;
    size = 8;
  }
  std::memcpy(at, &value, 8);
  end(at + size);
}
void Emitter::load(u8 to, const HostMem& m) {
  if (!is_guest_slot(m)) {
    op_rm(true, 0x8b, to, m);
    return;
  }
  const u32 slot = slot_of(m);
  if (r14_ == slot) {
    if (to != kHostR14) mov(to, kHostR14);
  } else if (r15_ == slot) {
    if (to != kHostR15) mov(to, kHostR15);
  } else {
    op_rm(true, 0x8b, to, m);
  }
  if (to == kHostR14) r14_ = slot;
  if (to == kHostR15) r15_ = slot;
}
void Emitter::load32(u8 to, const HostMem& m) {
  if (is_guest_slot(m) && (r14_ == slot_of(m) || r15_ == slot_of(m))) {
    mov32(to, r14_ == slot_of(m) ? kHostR14 : kHostR15);
  } else {
    op_rm(false, 0x8b, to, m);
  }
}
void Emitter::store(const HostMem& m, u8 from) {
  op_rm(true, 0x89, from, m);
  if (!is_guest_slot(m)) return;
  if (from == kHostR14) r14_ = slot_of(m);
  if (from == kHostR15) r15_ = slot_of(m);
}
void Emitter::store32(const HostMem& m, u8 from) { op_rm(false, 0x89, from, m); }
void Emitter::store_imm32(const HostMem& m, i32 value) {
  op_rm(true, 0xc7, 0, m);
  imm32(static_cast<u32>(value));
}
void Emitter::lea(u8 to, const HostMem& m) { op_rm(true, 0x8d, to, m); }
void Emitter::lea32(u8 to, const HostMem& m) { op_rm(false, 0x8d, to, m); }

void Emitter::shr(u8 reg, u8 count) {
  op_rr(true, 0xc1, 5, reg);
  put(count);
}
void Emitter::and32(u8 reg, u32 mask) {
  op_rr(false, 0x81, 4, reg);
  imm32(mask);
}
void Emitter::and_imm(u8 reg, i32 mask) {
  if (mask >= -128 && mask <= 127) {
    op_rr(true, 0x83, 4, reg);
    put(static_cast<u8>(mask));
  } else {
    op_rr(true, 0x81, 4, reg);
    imm32(static_cast<u32>(mask));
  }
}
void Emitter::add(u8 reg, const HostMem& m) { op_rm(true, 0x03, reg, m); }
void Emitter::xor_(u8 reg, const HostMem& m) { op_rm(true, 0x33, reg, m); }
void Emitter::cmp_imm(u8 reg, i32 value) {
  op_rr(true, 0x81, 7, reg);
  imm32(static_cast<u32>(value));
}
void Emitter::test_imm(u8 reg, i32 mask) {
  op_rr(true, 0xf7, 0, reg);
  imm32(static_cast<u32>(mask));
}
void Emitter::cmp(u8 reg, const HostMem& m) { op_rm(true, 0x3b, reg, m); }
void Emitter::cmp_imm(const HostMem& m, i32 value) {
  op_rm(true, 0x81, 7, m);
  imm32(static_cast<u32>(value));
}
void Emitter::cmp32_imm(const HostMem& m, i32 value) {
  const bool small = value >= -128 && value <= 127;
  op_rm(false, small ? 0x83 : 0x81, 7, m);
  if (small) {
    put(static_cast<u8>(value));
  } else {
    imm32(static_cast<u32>(value));
  }
}
void Emitter::load_held(u8 to, u32* held, u32 slot) {
  if (*held == slot) return;
  load(to, HostMem::frame(slot));
  *held = slot;
}
void Emitter::test8_imm(u8 reg, u8 mask) {
  put(static_cast<u8>(0x40 | (reg & 8 ? 1 : 0)));
  put_all({0xf6, static_cast<u8>(0xc0 | (reg & 7)), mask});
}

void Emitter::use(Label& l) {
  relatives_.push_back(size());
  if (l.at != Label::kUnbound) {
    imm32(l.at - (size() + 4));
  } else {
    const u32 before = l.uses;
    l.uses = size();
    imm32(before);
  }
}
void Emitter::jcc(u8 condition, Label& to) {
  put_all({0x0f, static_cast<u8>(0x80 | condition)});
  use(to);
}
void Emitter::jmp(Label& to) {
  put(0xe9);
  use(to);
}
void Emitter::call(Label& to) {
  forget();
  put(0xe8);
  use(to);
}
void Emitter::bind(Label& l) {
  forget();
  l.at = size();
  note_label();
  for (u32 use = l.uses; use != Label::kUnbound;) {
    u32 next;
    std::memcpy(&next, code_.data() + use, 4);
    patch32(use, l.at - (use + 4));
    use = next;
  }
  l.uses = Label::kUnbound;
}
u32 Emitter::jrcxz_short(u8 address_size) {
  if (address_size == 4) put(0x67);
  put_all({0xe3, 0});
  return size() - 1;
}
u32 Emitter::jmp_short() {
  put_all({0xeb, 0});
  return size() - 1;
}
u32 Emitter::jcc_short(u8 condition) {
  put_all({static_cast<u8>(0x70 | condition), 0});
  return size() - 1;
}

}  // namespace ring3::engine
