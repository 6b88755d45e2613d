#pragma once
#include <cstring>

#include "engine/interp/context.hpp"

/// Operand access of the interpreter's handlers, inline. Every file that uses Context::linear() or
/// effective_address() includes this.
namespace ring3::engine {

#define RING3_INLINE inline __attribute__((always_inline))

// ---- addresses ----

RING3_INLINE u64 truncate(u64 value, unsigned size) {
  return size == 8 ? value : size == 4 ? static_cast<u32>(value) : static_cast<u16>(value);
}

RING3_INLINE u64 Context::effective_address(const DecodedInsn& insn) const {
  const MemOperand& m = insn.mem;
  u64 a = static_cast<u64>(insn.disp);
  if (m.base < 16) {
    a += s.gpr[m.base];
  } else if (m.base == kRipBase) {
    a += s.rip;
  }
  if (m.index < 16) a += s.gpr[m.index] << m.scale_log2;
  if (insn.addrsize == 8) [[likely]] return a;
  return insn.addrsize == 4 ? static_cast<u32>(a) : static_cast<u16>(a);
}

RING3_INLINE bool Context::linear(Seg seg, u64 offset, unsigned size, bool write, u64* out) {
  if (code64) [[likely]] {
    // Not canonical is found by the Mmu, which never has a translation for it.
    *out = seg < FS ? offset : offset + s.seg[seg].base;
    return true;
  }
  if ((flat_segments >> seg & 1) && offset <= 0x1'0000'0000ull - size) [[likely]] {
    *out = offset;
    return true;
  }
  return linear_slow(seg, offset, size, write, out);
}

inline bool canonical(u64 address) { return static_cast<u64>(static_cast<i64>(address << 16) >> 16) == address; }

// ---- registers ----

/// T is u8, u16, u32 or u64; an 8-bit operand may be one of AH..BH.
template <class T>
RING3_INLINE T get_reg(const VcpuState& s, const Operand& o) {
  if constexpr (sizeof(T) == 1)
    return static_cast<T>(s.gpr[o.reg & 15] >> (o.kind == OperandKind::GprHigh ? 8 : 0));
  else
    return static_cast<T>(s.gpr[o.reg & 15]);
}

template <class T>
RING3_INLINE void put_reg(VcpuState& s, const Operand& o, T value) {
  u64& r = s.gpr[o.reg & 15];
  if constexpr (sizeof(T) == 8) {
    r = value;
  } else if constexpr (sizeof(T) == 4) {
    r = value;  // clears bits 63:32
  } else if constexpr (sizeof(T) == 2) {
    r = (r & ~0xffffull) | value;
  } else {
    const unsigned shift = o.kind == OperandKind::GprHigh ? 8 : 0;
    r = (r & ~(0xffull << shift)) | static_cast<u64>(value) << shift;
  }
}

/// Register n with T's width, no high bytes.
template <class T>
RING3_INLINE void put_gpr_as(VcpuState& s, unsigned n, T value) {
  put_reg<T>(s, Operand{OperandKind::Gpr, static_cast<u8>(n), sizeof(T), kWrite}, value);
}

// ---- memory ----

template <class T>
RING3_INLINE bool read_mem(Context& c, const DecodedInsn& insn, T* out) {
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  u64 lin;
  if (!c.linear(seg, c.effective_address(insn), sizeof(T), false, &lin)) return false;
  return c.mmu.read(lin, out, seg);
}

template <class T>
RING3_INLINE bool write_mem(Context& c, const DecodedInsn& insn, T value) {
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  u64 lin;
  if (!c.linear(seg, c.effective_address(insn), sizeof(T), true, &lin)) return false;
  return c.mmu.write(lin, value, seg);
}

/// Compares *host with *expected and stores desired when equal, as one locked operation; else *expected
/// is what was found. host may be misaligned.
template <class T>
RING3_INLINE bool host_cmpxchg(void* host, T* expected, T desired) {
  bool equal;
  // SAFETY: host comes from Mmu::rmw_begin() for sizeof(T) bytes.
  asm volatile("lock cmpxchg %3, (%2); sete %1" : "+a"(*expected), "=q"(equal) : "r"(host), "r"(desired) : "cc", "memory");
  return equal;
}

/// Held while a LOCKed access crosses a page and is therefore no single host access.
class SplitLock {
 public:
  explicit SplitLock(Context& c) : c_(c) {
    std::atomic_flag& flag = c.mmu.split_lock();
    while (flag.test_and_set(std::memory_order_acquire)) {
      c.mmu.serve_requests();  // the holder may be waiting for this vCPU
      __builtin_ia32_pause();
    }
    c.split_lock = &flag;
  }
  ~SplitLock() {
    std::atomic_flag* const flag = c_.split_lock;
    c_.split_lock = nullptr;
    flag->clear(std::memory_order_release);
  }
  SplitLock(const SplitLock&) = delete;
  SplitLock& operator=(const SplitLock&) = delete;

 private:
  Context& c_;
};

/// Read-modify-write of the memory at linear. f(T&) computes the new value; it may be called more than
/// once (a locked operation that lost a race), so it must not commit anything: the caller commits
/// flags and registers when true was returned.
template <class T, bool kLocked, class F>
RING3_INLINE bool modify_linear(Context& c, u64 lin, Seg seg, F&& f) {
  if constexpr (kLocked) {
    if (sizeof(T) > 1 && (lin & ~kPageMask) > kPageSize - sizeof(T)) [[unlikely]] {
      const SplitLock lock(c);
      return modify_linear<T, false>(c, lin, seg, f);
    }
  }
  Mmu::Rmw rmw;
  if (!c.mmu.rmw_begin(lin, sizeof(T), seg, &rmw)) return false;
  T value;
  if (rmw.host != nullptr) [[likely]] {
    if constexpr (kLocked) {
      T old;
      std::memcpy(&old, rmw.host, sizeof(T));
      do {
        value = old;
        f(value);
      } while (!host_cmpxchg(rmw.host, &old, value));
    } else {
      // SAFETY: rmw_begin() gave sizeof(T) writable bytes.
      std::memcpy(&value, rmw.host, sizeof(T));
      f(value);
      std::memcpy(rmw.host, &value, sizeof(T));
    }
  } else {
    std::memcpy(&value, rmw.buffer, sizeof(T));
    f(value);
  }
  return c.mmu.rmw_end(rmw, &value, sizeof(T));
}

template <class T, bool kLocked, class F>
RING3_INLINE bool modify_mem(Context& c, const DecodedInsn& insn, F&& f) {
  const Seg seg = static_cast<Seg>(insn.mem.seg);
  u64 lin;
  if (!c.linear(seg, c.effective_address(insn), sizeof(T), true, &lin)) return false;
  return modify_linear<T, kLocked>(c, lin, seg, f);
}

// ---- flags ----

/// Status flags as "lahf; seto %al" leaves them in AX: the guest's flags are those of the same
/// instruction on the host, undefined ones included.
RING3_INLINE void put_status(VcpuState& s, u32 ax) {
  s.rflags = (s.rflags & ~rflags::STATUS) | static_cast<u8>(ax >> 8) | static_cast<u64>(ax & 1) << 11;
}
/// AH for SAHF.
RING3_INLINE u32 status_ah(u64 flags) { return static_cast<u32>(flags & 0xff) << 8; }

/// The condition of Jcc, SETcc, CMOVcc: the low four bits of the opcode.
template <unsigned kCondition>
RING3_INLINE bool condition(u64 f) {
  bool r = false;
  if constexpr (kCondition / 2 == 0) r = f & rflags::OF;
  if constexpr (kCondition / 2 == 1) r = f & rflags::CF;
  if constexpr (kCondition / 2 == 2) r = f & rflags::ZF;
  if constexpr (kCondition / 2 == 3) r = f & (rflags::CF | rflags::ZF);
  if constexpr (kCondition / 2 == 4) r = f & rflags::SF;
  if constexpr (kCondition / 2 == 5) r = f & rflags::PF;
  if constexpr (kCondition / 2 == 6) r = ((f >> 4) ^ f) & rflags::SF;
  if constexpr (kCondition / 2 == 7) r = (((f >> 4) ^ f) & rflags::SF) | (f & rflags::ZF);
  return r != static_cast<bool>(kCondition & 1);
}

// ---- stack ----

RING3_INLINE u64 stack_mask(const Context& c) {
  return c.stack_size == 8 ? ~0ull : c.stack_size == 4 ? 0xffffffffull : 0xffffull;
}
/// Writes rSP in the stack's width.
RING3_INLINE void put_rsp(Context& c, u64 value) {
  u64& r = c.s.gpr[RSP];
  if (c.stack_size == 8) [[likely]] {
    r = value;
  } else if (c.stack_size == 4) {
    r = static_cast<u32>(value);
  } else {
    r = (r & ~0xffffull) | (value & 0xffff);
  }
}
template <class T>
RING3_INLINE bool push_value(Context& c, T value) {
  const u64 sp = (c.s.gpr[RSP] - sizeof(T)) & stack_mask(c);
  u64 lin;
  if (!c.linear(SS, sp, sizeof(T), true, &lin) || !c.mmu.write(lin, value, SS)) return false;
  put_rsp(c, sp);
  return true;
}
/// Reads the value offset bytes above the stack pointer; rSP stays.
template <class T>
RING3_INLINE bool peek_value(Context& c, u64 offset, T* out) {
  u64 lin;
  return c.linear(SS, (c.s.gpr[RSP] + offset) & stack_mask(c), sizeof(T), false, &lin) && c.mmu.read(lin, out, SS);
}

// ---- selection ----

/// Calls f with u8, u16, u32 or u64 as its template argument.
template <class F>
Handler by_size(unsigned size, F&& f) {
  switch (size) {
    case 1: return f.template operator()<u8>();
    case 2: return f.template operator()<u16>();
    case 4: return f.template operator()<u32>();
    case 8: return f.template operator()<u64>();
    default: return nullptr;
  }
}
/// As by_size, for instructions without an 8-bit form.
template <class F>
Handler by_size_not8(unsigned size, F&& f) {
  switch (size) {
    case 2: return f.template operator()<u16>();
    case 4: return f.template operator()<u32>();
    case 8: return f.template operator()<u64>();
    default: return nullptr;
  }
}
inline bool is_reg(const Operand& o) { return o.kind == OperandKind::Gpr || o.kind == OperandKind::GprHigh; }
inline bool is_mem(const Operand& o) { return o.kind == OperandKind::Mem; }
inline bool is_imm(const Operand& o) { return o.kind == OperandKind::Imm; }

}  // namespace ring3::engine
