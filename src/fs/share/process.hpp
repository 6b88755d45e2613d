#pragma once
#include <sys/types.h>

#include <array>
#include <chrono>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/mapping.hpp"
#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::fs {

struct DeferredRing;
struct NearChannel;

/// A directory of the host, served to a guest by a process of its own.
///
/// The process: forked, without guest memory, with no descriptor but the directory's and its end of a socket. Jailed:
///   no new privileges; Landlock confines it to the directory, where the host has it; when started by root its root is the
///   directory, in namespaces of its own, and of the capabilities only those for owners and permissions are left; a seccomp
///   filter of the calls a file server makes. It ends with this object, or with the VMM.
/// Messages: slots of shared memory, each with room for a request and its answer. The socket carries slot numbers and
///   lengths. This side looks at no byte of an answer: it is the guest's to read. A length that does not fit is cut.
/// Wake-ups: between CPUs one takes as long as serving some requests does. A request that somebody waits for goes to the near
///   thread, which runs on the CPU of the one who waits: two switches there, none elsewhere. What nobody waits for is laid
///   down, and served with the next request.
/// Threading: start() before other threads exist (it forks); the rest, but await(), on one thread at a time.
class ShareProcess {
 public:
  struct Config {
    std::string directory;
    bool read_only = false;
    std::optional<u32> own_id;  ///< see Server::Options
    u32 cache_ms = 1000;
  };
  static constexpr u32 kSlots = 16;

  /// Errors: the directory cannot be opened, the jail's parts that must not be missing are.
  static Result<std::unique_ptr<ShareProcess>> start(const Config& config);
  ~ShareProcess();
  ShareProcess(const ShareProcess&) = delete;
  ShareProcess& operator=(const ShareProcess&) = delete;

  /// A free slot, which submit() or release() takes back; nothing: all are busy.
  std::optional<u32> acquire();
  void release(u32 slot);
  std::span<u8> request(u32 slot) const;
  std::span<const u8> reply(u32 slot) const;
  /// Sends the first `length` bytes of the slot's request; the answer may be `room` bytes long. False: the process is gone.
  bool submit(u32 slot, std::size_t length, std::size_t room);
  /// The same to a thread of the server's that is made to run on this thread's CPU, to be followed by await(). False: that
  /// thread is busy, nothing was done.
  bool submit_near(u32 slot, std::size_t length, std::size_t room);
  /// Waits for the answer of submit_near(), about `most` at most. True: receive_near() has it. False: it comes as any other.
  /// Threading: at any time beside the other calls, once for each submit_near(), on its thread.
  bool await(std::chrono::nanoseconds most);

  /// Lays down a request whose answer the caller has given already (deferred.hpp). The server takes it before the next one, or at
  /// flush_deferred(). False: there is no room, or it is too long.
  bool defer(std::span<const u8> request);
  void flush_deferred();

  struct Answer {
    u32 slot = 0;
    std::size_t length = 0;
  };
  enum class Received { kAnswer, kNone, kGone };
  /// The next answer that is there. The slot is the caller's until release().
  Received receive(Answer& answer);
  /// What await() has seen come: once for each time that it was true, unless abandon() came between. Until then the near thread
  /// counts as busy: nobody else waits for it meanwhile.
  Received receive_near(Answer& answer);
  /// Whether answers are under way that come by fd().
  bool expects_more() const;
  /// Forgets what is under way: its answers are thrown away when they come.
  void abandon();

  /// Readable when receive() has something to say.
  int fd() const { return socket_.get(); }
  pid_t pid() const { return pid_; }

 private:
  enum class State : u8 { kFree, kHeld, kSubmitted, kAbandoned };
  struct Slot {
    State state = State::kFree;
    std::size_t room = 0;
  };
  ShareProcess(Mapping arena, UniqueFd socket, pid_t pid) : arena_(std::move(arena)), socket_(std::move(socket)), pid_(pid) {}

  NearChannel& near() const;
  DeferredRing& deferred() const;
  Received finish(u32 slot, u32 length, Answer& answer);

  Mapping arena_;
  UniqueFd socket_;
  pid_t pid_;
  std::array<Slot, kSlots> slots_{};
  std::optional<u32> near_slot_;  ///< what the near thread is at
  int near_cpu_ = -1;             ///< where it was told to run
  u32 deferred_written_ = 0;
};

}  // namespace ring3::fs
