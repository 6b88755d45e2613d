#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>

#include "base/result.hpp"
#include "engine/codecache/code_arena.hpp"
#include "engine/interp/context.hpp"
#include "engine/interp/host_fault.hpp"
#include "engine/interp/vector_stub.hpp"

/// Vector, MMX and x87 instructions: executed by the host's own units, through stubs (vector_stub.hpp).
///
/// Spec:      Intel SDM vol. 1 ch. 8-14, vol. 2 (exception classes 1-9, 12), vol. 3A 2.5, 13.
/// Faults:    #UD and #NM by CR0.EM/TS, CR4.OSFXSR/OSXSAVE and XCR0, alignment #GP, and page faults come
///            before the stub runs; SIMD exceptions come out of it (host_fault.hpp) as #XM.
/// x87:       FIP, FDP and FOP are the guest's, kept here and never the host's. FIP is updated by every non-control x87
///            instruction, FDP and FOP by one that ends with an unmasked exception, as on CPUs that say FDP_EXCPTN_ONLY
///            (vol. 1 8.1.8, 8.1.9). Inside IA-32e mode FCS and FDS are stored as zero.
/// Deviation: with CR0.NE = 0 a pending x87 exception is #MF too; FERR# and IRQ 13 are not modelled.
namespace ring3::engine {

/// A stub ready to run.
struct Stub {
  StubFunction run = nullptr;
  u16 flags = 0;  ///< StubFlags
  u16 mem_size = 0;
  u16 fop = 0;
  u16 stores = 0;  ///< VEX: registers written
};

/// A vCPU's stubs, bounded: when the arena is full, all are dropped. Owned by Context; the vCPU's thread.
struct VectorUnit {
  static Result<std::shared_ptr<VectorUnit>> create();

  /// The stub for insn, made at first use; null when the host cannot run it (#UD).
  const Stub* find(const DecodedInsn& insn, CodeMode mode) {
    const Key key = key_of(insn, mode);
    const Slot& slot = slots_[slot_of(key)];
    if (slot.key.low == key.low && slot.key.high == key.high) [[likely]] return slot.stub;
    return find_slow(insn, mode, key);
  }
  std::size_t stub_count() const { return stubs_.size(); }

  StubFrame frame;

 private:
  static constexpr unsigned kSlotBits = 11;
  static constexpr std::size_t kArenaSize = 512 * 1024;
  struct Key {
    u64 low = 0, high = 0;  ///< the instruction's bytes; the mode in the last one
  };
  struct Slot {
    Key key;
    const Stub* stub = nullptr;
  };

  explicit VectorUnit(std::unique_ptr<CodeArena> arena);
  static Key key_of(const DecodedInsn& insn, CodeMode mode);
  static unsigned slot_of(const Key& key) {
    return static_cast<unsigned>(((key.low ^ (key.high << 1 | key.high >> 63)) * 0x9e3779b97f4a7c15ull) >> (64 - kSlotBits));
  }
  const Stub* find_slow(const DecodedInsn& insn, CodeMode mode, const Key& key);
  void flush();

  std::unique_ptr<CodeArena> arena_;
  std::size_t exits_size_ = 0;  ///< the fault exits at the arena's start
  std::unique_ptr<HostFaultRange> faults_;
  GuestFeatures host_;
  bool avx_ = false;
  std::unique_ptr<Slot[]> slots_;
  std::unordered_map<std::string, Stub> stubs_;  ///< by what the stub depends on
};

/// Gives the context its VectorUnit. Called by whoever builds the vCPU, so that a host that refuses
/// memory for code is found out early; an instruction that finds none tries itself.
Status attach_vector_unit(Context& c);

// ---- shared by vector.cpp, vector_memory.cpp and xstate.cpp ----

/// An unmasked x87 exception waits for the next waiting instruction.
inline bool x87_pending(VcpuState& s) { return s.xsave.fsw() & ~s.xsave.fcw() & 0x3f; }
/// #UD/#NM checks; false: stop() is set.
bool sse_available(Context& c);  ///< legacy SSE
bool xstate_available(Context& c, u64 components);  ///< OSXSAVE, these bits of XCR0, TS
inline bool avx_available(Context& c) { return xstate_available(c, 6); }        ///< VEX
inline bool avx512_available(Context& c) { return xstate_available(c, 0xe6); }  ///< EVEX, and VEX on opmask registers
bool mmx_available(Context& c);  ///< MMX: also #MF for a pending x87 exception

/// The x87 stack becomes the MMX registers: TOP = 0, all tags valid; MM n is then ST(n)'s place.
void enter_mmx(XsaveArea& area);

/// Alignment checks are in force, and are not for VMASKMOV, gathers, VCVTPH2PS and VCVTPS2PH: Intel's processors spare these
/// (SDM vol. 2, exceptions of types 6, 12 and 11), AMD's do not.
inline bool alignment_spared(const Context& c) {
  return !c.features.amd && c.cpl == 3 && (c.s.cr0 & cr0::AM) && (c.s.rflags & rflags::AC);
}
/// Accesses without alignment, size <= 32: byte by byte.
bool read_unaligned(Context& c, u64 linear, u8* buffer, unsigned size, Seg seg);
bool check_write_unaligned(Context& c, u64 linear, unsigned size, Seg seg);
bool write_unaligned(Context& c, u64 linear, const u8* buffer, unsigned size, Seg seg);

/// Element n of a gather's or scatter's indices, of 4 bytes, with their sign, or 8.
inline u64 vsib_index(const u8* indices, unsigned n, unsigned size) {
  if (size == 8) {
    u64 v;
    std::memcpy(&v, indices + 8 * n, 8);
    return v;
  }
  i32 v;
  std::memcpy(&v, indices + 4 * n, 4);
  return static_cast<u64>(static_cast<i64>(v));
}

/// The context's VectorUnit, made if need be; null when the host refuses memory for code.
VectorUnit* unit_of(Context& c);
/// Before a stub under the guest's MXCSR.
void prepare_mxcsr(VcpuState& s);
/// The status flags that a stub left.
void put_flags(Context& c, const StubFrame& frame);
/// A stub came back through the fault exit with this code.
Exec stub_fault(Context& c, u32 code);

/// evex.cpp: AVX-512. Of HostVec with kEvex or kOpmask; of Vgather and Vscatter with kEvex.
Handler select_evex(const DecodedInsn& insn);
Handler select_evex_memory(const DecodedInsn& insn);
/// vector_memory.cpp: element-wise memory instructions.
Handler select_vector_memory(const DecodedInsn& insn);

}  // namespace ring3::engine
