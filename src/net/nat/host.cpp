#include "net/nat/host.hpp"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>

namespace ring3::net {

namespace {

UniqueFd connected(int type, int protocol, const Endpoint& to) {
  sockaddr_storage address;
  const socklen_t length = to_sockaddr(to, address);
  UniqueFd fd(::socket(address.ss_family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol));
  if (!fd) return fd;
  const int one = 1;
  if (type == SOCK_STREAM) {
    ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    ::setsockopt(fd.get(), SOL_SOCKET, SO_OOBINLINE, &one, sizeof one);
  }
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0 && errno != EINPROGRESS) {
    const int error = errno;
    fd.reset();
    errno = error;
  }
  return fd;
}

}  // namespace

UniqueFd RealHost::connect_stream(const Endpoint& to) { return connected(SOCK_STREAM, IPPROTO_TCP, to); }
UniqueFd RealHost::connect_datagram(const Endpoint& to) { return connected(SOCK_DGRAM, IPPROTO_UDP, to); }
UniqueFd RealHost::connect_ping(const Ip& to) {
  return connected(SOCK_DGRAM, to.is_v4() ? static_cast<int>(IPPROTO_ICMP) : static_cast<int>(IPPROTO_ICMPV6), {to, 0, 0});
}

}  // namespace ring3::net
