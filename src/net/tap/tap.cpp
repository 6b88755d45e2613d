#include "net/tap/tap.hpp"

#include <fcntl.h>
#include <net/if.h>
#include <linux/if_tun.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <algorithm>
#include <cstring>

namespace ring3::net {

namespace {

ifreq request(const std::string& name, int flags) {
  ifreq r{};
  std::memcpy(r.ifr_name, name.data(), std::min<std::size_t>(name.size(), IFNAMSIZ - 1));
  r.ifr_flags = static_cast<short>(flags);
  return r;
}

}  // namespace

Result<std::unique_ptr<TapLink>> TapLink::open(const std::string& name, u32 queues) {
  if (name.empty() || name.size() >= IFNAMSIZ || name.find('/') != std::string::npos) {
    return Error::of(EINVAL, "tap: '" + name + "' is no name of an interface (1 to 15 characters)");
  }
  if (queues == 0 || queues > 16) return Error::of(EINVAL, "a network has 1 to 16 queues");
  std::vector<UniqueFd> fds;
  for (u32 i = 0; i < queues; i++) {
    UniqueFd fd(::open("/dev/net/tun", O_RDWR | O_CLOEXEC | O_NONBLOCK));
    if (!fd) return Error::from_errno("tap: /dev/net/tun");
    ifreq r = request(name, IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (queues > 1 ? IFF_MULTI_QUEUE : 0));
    if (::ioctl(fd.get(), TUNSETIFF, &r) != 0) {
      const int error = errno;
      std::string hint;
      if (error == EPERM) hint = " (ask for one: sudo ip tuntap add dev " + name + " mode tap user $USER)";
      if (error == EBUSY) hint = " (another program has it)";
      if (error == EINVAL) hint = " (is it a tap interface, made with as many queues?)";
      return Error::of(error, "tap " + name + ": " + std::strerror(error) + hint);
    }
    const int size = static_cast<int>(kVnetHeader);
    if (::ioctl(fd.get(), TUNSETVNETHDRSZ, &size) != 0) return Error::from_errno("tap " + name + ": header size");
    fds.push_back(std::move(fd));
  }
  return std::unique_ptr<TapLink>(new TapLink(std::move(fds), name));
}

bool TapLink::send(u32 queue, std::span<const iovec> message) {
  for (;;) {
    if (::writev(fds_[queue].get(), message.data(), static_cast<int>(message.size())) >= 0) return true;
    if (errno == EINTR) continue;
    // EIO: the interface is down, as a cable that is not plugged in.
    return errno == EIO || errno == EINVAL || errno == EMSGSIZE || errno == EFAULT || errno == ENOMEM;
  }
}

ssize_t TapLink::receive(u32 queue, std::span<iovec> message) {
  for (;;) {
    const ssize_t n = ::readv(fds_[queue].get(), message.data(), static_cast<int>(message.size()));
    if (n < 0 && errno == EINTR) continue;
    return n;
  }
}

Status TapLink::set_offloads(const Offloads& o) {
  unsigned bits = 0;
  if (o.checksum) bits |= TUN_F_CSUM;
  if (o.tcp4) bits |= TUN_F_TSO4;
  if (o.tcp6) bits |= TUN_F_TSO6;
  if (o.ecn) bits |= TUN_F_TSO_ECN;
  if (::ioctl(fds_[0].get(), TUNSETOFFLOAD, bits) != 0) return Error::from_errno("tap " + name_ + ": offloads");
  return Ok{};
}

Status TapLink::set_active_queues(u32 count) {
  if (queues() == 1) return Ok{};
  for (u32 i = 0; i < queues(); i++) {
    const bool wanted = i < count;
    if (attached_[i] == wanted) continue;
    ifreq r{};
    r.ifr_flags = static_cast<short>(wanted ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE);
    if (::ioctl(fds_[i].get(), TUNSETQUEUE, &r) != 0) return Error::from_errno("tap " + name_ + ": queue " + std::to_string(i));
    attached_[i] = wanted;
  }
  return Ok{};
}

}  // namespace ring3::net
