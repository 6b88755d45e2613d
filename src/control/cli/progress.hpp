#pragma once
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "control/vms/boot_stage.hpp"
#include "vmm/machine/console.hpp"

namespace ring3::control {

/// Tells somebody who waits at a terminal how far the guest has come, in one line that is written over and over and
/// disappears: until the guest is up, or writes something itself to the same terminal.
///
/// Silent:    when `fd` is no terminal; when the guest writes to the same terminal, as long as it does.
/// Threading: it is a console's decorator, see vmm::Console; a thread of its own writes the line.
class BootProgress final : public vmm::Console {
 public:
  /// `fd`: where the line goes. `same_terminal`: the console's output is seen there too.
  BootProgress(vmm::Console& inner, int fd, bool same_terminal);
  ~BootProgress() override;

  bool write(std::span<const u8> bytes) override;
  int input_fd() const override { return inner_.input_fd(); }
  vmm::ConsoleInput read(std::span<u8> into) override { return inner_.read(into); }
  void cancel() override { inner_.cancel(); }

  /// Asks `look` once, when the guest has written nothing for `silence` since the start, and logs the warning that it gives, if any.
  /// `look` is called on a thread of this object's, until finish().
  void when_silent(std::chrono::milliseconds silence, std::function<std::string()> look);
  /// No line any more, and no warning.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kQuiet = std::chrono::milliseconds(1500);
  void run();
  void watch(std::chrono::milliseconds silence, const std::function<std::string()>& look);
  void erase();

  vmm::Console& inner_;
  int fd_;
  bool same_terminal_;
  std::mutex mutex_;
  std::condition_variable changed_;
  vms::BootStage stage_;
  Clock::time_point began_ = Clock::now();
  Clock::time_point last_output_ = began_;
  bool at_line_start_ = true;  ///< of the guest's output
  bool shown_ = false;
  bool wrote_ = false;         ///< the guest wrote something
  bool end_ = false;
  std::thread thread_, watch_;
};

}  // namespace ring3::control
