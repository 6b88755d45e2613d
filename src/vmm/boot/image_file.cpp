#include "vmm/boot/image_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace ring3::boot {

Result<ImageFile> ImageFile::open(const std::string& path, const std::string& what, u64 limit) {
  const std::string name = what + " " + path;
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return Error::from_errno(name);
  struct stat st {};
  if (fstat(fd.get(), &st) < 0) return Error::from_errno(name);
  if (S_ISDIR(st.st_mode)) return Error::of(EINVAL, name + " is a directory, not a file");
  if (!S_ISREG(st.st_mode)) return Error::of(EINVAL, name + " is not a regular file: copy it to one");
  if (st.st_size == 0) return Error::of(EINVAL, name + " is empty");
  const u64 size = static_cast<u64>(st.st_size);
  if (size > limit) {
    return Error::of(EINVAL, name + " is " + std::to_string(size >> 20) + " MiB, more than the VM's memory takes (" +
                                 std::to_string(limit >> 20) + " MiB): give it more with --memory");
  }
  return ImageFile(std::move(fd), size, path, what);
}

Status ImageFile::read(u64 at, std::span<u8> into) const {
  std::size_t done = 0;
  while (done < into.size()) {
    const ssize_t n = ::pread(fd_.get(), into.data() + done, into.size() - done, static_cast<off_t>(at + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Error::from_errno(what_ + " " + path_);
    if (n == 0) return Error::of(EIO, what_ + " " + path_ + " became shorter while it was read");
    done += static_cast<std::size_t>(n);
  }
  return Ok{};
}

}  // namespace ring3::boot
