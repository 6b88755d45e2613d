#include "control/cli/progress.hpp"

#include <unistd.h>

#include <utility>

#include "base/log.hpp"
#include "vmm/machine/threads.hpp"

namespace ring3::control {

BootProgress::BootProgress(vmm::Console& inner, int fd, bool same_terminal)
    : inner_(inner), fd_(fd), same_terminal_(same_terminal) {
  if (isatty(fd_) != 0) thread_ = vmm::start_thread("progress", [this] { run(); });
}

BootProgress::~BootProgress() { finish(); }

void BootProgress::finish() {
  {
    const std::lock_guard lock(mutex_);
    end_ = true;
    erase();
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
  if (watch_.joinable()) watch_.join();
}

void BootProgress::when_silent(std::chrono::milliseconds silence, std::function<std::string()> look) {
  watch_ = vmm::start_thread("silence", [this, silence, look = std::move(look)] { watch(silence, look); });
}

void BootProgress::watch(std::chrono::milliseconds silence, const std::function<std::string()>& look) {
  std::unique_lock lock(mutex_);
  if (changed_.wait_for(lock, silence, [this] { return end_ || wrote_; })) return;
  lock.unlock();  // look() may wait for one who writes
  const std::string warning = look();
  lock.lock();
  if (end_ || wrote_ || warning.empty()) return;
  erase();
  log::warn("{}", warning);
}

void BootProgress::erase() {
  if (!shown_) return;
  shown_ = false;
  static constexpr char kErase[] = "\r\033[K";
  [[maybe_unused]] const ssize_t n = ::write(fd_, kErase, sizeof kErase - 1);
}

bool BootProgress::write(std::span<const u8> bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (!end_) {
      stage_.observe(bytes);
      if (!bytes.empty() && !std::exchange(wrote_, true)) changed_.notify_all();
      last_output_ = Clock::now();
      if (!bytes.empty()) at_line_start_ = bytes.back() == '\n' || bytes.back() == '\r';
      if (same_terminal_) erase();
    }
  }
  return inner_.write(bytes);
}

void BootProgress::run() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, std::chrono::milliseconds(250), [this] { return end_; })) {
    const auto now = Clock::now();
    if (stage_.stage() == vms::BootStage::Stage::kLogin) {
      erase();
      return;
    }
    // A guest that writes to this terminal says itself how far it is; a line that it has not ended is not broken into.
    if (same_terminal_ && (now - last_output_ < kQuiet || !at_line_start_)) continue;
    if (now - began_ < kQuiet) continue;
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now - began_).count();
    const std::string line = std::string("\r\033[Kring3: ") + vms::BootStage::describe(stage_.stage()) + " (" +
                             std::to_string(seconds) + " s)";
    shown_ = true;
    [[maybe_unused]] const ssize_t n = ::write(fd_, line.data(), line.size());
  }
}

}  // namespace ring3::control
