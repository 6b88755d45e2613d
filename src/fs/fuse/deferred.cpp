#include "fs/fuse/deferred.hpp"

#include <fcntl.h>
#include <linux/fuse.h>

#include <cstring>

#include "fs/fuse/message.hpp"

namespace ring3::fs {

std::optional<std::size_t> deferred_answer(std::span<const u8> request, std::span<u8> reply) {
  fuse_in_header header;
  Arguments in(request);
  if (!in.take(header) || header.len != request.size()) return std::nullopt;
  if (header.opcode == FUSE_FORGET || header.opcode == FUSE_BATCH_FORGET) return 0;
  if (header.opcode != FUSE_RELEASE && header.opcode != FUSE_RELEASEDIR) return std::nullopt;
  fuse_release_in want;
  if (!in.take(want) || reply.size() < sizeof(fuse_out_header)) return std::nullopt;
  if (header.opcode == FUSE_RELEASE && (want.flags & O_ACCMODE) != O_RDONLY) return std::nullopt;
  const fuse_out_header answer{sizeof(fuse_out_header), 0, header.unique};
  std::memcpy(reply.data(), &answer, sizeof answer);
  return sizeof answer;
}

}  // namespace ring3::fs
