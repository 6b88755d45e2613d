#include "base/unix_listener.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

namespace ring3 {
namespace {

UniqueFd make_socket() { return UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

}  // namespace

Result<UnixListener> UnixListener::create(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path || path.find('\0') != std::string::npos) {
    return Error::of(EINVAL, "the socket's path has to have 1 to " + std::to_string(sizeof address.sun_path - 1) + " characters");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  UniqueFd fd = make_socket();
  if (!fd) return Error::from_errno("cannot make a socket");
  ::fchmod(fd.get(), 0600);  // what bind() gives the file
  auto* where = reinterpret_cast<const sockaddr*>(&address);
  if (::bind(fd.get(), where, sizeof address) != 0) {
    if (errno != EADDRINUSE) return Error::from_errno(path);
    struct stat info {};
    const UniqueFd probe = make_socket();
    if (!probe) return Error::from_errno("cannot make a socket");
    const bool stale = ::lstat(path.c_str(), &info) == 0 && S_ISSOCK(info.st_mode) &&
                       ::connect(probe.get(), where, sizeof address) != 0 && errno == ECONNREFUSED;
    if (!stale) return Error::of(EADDRINUSE, path + " is in use; give another socket");
    ::unlink(path.c_str());
    if (::bind(fd.get(), where, sizeof address) != 0) return Error::from_errno(path);
  }
  if (::listen(fd.get(), 64) != 0) return Error::from_errno(path);
  std::error_code ignored;
  return UnixListener(std::move(fd), std::filesystem::absolute(path, ignored).string());
}

UnixListener::~UnixListener() {
  if (fd_ && !path_.empty()) ::unlink(path_.c_str());
}

}  // namespace ring3
