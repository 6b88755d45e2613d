// More inodes than descriptors: a server that keeps eight.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "fs/fuse/test_client.hpp"

namespace ring3::fs {
namespace {

using test::Client;
using test::Tree;
namespace files = std::filesystem;
constexpr u64 kRoot = Inodes::kRoot;

void put(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

class FewDescriptors : public ::testing::Test {
 protected:
  static constexpr std::size_t kKept = 8;
  void SetUp() override {
    umask(0);
    ASSERT_TRUE(client.server);
    ASSERT_EQ(client.init(), 0);
    client.uid = geteuid();
    client.gid = getegid();
  }
  static long descriptors() { return std::distance(files::directory_iterator("/proc/self/fd"), {}); }
  /// Looks at so many other files that no descriptor of before is left.
  void crowd_out() {
    files::create_directory(tree.root + "/crowd");
    const u64 crowd = client.lookup(kRoot, "crowd");
    for (int i = 0; i < 20; i++) {
      put(tree.root + "/crowd/" + std::to_string(i), "");
      EXPECT_NE(client.lookup(crowd, std::to_string(i)), 0u);
    }
    EXPECT_LE(client.server->descriptors(), kKept);
  }
  u64 inode_of(u64 node) { return client.getattr(node) == 0 ? client.get<fuse_attr_out>().attr.ino : 0; }
  std::string content(u64 node) {
    u64 handle = 0;
    if (client.open_node(node, O_RDONLY, handle) != 0) return "<not opened>";
    const std::string text = client.read(handle, 0, 100);
    fuse_release_in done{};
    done.fh = handle;
    test::Bytes in;
    test::append(in, done);
    EXPECT_EQ(client.call(FUSE_RELEASE, node, in), 0);
    return text;
  }
  Tree tree;
  Client client{tree.root, {false, geteuid() == 0, std::nullopt, 1000, kKept}};
};

TEST_F(FewDescriptors, ATreeOfAnySizeIsReached) {
  const long before = descriptors();
  u64 directory = kRoot;
  std::string path = tree.root;
  std::vector<std::pair<u64, std::string>> all;
  for (int depth = 0; depth < 30; depth++) {
    path += "/d";
    files::create_directory(path);
    directory = client.lookup(directory, "d");
    ASSERT_NE(directory, 0u);
    for (int i = 0; i < 20; i++) {
      const std::string name = "f" + std::to_string(i);
      put(path + "/" + name, std::to_string(depth) + "," + name);
      all.emplace_back(client.lookup(directory, name), std::to_string(depth) + "," + name);
      ASSERT_NE(all.back().first, 0u);
    }
  }
  EXPECT_LE(descriptors(), before + static_cast<long>(kKept));
  for (const auto& [node, text] : all) ASSERT_EQ(content(node), text);
  for (auto it = all.rbegin(); it != all.rend(); ++it) ASSERT_EQ(content(it->first), it->second);
  EXPECT_LE(descriptors(), before + static_cast<long>(kKept));
  EXPECT_EQ(client.server->inodes(), 1u + 30 * 21);
}

TEST_F(FewDescriptors, WhatTheGuestRenamesIsFoundUnderItsNewName) {
  files::create_directories(tree.root + "/a/b");
  files::create_directory(tree.root + "/c");
  put(tree.root + "/a/b/x", "x");
  put(tree.root + "/a/y", "y");
  const u64 a = client.lookup(kRoot, "a"), b = client.lookup(a, "b"), c = client.lookup(kRoot, "c");
  const u64 x = client.lookup(b, "x"), y = client.lookup(a, "y");
  crowd_out();
  ASSERT_EQ(client.rename(a, "b", c, "moved"), 0);
  ASSERT_EQ(client.rename(a, "y", c, "z"), 0);
  crowd_out();
  EXPECT_EQ(content(x), "x");  // by way of its directory, which has another name
  EXPECT_EQ(content(y), "y");
  ASSERT_EQ(client.rename(c, "z", b, "x", RENAME_EXCHANGE), 0);
  crowd_out();
  EXPECT_EQ(content(x), "x");
  EXPECT_EQ(content(y), "y");
  EXPECT_EQ(client.lookup(b, "x"), y);
}

TEST_F(FewDescriptors, WhatTheHostRenamesIsStaleAndTheSameWhenItIsLookedUpAgain) {
  put(tree.root + "/x", "x");
  const u64 x = client.lookup(kRoot, "x");
  crowd_out();
  files::rename(tree.root + "/x", tree.root + "/elsewhere");
  EXPECT_EQ(client.getattr(x), -ESTALE);
  put(tree.root + "/x", "another");
  EXPECT_EQ(client.getattr(x), -ESTALE);  // not the file that has the name now
  EXPECT_EQ(client.lookup(kRoot, "elsewhere"), x);
  EXPECT_EQ(content(x), "x");
}

TEST_F(FewDescriptors, ANumberThatTheHostGaveAnotherFileIsAnotherFile) {
  // File systems give numbers again soon; one that does not shows nothing here, and harms nothing.
  for (int i = 0; i < 200; i++) {
    const std::string old_name = "old" + std::to_string(i), new_name = "new" + std::to_string(i);
    put(tree.root + "/" + old_name, "old");
    const u64 old_node = client.lookup(kRoot, old_name);
    const u64 number = inode_of(old_node);
    if (i == 0) crowd_out();
    client.server->close_descriptors();
    files::remove(tree.root + "/" + old_name);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    put(tree.root + "/" + new_name, "new");
    const u64 new_node = client.lookup(kRoot, new_name);
    EXPECT_NE(new_node, old_node);
    EXPECT_EQ(client.getattr(old_node), -ESTALE);
    EXPECT_EQ(content(new_node), "new");
    if (inode_of(new_node) == number) break;
  }
}

TEST_F(FewDescriptors, AnOpenFileStaysWhenItsNameIsGone) {
  u64 handle = 0;
  ASSERT_EQ(client.create(kRoot, "x", O_RDWR, 0644, handle), 0);
  const u64 x = client.get<fuse_entry_out>().nodeid;
  ASSERT_EQ(client.write(handle, 0, "text"), 4);
  crowd_out();
  ASSERT_EQ(client.named(FUSE_UNLINK, kRoot, "x"), 0);
  crowd_out();
  EXPECT_EQ(client.getattr(x), 0);
  EXPECT_EQ(client.get<fuse_attr_out>().attr.nlink, 0u);
  EXPECT_EQ(client.read(handle, 0, 10), "text");
}

TEST_F(FewDescriptors, ALinkInTheWayIsNotFollowed) {
  files::create_directories(tree.root + "/d/e");
  put(tree.root + "/d/e/x", "inside");
  const u64 d = client.lookup(kRoot, "d"), e = client.lookup(d, "e"), x = client.lookup(e, "x");
  crowd_out();
  // The very same files, but by a link: what the guest knew was another thing of that name.
  files::rename(tree.root + "/d", tree.root + "/real");
  files::create_symlink("real", tree.root + "/d");
  EXPECT_EQ(client.getattr(x), -ESTALE);
  EXPECT_EQ(client.getattr(e), -ESTALE);
  const u64 real = client.lookup(kRoot, "real");
  EXPECT_EQ(real, d);
  EXPECT_EQ(content(x), "inside");
}

TEST_F(FewDescriptors, ForgottenWithoutADescriptorIsForgotten) {
  put(tree.root + "/x", "x");
  const u64 x = client.lookup(kRoot, "x");
  crowd_out();
  const auto before = client.server->inodes();
  fuse_forget_in one{1};
  test::Bytes in;
  test::append(in, one);
  EXPECT_EQ(client.call(FUSE_FORGET, x, in), 0);
  EXPECT_EQ(client.server->inodes(), before - 1);
  EXPECT_EQ(client.getattr(x), -ESTALE);
  const u64 again = client.lookup(kRoot, "x");
  EXPECT_NE(again, x);
  EXPECT_EQ(content(again), "x");
}

TEST_F(FewDescriptors, ManyThreads) {
  files::create_directories(tree.root + "/p/q");
  for (int i = 0; i < 40; i++) put(tree.root + "/p/q/" + std::to_string(i), std::to_string(i));
  const u64 p = client.lookup(kRoot, "p"), q = client.lookup(p, "q");
  std::vector<u64> nodes;
  for (int i = 0; i < 40; i++) nodes.push_back(client.lookup(q, std::to_string(i)));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; t++) {
    threads.emplace_back([&, t] {
      for (unsigned i = 0; i < 2000; i++) {
        fuse_in_header h{};
        test::Bytes message, reply(4096);
        const u64 node = nodes[(i * (2 * t + 1)) % nodes.size()];
        h.opcode = FUSE_GETATTR;
        h.nodeid = node;
        h.len = sizeof h + sizeof(fuse_getattr_in);
        test::append(message, h);
        test::append(message, fuse_getattr_in{});
        (void)client.server->handle(message, reply);
        fuse_out_header answer;
        std::memcpy(&answer, reply.data(), sizeof answer);
        wrong += answer.error != 0;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(client.server->descriptors(), kKept);
}

}  // namespace
}  // namespace ring3::fs
