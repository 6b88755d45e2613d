#pragma once
#include "engine/interp/context.hpp"

/// Helpers of the system instructions that other families and rooms use.
namespace ring3::engine {

/// Whether the current code may access I/O ports [port, port + size): IOPL, the TSS's bitmap (always in
/// virtual-8086 mode). false: stop() holds #GP(0), or the stop that reading the bitmap raised.
/// Spec: SDM vol. 1 ch. 19.5.
bool io_allowed(Context& c, u16 port, unsigned size);

/// CPUID with the bits that follow live state: OSXSAVE, OSPKE, APIC, XSAVE area sizes.
void guest_cpuid(Context& c, u32 leaf, u32 subleaf, u32 out[4]);

/// MOV to CR0, CR3, CR4 with every check and flush; also behind LMSW and task switches. false: #GP(0) or
/// another stop is raised and nothing changed. The caller returns Exec::Branch.
/// Spec: SDM vol. 3A 2.5, 4.1.2, 4.10.4, 9.8.5.
bool write_cr0(Context& c, u64 value);
bool write_cr3(Context& c, u64 value);
bool write_cr4(Context& c, u64 value);

/// Values as the debug registers store them, fixed bits applied.
inline constexpr u64 dr6_stored(u64 v) { return (v & 0xe00f) | 0xffff0ff0; }
inline constexpr u64 dr7_stored(u64 v) { return (v & 0xffff23ff) | 0x400; }

// One selector per file; select_system() asks them in order.
Handler select_control(const DecodedInsn& insn);  // control_regs.cpp: CRs, DRs, LMSW, SMSW, CLTS, INVLPG, INVPCID, XCR0
Handler select_syscall(const DecodedInsn& insn);  // syscall.cpp
Handler select_msr(const DecodedInsn& insn);      // msr.cpp: RDMSR, WRMSR

// ---- operands of system instructions (system.cpp) ----

/// Operand size of instructions that do not default to 64 bits in 64-bit mode: from 66h, REX.W and CS.D.
unsigned far_operand_size(const Context& c, const DecodedInsn& insn);
/// The last segment override among the prefixes, or DS: for implicit [rAX] operands.
Seg override_segment(const Context& c, const DecodedInsn& insn);
/// Linear address of insn.mem for size bytes, checked.
bool mem_linear(Context& c, const DecodedInsn& insn, unsigned size, bool write, u64* out);
/// Writes a general register: 4 bytes zero-extend, 2 keep the rest.
inline void put_gpr(VcpuState& s, u8 reg, unsigned size, u64 value) {
  u64& r = s.gpr[reg & 15];
  if (size == 8) r = value;
  else if (size == 4) r = static_cast<u32>(value);
  else if (size == 2) r = (r & ~0xffffull) | (value & 0xffff);
  else r = (r & ~0xffull) | (value & 0xff);
}
/// Reads a 16-bit register or memory operand.
bool read_rm16(Context& c, const DecodedInsn& insn, const Operand& op, u16* out);
/// Writes a selector-like value: 16 bits to memory, the operand size (zero-extended) to a register.
bool write_rm16(Context& c, const DecodedInsn& insn, const Operand& op, u64 value);

}  // namespace ring3::engine
