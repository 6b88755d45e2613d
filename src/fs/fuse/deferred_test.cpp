#include "fs/fuse/deferred.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/fuse.h>

#include <array>
#include <cstring>

#include "fs/fuse/test_client.hpp"

namespace ring3::fs {
namespace {

using test::Bytes;

template <class T>
Bytes bytes_of(const T& value) {
  Bytes bytes(sizeof value);
  std::memcpy(bytes.data(), &value, sizeof value);
  return bytes;
}

Bytes message(u32 opcode, const Bytes& arguments) {
  fuse_in_header h{};
  h.len = static_cast<u32>(sizeof h + arguments.size());
  h.opcode = opcode;
  h.unique = 77;
  Bytes bytes(h.len);
  std::memcpy(bytes.data(), &h, sizeof h);
  if (!arguments.empty()) std::memcpy(bytes.data() + sizeof h, arguments.data(), arguments.size());
  return bytes;
}

Bytes release(u32 flags) {
  fuse_release_in want{};
  want.fh = 5;
  want.flags = flags;
  return bytes_of(want);
}

std::array<u8, 16> reply;

TEST(Deferred, ForgettingHasNoAnswer) {
  const Bytes one = bytes_of(fuse_forget_in{3});
  EXPECT_EQ(deferred_answer(message(FUSE_FORGET, one), {}), 0u);
  EXPECT_EQ(deferred_answer(message(FUSE_BATCH_FORGET, one), reply), 0u);
}

TEST(Deferred, AReleaseIsAnsweredUnlessTheFileWasWritten) {
  ASSERT_EQ(deferred_answer(message(FUSE_RELEASE, release(O_RDONLY)), reply), sizeof(fuse_out_header));
  fuse_out_header answer;
  std::memcpy(&answer, reply.data(), sizeof answer);
  EXPECT_EQ(answer.len, sizeof answer);
  EXPECT_EQ(answer.error, 0);
  EXPECT_EQ(answer.unique, 77u);
  EXPECT_EQ(deferred_answer(message(FUSE_RELEASEDIR, release(O_RDONLY)), reply), sizeof answer);
  EXPECT_FALSE(deferred_answer(message(FUSE_RELEASE, release(O_WRONLY)), reply));
  EXPECT_FALSE(deferred_answer(message(FUSE_RELEASE, release(O_RDWR | O_APPEND)), reply));
}

TEST(Deferred, NothingElseIs) {
  for (u32 opcode = 0; opcode < 64; opcode++) {
    const bool known = opcode == FUSE_FORGET || opcode == FUSE_BATCH_FORGET || opcode == FUSE_RELEASE || opcode == FUSE_RELEASEDIR;
    EXPECT_EQ(deferred_answer(message(opcode, release(O_RDONLY)), reply).has_value(), known) << opcode;
  }
  const Bytes whole = message(FUSE_RELEASE, release(O_RDONLY));
  for (std::size_t length = 0; length < whole.size(); length++) EXPECT_FALSE(deferred_answer(std::span(whole).first(length), reply)) << length;
  Bytes longer = whole;
  longer.push_back(0);
  EXPECT_FALSE(deferred_answer(longer, reply));
  EXPECT_FALSE(deferred_answer(whole, std::span(reply).first(15)));
}

}  // namespace
}  // namespace ring3::fs
