#pragma once
#include <span>

#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::vmm {

/// What a console's reader got.
struct ConsoleInput {
  std::size_t bytes = 0;  ///< for the guest, at the start of the buffer; 0 is allowed (keys of our own)
  bool closed = false;    ///< no more input will come: stop polling
  bool stop = false;      ///< the user asked to end the VM (Outcome::Kind::kStopped)
};

/// Where the guest's serial console goes on the host.
///
/// Threading: write() on one thread at a time (the machine's writer thread); input_fd() and read()
///            on the machine's I/O thread; cancel() on any thread.
/// Lifetime:  outlives the Machine.
class Console {
 public:
  virtual ~Console() = default;

  /// Bytes the guest wrote, in bursts. May block (a stopped terminal); the guest is then held back.
  /// Returns false when the output is gone for good: further output is dropped.
  virtual bool write(std::span<const u8> bytes) = 0;
  /// Readable when read() has something; -1 for a console without input.
  virtual int input_fd() const = 0;
  /// Called when input_fd() is readable and the guest's receive queue has room for into.size() bytes.
  /// Does not block. Keys such as Ctrl-A x are taken out here.
  virtual ConsoleInput read(std::span<u8> into) = 0;
  /// Makes a write() that blocks, and all later ones, return soon.
  virtual void cancel() = 0;
};

/// A console on plain file descriptors (not owned; -1: none). The end of input closes the input only.
/// A base class for the terminal's: override filter().
class FdConsole : public Console {
 public:
  FdConsole(int in_fd, int out_fd);
  bool write(std::span<const u8> bytes) override;
  int input_fd() const override { return in_fd_; }
  ConsoleInput read(std::span<u8> into) override;
  void cancel() override;

 protected:
  /// Takes keys of our own out of the `count` bytes just read, in place.
  virtual ConsoleInput filter(std::span<u8> buffer, std::size_t count);

 private:
  int in_fd_;
  int out_fd_;
  UniqueFd cancel_fd_;
};

}  // namespace ring3::vmm
