#include "net/nat/process.hpp"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>

#include "base/log.hpp"
#include "net/nat/stack.hpp"
#include "sandbox/jail.hpp"

namespace ring3::net {

namespace {

constexpr int kLinkBuffer = 4 << 20;  ///< asked for; the host gives what net.core.wmem_max allows
constexpr unsigned kBatch = 32;
constexpr int kRounds = 4;            ///< batches of one queue before the others' turn

u64 now_ms() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<u64>(t.tv_sec) * 1000 + static_cast<u64>(t.tv_nsec) / 1'000'000;
}

/// The child's first message on its first link: whether it is jailed and ready, or why not.
void tell_ready(int link, const std::string& error) {
  const std::string message = (error.empty() ? "+" : "-") + error;
  [[maybe_unused]] const ssize_t n = ::send(link, message.data(), message.size(), MSG_NOSIGNAL);
}

class LinkSink final : public FrameSink {
 public:
  explicit LinkSink(const std::vector<UniqueFd>& links) : links_(links) {}
  bool send(u32 queue, std::span<const iovec> message) override {
    if (queue >= links_.size()) queue = 0;
    msghdr m{};
    m.msg_iov = const_cast<iovec*>(message.data());
    m.msg_iovlen = message.size();
    for (;;) {
      if (::sendmsg(links_[queue].get(), &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return true;
      if (errno == EINTR) continue;
      return errno == EMSGSIZE;  // would never go
    }
  }

 private:
  const std::vector<UniqueFd>& links_;
};

sandbox::JailPolicy policy(u64 open_files) {
  sandbox::JailPolicy p;
  p.role = "network";
  p.open_files = open_files;
  for (const int nr : {SYS_read, SYS_write, SYS_recvfrom, SYS_recvmsg, SYS_recvmmsg, SYS_sendto, SYS_sendmsg, SYS_close, SYS_connect,
                       SYS_accept4, SYS_shutdown, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait, SYS_clock_gettime, SYS_brk,
                       SYS_munmap, SYS_mremap, SYS_madvise, SYS_exit_group, SYS_rt_sigreturn, SYS_restart_syscall}) {
    p.system_calls.push_back({nr, {}});
  }
  // Memory, but none that can be executed.
  p.system_calls.push_back({SYS_mmap, {{2, 4 /* PROT_EXEC */, 0}, {3, MAP_ANONYMOUS, MAP_ANONYMOUS}}});
  p.system_calls.push_back({SYS_mprotect, {{2, 4, 0}}});
  // IPv4 and IPv6 sockets for TCP, UDP and ping.
  const u64 kind = ~static_cast<u64>(SOCK_NONBLOCK | SOCK_CLOEXEC);
  for (const u64 family : {AF_INET, AF_INET6}) {
    p.system_calls.push_back({SYS_socket, {{0, ~u64{0}, family}, {1, kind, SOCK_STREAM}, {2, ~u64{0}, IPPROTO_TCP}}});
    p.system_calls.push_back({SYS_socket, {{0, ~u64{0}, family}, {1, kind, SOCK_DGRAM}, {2, ~u64{0}, IPPROTO_UDP}}});
  }
  p.system_calls.push_back({SYS_socket, {{0, ~u64{0}, AF_INET}, {1, kind, SOCK_DGRAM}, {2, ~u64{0}, IPPROTO_ICMP}}});
  p.system_calls.push_back({SYS_socket, {{0, ~u64{0}, AF_INET6}, {1, kind, SOCK_DGRAM}, {2, ~u64{0}, IPPROTO_ICMPV6}}});
  p.system_calls.push_back({SYS_getsockopt, {{1, ~u64{0}, SOL_SOCKET}, {2, ~u64{0}, SO_ERROR}}});
  p.system_calls.push_back({SYS_setsockopt, {{1, ~u64{0}, SOL_SOCKET}, {2, ~u64{0}, SO_LINGER}}});
  p.system_calls.push_back({SYS_setsockopt, {{1, ~u64{0}, SOL_SOCKET}, {2, ~u64{0}, SO_OOBINLINE}}});
  p.system_calls.push_back({SYS_setsockopt, {{1, ~u64{0}, IPPROTO_TCP}, {2, ~u64{0}, TCP_NODELAY}}});
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  // By a pipe a sanitizer's runtime looks whether memory is there.
  for (const int nr : {SYS_getpid, SYS_gettid, SYS_sigaltstack, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_futex, SYS_sched_yield,
                       SYS_pipe, SYS_pipe2, SYS_read, SYS_write, SYS_close}) {
    p.system_calls.push_back({nr, {}});
  }
#endif
  return p;
}

std::vector<Endpoint> host_resolvers() {
  std::ifstream file("/etc/resolv.conf");
  std::stringstream text;
  text << file.rdbuf();
  return parse_resolv_conf(text.str());
}

}  // namespace

Result<std::vector<Listener>> open_listeners(const std::vector<Forward>& forwards) {
  std::vector<Listener> listeners;
  for (const Forward& f : forwards) {
    sockaddr_storage address;
    const socklen_t length = to_sockaddr(f.host, address);
    UniqueFd fd(::socket(address.ss_family, (f.tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const std::string what = std::string("hostfwd: ") + (f.tcp ? "tcp " : "udp ") + to_string(f.host);
    if (!fd) return Error::from_errno(what);
    const int one = 1;
    if (f.tcp) ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (address.ss_family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &one, sizeof one);
    if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), length) != 0) return Error::from_errno(what);
    if (f.tcp) {
      ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);  // accepted sockets inherit it
      if (::listen(fd.get(), 1024) != 0) return Error::from_errno(what);
    }
    listeners.push_back({std::move(fd), f});
  }
  return listeners;
}

Result<std::unique_ptr<NatLink>> NatLink::start(NatConfig config, u32 queues) {
  if (queues == 0 || queues > 16) return Error::of(EINVAL, "a network has 1 to 16 queues");
  auto listeners = open_listeners(config.forwards);
  if (!listeners) return listeners.error();
  if (config.resolvers.empty()) config.resolvers = host_resolvers();

  std::vector<UniqueFd> ours, theirs;
  for (u32 i = 0; i < queues; i++) {
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair) != 0) return Error::from_errno("cannot make the network's link");
    for (const int fd : pair) {
      if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &kLinkBuffer, sizeof kLinkBuffer) != 0) {
        ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kLinkBuffer, sizeof kLinkBuffer);
      }
    }
    ours.emplace_back(pair[0]);
    theirs.emplace_back(pair[1]);
  }
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child < 0) return Error::from_errno("cannot start the network's process");
  if (child == 0) {
    ::setsid();  // keys of the terminal are not meant for it
    for (int s = 1; s < 32; s++) ::signal(s, SIG_DFL);
    ::signal(SIGPIPE, SIG_IGN);
    ::signal(SIGINT, SIG_IGN);
    ::signal(SIGHUP, SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
    ::prctl(PR_SET_NAME, "ring3 network", 0, 0, 0);
    std::vector<int> keep;
    for (const UniqueFd& fd : theirs) keep.push_back(fd.get());
    for (const Listener& l : *listeners) keep.push_back(l.fd.get());
    for (UniqueFd& fd : ours) fd.release();  // closed below with the rest
    sandbox::close_all_but(keep);
    const int null = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0) {  // standard error too: whoever reads it waits for its end, which is not to hang on this process
      for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(null, fd);
      if (null > STDERR_FILENO) ::close(null);
    }
    ::_exit(serve_nat(std::move(config), std::move(theirs), std::move(*listeners), true));
  }
  theirs.clear();
  std::unique_ptr<NatLink> link(new NatLink(std::move(ours), child));
  char ready[512];
  ssize_t n = 0;
  for (int i = 0; i < 3; i++) {
    pollfd p{link->fd(0), POLLIN, 0};
    if (::poll(&p, 1, 10'000) < 0 && errno == EINTR) continue;
    n = ::recv(link->fd(0), ready, sizeof ready, MSG_DONTWAIT);
    break;
  }
  if (n < 1) return Error::of(ECHILD, "the network's process did not start");
  if (ready[0] != '+') return Error::of(EPERM, "the network's process: " + std::string(ready + 1, static_cast<std::size_t>(n - 1)));
  return link;
}

NatLink::~NatLink() {
  fds_.clear();
  // It ends by itself; one that does not is ended.
  for (int i = 0; i < 100; i++) {
    if (::waitpid(process_, nullptr, WNOHANG) != 0) return;
    const timespec pause{0, 10'000'000};
    ::nanosleep(&pause, nullptr);
  }
  ::kill(process_, SIGKILL);
  ::waitpid(process_, nullptr, 0);
}

bool NatLink::send(u32 queue, std::span<const iovec> message) {
  msghdr m{};
  m.msg_iov = const_cast<iovec*>(message.data());
  m.msg_iovlen = message.size();
  for (;;) {
    if (::sendmsg(fds_[queue].get(), &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return true;
    if (errno == EINTR) continue;
    return errno == EMSGSIZE || errno == EINVAL || errno == EFAULT;
  }
}

ssize_t NatLink::receive(u32 queue, std::span<iovec> message) {
  msghdr m{};
  m.msg_iov = message.data();
  m.msg_iovlen = message.size();
  for (;;) {
    const ssize_t n = ::recvmsg(fds_[queue].get(), &m, MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == ECONNRESET) return 0;
    return n;
  }
}

Status NatLink::set_offloads(const Offloads& o) {
  const u8 bits = static_cast<u8>((o.checksum ? 1 : 0) | (o.tcp4 ? 2 : 0) | (o.tcp6 ? 4 : 0) | (o.udp ? 8 : 0));
  const u8 message[Stack::kControlSize] = {Stack::kControl, Stack::kSetOffloads, bits};
  // Full of frames is possible, but not for long: the other side reads all the time.
  for (int i = 0; i < 100; i++) {
    if (::send(fds_[0].get(), message, sizeof message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return Ok{};
    if (errno != EAGAIN && errno != EINTR) break;
    pollfd p{fds_[0].get(), POLLOUT, 0};
    ::poll(&p, 1, 10);
  }
  return Error::from_errno("the network's process does not answer");
}

int serve_nat(NatConfig config, std::vector<UniqueFd> links, std::vector<Listener> listeners, bool jailed) {
  rlimit files{};
  ::getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = std::min<rlim_t>(files.rlim_max, 16384);
  ::setrlimit(RLIMIT_NOFILE, &files);
  const u64 spare = links.size() + listeners.size() + config.max_ping + 32;
  const u64 for_flows = files.rlim_cur > spare + 64 ? files.rlim_cur - spare : 64;
  config.max_udp = static_cast<u32>(std::min<u64>(config.max_udp, for_flows / 4));
  config.max_tcp = static_cast<u32>(std::min<u64>(config.max_tcp, for_flows - config.max_udp));

  u64 seed = 0;
  if (::getrandom(&seed, sizeof seed, 0) != sizeof seed) return 1;
  RealHost host;
  LinkSink sink(links);
  Stack stack(std::move(config), sink, host, std::move(listeners), seed);
  const auto token = [](u32 i) { return Token{Token::kLink, i, 0}; };
  for (u32 i = 0; i < links.size(); i++) stack.poller().add(links[i].get(), token(i), EPOLLIN);
  std::vector<bool> waiting(links.size(), false);

  // A message each; all of them are touched only under load.
  std::vector<u8> buffers(kBatch * kMaxMessage);
  std::vector<iovec> pieces(kBatch);
  std::vector<mmsghdr> messages(kBatch);

  if (jailed) {
    auto report = sandbox::enter_jail(policy(files.rlim_cur));
    tell_ready(links[0].get(), report ? "" : report.error().message);
    if (!report) return 1;
  }

  for (;;) {
    const bool more = stack.run();
    for (u32 i = 0; i < links.size(); i++) {
      if (stack.link_blocked(i) != waiting[i]) {
        waiting[i] = !waiting[i];
        stack.poller().modify(links[i].get(), token(i), waiting[i] ? EPOLLIN | EPOLLOUT : EPOLLIN);
      }
    }
    epoll_event events[64];
    const int n = ::epoll_wait(stack.epoll_fd(), events, 64, more ? 0 : stack.timeout_ms());
    if (n < 0 && errno != EINTR) return 1;
    stack.set_now(now_ms());
    for (int e = 0; e < n; e++) {
      const Token t = Token::unpack(events[e].data.u64);
      if (t.kind != Token::kLink) {
        stack.host_event(t, events[e].events);
        continue;
      }
      if ((events[e].events & EPOLLOUT) != 0) stack.link_writable(t.index);
      if ((events[e].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) == 0) continue;
      for (int round = 0; round < kRounds; round++) {
        for (unsigned i = 0; i < kBatch; i++) {
          pieces[i] = {buffers.data() + i * kMaxMessage, kMaxMessage};
          messages[i] = {};
          messages[i].msg_hdr.msg_iov = &pieces[i];
          messages[i].msg_hdr.msg_iovlen = 1;
        }
        const int got = ::recvmmsg(links[t.index].get(), messages.data(), kBatch, MSG_DONTWAIT, nullptr);
        if (got < 0) {
          if (errno == EAGAIN || errno == EINTR) break;
          return 0;
        }
        for (int i = 0; i < got; i++) {
          const mmsghdr& m = messages[static_cast<unsigned>(i)];
          if (m.msg_len == 0) return 0;  // the VMM is gone
          if ((m.msg_hdr.msg_flags & MSG_TRUNC) != 0) continue;
          stack.receive(t.index, {buffers.data() + static_cast<unsigned>(i) * kMaxMessage, m.msg_len});
        }
        if (static_cast<unsigned>(got) < kBatch) break;
      }
    }
  }
}

}  // namespace ring3::net
