#pragma once
#include <array>
#include <cstddef>

#include "base/types.hpp"
#include "engine/translate/block_translator.hpp"

namespace ring3::engine {

/// Where the memory operands of a block that is about to run will lie, for checks that expect a region (windows.cpp): simple
/// instructions are computed with the registers as they are, loads read guest memory where that is at hand. What a block
/// stores is not seen by its loads.
///
/// Guesses: any answer is safe, a wrong one costs the way round.
class Foresight {
 public:
  static constexpr u8 kUnknown = 0xff;

  /// For the first count of request.insns.
  void look(const BlockRequest& request, std::size_t count);
  /// Bits 42 to 46 of the address that the operand of this instruction will have.
  u8 region(std::size_t insn) const { return insn < count_ ? regions_[insn] : kUnknown; }

 private:
  struct Value {
    u64 bits = 0;
    bool known = false;
  };
  Value address(const DecodedInsn& i, u64 next_rip) const;
  Value load(const Value& at, unsigned size) const;
  Value operand(const DecodedInsn& i, std::size_t n, const Value& at) const;
  void set(const Operand& o, const Value& v);
  void execute(const DecodedInsn& i, const Value& at);
  void forget(const DecodedInsn& i);

  const BlockRequest* request_ = nullptr;
  std::array<Value, 16> gpr_;
  std::array<u8, kMaxBlockInsns> regions_;
  std::size_t count_ = 0;
};

}  // namespace ring3::engine
