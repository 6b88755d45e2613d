#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/fuse.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

#include "base/temporary_directory.hpp"
#include "fs/fuse/server.hpp"
#include "fs/share/process.hpp"

namespace ring3::fs {
namespace {

class Share : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_FALSE(root.empty());
    std::ofstream(root + "/x") << "content";
    start({});
  }
  void TearDown() override { process.reset(); }
  void start(ShareProcess::Config config) {
    config.directory = root;
    auto made = ShareProcess::start(config);
    ASSERT_TRUE(made) << made.error().message;
    process = std::move(*made);
  }
  /// One request, to the near thread when `near_for` has a value; the answer's body, and its error in `error`.
  std::string call(u32 opcode, u64 node, const std::string& arguments, std::size_t room = 65536) {
    const auto slot = process->acquire();
    EXPECT_TRUE(slot);
    fuse_in_header h{};
    h.len = static_cast<u32>(sizeof h + arguments.size());
    h.opcode = opcode;
    h.nodeid = node;
    std::memcpy(process->request(*slot).data(), &h, sizeof h);
    std::memcpy(process->request(*slot).data() + sizeof h, arguments.data(), arguments.size());
    pollfd p{process->fd(), POLLIN, 0};
    ShareProcess::Answer answer;
    auto received = ShareProcess::Received::kNone;
    if (near_for) {
      EXPECT_TRUE(process->submit_near(*slot, h.len, room));
      if (process->await(*near_for)) {
        awaited++;
        received = process->receive_near(answer);
      }
    } else {
      EXPECT_TRUE(process->submit(*slot, h.len, room));
    }
    while (received == ShareProcess::Received::kNone) {  // an abandoned request's answer is none
      if (poll(&p, 1, 10000) != 1) break;
      received = process->receive(answer);
    }
    EXPECT_EQ(received, ShareProcess::Received::kAnswer);
    if (received != ShareProcess::Received::kAnswer) return "<gone>";
    EXPECT_EQ(answer.slot, *slot);
    EXPECT_LE(answer.length, room);
    fuse_out_header out{};
    std::string body;
    if (answer.length >= sizeof out) {
      std::memcpy(&out, process->reply(*slot).data(), sizeof out);
      body.assign(process->reply(*slot).begin() + sizeof out, process->reply(*slot).begin() + static_cast<std::ptrdiff_t>(answer.length));
    }
    error = out.error;
    process->release(*slot);
    return body;
  }
  template <class T>
  static std::string text(const T& value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
  }
  void init() {
    const u32 words[4] = {7, 37, 1 << 20, ~0u};
    call(FUSE_INIT, 0, text(words));
    ASSERT_EQ(error, 0);
  }
  std::string status_line(const std::string& key) {
    std::ifstream file("/proc/" + std::to_string(process->pid()) + "/status");
    for (std::string line; std::getline(file, line);) {
      if (line.rfind(key + ":\t", 0) == 0) return line.substr(key.size() + 2);
    }
    return "";
  }

  const TemporaryDirectory place;
  const std::string root = place.path();
  std::unique_ptr<ShareProcess> process;
  std::optional<std::chrono::nanoseconds> near_for;
  int awaited = 0;
  int error = 0;
};

TEST_F(Share, ServesFromItsJail) {
  init();
  const std::string entry = call(FUSE_LOOKUP, 1, std::string("x\0", 2));
  ASSERT_EQ(error, 0);
  fuse_entry_out found;
  ASSERT_EQ(entry.size(), sizeof found);
  std::memcpy(&found, entry.data(), sizeof found);
  EXPECT_EQ(found.attr.size, 7u);
  const std::string opened = call(FUSE_OPEN, found.nodeid, text(fuse_open_in{O_RDWR, 0}));
  ASSERT_EQ(error, 0);
  fuse_read_in want{};
  std::memcpy(&want.fh, opened.data(), sizeof want.fh);
  want.size = 100;
  EXPECT_EQ(call(FUSE_READ, found.nodeid, text(want)), "content");
  // Everything that makes, names and removes works under the filter.
  for (const auto& [opcode, arguments] :
       {std::pair<u32, std::string>{FUSE_MKDIR, text(fuse_mkdir_in{0755, 0}) + std::string("d\0", 2)},
        {FUSE_MKNOD, text(fuse_mknod_in{S_IFIFO | 0600, 0, 0, 0}) + std::string("p\0", 2)},
        {FUSE_SYMLINK, std::string("l\0x\0", 4)},
        {FUSE_LINK, text(fuse_link_in{found.nodeid}) + std::string("h\0", 2)},
        {FUSE_CREATE, text(fuse_create_in{O_RDWR, 0600, 0, 0}) + std::string("n\0", 2)},
        {FUSE_RENAME2, text(fuse_rename2_in{1, 0, 0}) + std::string("n\0m\0", 4)},
        {FUSE_UNLINK, std::string("h\0", 2)},
        {FUSE_STATFS, ""},
        {FUSE_SYNCFS, std::string(8, '\0')},
        {FUSE_RMDIR, std::string("d\0", 2)}}) {
    call(opcode, 1, arguments);
    EXPECT_EQ(error, 0) << opcode;
  }
  fuse_setattr_in change{};
  change.valid = FATTR_MODE | FATTR_SIZE | FATTR_MTIME_NOW | FATTR_MTIME | FATTR_UID;
  change.mode = 0640;
  change.size = 3;
  change.uid = geteuid();
  call(FUSE_SETATTR, found.nodeid, text(change));
  EXPECT_EQ(error, 0);
  const std::string directory = call(FUSE_OPENDIR, 1, text(fuse_open_in{O_RDONLY, 0}));
  ASSERT_EQ(error, 0);
  std::memcpy(&want.fh, directory.data(), sizeof want.fh);
  want.size = 4096;
  EXPECT_GT(call(FUSE_READDIRPLUS, 1, text(want)).size(), 100u);
  EXPECT_TRUE(std::filesystem::exists(root + "/m"));
}

TEST_F(Share, TheNearThreadAnswersWhoWaitsAndWhoDoesNot) {
  init();
  // Without patience some answers are there, some come by the socket, and some change from one to the other meanwhile.
  for (const auto patience : {std::chrono::nanoseconds(0), std::chrono::nanoseconds(3000), std::chrono::nanoseconds(std::chrono::milliseconds(100))}) {
    awaited = 0;
    for (int i = 0; i < 300; i++) {
      near_for = patience;
      fuse_entry_out found{};
      const std::string entry = call(FUSE_LOOKUP, 1, std::string("x\0", 2));
      ASSERT_EQ(entry.size(), sizeof found) << i;
      std::memcpy(&found, entry.data(), sizeof found);
      ASSERT_EQ(found.attr.size, 7u);
      near_for.reset();
      if (i % 10 == 0) init();
    }
  }
  EXPECT_GT(awaited, 0);
}

TEST_F(Share, TheNearThreadTakesOneAtATime) {
  init();
  fuse_in_header h{};
  h.len = sizeof h;
  h.opcode = FUSE_STATFS;
  h.nodeid = 1;
  const auto first = process->acquire();
  const auto second = process->acquire();
  for (const u32 slot : {*first, *second}) std::memcpy(process->request(slot).data(), &h, sizeof h);
  ASSERT_TRUE(process->submit_near(*first, sizeof h, 4096));
  EXPECT_FALSE(process->submit_near(*second, sizeof h, 4096));
  process->release(*second);
  process->abandon();  // whether or not it is served already
  for (int i = 0; i < 20; i++) init();
  near_for = std::chrono::milliseconds(100);
  for (unsigned tries = 0; tries < 1000; tries++) {
    const auto slot = process->acquire();
    ASSERT_TRUE(slot);
    std::memcpy(process->request(*slot).data(), &h, sizeof h);
    const bool free = process->submit_near(*slot, sizeof h, 4096);
    if (free) process->abandon();
    process->release(*slot);
    if (free) break;
    ASSERT_LT(tries, 999u);
    near_for.reset();
    init();
  }
}

TEST_F(Share, DeferredRequestsAreServedBeforeTheNextAndOnTheirOwn) {
  init();
  const auto inodes = [&] {  // descriptors of the process: one for each inode that the guest knows
    const std::string fds = "/proc/" + std::to_string(process->pid()) + "/fd";
    return std::distance(std::filesystem::directory_iterator(fds), {});
  };
  const auto look_up = [&] {
    fuse_entry_out found{};
    const std::string entry = call(FUSE_LOOKUP, 1, std::string("x\0", 2));
    if (entry.size() == sizeof found) std::memcpy(&found, entry.data(), sizeof found);
    return found.nodeid;
  };
  const auto forget = [&](u64 node) {
    fuse_in_header h{};
    h.len = sizeof h + sizeof(fuse_forget_in);
    h.opcode = FUSE_FORGET;
    h.nodeid = node;
    const std::string request = text(h) + text(fuse_forget_in{1});
    return process->defer({reinterpret_cast<const u8*>(request.data()), request.size()});
  };
  const auto none = inodes();
  // Many times around the ring.
  for (int i = 0; i < 1000; i++) {
    near_for.reset();
    if (i % 2 == 0) near_for = std::chrono::milliseconds(100);
    const u64 node = look_up();
    ASSERT_NE(node, 0u);
    EXPECT_TRUE(forget(node));
  }
  call(FUSE_STATFS, 1, "");
  EXPECT_EQ(inodes(), none);
  near_for.reset();
  EXPECT_TRUE(forget(look_up()));
  EXPECT_EQ(inodes(), none + 1);
  process->flush_deferred();
  for (int i = 0; i < 2000 && inodes() != none; i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_EQ(inodes(), none);
  // A ring that is full, and a message that is too long, are said.
  int laid = 0;
  while (laid < 100000 && forget(99)) laid++;
  EXPECT_GT(laid, 100);
  EXPECT_LT(laid, 100000);
  call(FUSE_STATFS, 1, "");
  EXPECT_EQ(error, 0);
  EXPECT_TRUE(forget(99));
  EXPECT_FALSE(process->defer(std::vector<u8>(4096)));
}

TEST_F(Share, TheJailStands) {
  init();
  EXPECT_EQ(status_line("NoNewPrivs"), "1");
  EXPECT_EQ(status_line("Seccomp"), "2");
  // CHOWN, DAC_OVERRIDE, FOWNER, FSETID at most.
  const u64 effective = std::stoull("0" + status_line("CapEff"), nullptr, 16);
  EXPECT_EQ(effective & ~u64{0x1b}, 0u);
  int descriptors = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/" + std::to_string(process->pid()) + "/fd")) descriptors += entry.exists() ? 1 : 1;
  EXPECT_LE(descriptors, 8);
}

TEST_F(Share, WhatWasAbandonedDoesNotComeBack) {
  init();
  const auto slot = process->acquire();
  fuse_in_header h{};
  h.len = sizeof h;
  h.opcode = FUSE_STATFS;
  h.nodeid = 1;
  std::memcpy(process->request(*slot).data(), &h, sizeof h);
  ASSERT_TRUE(process->submit(*slot, sizeof h, 4096));
  process->abandon();
  init();  // the next answer that is seen is this one's
  // The other, whenever it comes, frees its slot and shows itself to nobody.
  std::vector<u32> free;
  for (unsigned tries = 0; tries < 1000 && free.size() != ShareProcess::kSlots; tries++) {
    for (const u32 busy : free) process->release(busy);
    free.clear();
    if (tries != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    init();
    while (const auto one = process->acquire()) free.push_back(*one);
  }
  EXPECT_EQ(free.size(), ShareProcess::kSlots);
}

TEST_F(Share, ItsDeathIsSeen) {
  kill(process->pid(), SIGKILL);
  pollfd p{process->fd(), POLLIN, 0};
  EXPECT_EQ(poll(&p, 1, 10000), 1);
  ShareProcess::Answer answer;
  EXPECT_EQ(process->receive(answer), ShareProcess::Received::kGone);
  // Nobody waits for the dead for ever.
  const auto slot = process->acquire();
  EXPECT_TRUE(process->submit_near(*slot, sizeof(fuse_in_header), 4096));
  EXPECT_FALSE(process->await(std::chrono::milliseconds(1)));
  EXPECT_EQ(process->receive(answer), ShareProcess::Received::kGone);
}

TEST_F(Share, NoProcessIsLeftOver) {
  const pid_t pid = process->pid();
  process.reset();
  EXPECT_NE(kill(pid, 0), 0);
  auto none = ShareProcess::start({root + "/none", false, std::nullopt, 0});
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().message.find("No such file"), std::string::npos);
  auto file = ShareProcess::start({root + "/x", false, std::nullopt, 0});
  ASSERT_FALSE(file);
}

}  // namespace
}  // namespace ring3::fs
