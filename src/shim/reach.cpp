#include "shim/reach.hpp"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include "shim/real.hpp"

namespace ring3::shim {
namespace {

constexpr char kDevice[] = "/dev/kvm";
constexpr size_t kDeviceLength = sizeof kDevice - 1;
constexpr off_t kMostBytes = 256 << 20;  // of a file that is searched

bool read_at(int fd, off_t at, void* to, size_t size) {
  return ::pread(fd, to, size, at) == static_cast<ssize_t>(size);
}

bool is_static(int fd) {
  Elf64_Ehdr h;
  if (!read_at(fd, 0, &h, sizeof h) || memcmp(h.e_ident, ELFMAG, SELFMAG) != 0) return false;
  if (h.e_ident[EI_CLASS] != ELFCLASS64 || h.e_machine != EM_X86_64 || h.e_phentsize < sizeof(Elf64_Phdr)) return false;
  for (unsigned i = 0; i < h.e_phnum && i < 512; i++) {
    Elf64_Phdr p;
    if (!read_at(fd, static_cast<off_t>(h.e_phoff) + static_cast<off_t>(i) * h.e_phentsize, &p, sizeof p)) return false;
    if (p.p_type == PT_INTERP) return false;
  }
  return true;
}

bool names_device(int fd) {
  char buffer[16384];
  size_t kept = 0;  // the end of what was read before, where the name may begin
  for (off_t at = 0; at < kMostBytes;) {
    const ssize_t n = ::pread(fd, buffer + kept, sizeof buffer - kept, at);
    if (n <= 0) return false;
    const size_t have = kept + static_cast<size_t>(n);
    if (memmem(buffer, have, kDevice, kDeviceLength) != nullptr) return true;
    at += n;
    kept = have < kDeviceLength - 1 ? have : kDeviceLength - 1;
    memmove(buffer, buffer + have - kept, kept);
  }
  return false;
}

void say(const char* text) {
  if (::write(STDERR_FILENO, text, strlen(text)) < 0) return;  // nobody listens
}

}  // namespace

void warn_if_out_of_reach(const char* path) {
  const int saved = errno;
  // Straight to the kernel: a first look-up of libc's open here would not be safe.
  const long fd = path == nullptr ? -1 : real::syscall(SYS_openat, AT_FDCWD, reinterpret_cast<long>(path),
                                                       O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0, 0, 0);
  if (fd >= 0) {
    if (is_static(static_cast<int>(fd)) && names_device(static_cast<int>(fd))) {
      say("ring3: ");
      say(path);
      say(" is linked statically and does not get ring3's KVM: a library can only be preloaded into a dynamically linked program\n");
    }
    real::syscall(SYS_close, fd, 0, 0, 0, 0, 0);
  }
  errno = saved;
}

}  // namespace ring3::shim
