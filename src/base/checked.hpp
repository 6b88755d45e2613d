#pragma once
#include <optional>
#include <type_traits>

/// Arithmetic on sizes and addresses that come from outside.
namespace ring3 {

template <class T>
constexpr std::optional<T> checked_add(T a, std::type_identity_t<T> b) {
  T r;
  if (__builtin_add_overflow(a, b, &r)) return std::nullopt;
  return r;
}

template <class T>
constexpr std::optional<T> checked_mul(T a, std::type_identity_t<T> b) {
  T r;
  if (__builtin_mul_overflow(a, b, &r)) return std::nullopt;
  return r;
}

/// Whether [start, start+size) lies in [0, limit), overflow-safe.
template <class T>
constexpr bool range_within(T start, std::type_identity_t<T> size, std::type_identity_t<T> limit) {
  return start <= limit && size <= limit - start;
}

}  // namespace ring3
