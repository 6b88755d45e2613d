#include "engine/decode/decode_cache.hpp"

#include <algorithm>
#include <array>
#include <cstring>

namespace ring3::engine {
namespace {

constexpr unsigned kKeyBytes = 8;

/// Which opcodes of the one-byte map and of 0F have a ModRM byte in 64-bit mode: SDM vol. 2, tables. An
/// error here costs time only: what decode() finds otherwise is not remembered.
constexpr std::array<bool, 512> modrm_table() {
  std::array<bool, 512> t{};
  const auto set = [&](unsigned from, unsigned to) {
    for (unsigned n = from; n <= to; n++) t[n] = true;
  };
  for (unsigned row = 0; row < 0x40; row += 8) set(row, row + 3);
  t[0x63] = t[0x69] = t[0x6b] = true;
  set(0x80, 0x8f);
  set(0xc0, 0xc1);
  set(0xc6, 0xc7);
  set(0xd0, 0xd3);
  set(0xd8, 0xdf);
  set(0xf6, 0xf7);
  set(0xfe, 0xff);
  constexpr unsigned k0f = 256;
  set(k0f + 0x00, k0f + 0x03);
  t[k0f + 0x0d] = true;
  set(k0f + 0x10, k0f + 0x23);
  set(k0f + 0x28, k0f + 0x2f);
  set(k0f + 0x40, k0f + 0x76);
  set(k0f + 0x78, k0f + 0x7f);
  set(k0f + 0x90, k0f + 0x9f);
  set(k0f + 0xa3, k0f + 0xa5);
  set(k0f + 0xab, k0f + 0xaf);
  set(k0f + 0xb0, k0f + 0xc7);
  set(k0f + 0xd0, k0f + 0xff);
  return t;
}
constexpr std::array<bool, 512> kModrm = modrm_table();

bool legacy_prefix(u8 b) {
  switch (b) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: case 0x64: case 0x65: case 0x66: case 0x67: case 0xf0: case 0xf2: case 0xf3:
      return true;
    default:
      return false;
  }
}

/// How many of the eight bytes at b stand before displacement and immediate, or 0 when they may be more, or it is not
/// known here.
unsigned fixed_bytes(const u8* b) {
  unsigned n = 0;
  while (n < 3 && legacy_prefix(b[n])) n++;
  if ((b[n] & 0xf0) == 0x40) n++;
  const u8 opcode = b[n++];
  bool modrm = true;
  if (opcode == 0xc5) {
    n += 2;
    modrm = b[n - 1] != 0x77;
  } else if (opcode == 0xc4) {
    n += 3;
    modrm = (b[n - 3] & 0x1f) != 1 || b[n - 1] != 0x77;
  } else if (opcode == 0x0f) {
    const u8 second = b[n++];
    if (second == 0x0f) return 0;
    if (second == 0x38 || second == 0x3a) n++;
    else modrm = kModrm[256 + second];
  } else if (opcode == 0x62 || opcode == 0x8f) {
    return 0;
  } else {
    modrm = kModrm[opcode];
  }
  if (n >= kKeyBytes) return 0;
  if (!modrm) return n;
  const u8 m = b[n++];
  if (m < 0xc0 && (m & 7) == 4) n++;
  return n <= kKeyBytes ? n : 0;
}

i64 number(const u8* bytes, unsigned size, bool is_signed) {
  switch (size) {
    case 1:
      return is_signed ? i64{static_cast<i8>(bytes[0])} : i64{bytes[0]};
    case 2: {
      u16 v;
      std::memcpy(&v, bytes, 2);
      return is_signed ? i64{static_cast<i16>(v)} : i64{v};
    }
    case 4: {
      u32 v;
      std::memcpy(&v, bytes, 4);
      return is_signed ? i64{static_cast<i32>(v)} : i64{v};
    }
    default: {
      i64 v;
      std::memcpy(&v, bytes, 8);
      return v;
    }
  }
}

/// Of an instruction with everything else: its numbers and the bytes they stand in.
void fill_in(const InsnForm& form, const u8* bytes, DecodedInsn* insn) {
  const u8* at = bytes + form.fixed;
  if (form.disp_size != 0) insn->disp = number(at, form.disp_size, true);
  if (form.imm_size != 0) insn->imm = number(at + form.disp_size, form.imm_size, form.imm_signed);
  std::copy(at, at + form.disp_size + form.imm_size, insn->raw + form.fixed);
}

bool known_size(unsigned size) { return size == 0 || size == 1 || size == 2 || size == 4 || size == 8; }

}  // namespace

DecodeCache::DecodeCache() : entries_(new Entry[kForms]) {}

DecodeResult DecodeCache::decode64(const u8* bytes, unsigned size, bool amd, DecodedInsn* insn) {
  const unsigned fixed = size < kKeyBytes ? 0 : fixed_bytes(bytes);
  if (fixed == 0) return decode(bytes, size, CodeMode::Bits64, false, amd, insn);
  u64 key;
  std::memcpy(&key, bytes, sizeof key);
  key &= ~u64{0} >> (64 - 8 * fixed);
  u64 hash = (key ^ fixed) * 0x9e3779b97f4a7c15;
  Entry& e = entries_[(hash ^ hash >> 32) >> 20 & (kForms - 1)];
  if (e.key == key && e.form.fixed == fixed && e.amd == amd && e.insn.length <= size) {
    stats_.hits++;
    *insn = e.insn;
    fill_in(e.form, bytes, insn);
    return DecodeResult::Ok;
  }
  stats_.misses++;
  InsnForm form;
  const DecodeResult r = decode(bytes, size, CodeMode::Bits64, false, amd, insn, &form);
  if (r == DecodeResult::Ok && form.fixed == fixed && known_size(form.disp_size) && known_size(form.imm_size))
    e = {key, form, amd, *insn};
  return r;
}

}  // namespace ring3::engine
