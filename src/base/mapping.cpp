#include "base/mapping.hpp"

#include <sys/mman.h>

namespace ring3 {

Mapping& Mapping::operator=(Mapping&& o) noexcept {
  if (this != &o) {
    reset();
    data_ = std::exchange(o.data_, nullptr);
    size_ = std::exchange(o.size_, 0);
  }
  return *this;
}

Result<Mapping> Mapping::anonymous(std::size_t size) {
  void* p = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return Error::from_errno("cannot map " + std::to_string(size) + " bytes of memory");
  return Mapping(static_cast<u8*>(p), size);
}

Result<Mapping> Mapping::shared_anonymous(std::size_t size) {
  void* p = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return Error::from_errno("cannot map " + std::to_string(size) + " bytes of memory");
  return Mapping(static_cast<u8*>(p), size);
}

Result<Mapping> Mapping::shared_fd(int fd, std::size_t size, int prot, std::size_t offset) {
  void* p = ::mmap(nullptr, size, prot, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (p == MAP_FAILED) return Error::from_errno("cannot map " + std::to_string(size) + " bytes of a file");
  return Mapping(static_cast<u8*>(p), size);
}

void Mapping::reset() {
  if (data_) ::munmap(data_, size_);
  data_ = nullptr;
  size_ = 0;
}

}  // namespace ring3
