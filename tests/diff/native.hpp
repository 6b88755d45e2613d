#pragma once
#include <memory>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"

/// Runs one user-mode instruction on the host CPU itself: the oracle of the differential tests.
///
/// The instruction runs in this process at fixed low addresses that the guest maps at the same
/// linear addresses, so that every address the two sides compute or report is equal.
/// Threading: one NativeRunner per process (fixed addresses, process-wide signal handlers).
namespace ring3::diff {

// The address space both sides share. Everything lies below 2 GiB, so that 32-bit code reaches it.
/// The instruction, at kCode + offset. No address that a random register value is likely to be: the landing
/// pads differ between the two sides.
inline constexpr u64 kCode = 0x2a5b3000;
inline constexpr u64 kCodeSize = 0x1000;
inline constexpr u64 kData = 0x10000000;       ///< kDataPages read-write pages, one read-only, one absent
inline constexpr u64 kDataPages = 3;
inline constexpr u64 kDataSize = kDataPages * 0x1000;
inline constexpr u64 kReadOnly = kData + kDataSize;
inline constexpr u64 kAbsent = kReadOnly + 0x1000;
inline constexpr unsigned kPadSize = 7;        ///< bytes of a landing pad
inline constexpr unsigned kFarPad = 64;        ///< pad B stands at insn + kFarPad

/// How the instruction ended.
struct Outcome {
  enum class Kind : u8 { FellThrough, Branched /* to pad B */, Fault } kind = Kind::FellThrough;
  u8 vector = 0;
  u32 error = 0;     ///< #PF and #GP only
  u64 cr2 = 0;       ///< #PF only
  friend bool operator==(const Outcome&, const Outcome&) = default;
};

/// Bytes of an XSAVE area up to the end of ZMM16..31, where Intel's processors have them.
inline constexpr unsigned kXsaveBytes = 2688;

/// Registers in and out. xsave: standard format (x87, SSE, AVX, and AVX-512 where the host has it).
struct alignas(64) Registers {
  u64 gpr[16];
  u64 rip;
  u64 rflags;
  alignas(64) u8 xsave[kXsaveBytes];
};

/// The host switches AVX-512's state, and has it where XsaveArea does.
bool host_has_avx512();

class NativeRunner {
 public:
  static Result<std::unique_ptr<NativeRunner>> create();
  /// After fork(): replaces the pages shared with the parent by this process' own.
  static Result<std::unique_ptr<NativeRunner>> create_in_child();
  ~NativeRunner();

  u8* data() const;        ///< kDataSize bytes, read-write
  u8* read_only() const;   ///< the writable alias of the page the guest sees read-only
  /// Puts insn at kCode + offset with pad A behind it and pad B at kFarPad.
  void set_code(unsigned offset, const u8* insn, unsigned size, bool compat32);
  /// The bytes of the code page as set_code() left them (the guest gets the same).
  const u8* code() const;
  /// Runs it. regs is replaced by the state afterwards (at a fault: rip at the instruction).
  Outcome run(Registers* regs, bool compat32);

 private:
  NativeRunner() = default;
};

}  // namespace ring3::diff
