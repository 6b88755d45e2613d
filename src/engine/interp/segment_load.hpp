#pragma once
#include "engine/interp/context.hpp"

/// Descriptors, segment loads and stack frames: what far transfers, event delivery, task switches and
/// the segment instructions have in common.
///
/// Spec:    Intel SDM vol. 3A ch. 3.4, 3.5, 5, 7.
/// Stops:   functions that return bool raise a stop and return false, with nothing changed but for
///          accessed bits in descriptor tables.
/// Trust:   selectors, descriptors and stack contents come from the guest.
namespace ring3::engine {

inline constexpr u16 kSelectorMask = 0xfffc;  ///< a selector as an error code: without its RPL

inline bool is_null(u16 selector) { return (selector & kSelectorMask) == 0; }
inline bool canonical(const Context& c, u64 address) {
  const unsigned shift = 64 - c.features.linear_bits;
  return static_cast<u64>(static_cast<i64>(address << shift) >> shift) == address;
}
/// A linear address as the current mode computes it.
inline u64 wrap_linear(const Context& c, u64 address) { return c.s.long_mode() ? address : static_cast<u32>(address); }

struct Descriptor {
  u64 low = 0;
  u64 high = 0;    ///< upper half of a 16-byte system descriptor (long mode), else 0
  u64 linear = 0;  ///< where it was read
  u16 selector = 0;

  u8 type() const { return (low >> 40) & 0xf; }
  bool s() const { return (low >> 44) & 1; }
  u8 dpl() const { return (low >> 45) & 3; }
  bool present() const { return (low >> 47) & 1; }
  bool l() const { return (low >> 53) & 1; }
  bool db() const { return (low >> 54) & 1; }
  bool code() const { return s() && (type() & 8); }
  bool conforming() const { return code() && (type() & 4); }
  bool readable() const { return s() && (!(type() & 8) || (type() & 2)); }
  bool writable_data() const { return s() && (type() & 0xa) == 2; }
  u32 limit() const {
    const u32 raw = (low & 0xffff) | ((low >> 32) & 0xf0000);
    return (low >> 55) & 1 ? (raw << 12) | 0xfff : raw;
  }
  u64 base() const { return ((low >> 16) & 0xffffff) | ((low >> 32) & 0xff000000) | (high << 32); }
  Segment segment() const;

  // as a gate
  u16 gate_selector() const { return (low >> 16) & 0xffff; }
  u64 gate_offset() const { return (low & 0xffff) | ((low >> 32) & 0xffff0000) | (high << 32); }
};

// System descriptor types.
inline constexpr u8 kTss16 = 1, kLdt = 2, kTss16Busy = 3, kCallGate16 = 4, kTaskGate = 5, kIntGate16 = 6,
                    kTrapGate16 = 7, kTss32 = 9, kTss32Busy = 11, kCallGate32 = 12, kIntGate32 = 14, kTrapGate32 = 15;

enum class Lookup : u8 { Ok, Limit /* outside its table: no stop raised */, Stop };
/// Reads the descriptor of a selector from the GDT or LDT. A system descriptor in long mode is read whole.
Lookup read_descriptor(Context& c, u16 selector, Descriptor* out);
/// The same, with a descriptor outside its table raised as vector(selector | ext).
bool read_descriptor(Context& c, u16 selector, u8 vector, u32 ext, Descriptor* out);

/// Sets the accessed bit of a code or data descriptor in its table when it is clear.
bool mark_accessed(Context& c, Descriptor& d);
/// Sets or clears the busy bit of a TSS descriptor in its table.
bool set_busy(Context& c, const Descriptor& d, bool busy);

/// The segment register after a real-mode or virtual-8086 load.
void load_real(Context& c, Seg seg, u16 selector);
void load_v86(Context& c, Seg seg, u16 selector);
/// A null selector in a data segment register; keeps what AMD keeps.
void load_null(Context& c, Seg seg, u16 selector);
/// MOV to a segment register other than CS in the current mode, with every check. The caller calls mode_changed().
bool load_segment(Context& c, Seg seg, u16 selector);
/// Checks and loads SS for a return to or entry of privilege level `cpl`: faults are vector(selector | ext), #SS when not
/// present. target64: the code segment is 64-bit, in which a null SS is legal below CPL 3. Fills *out only.
bool check_stack_segment(Context& c, u16 selector, u8 cpl, bool target64, u8 vector, u32 ext, Segment* out);
/// After a return to an outer level: data segments that the new level may not hold become null.
void drop_inner_segments(Context& c, u8 cpl);

/// The SS of 64-bit mode after a change of level: null, with the level in its RPL and DPL. Inlined always, as what follows.
[[gnu::always_inline]] inline Segment null_stack_segment(u8 cpl) {
  Segment g;
  g.selector = cpl;
  g.limit = 0xffffffff;
  g.type = 3;
  g.s = 1;
  g.dpl = cpl;
  g.present = 0;
  g.unusable = 1;
  g.db = 1;
  g.g = 1;
  return g;
}
/// A flat segment as SYSCALL and friends load it. Inlined always: also into code that is made without vectors.
[[gnu::always_inline]] inline Segment flat_code(u16 selector, u8 dpl, bool long64) {
  Segment g;
  g.selector = selector;
  g.limit = 0xffffffff;
  g.type = 11;
  g.dpl = dpl;
  g.l = long64;
  g.db = !long64;
  g.g = 1;
  return g;
}
[[gnu::always_inline]] inline Segment flat_data(u16 selector, u8 dpl) {
  Segment g;
  g.selector = selector;
  g.limit = 0xffffffff;
  g.type = 3;
  g.dpl = dpl;
  g.db = 1;
  g.g = 1;
  return g;
}

/// Whether [offset, offset + size) lies inside a segment that is not of 64-bit mode.
bool within_limit(const Segment& seg, u64 offset, unsigned size);

/// A frame pushed on a stack that may not be the current one yet: checked as a whole, then written.
class StackFrame {
 public:
  static constexpr unsigned kMax = 40;

  /// element: bytes of one push (2, 4, 8). address_size: bytes of the stack pointer in use.
  /// inner: the stack belongs to a more privileged level than the current one.
  StackFrame(const Segment& ss, unsigned element, unsigned address_size, u64 sp, bool inner)
      : ss_(ss), element_(element), address_size_(address_size), sp_(sp), inner_(inner) {}

  void push(u64 value) { values_[count_++] = value; }
  /// Limit or canonical checks of every element: #SS(error) on failure.
  bool check(Context& c, u32 error) const;
  /// Writes all elements or none.
  bool write(Context& c) const;
  /// The whole RSP after the pushes, starting from old_rsp's bits where the stack pointer is narrower.
  u64 final_rsp() const;

 private:
  u64 offset(unsigned i) const;  ///< of the i-th pushed element
  u64 linear(const Context& c, unsigned i) const;

  const Segment& ss_;
  unsigned element_, address_size_;
  u64 sp_;
  bool inner_;
  unsigned count_ = 0;
  u64 values_[kMax] = {};
};

/// Reads element `i` (of `size` bytes) above the current stack pointer, skip bytes further up.
bool peek_stack(Context& c, unsigned size, unsigned i, unsigned skip, u64* value);
/// RSP moved up by bytes on a stack of address_size.
u64 advance_rsp(u64 rsp, unsigned address_size, i64 bytes);

/// Inner stack of level cpl from the current TSS. #TS on failure. In long mode only *rsp is set.
bool read_tss_stack(Context& c, u8 cpl, u32 ext, u16* ss, u64* rsp);

/// Checks that rip may be executed in code segment cs (limit or canonical form): #GP(ext).
bool check_target(Context& c, const Segment& cs, u64 rip, u32 ext);

// ---- task.cpp ----

enum class TaskSwitch : u8 { Jmp, Call, Iret, Event };
/// Switches to the task of a TSS descriptor that the caller has checked for privilege.
/// return_rip: what is saved as the outgoing task's EIP. push_error: *error goes on the new task's stack.
/// false with Stop::Kind::Fault: nothing changed. false with Stop::Kind::Trap: the switch was made and the fault
/// belongs to the new task (deliver it with the RIP that is now in place).
bool switch_task(Context& c, const Descriptor& tss, TaskSwitch reason, u64 return_rip, const u32* error, u32 ext);
/// The TSS selector of a task gate (or the back link) as a checked descriptor. vector: #GP, or #TS for IRET.
bool read_task_descriptor(Context& c, u16 selector, bool busy, u8 vector, u32 ext, Descriptor* out);

}  // namespace ring3::engine
