#pragma once
#include <vector>

#include "net/packet/packet.hpp"

namespace ring3::net {

/// Puts the guest's IP fragments together.
///
/// Spec:   RFC 791, RFC 8200 4.5, RFC 5722: a datagram with pieces that overlap is dropped whole.
/// Bounds: 16 datagrams at a time, the oldest gives way; 64 KiB each; 15 s; pieces in any order, at most 128.
class Reassembly {
 public:
  /// Takes a fragment; true when `out` is now the whole packet, which lives until the next call.
  bool add(const IpPacket& piece, u64 now_ms, IpPacket* out);
  std::size_t pending() const { return pending_.size(); }

 private:
  struct Range {
    u32 begin, end;
  };
  struct Partial {
    Ip source, destination;
    u32 id = 0;
    u8 protocol = 0;
    u64 since = 0;
    bool bad = false;
    u32 total = 0;  ///< 0: the last piece is not there yet
    std::vector<Range> ranges;
    std::vector<u8> bytes;
  };
  std::vector<Partial> pending_;
  std::vector<u8> done_;
};

}  // namespace ring3::net
