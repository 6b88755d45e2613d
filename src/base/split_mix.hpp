#pragma once
#include "base/types.hpp"

namespace ring3 {

/// splitmix64: a sequence that follows from its seed alone, on every machine. For tests that replay a seed, and for
/// numbers that only need to be spread; nothing here resists somebody who sees its values.
/// Threading: a plain value.
class SplitMix64 {
 public:
  explicit SplitMix64(u64 seed) : state_(seed) {}
  u64 next() { return mix(state_ += 0x9e3779b97f4a7c15); }
  u64 below(u64 n) { return next() % n; }  ///< n is not 0
  bool one_in(u64 n) { return below(n) == 0; }
  /// A bijection of 64-bit numbers that changes half of the bits for each bit of z.
  static u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  u64 state_;
};

}  // namespace ring3
