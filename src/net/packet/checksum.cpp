#include "net/packet/checksum.hpp"

#include <bit>
#include <cstring>

#include "net/packet/wire.hpp"

namespace ring3::net {

// One's-complement sums do not care for the byte order they are made in as long as the result is swapped back
// (RFC 1071, 2 B), so words are added as the host reads them.
u64 sum_add(u64 sum, std::span<const u8> bytes) {
  u64 total = 0;
  const u8* p = bytes.data();
  std::size_t n = bytes.size();
  while (n >= 32) {
    u64 w[4];
    std::memcpy(w, p, 32);
    for (const u64 v : w) total += (v >> 32) + (v & 0xffffffff);
    p += 32;
    n -= 32;
  }
  while (n >= 2) {
    u16 w;
    std::memcpy(&w, p, 2);
    total += w;
    p += 2;
    n -= 2;
  }
  if (n != 0) {
    const u8 last[2] = {*p, 0};
    u16 w;
    std::memcpy(&w, last, 2);
    total += w;
  }
  u16 folded = sum_fold(total);
  if constexpr (std::endian::native == std::endian::little) folded = static_cast<u16>(folded >> 8 | folded << 8);
  return sum + folded;
}

u16 sum_fold(u64 sum) {
  while ((sum >> 16) != 0) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<u16>(sum);
}

u64 pseudo_sum(const Ip& source, const Ip& destination, u8 protocol, std::size_t length) {
  u64 sum = protocol + (length & 0xffff) + (length >> 16);
  const std::size_t from = source.is_v4() ? 12 : 0;
  sum = sum_add(sum, std::span(source.b).subspan(from));
  return sum_add(sum, std::span(destination.b).subspan(from));
}

u16 transport_checksum(const Ip& source, const Ip& destination, u8 protocol, std::span<const u8> segment) {
  return static_cast<u16>(~sum_fold(sum_add(pseudo_sum(source, destination, protocol, segment.size()), segment)));
}

}  // namespace ring3::net
