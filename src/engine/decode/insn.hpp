#pragma once
#include "base/types.hpp"
#include "engine/decode/op.hpp"

/// One decoded guest instruction: what the bytes say, nothing of what they do.
///
/// Spec:      Intel SDM vol. 2, ch. 2 and the instruction pages.
/// Ownership: a plain value; 64 bytes with the cache's handler pointer beside it.
namespace ring3::engine {

/// Code-segment mode the bytes are read in: CS.L / CS.D.
enum class CodeMode : u8 { Bits16, Bits32, Bits64 };

enum class OperandKind : u8 {
  None,
  Gpr,      ///< reg = 0..15, size = 1, 2, 4 or 8
  GprHigh,  ///< reg = 0..3 for AH, CH, DH, BH
  Mem,      ///< DecodedInsn::mem; size in bytes (0: no data access, LEA-like, or variable)
  Imm,      ///< DecodedInsn::imm, sign- or zero-extended to 64 bits as the instruction defines
  Imm2,     ///< a second immediate (ENTER, EXTRQ, INSERTQ): DecodedInsn::disp
  Rel,      ///< branch displacement in DecodedInsn::imm, sign-extended
  FarPtr,   ///< imm = offset, disp = selector
  Seg,      ///< reg = Seg number
  Cr,       ///< reg = 0..15
  Dr,       ///< reg = 0..15
  Vec,      ///< XMM/YMM/ZMM n, 0..31; size 16, 32 or 64 (scalar operands: the element's size)
  Mask,     ///< opmask register k0..k7, as a source or destination; a write mask is in DecodedInsn::mask
  Mmx,      ///< MM n
  St,       ///< ST(n)
  Other,    ///< a register that needs no number (flags, MXCSR, …) or an implicit one
};

/// How an operand is used.
enum OperandAccess : u8 { kRead = 1, kWrite = 2, kReadWrite = 3 };

struct Operand {
  OperandKind kind = OperandKind::None;
  u8 reg = 0;
  u8 size = 0;    ///< bytes
  u8 access = 0;  ///< OperandAccess bits
};

inline constexpr u8 kNoReg = 0xff;   ///< MemOperand: no base / no index
inline constexpr u8 kRipBase = 0xfe;  ///< MemOperand: RIP-relative (next instruction + disp)

/// seg:[base + index*scale + disp], computed in DecodedInsn::addrsize bits.
/// String and other implicit operands do not appear here; their handlers know them.
struct MemOperand {
  u8 base = kNoReg;
  u8 index = kNoReg;  ///< GPR number; vector register number for VSIB
  u8 scale_log2 = 0;
  u8 seg = 3;         ///< effective segment (defaults and overrides applied; in 64-bit mode ES/CS/SS/DS overrides are ignored)
};

enum InsnFlags : u16 {
  kLock = 1 << 0,        ///< LOCK prefix present and legal for this form (else Op::Invalid)
  kRep = 1 << 1,         ///< F3 as a repeat prefix (string instructions)
  kRepne = 1 << 2,       ///< F2 as a repeat prefix
  kHasMem = 1 << 3,      ///< mem is valid
  kEndsBlock = 1 << 4,   ///< control leaves or the mode may change: a block ends here
  kVex = 1 << 5,
  kAligned = 1 << 6,     ///< legacy-SSE style: memory operand must be naturally aligned, #GP(0) otherwise
  kMayFaultAfterPartial = 1 << 7,  ///< commits progress before the instruction ends (string instructions)
  kXacquire = 1 << 8,
  kEvex = 1 << 9,     ///< EVEX-encoded: needs AVX-512's state switched on, and Avx512f beside DecodedInsn::feature
  kOpmask = 1 << 10,  ///< VEX-encoded with kVex, on opmask registers: needs AVX-512's state switched on
  kEvexVl = 1 << 11,  ///< EVEX-encoded with vectors of 16 or 32 bytes: needs Avx512vl too
};

/// Which elements of an EVEX memory operand a write mask lets be accessed; the others do not fault (SDM vol. 2, 2.7.5).
enum class MaskedMemory : u8 {
  Whole,    ///< the mask does not spare any: "NF" exception classes, or no write mask
  Each,     ///< element i under bit i
  Checked,  ///< stores of an "NF" class: element i is written under bit i, and any may fault
  Modulo,   ///< broadcasts: element i mod (elements in memory) under bit i
  Scalar,   ///< one element under bit 0
  Packed,   ///< compress and expand: as many elements from the start as bits are set
};

struct DecodedInsn {
  Op op = Op::Invalid;
  u8 length = 0;       ///< bytes, 1..15
  u8 opsize = 0;       ///< effective operand size in bytes: 1, 2, 4, 8
  u8 addrsize = 0;     ///< effective address size in bytes: 2, 4, 8
  Feature feature = Feature::Base;  ///< #UD when the guest's CPUID lacks it
  u16 flags = 0;       ///< InsnFlags
  Operand operands[4]; ///< in Intel order; unused ones are None. Implicit operands are not listed.
  MemOperand mem;
  u8 mask = 0;          ///< EVEX: number of the write mask; 0: none
  u8 mask_bits = 0;     ///< EVEX: how many bits of the mask count for the memory operand
  u8 mem_element = 0;   ///< EVEX: bytes of an element in memory
  MaskedMemory masked = MaskedMemory::Whole;
  i64 disp = 0;
  i64 imm = 0;
  u8 raw[15] = {};     ///< the bytes themselves
  u8 opcode = 0;       ///< last opcode byte, for tests and host execution

  bool has(u16 f) const { return flags & f; }
};

}  // namespace ring3::engine
