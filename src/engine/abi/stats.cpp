#include "base/linux_kvm.hpp"

#include "engine/abi/stats.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace ring3::engine::abi {
namespace {
constexpr u32 kNameSize = 48;
constexpr u32 kDescriptor = sizeof(kvm_stats_desc) + kNameSize;
}  // namespace

Stats::~Stats() {
  if (map_ != nullptr) ::munmap(map_, size_);
}

Status Stats::create(const char* id, std::span<const Entry> entries) {
  kvm_stats_header header{};
  header.name_size = kNameSize;
  header.num_desc = static_cast<u32>(entries.size());
  header.id_offset = sizeof header;
  header.desc_offset = header.id_offset + kNameSize;
  header.data_offset = (header.desc_offset + header.num_desc * kDescriptor + 7) & ~7u;
  size_ = header.data_offset + entries.size() * sizeof(u64);
  fd_.reset(::memfd_create("ring3-stats", MFD_CLOEXEC));
  if (!fd_) return Error::from_errno("memfd_create");
  if (::ftruncate(fd_.get(), static_cast<off_t>(size_)) < 0) return Error::from_errno("ftruncate");
  void* p = ::mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
  if (p == MAP_FAILED) return Error::from_errno("mmap");
  map_ = static_cast<u8*>(p);
  std::memcpy(map_, &header, sizeof header);
  std::snprintf(reinterpret_cast<char*>(map_ + header.id_offset), kNameSize, "%s", id);
  for (u32 i = 0; i < header.num_desc; i++) {
    kvm_stats_desc d{};
    const Kind kind = entries[i].kind;
    d.flags = (kind == Kind::Flag ? KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_BOOLEAN
               : kind == Kind::Instant ? KVM_STATS_TYPE_INSTANT | KVM_STATS_UNIT_NONE
               : kind == Kind::Nanoseconds ? KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_SECONDS
                                           : KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE) |
              KVM_STATS_BASE_POW10;
    if (kind == Kind::Nanoseconds) d.exponent = -9;
    d.size = 1;
    d.offset = i * static_cast<u32>(sizeof(u64));
    u8* at = map_ + header.desc_offset + i * kDescriptor;
    std::memcpy(at, &d, sizeof(kvm_stats_desc));
    std::snprintf(reinterpret_cast<char*>(at + sizeof(kvm_stats_desc)), kNameSize, "%s", entries[i].name);
  }
  data_ = reinterpret_cast<u64*>(map_ + header.data_offset);
  return Ok{};
}

int Stats::open() const {
  if (!fd_) return -ENOENT;
  char path[40];
  std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd_.get());
  int fd = ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) fd = ::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0);  // no /proc: the position is shared then
  return fd < 0 ? -errno : fd;
}

}  // namespace ring3::engine::abi
