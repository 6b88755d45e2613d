#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "vmm/machine/console.hpp"

namespace ring3::rootfs {

struct Request {
  std::string directory;             ///< the guest's root
  bool read_only = false;
  std::string kernel;
  std::vector<std::string> command;  ///< not empty
  bool terminal = false;             ///< the command gets the console, a terminal; else files
  std::vector<std::string_view> modules;  ///< drivers of devices that the guest has beside the shares
  bool user_network = false;         ///< its first card is on the user network
};

/// The host's side of a command in a guest: where it is told what to run, what it writes, and how it ended.
///
/// Files:     a directory of its own in TMPDIR, 0700, that the guest has as a second share; removed with this object.
/// Output:    not by the console, which is a slow terminal that mangles bytes: the command writes to files of the share, and
///            a thread here passes on what was written, standard output and standard error apart, and gives the space back.
/// Input:     a thread passes on standard input, when that is no terminal. It may go on waiting for input after the end of the
///            command, and is left behind then.
/// Signals:   a byte on a console that nobody looks at is the number of one for the command.
/// Trust:     the guest may write anything into those files: the status is parsed with limits, output is bytes.
class Session {
 public:
  static Result<std::unique_ptr<Session>> create(const Request& request);
  ~Session();

  const std::string& initramfs() const { return initramfs_; }
  const std::string& control() const { return control_; }
  /// Begins to pass on input and output; after all forks. `on_lost`: standard output is gone; why, in one line.
  /// With an empty reason: who reads it has enough (EPIPE).
  void start(std::function<void(const std::string&)> on_lost);
  /// Sends a signal to the command, by the console that signal_fd() is the input of. False: it does not run yet, as far as the
  /// guest says, or has not taken those before. Any thread.
  bool send(int signal);
  int signal_fd() const { return signals_[0].get(); }
  /// After the guest's end: the rest of the output, then the command's exit status, if it came so far.
  std::optional<int> finish();
  /// What the guest's init had to complain of; one line.
  std::string complaint() const;

 private:
  Session() = default;
  struct Stream {
    UniqueFd file;
    int to = -1;
    i64 done = 0;
    i64 given_back = 0;
  };
  void pass_output();
  bool pass(Stream& stream);

  std::string base_, control_, initramfs_;
  bool terminal_ = false;
  Stream streams_[2];
  std::function<void(const std::string&)> on_lost_;
  UniqueFd end_fd_;
  UniqueFd signals_[2];  ///< a pipe of numbers: its ends to read and to write
  std::thread output_;
};

/// Keeps the end of what a guest writes to a console that nobody looks at, for when it fails; its input are a session's signals.
class Tail final : public vmm::Console {
 public:
  static constexpr std::size_t kKept = 4096;
  /// Not owned.
  explicit Tail(int input_fd) : input_fd_(input_fd) {}
  bool write(std::span<const u8> bytes) override;
  int input_fd() const override { return input_fd_; }
  vmm::ConsoleInput read(std::span<u8> into) override;
  void cancel() override {}
  std::string text() const;

 private:
  int input_fd_;
  mutable std::mutex mutex_;
  std::string text_;
};

}  // namespace ring3::rootfs
