#include "engine/codecache/code_arena.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/unique_fd.hpp"

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif

namespace ring3::engine {
namespace {

constexpr std::size_t kChunk = 256 << 10;

}  // namespace

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
  if (at > cold_ || code.size() > cold_ - at) return nullptr;
  if (at + code.size() > present_) {
    const std::size_t to = std::min((at + code.size() + kChunk) & ~(kChunk - 1), writable_.size());
    populate(present_, to);
    present_ = to;
  }
  std::memset(writable_.data() + used_, 0xcc, at - used_);
  std::memcpy(writable_.data() + at, code.data(), code.size());
  used_ = at + code.size();
  return executable_.data() + at;
}

const u8* CodeArena::append_cold(std::span<const u8> code) {
  if (code.size() > cold_ - used_) return nullptr;
  cold_ -= code.size();
  if (cold_ < cold_present_) {
    const std::size_t from = cold_ & ~(kChunk - 1);
    populate(from, cold_present_);
    cold_present_ = from;
  }
  std::memcpy(writable_.data() + cold_, code.data(), code.size());
  return executable_.data() + cold_;
}

void CodeArena::populate(std::size_t from, std::size_t to) {
  // Not with every kernel, nor when memory is short: then each page comes when it is touched.
  (void)::madvise(writable_.data() + from, to - from, MADV_POPULATE_WRITE);
  (void)::madvise(executable_.data() + from, to - from, MADV_POPULATE_READ);
}

void CodeArena::patch(const u8* at, std::span<const u8> bytes) {
  if (at < begin() || at >= end()) return;
  const std::size_t offset = static_cast<std::size_t>(at - begin());
  const std::size_t limit = offset < used_ ? used_ : writable_.size();
  if ((offset >= used_ && offset < cold_) || bytes.size() > limit - offset) return;
  std::memcpy(writable_.data() + offset, bytes.data(), bytes.size());
}

void CodeArena::clear(std::size_t keep) {
  keep = std::min(keep, used_);
  std::memset(writable_.data() + keep, 0xcc, used_ - keep);
  std::memset(writable_.data() + cold_, 0xcc, writable_.size() - cold_);
  used_ = keep;
  cold_ = writable_.size();
}

}  // namespace ring3::engine
