#include "engine/codecache/code_arena.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/unique_fd.hpp"

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

namespace ring3::engine {

Result<std::unique_ptr<CodeArena>> CodeArena::create(std::size_t size) {
  size = (size + kPageSize - 1) & kPageMask;
  // Kernels from 6.3 want to be told that the file may be mapped executable; older ones refuse the flag.
  UniqueFd fd(::memfd_create("ring3-code", MFD_CLOEXEC | MFD_EXEC));
  if (!fd && errno == EINVAL) fd.reset(::memfd_create("ring3-code", MFD_CLOEXEC));
  if (!fd) return Error::from_errno("cannot create memory for generated code");
  if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0)
    return Error::from_errno("cannot size memory for generated code");
  auto writable = Mapping::shared_fd(fd.get(), size, PROT_READ | PROT_WRITE);
  if (!writable) return writable.error();
  auto executable = Mapping::shared_fd(fd.get(), size, PROT_READ | PROT_EXEC);
  if (!executable) return executable.error();
  return std::unique_ptr<CodeArena>(new CodeArena(std::move(*writable), std::move(*executable)));
}

const u8* CodeArena::append(std::span<const u8> code) {
  const std::size_t at = (used_ + 15) & ~std::size_t{15};
  if (at > writable_.size() || code.size() > writable_.size() - at) return nullptr;
  std::memset(writable_.data() + used_, 0xcc, at - used_);
  std::memcpy(writable_.data() + at, code.data(), code.size());
  used_ = at + code.size();
  return executable_.data() + at;
}

void CodeArena::patch(const u8* at, std::span<const u8> bytes) {
  if (at < begin()) return;
  const std::size_t offset = static_cast<std::size_t>(at - begin());
  if (offset > used_ || bytes.size() > used_ - offset) return;
  std::memcpy(writable_.data() + offset, bytes.data(), bytes.size());
}

void CodeArena::clear(std::size_t keep) {
  if (keep > used_) keep = used_;
  std::memset(writable_.data() + keep, 0xcc, used_ - keep);
  used_ = keep;
}

}  // namespace ring3::engine
