#include "control/cli/stream_console.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

namespace ring3::control {
namespace {

struct Pipe {
  UniqueFd reader;
  UniqueFd writer;
  Pipe() {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) == 0) {
      reader.reset(fds[0]);
      writer.reset(fds[1]);
    }
  }
};

std::span<const u8> bytes_of(const std::string& text) { return {reinterpret_cast<const u8*>(text.data()), text.size()}; }

/// Reads as the machine does: when the fd is readable, at most `burst` bytes at a time.
std::string read_until_closed(StreamConsole& console, std::size_t burst, bool* stop = nullptr) {
  std::string all;
  std::vector<u8> buffer(burst);
  for (;;) {
    pollfd fd{console.input_fd(), POLLIN, 0};
    if (::poll(&fd, 1, 5000) <= 0) return all + "<timeout>";
    const auto input = console.read(buffer);
    all.append(reinterpret_cast<const char*>(buffer.data()), input.bytes);
    if (stop != nullptr && input.stop) *stop = true;
    if (input.closed) return all;
  }
}

TEST(StreamConsole, LosesNoByteOfALargePaste) {
  Pipe in;
  auto console = StreamConsole::on_fds(in.reader.get(), -1, true, {}).value();
  std::string sent;
  for (int i = 0; i < 300000; ++i) sent += static_cast<char>('!' + i % 90);
  std::thread typist([&] {
    std::size_t done = 0;
    while (done < sent.size()) {
      const ssize_t n = ::write(in.writer.get(), sent.data() + done, sent.size() - done);
      if (n <= 0) return;
      done += static_cast<std::size_t>(n);
    }
    in.writer.reset();
  });
  EXPECT_EQ(read_until_closed(*console, 16), sent);
  typist.join();
}

TEST(StreamConsole, ReadsAheadButNotWithoutBound) {
  Pipe in;
  auto console = StreamConsole::on_fds(in.reader.get(), -1, false, {}).value();
  fcntl(in.writer.get(), F_SETFL, O_NONBLOCK);
  const std::string block(4096, 'x');
  std::size_t accepted = 0;
  int idle = 0;
  while (idle < 20) {
    const ssize_t n = ::write(in.writer.get(), block.data(), block.size());
    if (n > 0) {
      accepted += static_cast<std::size_t>(n);
      idle = 0;
    } else {
      ++idle;
      ::usleep(5000);
    }
  }
  EXPECT_LE(accepted, StreamConsole::kReadAhead + (256u << 10));
}

TEST(StreamConsole, CtrlAXStopsEvenWhenNobodyReads) {
  Pipe in;
  std::atomic<bool> stopped{false};
  std::atomic<bool> helped{false};
  StreamConsole::Callbacks callbacks;
  callbacks.on_stop = [&] { stopped = true; };
  callbacks.on_help = [&] { helped = true; };
  auto console = StreamConsole::on_fds(in.reader.get(), -1, true, std::move(callbacks)).value();
  const std::string typed = std::string("ab\x01\x01") + "c\x01h\x01";
  ASSERT_EQ(::write(in.writer.get(), typed.data(), typed.size()), static_cast<ssize_t>(typed.size()));
  ::usleep(50000);
  ASSERT_EQ(::write(in.writer.get(), "xzzz", 4), 4);
  for (int i = 0; i < 500 && !stopped; ++i) ::usleep(10000);
  EXPECT_TRUE(stopped);
  EXPECT_TRUE(helped);
  bool stop = false;
  EXPECT_EQ(read_until_closed(*console, 64, &stop), "ab\x01" "c");
  EXPECT_TRUE(stop);
}

TEST(StreamConsole, PlainInputIsPassedUntouched) {
  Pipe in;
  auto console = StreamConsole::on_fds(in.reader.get(), -1, false, {}).value();
  ASSERT_EQ(::write(in.writer.get(), "a\x01x", 3), 3);
  in.writer.reset();
  EXPECT_EQ(read_until_closed(*console, 64), "a\x01x");
}

TEST(StreamConsole, BrokenPipeIsReportedOnce) {
  signal(SIGPIPE, SIG_IGN);
  Pipe out;
  out.reader.reset();
  int lost = 0;
  StreamConsole::Callbacks callbacks;
  callbacks.on_output_lost = [&](const std::string&) { ++lost; };
  auto console = StreamConsole::on_fds(-1, out.writer.get(), false, std::move(callbacks)).value();
  EXPECT_FALSE(console->write(bytes_of("hello")));
  EXPECT_FALSE(console->write(bytes_of("hello")));
  EXPECT_EQ(lost, 1);
}

TEST(StreamConsole, CancelEndsABlockedWrite) {
  Pipe out;
  auto console = StreamConsole::on_fds(-1, out.writer.get(), false, {}).value();
  std::atomic<bool> returned{false};
  std::thread writer([&] {
    const std::string much(1u << 20, 'x');
    console->write(bytes_of(much));
    returned = true;
  });
  ::usleep(50000);
  EXPECT_FALSE(returned);
  console->cancel();
  writer.join();
  EXPECT_TRUE(returned);
}

TEST(StreamConsole, FullDiskIsReported) {
  std::string why;
  StreamConsole::Callbacks callbacks;
  callbacks.on_output_lost = [&](const std::string& message) { why = message; };
  auto console = StreamConsole::file("/dev/full", std::move(callbacks)).value();
  EXPECT_FALSE(console->write(bytes_of("hello")));
  EXPECT_NE(why.find("/dev/full"), std::string::npos);
}

TEST(StreamConsole, FileErrorsAreClear) {
  EXPECT_FALSE(StreamConsole::file("", {}).ok());
  EXPECT_FALSE(StreamConsole::file("/", {}).ok());
  EXPECT_FALSE(StreamConsole::file("/nonexistent/directory/console", {}).ok());
}

TEST(StreamConsole, PseudoTerminalCarriesBothWays) {
  std::string path;
  auto console = StreamConsole::pseudo_terminal(path, {}).value();
  EXPECT_TRUE(console->write(bytes_of("nobody listens")));
  UniqueFd terminal(::open(path.c_str(), O_RDWR | O_NOCTTY));
  ASSERT_TRUE(terminal);
  EXPECT_TRUE(console->write(bytes_of("hello\n")));
  char got[64];
  ASSERT_EQ(::read(terminal.get(), got, sizeof got), 6);
  EXPECT_EQ(std::string(got, 6), "hello\n");
  ASSERT_EQ(::write(terminal.get(), "a\x03\r", 3), 3);
  std::string all;
  while (all.size() < 3) {
    pollfd fd{console->input_fd(), POLLIN, 0};
    ASSERT_GT(::poll(&fd, 1, 5000), 0);
    u8 buffer[16];
    const auto input = console->read(buffer);
    all.append(reinterpret_cast<const char*>(buffer), input.bytes);
  }
  EXPECT_EQ(all, "a\x03\r");
}

TEST(StreamConsole, NoneSwallows) {
  auto console = StreamConsole::none().value();
  EXPECT_TRUE(console->write(bytes_of("x")));
  EXPECT_EQ(console->input_fd(), -1);
}

}  // namespace
}  // namespace ring3::control
