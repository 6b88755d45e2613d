#include "net/capture/pcap.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/log.hpp"

namespace ring3::net {

namespace {

constexpr u32 kSnap = 262144;
constexpr std::size_t kFlushAt = 64 * 1024;
constexpr u64 kFlushMs = 200;

void append32(std::string& out, u32 v) { out.append(reinterpret_cast<const char*>(&v), 4); }

}  // namespace

Result<std::unique_ptr<PcapWriter>> PcapWriter::create(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOCTTY, 0600));
  if (!fd) return Error::from_errno("cannot write the capture " + path);
  struct stat info {};
  if (::fstat(fd.get(), &info) == 0 && S_ISDIR(info.st_mode)) return Error::of(EISDIR, path + " is a directory");
  std::unique_ptr<PcapWriter> writer(new PcapWriter(std::move(fd), path));
  std::string& out = writer->pending_;
  append32(out, 0xa1b23c4d);
  append32(out, 2u | 4u << 16);  // version 2.4
  append32(out, 0);
  append32(out, 0);
  append32(out, kSnap);
  append32(out, 1);  // Ethernet
  writer->flush();
  if (writer->broken_) return Error::of(EIO, "cannot write the capture " + path);
  return writer;
}

PcapWriter::~PcapWriter() { flush(); }

void PcapWriter::write(std::span<const iovec> frame, std::size_t skip, std::size_t length) {
  if (length <= skip) return;
  const u32 size = static_cast<u32>(length - skip);
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  const std::lock_guard lock(mutex_);
  if (broken_) return;
  append32(pending_, static_cast<u32>(now.tv_sec));
  append32(pending_, static_cast<u32>(now.tv_nsec));
  append32(pending_, std::min(size, kSnap));
  append32(pending_, size);
  std::size_t left = std::min(size, kSnap);
  for (const iovec& piece : frame) {
    std::size_t n = piece.iov_len;
    const char* p = static_cast<const char*>(piece.iov_base);
    const std::size_t over = std::min(skip, n);
    skip -= over;
    n = std::min(n - over, left);
    pending_.append(p + over, n);
    left -= n;
    if (left == 0) break;
  }
  const u64 ms = static_cast<u64>(now.tv_sec) * 1000 + static_cast<u64>(now.tv_nsec) / 1'000'000;
  if (pending_.size() >= kFlushAt || ms - last_flush_ms_ >= kFlushMs) {
    last_flush_ms_ = ms;
    flush_locked();
  }
}

void PcapWriter::flush() {
  const std::lock_guard lock(mutex_);
  flush_locked();
}

void PcapWriter::flush_locked() {
  std::size_t done = 0;
  while (!broken_ && done < pending_.size()) {
    const ssize_t n = ::write(fd_.get(), pending_.data() + done, pending_.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      broken_ = true;
      log::warn("the capture {} ends here: {}", path_, std::strerror(errno));
      break;
    }
    done += static_cast<std::size_t>(n);
  }
  pending_.clear();
}

}  // namespace ring3::net
