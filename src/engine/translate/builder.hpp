#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "engine/translate/block_translator.hpp"
#include "engine/translate/emitter.hpp"
#include "engine/translate/foresight.hpp"
#include "engine/translate/liveness.hpp"
#include "engine/translate/reencode.hpp"

/// One block being translated. Private to this room.
///
/// Flags: where the guest's status flags are is known at every point: in the host's RFLAGS, in the frame (as
///        LAHF and SETO leave them), or nowhere because nobody will read them. Code that clobbers RFLAGS
///        moves them to the frame first, once; they come back when an instruction needs them, or at an exit.
/// Memory: access() emits the inline check and says how the instruction reaches the operand. Up to the
///        last check of an instruction nothing of the guest's state changes, so that it can be left to
///        the interpreter from the check's slow path.
/// Failure: a family returns false when it cannot translate the instruction; what it emitted is dropped.
namespace ring3::engine {

class BlockBuilder {
 public:
  bool run(const BlockRequest& request, TranslatedBlock* out);

 private:
  friend class Foresight;  // written_registers()

  static constexpr u8 kScratch0 = kHostR14, kScratch1 = kHostR15;
  static constexpr u32 kFlagsSlot = frame::kFlags, kRaxSlot = frame::kScratch + 8,
                       kValueSlot = frame::kScratch + 16, kRflags = RING3_FRAME_STATE_RFLAGS;

  enum class Flags : u8 { Host, Frame, Dead };

  /// A guest address.
  struct Address {
    bool constant = false;
    bool rip = false;                  ///< value is to be added to the page
    u64 value = 0;                     ///< constant: linear, before a segment base
    u8 base = kNoReg, index = kNoReg;  ///< guest registers
    u8 scale_log2 = 0;
    i32 disp = 0;
    bool narrow = false;  ///< 32-bit address size
    u32 segment = 0;      ///< frame offset of the segment base; 0: none (no base stands at offset 0)
    u8 bit = kNoReg;      ///< BT and its kind: guest register whose signed bit offset moves the operand
    u8 bit_size = 0;      ///< by units of this many bytes
    bool linear32 = false;  ///< the linear address is truncated to 32 bits
  };
  enum class Kind : u8 { Read, Write };
  struct Access {
    HostMem mem;
    bool scratch0_free = false, scratch1_free = false;
  };

  /// Code behind the block: reached from a check.
  struct SlowPath {
    Label entry, resume;  ///< resume: r15 = addend
    Address address;
    u8 size = 0;
    bool aligned = false, write = false;
    bool whole = false;  ///< in one page, or interpreted
    bool refused = false;  ///< no fill: interpreted
    u32 insn = 0;
  };
  /// Accesses that one check stands for (groups.cpp).
  struct Group {
    bool active = false, write = false;
    u8 base = kNoReg, index = kNoReg, scale_log2 = 0;
    i64 low = 0, high = 0;  ///< displacements checked, off the base as it was at the check
    i64 moved = 0;          ///< how far the base went since
    u32 slot = 0;           ///< frame slot of the addend, or
    bool whole = false;     ///< of the host address of base + index * scale as they were at the check
    unsigned others = 0;
    bool window = false;  ///< the slot holds what is added in the host window (windows.cpp)
    bool certain = false;  ///< instead of a slot: `region` is where the base points
    u8 region = 0;
  };
  struct GroupMiss {
    Label entry, resume;
    Label stack;  ///< misses of the page that the stack was last checked in (stacked)
    bool stacked = false;
    Address address;
    u32 size = 0;
    bool write = false;
    bool fill = false;  ///< the first access may fill for all of the group
    i64 offset = 0;  ///< of the instruction, to its page
    std::size_t insn = 0;  ///< index of its Interpret
    Flags flags = Flags::Dead;
  };
  /// Accesses of a loop off registers that move by constants (loops.cpp).
  struct Stream {
    Group group;  ///< displacements off the registers as they are at the block's start
    i64 step = 0;  ///< bytes an iteration
    std::vector<std::pair<i64, u8>> aligned;  ///< where alignment is required, and to what
  };
  struct Loop {
    bool on = false;
    std::array<Stream, 4> streams;
    unsigned count = 0, leader = 0;
    std::vector<bool> hoisted;  ///< by instruction
    Label setup, fast;
  };
  static constexpr unsigned kGroups = 6;
  /// The check of a window access fails: the address is of another region than was expected.
  struct WindowMiss {
    Label entry, resume;  ///< resume: r15 = what is added
    Address address;
    bool page = false;    ///< of RIP's page
    std::size_t insn = 0;
  };
  /// The same where the block does not go on: the rest runs in one without groups.
  struct RegionMiss {
    Label entry;
    i64 offset = 0;  ///< of the instruction, to its page
    std::size_t insn = 0;
    bool in_frame = false;  ///< the flags
  };
  struct Interpret {
    Label entry;
    u64 rip = 0;
    bool flags_in_frame = false;
    bool used = false;
    bool sti_shadow = false;
    bool fip = false;    ///< the frame's FIP is to be made fip_offset's first
    i64 fip_offset = 0;  ///< of the last x87 instruction before, to the page
  };
  struct X87Load {
    Label entry, resume;
    std::size_t insn = 0;  ///< index of its Interpret
  };
  struct Poll {
    Label entry;
    u64 target = 0;
    bool rcx = false;      ///< the guest's RCX stands in scratch 0
    bool in_frame = false; ///< the flags
  };
  struct Stub {
    Label entry;
    i64 offset = 0;  ///< of the target, to the page as it is then
    bool in_frame = false;
    bool ungrouped = false;
  };
  struct Miss {
    Label entry;
    bool checked = false;  ///< the target is canonical
    std::size_t insn = 0;  ///< index of its Interpret
  };
  /// A branch's way to another page, where the block goes on behind it. The flags are in the host.
  struct FarExit {
    Label entry;
    u64 target = 0;
    std::size_t index = 0;  ///< of the branch
  };

  // ---- block_translator.cpp ----
  bool supported(std::size_t n) const;
  void start_over();
  /// From instruction `first` on: how many of the first count instructions were translated.
  std::size_t body(std::size_t first, std::size_t count);
  void tail(std::size_t done);  ///< the exit of a block that has none yet
  bool enters_in_frame(std::size_t count) const;
  void prologue(std::size_t count);
  std::size_t attempt(std::size_t count);
  bool one(const DecodedInsn& i);
  void finish();
  u64 rip() const { return rip_; }
  u64 next_rip() const { return rip_ + insn_->length; }
  /// The guest address of this block's page + offset, to a host register; flags stay. For rip() and next_rip()
  /// as offsets use page_offset().
  void emit_rip(u8 to, i64 offset);
  bool pic() const { return request_->position_independent; }
  /// Where a direct branch may lead: a canonical address that the page's can be moved to.
  bool reachable(u64 target) const;
  void restore_page(u64 rip);  ///< r14 = rip: the page is this block's again; flags stay
  i64 page_offset(u64 address) const { return static_cast<i64>(address - (request_->rip & kPageMask)); }
  bool same_page(u64 target) const { return ((target ^ request_->rip) & kPageMask) == 0; }

  // ---- flags.cpp ----
  void clobber_flags();  ///< the flags are about to be lost
  bool flags_live_in_host() const { return flags_ == Flags::Host && live_[index_] != 0; }  ///< somebody reads them still
  void need_flags(
      u8 scratch);  ///< the instruction uses or changes them; scratch: a free host register or kHostNone
  void flags_to_host(u8 scratch);
  void emit_flags_save(u8 scratch);
  void emit_flags_restore(u8 scratch);

  // ---- memory.cpp ----
  // Where the guest's registers stand: frame.hpp.
  static bool special(u8 guest) { return (guest >= R9 && guest <= R11) || guest == R15; }
  static u8 host(u8 guest) {
    return guest == RSP ? u8{kHostR13} : guest == R13 ? u8{kHostR10} : guest == R14 ? u8{kHostR11} : guest;
  }
  static u32 slot_offset(u8 guest) { return guest == R15 ? frame::kR15 : frame::kR9 + 8u * (guest - R9); }
  static HostMem slot(u8 guest) { return HostMem::frame(slot_offset(guest)); }
  bool address_of(const DecodedInsn& i, Address* out) const;
  static bool in_known_page(const Address& a, unsigned size);  // groups.cpp
  const Group* page_group(const Address& a, Kind kind) const;
  bool page_again(const Address& a, Kind kind) const;
  const Group* open_page_group(const Address& a, Kind kind);
  bool code32() const { return request_->mode.code32; }
  /// Bytes of a stack slot, of RIP and of a near branch's operand.
  u8 word() const { return code32() ? 4 : 8; }
  Address stack_address(i32 disp) const {
    Address a;
    a.base = RSP;
    a.disp = disp;
    a.narrow = a.linear32 = code32();
    return a;
  }
  u64 wrapped(u64 rip) const { return code32() ? static_cast<u32>(rip) : rip; }
  void load_word(u8 to, const HostMem& m) { code32() ? e_.load32(to, m) : e_.load(to, m); }
  void store_word(const HostMem& m, u8 from) { code32() ? e_.store32(m, from) : e_.store(m, from); }
  void store_word_imm(const HostMem& m, i32 value);
  void move_rsp(i32 by) { advance(kHostR13, by, word()); }
  /// reg += by, in addresses of this size; flags stay.
  void advance(u8 reg, i32 by, u8 size) {
    size == 4 ? e_.lea32(reg, HostMem::at(reg, by)) : e_.lea(reg, HostMem::at(reg, by));
  }
  /// Linear address to a register; clobbers flags when both registers or a segment are in the frame.
  void emit_address(u8 to, const Address& a);
  void add_segment(u8 to, const Address& a);
  bool access(const Address& a, u8 size, Kind kind, bool aligned, Access* out);
  void operand_of(const Address& a, Access* out);
  void emit_tlb_mask();  ///< r15 is an entry's offset: tlb(kScratch1, …) reaches it from here on
  HostMem tlb(u8 entry, u32 disp) const {
    return request_->mode.stacked ? HostMem::at(entry, static_cast<i32>(disp)) : HostMem::off_gs(entry, static_cast<i32>(disp));
  }
  void emit_start_compare(u32 size);
  void emit_rorx(u8 to, u8 from, u8 count);
  // ---- windows.cpp ----
  bool windowed() const { return request_->mode.windowed && !by_tlb_ && !loop_.on; }
  bool stacked() const { return windowed() && request_->mode.stacked; }
  /// Off rSP alone: by the gs base, where that is the stacks' constant.
  bool off_stack(const Address& a) const { return stacked() && groupable(a) && a.base == RSP && a.index == kNoReg; }
  void after(const DecodedInsn& i);  ///< rSP stays where TranslateMode::stacked says
  bool stack_comes() const;
  void emit_stack_check();
  void finish_stack_checks();
  bool by_window(const Address& a) const;
  void window_access(const Address& a, Access* out);
  void window_point();  ///< what comes now may fault in the window, on this instruction's account
  void emit_window_check(u8 reg, u64 region, const Address& a, bool page);
  u64 expected_region(const Address& a) const;
  bool used_again(Group g) const;
  bool by_gs(u64 region) const { return stacked() && Window::is_twin(region); }  ///< the gs base is this region's constant
  bool certain(u64 region) const;
  bool region_operand(const DecodedInsn& i, const Operand& o, Address* out) const;
  void plan_regions(std::size_t count);
  void emit_region_number(u8 reg);
  void emit_region_compare(u8 reg, u64 region, u8 temp, Label& other);
  void emit_region_compare_keeping_flags(u8 reg, u64 region, Label& other);
  void emit_certain_check(u8 base, u64 region);
  Group* open_region(u8 base, u64 region);
  void regions_ahead();
  void through_region(const Group& g, const Address& a, Access* out);
  void finish_window_misses();

  void one_page_or(Label& otherwise, u32 size);
  void emit_fill(bool write);
  void finish_slow_paths();
  bool access_of(const DecodedInsn& i, Access* out);  ///< of the insn's own memory operand
  /// Makes the operand [r14], so that r15 is free.
  void single_register(Access* a);
  void emit_bit_address(u8 to, const Address& a);
  Label& interpret_label();
  /// The value of a guest register in a host register: its own, or scratch loaded from the frame.
  u8 value_of(u8 guest, u8 scratch);

  // ---- groups.cpp ----
  static bool written_registers(const DecodedInsn& i, u32* out);
  static bool moves_by(const DecodedInsn& i, u8 reg, i64* by);
  static bool groupable(const Address& a);  ///< flags stay when it is computed
  static bool same_registers(const Group& g, const Address& a);
  static void follow(const DecodedInsn& i, Group* g);  ///< past this instruction
  const Group* group_of(const Address& a, u8 size, Kind kind) const;
  void keep(Group* g, const i32* near);
  void through(const Group& g, const Address& a, Access* out);
  void by_sum(u32 slot, i64 disp, Access* out);
  Group* open_group(const Address& a, u8 size, Kind kind);
  void start_groups(bool on);
  Group* free_group();  ///< cleared but for its slot; null: all are active
  void before(const DecodedInsn& i);  ///< ends groups that the instruction must not use
  void finish_groups();
  void emit_group_check(const Address& first, u32 size, bool write, Label& miss);
  void stack_miss(GroupMiss& m);
  void leave_ungrouped(std::size_t insn, i64 offset, bool in_frame);

  // ---- loops.cpp ----
  void plan_loop(std::size_t count);
  bool all_hoisted(std::size_t count) const;
  void add_to_stream(std::size_t n, const Address& a, const Operand& mem, const i64* moved, const i64* step);
  static Address stream_address(const Stream& s, i64 at);
  void emit_setup(const Stream& s, u32 slot, bool first);
  bool second_body(std::size_t done);

  // ---- exits (branch.cpp) ----
  void exit_interpret_now();
  void exit_to(u64 target) { exit_to(target, target <= rip()); }
  /// Direct; flags where they are, scratch registers free. r14: it holds the page's address and this much, or null.
  void exit_to(u64 target, bool backward, const i64* r14 = nullptr);
  void exit_to_other_page(u64 target, bool backward, const i64* r14);
  void exit_if(u8 condition, u64 target);   ///< direct, forward, in the same page; flags in the host
  void exit_indirect(bool checked);         ///< r14 = target; r15 free
  void flags_away(u8 scratch);              ///< the flags are in the frame, or dead, from here on
  void poll(u64 target);
  void shadow_call(u64 back);               ///< r14 = back; what follows is the callee's exit
  void shadow_return();                     ///< r14 = target
  void check_canonical(u8 reg, u8 temp);    ///< clobbers flags; not canonical: interpret
  void emit_canonical_test(u8 reg, u8 temp, Label& otherwise);
  void emit_table_entry();                  ///< TranslatedBlock::code's beginning, of position-independent code

  // ---- families; false: not translated ----
  bool plain(const DecodedInsn& i);  // plain.cpp: re-encoded
  bool plain_high_byte(const DecodedInsn& i, Reencoding& r);
  bool lea(const DecodedInsn& i);  // move.cpp
  bool mov_register(const DecodedInsn& i);
  bool verbatim(const DecodedInsn& i);
  unsigned stack_run(Op op) const;  ///< how many PUSH r (POP r) stand here in a row
  bool run_access(const Address& at, u8 bytes, Kind kind, Access* out);
  bool push(const DecodedInsn& i);  // stack.cpp
  bool pop(const DecodedInsn& i);
  bool pop_memory(const DecodedInsn& i);
  bool leave(const DecodedInsn& i);
  bool pushf(const DecodedInsn& i);
  bool cli();
  void system_op(SystemOp op, bool may_refuse);  // system_ops.cpp: operand r14, answer r15; clobbers flags
  bool system(const DecodedInsn& i);
  bool swapgs();
  bool clac_stac(bool set);
  bool sti();
  static bool may_follow_sti(const DecodedInsn& i);
  bool popf(const DecodedInsn& i);
  bool mov_from_cr(const DecodedInsn& i);
  bool rdtsc(bool aux);
  bool rare(const DecodedInsn& i);  // rare.cpp
  bool ldmxcsr(const DecodedInsn& i);
  bool selector(const DecodedInsn& i);
  bool segment_base(const DecodedInsn& i);
  void check_edge();
  bool x87(const DecodedInsn& i);  // x87.cpp
  bool x87_memory(const DecodedInsn& i, Encoding& e, u8 size, bool store);
  bool fldcw(const DecodedInsn& i);
  bool mmx(const DecodedInsn& i);
  bool gather(const DecodedInsn& i);  // vector_memory.cpp
  void need_zmm();  ///< from here on AVX-512's state is in the host's registers (vector512.cpp)
  void finish_zmm();
  static bool masked_store(const DecodedInsn& i);
  void need_x87();  ///< from here on the x87 state is in the host's registers
  static bool mmx_runs(const DecodedInsn& i, bool sse);
  bool keeps_fip(const DecodedInsn& i) const;
  void emit_fip(i64 offset);  ///< clobbers r14; flags stay
  void store_fip();
  void finish_x87();
  bool string(const DecodedInsn& i);  // strings.cpp
  bool repeated_string(const DecodedInsn& i);
  void emit_direction_check();  ///< DF set: interpret; clobbers flags
  bool direction(bool set);
  bool jmp(const DecodedInsn& i);  // branch.cpp
  bool jcc(const DecodedInsn& i);
  bool count_branch(const DecodedInsn& i);
  bool call(const DecodedInsn& i);
  bool ret(const DecodedInsn& i);

  Emitter e_;
  const BlockRequest* request_ = nullptr;
  TranslatedBlock* out_ = nullptr;
  const DecodedInsn* insn_ = nullptr;
  std::size_t index_ = 0;
  std::size_t count_ = 0;     ///< instructions that may be translated
  unsigned consumed_ = 1;     ///< instructions that the family translated at once
  u64 rip_ = 0;
  Flags flags_ = Flags::Host;
  bool ended_ = false;     ///< the block's last exit was written
  std::vector<u64> live_;  ///< status flags live before each instruction; one entry more
  std::vector<FlagUse> use_;
  std::vector<SlowPath> slow_;
  std::vector<Interpret> interpret_;  ///< per instruction that was translated
  std::vector<Poll> polls_;
  std::vector<FarExit> far_exits_;
  std::vector<Stub> stubs_;
  bool must_group_ = false;  ///< access() refuses what it would check alone
  bool whole_ = false;       ///< accesses lie in one page or are interpreted
  bool hits_only_ = false;   ///< accesses that the TLB does not have are interpreted
  bool grouping_ = false;
  Label begin_;          ///< the first instruction
  Label dead_;           ///< TranslatedBlock::dead_stub; flags in the frame, or dead
  u32 frame_entry_ = 0;
  bool padded_ = false;  ///< the prologue has five bytes
  std::array<Group, kGroups> groups_;
  std::vector<GroupMiss> group_misses_;
  std::vector<WindowMiss> window_misses_;
  std::vector<RegionMiss> region_misses_;
  bool several_ = false;  ///< stacked, and operands of this block stand off two registers or more
  bool certain_ = false;  ///< in this block, checks of windows make regions certain
  u8 main_region_ = 0;    ///< the one whose constant belongs in r15
  bool both_free_ = false;  ///< the operand of this instruction may take r14 instead of r15
  Foresight foresight_;
  bool by_tlb_ = false;  ///< this instruction reaches memory through the TLB also in windowed code
  Loop loop_;
  bool in_second_body_ = false;
  /// After an instruction: rSP is in another region.
  struct StackMiss {
    Label entry;
    u64 next = 0;
    bool in_frame = false;  ///< the flags
  };
  std::vector<StackMiss> stack_misses_;
  bool stack_known_ = false;  ///< something near rSP was reached in this block, or rSP was looked at
  std::vector<Miss> misses_;  ///< of the jump table; r14 = target
  std::vector<X87Load> x87_loads_, zmm_loads_;
  bool zmm_in_ = false;  ///< known at this point of the block: JitFrame::zmm is IN
  /// x87 state that is known at this point of the block.
  struct X87 {
    bool in = false;   ///< in the host's registers
    bool fip = false;  ///< FIP is fip_offset's, and the frame does not say so yet
    i64 fip_offset = 0;
  } x87_;
};

}  // namespace ring3::engine
