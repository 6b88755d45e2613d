#pragma once
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/result.hpp"
#include "base/unique_fd.hpp"
#include "control/cli/keys.hpp"
#include "vmm/machine/console.hpp"

namespace ring3::control {

/// The guest's serial console on descriptors of the host: the terminal, a pipe, a file, a pseudo-terminal.
///
/// Input:     a thread of its own reads ahead, at most kReadAhead bytes, and looks for Ctrl-A keys in them, so that
///            Ctrl-A x ends even a guest that reads nothing. When the guest does not keep up, nothing more
///            is read: a paste waits in the pipe or terminal, and no byte is lost.
/// Output:    write() blocks while the descriptor takes nothing, until cancel(). Output that cannot be written for good
///            (a closed pipe, a full disk) calls on_output_lost once.
/// Callbacks: on the reader's or the writer's thread; they must not destroy the console.
/// Threading: as vmm::Console says.
class StreamConsole final : public vmm::Console {
 public:
  static constexpr std::size_t kReadAhead = 64 * 1024;

  struct Callbacks {
    std::function<void()> on_stop;                          ///< Ctrl-A x
    std::function<void()> on_help;                          ///< Ctrl-A h
    std::function<void(const std::string&)> on_output_lost; ///< why, in one line
  };

  /// Standard input and output, with the Ctrl-A keys. Errors: standard output is closed.
  static Result<std::unique_ptr<StreamConsole>> standard_io(Callbacks callbacks);
  /// Output into a file, created or truncated; no input.
  static Result<std::unique_ptr<StreamConsole>> file(const std::string& path, Callbacks callbacks);
  /// A new pseudo-terminal; `path` receives its name. Output is dropped while nobody has it open.
  static Result<std::unique_ptr<StreamConsole>> pseudo_terminal(std::string& path, Callbacks callbacks);
  /// Swallows output, gives no input.
  static Result<std::unique_ptr<StreamConsole>> none();
  /// On given descriptors, not owned (-1: none), with or without the Ctrl-A keys.
  static Result<std::unique_ptr<StreamConsole>> on_fds(int in_fd, int out_fd, bool keys, Callbacks callbacks);

  ~StreamConsole() override;

  bool write(std::span<const u8> bytes) override;
  int input_fd() const override;
  vmm::ConsoleInput read(std::span<u8> into) override;
  void cancel() override;

 private:
  StreamConsole() = default;
  Status start(bool keys, Callbacks callbacks);
  void read_ahead();
  bool wait_for_room();
  bool wait_for_input();
  void deliver(std::span<const u8> bytes);
  void lose_output(int code);

  UniqueFd owned_in_;
  UniqueFd owned_out_;
  int in_ = -1;
  int out_ = -1;
  bool keys_ = false;
  bool hangup_is_idle_ = false;  ///< a pseudo-terminal whose other side may come and go
  std::string name_ = "the console";
  Callbacks callbacks_;

  UniqueFd ready_fd_;   ///< eventfd, readable while there is something to read()
  UniqueFd cancel_fd_;  ///< eventfd, readable once cancelled
  EscapeKeys escape_keys_;
  bool output_lost_ = false;  ///< writer's thread only

  std::mutex mutex_;
  std::condition_variable room_;
  std::vector<u8> pending_;  ///< guarded by mutex_
  std::size_t taken_ = 0;    ///< bytes of pending_ already read; guarded by mutex_
  bool closed_ = false;      ///< no more will come; guarded by mutex_
  bool stop_ = false;        ///< guarded by mutex_
  bool cancelled_ = false;   ///< guarded by mutex_
  std::thread reader_;
};

}  // namespace ring3::control
