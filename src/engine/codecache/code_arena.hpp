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
  /// Replaces bytes of appended code; at lies in the executable mapping. Either all of it lies in what was
  /// appended, or nothing is done. The bytes must not be running on another thread.
  void patch(const u8* at, std::span<const u8> bytes);
  /// Drops what was appended after the first `keep` bytes. Nothing of it may be running or be called again.
  void clear(std::size_t keep = 0);

  std::size_t used() const { return used_; }
  const u8* begin() const { return executable_.data(); }
  const u8* end() const { return executable_.data() + executable_.size(); }
  bool contains(const void* p) const { return p >= begin() && p < end(); }

 private:
  CodeArena(Mapping writable, Mapping executable)
      : writable_(std::move(writable)), executable_(std::move(executable)) {}
  Mapping writable_, executable_;
  std::size_t used_ = 0;
};

}  // namespace ring3::engine
