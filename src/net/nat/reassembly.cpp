#include "net/nat/reassembly.hpp"

namespace ring3::net {

namespace {
constexpr std::size_t kMaxPending = 16;
constexpr std::size_t kMaxPieces = 128;
constexpr u64 kPatienceMs = 15'000;
constexpr u32 kMaxLength = 65535 - kIp6Header;
}  // namespace

bool Reassembly::add(const IpPacket& piece, u64 now_ms, IpPacket* out) {
  std::erase_if(pending_, [&](const Partial& p) { return now_ms - p.since > kPatienceMs; });
  const u32 begin = piece.fragment_offset;
  const u32 length = static_cast<u32>(piece.payload.size());
  if (length == 0 || begin + length > kMaxLength) return false;
  if (piece.more_fragments && length % 8 != 0) return false;
  auto found = std::find_if(pending_.begin(), pending_.end(), [&](const Partial& p) {
    return p.id == piece.fragment_id && p.source == piece.source && p.destination == piece.destination && p.protocol == piece.protocol;
  });
  if (found == pending_.end()) {
    if (pending_.size() >= kMaxPending) pending_.erase(pending_.begin());
    Partial p;
    p.source = piece.source;
    p.destination = piece.destination;
    p.id = piece.fragment_id;
    p.protocol = piece.protocol;
    p.since = now_ms;
    pending_.push_back(std::move(p));
    found = pending_.end() - 1;
  }
  Partial& p = *found;
  if (p.bad) return false;
  const u32 end = begin + length;
  for (const Range& r : p.ranges) {
    if (begin < r.end && r.begin < end) {
      // An exact copy is only a repetition.
      if (r.begin == begin && r.end == end && std::memcmp(p.bytes.data() + begin, piece.payload.data(), length) == 0) return false;
      p.bad = true;
    }
  }
  if (!piece.more_fragments) {
    if (p.total != 0 && p.total != end) p.bad = true;
    p.total = end;
  }
  for (const Range& r : p.ranges) if (p.total != 0 && r.end > p.total) p.bad = true;
  if (p.total != 0 && end > p.total) p.bad = true;
  if (p.ranges.size() >= kMaxPieces) p.bad = true;
  if (p.bad) {
    p.bytes = {};
    p.ranges = {};
    return false;
  }
  if (p.bytes.size() < end) p.bytes.resize(end);
  std::memcpy(p.bytes.data() + begin, piece.payload.data(), length);
  p.ranges.push_back({begin, end});
  u32 covered = 0;
  for (const Range& r : p.ranges) covered += r.end - r.begin;
  if (p.total == 0 || covered != p.total) return false;
  done_ = std::move(p.bytes);
  *out = piece;
  out->fragment = out->more_fragments = false;
  out->fragment_offset = 0;
  out->payload = done_;
  out->whole = {};  // there is no header that an error could quote
  pending_.erase(found);
  return true;
}

}  // namespace ring3::net
