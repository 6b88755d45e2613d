#pragma once
#include "device_subjects.hpp"

namespace ring3::virtio::fuzz {

/// Sockets of the guest's before UNIX sockets of the host's. What the host's programs send arrives whole and in order, never more
/// than the guest has room for, and only on connections that both sides know of.
///
/// A program sends bytes that say which connection they are of (upper half) and count (lower half).
class Sockets final : public Subject {
 public:
  static constexpr u64 kCid = 5;
  explicit Sockets(Driver& driver) : Subject(driver) {
    static const bool once = [] {
      for (u32 port : {1u, 2u}) listeners().push_back(listener(path() + "_" + std::to_string(port)));
      return true;
    }();
    (void)once;
    if (!shared()) {
      auto made = Vsock::create(kCid, path());
      check(bool(made), "no vsock");
      shared() = std::move(*made);
    }
  }
  Device& device() override { return *shared(); }
  void started(u64) override { keys_.clear(), lost_ = false; }
  std::vector<u8> message(u16 queue, u8 kind, u8 a, u8 b) override {
    if (queue != 1) return {};
    std::vector<u8> m;
    append<u64>(m, kCid);
    append<u64>(m, 2);
    u32 guest = b & 7u, host = a & 3u;
    u32 taken = 0;
    if ((a & 0x80) != 0 && !keys_.empty()) {  // a connection that is there
      auto it = keys_.begin();
      std::advance(it, a % keys_.size());
      host = it->first.first, guest = it->first.second;
      taken = it->second.sent;
    }
    append<u32>(m, guest);
    append<u32>(m, host);
    append<u32>(m, 0);
    append<u16>(m, 1);
    append<u16>(m, kind % 9);
    append<u32>(m, kind >> 5 & 3u);
    append<u32>(m, 64u << (2 * (b >> 5)));
    append<u32>(m, (b & 0x10) != 0 ? taken - (a >> 4 & 7u) : taken);
    return m;
  }
  void sized(u16 queue, std::vector<u8>& m) override {
    if (queue != 1 || m.size() < 44) return;
    const u32 n = static_cast<u32>(m.size() - 44);
    std::memcpy(m.data() + 24, &n, sizeof n);
  }
  void added(u16 queue, const Request& r) override {
    if (queue != 1 || r.message.size() < 44) return;
    Flow& f = keys_[{load<u32>(r.message, 20), load<u32>(r.message, 16)}];
    f.most = std::max(f.most, load<u32>(r.message, 36));
    f.told.insert(load<u32>(r.message, 40));
  }
  void settled(std::span<const Done> done) override {
    if (driver_.unsure() || driver_.broken()) lost_ = true;
    for (const Done& d : done) {
      if (d.queue != 0) continue;
      if (d.request.room < 44) {
        check(d.written == 0, "a packet without its header");
        continue;
      }
      if (!lost_) packet(driver_.written(d.request, d.written));
    }
  }
  void host(Input& in) override {
    const u8 what = in.byte();
    const std::size_t i = what >> 3 & 7;
    if ((what & 7) <= 1) {
      if (programs_.size() < 8) join(in, (what & 7) == 0 ? "CONNECT " + std::to_string(what >> 3 & 7) + "\n" : "");
      return;
    }
    if (i >= programs_.size()) return;
    Program& p = programs_[i];
    switch (what & 7) {
      case 2: case 3: {
        u8 bytes[1024];
        const std::size_t n = std::min<std::size_t>(sizeof bytes, in.byte() * ((what & 0x40) != 0 ? 16u : 1u));
        for (std::size_t k = 0; k < n; k++) bytes[k] = static_cast<u8>(i << 4 | ((p.sent + k) & 15));
        if (!p.said) return;
        const ssize_t sent = ::send(p.fd.get(), bytes, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent > 0) p.sent += static_cast<std::size_t>(sent);
        break;
      }
      case 4: {
        u8 bytes[4096];
        while (::recv(p.fd.get(), bytes, sizeof bytes, MSG_DONTWAIT) > 0) {
        }
        break;
      }
      case 5: p.fd.reset(); break;
      case 6: ::shutdown(p.fd.get(), (what & 0x40) != 0 ? SHUT_RD : SHUT_WR); break;
      default:
        if (programs_.size() < 8) {
          UniqueFd fd(::accept4(listeners()[what >> 6 & 1].get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
          if (fd) programs_.push_back({std::move(fd), true, 0});
        }
        break;
    }
  }
  void finish() override {
    programs_.clear();
    for (const UniqueFd& l : listeners()) {
      while (UniqueFd(::accept4(l.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC))) {
      }
    }
    // Connections that nobody was there to accept would come to the next one.
    if (unheard_) shared().reset();
  }

 private:
  struct Program {
    UniqueFd fd;
    bool said = false;     // its line
    std::size_t sent = 0;
  };
  struct Flow {
    bool open = false;
    u32 sent = 0;          // to the guest, on this connection
    int of = -1;           // the program, by what it sent
    u32 most = 0;          // room that the guest has told of
    std::set<u32> told;    // of bytes that it took
  };

  static std::unique_ptr<Vsock>& shared() {
    static std::unique_ptr<Vsock> device;
    return device;
  }
  static std::vector<UniqueFd>& listeners() {
    static std::vector<UniqueFd> all;
    return all;
  }
  static const std::string& path() {
    static const std::string p = place() + "/vsock";
    return p;
  }
  static sockaddr_un address(const std::string& path) {
    sockaddr_un a{};
    a.sun_family = AF_UNIX;
    std::memcpy(a.sun_path, path.data(), path.size());
    return a;
  }
  static UniqueFd listener(const std::string& path) {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    const sockaddr_un a = address(path);
    check(::bind(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a) == 0 && ::listen(fd.get(), 16) == 0, "no listener");
    return fd;
  }
  void join(Input& in, std::string line) {
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
    static const sockaddr_un a = address(path());
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&a), sizeof a) != 0) return;
    unheard_ |= !driver_.running();
    if (line.empty()) {
      const u8 n = in.byte() % 48;
      for (u8 k = 0; k < n; k++) line += static_cast<char>(in.byte());
      std::replace(line.begin(), line.end(), '\n', 'n');
      if (n % 2 == 0) line += '\n';
    }
    (void)!::send(fd.get(), line.data(), line.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    programs_.push_back({std::move(fd), line.ends_with('\n'), 0});
  }
  void packet(const std::vector<u8>& p) {
    check(p.size() >= 44 && load<u64>(p, 0) == 2 && load<u64>(p, 8) == kCid, "a packet from or to nobody");
    check(load<u32>(p, 24) == p.size() - 44, "a packet whose length is another");
    const u16 op = load<u16>(p, 30);
    check(op >= 1 && op <= 6 && (op == 5) == (p.size() > 44), "a packet of no kind");
    check(op == 3 || load<u16>(p, 28) == 1, "a packet of another type");
    Flow& f = keys_[{load<u32>(p, 16), load<u32>(p, 20)}];
    if (op == 1 || op == 2) f.open = true, f.sent = 0, f.of = -1;
    else if (op == 3) f.open = false;
    else check(f.open, "a packet on no connection");
    if (op != 5) return;
    for (std::size_t i = 44; i < p.size(); i++) {
      if (f.of < 0) f.of = p[i] >> 4;
      check(p[i] >> 4 == f.of && (p[i] & 15u) == (f.sent & 15u), "bytes that the program did not send, or in another order");
      f.sent++;
    }
    // The last count that can be true, or nothing at all.
    const auto next = f.told.upper_bound(f.sent);
    const u32 taken = next == f.told.begin() ? 0 : *std::prev(next);
    check(f.sent - taken <= f.most, "more than the guest has room for");
  }

  std::vector<Program> programs_;
  std::map<std::pair<u32, u32>, Flow> keys_;  // host's and guest's port
  bool lost_ = false, unheard_ = false;
};

}  // namespace ring3::virtio::fuzz
