#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

/// Numbers as people type and read them. Pure; any thread.
namespace ring3::control {

/// "512M", "2G", "1.5G", "65536K", "1T", "1073741824": a whole number of bytes, units of 1024.
/// A unit may be written K, KB or KiB, in either case. No sign, no spaces; no overflow passes.
/// Errors: EINVAL, naming what was given and what is wanted.
Result<u64> parse_size(std::string_view text);

/// A decimal number in [min, max]. `what` names it in errors ("--cpus").
Result<u64> parse_count(std::string_view text, const std::string& what, u64 min, u64 max);

/// An option's value at its commas, at least one word. In the first word, a path, ",," is a comma.
std::vector<std::string> option_words(std::string_view text);

/// "512 MiB", "1.5 GiB": for people.
std::string format_size(u64 bytes);

/// The text with control characters, and bytes that are no UTF-8, made visible, cut to a line of sensible length: for errors, and for
/// what others than the user have written.
std::string printable(std::string_view text);

}  // namespace ring3::control
