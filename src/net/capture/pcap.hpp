#pragma once
#include <sys/uio.h>

#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "base/result.hpp"
#include "base/types.hpp"
#include "base/unique_fd.hpp"

namespace ring3::net {

/// Writes frames to a capture file that Wireshark and tcpdump read.
///
/// Format:    pcap with nanoseconds (magic a1b23c4d), link type Ethernet, snapshot length 262144. Frames are as the
///            device saw them: large TCP segments whole, checksums that are still to be completed wrong.
/// Loss:      a frame that cannot be written (disk full) ends the capture, with one line in the log; the network goes on.
/// Threading: write() on any thread.
class PcapWriter {
 public:
  /// Truncates or makes the file, readable by the owner only.
  static Result<std::unique_ptr<PcapWriter>> create(const std::string& path);
  ~PcapWriter();

  /// `frame` begins with the Ethernet header, after skipping `skip` bytes.
  void write(std::span<const iovec> frame, std::size_t skip, std::size_t length);
  void flush();

 private:
  PcapWriter(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  void flush_locked();

  std::mutex mutex_;
  UniqueFd fd_;
  std::string path_;
  std::string pending_;
  u64 last_flush_ms_ = 0;
  bool broken_ = false;
};

}  // namespace ring3::net
