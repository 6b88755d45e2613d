#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "vmm/machine/console.hpp"

namespace ring3::vms {

/// The console of a detached VM: a log that is bounded, and a UNIX socket at which people attach and leave.
///
/// To a client:   what the guest writes, from the line that is being written on.
/// From a client: frames of a kind (1 byte), a length (2 bytes, little-endian) and that many bytes.
///                kInput: keys. kSize: rows and columns, 2 bytes each. Anything else ends the connection.
/// Output:        write() never waits: a client that does not read is dropped when kMostBehind bytes wait for it.
/// Log:           console.log; when it is kLogBytes long it becomes console.log.1 and a new one is begun, so that a guest
///                cannot fill the file system.
/// Threading:     as vmm::Console says, and a thread of its own for the socket.
/// Trust:         output is the guest's; clients are this user's processes (the directory is 0700), but their frames are checked.
class SharedConsole final : public vmm::Console {
 public:
  static constexpr std::size_t kMostBehind = 1 << 20;
  static constexpr std::size_t kMostInput = 64 * 1024;
  static constexpr std::size_t kMostClients = 8;
  static constexpr u64 kLogBytes = 4 << 20;
  static constexpr u8 kInput = 0, kSize = 1;

  using OnSize = std::function<void(u16 rows, u16 columns)>;

  enum class Serving { kOwnThread, kByCaller };
  /// In that directory, whose descriptor must outlive the console. kByCaller: without a thread, for tests: serve_once() does its work.
  static Result<std::unique_ptr<SharedConsole>> create(int directory_fd, OnSize on_size, Serving serving = Serving::kOwnThread);
  ~SharedConsole() override;

  bool write(std::span<const u8> bytes) override;
  int input_fd() const override { return ready_fd_.get(); }
  vmm::ConsoleInput read(std::span<u8> into) override;
  void cancel() override {}
  /// Waits for something to do with the socket and does it. How many descriptors were ready; negative: it is over.
  int serve_once(int timeout_ms);

 private:
  struct Client {
    UniqueFd fd;
    std::vector<u8> out;   ///< waits to be sent
    std::size_t sent = 0;  ///< of it
    std::vector<u8> in;    ///< a frame that is not complete yet
    bool gone = false;
  };

  explicit SharedConsole(int directory_fd) : directory_fd_(directory_fd) {}
  Status start(Serving serving);
  void log(std::span<const u8> bytes);
  void serve();
  void accept_one();
  void receive(Client& client);
  bool take_frames(Client& client);
  static void flush(Client& client);

  int directory_fd_;
  OnSize on_size_;
  UniqueFd log_fd_;      ///< writer's thread only
  u64 log_bytes_ = 0;    ///< writer's thread only
  UniqueFd listen_fd_;
  UniqueFd ready_fd_;    ///< eventfd, readable while there is input
  UniqueFd wake_fd_;     ///< eventfd, for the socket's thread
  std::mutex mutex_;
  std::vector<std::unique_ptr<Client>> clients_;  ///< guarded by mutex_
  std::vector<u8> line_;                          ///< the output since the last line's end, bounded; guarded by mutex_
  std::vector<u8> input_;                         ///< guarded by mutex_
  bool end_ = false;                              ///< guarded by mutex_
  bool deaf_ = false;    ///< no descriptor was left for who comes; serve_once() only
  std::thread thread_;
};

}  // namespace ring3::vms
