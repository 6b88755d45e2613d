#include "engine/translate/perf_map.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace ring3::engine {

Result<std::unique_ptr<PerfMap>> PerfMap::create(const std::string& directory) {
  std::string path = directory + "/perf-" + std::to_string(::getpid()) + ".map";
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644);
  if (fd < 0) return Error::from_errno("cannot write " + path);
  std::FILE* file = ::fdopen(fd, "w");
  if (file == nullptr) {
    const Error error = Error::from_errno("fdopen");
    ::close(fd);
    return error;
  }
  return std::unique_ptr<PerfMap>(new PerfMap(file, std::move(path)));
}

PerfMap::~PerfMap() { std::fclose(file_); }

void PerfMap::add(const void* code, u64 size, u64 rip, bool user) {
  const std::lock_guard lock(mutex_);
  std::fprintf(file_, "%llx %llx guest_%s%llx\n", static_cast<unsigned long long>(reinterpret_cast<u64>(code)),
               static_cast<unsigned long long>(size), user ? "user_" : "", static_cast<unsigned long long>(rip));
}

}  // namespace ring3::engine
