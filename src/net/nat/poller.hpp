#pragma once
#include <sys/epoll.h>

#include <cstring>

#include "base/split_mix.hpp"
#include "base/unique_fd.hpp"
#include "base/types.hpp"

namespace ring3::net {

/// Who an event is for. The generation tells a slot's present owner from the one before it.
struct Token {
  enum Kind : u8 { kLink, kListener, kTcp, kUdp, kPing };
  Kind kind = kLink;
  u32 index = 0;
  u32 generation = 0;  ///< 24 bits

  u64 pack() const { return static_cast<u64>(kind) << 56 | static_cast<u64>(generation & 0xffffff) << 32 | index; }
  static Token unpack(u64 v) {
    return {static_cast<Kind>(v >> 56), static_cast<u32>(v), static_cast<u32>(v >> 32 & 0xffffff)};
  }
};

class Poller {
 public:
  Poller() : fd_(::epoll_create1(EPOLL_CLOEXEC)) {}
  int fd() const { return fd_.get(); }
  bool add(int fd, Token token, u32 events) { return control(EPOLL_CTL_ADD, fd, token, events); }
  bool modify(int fd, Token token, u32 events) { return control(EPOLL_CTL_MOD, fd, token, events); }
  void remove(int fd) { control(EPOLL_CTL_DEL, fd, {}, 0); }

 private:
  bool control(int what, int fd, Token token, u32 events) {
    epoll_event event;
    std::memset(&event, 0, sizeof event);
    event.events = events;
    event.data.u64 = token.pack();
    return ::epoll_ctl(fd_.get(), what, fd, &event) == 0;
  }
  UniqueFd fd_;
};

/// Seeded from the host: initial sequence numbers, and hashing that a guest cannot aim at.
using Random = SplitMix64;

}  // namespace ring3::net
