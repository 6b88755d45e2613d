#pragma once
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <fcntl.h>
#include <unistd.h>

#include <deque>
#include <filesystem>
#include <set>
#include <string>

#include "device_guest.hpp"
#include "devices/virtio/balloon/balloon_device.hpp"
#include "devices/virtio/blk/block_device.hpp"
#include "devices/virtio/console/console_device.hpp"
#include "devices/virtio/net/net.hpp"
#include "devices/virtio/rng/rng_device.hpp"
#include "devices/virtio/vsock/vsock.hpp"
#include "storage/block/host_file.hpp"
#include "storage/block/memory_file.hpp"
#include "storage/block/raw.hpp"
#include "storage/qcow2/qcow2_image.hpp"

/// The devices of device_fuzz.cpp: how each is made, which messages get past its first checks, what its host's side does, and
/// a model of what it is to answer.
namespace ring3::virtio::fuzz {

struct Done {
  u16 queue;
  Request request;
  u32 written;
};

template <class T>
T load(const std::vector<u8>& bytes, std::size_t at) {
  T v{};
  if (at + sizeof v <= bytes.size()) std::memcpy(&v, bytes.data() + at, sizeof v);
  return v;
}
template <class T>
void append(std::vector<u8>& bytes, T v) {
  const auto* p = reinterpret_cast<const u8*>(&v);
  bytes.insert(bytes.end(), p, p + sizeof v);
}

class Subject {
 public:
  explicit Subject(Driver& driver) : driver_(driver) {}
  virtual ~Subject() = default;
  virtual Device& device() = 0;
  /// DRIVER_OK comes next.
  virtual void started(u64 features) { (void)features; }
  /// The start of a message for the queue, of few bytes of the script.
  virtual std::vector<u8> message(u16 queue, u8 kind, u8 a, u8 b) { return (void)queue, (void)kind, (void)a, (void)b, std::vector<u8>(); }
  /// All of it is there: lengths in it can be made right.
  virtual void sized(u16 queue, std::vector<u8>& message) { (void)queue, (void)message; }
  virtual void added(u16 queue, const Request& r) { (void)queue, (void)r; }
  /// After each turn, with what was handed back.
  virtual void settled(std::span<const Done> done) { (void)done; }
  virtual void stopped() {}
  virtual void host(Input& in) { (void)in; }
  virtual void write_config(u64 offset, std::span<const u8> data) { device().write_config(offset, data); }
  virtual void finish() {}

 protected:
  Driver& driver_;
};

/// Where host-side files and sockets are made.
inline const std::string& place() {
  // Never destroyed: it is removed after everything else has ended.
  static const std::string& path = *new const std::string(std::string(access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp") + "/ring3-device-fuzz-" +
                                                          std::to_string(getpid()));
  static const bool made = [] {
    std::filesystem::create_directories(path);
    std::atexit([] {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    });
    return true;
  }();
  (void)made;
  return path;
}

// ---------------------------------------------------------------------------------------------------------- blk

/// A disk of 32 KiB beside a model of its content: what is answered with success was done, what is not was not.
class Block final : public Subject {
 public:
  static constexpr u64 kSize = 32 << 10, kMost = 512 << 10;
  Block(Driver& driver, u8 how) : Subject(driver) {
    static const std::vector<u8> content = [] {
      std::vector<u8> bytes(kSize);
      for (u64 i = 0; i < kSize; i++) bytes[i] = static_cast<u8>(i / 512 + i);
      return bytes;
    }();
    model_ = content;
    BlockDevice::Config c;
    const bool writable = (how & 4) == 0;
    if ((how & 3) == 1) {
      static const std::vector<u8> empty = [] {
        storage::MemoryFile file({}, kMost);
        storage::qcow2::CreateOptions o;
        o.size = kSize;
        o.cluster_bits = 9;
        check(bool(storage::qcow2::Qcow2Image::create(file, o)), "no qcow2 image");
        return file.bytes();
      }();
      auto file = std::make_unique<storage::MemoryFile>(empty, kMost);
      file_ = file.get();
      auto image = storage::qcow2::Qcow2Image::open(std::move(file), "fuzz", {writable, false});
      check(bool(image), "a new image cannot be opened");
      qcow2_ = image->get();
      c.image = std::move(*image);
      std::fill(model_.begin(), model_.end(), u8{0});
    } else if ((how & 3) == 2) {
      static const std::string path = place() + "/disk";
      const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
      check(fd >= 0 && pwrite(fd, model_.data(), kSize, 0) == static_cast<ssize_t>(kSize), "no file for a disk");
      close(fd);
      auto file = storage::HostFile::open(path, {.writable = writable});
      check(bool(file), "the disk's file cannot be opened");
      host_ = file->get();
      c.image = std::make_shared<storage::RawImage>(std::move(*file), kSize, writable);
    } else {
      auto file = std::make_unique<storage::MemoryFile>(model_, kMost);
      file_ = file.get();
      c.image = std::make_shared<storage::RawImage>(std::move(file), kSize, writable);
    }
    image_ = c.image;
    c.serial = "a-serial-number-of-24-by";
    c.read_only = (how & 12) != 0;
    read_only_ = c.read_only;
    c.io_uring = false;
    c.queues = (how & 16) != 0 ? 2 : 1;
    device_ = std::make_unique<BlockDevice>(std::move(c));
  }
  Device& device() override { return *device_; }
  std::vector<u8> message(u16, u8 kind, u8 a, u8 b) override {
    static constexpr u32 kTypes[] = {0, 1, 0, 1, 4, 8, 11, 13};
    std::vector<u8> m;
    const u32 type = kTypes[kind & 7];
    append<u32>(m, type);
    append<u32>(m, 0);
    append<u64>(m, a % 68);
    for (u32 i = 0; (type == 11 || type == 13) && i < 1 + (kind >> 3 & 3u); i++) {
      append<u64>(m, (a + 7 * i) % 66);
      append<u32>(m, b % 16);
      append<u32>(m, kind >> 5 & 1u);
    }
    return m;
  }
  void sized(u16, std::vector<u8>& m) override {
    if (load<u32>(m, 0) == 1 && m.size() > 16) m.resize(16 + (m.size() - 16 + 511) / 512 * 512, 0x77);
  }
  void settled(std::span<const Done> done) override {
    const bool two = std::any_of(done.begin(), done.end(), [&](const Done& d) { return d.queue != done[0].queue; });
    // What was done of it before it broke is not told.
    if (driver_.unsure() || driver_.broken() || two || faulty_) return look();
    for (const Done& d : done) answered(d.request);
  }
  void stopped() override { look(); }
  void host(Input& in) override {
    if (file_ != nullptr && in.byte() % 4 == 0) {
      const u8 every = in.byte();
      faulty_ = true;  // from now on: what failed has undefined content
      file_->fail_every(every % 16, (every & 16) != 0 ? ENOSPC : EIO);
    }
  }
  void finish() override {
    check(image_->size() == kSize, "the disk has another size");
    if (file_ != nullptr) file_->fail_every(0, 0);
    if (qcow2_ == nullptr && file_ != nullptr) check(file_->bytes().size() == kSize, "the image has another size");
    if (host_ != nullptr) check(host_->size() == static_cast<i64>(kSize), "the file has another size");
    if (!faulty_ && !driver_.unsure()) {
      std::vector<u8> now(kSize);
      check(image_->read(0, std::span(now)) == 0, "the disk cannot be read");
      check(now == model_, "the disk is not what was written to it");
    }
    if (qcow2_ != nullptr && qcow2_->writable()) {
      const bool closed = qcow2_->close() == 0;
      check(closed || faulty_, "the image cannot be closed");
      if (closed) {
        auto again = storage::qcow2::Qcow2Image::open(std::make_unique<storage::MemoryFile>(file_->bytes(), kMost), "fuzz", {false, true});
        check(bool(again), "the image cannot be opened again");
        auto report = (*again)->check(storage::qcow2::Repair::kNone);
        check(report && report->corruptions == 0, "the image is corrupt");
      }
    }
  }

 private:
  void look() {
    if (image_->read(0, std::span(model_)) < 0) check(faulty_, "the disk cannot be read");
  }
  void answered(const Request& r) {
    const auto& m = r.message;
    check(m.size() >= 16 && r.room >= 1, "a request without header or status was handed back");
    const std::vector<u8> got = driver_.written(r, r.room);
    const u8 status = got.back();
    const u64 sector = load<u64>(m, 8);
    const auto fits = [&](u64 first, u64 bytes) { return bytes % 512 == 0 && first <= kSize / 512 && bytes / 512 <= kSize / 512 - first; };
    switch (const u32 type = load<u32>(m, 0); type) {
      case 0: {
        const u64 n = r.room - 1;
        check(status == (fits(sector, n) ? 0 : 1), "a read was answered wrongly");
        if (status == 0) check(std::equal(got.begin(), got.end() - 1, model_.begin() + static_cast<i64>(sector * 512)), "a read gave other bytes");
        break;
      }
      case 1: {
        const bool fine = !read_only_ && fits(sector, m.size() - 16);
        check(status == (fine ? 0 : 1), "a write was answered wrongly");
        if (fine) std::copy(m.begin() + 16, m.end(), model_.begin() + static_cast<i64>(sector * 512));
        break;
      }
      case 4: check(status == 0, "a flush failed"); break;
      case 8: {
        char id[20];
        std::memcpy(id, "a-serial-number-of-24-by", sizeof id);
        check(status == 0 && std::memcmp(got.data(), id, std::min<u64>(sizeof id, r.room - 1)) == 0, "another serial number");
        break;
      }
      case 11: case 13: {
        const std::size_t ranges = (m.size() - 16) / 16;
        bool fine = !read_only_ && m.size() > 16 && m.size() % 16 == 0 && ranges <= BlockDevice::kMostRanges;
        for (std::size_t i = 0; fine && i < ranges; i++) {
          fine = fits(load<u64>(m, 16 + 16 * i), u64{load<u32>(m, 24 + 16 * i)} * 512) && (load<u32>(m, 28 + 16 * i) & (type == 13 ? ~1u : ~0u)) == 0;
        }
        check((status == 0) == fine, "zeroes or a discard were answered wrongly");
        for (std::size_t i = 0; fine && i < ranges; i++) {
          // What was discarded may read as before; of these images, which stand on nothing, it does not.
          const u64 from = load<u64>(m, 16 + 16 * i) * 512, n = u64{load<u32>(m, 24 + 16 * i)} * 512;
          std::fill_n(model_.begin() + static_cast<i64>(from), n, u8{0});
        }
        break;
      }
      default: check(status == 2, "an unknown request was answered"); break;
    }
  }

  std::unique_ptr<BlockDevice> device_;
  std::shared_ptr<storage::Image> image_;
  storage::MemoryFile* file_ = nullptr;
  storage::HostFile* host_ = nullptr;
  storage::qcow2::Qcow2Image* qcow2_ = nullptr;
  std::vector<u8> model_;
  bool read_only_ = false, faulty_ = false;
};

// ---------------------------------------------------------------------------------------------------------- net

/// A card before pairs of sockets. Frames arrive as they were sent, in order, or not at all.
class Network final : public Subject {
  class Pair final : public net::Link {
   public:
    Pair(Network& owner, std::vector<UniqueFd> fds) : Link(std::move(fds)), owner_(owner) {}
    bool send(u32 queue, std::span<const iovec> message) override {
      owner_.leaving(message);
      msghdr m{};
      m.msg_iov = const_cast<iovec*>(message.data());
      m.msg_iovlen = message.size();
      return ::sendmsg(fds_[queue].get(), &m, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 || errno == EMSGSIZE || errno == EINVAL;
    }
    ssize_t receive(u32 queue, std::span<iovec> message) override {
      msghdr m{};
      m.msg_iov = message.data();
      m.msg_iovlen = message.size();
      return ::recvmsg(fds_[queue].get(), &m, MSG_DONTWAIT);
    }
    Status set_offloads(const net::Offloads& o) override {
      const u64 f = owner_.features_;
      namespace n = net_feature;
      check((!o.checksum || (f & n::kGuestChecksum) != 0) && (!o.tcp4 || (f & n::kGuestTso4) != 0) && (!o.tcp6 || (f & n::kGuestTso6) != 0) &&
                (!o.ecn || (f & n::kGuestEcn) != 0) && !o.udp, "an offload that the driver does not know");
      return Ok{};
    }
    Status set_active_queues(u32 count) override {
      check(count >= 1 && count <= queues(), "more queues than there are");
      return Ok{};
    }
    bool takes_udp_segments() const override { return true; }

   private:
    Network& owner_;
  };

 public:
  Network(Driver& driver, u8 how) : Subject(driver) {
    std::vector<UniqueFd> ours;
    for (int i = 0; i < 1 + (how & 1); i++) {
      int ends[2];
      check(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0, "no sockets");
      const int small = 4608;
      if ((how & 2) != 0) setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &small, sizeof small);
      ours.emplace_back(ends[0]);
      peers_.emplace_back(ends[1]);
    }
    flows_.resize(peers_.size());
    Net::Config c;
    c.mac = net::Mac{{2, 0, 0, 0, 0, 1}};
    device_ = std::make_unique<Net>(std::make_shared<Pair>(*this, std::move(ours)), c);
  }
  Device& device() override { return *device_; }
  void started(u64 features) override {
    features_ = features;
    for (Flow& f : flows_) f.group.clear(), f.left = 0;
    lost_ = false;
    pairs_ = (features & net_feature::kMultiqueue) != 0 ? peers_.size() : 1;
  }
  std::vector<u8> message(u16 queue, u8 kind, u8 a, u8 b) override {
    if (queue == 2 * pairs_) {  // control
      static constexpr u8 kCommands[][2] = {{0, 0}, {1, 0}, {1, 1}, {4, 0}, {5, 0}, {0, 5}, {1, 2}, {6, 0}};
      std::vector<u8> m{kCommands[kind & 7][0], kCommands[kind & 7][1]};
      switch (kind & 7) {
        case 0: case 5: m.push_back(a); break;
        case 1:
          append<u32>(m, a & 3), m.resize(m.size() + 6 * (a & 3u));
          append<u32>(m, b), m.resize(m.size() + 6 * (b & 3u));
          break;
        case 2: m.insert(m.end(), {2, a, b, 0, 0, 1}); break;
        case 3: append<u16>(m, a & 3); break;
        case 4: append<u64>(m, (u64{a} << 7 | u64{b} << 1) & 0x393); break;
        default: break;
      }
      return m;
    }
    if (queue % 2 == 0) return {};
    net::VnetHeader h;
    static constexpr u8 kKinds[] = {0, 0, 1, 4, 5, 0x81, 3, 0x80};
    h.flags = kind >> 3 & 3;
    h.gso_type = kKinds[kind & 7];
    h.hdr_len = a;
    h.gso_size = b;
    h.csum_start = static_cast<u16>(a & 0x3f);
    h.csum_offset = static_cast<u16>(b & 0x1f);
    std::vector<u8> m;
    append(m, h);
    m.resize(m.size() + 14);
    return m;
  }
  void added(u16 queue, const Request& r) override {
    if (queue % 2 == 1 && queue < 2 * pairs_) flows_[queue / 2].out.push_back(r.message);
  }
  void settled(std::span<const Done> done) override {
    if (driver_.unsure() || driver_.broken()) lost_ = out_lost_ = true;
    for (const Done& d : done) {
      if (lost_ || d.queue % 2 != 0 || d.queue >= 2 * pairs_ || d.request.room == 0) continue;
      Flow& f = flows_[d.queue / 2];
      const std::vector<u8> part = driver_.written(d.request, d.written);
      if (f.left == 0) {
        if (part.size() < net::kVnetHeader) return void(lost_ = true);  // the count lies in two buffers
        f.left = load<u16>(part, 10);
        check(f.left >= 1, "a message in no buffer");
        check((features_ & net_feature::kMergeable) != 0 || f.left == 1, "a message in several buffers, which were not negotiated");
        f.group.clear();
      }
      f.group.insert(f.group.end(), part.begin(), part.end());
      if (--f.left == 0) arrived(f);
    }
  }
  void host(Input& in) override {
    const u8 what = in.byte();
    const std::size_t i = what >> 7 & 1u & (peers_.size() - 1);
    if (!peers_[i]) return;
    switch (what & 7) {
      case 0: case 1: case 2: case 3: {
        std::vector<u8> m;
        const u8 seed = in.byte();
        append<u64>(m, in.take(what & 8 ? 8 : 1));
        m.resize(12 + (what & 3) * 700u + seed * ((what & 0x40) != 0 ? 256u : 1u));
        for (std::size_t k = 12; k < m.size(); k++) m[k] = static_cast<u8>(seed + k + flows_[i].in.size());
        if (::send(peers_[i].get(), m.data(), m.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) flows_[i].in.push_back(std::move(m));
        break;
      }
      case 4: case 5: drain(i, 1 + (what >> 3 & 15)); break;
      case 6: drain(i, 1000); break;
      default:
        if ((what & 0x78) == 0) peers_[i].reset();
        break;
    }
  }
  void finish() override {
    for (std::size_t i = 0; i < peers_.size(); i++) drain(i, 10000);
  }

 private:
  struct Flow {
    std::deque<std::vector<u8>> in, out;  // on their way
    std::vector<u8> group;
    u16 left = 0;
  };
  /// A link that sends more than the card's MTU breaks its word: what the guest gets of that may be cut.
  static bool same(const std::vector<u8>& sent, const std::vector<u8>& got) {
    const bool cut = got.size() < sent.size() && sent.size() > net::kVnetHeader + net::kEthHeader + 1500;
    return (cut || got.size() == sent.size()) && got.size() >= net::kVnetHeader && std::equal(got.begin() + net::kVnetHeader, got.end(), sent.begin() + net::kVnetHeader);
  }
  static bool take(std::deque<std::vector<u8>>& on_way, const std::vector<u8>& message) {
    while (!on_way.empty()) {
      const bool it = same(on_way.front(), message);
      on_way.pop_front();
      if (it) return true;
    }
    return false;
  }
  void arrived(Flow& f) {
    check((features_ & net_feature::kGuestChecksum) != 0 || f.group[0] == 0, "flags that the driver did not ask for");
    check(take(f.in, f.group), "the guest got a frame that nobody sent");
  }
  /// What leaves the card has a header that a host may trust.
  void leaving(std::span<const iovec> message) {
    namespace n = net_feature;
    const u64 size = storage::total_length(message);
    check(size >= net::kVnetHeader + net::kEthHeader && size <= net::kMaxMessage && message[0].iov_len == net::kVnetHeader, "a message of a wrong size leaves the card");
    net::VnetHeader h;
    std::memcpy(&h, message[0].iov_base, sizeof h);
    check((h.flags & ~1) == 0 && h.num_buffers == 0, "flags that no driver may set");
    if (h.flags != 0) {
      check((features_ & n::kChecksum) != 0 && std::size_t{h.csum_start} + h.csum_offset + 2 <= size - net::kVnetHeader, "a checksum outside of the frame");
    }
    if (h.gso_type == 0) return;
    check(h.flags != 0 && h.gso_size != 0 && h.hdr_len <= size - net::kVnetHeader, "segments that cannot be");
    check((h.gso_type & 0x80) == 0 || (features_ & n::kHostEcn) != 0, "ECN, which was not negotiated");
    const u8 kind = h.gso_type & 0x7f;
    check((kind == 1 && (features_ & n::kHostTso4) != 0) || (kind == 4 && (features_ & n::kHostTso6) != 0) || (kind == 5 && (features_ & n::kHostUso) != 0),
          "segments that were not negotiated");
  }
  void drain(std::size_t i, int most) {
    static std::vector<u8> buffer(net::kMaxMessage + 1);
    for (int n = 0; peers_[i] && n < most; n++) {
      const ssize_t got = ::recv(peers_[i].get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
      if (got <= 0) return;
      const std::vector<u8> m(buffer.begin(), buffer.begin() + got);
      if (!out_lost_) check(take(flows_[i].out, m), "a frame left that the guest did not send");
    }
  }

  std::vector<UniqueFd> peers_;
  std::vector<Flow> flows_;
  std::unique_ptr<Net> device_;
  u64 features_ = 0;
  std::size_t pairs_ = 1;
  bool lost_ = false, out_lost_ = false;
};

// ------------------------------------------------------------------------------------------------------ console

class Console final : public Subject {
 public:
  static constexpr std::size_t kPorts = 3;
  explicit Console(Driver& driver) : Subject(driver) {
    ConsoleDevice::Config c;
    c.ports.resize(kPorts);
    c.columns = 80, c.rows = 25;
    c.ports[0].console = true;
    c.ports[0].output = [this](std::span<const u8> bytes) { out_[0].insert(out_[0].end(), bytes.begin(), bytes.end()); };
    c.ports[1].name = "org.ring3.fuzz";
    c.ports[1].try_output = [this](std::span<const u8> bytes) {
      const std::size_t n = std::min(bytes.size(), budget_);
      out_[1].insert(out_[1].end(), bytes.begin(), bytes.begin() + static_cast<i64>(n));
      budget_ -= n;
      return n;
    };
    c.ports[1].open = false;
    c.ports[2].name = "b";
    c.ports[2].output = [this](std::span<const u8> bytes) { out_[2].insert(out_[2].end(), bytes.begin(), bytes.end()); };
    for (std::size_t p = 0; p < kPorts; p++) c.ports[p].opened = [this, p](bool open) { open_[p] = open; };
    device_ = std::make_unique<ConsoleDevice>(std::move(c));
  }
  Device& device() override { return *device_; }
  void started(u64) override { lost_ = false; }
  std::vector<u8> message(u16 queue, u8 kind, u8 a, u8 b) override {
    if (queue != 3) return std::vector<u8>(kind, b);
    std::vector<u8> m;
    append<u32>(m, a & 3);
    append<u16>(m, kind & 7);
    append<u16>(m, b & 1);
    return m;
  }
  void added(u16 queue, const Request& r) override {
    if (const int p = port(queue, 1); p >= 0 && !r.bad) sent_[p].insert(sent_[p].end(), r.message.begin(), r.message.end());
  }
  void settled(std::span<const Done> done) override {
    if (driver_.unsure()) lost_ = true;
    if (driver_.unsure() || driver_.broken()) in_lost_ = true;
    for (std::size_t p = 0; p < kPorts && !lost_; p++) {
      check(out_[p].size() <= sent_[p].size() && std::equal(out_[p].begin(), out_[p].end(), sent_[p].begin()), "a port's output is not what the guest wrote");
    }
    for (const Done& d : done) {
      const std::vector<u8> bytes = driver_.written(d.request, d.written);
      if (const int p = port(d.queue, 0); p >= 0 && !in_lost_) {
        check(bytes.size() <= in_[p].size() && std::equal(bytes.begin(), bytes.end(), in_[p].begin()), "a port's input is not what the host typed");
        in_[p].erase(in_[p].begin(), in_[p].begin() + static_cast<i64>(bytes.size()));
      } else if (d.queue == 2 && !lost_ && d.written >= 8) {
        const u16 event = load<u16>(bytes, 4);
        check(load<u32>(bytes, 0) < kPorts && (event == 1 || (event >= 4 && event <= 7)), "a control message that cannot be");
      }
    }
  }
  void stopped() override {
    for (std::size_t p = 0; p < kPorts; p++) sent_[p] = out_[p];
    check(!open_[0] && !open_[1] && !open_[2], "a port is open in a guest that was reset");
  }
  void host(Input& in) override {
    const u8 what = in.byte();
    const std::size_t p = what >> 3 & 3;
    switch (what & 7) {
      case 0: case 1: case 2: {
        std::vector<u8> bytes(in.byte() * ((what & 0x40) != 0 ? 400u : 1u), static_cast<u8>(what));
        const std::size_t room = device_->room(p);
        device_->receive(p, bytes);
        if (p < kPorts) in_[p].insert(in_[p].end(), bytes.begin(), bytes.begin() + static_cast<i64>(std::min(room, bytes.size())));
        break;
      }
      case 3: device_->resize(static_cast<u16>(what), in.byte()); break;
      case 4: device_->set_open(p, (what & 0x40) != 0); break;
      case 5: device_->output_room(p); break;
      default:
        budget_ += in.byte() * 40u;
        device_->output_room(1);
        break;
    }
  }
  void write_config(u64 offset, std::span<const u8> data) override {
    const std::size_t before = out_[0].size();
    device_->write_config(offset, data);
    check(out_[0].size() <= before + 1, "an emergency of more than a byte");
    out_[0].resize(before);
  }

 private:
  static int port(u16 queue, u16 direction) {
    if (queue < 2) return queue == direction ? 0 : -1;
    return queue >= 4 && queue % 2 == direction ? queue / 2 - 1 : -1;
  }
  std::unique_ptr<ConsoleDevice> device_;
  std::vector<u8> out_[kPorts], sent_[kPorts], in_[kPorts];
  std::size_t budget_ = 64;
  bool open_[kPorts] = {};
  bool lost_ = false, in_lost_ = false;
};

// ------------------------------------------------------------------------------------------------- balloon, rng

/// Pages that it was not told of stay as they are: the driver looks after that.
class Balloon final : public Subject {
 public:
  explicit Balloon(Driver& driver) : Subject(driver) {}
  Device& device() override { return device_; }
  std::vector<u8> message(u16 queue, u8 kind, u8 a, u8 b) override {
    std::vector<u8> m;
    if (queue >= 2) {
      for (u8 i = 0; i < (kind & 15); i++) append<u16>(m, static_cast<u16>(a + i)), append<u64>(m, u64{b} << (4 * i));
      return m;
    }
    // The pages of RAM, those beside it, the read-only one; far ones.
    for (u8 i = 0; i < (kind & 7); i++) append<u32>(m, (kind & 8) != 0 ? 0x0e + (a + 3u * i) % 0x28 : (kind & 16) != 0 ? u32{b} << 24 | a : 0x12 + (a + i) % 6u);
    return m;
  }
  void added(u16 queue, const Request& r) override {
    if (queue != 0) return;
    for (std::size_t i = 0; i + 4 <= r.message.size(); i += 4) driver_.give_up(u64{load<u32>(r.message, i)} << kPageShift);
  }
  void host(Input& in) override {
    const u8 what = in.byte();
    if ((what & 1) != 0) device_.set_target(in.take(what >> 1 & 7) << 12);
    else device_.ask_for_stats();
    (void)device_.stats();
  }

 private:
  BalloonDevice device_;
};

class Random final : public Subject {
 public:
  explicit Random(Driver& driver) : Subject(driver) {}
  Device& device() override { return device_; }

 private:
  RngDevice device_;
};

}  // namespace ring3::virtio::fuzz
