#include "control/cli/text.hpp"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <limits>

#include "base/checked.hpp"

namespace ring3::control {

namespace {

/// The shift of a unit, or -1: "", K, M, G, T with an optional B or iB.
int unit_shift(std::string_view unit) {
  if (unit.empty()) return 0;
  const char c = static_cast<char>(std::toupper(static_cast<unsigned char>(unit[0])));
  const std::string_view rest = unit.substr(1);
  if (c == 'B') return rest.empty() ? 0 : -1;
  if (!(rest.empty() || rest == "B" || rest == "b" || rest == "iB" || rest == "ib" || rest == "IB")) return -1;
  switch (c) {
    case 'K': return 10;
    case 'M': return 20;
    case 'G': return 30;
    case 'T': return 40;
    default: return -1;
  }
}

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Reads the digits at the front of text; nullopt on overflow.
std::optional<u64> take_number(std::string_view& text) {
  u64 value = 0;
  while (!text.empty() && is_digit(text[0])) {
    const auto times_ten = checked_mul<u64>(value, 10);
    if (!times_ten) return std::nullopt;
    const auto sum = checked_add<u64>(*times_ten, static_cast<u64>(text[0] - '0'));
    if (!sum) return std::nullopt;
    value = *sum;
    text.remove_prefix(1);
  }
  return value;
}

/// The bytes of the character that UTF-8 text begins with; 0: it is no UTF-8, or one that a terminal obeys (C0, C1, DEL).
std::size_t character(std::string_view text) {
  const auto byte = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const u32 first = byte(0);
  if (first < 0x80) return first >= 0x20 && first != 0x7f ? 1 : 0;
  const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4) return 0;
  u32 code = first & (0x7fu >> length);
  for (std::size_t i = 1; i < length; i++) {
    if ((byte(i) & 0xc0) != 0x80) return 0;
    code = code << 6 | (byte(i) & 0x3f);
  }
  constexpr u32 kLeast[] = {0xa0, 0x800, 0x10000};
  const bool surrogate = code >= 0xd800 && code < 0xe000;
  return code >= kLeast[length - 2] && code < 0x110000 && !surrogate ? length : 0;
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr std::size_t kLongest = 120;
  std::string out;
  while (!text.empty()) {
    if (out.size() >= kLongest) return out + "…";
    const std::size_t length = character(text);
    if (length != 0) {
      out += text.substr(0, length);
    } else {
      char hex[8];
      std::snprintf(hex, sizeof hex, "\\x%02x", static_cast<unsigned char>(text[0]));
      out += hex;
    }
    text.remove_prefix(std::max<std::size_t>(length, 1));
  }
  return out;
}

Result<u64> parse_size(std::string_view text) {
  const auto bad = [&] {
    return Error::of(EINVAL, "'" + printable(text) + "' is not a size: give a number and K, M, G or T, such as 512M or 2G");
  };
  const auto too_large = [&] { return Error::of(EINVAL, "'" + printable(text) + "' is too large a size"); };

  std::string_view rest = text;
  if (rest.empty() || !is_digit(rest[0])) return bad();
  const auto whole = take_number(rest);
  if (!whole) return too_large();

  u64 fraction = 0;
  u64 scale = 1;
  if (!rest.empty() && rest[0] == '.') {
    rest.remove_prefix(1);
    const std::string_view digits = rest;
    const auto value = take_number(rest);
    const std::size_t count = digits.size() - rest.size();
    if (count == 0 || count > 6 || !value) return bad();
    fraction = *value;
    for (std::size_t i = 0; i < count; ++i) scale *= 10;
  }

  const int shift = unit_shift(rest);
  if (shift < 0) return bad();
  const u64 unit = u64{1} << shift;
  const auto bytes = checked_mul<u64>(*whole, unit);
  if (!bytes) return too_large();
  // fraction < 10^6 and unit <= 2^40: the product fits in 60 bits.
  if ((fraction * unit) % scale != 0) {
    return Error::of(EINVAL, "'" + printable(text) + "' is not a whole number of bytes");
  }
  const auto sum = checked_add<u64>(*bytes, fraction * unit / scale);
  if (!sum) return too_large();
  return *sum;
}

Result<u64> parse_count(std::string_view text, const std::string& what, u64 min, u64 max) {
  std::string_view rest = text;
  const bool digits = !rest.empty() && is_digit(rest[0]);
  const auto value = digits ? take_number(rest) : std::nullopt;
  const bool overflow = digits && !value;
  if (!digits || (value && !rest.empty())) {
    return Error::of(EINVAL, what + ": '" + printable(text) + "' is not a number");
  }
  if (overflow || *value < min || *value > max) {
    return Error::of(EINVAL, what + ": " + printable(text) + " is out of range; it can be " + std::to_string(min) + " to " +
                                 std::to_string(max));
  }
  return *value;
}

std::vector<std::string> option_words(std::string_view text) {
  std::vector<std::string> words(1);
  for (std::size_t i = 0; i < text.size(); i++) {
    if (text[i] != ',') {
      words.back() += text[i];
    } else if (words.size() == 1 && i + 1 < text.size() && text[i + 1] == ',') {
      words.back() += text[i++];
    } else {
      words.emplace_back();
    }
  }
  return words;
}

std::string format_size(u64 bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t unit = 0;
  double value = static_cast<double>(bytes);
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  char out[32];
  std::snprintf(out, sizeof out, value == static_cast<double>(static_cast<u64>(value)) ? "%.0f %s" : "%.1f %s", value, kUnits[unit]);
  return out;
}

}  // namespace ring3::control
