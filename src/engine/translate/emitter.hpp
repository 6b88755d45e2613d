#pragma once
#include <initializer_list>
#include <vector>

#include "base/types.hpp"
#include "engine/translate/frame_layout.h"

/// A narrow assembler: the few host instructions that translated code is made of beside the guest's own,
/// and the encoder that writes a guest's instruction with other operands.
///
/// Spec:      Intel SDM vol. 2 ch. 2 (prefixes, ModRM, SIB, VEX).
/// Threading: plain values.
namespace ring3::engine {

/// Host registers by number, as encoded.
enum HostReg : u8 {
  kHostRax,
  kHostRcx,
  kHostRdx,
  kHostRbx,
  kHostRsp,
  kHostRbp,
  kHostRsi,
  kHostRdi,
  kHostR8,
  kHostR9,
  kHostR10,
  kHostR11,
  kHostR12,
  kHostR13,
  kHostR14,
  kHostR15,
  kHostNone = 0xff,
};

/// A host memory operand. Addresses are 64 bits wide.
struct HostMem {
  u8 base = kHostNone;
  u8 index = kHostNone;  ///< never rsp
  u8 scale_log2 = 0;
  bool gs = false;  ///< by the host's segment
  i32 disp = 0;

  /// In the JitFrame.
  static HostMem frame(u32 offset) {
    return {kHostR9, kHostNone, 0, false, static_cast<i32>(offset) - RING3_FRAME_CENTRE};
  }
  /// By the host's gs base (frame.hpp), to which a register or nothing is added.
  static HostMem off_gs(u8 base, i32 disp) { return {base, kHostNone, 0, true, disp}; }
  static HostMem at(u8 base, i32 disp = 0) { return {base, kHostNone, 0, false, disp}; }
};

/// One instruction with a ModRM byte (or without: has_modrm false), ready to be written.
struct Encoding {
  bool p66 = false;  ///< legacy only
  u8 rep = 0;        ///< 0, F2h, F3h; legacy only
  bool lock = false;
  bool vex = false;
  bool evex = false;  ///< reg, rm and vvvv of five bits, map to 6
  u8 p2 = 0;          ///< EVEX: z, L'L, b, aaa in their places
  bool w = false, l = false;
  u8 pp = 0;    ///< VEX: 0 none, 1 66h, 2 F3h, 3 F2h
  u8 vvvv = 0;  ///< VEX: register number, not inverted; 0 with no operand (1111b)
  u8 map = 0;   ///< 0 one byte, 1 0F, 2 0F38, 3 0F3A
  u8 opcode = 0;
  bool has_modrm = true;
  bool vectors = false;  ///< reg and rm are no general registers
  u8 reg = 0;  ///< ModRM.reg with its extension bit, or the opcode extension
  bool memory = false;
  u8 rm = 0;  ///< register operand, or the register inside the opcode when there is no ModRM
  HostMem mem;
  bool rex_forced = false;  ///< byte operands 4..7 are SPL..DIL
  bool rex_barred = false;  ///< byte operands 4..7 are AH..BH
  u8 imm_size = 0;
  u8 imm[8] = {};
};

/// A place in the code; bound once, may be used before.
struct Label {
  static constexpr u32 kUnbound = ~0u;
  u32 at = kUnbound;
  u32 uses = kUnbound;  ///< chain of rel32 fields to fill in, through the fields themselves
};

class Emitter {
 public:
  void clear() {
    size_ = 0;
    relatives_.clear();
    early_label_ = false;
    watched_ = 0;
    forget();
  }
  /// From here on early_label() tells of the five bytes that come now.
  void watch() { watched_ = size(); }
  void truncate(u32 size);
  u32 size() const { return size_; }
  const u8* data() const { return code_.data(); }
  /// Where the rel32 fields of jumps and calls to labels stand.
  const std::vector<u32>& relatives() const { return relatives_; }
  /// A label was bound between the first of the watched bytes and the fifth.
  bool early_label() const { return early_label_; }

  void byte(u8 b) {
    forget();
    put(b);
  }
  /// At most kLongest.
  void bytes(std::initializer_list<u8> list) {
    forget();
    put_all(list);
  }
  void imm32(u32 v);
  void imm64(u64 v);
  void patch32(u32 at, u32 v);

  /// False when the operands cannot be written (a high byte register beside a REX prefix); nothing is
  /// written then.
  bool encode(const Encoding& e);

  // ---- moves; none of them touches flags ----
  void mov(u8 to, u8 from);  ///< 64 bits
  void mov32(u8 to, u8 from);
  void mov_imm(u8 to, u64 value);      ///< shortest form that gives this 64-bit value
  void load(u8 to, const HostMem& m);  ///< 64 bits; from r14 or r15 where one of them holds this slot (below), or nothing at all
  void load32(u8 to, const HostMem& m);
  void store(const HostMem& m, u8 from);  ///< 64 bits
  void store32(const HostMem& m, u8 from);
  void store_imm32(const HostMem& m, i32 value);  ///< sign-extended to 64 bits
  void lea(u8 to, const HostMem& m);
  void lea32(u8 to, const HostMem& m);

  // ---- these do ----
  void shr(u8 reg, u8 count);
  void and32(u8 reg, u32 mask);
  void and_imm(u8 reg, i32 mask);  ///< 64 bits
  void add(u8 reg, const HostMem& m);
  void xor_(u8 reg, const HostMem& m);
  void cmp_imm(u8 reg, i32 value);   ///< 64 bits
  void test_imm(u8 reg, i32 mask);
  void cmp(u8 reg, const HostMem& m);
  void cmp_imm(const HostMem& m, i32 value);  ///< 64 bits of memory
  void cmp32_imm(const HostMem& m, i32 value);
  void test8_imm(u8 reg, u8 mask);

  // ---- what the scratch registers hold ----
  // Known from one instruction to the next, to a label, a call, or raw bytes: of a guest register's slot of the frame, from its
  // last load or store; and of r15, what holds() says.

  bool r14_holds(u32 slot) const { return r14_ == slot; }
  bool knows_r14() const { return r14_ != kUnknown; }
  bool knows_r15() const { return r15_ != kUnknown; }
  void let_r14_hold(u32 slot) { r14_ = slot; }  ///< the caller knows, of a guest register's slot
  /// r15 = the frame's slot, if it is not there since the last call for this slot or holds().
  void load_r15(u32 slot) { load_held(kHostR15, &r15_, slot); }
  /// r15 holds what the frame's slot does. What is kept there must not change meanwhile.
  void holds(u32 slot) { r15_ = slot; }
  void load_r14(u32 slot) { load_held(kHostR14, &r14_, slot); }  ///< as load_r15

  // ---- control ----
  void jcc(u8 condition, Label& to);  ///< rel32; condition: the low four bits of the opcode
  void jmp(Label& to);
  void call(Label& to);
  void bind(Label& l);
  /// jrcxz (address_size 8) or jecxz (4) over a short distance: returns where the rel8 stands.
  u32 jrcxz_short(u8 address_size);
  u32 jmp_short();
  u32 jcc_short(u8 condition);
  void bind_short(u32 at) {
    code_[at] = static_cast<u8>(size() - at - 1);
    forget();
    note_label();
  }

 private:
  static constexpr u32 kUnknown = ~0u;
  static constexpr i32 kGuestSlots = 32;  ///< bytes of the frame, from its start on, that are guest registers

  void put(u8 b) {
    u8* at = begin();
    *at = b;
    end(at + 1);
  }
  void put_all(std::initializer_list<u8> list) {
    u8* at = begin();
    for (const u8 b : list) *at++ = b;
    end(at);
  }
  static bool is_guest_slot(const HostMem& m) { return m.base == kHostR9 && m.index == kHostNone && m.disp < kGuestSlots - RING3_FRAME_CENTRE; }
  static u32 slot_of(const HostMem& m) { return static_cast<u32>(m.disp + RING3_FRAME_CENTRE); }
  void forget() { r14_ = r15_ = kUnknown; }
  /// The register is written.
  void lost(u8 reg) {
    if (reg == kHostR14) r14_ = kUnknown;
    if (reg == kHostR15) r15_ = kUnknown;
  }
  /// The memory operand is written.
  void lost(const HostMem& m) {
    if (!is_guest_slot(m)) return;
    const u32 slot = slot_of(m) & ~7u;
    if (r14_ == slot) r14_ = kUnknown;
    if (r15_ == slot) r15_ = kUnknown;
  }
  void note_writes(const Encoding& e);
  void load_held(u8 to, u32* held, u32 slot);
  void op_rm(bool w, u8 opcode, u8 reg, const HostMem& m);
  /// ModRM, SIB and displacement; returns their end.
  static u8* memory_operand(u8* at, u8 reg, const HostMem& m, bool byte_disp = true);
  void op_rr(bool w, u8 opcode, u8 reg, u8 rm);
  void use(Label& l);
  void note_label() { early_label_ |= size() > watched_ && size() - watched_ < 5; }

  /// Where the next instruction comes. kLongest bytes may be written there, those before end()'s count.
  u8* begin() {
    if (code_.size() - size_ < kLongest) code_.resize(2 * code_.size());
    return code_.data() + size_;
  }
  void end(const u8* at) { size_ = static_cast<u32>(at - code_.data()); }

  static constexpr std::size_t kLongest = 64;
  std::vector<u8> code_ = std::vector<u8>(1u << 14);  ///< its first size_ bytes
  u32 size_ = 0;
  std::vector<u32> relatives_;
  bool early_label_ = false;
  u32 watched_ = 0;
  u32 r14_ = kUnknown, r15_ = kUnknown;  ///< the frame slots that they hold
};

}  // namespace ring3::engine
