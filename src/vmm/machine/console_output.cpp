#include "vmm/machine/console_output.hpp"

#include <pthread.h>

#include <chrono>

#include "vmm/machine/threads.hpp"

namespace ring3::vmm {
namespace {
constexpr std::size_t kBurst = 4096;
constexpr std::size_t kLimit = 64 * 1024;
constexpr auto kGather = std::chrono::milliseconds(3);
}  // namespace

ConsoleOutput::ConsoleOutput(Console& console) : console_(console) {
  buffer_.reserve(kBurst);
  thread_ = start_thread("console-out", [this] { run(); });
}

ConsoleOutput::~ConsoleOutput() {
  {
    std::lock_guard lock(mutex_);
    end_ = true;
  }
  changed_.notify_all();
  console_.cancel();
  thread_.join();
}

void ConsoleOutput::put(u8 byte) {
  std::unique_lock lock(mutex_);
  if (gone_) return;
  if (buffer_.size() >= kLimit) {
    room_.wait(lock, [&] { return buffer_.size() < kLimit || released_ || gone_; });
    if (buffer_.size() >= kLimit || gone_) return;
  }
  buffer_.push_back(byte);
  const std::size_t n = buffer_.size();
  lock.unlock();
  if (n == 1 || n == kBurst) changed_.notify_all();
}

void ConsoleOutput::release() {
  std::lock_guard lock(mutex_);
  released_ = true;
  room_.notify_all();
}

void ConsoleOutput::hold() {
  std::lock_guard lock(mutex_);
  released_ = false;
}

bool ConsoleOutput::drain(int milliseconds) {
  std::unique_lock lock(mutex_);
  return room_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                        [&] { return gone_ || (buffer_.empty() && !writing_); });
}

void ConsoleOutput::run() {
  std::vector<u8> burst;
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return !buffer_.empty() || end_; });
    if (buffer_.empty()) return;
    changed_.wait_for(lock, kGather, [&] { return buffer_.size() >= kBurst || end_; });
    burst.clear();
    burst.swap(buffer_);
    writing_ = true;
    room_.notify_all();
    lock.unlock();
    const bool there = console_.write(burst);
    lock.lock();
    writing_ = false;
    if (!there) {
      gone_ = true;
      buffer_.clear();
    }
    room_.notify_all();
    if (end_ && buffer_.empty()) return;
  }
}

}  // namespace ring3::vmm
