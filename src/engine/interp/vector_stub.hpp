#pragma once
#include <array>
#include <optional>
#include <span>
#include <string>

#include "engine/decode/insn.hpp"
#include "engine/state/vcpu_state.hpp"

/// Re-encoding: from a guest's vector, MMX or x87 instruction to a short host function, a stub, that
/// loads the guest registers the instruction uses, executes the instruction itself with its memory
/// operand pointed at a buffer of ours, and stores what it wrote.
///
/// Confinement: no guest byte is copied but the opcode, ModRM's register numbers and immediates. An
///            instruction is only taken when decode called it a Host* operation, its opcode stands in this
///            file's own list of opcodes without implicit memory or system effect, and the rebuilt
///            bytes decode as the same operation on the same operands with [RSI] as their memory.
/// Registers: RDI = XsaveArea, RSI = StubFrame, RDX = the guest's gpr[16]; RAX returns a HostFault.
/// Pure functions; any thread.
namespace ring3::engine {

/// What a stub works on beside the guest state. One per vCPU.
struct alignas(64) StubFrame {
  u8 buffer[1024] = {};   ///< the memory operand
  u32 host_mxcsr = 0x1f80;
  u16 host_fcw = 0x37f;
  u16 unused = 0;
  u32 flags = 0;          ///< LAHF in bits 15:8, OF in bit 0; in and out
};
inline constexpr u32 kFrameMxcsr = 1024, kFrameFcw = 1028, kFrameFlags = 1032;

/// What a stub has in r10: what the fault exit undoes.
inline constexpr u32 kUndoX87 = 1, kUndoMxcsr = 2;

using StubFunction = u32 (*)(XsaveArea*, StubFrame*, u64* gpr);

enum StubFlags : u16 {
  kStubReadsFlags = 1 << 0,
  kStubWritesFlags = 1 << 1,
  kStubMxcsr = 1 << 2,     ///< runs under the guest's MXCSR: may raise SIMD exceptions
  kStubX87 = 1 << 3,       ///< the whole FXSAVE image is loaded and stored; else MMX registers alone, after enter_mmx()
  kStubMemRead = 1 << 4,
  kStubMemWrite = 1 << 5,
  kStubAligned = 1 << 6,
  kStubX87Control = 1 << 7,  ///< leaves FIP, FDP and FOP alone
  kStubX87NoWait = 1 << 8,   ///< executes although an unmasked exception is pending
  kStubTouchesXmm = 1 << 9,  ///< an MMX instruction that needs CR4.OSFXSR
  kStubUnaligned = 1 << 10,  ///< EVEX: Intel's processors spare it #AC
};

/// What the generator found out; the caller executes by it.
struct StubCode {
  std::array<u8, 384> bytes;
  unsigned size = 0;
  u16 flags = 0;      ///< StubFlags
  u16 mem_size = 0;   ///< bytes of the memory operand
  u16 fop = 0;        ///< x87: the opcode as FOP holds it
  u16 stores = 0;     ///< VEX: XMM registers that are written, by bit
  std::array<u8, 16> host_insn{};  ///< the rebuilt instruction, for tests
  u8 host_insn_size = 0;

  std::span<const u8> code() const { return {bytes.data(), size}; }
};

/// Null when the instruction is not one that may run on the host. avx: the host has it.
/// Ops: HostVec, HostMmx, HostX87, Emms.
std::optional<StubCode> make_stub(const DecodedInsn& insn, CodeMode mode, bool avx);

/// The code that faults inside stubs go to, at the start of an arena; *exit_other is the offset of the
/// exit for what is not a floating-point exception.
StubCode make_fault_exit(bool avx, unsigned* exit_other);

/// The bytes of an EVEX instruction, taken apart. Register numbers have five bits; in 32-bit code three.
struct EvexParts {
  u8 map = 0, pp = 0;
  bool w = false;
  u8 reg = 0, vvvv = 0;  ///< not inverted
  u8 rm = 0;             ///< register form
  u8 p2 = 0;             ///< z, L'L, b and aaa where they stand in the prefix' last byte; V' is 0
  u8 opcode = 0;
  bool memory = false;
  u8 imm[4] = {};
  u8 imm_size = 0;
};
/// False: no EVEX instruction, or no room for what is behind its displacement.
bool parse_evex(const DecodedInsn& insn, CodeMode mode, EvexParts* out);
/// The stub of a HostVec with kEvex or kOpmask (evex_stub.cpp). The host has AVX-512 F, BW, DQ and VL.
std::optional<StubCode> make_evex_stub(const DecodedInsn& insn, CodeMode mode);
/// A general register stands in ModRM.reg (1) or ModRM.rm (2) of an EVEX instruction, if it names one.
u8 evex_gpr_field(unsigned map, unsigned pp, u8 opcode);
/// EVEX instructions that runs_on_host() would name: all but gathers, scatters and their prefetches.
bool evex_runs_on_host(unsigned map, u8 opcode);

/// True when the instruction's result or exceptions depend on MXCSR. map: 1 = 0F, 2 = 0F38, 3 = 0F3A.
bool uses_mxcsr(unsigned map, u8 opcode);

/// True for opcodes of the MMX, SSE and AVX maps that have no implicit memory operand and no effect
/// beside registers, flags and the ModRM operand: what may be executed on the host. map as above.
bool runs_on_host(bool vex, unsigned map, u8 opcode);

}  // namespace ring3::engine
