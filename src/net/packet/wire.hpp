#pragma once
#include <cstring>

#include "base/types.hpp"

/// Big-endian fields at any alignment, and the numbers of the protocols.
namespace ring3::net {

inline u16 get16(const u8* p) { return static_cast<u16>(p[0] << 8 | p[1]); }
inline u32 get32(const u8* p) { return static_cast<u32>(p[0]) << 24 | static_cast<u32>(p[1]) << 16 | static_cast<u32>(p[2]) << 8 | p[3]; }
inline void put16(u8* p, u32 v) {
  p[0] = static_cast<u8>(v >> 8);
  p[1] = static_cast<u8>(v);
}
inline void put32(u8* p, u32 v) {
  put16(p, v >> 16);
  put16(p + 2, v & 0xffff);
}

inline constexpr std::size_t kEthHeader = 14;
inline constexpr std::size_t kIp4Header = 20;
inline constexpr std::size_t kIp6Header = 40;
inline constexpr std::size_t kTcpHeader = 20;
inline constexpr std::size_t kUdpHeader = 8;

inline constexpr u16 kEtherIp4 = 0x0800;
inline constexpr u16 kEtherArp = 0x0806;
inline constexpr u16 kEtherIp6 = 0x86dd;

inline constexpr u8 kProtoHopByHop = 0;
inline constexpr u8 kProtoIcmp = 1;
inline constexpr u8 kProtoTcp = 6;
inline constexpr u8 kProtoUdp = 17;
inline constexpr u8 kProtoRouting = 43;
inline constexpr u8 kProtoFragment = 44;
inline constexpr u8 kProtoIcmp6 = 58;
inline constexpr u8 kProtoNoNext = 59;
inline constexpr u8 kProtoDestOptions = 60;

inline constexpr u8 kTcpFin = 1;
inline constexpr u8 kTcpSyn = 2;
inline constexpr u8 kTcpRst = 4;
inline constexpr u8 kTcpPsh = 8;
inline constexpr u8 kTcpAck = 16;

/// struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6): little-endian, 12 bytes, before every frame on a link.
struct VnetHeader {
  u8 flags = 0;
  u8 gso_type = 0;
  u16 hdr_len = 0;
  u16 gso_size = 0;
  u16 csum_start = 0;
  u16 csum_offset = 0;
  u16 num_buffers = 0;

  static constexpr u8 kNeedsCsum = 1;  ///< the checksum at csum_start + csum_offset is to be completed
  static constexpr u8 kDataValid = 2;  ///< the checksum was verified
  static constexpr u8 kGsoNone = 0;
  static constexpr u8 kGsoTcp4 = 1;
  static constexpr u8 kGsoTcp6 = 4;
  static constexpr u8 kGsoUdpL4 = 5;
  static constexpr u8 kGsoEcn = 0x80;
};
static_assert(sizeof(VnetHeader) == 12);
inline constexpr std::size_t kVnetHeader = sizeof(VnetHeader);

/// The largest message of a link: header, Ethernet, and an IP packet of 64 KiB.
inline constexpr std::size_t kMaxFrame = kEthHeader + 65535 + 4;
inline constexpr std::size_t kMaxMessage = kVnetHeader + kMaxFrame;

}  // namespace ring3::net
