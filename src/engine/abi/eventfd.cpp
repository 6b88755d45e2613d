#include "engine/abi/eventfd.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "base/event_fd.hpp"
#include "base/signal_set.hpp"

namespace ring3::engine::abi {

i64 eventfd_identity(int fd) {
  if (fd < 0 || ::fcntl(fd, F_GETFD) < 0) return -EBADF;
  char path[48];
  std::snprintf(path, sizeof path, "/proc/self/fdinfo/%d", fd);
  const UniqueFd info(::open(path, O_RDONLY | O_CLOEXEC));
  char text[512];
  const ssize_t n = info ? ::read(info.get(), text, sizeof text - 1) : -1;
  if (n <= 0) return static_cast<i64>(1ull << 40) + fd;  // no /proc: the fd number has to do
  text[n] = 0;
  if (std::strstr(text, "eventfd-count:") == nullptr) return -EINVAL;
  const char* id = std::strstr(text, "eventfd-id:");
  if (id == nullptr) return static_cast<i64>(1ull << 40) + fd;
  return std::strtol(id + 11, nullptr, 10);
}

namespace {
UniqueFd duplicate(int fd) { return UniqueFd(::fcntl(fd, F_DUPFD_CLOEXEC, 0)); }
}  // namespace

// ---- ioeventfds ----

int IoEventfds::change(const kvm_ioeventfd& r) {
  const bool wildcard = !(r.flags & KVM_IOEVENTFD_FLAG_DATAMATCH);
  if (!(r.flags & KVM_IOEVENTFD_FLAG_DEASSIGN)) {  // who gives one back is only told whether it is there
    if (r.flags & ~(KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO)) return -EINVAL;
    if (r.len != 0 && r.len != 1 && r.len != 2 && r.len != 4 && r.len != 8) return -EINVAL;
    if (r.addr + r.len < r.addr) return -EINVAL;
    if (r.len == 0 && !wildcard) return -EINVAL;
  }
  const bool pio = r.flags & KVM_IOEVENTFD_FLAG_PIO;
  const i64 id = eventfd_identity(r.fd);
  if (id < 0) return static_cast<int>(id);
  const u64 datamatch = wildcard ? 0 : r.datamatch;

  std::lock_guard lock(mutex_);
  auto next = std::make_shared<List>(*list_);
  if (r.flags & KVM_IOEVENTFD_FLAG_DEASSIGN) {
    const auto it = std::find_if(next->begin(), next->end(), [&](const auto& e) {
      return e->id == static_cast<u64>(id) && e->address == r.addr && e->length == r.len && e->pio == pio &&
             e->wildcard == wildcard && e->datamatch == datamatch;
    });
    if (it == next->end()) return -ENOENT;
    next->erase(it);
  } else {
    for (const auto& e : *next) {
      if (e->pio == pio && e->address == r.addr &&
          (e->length == 0 || r.len == 0 ||
           (e->length == r.len && (e->wildcard || wildcard || e->datamatch == datamatch)))) {
        return -EEXIST;
      }
    }
    if (next->size() >= kMax) return -ENOSPC;
    auto e = std::make_shared<IoEventfd>();
    e->fd = duplicate(r.fd);
    if (!e->fd) return -errno;
    e->id = static_cast<u64>(id);
    e->address = r.addr;
    e->length = r.len;
    e->datamatch = datamatch;
    e->wildcard = wildcard;
    e->pio = pio;
    next->push_back(std::move(e));
  }
  list_ = std::move(next);
  generation_.fetch_add(1, std::memory_order_release);
  return 0;
}

void IoEventfds::View::refresh() {
  std::lock_guard lock(owner_.mutex_);
  list_ = owner_.list_;
  generation_ = owner_.generation_.load(std::memory_order_relaxed);
}

bool IoEventfds::View::signal_slow(bool pio, u64 address, unsigned size, const void* data) {
  u64 value = 0;
  std::memcpy(&value, data, std::min(size, 8u));
  for (const auto& e : *list_) {
    if (e->pio != pio || e->address != address) continue;
    if (e->length != 0 && e->length != size) continue;
    if (!e->wildcard) {
      const u64 mask = size >= 8 ? ~0ull : (1ull << (8 * size)) - 1;
      if ((e->datamatch & mask) != value) continue;
    }
    signal_event(e->fd.get());
    return true;
  }
  return false;
}

// ---- irqfds ----

Irqfds::~Irqfds() {
  if (thread_.joinable()) {
    stop_.signal();
    thread_.join();
  }
  for (auto& [key, irqfd] : irqfds_) {
    if (irqfd->notifier != 0) chip_.remove_ack_notifier(irqfd->notifier);
  }
}

namespace {
constexpr u64 kStopKey = 0, kProbeKey = ~0ull;  // of epoll's events; others are irqfds'

/// Reads an eventfd that may block, and that somebody else may read as well: looks before.
bool take_event(int fd) {
  u64 count = 0;
  pollfd ready{fd, POLLIN, 0};
  return ::poll(&ready, 1, 0) > 0 && ::read(fd, &count, sizeof count) == sizeof count;
}

constexpr u32 kIrqfdFlags = KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE;
}  // namespace

int Irqfds::without_irqchip(const kvm_irqfd& r) {
  if (r.flags & ~kIrqfdFlags) return -EINVAL;
  if (!(r.flags & KVM_IRQFD_FLAG_DEASSIGN)) return -EAGAIN;
  const i64 id = eventfd_identity(static_cast<int>(r.fd));
  return id < 0 ? static_cast<int>(id) : 0;
}

int Irqfds::change(const kvm_irqfd& r) {
  if (r.flags & ~kIrqfdFlags) return -EINVAL;
  return r.flags & KVM_IRQFD_FLAG_DEASSIGN ? deassign(r) : assign(r);
}

int Irqfds::start_locked() {
  if (thread_.joinable()) return 0;
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) return -errno;
  if (const int error = stop_.create(); error != 0) return error;
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kStopKey;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, stop_.fd(), &event) < 0) return -errno;
  const sigset_t theirs = signals_but_faults();  // an event channel's bits stand in guest memory
  sigset_t old;
  pthread_sigmask(SIG_SETMASK, &theirs, &old);
  thread_ = std::thread([this] { thread_main(); });
  pthread_sigmask(SIG_SETMASK, &old, nullptr);
  return 0;
}

// Whether the VMM's fd is still the file that epoll has by this number. Nothing is read from one that is not.
bool Irqfds::watched_locked(int fd) {
  epoll_event none{};
  none.data.u64 = kProbeKey;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &none) < 0) return errno == EEXIST;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
  return false;
}

// epoll lists what it has in /proc; where there is none, nothing is forgotten.
void Irqfds::forget_closed_locked() {
  char path[48];
  std::snprintf(path, sizeof path, "/proc/self/fdinfo/%d", epoll_.get());
  std::FILE* const info = std::fopen(path, "re");
  if (info == nullptr) return;
  std::set<u64> there;
  char line[256];
  while (std::fgets(line, sizeof line, info) != nullptr) {
    const char* const data = std::strstr(line, "data:");
    if (data != nullptr) there.insert(std::strtoull(data + 5, nullptr, 16));
  }
  std::fclose(info);
  for (auto it = irqfds_.begin(); it != irqfds_.end();) it = there.count(it->first) != 0 ? std::next(it) : erase_locked(it);
}

Irqfds::Map::iterator Irqfds::erase_locked(Map::iterator it) {
  const Irqfd& irqfd = *it->second;
  if (irqfd.notifier != 0) {
    chip_.remove_ack_notifier(irqfd.notifier);
    chip_.set_irq(kIrqSourceResample, irqfd.gsi, false);
  }
  return irqfds_.erase(it);
}

int Irqfds::assign(const kvm_irqfd& r) {
  const bool resample = r.flags & KVM_IRQFD_FLAG_RESAMPLE;
  const int fd = static_cast<int>(r.fd);
  if (resample && chip_.mode() != IrqChip::Mode::kFull) return -EINVAL;
  const i64 id = eventfd_identity(fd);
  if (id < 0) return static_cast<int>(id);
  auto irqfd = std::make_shared<Irqfd>();
  irqfd->fd = fd;
  irqfd->id = static_cast<u64>(id);
  irqfd->gsi = r.gsi;
  if (resample) {
    const i64 other = eventfd_identity(static_cast<int>(r.resamplefd));
    if (other < 0) return static_cast<int>(other);
    irqfd->resample = duplicate(static_cast<int>(r.resamplefd));
    if (!irqfd->resample) return -errno;
  }
  std::lock_guard lock(mutex_);
  if (const int error = start_locked(); error != 0) return error;
  const auto busy = [&] {  // an eventfd has one consumer
    return std::any_of(irqfds_.begin(), irqfds_.end(), [&](const auto& other) { return other.second->id == irqfd->id; });
  };
  if (busy()) {
    forget_closed_locked();  // numbers come again
    if (busy()) return -EBUSY;
  }
  if (resample) {
    Irqfd* raw = irqfd.get();  // the notifier is removed before the Irqfd goes away
    irqfd->notifier = chip_.add_ack_notifier(r.gsi, [this, raw] {
      chip_.set_irq(kIrqSourceResample, raw->gsi, false);
      signal_event(raw->resample.get());
    });
  }
  const u64 key = next_key_++;
  epoll_event event{};
  // By edges: one that cannot be read, because only another process has it still, says each write once.
  event.events = EPOLLIN | EPOLLET;
  event.data.u64 = key;
  int done = ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event);
  // One whose fd was another file's when it was deassigned is still there.
  if (done < 0 && errno == EEXIST) done = ::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event);
  if (done < 0) {
    const int error = errno;
    if (irqfd->notifier != 0) chip_.remove_ack_notifier(irqfd->notifier);
    return -error;
  }
  irqfds_.emplace(key, std::move(irqfd));
  return 0;
}

int Irqfds::deassign(const kvm_irqfd& r) {
  const int fd = static_cast<int>(r.fd);
  const i64 id = eventfd_identity(fd);
  if (id < 0) return static_cast<int>(id);
  std::lock_guard lock(mutex_);
  if (!irqfds_.empty()) serve_locked();  // written before
  for (auto it = irqfds_.begin(); it != irqfds_.end();) {
    const Irqfd& irqfd = *it->second;
    if (irqfd.id != static_cast<u64>(id) || irqfd.gsi != r.gsi) {
      ++it;
      continue;
    }
    if (irqfd.unread) {
      // Its count is of what was delivered by edges; one more edge is of a write in this moment.
      static_cast<void>(take_event(fd));
      serve_locked();
    } else if (take_event(fd)) {
      deliver_locked(irqfd);
    }
    if (watched_locked(irqfd.fd)) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, irqfd.fd, nullptr);
    it = erase_locked(it);
  }
  return 0;  // the kernel does not tell whether there was one
}

// Takes what was written, or what somebody else took meanwhile; false then. By a copy, so that it is the eventfd that is read.
bool Irqfds::consume_locked(Irqfd& irqfd) {
  const auto out_of_reach = [&] { return irqfd.unread = true; };
  if (!watched_locked(irqfd.fd)) return out_of_reach();
  const UniqueFd copy = duplicate(irqfd.fd);
  if (!copy || !watched_locked(irqfd.fd)) return out_of_reach();
  irqfd.unread = false;
  return take_event(copy.get());
}

void Irqfds::deliver_locked(const Irqfd& irqfd) {
  if (irqfd.resample) {
    chip_.set_irq(kIrqSourceResample, irqfd.gsi, true);
  } else {
    chip_.pulse(irqfd.gsi);
  }
}

bool Irqfds::serve_locked() {
  epoll_event events[32];
  bool go_on = true;
  for (;;) {
    const int n = ::epoll_wait(epoll_.get(), events, 32, 0);
    for (int i = 0; i < n; i++) {
      if (events[i].data.u64 == kStopKey) go_on = false;
      const auto it = irqfds_.find(events[i].data.u64);
      if (it != irqfds_.end() && consume_locked(*it->second)) deliver_locked(*it->second);
    }
    if (n < 32 || !go_on) return go_on;
  }
}

void Irqfds::thread_main() {
  pthread_setname_np(pthread_self(), "ring3-irqfd");
  for (;;) {
    // Waits without taking events: what epoll has given out is delivered when the lock is free again.
    pollfd ready{epoll_.get(), POLLIN, 0};
    if (::poll(&ready, 1, -1) < 0 && errno != EINTR) return;
    std::lock_guard lock(mutex_);
    if (!serve_locked()) return;
  }
}

}  // namespace ring3::engine::abi
