#pragma once
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <variant>

#include "base/check.hpp"

/// Result<T>: a value, or what the host refused and why. For failures of the host and bad usage;
/// what a guest does wrong is a value of its own, never an Error.
namespace ring3 {

struct Error {
  int code = 0;         ///< errno value; EINVAL for bad input
  std::string message;  ///< one line, without a trailing newline, that says what to do

  static Error of(int code, std::string message) { return {code, std::move(message)}; }
  /// "context: strerror(errno)"
  static Error from_errno(const std::string& context, int code = errno) {
    return {code, context + ": " + std::strerror(code)};
  }
};

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : v_(std::in_place_index<0>, std::move(value)) {}
  Result(Error error) : v_(std::in_place_index<1>, std::move(error)) {}

  explicit operator bool() const { return v_.index() == 0; }
  bool ok() const { return v_.index() == 0; }
  T& value() & { CHECK(ok()); return std::get<0>(v_); }
  const T& value() const& { CHECK(ok()); return std::get<0>(v_); }
  T&& value() && { CHECK(ok()); return std::get<0>(std::move(v_)); }
  T& operator*() & { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const Error& error() const { CHECK(!ok()); return std::get<1>(v_); }

 private:
  std::variant<T, Error> v_;
};

struct Ok {};
using Status = Result<Ok>;

}  // namespace ring3
