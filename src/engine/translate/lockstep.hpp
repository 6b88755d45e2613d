#pragma once
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/result.hpp"
#include "engine/codecache/code_arena.hpp"
#include "engine/interp/host_fault.hpp"
#include "engine/interp/interpreter.hpp"
#include "engine/translate/block_translator.hpp"
#include "engine/translate/frame.hpp"

/// The divergence checker: each block runs translated first, on a shadow of memory, then its instructions are
/// interpreted for good, and both results are compared. The guest only ever sees the interpreter's.
///
/// Shadow:    translated code finds a TLB of its own, whose pages are copies made when they are first touched.
///            The page that the copy was made of is compared with the copy as translated code left it.
/// Compared:  VcpuState as a whole, status flags but those that the architecture leaves undefined or that are dead
///            at a fault (docs/adr/0004), x87 and vector state, every page that the block touched.
/// Naming:    on a difference, memory and state go back and the block's prefixes of 1, 2, ... instructions run
///            the same way. The first prefix that differs ends with the instruction that is reported.
/// Limits:    other vCPUs and devices that store to a page while a block is compared look like differences:
///            such a difference is looked for again, and left out when it has gone.
/// Threading: the vCPU's thread.
namespace ring3::engine {

class Lockstep {
 public:
  struct Options {
    u64 every = 1;                        ///< every n-th block is compared, the others run translated
    std::FILE* report = stderr;
    unsigned max_reports = 20;
    std::function<void(const std::string& text)> sink;  ///< in place of report; for tests
  };
  struct Stats {
    u64 compared = 0, given_up = 0, gone = 0, differences = 0;
  };
  /// How the translator's owner runs code: loads the registers from VcpuState, runs, stores them back.
  struct Owner {
    std::function<void(const u8* code)> enter;
    std::function<bool(u64 pc, u64* rip)> fault_rip;  ///< of the code cache
    std::function<bool(u64 linear, u64 size, bool write)> fill;
    std::function<unsigned(u32 tag)> exit_insns;  ///< of the code cache
  };

  static Result<std::unique_ptr<Lockstep>> create(VcpuState& state, Mmu& mmu, Interpreter& interpreter,
                                                  JitFrame& frame, BlockTranslator& translator, Owner owner,
                                                  const Options& options);

  /// For frame.tlb while a block is being compared; else null.
  const Mmu::TlbEntry* tlb() const { return active_ ? shadow_.get() : nullptr; }
  /// The fill thunks' function while active.
  bool fill(u64 linear, u64 size, bool write);
  bool active() const { return active_; }
  bool wants() { return ++blocks_ % options_.every == 0; }

  enum class End : u8 {
    Same,     ///< state and frame.exit_reason as if the block had run translated
    Other,    ///< compared or not, state is right; look the next block up
    Stopped,  ///< the interpreter returned *result
  };
  /// Runs the block at state.rip, whose code is `code` and which has count instructions.
  End run(const u8* code, unsigned count, TranslateMode mode, Interpreter::Result* result);

  const Stats& stats() const { return stats_; }

 private:
  struct Page {
    u8* real = nullptr;
    alignas(64) u8 before[kPageSize], copy[kPageSize];  ///< aligned as accesses of the guest may want it
    bool used = false;
  };
  struct Snapshot {
    std::unique_ptr<VcpuState> state = std::make_unique<VcpuState>();
  };
  struct Comparison {
    bool same = true;
    std::string what;
  };

  Lockstep(VcpuState& state, Mmu& mmu, Interpreter& interpreter, JitFrame& frame, BlockTranslator& translator,
           Owner owner, const Options& options, std::unique_ptr<CodeArena> arena);

  void clear_shadow();
  void translated(const u8* code, const Snapshot& before);  ///< leaves its result in s_
  bool fault_rip(u64 pc, u64* rip) const;
  bool decode_block(u64 rip, unsigned count);
  /// Instructions executed when the block (prefix: as out_ is) left at rip; ~0u: none fits.
  unsigned done(u64 rip, unsigned count, bool prefix) const;
  u64 compared_flags(unsigned n, bool complete) const;
  Comparison compare(const VcpuState& interpreted, const VcpuState& other, u64 flags) const;
  Interpreter::Result interpret(u64 n, bool* all);
  void save(Snapshot* to) const;
  void load(const Snapshot& from);
  void restore_memory();
  void name_difference(const Snapshot& before, unsigned count, TranslateMode mode, const std::string& whole);
  void report(const std::string& text);
  std::string describe(unsigned n) const;

  VcpuState& s_;
  Mmu& mmu_;
  Interpreter& interpreter_;
  Context& c_;
  JitFrame& frame_;
  BlockTranslator& translator_;
  const Owner owner_;
  const Options options_;
  std::unique_ptr<CodeArena> arena_;  ///< prefixes
  HostFaultRange fault_range_;
  std::unique_ptr<Mmu::TlbEntry[]> shadow_;
  std::vector<unsigned> filled_;               ///< entries of shadow_
  std::unordered_map<u64, Page*> by_host_;     ///< pages in use
  std::vector<std::unique_ptr<Page>> pages_;   ///< all ever made
  std::size_t used_ = 0;
  bool active_ = false, walked_ = false;
  std::vector<DecodedInsn> insns_;
  TranslatedBlock out_;
  const u8* prefix_ = nullptr;
  Snapshot before_, after_translated_, after_interpreted_;
  u64 blocks_ = 0;
  Stats stats_;
};

}  // namespace ring3::engine
