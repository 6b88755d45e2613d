#pragma once
#include <memory>

#include "engine/interp/context.hpp"

/// The interpreter of one vCPU: the reference semantics of the engine.
///
/// Decoded instructions are cached in basic blocks by guest-physical address and mode, and dropped
/// when their bytes change. The cache belongs to this vCPU alone; its size is bounded.
/// Threading: the vCPU's thread. Context::attention may be raised by any thread.
namespace ring3::engine {

class CodePageSharer;  ///< interp/block_cache.hpp

class Interpreter final : public CodeObserver {
 public:
  enum class Result : u8 {
    Attention,   ///< context().attention() is non-zero (checked at block boundaries, never inside a shadow)
    Exit,        ///< the environment asked for the VMM (Stop::Exit)
    Halted,      ///< HLT retired
    TripleFault,
    Debug,       ///< guest debug by the VMM: step done or breakpoint hit; debug_dr6()/s.rip say where
    Budget,      ///< `budget` instructions retired
  };

  /// cache_bytes bounds the decoded-code cache.
  static std::unique_ptr<Interpreter> create(VcpuState& state, Mmu& mmu, Environment& env, std::size_t cache_bytes);
  ~Interpreter() override;

  Context& context();

  /// Runs guest code until one of Result. Faults and traps are delivered to the guest inside.
  /// Precondition: mode_changed() was called after state was set from outside.
  Result run(u64 budget = ~0ull);

  /// Executes one instruction that the caller decoded at RIP and may execute there, as run(1) does. Only in 64-bit code,
  /// with nothing around the instruction: no slow_step, no shadow, nothing replayed or pending.
  Result execute(const DecodedInsn& insn, Handler handler);
  /// run(1), but attention and an open interrupt window do not keep the instruction from being executed: what left
  /// translated code in the middle of a block goes on to the next boundary.
  Result run_one();

  /// Delivers an external interrupt, NMI, or exception given by the VMM, before run().
  Delivered inject(const Event& event);

  /// After run() or inject() was left by a jump (GuestMemoryTrap): back to the beginning of the instruction that was cut
  /// off. An event whose delivery was cut off is the caller's to inject again.
  void rewind();

  /// At most n instructions in a block (0: the default). For tests: block boundaries hide bugs.
  void set_max_block_insns(unsigned n);

  /// Another cache of this vCPU that holds code of guest pages, told when pages are released; may be null.
  void set_page_sharer(CodePageSharer* sharer);

  u64 debug_dr6() const;      ///< for Result::Debug
  u8 debug_vector() const;    ///< 1 or 3

  void code_written(Gpa gpa, unsigned size) override;
  void validate_page(Gpa page, const u8* host) override;
  void code_flush() override;

 private:
  struct Impl;
  explicit Interpreter(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace ring3::engine
