#pragma once
#include <algorithm>
#include <cstddef>

#include "base/types.hpp"
#include "engine/mmu/attention_word.hpp"
#include "engine/mmu/mmu.hpp"
#include "engine/mmu/window.hpp"
#include "engine/translate/frame_layout.h"

/// What translated code and the run loop share: one JitFrame per vCPU.
///
/// Host registers in translated code (at instruction boundaries):
///   rax rcx rdx rbx rbp rsi rdi r8 r12    the guest's registers of the same name
///   r10, r11                              the guest's r13, r14
///   r13                                   the guest's rsp
///   r9                                    &JitFrame + RING3_FRAME_CENTRE
///   gs base                               the TLB's current bank (JitFrame::tlb), or in TranslateMode::stacked the constant of
///                                         the stacks' region
///   in the frame                          the guest's r9, r10, r11, r15: those that compilers use least
///   r14, r15                              scratch
///   rsp                                   the host's stack, with the shadow stack of returns on its end: 8-byte
///                                         aligned; `call` to a fill thunk is all right, and push/pop when
///                                         balanced before the next exit or fill
///   CF PF AF ZF SF OF                     the guest's, in the host's RFLAGS or in `flags`; DF is 0
///   xmm/ymm0..15, MXCSR                   the guest's (only entered with all exceptions masked in MXCSR)
///   zmm0..31, k0..k7                      the guest's while JitFrame::zmm says so
///   ST/MM 0..7, FCW, FSW, tags            the guest's while JitFrame::x87 says so
///
/// Everything else of the guest stands in VcpuState and is not touched by translated code.
///
/// Shadow stack: a guest CALL pushes the guest's return address and makes a host call; a guest RET whose target
///         is the address on top makes a host RET, which the host predicts. Any exit, and any C++ that changes
///         mode, address space or translations, leaves it empty (rsp = shadow_base), with a pair below that
///         matches nothing.
/// Memory: a frame slot is addressed as [r9 + disp], in four bytes where it is one of the first 256.
namespace ring3::engine {

struct alignas(64) JitFrame {
  u64 r9 = 0, r10 = 0, r11 = 0, r15 = 0;
  u64 tlb = 0;          ///< Mmu::TlbEntry[kTlbSize] of the current bank; only STAC and CLAC change it in a block
  AttentionWord attention;  ///< Context::attention(): bits that are not zero ask to leave
  u64 page = 0;         ///< linear address of the page that runs, for position-independent code
  u64 jump_table = 0;   ///< JumpTable of the address space and mode
  u64 jump_bias = 0;    ///< in its top 16 bits: a number for the address space and mode
  u64 flags = 0;        ///< status flags as LAHF and SETO leave them (AH, AL): where a block is entered with them
  u64 shadow_limit = 0; ///< the host stack does not grow below this by guest calls
  u64 user_end = 1ull << 47;  ///< of the canonical addresses' lower half
  u64 fs_base = 0, gs_base = 0;  ///< the guest's segment bases
  /// The page that the stack was last checked in, for writing: linear addresses stack_page + [0, stack_limit) may be
  /// the start of a group (groups.cpp). Limit 0: none. C++ that may change translations, mode or the TLB's bank while
  /// code runs sets 0; entering does.
  u64 stack_page = 0, stack_limit = 0, stack_addend = 0;
  u64 groups[6] = {};  ///< addends that one check has found for several accesses (groups.cpp)
  u64 window_first = Window::no_delta(0);  ///< window_deltas[0], whose region has the size:
  u64 window_size = Window::kRegionSize;
  u64 tlb_mask = (Mmu::kTlbSize - 1) * sizeof(Mmu::TlbEntry);  ///< frame::kTlbMask
  u64 last_start[5] = {4095, 4094, 4092, 4088, 4080};  ///< in its page, where an access of 1, 2, 4, 8 or 16 bytes may start
  u32 bias_high = 0;    ///< jump_bias >> 48: what links to other pages are made for
  u32 bias_negated = 0; ///< -bias_high

  u64 kernel_gs_base = 0;  ///< the guest's MSR
  u64 exit_rip = 0;
  u32 exit_reason = 0;  ///< RING3_REASON_*
  u32 exit_tag = 0;
  u64 host_rsp = 0;
  u64 state_gpr = 0, state_rflags = 0, state_xsave = 0;  ///< addresses inside VcpuState
  u64 fill_function = 0;  ///< u64 (*)(void* context, u64 linear, u64 size, u64 write): the addend or 0
  u64 fill_context = 0;
  u64 saved_flags = 0;  ///< the fill thunks' own
  u32 host_mxcsr = 0;
  /// RING3_VECTORS_*: where the guest's vectors and MXCSR are. AWAY: in VcpuState. IN: in the host's registers, for code
  /// that uses them. KEPT: in the host's registers while code of TranslateMode::lazy runs, which has no use for them; the
  /// first to need the registers puts them away. WANTED: what transit() answers when they are to be loaded.
  u32 vectors = RING3_VECTORS_IN;
  u64 saved_rax = 0;    ///< the exits' own
  u64 sentinel = 0;     ///< a non-canonical address: the return address on an empty shadow stack
  u64 pointer = 0;      ///< what r9 holds

  // Thunks: jumped to with `jmp [r9 + offset - 128]` (fills: by call), from anywhere in the arena. For all:
  // guest registers, flags and vectors in place.

  /// In: r14 = RIP of the next instruction, r15d = the exit's tag (BlockRequest::first_tag + its
  /// index) or kNoTag for one that is not to be linked. The run loop finds or makes the block of that
  /// RIP, links the exit's jump to it when it may, and goes on there.
  u64 exit_next = 0;
  /// In: r14 = RIP of an instruction of which nothing has happened yet. It is interpreted.
  u64 exit_interpret = 0;
  /// In: r14 = RIP of the next instruction. Leaves to the run loop, which returns to its caller when
  /// attention is raised. For polls.
  u64 exit_attention = 0;
  /// In: r14 = RIP of the next instruction, in another page, r15d = the exit's tag, the status flags in `flags`.
  /// Goes on through the jump table, or (one time in RING3_CROSS_EXITS anyway) as exit_next. For exits whose link was
  /// made for others too often.
  u64 exit_cross_frame = 0;
  /// call. In: r14 = linear address, r15d = size in bytes. Out: r14 kept; r15 = what is added to a linear address of
  /// this access (a read; a write) for its host address, 0 when it cannot be made: then exit_interpret. A read's
  /// may lead to a copy of its bytes.
  /// Keeps all other registers, vectors and scratch; clobbers the status flags.
  u64 fill_read = 0;
  u64 fill_write = 0;
  /// In: r14 = RIP of a vector instruction in code of TranslateMode::lazy: it goes on with vectors loaded.
  u64 exit_vectors = 0;
  /// As exit_next, exit_indirect and exit_attention, with the guest's status flags in `flags`, not in RFLAGS.
  u64 exit_next_frame = 0, exit_indirect_frame = 0, exit_attention_frame = 0;
  /// In: r14 = RIP of a block that was killed, the status flags in `flags`: the jump table still leads to it.
  u64 exit_dead_frame = 0;
  /// As exit_interpret; r15d = number of the decoded instruction (TranslatorVcpu's), which nothing stands around.
  u64 exit_left = 0;
  u64 exit_interpret_frame = 0;  ///< as exit_interpret, with the status flags in `flags`
  /// In: r14 = canonical RIP that a near RET goes to, which is not on top of the shadow stack; the status flags in
  /// `flags`. Polls attention, then goes on through the jump table, with an empty shadow stack.
  u64 exit_return = 0;

  u64 scratch[6] = {};  ///< the translator's, within one instruction (fill thunks keep them)
  u8 bounce[64] = {};  ///< bytes of a read in two pages

  /// As exit_left, for SYSCALL, SYSRET and IRET: when nothing is rare about them they run here, and translated code goes on
  /// where they lead to, vectors in place (transitions.cpp).
  u64 exit_transit = 0;
  /// call. SystemOp: in r15d, its operand in r14; out: r14 kept, r15 the answer. As fill_read otherwise.
  u64 system_op = 0;
  u64 transit_function = 0;  ///< u64 (*)(void* context, u64 rip, u64 number); uses no vector registers
  u64 system_function = 0;   ///< u64 (*)(void* context, u64 operand, u64 op); uses no vector registers
  u64 kept[9] = {};  ///< over transit_function: the guest's rax rcx rdx rsi rdi r8 r13 r14 rsp
  i32 cross_left = RING3_CROSS_EXITS;  ///< exit_cross_frame's: below 0 the exit is linked anew

  /// 1: the guest's x87 and MMX state is in the host's registers, with all exceptions masked in FCW. 0: in VcpuState.
  /// SystemOp::LoadX87 makes it 1 when code first needs it; leaving makes it 0. C++ that translated code calls
  /// (fills, system_op, transit) runs with it in place: it uses no x87 and no MMX.
  u32 x87 = 0;
  u64 x87_fip = 0;       ///< the guest's FIP, while x87 is 1
  u32 x87_selector = 0;  ///< what stands above EIP in it, for 32-bit code
  u16 x87_host_fcw = 0;  ///< the thread's own, while x87 is 1
  /// u64 (*)(void* context, u64 pc, u64* r15): an access at pc faulted; where to go on, with all registers as they were but for
  /// r15: one of thunks.hpp.
  u64 window_function = 0;
  u64 window_target = 0;   ///< the thunk's own
  /// Mmu::open_window() writes those of the regions; the others, of addresses that are no user's, are Window::no_delta() for ever.
  u64 window_deltas[256] = {};
  u64 loop_start = 0, loop_room = 0;  ///< of a loop inside one block (loops.cpp)
  u64 fault_address = 0, fault_error = 0;  ///< the fault handler's: of the access, and the page fault's error code
  /// AVX-512's state beside the vectors, while these are IN or KEPT. RING3_ZMM_AWAY: ZMM16..31 and k0..k7 are in VcpuState, and
  /// bits 511:256 of ZMM0..15 are zero, there and in the host's registers (VEX instructions leave them so). IN: all is in the
  /// host's registers: from entering on where those bits are not zero, else from the first instruction that needs it (load_zmm),
  /// to where the vectors are put away. ASIDE: a thunk's own, while C++ that it calls runs.
  u32 zmm = RING3_ZMM_AWAY;
  u32 avx512 = 0;    ///< the guest has switched the state on
  /// call. Loads the state: zmm becomes IN. Clobbers r14 and the status flags. The vectors are IN, avx512 is not 0.
  u64 load_zmm = 0;
  /// CommonEntry[kCommonEntries]; 0: not for this mode. What a jump table misses is looked for here, by the page's physical address
  /// from the TLB.
  u64 common_table = 0;
  u64 common_mode = 0;  ///< the keys' upper part
  u64 shadow_base = 0;  ///< rsp of an empty shadow stack
  u64 host_gs = 0;      ///< the thread's gs base; 0: the caller's
};

/// What JitFrame::system_op does, for system instructions (system_ops.cpp). The answer is 0 from those that may refuse.
enum class SystemOp : u32 {
  Stac,
  Clac,
  Sti,
  StiOpen,  ///< refused when something waits; no shadow is set
  Popf,
  ReadCr0,
  ReadCr2,
  ReadCr3,
  ReadCr4,
  Rdtsc,
  TscAux,
  ReadSelector,  ///< operand: Seg
  BasesAllowed,  ///< RDFSBASE and its kind
  WriteFsBase,
  WriteGsBase,
  LoadX87,  ///< refused when x87 instructions fault, or exceptions are not masked
};

namespace frame {
inline constexpr u32 kR9 = RING3_FRAME_R9, kR10 = RING3_FRAME_R10, kR11 = RING3_FRAME_R11, kR15 = RING3_FRAME_R15,
                     kTlb = RING3_FRAME_TLB, kAttention = RING3_FRAME_ATTENTION, kJumpMask = RING3_FRAME_JUMP_MASK, kUserEnd = RING3_FRAME_USER_END, kFsBase = RING3_FRAME_FS_BASE,
                     kGsBase = RING3_FRAME_GS_BASE, kScratch = RING3_FRAME_SCRATCH,
                     kExitNext = RING3_FRAME_EXIT_NEXT, kExitInterpret = RING3_FRAME_EXIT_INTERPRET,
                     kExitAttention = RING3_FRAME_EXIT_ATTENTION, kExitCrossFrame = RING3_FRAME_EXIT_CROSS_FRAME,
                     kFillRead = RING3_FRAME_FILL_READ, kFillWrite = RING3_FRAME_FILL_WRITE,
                     kExitVectors = RING3_FRAME_EXIT_VECTORS, kExitNextFrame = RING3_FRAME_EXIT_NEXT_FRAME,
                     kExitIndirectFrame = RING3_FRAME_EXIT_INDIRECT_FRAME,
                     kExitAttentionFrame = RING3_FRAME_EXIT_ATTENTION_FRAME, kFlags = RING3_FRAME_FLAGS,
                     kShadowLimit = RING3_FRAME_SHADOW_LIMIT, kShadowBase = RING3_FRAME_SHADOW_BASE,
                     kBiasHigh = RING3_FRAME_BIAS_HIGH, kBiasNegated = RING3_FRAME_BIAS_NEGATED, kJumpTable = RING3_FRAME_JUMP_TABLE,
                     kJumpBias = RING3_FRAME_JUMP_BIAS,
                     kExitDeadFrame = RING3_FRAME_EXIT_DEAD_FRAME, kPage = RING3_FRAME_PAGE,
                     kExitLeft = RING3_FRAME_EXIT_LEFT, kExitInterpretFrame = RING3_FRAME_EXIT_INTERPRET_FRAME,
                     kExitReturn = RING3_FRAME_EXIT_RETURN, kExitTransit = RING3_FRAME_EXIT_TRANSIT,
                     kSystemOp = RING3_FRAME_SYSTEM_OP, kKernelGsBase = RING3_FRAME_KERNEL_GS_BASE,
                     kZmm = RING3_FRAME_ZMM, kAvx512 = RING3_FRAME_AVX512, kLoadZmm = RING3_FRAME_LOAD_ZMM,
                     kX87 = RING3_FRAME_X87, kX87Fip = RING3_FRAME_X87_FIP, kX87Selector = RING3_FRAME_X87_SELECTOR;
inline constexpr u32 kWindowDeltas = RING3_FRAME_WINDOW_DELTAS;
inline constexpr unsigned kRegionShift = Window::kRegionShift;
inline constexpr u32 kNoTag = ~0u;
static_assert(offsetof(JitFrame, last_start) + 40 <= 2 * RING3_FRAME_CENTRE);
inline constexpr u32 kGroups = offsetof(JitFrame, groups);
inline constexpr u32 kStackPage = offsetof(JitFrame, stack_page), kStackLimit = offsetof(JitFrame, stack_limit),
                     kStackAddend = offsetof(JitFrame, stack_addend);
inline constexpr u32 kWindowFirst = offsetof(JitFrame, window_first), kWindowSize = offsetof(JitFrame, window_size);
inline constexpr u32 kLoopStart = offsetof(JitFrame, loop_start), kLoopRoom = offsetof(JitFrame, loop_room);

#define RING3_CHECK_OFFSET(field, value) static_assert(offsetof(JitFrame, field) == (value))
RING3_CHECK_OFFSET(r9, RING3_FRAME_R9);
RING3_CHECK_OFFSET(r10, RING3_FRAME_R10);
RING3_CHECK_OFFSET(r11, RING3_FRAME_R11);
RING3_CHECK_OFFSET(r15, RING3_FRAME_R15);
RING3_CHECK_OFFSET(tlb, RING3_FRAME_TLB);
RING3_CHECK_OFFSET(attention, RING3_FRAME_ATTENTION);
static_assert(offsetof(AttentionWord, bits) == 0 && offsetof(AttentionWord, jump_mask) == RING3_FRAME_JUMP_MASK - RING3_FRAME_ATTENTION);
RING3_CHECK_OFFSET(user_end, RING3_FRAME_USER_END);
RING3_CHECK_OFFSET(fs_base, RING3_FRAME_FS_BASE);
RING3_CHECK_OFFSET(gs_base, RING3_FRAME_GS_BASE);
RING3_CHECK_OFFSET(tlb_mask, RING3_FRAME_TLB_MASK);
RING3_CHECK_OFFSET(last_start, RING3_FRAME_LAST_START);
RING3_CHECK_OFFSET(cross_left, RING3_FRAME_CROSS_LEFT);
RING3_CHECK_OFFSET(x87, RING3_FRAME_X87);
RING3_CHECK_OFFSET(x87_fip, RING3_FRAME_X87_FIP);
RING3_CHECK_OFFSET(x87_selector, RING3_FRAME_X87_SELECTOR);
RING3_CHECK_OFFSET(x87_host_fcw, RING3_FRAME_X87_HOST_FCW);
RING3_CHECK_OFFSET(scratch, RING3_FRAME_SCRATCH);
RING3_CHECK_OFFSET(jump_table, RING3_FRAME_JUMP_TABLE);
RING3_CHECK_OFFSET(jump_bias, RING3_FRAME_JUMP_BIAS);
RING3_CHECK_OFFSET(exit_rip, RING3_FRAME_EXIT_RIP);
RING3_CHECK_OFFSET(exit_reason, RING3_FRAME_EXIT_REASON);
RING3_CHECK_OFFSET(exit_tag, RING3_FRAME_EXIT_TAG);
RING3_CHECK_OFFSET(host_rsp, RING3_FRAME_HOST_RSP);
RING3_CHECK_OFFSET(state_gpr, RING3_FRAME_STATE_GPR);
RING3_CHECK_OFFSET(state_rflags, RING3_FRAME_STATE_RFLAGS);
RING3_CHECK_OFFSET(state_xsave, RING3_FRAME_STATE_XSAVE);
RING3_CHECK_OFFSET(fill_function, RING3_FRAME_FILL_FUNCTION);
RING3_CHECK_OFFSET(fill_context, RING3_FRAME_FILL_CONTEXT);
RING3_CHECK_OFFSET(saved_flags, RING3_FRAME_SAVED_FLAGS);
RING3_CHECK_OFFSET(host_mxcsr, RING3_FRAME_HOST_MXCSR);
RING3_CHECK_OFFSET(saved_rax, RING3_FRAME_SAVED_RAX);
RING3_CHECK_OFFSET(exit_next, RING3_FRAME_EXIT_NEXT);
RING3_CHECK_OFFSET(exit_interpret, RING3_FRAME_EXIT_INTERPRET);
RING3_CHECK_OFFSET(exit_attention, RING3_FRAME_EXIT_ATTENTION);
RING3_CHECK_OFFSET(exit_cross_frame, RING3_FRAME_EXIT_CROSS_FRAME);
RING3_CHECK_OFFSET(fill_read, RING3_FRAME_FILL_READ);
RING3_CHECK_OFFSET(fill_write, RING3_FRAME_FILL_WRITE);
RING3_CHECK_OFFSET(exit_vectors, RING3_FRAME_EXIT_VECTORS);
RING3_CHECK_OFFSET(vectors, RING3_FRAME_VECTORS);
RING3_CHECK_OFFSET(flags, RING3_FRAME_FLAGS);
RING3_CHECK_OFFSET(shadow_limit, RING3_FRAME_SHADOW_LIMIT);
RING3_CHECK_OFFSET(shadow_base, RING3_FRAME_SHADOW_BASE);
RING3_CHECK_OFFSET(bias_high, RING3_FRAME_BIAS_HIGH);
RING3_CHECK_OFFSET(bias_negated, RING3_FRAME_BIAS_NEGATED);
RING3_CHECK_OFFSET(sentinel, RING3_FRAME_SENTINEL);
RING3_CHECK_OFFSET(exit_next_frame, RING3_FRAME_EXIT_NEXT_FRAME);
RING3_CHECK_OFFSET(exit_indirect_frame, RING3_FRAME_EXIT_INDIRECT_FRAME);
RING3_CHECK_OFFSET(exit_attention_frame, RING3_FRAME_EXIT_ATTENTION_FRAME);
RING3_CHECK_OFFSET(exit_dead_frame, RING3_FRAME_EXIT_DEAD_FRAME);
RING3_CHECK_OFFSET(page, RING3_FRAME_PAGE);
RING3_CHECK_OFFSET(exit_left, RING3_FRAME_EXIT_LEFT);
RING3_CHECK_OFFSET(exit_interpret_frame, RING3_FRAME_EXIT_INTERPRET_FRAME);
RING3_CHECK_OFFSET(exit_return, RING3_FRAME_EXIT_RETURN);
RING3_CHECK_OFFSET(exit_transit, RING3_FRAME_EXIT_TRANSIT);
RING3_CHECK_OFFSET(system_op, RING3_FRAME_SYSTEM_OP);
RING3_CHECK_OFFSET(transit_function, RING3_FRAME_TRANSIT_FUNCTION);
RING3_CHECK_OFFSET(system_function, RING3_FRAME_SYSTEM_FUNCTION);
RING3_CHECK_OFFSET(kept, RING3_FRAME_KEPT);
RING3_CHECK_OFFSET(kernel_gs_base, RING3_FRAME_KERNEL_GS_BASE);
RING3_CHECK_OFFSET(window_function, RING3_FRAME_WINDOW_FUNCTION);
RING3_CHECK_OFFSET(window_target, RING3_FRAME_WINDOW_TARGET);
RING3_CHECK_OFFSET(window_deltas, RING3_FRAME_WINDOW_DELTAS);
RING3_CHECK_OFFSET(zmm, RING3_FRAME_ZMM);
RING3_CHECK_OFFSET(avx512, RING3_FRAME_AVX512);
RING3_CHECK_OFFSET(load_zmm, RING3_FRAME_LOAD_ZMM);
RING3_CHECK_OFFSET(common_table, RING3_FRAME_COMMON_TABLE);
RING3_CHECK_OFFSET(common_mode, RING3_FRAME_COMMON_MODE);
#undef RING3_CHECK_OFFSET

/// The software TLB as translated code indexes it: entry at gs:[(linear >> kTlbShift) & kTlbMask].
/// An access hits when (linear ^ tag) <= 4096 - size, unsigned; host address = linear + addend.
inline constexpr u32 kTlbShift = 7;
inline constexpr u32 kTlbMask = (Mmu::kTlbSize - 1) * sizeof(Mmu::TlbEntry);
inline constexpr u32 kTlbReadTag = offsetof(Mmu::TlbEntry, read_tag);
inline constexpr u32 kTlbWriteTag = offsetof(Mmu::TlbEntry, write_tag);
inline constexpr u32 kTlbExecTag = offsetof(Mmu::TlbEntry, exec_tag);
inline constexpr u32 kTlbAddend = offsetof(Mmu::TlbEntry, addend);
static_assert(sizeof(Mmu::TlbEntry) == 32);
static_assert(kTlbShift == RING3_TLB_SHIFT && kTlbMask == RING3_TLB_MASK && kTlbExecTag == RING3_TLB_EXEC_TAG && Mmu::kTlbGpa == RING3_TLB_GPA);
}  // namespace frame

struct JumpEntry {
  u64 rip = 0;   ///< 0: none; of the first two entries ~0
  u64 code = 0;  ///< host address; entered with r14 = rip, and the status flags in JitFrame::flags
};
inline constexpr unsigned kJumpEntries = 1u << 16;
inline constexpr u64 jump_index(u64 rip) { return (rip >> 2) & (kJumpEntries - 1); }
inline constexpr u64 jump_neighbour(u64 index) { return index ^ 1; }  ///< in the same cache line
static_assert(sizeof(JumpEntry) == 16 && (kJumpEntries - 1) * sizeof(JumpEntry) == AttentionWord::kJumpMask);

/// A table in front of the code cache: at jump_index(RIP), or, when two take turns there, at jump_neighbour() of it.
/// Entry 0 stays empty: that is where translated code looks while attention is raised. thunks.S does the same as put().
struct JumpTable {
  JumpEntry entries[kJumpEntries];
  u32 filled;                    ///< how many of the places say what was filled since clear(); all: more was
  u32 places[RING3_JUMP_NOTED];  ///< offsets of entries

  void empty_first() {
    entries[0] = {~0ull, 0};
    entries[1] = {~0ull, 0};
  }
  void clear() {
    if (filled == RING3_JUMP_NOTED) {
      std::fill_n(entries, kJumpEntries, JumpEntry{});
    } else {
      for (u32 n = 0; n < filled; n++) entries[places[n] / sizeof(JumpEntry)] = JumpEntry{};
    }
    filled = 0;
    empty_first();
  }
  void note(u64 index) {
    if (entries[index].rip == 0 && filled < RING3_JUMP_NOTED) places[filled++] = static_cast<u32>(index * sizeof(JumpEntry));
  }
  /// What stood in its place goes to the neighbour's.
  void put(u64 rip, const u8* code) {
    const u64 at = jump_index(rip) > 1 ? jump_index(rip) : 1;
    const JumpEntry old = entries[at];
    if (at != 1 && old.rip != 0 && old.rip != rip && jump_index(old.rip) == at) {
      note(jump_neighbour(at));
      entries[jump_neighbour(at)] = old;
    }
    note(at);
    entries[at] = {rip, reinterpret_cast<u64>(code)};
  }
  const u8* get(u64 rip) const {
    const u64 at = jump_index(rip);
    const JumpEntry& e = entries[entries[at].rip == rip ? at : jump_neighbour(at)];
    return e.rip == rip ? reinterpret_cast<const u8*>(e.code) : nullptr;
  }
  void forget(u64 rip) {
    const u64 at = jump_index(rip);
    entries[at] = entries[jump_neighbour(at)] = JumpEntry{};
    if (at < 2) empty_first();
  }
};
static_assert(offsetof(JumpTable, filled) == RING3_JUMP_FILLED && offsetof(JumpTable, places) == RING3_JUMP_PLACES);

/// A table of blocks of user code that all address spaces have in common.
struct CommonEntry {
  u64 key = 0;   ///< guest-physical address, and the mode above it; 0: none
  u64 code = 0;  ///< as JumpEntry's
  u64 rip = 0;   ///< 0: position-independent, for addresses from 4 GiB on
  u64 unused = 0;
};
inline constexpr unsigned kCommonEntries = 1u << 16;
// as look_up_common in thunks.S has them
static_assert(sizeof(CommonEntry) == 32 && kCommonEntries == 1u << 16 && offsetof(CommonEntry, key) == 0 &&
              offsetof(CommonEntry, code) == 8 && offsetof(CommonEntry, rip) == 16);
inline u64 common_index(u64 key) {
  u64 crc = 0;
  asm("crc32q %1, %0" : "+r"(crc) : "rm"(key));
  return crc & (kCommonEntries - 1);
}

}  // namespace ring3::engine
