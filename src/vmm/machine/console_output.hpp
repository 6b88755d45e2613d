#pragma once
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "vmm/machine/console.hpp"

namespace ring3::vmm {

/// Gathers the bytes a guest writes one exit at a time and hands them to the console in bursts: at
/// most 3 ms after the first, or when 4 KiB are there.
///
/// Threading: put() on any vCPU thread; it waits while 64 KiB are unwritten, until release().
///            Everything else on the machine's own thread.
class ConsoleOutput {
 public:
  explicit ConsoleOutput(Console& console);
  ~ConsoleOutput();

  void put(u8 byte);
  /// put() no longer waits: what does not fit is dropped. hold() takes it back.
  void release();
  void hold();
  /// Whether all is written, after waiting for at most `milliseconds`.
  bool drain(int milliseconds);

 private:
  void run();

  Console& console_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable room_;
  std::vector<u8> buffer_;
  bool writing_ = false;
  bool released_ = false;
  bool gone_ = false;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace ring3::vmm
