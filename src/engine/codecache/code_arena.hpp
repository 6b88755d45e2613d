#pragma once
#include <cstddef>
#include <memory>
#include <span>

#include "base/mapping.hpp"
#include "base/result.hpp"
#include "base/types.hpp"

/// Memory for generated code: one memfd mapped twice, once readable and writable, once readable and
/// executable. No mapping is ever writable and executable; code is written through the one and run
/// through the other.
///
/// Ownership: the arena owns both mappings; code in it dies with it or with clear().
/// Threading: one writer at a time; code that append() has returned may run on any thread that is
///            ordered after it.
namespace ring3::engine {

class CodeArena {
 public:
  /// size in bytes, rounded up to pages.
  static Result<std::unique_ptr<CodeArena>> create(std::size_t size);

  /// Copies code to the end of the arena, 16-byte aligned; returns where it runs, or null when it does
  /// not fit.
  const u8* append(std::span<const u8> code);
  /// The same at the other end of the arena, which grows towards the first, unaligned: for code that is rarely run.
  const u8* append_cold(std::span<const u8> code);
  /// Replaces bytes of appended code; at lies in the executable mapping. Either all of it lies in what was
  /// appended, or nothing is done. The bytes must not be running on another thread.
  void patch(const u8* at, std::span<const u8> bytes);
  /// Drops everything but the first `keep` bytes that append() took. Nothing of it may be running or be called again.
  void clear(std::size_t keep = 0);

  std::size_t used() const { return used_ + (writable_.size() - cold_); }
  const u8* begin() const { return executable_.data(); }
  const u8* end() const { return executable_.data() + executable_.size(); }
  bool contains(const void* p) const { return p >= begin() && p < end(); }

 private:
  CodeArena(Mapping writable, Mapping executable)
      : writable_(std::move(writable)), executable_(std::move(executable)), cold_(writable_.size()), cold_present_(cold_) {}
  /// Makes the kernel map pages [from, to) at once instead of by a fault each. An arena is used from both ends only.
  void populate(std::size_t from, std::size_t to);
  Mapping writable_, executable_;
  std::size_t used_ = 0, cold_;  ///< in use: [0, used_) and [cold_, size)
  std::size_t present_ = 0, cold_present_;  ///< populated so far
};

}  // namespace ring3::engine
