#pragma once
#include <memory>

#include "engine/decode/decoder.hpp"

/// decode() of 64-bit code, for who decodes much: remembers what an instruction's prefixes, opcode, ModRM and SIB
/// mean, and reads displacement and immediate by itself. The answers are decode()'s, bit for bit.
///
/// Bounded:   kForms entries, the newest of each place.
/// Threading: one thread.
namespace ring3::engine {

class DecodeCache {
 public:
  DecodeCache();

  /// As decode() with CodeMode::Bits64 and without real_mode.
  DecodeResult decode64(const u8* bytes, unsigned size, bool amd, DecodedInsn* insn);

  struct Stats {
    u64 hits = 0, misses = 0;
  };
  const Stats& stats() const { return stats_; }

 private:
  static constexpr unsigned kForms = 4096;
  struct Entry {
    u64 key = 0;
    InsnForm form;  ///< fixed 0: none
    bool amd = false;
    DecodedInsn insn;  ///< without its numbers
  };

  std::unique_ptr<Entry[]> entries_;
  Stats stats_;
};

}  // namespace ring3::engine
