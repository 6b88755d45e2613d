#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "base/result.hpp"
#include "base/types.hpp"
#include "engine/decode/insn.hpp"

/// Which instructions the translator left to the interpreter, by form and reason: what to translate next.
///
/// A debug aid: with it every interpreted instruction of a vCPU is decoded once more and counted under a lock.
/// The file is written when this is destroyed, and every million instructions: lines "COUNT REASON user|kernel NAME FORM EXAMPLE", most frequent
/// first. EXAMPLE is the address and the bytes of one such instruction: of the most frequent one, if more than half are that.
/// Threading: any thread.
namespace ring3::engine {

class InterpretedOps {
 public:
  enum class Reason : u8 {
    Mode,          ///< code that is not translated: 16 or 32 bits
    Alone,         ///< a shadow, a single step, a resume flag, a replayed access
    Untranslated,  ///< no translation of the instruction in this mode
    Refused,       ///< the translation left it: an access that faults, a device, a code page
  };

  /// Errors: path cannot be written.
  static Result<std::unique_ptr<InterpretedOps>> create(const std::string& path);
  ~InterpretedOps();
  InterpretedOps(const InterpretedOps&) = delete;
  InterpretedOps& operator=(const InterpretedOps&) = delete;

  void count(Reason reason, bool user, u64 rip, const DecodedInsn& insn);
  /// What the file gets.
  std::string report() const;

 private:
  explicit InterpretedOps(std::FILE* file) : file_(file) {}
  std::string table() const;
  void write(const std::string& text);
  struct Entry {
    u64 count = 0, rip = 0;
    i64 votes = 0;  ///< for rip
    DecodedInsn example;
    Reason reason = Reason::Mode;
    bool user = false;
  };
  mutable std::mutex mutex_;
  u64 total_ = 0;
  std::FILE* file_;
  std::unordered_map<u64, Entry> entries_;
};

}  // namespace ring3::engine
