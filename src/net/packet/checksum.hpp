#pragma once
#include <span>

#include "base/types.hpp"
#include "net/packet/address.hpp"

/// The Internet checksum (RFC 1071).
namespace ring3::net {

/// Adds bytes, an odd last one padded, to a running sum. Only the last piece may be of odd length.
u64 sum_add(u64 sum, std::span<const u8> bytes);
/// Folded, not complemented.
u16 sum_fold(u64 sum);
inline u16 checksum(std::span<const u8> bytes) { return static_cast<u16>(~sum_fold(sum_add(0, bytes))); }
/// The pseudo header of RFC 793 and RFC 8200, 8.1.
u64 pseudo_sum(const Ip& source, const Ip& destination, u8 protocol, std::size_t length);
/// Of a transport segment with its pseudo header; 0 when the checksum in it is right.
u16 transport_checksum(const Ip& source, const Ip& destination, u8 protocol, std::span<const u8> segment);

}  // namespace ring3::net
