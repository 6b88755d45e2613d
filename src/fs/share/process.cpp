#include "fs/share/process.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <latch>
#include <mutex>
#include <thread>

#include "fs/fuse/server.hpp"
#include "fs/share/jail.hpp"
#include "fs/share/message.hpp"
#include "sandbox/jail.hpp"

namespace ring3::fs {
namespace {

constexpr unsigned kWorkers = 4;
constexpr std::size_t kArena = ShareProcess::kSlots * kSlotBytes;

std::span<u8> request_part(u8* arena, u32 slot) { return {arena + slot * kSlotBytes, Server::kMostMessage}; }
std::span<u8> reply_part(u8* arena, u32 slot) { return {arena + slot * kSlotBytes + kSlotPart, Server::kMostMessage}; }
// SAFETY: zeroed, page-aligned memory of the arena that nothing else uses; a NearChannel is plain words.
NearChannel& near_channel(u8* arena) { return *reinterpret_cast<NearChannel*>(arena + kArena); }
// SAFETY: the same, in the pages behind.
DeferredRing& deferred_ring(u8* arena) { return *reinterpret_cast<DeferredRing*>(arena + kArena + kPageSize); }

/// Takes what nobody waits for. One thread at a time; another one has nothing to wait for.
void serve_deferred(u8* arena, Server& server) {
  DeferredRing& ring = deferred_ring(arena);
  if (ring.written.load(std::memory_order_acquire) == ring.taken.load(std::memory_order_relaxed)) return;
  static std::mutex mutex;
  const std::unique_lock lock(mutex, std::try_to_lock);
  if (!lock.owns_lock()) return;
  u32 taken = ring.taken.load(std::memory_order_relaxed);
  const auto take = [&](u8* to, u32 size) {
    for (u32 i = 0; i < size; i++) to[i] = ring.bytes[(taken + i) % DeferredRing::kBytes];
    taken += size;
  };
  while (ring.written.load(std::memory_order_acquire) != taken) {
    u32 length = 0;
    std::array<u8, DeferredRing::kMostMessage> request;
    std::array<u8, 64> reply;
    take(reinterpret_cast<u8*>(&length), sizeof length);
    if (length > request.size()) _exit(0);
    take(request.data(), length);
    server.handle(std::span(request).first(length), reply);
    ring.taken.store(taken, std::memory_order_release);
  }
}

SlotAnswer serve_slot(const SlotRequest& message, u8* arena, Server& server) {
  serve_deferred(arena, server);
  const auto request = request_part(arena, message.slot);
  const auto reply = reply_part(arena, message.slot);
  return {message.slot, static_cast<u32>(server.handle(request.first(std::min<std::size_t>(message.length, request.size())),
                                                       reply.first(std::min<std::size_t>(message.room, reply.size()))))};
}

void send_answer(int socket, const SlotAnswer& answer) {
  while (send(socket, &answer, sizeof answer, MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) _exit(0);  // the VMM is gone
  }
}

/// One of the server's threads: a request at a time, until the other end is closed.
void work(int socket, u8* arena, Server& server) {
  for (;;) {
    SlotRequest message;
    const ssize_t got = recv(socket, &message, sizeof message, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got != static_cast<ssize_t>(sizeof message)) _exit(0);
    if (message.slot == kNoSlot) serve_deferred(arena, server);
    if (message.slot >= ShareProcess::kSlots) continue;
    send_answer(socket, serve_slot(message, arena, server));
  }
}

// No private futexes: the two sides are two processes.
void wait_while(std::atomic<u32>& word, u32 value, const timespec* most) { syscall(SYS_futex, &word, FUTEX_WAIT, value, most, nullptr, 0); }
void wake(std::atomic<u32>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

/// The process's first thread, which its number names: a request at a time that the VMM waits for.
[[noreturn]] void work_near(int socket, u8* arena, Server& server) {
  NearChannel& near = near_channel(arena);
  for (;;) {
    u32 state = near.state.load(std::memory_order_acquire);
    if (state != NearChannel::kAsked && state != NearChannel::kAwaited && state != NearChannel::kUnwatched) {
      wait_while(near.state, state, nullptr);
      continue;
    }
    if (near.request.slot >= ShareProcess::kSlots) _exit(0);
    const SlotAnswer answer = serve_slot(near.request, arena, server);
    near.answer.store(u64{answer.slot} << 32 | answer.length, std::memory_order_relaxed);
    // Mostly this thread has taken the CPU from the one that asks before that could go to sleep: then there is nobody to wake.
    state = NearChannel::kAsked;
    if (near.state.compare_exchange_strong(state, NearChannel::kAnswered, std::memory_order_acq_rel)) continue;
    if (state == NearChannel::kAwaited && near.state.compare_exchange_strong(state, NearChannel::kAnswered, std::memory_order_acq_rel)) {
      wake(near.state);
    } else {
      near.state.store(NearChannel::kSent, std::memory_order_release);
      send_answer(socket, answer);
    }
  }
}

/// Whether the thread (0: this one) runs on that CPU alone now.
bool stay_on(int cpu, pid_t thread) {
  if (cpu < 0 || cpu >= CPU_SETSIZE) return false;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(cpu), &set);
  return sched_setaffinity(thread, sizeof set, &set) == 0;
}

/// The child: tells how it went by one byte, or a message.
[[noreturn]] void serve(const ShareProcess::Config& config, UniqueFd root, UniqueFd socket, u8* arena) {
  const auto give_up = [&](const std::string& why) {
    [[maybe_unused]] const ssize_t n = send(socket.get(), why.data(), why.size(), MSG_NOSIGNAL);
    _exit(1);
  };
  rlimit files{};
  if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur != files.rlim_max) {
    files.rlim_cur = files.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &files) != 0) getrlimit(RLIMIT_NOFILE, &files);
  }
  umask(0);  // the guest has applied its own
  UniqueFd proc(open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!proc) give_up(Error::from_errno("/proc/self/fd").message);
  const bool privileged = geteuid() == 0;
  Server::Options options;
  options.read_only = config.read_only;
  options.privileged = privileged;
  options.own_id = config.own_id;
  options.cache_ms = config.cache_ms;
  // A descriptor for each inode that the guest knows, as far as they go: open files want some too.
  const u64 most = files.rlim_cur;
  options.most_nodes = static_cast<std::size_t>(most > 4 * Server::kMostOpen ? most - Server::kMostOpen - 64 : std::max<u64>(most / 2, 8));
  const int directory = root.get();
  UniqueFd for_jail(fcntl(directory, F_DUPFD_CLOEXEC, 3));
  auto server = Server::create(std::move(root), std::move(proc), options);
  if (!server) give_up(server.error().message);
  if (auto jailed = enter_share_jail(for_jail.get(), privileged); !jailed) give_up("jail: " + jailed.error().message);
  for_jail.reset();
  std::latch filtered(kWorkers + 1);
  std::mutex one_by_one;  // libseccomp has state of its own
  const auto start = [&] {
    const std::lock_guard lock(one_by_one);
    if (!filter_share_thread()) _exit(1);
    filtered.count_down();
  };
  for (unsigned i = 0; i < kWorkers; i++) {
    std::thread([&] {
      start();
      work(socket.get(), arena, **server);
    }).detach();
  }
  start();
  filtered.wait();
  if (send(socket.get(), "", 1, MSG_NOSIGNAL) != 1) _exit(1);
  work_near(socket.get(), arena, **server);
}

}  // namespace

NearChannel& ShareProcess::near() const { return near_channel(arena_.data()); }
DeferredRing& ShareProcess::deferred() const { return deferred_ring(arena_.data()); }

Result<std::unique_ptr<ShareProcess>> ShareProcess::start(const Config& config) {
  UniqueFd root(open(config.directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!root) return Error::from_errno("cannot share " + config.directory);
  auto arena = Mapping::shared_anonymous(kArena + kPageSize + sizeof(DeferredRing));
  if (!arena) return arena.error();
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return Error::from_errno("socketpair");
  UniqueFd ours(ends[0]), theirs(ends[1]);
  std::fflush(nullptr);
  const pid_t parent = getpid();
  const pid_t child = fork();
  if (child < 0) return Error::from_errno("cannot start the process for " + config.directory);
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    setsid();  // keys of the terminal are not meant for it
    for (int s = 1; s < 32; s++) ::signal(s, SIG_DFL);
    for (const int s : {SIGPIPE, SIGINT, SIGHUP, SIGTERM}) ::signal(s, SIG_IGN);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    prctl(PR_SET_NAME, "ring3 share", 0, 0, 0);
    ours.release();
    sandbox::close_all_but({root.get(), theirs.get()});
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (null >= 0) {
      dup2(null, STDIN_FILENO);
      dup2(null, STDOUT_FILENO);
      close(null);
    }
    serve(config, std::move(root), std::move(theirs), arena->data());
  }
  theirs.reset();
  std::unique_ptr<ShareProcess> process(new ShareProcess(std::move(*arena), std::move(ours), child));
  char word[512];
  ssize_t got;
  while ((got = recv(process->fd(), word, sizeof word, 0)) < 0 && errno == EINTR) {
  }
  if (got != 1) {
    return Error::of(EIO, "cannot share " + config.directory + ": " +
                              (got > 1 ? std::string(word, static_cast<std::size_t>(got)) : "its process ended"));
  }
  return process;
}

ShareProcess::~ShareProcess() {
  socket_.reset();
  // It ends by itself once it has served what it is at; one that does not is ended.
  for (int i = 0; i < 200; i++) {
    if (waitpid(pid_, nullptr, WNOHANG) != 0) return;
    const timespec pause{0, 5'000'000};
    nanosleep(&pause, nullptr);
  }
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::optional<u32> ShareProcess::acquire() {
  for (u32 i = 0; i < kSlots; i++) {
    if (slots_[i].state != State::kFree) continue;
    slots_[i].state = State::kHeld;
    return i;
  }
  return std::nullopt;
}

void ShareProcess::release(u32 slot) {
  if (slots_[slot].state == State::kHeld) slots_[slot].state = State::kFree;
}

std::span<u8> ShareProcess::request(u32 slot) const { return request_part(arena_.data(), slot); }
std::span<const u8> ShareProcess::reply(u32 slot) const { return reply_part(arena_.data(), slot); }

bool ShareProcess::submit(u32 slot, std::size_t length, std::size_t room) {
  const std::size_t most = Server::kMostMessage;
  slots_[slot].room = std::min(room, most);
  slots_[slot].state = State::kSubmitted;
  const SlotRequest message{slot, static_cast<u32>(std::min(length, most)), static_cast<u32>(slots_[slot].room)};
  while (send(socket_.get(), &message, sizeof message, MSG_NOSIGNAL) < 0) {
    if (errno == EINTR) continue;
    slots_[slot].state = State::kHeld;
    return false;
  }
  return true;
}

bool ShareProcess::submit_near(u32 slot, std::size_t length, std::size_t room) {
  if (near_slot_) return false;
  const std::size_t most = Server::kMostMessage;
  slots_[slot].room = std::min(room, most);
  slots_[slot].state = State::kSubmitted;
  near_slot_ = slot;
  // It sleeps, and will wake here. Where it may not run here, it is slower.
  if (const int cpu = sched_getcpu(); cpu != near_cpu_) stay_on(near_cpu_ = cpu, pid_);
  NearChannel& n = near();
  n.request = {slot, static_cast<u32>(std::min(length, most)), static_cast<u32>(slots_[slot].room)};
  n.state.store(NearChannel::kAsked, std::memory_order_release);
  wake(n.state);
  return true;
}

bool ShareProcess::await(std::chrono::nanoseconds most) {
  std::atomic<u32>& state = near().state;
  u32 asked = NearChannel::kAsked;
  if (!state.compare_exchange_strong(asked, NearChannel::kAwaited, std::memory_order_acq_rel)) return true;
  // This thread sleeps, and the other gets its CPU. It must wake there too, and not on one that is idle: that would cost as much again.
  cpu_set_t before;
  const bool held = sched_getaffinity(0, sizeof before, &before) == 0 && stay_on(sched_getcpu(), 0);
  const timespec time{0, static_cast<long>(std::min<std::chrono::nanoseconds>(most, std::chrono::milliseconds(100)).count())};
  wait_while(state, NearChannel::kAwaited, &time);
  if (held) sched_setaffinity(0, sizeof before, &before);
  asked = NearChannel::kAwaited;
  return !state.compare_exchange_strong(asked, NearChannel::kUnwatched, std::memory_order_acq_rel);
}

bool ShareProcess::defer(std::span<const u8> request) {
  DeferredRing& ring = deferred();
  const u32 used = deferred_written_ - ring.taken.load(std::memory_order_acquire);
  // A server that has been taken over may say anything; what is laid down stays within the ring.
  if (used > DeferredRing::kBytes || request.size() > DeferredRing::kMostMessage || DeferredRing::kBytes - used < request.size() + sizeof(u32)) return false;
  const auto put = [&](const u8* from, u32 size) {
    for (u32 i = 0; i < size; i++) ring.bytes[(deferred_written_ + i) % DeferredRing::kBytes] = from[i];
    deferred_written_ += size;
  };
  const u32 length = static_cast<u32>(request.size());
  put(reinterpret_cast<const u8*>(&length), sizeof length);
  put(request.data(), length);
  ring.written.store(deferred_written_, std::memory_order_release);
  return true;
}

void ShareProcess::flush_deferred() {
  if (deferred().taken.load(std::memory_order_acquire) == deferred_written_) return;
  const SlotRequest message{kNoSlot, 0, 0};
  // Gone, or so busy that the socket is full: then it comes by them with what it is asked.
  [[maybe_unused]] const ssize_t sent = send(socket_.get(), &message, sizeof message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

ShareProcess::Received ShareProcess::receive(Answer& answer) {
  for (;;) {
    SlotAnswer message;
    const ssize_t got = recv(socket_.get(), &message, sizeof message, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) return Received::kNone;
    if (got != static_cast<ssize_t>(sizeof message)) return Received::kGone;
    if (const auto received = finish(message.slot, message.length, answer); received != Received::kNone) return received;
  }
}

bool ShareProcess::expects_more() const {
  return std::any_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.state == State::kSubmitted || s.state == State::kAbandoned; });
}

ShareProcess::Received ShareProcess::receive_near(Answer& answer) {
  if (!near_slot_ || near().state.load(std::memory_order_acquire) != NearChannel::kAnswered) return Received::kNone;
  const u64 answered = near().answer.load(std::memory_order_relaxed);
  const u32 slot = static_cast<u32>(answered >> 32);
  return slot == *near_slot_ ? finish(slot, static_cast<u32>(answered), answer) : Received::kGone;
}

/// kNone: it was abandoned.
ShareProcess::Received ShareProcess::finish(u32 index, u32 length, Answer& answer) {
  if (index >= kSlots) return Received::kGone;  // a server that has been taken over
  if (near_slot_ == index) near_slot_.reset();
  Slot& slot = slots_[index];
  if (slot.state == State::kAbandoned) {
    slot.state = State::kFree;
    return Received::kNone;
  }
  if (slot.state != State::kSubmitted) return Received::kGone;
  slot.state = State::kHeld;
  answer = {index, std::min<std::size_t>(length, slot.room)};
  return Received::kAnswer;
}

void ShareProcess::abandon() {
  // What nobody waits for any more comes by the socket, or is there.
  u32 state = near().state.load(std::memory_order_acquire);
  while ((state == NearChannel::kAsked || state == NearChannel::kAwaited) &&
         !near().state.compare_exchange_weak(state, NearChannel::kUnwatched, std::memory_order_acq_rel)) {
  }
  if (near_slot_ && state == NearChannel::kAnswered) {
    slots_[*near_slot_].state = State::kHeld;
    near_slot_.reset();
  }
  for (Slot& slot : slots_) {
    if (slot.state == State::kSubmitted) slot.state = State::kAbandoned;
    if (slot.state == State::kHeld) slot.state = State::kFree;
  }
}

}  // namespace ring3::fs
