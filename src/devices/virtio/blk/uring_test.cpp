#include "devices/virtio/blk/uring.hpp"

#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <cstdio>

namespace ring3::virtio {
namespace {

bool told(const Uring& u, int milliseconds) {
  pollfd p{u.event_fd(), POLLIN, 0};
  return ::poll(&p, 1, milliseconds) == 1;
}

TEST(Uring, WaitsForSomeAndIsToldOfTheRest) {
  const auto uring = Uring::create(32);
  if (!uring) GTEST_SKIP() << "no io_uring here";
  std::FILE* file = std::tmpfile();
  ASSERT_NE(file, nullptr);
  std::array<std::array<u8, 4096>, 16> bytes;
  std::array<iovec, 16> buffers;
  for (std::size_t i = 0; i < 16; i++) {
    bytes[i].fill(static_cast<u8>(i));
    buffers[i] = {bytes[i].data(), bytes[i].size()};
    ASSERT_TRUE(uring->prepare(true, fileno(file), std::span(&buffers[i], 1), i * 4096, &buffers[i]));
  }
  unsigned ended = 0;
  const auto count = [&](void*, int result) {
    ended++;
    EXPECT_EQ(result, 4096);
  };
  if (!uring->submit_and_wait(4, 900'000)) GTEST_SKIP() << "an old kernel";
  uring->reap(count);
  EXPECT_GE(ended, 4u);
  u64 seen;
  while (ended < 16) {
    ASSERT_TRUE(told(*uring, 5000));
    while (::read(uring->event_fd(), &seen, sizeof seen) > 0) {
    }
    uring->reap(count);
  }
  EXPECT_EQ(ended, 16u);
  EXPECT_EQ(uring->in_flight(), 0u);
  std::fclose(file);

  // What has not ended in time is announced when it does.
  while (::read(uring->event_fd(), &seen, sizeof seen) > 0) {
  }
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_TRUE(uring->prepare(false, ends[0], std::span(buffers.data(), 1), 0, nullptr));
  EXPECT_FALSE(uring->submit_and_wait(1, 1000));
  uring->reap([](void*, int) { ADD_FAILURE() << "nothing was written"; });
  EXPECT_FALSE(told(*uring, 0));
  ASSERT_EQ(::write(ends[1], "x", 1), 1);
  EXPECT_TRUE(told(*uring, 5000));
  int result = 0;
  uring->reap([&](void*, int r) { result = r; });
  EXPECT_EQ(result, 1);
  ::close(ends[0]);
  ::close(ends[1]);
}

}  // namespace
}  // namespace ring3::virtio
