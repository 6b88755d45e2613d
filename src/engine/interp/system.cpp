#include "engine/interp/system.hpp"

#include <sys/random.h>

#include "engine/interp/families.hpp"
#include "engine/interp/msr.hpp"
#include "engine/interp/operand.hpp"
#include "engine/interp/segment_load.hpp"

/// System instructions that are not a matter of segments, control registers or system calls.
///
/// Spec: Intel SDM vol. 2; AMD APM vol. 3 (CLZERO). Hypercalls: the kernel's virt/kvm/x86/hypercalls.
namespace ring3::engine {

unsigned far_operand_size(const Context& c, const DecodedInsn& insn) {
  bool p66 = false, rexw = false;
  for (unsigned i = 0; i < insn.length; ++i) {
    const u8 b = insn.raw[i];
    if (b == 0x66) {
      p66 = true;
      rexw = false;
    } else if (c.code64 && (b & 0xf0) == 0x40) {
      rexw = b & 8;
    } else if (b == 0x67 || b == 0xf0 || b == 0xf2 || b == 0xf3 || b == 0x26 || b == 0x2e || b == 0x36 || b == 0x3e ||
               b == 0x64 || b == 0x65) {
      rexw = false;
    } else {
      break;
    }
  }
  if (rexw) return 8;
  const bool wide = c.code_mode != CodeMode::Bits16;
  return wide != p66 ? 4 : 2;
}

Seg override_segment(const Context& c, const DecodedInsn& insn) {
  Seg seg = DS;
  for (unsigned i = 0; i < insn.length; ++i) {
    switch (insn.raw[i]) {
      case 0x64: seg = FS; break;
      case 0x65: seg = GS; break;
      case 0x26: seg = c.code64 ? seg : ES; break;
      case 0x2e: seg = c.code64 ? seg : CS; break;
      case 0x36: seg = c.code64 ? seg : SS; break;
      case 0x3e: seg = c.code64 ? seg : DS; break;
      case 0x66:
      case 0x67:
      case 0xf0:
      case 0xf2:
      case 0xf3: break;
      default: return seg;
    }
  }
  return seg;
}

bool mem_linear(Context& c, const DecodedInsn& insn, unsigned size, bool write, u64* out) {
  return c.linear(static_cast<Seg>(insn.mem.seg), c.effective_address(insn), size, write, out);
}

bool read_rm16(Context& c, const DecodedInsn& insn, const Operand& op, u16* out) {
  if (op.kind != OperandKind::Mem) {
    *out = static_cast<u16>(c.s.gpr[op.reg & 15]);
    return true;
  }
  u64 at;
  return mem_linear(c, insn, 2, false, &at) && c.mmu.read(at, out, static_cast<Seg>(insn.mem.seg));
}

bool write_rm16(Context& c, const DecodedInsn& insn, const Operand& op, u64 value) {
  if (op.kind != OperandKind::Mem) {
    put_gpr(c.s, op.reg, op.size, value);
    return true;
  }
  u64 at;
  return mem_linear(c, insn, 2, true, &at) &&
         c.mmu.write(at, static_cast<u16>(value), static_cast<Seg>(insn.mem.seg));
}

bool io_allowed(Context& c, u16 port, unsigned size) {
  VcpuState& s = c.s;
  if (s.real_mode()) return true;
  if (!s.v8086() && c.cpl <= ((s.rflags >> 12) & 3)) return true;
  const Segment& tr = s.tr;
  u16 map, bits;
  if (tr.unusable || (tr.type & 0xd) != 9 || tr.limit < 0x67) {
    c.gp0();
    return false;
  }
  if (!c.mmu.read_system(wrap_linear(c, tr.base + 0x66), &map)) return false;
  const u32 at = map + port / 8u;
  if (at + 1 > tr.limit) {
    c.gp0();
    return false;
  }
  if (!c.mmu.read_system(wrap_linear(c, tr.base + at), &bits)) return false;
  if ((bits >> (port & 7)) & ((1u << size) - 1)) {
    c.gp0();
    return false;
  }
  return true;
}

void guest_cpuid(Context& c, u32 leaf, u32 subleaf, u32 out[4]) {
  const VcpuState& s = c.s;
  c.env.cpuid(leaf, subleaf, out);
  switch (leaf) {
    case 1: {
      out[2] = (s.cr4 & cr4::OSXSAVE) ? out[2] | 1u << 27 : out[2] & ~(1u << 27);
      u64 apic_base;
      if (c.env.rdmsr(msr::APIC_BASE, &apic_base) == Environment::Answer::Done && !(apic_base & (1u << 11)))
        out[3] &= ~(1u << 9);
      break;
    }
    case 7:
      if (subleaf == 0) out[2] = (s.cr4 & cr4::PKE) ? out[2] | 1u << 4 : out[2] & ~(1u << 4);
      break;
    case 0xd: {
      if (subleaf > 1 || (out[0] | out[1] | out[2] | out[3]) == 0) break;
      // EBX: the area's size for what is enabled now; standard for subleaf 0, compacted for 1.
      const bool compact = subleaf == 1;
      if (compact && !(out[0] & 0xa)) break;
      const u64 components = compact ? s.xcr0 | s.msr.xss : s.xcr0;
      u32 size = 576;
      for (u32 i = 2; i < 63; ++i) {
        if (!((components >> i) & 1)) continue;
        u32 component[4];
        c.env.cpuid(0xd, i, component);
        if (compact) {
          if (component[2] & 2) size = (size + 63) & ~63u;
          size += component[0];
        } else if (component[1] + component[0] > size) {
          size = component[1] + component[0];
        }
      }
      out[1] = size;
      break;
    }
    default: break;
  }
}

namespace {

Exec answer(Context& c, Environment::Answer a, Exec done = Exec::Next) {
  if (a == Environment::Answer::Done) return done;
  return a == Environment::Answer::Fault ? c.gp0() : c.exit();
}

// ---- flags ----

bool iopl_allows(const Context& c) { return c.s.real_mode() || c.cpl <= ((c.s.rflags >> 12) & 3); }

Exec cli(Context& c, const DecodedInsn&) {
  if (!iopl_allows(c)) return c.gp0();
  c.s.rflags &= ~rflags::IF;
  return Exec::Next;
}

Exec sti(Context& c, const DecodedInsn&) {
  if (!iopl_allows(c)) return c.gp0();
  if (!(c.s.rflags & rflags::IF)) c.s.sti_shadow = true;
  c.s.rflags |= rflags::IF;
  return Exec::Branch;
}

template <bool kSet>
Exec clac_stac(Context& c, const DecodedInsn&) {
  if (c.cpl != 0) return c.ud();
  c.s.rflags = kSet ? c.s.rflags | rflags::AC : c.s.rflags & ~rflags::AC;
  c.mmu.mode_changed();  // at CPL 0 nothing else depends on AC
  return Exec::Next;
}

Exec hlt(Context& c, const DecodedInsn&) { return c.cpl != 0 ? c.gp0() : Exec::Halt; }

// ---- I/O ----

// E4/E5/EC/ED and E6/E7/EE/EF: bit 0 is the width, bit 3 tells DX from an immediate.
unsigned io_size(const Context& c, const DecodedInsn& insn) {
  return !(insn.opcode & 1) ? 1 : far_operand_size(c, insn) == 2 ? 2 : 4;
}
u16 io_port(const Context& c, const DecodedInsn& insn) {
  return insn.opcode & 8 ? static_cast<u16>(c.s.gpr[RDX]) : static_cast<u8>(insn.imm);
}

Exec in(Context& c, const DecodedInsn& insn) {
  const unsigned size = io_size(c, insn);
  const u16 port = io_port(c, insn);
  if (!io_allowed(c, port, size)) return Exec::Stop;
  u32 value = 0;
  const Environment::Answer a = c.env.port_in(port, size, &value);
  if (a != Environment::Answer::Done) return answer(c, a);
  put_gpr(c.s, RAX, size, value);
  return Exec::Next;
}

Exec out(Context& c, const DecodedInsn& insn) {
  const unsigned size = io_size(c, insn);
  const u16 port = io_port(c, insn);
  if (!io_allowed(c, port, size)) return Exec::Stop;
  const u32 mask = size == 4 ? 0xffffffff : (1u << (8 * size)) - 1;
  return answer(c, c.env.port_out(port, size, static_cast<u32>(c.s.gpr[RAX]) & mask));
}

// ---- time, identification, random numbers ----

void put_edx_eax(VcpuState& s, u64 v) {
  s.gpr[RAX] = static_cast<u32>(v);
  s.gpr[RDX] = v >> 32;
}

bool tsc_blocked(Context& c) {
  if (c.cpl == 0 || !(c.s.cr4 & cr4::TSD)) return false;
  c.gp0();
  return true;
}

Exec rdtsc(Context& c, const DecodedInsn&) {
  if (tsc_blocked(c)) return Exec::Stop;
  put_edx_eax(c.s, c.env.rdtsc());
  return Exec::Next;
}

Exec rdtscp(Context& c, const DecodedInsn&) {
  if (tsc_blocked(c)) return Exec::Stop;
  put_edx_eax(c.s, c.env.rdtsc());
  c.s.gpr[RCX] = static_cast<u32>(c.s.msr.tsc_aux);
  return Exec::Next;
}

Exec rdpid(Context& c, const DecodedInsn& insn) {
  put_gpr(c.s, insn.operands[0].reg, c.code64 ? 8 : 4, static_cast<u32>(c.s.msr.tsc_aux));
  return Exec::Next;
}

/// There is no performance-monitoring unit, hence no valid counter.
Exec rdpmc(Context& c, const DecodedInsn&) { return c.gp0(); }

Exec cpuid(Context& c, const DecodedInsn&) {
  VcpuState& s = c.s;
  if (c.cpl != 0 && (s.msr.misc_features & 1)) return c.gp0();
  u32 r[4] = {};
  guest_cpuid(c, static_cast<u32>(s.gpr[RAX]), static_cast<u32>(s.gpr[RCX]), r);
  s.gpr[RAX] = r[0];
  s.gpr[RBX] = r[1];
  s.gpr[RCX] = r[2];
  s.gpr[RDX] = r[3];
  return Exec::Next;
}

Exec rdrand(Context& c, const DecodedInsn& insn) {
  u64 value = 0;
  const bool ok = getrandom(&value, sizeof value, GRND_NONBLOCK) == sizeof value;
  if (!ok) value = 0;
  put_gpr(c.s, insn.operands[0].reg, insn.operands[0].size, value);
  c.s.rflags = (c.s.rflags & ~rflags::STATUS) | (ok ? rflags::CF : 0);
  return Exec::Next;
}

// ---- caches and ordering ----

/// INVD would throw away what other vCPUs wrote; like WBINVD it has nothing to do on coherent memory.
Exec wbinvd(Context& c, const DecodedInsn&) { return c.cpl != 0 ? c.gp0() : Exec::Next; }

Exec fence(Context&, const DecodedInsn&) {
  std::atomic_thread_fence(std::memory_order_seq_cst);
  return Exec::Next;
}

Exec clflush(Context& c, const DecodedInsn& insn) {
  u64 at;
  if (!mem_linear(c, insn, 1, false, &at)) return Exec::Stop;
  return c.mmu.check_read(at, 1, static_cast<Seg>(insn.mem.seg)) ? Exec::Next : Exec::Stop;
}

/// The implicit address in rAX, as wide as the address size.
u64 rax_address(const Context& c, const DecodedInsn& insn) {
  const u64 rax = c.s.gpr[RAX];
  return insn.addrsize == 2 ? rax & 0xffff : insn.addrsize == 4 ? static_cast<u32>(rax) : rax;
}

Exec clzero(Context& c, const DecodedInsn& insn) {
  const Seg seg = override_segment(c, insn);
  u64 at;
  if (!c.linear(seg, rax_address(c, insn) & ~63ull, 64, true, &at)) return Exec::Stop;
  static constexpr u8 zero[64] = {};
  return c.mmu.write_bytes(at & ~63ull, zero, 64, seg) ? Exec::Next : Exec::Stop;
}

/// MISC_ENABLE bit 18.
bool has_mwait(Context& c) {
  if (c.env.mwait_without_feature) return true;
  return c.env.mwait_by_misc_enable ? (c.s.msr.misc_enable >> 18 & 1) != 0 : c.features[Feature::Monitor];
}

Exec monitor(Context& c, const DecodedInsn& insn) {
  if (c.cpl != 0 || !has_mwait(c)) return c.ud();
  if (static_cast<u32>(c.s.gpr[RCX]) != 0) return c.gp0();
  const Seg seg = override_segment(c, insn);
  u64 at;
  if (!c.linear(seg, rax_address(c, insn), 1, false, &at)) return Exec::Stop;
  return c.mmu.check_read(at, 1, seg) ? Exec::Next : Exec::Stop;
}

/// May return at once for any reason (SDM: "implementation-dependent"): a guest loops around it. Waiting for the
/// monitored line would miss another vCPU's store.
Exec mwait(Context& c, const DecodedInsn&) {
  if (c.cpl != 0 || !has_mwait(c)) return c.ud();
  if (static_cast<u32>(c.s.gpr[RCX]) > 1) return c.gp0();
  return Exec::Branch;
}

// ---- virtual machines ----

Exec hv_hypercall(Context& c) {
  if (!c.protected_mode || c.cpl != 0) return c.ud();
  u64* const r = c.s.gpr;
  const auto pair = [r](Gpr high, Gpr low) { return r[high] << 32 | static_cast<u32>(r[low]); };
  u64 result = 0;
  const Environment::Answer a = c.code64 ? c.env.hv_hypercall(r[RCX], r[RDX], r[R8], &result)
                                         : c.env.hv_hypercall(pair(RDX, RAX), pair(RBX, RCX), pair(RDI, RSI), &result);
  switch (a) {
    case Environment::Answer::Fault: return c.ud();
    case Environment::Answer::Exit: return c.exit();
    case Environment::Answer::Done: break;
  }
  if (c.code64) {
    r[RAX] = result;
  } else {
    r[RDX] = result >> 32;
    r[RAX] = static_cast<u32>(result);
  }
  return Exec::Branch;
}

Exec xen_hypercall(Context& c) {
  u64* const r = c.s.gpr;
  u64 args[6] = {r[RDI], r[RSI], r[RDX], r[R10], r[R8], r[R9]};
  if (!c.code64) {
    const Gpr names[6] = {RBX, RCX, RDX, RSI, RDI, RBP};
    for (unsigned i = 0; i < 6; i++) args[i] = static_cast<u32>(r[names[i]]);
  }
  u64 result = 0;
  if (c.env.xen_hypercall(r[RAX], args, c.code64, c.cpl, &result) != Environment::Answer::Done) return c.exit();
  r[RAX] = result;
  return Exec::Branch;
}

Exec hypercall(Context& c, const DecodedInsn& insn) {
  VcpuState& s = c.s;
  if (!c.protected_mode && c.cpl != 0) return c.ud();
  const Op native = c.features.amd ? Op::Vmmcall : Op::Vmcall;
  if (insn.op != native && c.env.other_hypercall != Environment::OtherHypercall::Works) {
    if (c.env.other_hypercall == Environment::OtherHypercall::Faults) return c.ud();
    const u8 bytes[3] = {0x0f, 0x01, static_cast<u8>(native == Op::Vmmcall ? 0xd9 : 0xc1)};
    u64 at;
    if (!c.linear(CS, s.rip - insn.length, sizeof bytes, false, &at)) return Exec::Stop;
    if (!c.mmu.write_bytes(at, bytes, sizeof bytes, CS, Privilege::System)) return Exec::Stop;
    s.rip -= insn.length;
    return Exec::Branch;
  }
  if (c.env.xen_hypercalls(s.gpr[RAX])) return xen_hypercall(c);
  if (c.env.hv_hypercalls()) return hv_hypercall(c);
  const u64 mask = c.code64 ? ~0ull : 0xffffffffull;
  u64 result = static_cast<u64>(-1);  // -KVM_EPERM
  if (c.cpl == 0) {
    const u64 args[4] = {s.gpr[RBX] & mask, s.gpr[RCX] & mask, s.gpr[RDX] & mask, s.gpr[RSI] & mask};
    if (c.env.hypercall(s.gpr[RAX] & mask, args, &result) != Environment::Answer::Done) return c.exit();
  }
  s.gpr[RAX] = result & mask;
  return Exec::Branch;
}

/// RSM outside SMM; instructions whose feature is never offered.
Exec undefined(Context& c, const DecodedInsn&) { return c.ud(); }

}  // namespace

Handler select_system(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::Cli: return cli;
    case Op::Sti: return sti;
    case Op::Clac: return clac_stac<false>;
    case Op::Stac: return clac_stac<true>;
    case Op::Hlt: return hlt;
    case Op::In: return in;
    case Op::Out: return out;
    case Op::Rdtsc: return rdtsc;
    case Op::Rdtscp: return rdtscp;
    case Op::Rdpid: return rdpid;
    case Op::Rdpmc: return rdpmc;
    case Op::Cpuid: return cpuid;
    case Op::Rdrand:
    case Op::Rdseed: return rdrand;
    case Op::Invd:
    case Op::Wbinvd: return wbinvd;
    case Op::Lfence:
    case Op::Mfence:
    case Op::Sfence:
    case Op::Serialize: return fence;
    case Op::Clflush:
    case Op::Clflushopt:
    case Op::Clwb: return clflush;
    case Op::Clzero: return clzero;
    case Op::Monitor: return monitor;
    case Op::Mwait: return mwait;
    case Op::Vmcall:
    case Op::Vmmcall: return hypercall;
    case Op::Rsm:
    case Op::Rdpkru:
    case Op::Wrpkru: return undefined;
    default: break;
  }
  if (Handler h = select_control(insn)) return h;
  if (Handler h = select_syscall(insn)) return h;
  return select_msr(insn);
}

}  // namespace ring3::engine
