#pragma once
#include "net/nat/tcp.hpp"

/// One connection; of tcp.cpp and tcp_output.cpp only.
namespace ring3::net {

inline constexpr std::size_t kReceiveWindow = std::size_t{1} << 20;  ///< what is promised to the guest at most
inline constexpr std::size_t kSendBuffer = std::size_t{1} << 20;     ///< what is kept for the guest at most
inline constexpr std::size_t kFirstBuffer = 64 << 10;
inline constexpr u8 kOurScale = 6;                                   ///< 65535 << 6 is more than the window
inline constexpr std::size_t kTurn = 512 << 10;                      ///< bytes one connection sends before the next one's turn
inline constexpr u32 kMaxRetries = 16;
inline constexpr u64 kFirstRetry = 1000;                             ///< ms
inline constexpr u64 kLongestRetry = 60'000;
inline constexpr u64 kTimeWaitMs = 1000;
inline constexpr u64 kIdleMs = 600'000;  ///< then the guest is asked whether it still knows the connection
inline constexpr u32 kIdleProbes = 5;

/// a comes before b.
inline bool before(u32 a, u32 b) { return static_cast<i32>(a - b) < 0; }

struct TcpTable::Conn {
  Conn(const FlowKey& k, u64* allocated) : key(k), for_guest(allocated), for_host(allocated) {}

  FlowKey key;
  UniqueFd fd;
  u32 index = 0, generation = 0;
  u32 queue = 0;
  State state = State::kConnecting;

  // Towards the guest. for_guest holds the bytes from snd_una on.
  ByteRing for_guest;
  u32 snd_una = 0, snd_nxt = 0, snd_max = 0;
  u32 snd_wnd = 0;
  u16 mss = 536;
  u8 snd_scale = 0;
  bool host_eof = false, fin_sent = false, fin_acked = false;
  bool in_recovery = false;
  u32 recover = 0;
  u32 duplicate_acks = 0;

  // From the guest. for_host holds what the host's socket did not take yet.
  ByteRing for_host;
  u32 rcv_nxt = 0;
  u32 rcv_adv = 0;  ///< the right edge promised
  u8 rcv_scale = 0;
  bool guest_fin = false, shut = false;

  bool readable = false, writable = false, hung_up = false;
  bool need_ack = false, queued = false;

  Timer timer_kind = Timer::kNone;
  u64 deadline = ~u64{0};
  u32 retries = 0;
};

}  // namespace ring3::net
