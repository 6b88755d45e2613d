#pragma once
#include <memory>
#include <span>
#include <vector>

#include "engine/decode/insn.hpp"
#include "engine/translate/frame.hpp"

/// Decoded instructions of one block to host code, by the conventions of frame.hpp.
///
/// Trust:     instructions and addresses are the guest's. Whatever they say, the code reaches guest memory
///            only through hits of the software TLB, and leaves only through the frame's thunks.
/// Threading: stateless but for its buffers; one per vCPU.
namespace ring3::engine {

/// Facts of the mode that a translation depends on; a part of its key.
struct TranslateMode {
  bool user = false;       ///< CPL 3
  bool sse = false;        ///< SSE instructions run without #UD or #NM: CR0.EM/TS clear, CR4.OSFXSR set
  bool avx = false;        ///< VEX vector instructions too: CR4.OSXSAVE, XCR0[2:1] = 3
  bool lazy = false;       ///< the vectors are not loaded, whether sse and avx might be on or not: a vector
                           ///< instruction leaves through exit_vectors
  bool code32 = false;   ///< 32-bit code; CS, SS, DS and ES have base 0 and limit 4 GiB
  bool fs_flat = false;  ///< code32: FS has limit 4 GiB and may be read and written, whatever its base
  bool gs_flat = false;
  /// 64-bit user code that reaches memory through host windows (windows.cpp).
  bool windowed = false;
  /// windowed: rSP is in the stacks' region (Window::kStacks), whose constant is the gs base.
  bool stacked = false;
  bool near_fs = false;  ///< stacked: FS's base is in that region too
  u8 bits() const {
    return static_cast<u8>(user | sse << 1 | avx << 2 | (lazy | windowed) << 3 | code32 << 4 | (fs_flat | stacked) << 5 | (gs_flat | near_fs) << 6);
  }
};

struct BlockRequest {
  /// Decoded with CodeMode::Bits64, or Bits32 when mode.code32; contiguous from rip, within one guest page. Behind a Jcc
  /// only where it may be gone on with (may_go_on()).
  std::span<const DecodedInsn> insns;
  u64 rip = 0;
  TranslateMode mode;
  u32 first_tag = 0;  ///< direct exit i says tag first_tag + i
  /// The code runs at any linear address of its page (JitFrame::page): user code, but for the topmost 4 GiB.
  bool position_independent = false;
  /// One flag per instruction: the guest's CPUID has its feature (else it raises #UD: interpret).
  std::span<const bool> has_feature;
  bool loops = false;  ///< a loop of one block may run inside it, up to 4096 iterations between polls
  /// Each access has its own check: the exits of a group's misses (DirectExit::ungrouped) lead to such a block.
  bool ungrouped = false;
  /// Mode windowed: the guest's registers by number, as they are now, from which regions are guessed.
  const u64* registers = nullptr;
  u64 fs_base = 0, gs_base = 0;
  /// Reads guest memory at a linear address where that has no effect and is at hand; or null.
  bool (*peek)(void* context, u64 linear, u64* to, unsigned size) = nullptr;
  void* peek_context = nullptr;
  u32 edge = 0;  ///< not 0: one instruction, of which this many bytes lie on the next page
};

/// Instructions of a block at most.
inline constexpr unsigned kMaxBlockInsns = 224;

/// A block may go on behind a Jcc that leads forward. (What leads back is a loop, and taken.)
inline bool may_go_on(const DecodedInsn& i) {
  return i.op == Op::Jcc && i.operands[0].kind == OperandKind::Rel && i.imm >= 0;
}

/// The thunk that an instruction which is left to the interpreter goes through, with its number.
inline u32 exit_of_left(const DecodedInsn& i) {
  const bool transition = i.op == Op::Syscall || ((i.op == Op::Sysret || i.op == Op::Iret) && i.opsize == 8);
  return transition ? frame::kExitTransit : frame::kExitLeft;
}

/// Of an instruction that leaves through exit_vectors in TranslateMode::lazy.
inline bool needs_vectors(Op op) {
  return op == Op::HostVec || op == Op::Vzeroupper || op == Op::Vzeroall || op == Op::Ldmxcsr || op == Op::Stmxcsr;
}

/// A direct exit whose jump can be linked.
struct DirectExit {
  u32 field = 0;   ///< offset in code of the rel32 of a JMP or Jcc; at first it leads to stub
  u32 slot = 0;    ///< offset of the frame slot that the stub jumps through: a u32
  u32 stub = 0;    ///< offset of the stub: r14 = target, r15d = tag, jmp [kExitNext]
  u64 target = 0;  ///< guest RIP; of position-independent code: what is to be added to the page
  /// The exit comes with the status flags in the frame: it goes to its target's frame_entry.
  bool frame_flags = false;
  /// Another page: the offset of the u32 that holds the bias (JitFrame::bias_high) the link is good for, 0 being
  /// none; kSamePage for a target in the block's own page.
  u32 bias = kSamePage;
  /// Position-independent code: a u64 stands there, for the target's page + JitFrame::jump_bias.
  bool wide = false;
  /// Another page, and nothing is compared: the link is taken out while the fetch translation of its target may be another
  /// (CodeCache::hold()). Of windowed code that is not position-independent.
  bool unguarded = false;
  /// The target is an instruction of this block, to be gone on with in a block without groups (BlockRequest::ungrouped).
  /// The tag is given as tag | kUngrouped.
  bool ungrouped = false;
  u16 insns = 0;  ///< instructions of the block that are done then; 0: all
  u32 tag = 0;  ///< offset of the u32 in the stub that says its tag
  static constexpr u32 kSamePage = ~0u;
  static constexpr u32 kUngrouped = 1u << 31;
};

/// Where a host instruction that may fault (DIV, IDIV) stands, and the guest instruction to interpret then.
struct HostFaultPoint {
  u32 offset = 0;  ///< in code, of the host instruction
  u64 rip = 0;     ///< position-independent: what is to be added to the page
  /// Of accesses through a window: from there on to the next point. Points stand in the order of their offsets.
  bool window = false;
  bool frame_flags = false;  ///< the status flags before the guest instruction are in JitFrame::flags, not in RFLAGS
};

struct TranslatedBlock {
  /// Runs anywhere, and in two parts, from `cold` on elsewhere, when the fields of `relatives` that lead from one to the
  /// other are set right.
  std::vector<u8> code;
  u32 entry = 0;  ///< entered with the status flags in RFLAGS
  /// Or here, with the status flags in JitFrame::flags. Nothing jumps behind the first of the five bytes there, nor
  /// comes back from outside to it, and the block jumps there only at its own start.
  u32 frame_entry = 0;
  // Position-independent code is entered at its beginning by jump tables: r14 = RIP, the flags in JitFrame::flags. It makes
  // JitFrame::page of that, and goes on at frame_entry.
  u32 cold = 0;   ///< what is rarely run; the first part is not empty
  std::vector<u32> relatives;  ///< offsets of the rel32 fields
  u32 left = 0;          ///< index of the instruction that the code leaves to the interpreter by exit_left
  std::vector<u32> left_at;  ///< offsets of the u32s that are to hold its number; none: it does not
  u32 dead_stub = 0;     ///< leaves by exit_dead_frame; what frame_entry is made to lead to when the block dies
  std::vector<DirectExit> exits;
  std::vector<HostFaultPoint> faults;
  u32 insns = 0;     ///< how many of the request's instructions the code stands for; the others are not reached
  u32 bytes = 0;     ///< of guest code that these have
  u64 flags_in = 0;  ///< status flags (rflags::STATUS bits) that the block reads before it writes them
  void clear() {
    code.clear();
    exits.clear();
    faults.clear();
    left_at.clear();
    relatives.clear();
    insns = bytes = entry = frame_entry = cold = dead_stub = left = 0;
    flags_in = 0;
  }
};

class BlockTranslator {
 public:
  virtual ~BlockTranslator() = default;
  /// False: the first instruction is to be interpreted (the run loop remembers it); out is then unspecified.
  /// Before a direct exit that goes backward (target <= rip of the branch) or to another page, attention is
  /// polled.
  virtual bool translate(const BlockRequest& request, TranslatedBlock* out) = 0;
};

/// The translator of everything that is worth it.
std::unique_ptr<BlockTranslator> create_block_translator();

}  // namespace ring3::engine
