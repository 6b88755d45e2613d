#pragma once
#include <compare>
#include <cstddef>
#include <cstdint>

/// Fixed-width names and the three kinds of address.
///
/// Gva, Gpa and Hva do not convert into one another: mixing them is a security bug, so a change
/// of kind is always a named operation (a page walk, a memslot lookup).
namespace ring3 {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i8 = std::int8_t;
using i16 = std::int16_t;
using i32 = std::int32_t;
using i64 = std::int64_t;
using u128 = unsigned __int128;
using i128 = __int128;

inline constexpr u64 kPageSize = 4096;
inline constexpr u64 kPageShift = 12;
inline constexpr u64 kPageMask = ~(kPageSize - 1);

namespace detail {
template <class Tag>
struct Address {
  u64 value = 0;

  constexpr Address() = default;
  constexpr explicit Address(u64 v) : value(v) {}
  friend constexpr auto operator<=>(Address, Address) = default;

  constexpr Address operator+(u64 n) const { return Address(value + n); }
  constexpr Address operator-(u64 n) const { return Address(value - n); }
  constexpr u64 operator-(Address other) const { return value - other.value; }
  constexpr Address page() const { return Address(value & kPageMask); }
  constexpr u64 page_offset() const { return value & ~kPageMask; }
  constexpr u64 frame() const { return value >> kPageShift; }
};
}  // namespace detail

/// Guest virtual: what the guest's paging translates (the SDM's linear address, after segmentation).
using Gva = detail::Address<struct GvaTag>;
/// Guest physical.
using Gpa = detail::Address<struct GpaTag>;
/// Host virtual: an address in this process.
using Hva = detail::Address<struct HvaTag>;

}  // namespace ring3
