#pragma once
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine/decode/decode_cache.hpp"
#include "engine/interp/block_cache.hpp"
#include "engine/interp/host_fault.hpp"
#include "engine/interp/interpreter.hpp"
#include "engine/translate/block_translator.hpp"
#include "engine/translate/code_cache.hpp"
#include "engine/translate/interpreted_ops.hpp"
#include "engine/translate/kept_code.hpp"
#include "engine/translate/lockstep.hpp"
#include "engine/translate/perf_map.hpp"
#include "engine/translate/thunks.hpp"

/// Runs a vCPU by translation: 64-bit code runs as host code, everything else (other modes, shadows,
/// single stepping, instructions that the translator leaves out, faulting and device accesses) goes to
/// the interpreter, one instruction at a time, from an exact state.
///
/// What differs from the interpreter: attention is seen at backward and indirect branches and at interpreted
/// instructions, not at every block; Context::retired, and so the budget, counts a block when the run loop
/// enters it, but not what runs through links and the jump table from there.
/// A guest loop that never leaves translated code therefore ends by attention only, not by the budget.
/// Threading: the vCPU's thread. While run() runs, the thread's gs base is the engine's.
namespace ring3::engine {

class TranslatorVcpu final : public CodeObserver, private CodePageSharer {
 public:
  struct Options {
    std::size_t arena_bytes = 256u << 20;  ///< of address space; pages count from when code fills them
    unsigned max_insns = kMaxBlockInsns;  ///< of a block
    /// User code below is linked for its address, most likely: its translation holds for one address alone, and is shorter.
    u64 fixed_below = 1ull << 32;
    u64 lockstep_every = 0;   ///< not 0: every n-th block is compared with the interpreter; nothing is linked
    std::function<void(const std::string&)> lockstep_sink = {};  ///< gets the reports; null: stderr
    PerfMap* perf_map = nullptr;  ///< told of every block; outlives this
    KeptCode* kept = nullptr;  ///< translations are looked for here first, and kept here; outlives this
    /// How often in a row user code of one address space is to be found running before it gets a host window; 0: never; 1: all do at
    /// once, pay or not, for tests.
    unsigned window_samples = 0;
    InterpretedOps* interpreted_ops = nullptr;  ///< told of every interpreted instruction; outlives this
  };
  struct Stats {
    u64 entries = 0, interpreted = 0, translated = 0, fills = 0, faults = 0;
    u64 window_faults = 0;  ///< accesses through a window that were not mapped
    u64 transitions = 0;  ///< SYSCALL, SYSRET and IRET that did not leave translated code
  };

  /// Errors: ENOTSUP when the host lacks what translated code needs; ENOMEM.
  /// The interpreter must outlive this; from now on the Mmu's observer is this.
  static ring3::Result<std::unique_ptr<TranslatorVcpu>> create(VcpuState& state, Mmu& mmu, Interpreter& interpreter,
                                                               std::unique_ptr<BlockTranslator> translator,
                                                               const Options& options);
  ~TranslatorVcpu() override;

  /// As Interpreter::run().
  Interpreter::Result run(u64 budget = ~0ull);

  /// After run() was left by a jump (GuestMemoryTrap).
  void rewind();

  const Stats& stats() const { return stats_; }
  const CodeCache& cache() const { return *cache_; }
  const Lockstep* lockstep() const { return lockstep_.get(); }

  void code_written(Gpa gpa, unsigned size) override;
  void validate_page(Gpa page, const u8* host) override;
  void code_flush() override;

 private:
  TranslatorVcpu(VcpuState& state, Mmu& mmu, Interpreter& interpreter, std::unique_ptr<BlockTranslator> translator,
                 std::unique_ptr<CodeCache> cache, const Options& options);

  bool holds_page(Gpa page) override { return cache_->holds_page(page); }
  void pages_released() override {
    cache_->flush();
    left_stale_ = true;  // one of them may be running
  }

  /// Whether the next instruction may run translated, but for its address.
  bool can_enter() const;
  bool at_page_end() const;
  void edge_left(bool other);  ///< other: the bytes on the next page are not those that were translated
  /// Whether code of this mode is translated at all: 64-bit code, and 32-bit code on flat segments.
  bool translatable() const;
  TranslateMode mode();
  /// SSE instructions run, with all exceptions masked. Of the state: the vectors are there.
  bool vectors_run() const {
    constexpr u32 kMxcsrMasks = 0x1f80;
    u32 mxcsr;
    std::memcpy(&mxcsr, s_.xsave.bytes + 24, 4);
    return c_.fpu_ok && (s_.cr4 & cr4::OSFXSR) && (mxcsr & kMxcsrMasks) == kMxcsrMasks;
  }
  void vectors_from_state(TranslateMode* m) const {
    m->sse = vectors_run();
    m->avx = m->sse && (s_.cr4 & cr4::OSXSAVE) && (s_.xcr0 & 6) == 6;
  }
  /// TranslateMode::stacked, near_fs. All of the window's constants but the stacks' may be made while code runs.
  void look_at_stack(u64 rsp, TranslateMode* m) const {
    const auto near = [](u64 address) { return address >> frame::kRegionShift == Window::kStacks; };
    m->stacked = m->windowed && any_gs_ && near(rsp) && !Window::is_no_delta(frame_.window_deltas[Window::kStacks]);
    m->near_fs = m->stacked && near(s_.seg[FS].base);
  }
  /// Indirect jumps and links hold under this bias from now on.
  void set_jumps(u64 bias, TranslateMode mode) {
    gs_constant_ = mode.stacked ? frame_.window_deltas[Window::kStacks] : 0;
    const bool common = mode.user && !mode.code32 && lockstep_ == nullptr;
    frame_.common_table = common ? reinterpret_cast<u64>(cache_->common_table()) : 0;
    frame_.common_mode = CodeCache::common_key(Gpa(0), mode.bits());
    frame_.jump_table = reinterpret_cast<u64>(cache_->jump_table());
    frame_.jump_bias = bias;
    frame_.bias_high = static_cast<u32>(bias >> 48);
    frame_.bias_negated = 0 - frame_.bias_high;
  }
  const u8* recall_common(TranslateMode mode);
  void hold(u64 bias) {
    cache_->hold(bias, [&](u64 linear, Gpa page) {
      Gpa now;
      return mmu_.fetched(linear, &now) && now == page;
    });
  }
  bool position_independent(u64 rip, TranslateMode mode) const;
  /// The block at RIP; null: the interpreter is to run the instruction.
  static u8 key(TranslateMode mode, bool ungrouped) {
    return static_cast<u8>(mode.bits() | (ungrouped ? CodeCache::kUngrouped : 0));
  }
  CodeBlock* lookup(u64 rip, TranslateMode mode, bool ungrouped, CodeBlock* guess);
  CodeBlock* translate(Gpa gpa, u64 rip, const u8* host, TranslateMode mode, bool ungrouped);
  void enter(const u8* code);
  u64 kept_context() const;
  DecodeResult decode_one(const u8* bytes, unsigned size, TranslateMode mode, DecodedInsn* insn);
  bool decode_kept(const u8* bytes, unsigned size, TranslateMode mode);  ///< into insns_[0]
  unsigned decode_block(const u8* image, unsigned size, unsigned max, Gpa gpa, u64 rip, BlockRequest* request);
  bool make(const BlockRequest& request, TranslatedBlock* out);
  void make_moved(const u8* image, unsigned size, Gpa gpa, BlockRequest* request);
  u32 finish_bytes(unsigned size, TranslatedBlock* out) const;
  static unsigned bytes_that_say(const DecodedInsn& insn);
  u32 number_left(const DecodedInsn& insn);
  /// host - linear of an access that the translation allows, 0: it is interpreted. In two pages only if the host's
  /// are neighbours too, or for a read, which then reads from a copy.
  u64 addend(u64 linear, unsigned size, bool write);
  static u64 fill(void* self, u64 linear, u64 size, u64 write);
  // transitions.cpp, with the guest's vectors in the host's registers
  static u64 system_function(void* self, u64 operand, u64 op);
  u64 system_op(SystemOp op, u64 operand);
  bool load_x87();
  static u64 transit_function(void* self, u64 rip, u64 number);
  u64 transit(u64 rip, const DecodedInsn& insn);
  struct ReturnFrame;
  bool transit_iret();
  static u64 read_return(void* frame);  ///< is made with vector registers
  u64 go_on();
  // window_policy.cpp
  static u64 window_function(void* self, u64 pc, u64* r15);
  u64 window_fault(u64 pc, u64* r15);
  bool open_region(u64 pc, u64* r15);
  bool use_window();     ///< whether user code is entered windowed
  void sample_window();  ///< user code was found running
  void open_window();
  void close_window();
  void refuse_window(unsigned patience);
  struct WindowPolicy {
    u64 space = 0;         ///< CR3's address bits of what was found running
    unsigned samples = 0;  ///< how often, or more where it stays at one place; no more than it takes
    u64 sampled = 0;       ///< TSC of the last sample
    u64 seen = 0, place = 0;  ///< its address space, and its RIP
    u64 fills = 0;         ///< Stats::fills then
    u64 open = 0;          ///< the window's address space; 0: none
    u64 since = 0, cost = 0;  ///< TSC; ticks spent on the window since
    u64 fault = 0;         ///< the host address, and 1 for a write, of one that was refused, until user code runs again
    u64 fault_rip = 0;
    u64 refused = 0;       ///< the space whose window did not pay last
    unsigned patience = 0;  ///< log2 of how much longer it waits for its next
  };
  void note_interpreted();                  // interpreted_ops.cpp

  /// What IRET reads, from sp on.
  struct ReturnFrame {
    TranslatorVcpu& v;
    u64 sp;
    u64 rip = 0, cs = 0, rflags = 0, rsp = 0, ss = 0;
    u64 code = 0, stack = 0;  ///< the descriptors
    bool read = false;
  };

  VcpuState& s_;
  Mmu& mmu_;
  Interpreter& interpreter_;
  Context& c_;
  std::unique_ptr<BlockTranslator> translator_;
  std::unique_ptr<CodeCache> cache_;
  const Options options_;
  const Environment::HostTsc host_tsc_;
  HostFaultRange fault_range_;
  JitFrame frame_;
  TranslatedBlock out_;
  TranslatedBlock moved_;  ///< the same code translated at another address, for KeptCode
  std::vector<u16> addresses_;
  DecodeCache decoder_;
  std::vector<DecodedInsn> insns_;
  std::unique_ptr<bool[]> has_feature_;
  Stats stats_;
  std::unique_ptr<Lockstep> lockstep_;  ///< null: blocks run unchecked
  bool in_run_ = false;
  u64 gs_before_ = 0;          ///< while in_run_
  const bool any_gs_ = JitGsBase::any();
  u64 gs_constant_ = 0;        ///< the gs base of TranslateMode::stacked; 0: the TLB
  /// Instructions that blocks leave to the interpreter, by number.
  struct Left {
    DecodedInsn insn;
    Handler handler;
  };
  static constexpr std::size_t kMaxLeft = 1u << 15;  ///< different ones; then everything is translated anew
  std::vector<Left> left_;
  std::unordered_map<std::string, u32> left_numbers_;
  bool left_stale_ = false;  ///< no block has a number: they begin anew with the next one
  bool cut_off_ = false;     ///< decode_block()'s: its first instruction goes on in a page that is absent
  WindowPolicy window_;
  u64 limit_ = 0;            ///< of Context::retired, in run()
  bool loaded_avx_ = false;  ///< TranslateMode::avx when the vectors were loaded last
  unsigned vectors_held_ = 0;  ///< supervisor code is entered with vectors loaded while it is not zero
  unsigned vectors_hold_ = 0;  ///< what it was set to last
  u64 vectors_wanted_ = 0;     ///< entries made by then
};

}  // namespace ring3::engine
