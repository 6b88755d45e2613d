#include "storage/block/file.hpp"

#include <algorithm>
#include <cstring>

namespace ring3::storage {

std::vector<iovec> slice(std::span<const iovec> buffers, u64 offset, u64 length) {
  std::vector<iovec> out;
  for (const iovec& v : buffers) {
    if (length == 0) break;
    if (offset >= v.iov_len) {
      offset -= v.iov_len;
      continue;
    }
    const u64 n = std::min<u64>(v.iov_len - offset, length);
    out.push_back({static_cast<u8*>(v.iov_base) + offset, n});
    offset = 0;
    length -= n;
  }
  return out;
}

void fill_zero(std::span<const iovec> buffers) {
  for (const iovec& v : buffers) {
    if (v.iov_len != 0) std::memset(v.iov_base, 0, v.iov_len);
  }
}

void copy_to(std::span<const iovec> buffers, const u8* from) {
  for (const iovec& v : buffers) {
    if (v.iov_len == 0) continue;
    std::memcpy(v.iov_base, from, v.iov_len);
    from += v.iov_len;
  }
}

void copy_from(u8* to, std::span<const iovec> buffers) {
  for (const iovec& v : buffers) {
    if (v.iov_len == 0) continue;
    std::memcpy(to, v.iov_base, v.iov_len);
    to += v.iov_len;
  }
}

}  // namespace ring3::storage
