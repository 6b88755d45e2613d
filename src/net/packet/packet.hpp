#pragma once
#include <optional>
#include <span>

#include "net/packet/address.hpp"
#include "net/packet/wire.hpp"

namespace ring3::net {

/// A received Ethernet frame with an IP packet in it, taken apart. Views into the frame's bytes.
struct IpPacket {
  Mac source_mac, destination_mac;
  Ip source, destination;
  u8 protocol = 0;  ///< of the transport, after IPv6's extension headers
  u8 ttl = 0;
  std::span<const u8> whole;    ///< the IP packet from its header, without the link's padding
  std::span<const u8> payload;  ///< the transport segment, or the fragment's piece of it

  bool fragment = false;
  bool more_fragments = false;
  u32 fragment_id = 0;
  u32 fragment_offset = 0;  ///< bytes
};

/// Why a packet went no further. Counted, and seen in tests.
enum class Drop : u8 {
  kNone,
  kTruncated,     ///< shorter than a header in it says
  kMalformed,     ///< a field that no sender may write
  kChecksum,
  kAddress,       ///< a source or destination that has no business on this link
  kOption,        ///< source routes, unknown extension headers
  kUnsupported,   ///< a protocol that is not carried
};
const char* to_string(Drop drop);

/// Takes a frame apart; `checked` says that the sender's device vouches for the transport checksum (it does not
/// cover IPv4's header checksum, which is always verified).
///
/// Spec: RFC 791, RFC 8200. IPv4 options are skipped but for source routes, which are refused, as are routing
/// headers with segments left. At most eight extension headers are followed. A mapped IPv4 address in an IPv6
/// packet is refused. Fragments are given as they are; one in a single piece ("atomic") is no fragment.
/// Trust: every byte is the guest's.
Drop parse_ip(std::span<const u8> frame, IpPacket& out);

struct TcpSegment {
  u16 source = 0, destination = 0;
  u32 seq = 0, ack = 0;
  u8 flags = 0;
  u16 window = 0;  ///< not scaled
  std::optional<u16> mss;
  std::optional<u8> window_scale;
  std::span<const u8> data;
};
/// RFC 9293. Options that do not parse end the options; a bad data offset fails.
Drop parse_tcp(std::span<const u8> segment, TcpSegment& out);

struct UdpDatagram {
  u16 source = 0, destination = 0;
  std::span<const u8> data;
};
/// RFC 768. The length field may leave padding behind, but not claim more than there is.
Drop parse_udp(std::span<const u8> segment, UdpDatagram& out);

/// Writes Ethernet and IP headers for a transport segment of `length` bytes; returns how many bytes they are
/// (34 or 54). `id` is IPv4's identification. With `fragment_flags` nonzero that is the IPv4 flags-and-offset field.
std::size_t put_headers(u8* out, const Mac& to, const Mac& from, const Ip& source, const Ip& destination, u8 protocol,
                        std::size_t length, u16 id = 0, u16 fragment_flags = 0x4000, u8 ttl = 64);

}  // namespace ring3::net
