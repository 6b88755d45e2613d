#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <fstream>
#include <random>
#include <set>
#include <thread>

#include "fs/fuse/test_client.hpp"

namespace ring3::fs {
namespace {

using test::append;
using test::append_text;
using test::Bytes;
using test::Client;
using test::Tree;
namespace files = std::filesystem;
constexpr u64 kRoot = Inodes::kRoot;

std::string content(const std::string& path) {
  std::ifstream in(path);
  return {std::istreambuf_iterator<char>(in), {}};
}
void put(const std::string& path, const std::string& text) { std::ofstream(path) << text; }

class Fuse : public ::testing::Test {
 protected:
  void SetUp() override {
    umask(0);  // as the server's process has it
    ASSERT_TRUE(client.server);
    ASSERT_EQ(client.init(), 0);
    client.uid = geteuid();
    client.gid = getegid();
  }
  Tree tree;
  Client client{tree.root, {false, geteuid() == 0, std::nullopt, 1000}};
};

TEST_F(Fuse, InitAgreesOnTheOlderVersion) {
  ASSERT_EQ(client.init(31), 0);
  EXPECT_EQ(client.get<fuse_init_out>().minor, 31u);
  ASSERT_EQ(client.init(99), 0);
  const auto answer = client.get<fuse_init_out>();
  EXPECT_EQ(answer.major, 7u);
  EXPECT_EQ(answer.minor, 37u);
  EXPECT_EQ(answer.max_write, Server::kMostData);
  // Locks are the guest's own business, and "." and ".." are not looked up.
  EXPECT_EQ(answer.flags & (FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS | FUSE_EXPORT_SUPPORT | FUSE_WRITEBACK_CACHE), 0u);
  EXPECT_EQ(client.init(12), -EPROTO);
}

TEST_F(Fuse, NothingBeforeInit) {
  Client fresh(tree.root);
  EXPECT_EQ(fresh.getattr(kRoot), -EIO);
  EXPECT_EQ(fresh.init(), 0);
  EXPECT_EQ(fresh.getattr(kRoot), 0);
}

TEST_F(Fuse, CreateWriteReadRelease) {
  u64 fh = 0;
  ASSERT_EQ(client.create(kRoot, "file", O_RDWR | O_EXCL, 0640, fh), 0);
  const auto entry = client.get<fuse_entry_out>();
  EXPECT_EQ(entry.attr.mode, S_IFREG | 0640u);
  EXPECT_EQ(client.write(fh, 0, "hello world"), 11);
  EXPECT_EQ(client.write(fh, 6, "ring3"), 5);
  EXPECT_EQ(client.read(fh, 0, 100), "hello ring3");
  EXPECT_EQ(client.read(fh, 6, 2), "ri");
  EXPECT_EQ(client.read(fh, 100, 2), "");
  EXPECT_EQ(content(tree.root + "/file"), "hello ring3");
  u64 second = 0;
  EXPECT_EQ(client.create(kRoot, "file", O_RDWR | O_EXCL, 0640, second), -EEXIST);
  ASSERT_EQ(client.create(kRoot, "file", O_RDONLY, 0640, second), 0);
  EXPECT_EQ(client.read(second, 0, 5), "hello");
  EXPECT_EQ(client.write(second, 0, "x"), -EBADF);
  for (const u64 handle : {fh, second}) {
    Bytes in;
    fuse_release_in done{};
    done.fh = handle;
    append(in, done);
    EXPECT_EQ(client.call(FUSE_RELEASE, entry.nodeid, in), 0);
    EXPECT_EQ(client.call(FUSE_RELEASE, entry.nodeid, in), -EBADF);
  }
  EXPECT_EQ(client.server->open_files(), 0u);
  EXPECT_EQ(client.read(fh, 0, 5), "<error>");
}

TEST_F(Fuse, ALargeWriteAndReadInOnePiece) {
  std::string data(Server::kMostData, 'x');
  for (std::size_t i = 0; i < data.size(); i += 4093) data[i] = static_cast<char>(i);
  u64 fh = 0;
  ASSERT_EQ(client.create(kRoot, "big", O_RDWR, 0600, fh), 0);
  EXPECT_EQ(client.write(fh, 4096, data), static_cast<int>(data.size()));
  EXPECT_EQ(client.read(fh, 4096, Server::kMostData), data);
}

TEST_F(Fuse, NamesAndNodes) {
  ASSERT_EQ(client.mkdir(kRoot, "a", 0700), 0);
  const u64 a = client.get<fuse_entry_out>().nodeid;
  put(tree.root + "/a/x", "1");
  const u64 x = client.lookup(a, "x");
  ASSERT_NE(x, 0u);
  EXPECT_EQ(client.lookup(a, "x"), x);  // one inode, one node
  int error = 1;
  EXPECT_EQ(client.lookup(a, "none", &error), 0u);
  EXPECT_EQ(error, 0);  // a negative entry
  EXPECT_GT(client.get<fuse_entry_out>().entry_valid, 0u);
  EXPECT_EQ(client.lookup(x, "y", &error), 0u);
  EXPECT_EQ(error, -ENOTDIR);
  EXPECT_EQ(client.lookup(99999, "y", &error), 0u);
  EXPECT_EQ(error, -ESTALE);
  EXPECT_EQ(client.link(x, kRoot, "hard"), 0);
  EXPECT_EQ(client.get<fuse_entry_out>().nodeid, x);
  EXPECT_EQ(client.get<fuse_entry_out>().attr.nlink, 2u);
  EXPECT_EQ(client.rename(a, "x", kRoot, "moved"), 0);
  EXPECT_EQ(client.rename(kRoot, "moved", kRoot, "hard2", RENAME_NOREPLACE), 0);
  put(tree.root + "/other", "2");
  EXPECT_EQ(client.rename(kRoot, "other", kRoot, "hard", RENAME_NOREPLACE), -EEXIST);
  EXPECT_EQ(client.rename(kRoot, "other", kRoot, "hard", RENAME_EXCHANGE), 0);
  EXPECT_EQ(content(tree.root + "/hard"), "2");
  EXPECT_EQ(client.rename(kRoot, "other", kRoot, "hard", RENAME_WHITEOUT), -EINVAL);
  EXPECT_EQ(client.named(FUSE_UNLINK, kRoot, "other"), 0);
  EXPECT_EQ(client.named(FUSE_UNLINK, kRoot, "a"), -EISDIR);
  EXPECT_EQ(client.named(FUSE_RMDIR, kRoot, "a"), 0);
  EXPECT_EQ(client.named(FUSE_RMDIR, kRoot, "a"), -ENOENT);
  EXPECT_FALSE(files::exists(tree.root + "/a"));
}

TEST_F(Fuse, ForgottenNodesAreGoneAndTheirNumbersAreNotUsedAgain) {
  put(tree.root + "/x", "");
  const u64 x = client.lookup(kRoot, "x");
  client.lookup(kRoot, "x");
  Bytes in;
  append(in, fuse_forget_in{1});
  client.call(FUSE_FORGET, x, in);
  EXPECT_EQ(client.getattr(x), 0);
  Bytes batch;
  append(batch, fuse_batch_forget_in{2, 0});
  append(batch, fuse_forget_one{x, 1});
  append(batch, fuse_forget_one{kRoot, 1000});  // the root stays
  client.call(FUSE_BATCH_FORGET, 0, batch);
  EXPECT_EQ(client.getattr(x), -ESTALE);
  EXPECT_EQ(client.getattr(kRoot), 0);
  EXPECT_EQ(client.server->inodes(), 1u);
  EXPECT_NE(client.lookup(kRoot, "x"), x);
}

TEST_F(Fuse, AttributesChange) {
  put(tree.root + "/x", "0123456789");
  const u64 x = client.lookup(kRoot, "x");
  fuse_setattr_in want{};
  want.valid = FATTR_MODE | FATTR_SIZE | FATTR_MTIME | FATTR_ATIME;
  want.mode = 0600;
  want.size = 4;
  want.mtime = 1000;
  want.mtimensec = 5;
  want.atime = 2000;
  ASSERT_EQ(client.setattr(x, want), 0);
  const auto attr = client.get<fuse_attr_out>().attr;
  EXPECT_EQ(attr.size, 4u);
  EXPECT_EQ(attr.mode, S_IFREG | 0600u);
  EXPECT_EQ(attr.mtime, 1000u);
  EXPECT_EQ(attr.mtimensec, 5u);
  EXPECT_EQ(attr.atime, 2000u);
  EXPECT_EQ(content(tree.root + "/x"), "0123");
  want.valid = FATTR_SIZE;
  want.size = ~u64{0};
  EXPECT_EQ(client.setattr(x, want), -EFBIG);
  EXPECT_EQ(client.setattr(kRoot, want), -EISDIR);
}

TEST_F(Fuse, SetUserIdBitsGoWithWritesTruncationsAndOwners) {
  ASSERT_EQ(client.init(), 0);
  EXPECT_NE(client.get<fuse_init_out>().flags & FUSE_HANDLE_KILLPRIV_V2, 0u);
  for (const bool privileged : {false, true}) {
    if (privileged && geteuid() != 0) continue;
    SCOPED_TRACE(privileged);
    Client one{tree.root, {false, privileged, std::nullopt, 1000}};
    ASSERT_EQ(one.init(), 0);
    one.uid = geteuid();
    one.gid = getegid();
    u64 fh = 0;
    ASSERT_EQ(one.create(kRoot, privileged ? "p" : "u", O_RDWR, 0600, fh), 0);
    const std::string path = tree.root + (privileged ? "/p" : "/u");
    const u64 node = one.get<fuse_entry_out>().nodeid;
    const auto set = [&](mode_t mode) { EXPECT_EQ(chmod(path.c_str(), mode), 0); };
    const auto mode = [&] {
      struct stat info {};
      EXPECT_EQ(stat(path.c_str(), &info), 0);
      return info.st_mode & 07777;
    };
    // The guest is not told when they go, so it may not keep the attributes.
    set(0644);
    ASSERT_EQ(one.getattr(node), 0);
    EXPECT_EQ(one.get<fuse_attr_out>().attr_valid, 1u);
    set(04755);
    ASSERT_EQ(one.getattr(node), 0);
    EXPECT_EQ(one.get<fuse_attr_out>().attr_valid, 0u);
    EXPECT_EQ(one.get<fuse_attr_out>().attr_valid_nsec, 0u);

    fuse_setattr_in owner{};
    owner.valid = FATTR_UID | FATTR_GID;
    owner.uid = geteuid();
    owner.gid = getegid();
    set(06755);
    EXPECT_EQ(one.setattr(node, owner), 0);
    EXPECT_EQ(mode(), 0755u);

    if (!privileged) continue;  // else this process's capabilities are no user's
    fuse_write_in want{};
    want.fh = fh;
    want.size = 1;
    want.write_flags = FUSE_WRITE_KILL_SUIDGID;
    Bytes write;
    append(write, want);
    write.push_back('x');
    set(06755);
    EXPECT_EQ(one.call(FUSE_WRITE, node, write), 0);
    EXPECT_EQ(mode(), 0755u);
    set(02745);  // no group execution: not what set-group-ID means
    EXPECT_EQ(one.call(FUSE_WRITE, node, write), 0);
    EXPECT_EQ(mode(), 02745u);
    set(04755);
    EXPECT_EQ(one.write(fh, 0, "y"), 1);  // the guest's root may keep them
    EXPECT_EQ(mode(), 04755u);

    fuse_setattr_in size{};
    size.valid = FATTR_SIZE | FATTR_KILL_SUIDGID;
    EXPECT_EQ(one.setattr(node, size), 0);
    EXPECT_EQ(mode(), 0755u);

    set(04755);
    Bytes open;
    append(open, fuse_open_in{O_WRONLY | O_TRUNC, FUSE_OPEN_KILL_SUIDGID});
    EXPECT_EQ(one.call(FUSE_OPEN, node, open), 0);
    EXPECT_EQ(mode(), 0755u);

    set(04755);
    Bytes create;
    append(create, fuse_create_in{O_WRONLY | O_TRUNC, 0600, 0, FUSE_OPEN_KILL_SUIDGID});
    append_text(create, "p");
    EXPECT_EQ(one.call(FUSE_CREATE, kRoot, create), 0);
    EXPECT_EQ(mode(), 0755u);
  }
}

TEST_F(Fuse, DirectoriesAreListedWhole) {
  std::multiset<std::string> expected{".", ".."};
  for (int i = 0; i < 200; i++) {
    const std::string name = "file-" + std::string(static_cast<std::size_t>(i % 100), 'n') + std::to_string(i);
    put(tree.root + "/" + name, "");
    expected.insert(name);
  }
  for (const bool plus : {false, true}) {
    for (const u32 size : {600u, 4096u, 65536u}) {
      const auto names = client.names(kRoot, plus, size);
      EXPECT_EQ(std::multiset<std::string>(names.begin(), names.end()), expected) << plus << size;
    }
  }
  EXPECT_EQ(client.looked_up, 3 * 200);
  EXPECT_EQ(client.server->inodes(), 201u);
  EXPECT_EQ(client.server->open_files(), 0u);
}

TEST_F(Fuse, ListingsAreKeptByTheGuestOnceTheDirectoryHasSettled) {
  ASSERT_EQ(client.mkdir(kRoot, "d"), 0);
  const u64 d = client.get<fuse_entry_out>().nodeid;
  const auto flags = [&](Client& of) {
    u64 handle = 0;
    EXPECT_EQ(of.open_node(d, O_RDONLY, handle, true), 0);
    return of.get<fuse_open_out>().open_flags;
  };
  // What changes now, and once more in the same tick of the clock, has one time stamp.
  EXPECT_EQ(flags(client), 0u);
  const std::string path = tree.root + "/d";
  const auto age = [&](long seconds) {
    timespec times[2] = {{0, UTIME_OMIT}, {time(nullptr) + seconds, 0}};
    ASSERT_EQ(utimensat(AT_FDCWD, path.c_str(), times, 0), 0);
  };
  age(-10);
  EXPECT_EQ(flags(client), static_cast<u32>(FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE));
  age(+10);
  EXPECT_EQ(flags(client), 0u);
  age(-10);
  Client never{tree.root, {false, geteuid() == 0, std::nullopt, 0}};
  ASSERT_EQ(never.init(), 0);
  ASSERT_EQ(never.lookup(kRoot, "d"), d);
  EXPECT_EQ(flags(never), 0u);
}

TEST_F(Fuse, HolesSpaceAndCopies) {
  u64 fh = 0, to = 0;
  ASSERT_EQ(client.create(kRoot, "sparse", O_RDWR, 0600, fh), 0);
  ASSERT_EQ(client.create(kRoot, "copy", O_RDWR, 0600, to), 0);
  ASSERT_EQ(client.write(fh, 1 << 20, "end"), 3);
  Bytes seek;
  fuse_lseek_in want{};
  want.fh = fh;
  want.whence = SEEK_DATA;
  append(seek, want);
  ASSERT_EQ(client.call(FUSE_LSEEK, 1, seek), 0);
  EXPECT_LE(client.get<fuse_lseek_out>().offset, u64{1} << 20);
  Bytes copy;
  fuse_copy_file_range_in range{};
  range.fh_in = fh;
  range.off_in = 1 << 20;
  range.fh_out = to;
  range.len = 3;
  append(copy, range);
  ASSERT_EQ(client.call(FUSE_COPY_FILE_RANGE, 1, copy), 0);
  EXPECT_EQ(client.read(to, 0, 10), "end");
  Bytes allocate;
  fuse_fallocate_in space{};
  space.fh = to;
  space.length = 8192;
  append(allocate, space);
  const int error = client.call(FUSE_FALLOCATE, 1, allocate);
  EXPECT_TRUE(error == 0 || error == -EOPNOTSUPP) << error;
  Bytes sync;
  fuse_fsync_in flags{};
  flags.fh = to;
  append(sync, flags);
  EXPECT_EQ(client.call(FUSE_FSYNC, 1, sync), 0);
  EXPECT_EQ(client.call(FUSE_STATFS, kRoot), 0);
  EXPECT_GT(client.get<fuse_statfs_out>().st.blocks, 0u);
  EXPECT_EQ(client.call(FUSE_SYNCFS, kRoot), 0);
}

TEST_F(Fuse, ReadOnlyChangesNothing) {
  put(tree.root + "/x", "before");
  Client reader(tree.root, {true, false, std::nullopt, 0});
  ASSERT_EQ(reader.init(), 0);
  const u64 x = reader.lookup(kRoot, "x");
  u64 fh = 0;
  for (const u32 flags : {u32{O_WRONLY}, u32{O_RDWR}, u32{O_RDONLY | O_TRUNC}}) EXPECT_EQ(reader.open_node(x, flags, fh), -EROFS);
  ASSERT_EQ(reader.open_node(x, O_RDONLY, fh), 0);
  EXPECT_EQ(reader.read(fh, 0, 100), "before");
  EXPECT_EQ(reader.write(fh, 0, "after"), -EROFS);
  u64 made = 0;
  EXPECT_EQ(reader.create(kRoot, "new", O_RDWR, 0600, made), -EROFS);
  EXPECT_EQ(reader.mkdir(kRoot, "new"), -EROFS);
  EXPECT_EQ(reader.mknod(kRoot, "new", S_IFIFO | 0600), -EROFS);
  EXPECT_EQ(reader.symlink(kRoot, "new", "x"), -EROFS);
  EXPECT_EQ(reader.link(x, kRoot, "new"), -EROFS);
  EXPECT_EQ(reader.rename(kRoot, "x", kRoot, "new"), -EROFS);
  EXPECT_EQ(reader.named(FUSE_UNLINK, kRoot, "x"), -EROFS);
  EXPECT_EQ(reader.setattr(x, {}), -EROFS);
  EXPECT_EQ(content(tree.root + "/x"), "before");
  EXPECT_EQ(std::distance(files::directory_iterator(tree.root), {}), 1);
}

TEST_F(Fuse, OwnersAsTheGuestSaysOrAsTheyAre) {
  put(tree.root + "/x", "");
  Client mapped(tree.root, {false, false, 4711, 0});
  ASSERT_EQ(mapped.init(), 0);
  const u64 x = mapped.lookup(kRoot, "x");
  EXPECT_EQ(mapped.get<fuse_entry_out>().attr.uid, 4711u);
  EXPECT_EQ(mapped.get<fuse_entry_out>().attr.gid, 4711u);
  fuse_setattr_in chown{};
  chown.valid = FATTR_UID | FATTR_GID;
  chown.uid = chown.gid = 12345;
  EXPECT_EQ(mapped.setattr(x, chown), 0);  // yes, and nothing happens
  struct stat info {};
  ASSERT_EQ(stat((tree.root + "/x").c_str(), &info), 0);
  EXPECT_EQ(info.st_uid, geteuid());
  if (geteuid() != 0) return;
  const u64 own = client.lookup(kRoot, "x");
  EXPECT_EQ(client.setattr(own, chown), 0);
  ASSERT_EQ(stat((tree.root + "/x").c_str(), &info), 0);
  EXPECT_EQ(info.st_uid, 12345u);
  client.uid = 1234;
  client.gid = 2345;
  u64 fh = 0;
  ASSERT_EQ(client.create(kRoot, "suid", O_RDWR, 04755, fh), 0);
  const auto attr = client.get<fuse_entry_out>().attr;
  EXPECT_EQ(attr.uid, 1234u);
  EXPECT_EQ(attr.gid, 2345u);
  EXPECT_EQ(attr.mode, S_IFREG | 04755u);
}

// ---- Escapes

TEST_F(Fuse, NamesThatArePathsAreRefused) {
  put(tree.base + "/outside/secret", "secret");
  put(tree.root + "/x", "x");
  const u64 x = client.lookup(kRoot, "x");
  for (const std::string& name : {std::string(".."), std::string("."), std::string(""), std::string("../outside"), std::string("/etc"),
                                  std::string("a/b"), std::string("x/"), tree.base + "/outside/secret"}) {
    int error = 0;
    EXPECT_EQ(client.lookup(kRoot, name, &error), 0u) << name;
    EXPECT_EQ(error, -EINVAL) << name;
    u64 fh = 0;
    EXPECT_EQ(client.create(kRoot, name, O_RDWR, 0600, fh), -EINVAL) << name;
    EXPECT_EQ(client.mkdir(kRoot, name), -EINVAL) << name;
    EXPECT_EQ(client.mknod(kRoot, name, S_IFREG | 0600), -EINVAL) << name;
    EXPECT_EQ(client.symlink(kRoot, name, "t"), -EINVAL) << name;
    EXPECT_EQ(client.link(x, kRoot, name), -EINVAL) << name;
    EXPECT_EQ(client.rename(kRoot, "x", kRoot, name), -EINVAL) << name;
    EXPECT_EQ(client.rename(kRoot, name, kRoot, "y"), -EINVAL) << name;
    EXPECT_EQ(client.named(FUSE_UNLINK, kRoot, name), -EINVAL) << name;
    EXPECT_EQ(client.named(FUSE_RMDIR, kRoot, name), -EINVAL) << name;
  }
  int error = 0;
  EXPECT_EQ(client.lookup(kRoot, std::string(256, 'n'), &error), 0u);
  EXPECT_EQ(error, -ENAMETOOLONG);
}

TEST_F(Fuse, LinksAreGivenToTheGuestAndNeverFollowed) {
  put(tree.base + "/outside/secret", "secret");
  files::create_directory_symlink("../outside", tree.root + "/relative");
  files::create_directory_symlink(tree.base + "/outside", tree.root + "/absolute");
  files::create_symlink(tree.base + "/outside/secret", tree.root + "/file");
  files::create_symlink("/proc/self/root", tree.root + "/magic");
  for (const char* name : {"relative", "absolute", "file", "magic"}) {
    const u64 node = client.lookup(kRoot, name);
    ASSERT_NE(node, 0u) << name;
    EXPECT_EQ(client.get<fuse_entry_out>().attr.mode & S_IFMT, static_cast<u32>(S_IFLNK)) << name;
    int error = 0;
    EXPECT_EQ(client.lookup(node, "secret", &error), 0u);
    EXPECT_EQ(error, -ENOTDIR);
    u64 fh = 0;
    EXPECT_EQ(client.open_node(node, O_RDONLY, fh), -ENXIO);
    EXPECT_EQ(client.open_node(node, O_RDONLY, fh, true), -ENOTDIR);
    EXPECT_EQ(client.create(kRoot, name, O_RDWR | O_TRUNC, 0600, fh), -ENXIO);  // not through the link
    EXPECT_EQ(client.call(FUSE_READLINK, node), 0);
    EXPECT_GT(client.body.size(), 0u);
    fuse_setattr_in chmod{};
    chmod.valid = FATTR_MODE;
    EXPECT_EQ(client.setattr(node, chmod), -EOPNOTSUPP);
    fuse_setattr_in truncate{};
    truncate.valid = FATTR_SIZE;
    EXPECT_EQ(client.setattr(node, truncate), -EINVAL);
    EXPECT_EQ(client.link(node, kRoot, std::string(name) + "-hard"), 0);
    EXPECT_TRUE(files::is_symlink(tree.root + "/" + name + "-hard"));  // the link itself
  }
  EXPECT_EQ(content(tree.base + "/outside/secret"), "secret");
}

TEST_F(Fuse, SpecialFilesAreNeitherOpenedNorMadeAsDevices) {
  for (const u32 type : {S_IFCHR, S_IFBLK, S_IFDIR, S_IFLNK}) EXPECT_EQ(client.mknod(kRoot, "dev", type | 0666), -EPERM);
  ASSERT_EQ(client.mknod(kRoot, "fifo", S_IFIFO | 0666), 0);
  const u64 fifo = client.get<fuse_entry_out>().nodeid;
  u64 fh = 0;
  EXPECT_EQ(client.open_node(fifo, O_RDONLY, fh), -ENXIO);  // and does not wait for a writer
  EXPECT_EQ(client.create(kRoot, "fifo", O_WRONLY, 0600, fh), -ENXIO);
  if (geteuid() == 0 && ::mknod((tree.root + "/null").c_str(), S_IFCHR | 0666, makedev(1, 3)) == 0) {
    const u64 null = client.lookup(kRoot, "null");
    ASSERT_NE(null, 0u);
    EXPECT_EQ(client.open_node(null, O_RDWR, fh), -ENXIO);
  }
}

// One thread of the host swaps a directory for a link to the outside, over and over, while the guest looks things up in
// it, creates and deletes: nothing of the outside is ever seen or touched.
TEST_F(Fuse, RacesWithLinksAndRenames) {
  put(tree.base + "/outside/secret", "secret");
  files::create_directory(tree.root + "/real");
  put(tree.root + "/real/secret", "harmless");
  files::create_directory_symlink(tree.base + "/outside", tree.root + "/link");
  std::atomic<bool> end{false};
  std::thread swapper([&] {
    const std::string a = tree.root + "/real", b = tree.root + "/link";
    while (!end) (void)syscall(SYS_renameat2, AT_FDCWD, a.c_str(), AT_FDCWD, b.c_str(), RENAME_EXCHANGE);
  });
  int seen = 0;
  const auto end_at = std::chrono::steady_clock::now() + std::chrono::seconds(3);
  for (int i = 0; i < 20000 && (i < 200 || std::chrono::steady_clock::now() < end_at); i++) {
    const u64 directory = client.lookup(kRoot, i % 2 == 0 ? "real" : "link");
    if (directory == 0) continue;
    u64 fh = 0;
    const u64 file = client.lookup(directory, "secret");
    if (file != 0 && client.open_node(file, O_RDONLY, fh) == 0) {
      EXPECT_EQ(client.read(fh, 0, 100), "harmless");
      seen++;
      Bytes in;
      fuse_release_in done{};
      done.fh = fh;
      append(in, done);
      client.call(FUSE_RELEASE, file, in);
    }
    if (client.create(directory, "made", O_RDWR, 0600, fh) == 0) {
      Bytes in;
      fuse_release_in done{};
      done.fh = fh;
      append(in, done);
      client.call(FUSE_RELEASE, file, in);
    }
    client.named(FUSE_UNLINK, directory, "made");
    client.rename(directory, "secret", directory, "secret");
  }
  end = true;
  swapper.join();
  EXPECT_GT(seen, 0);
  EXPECT_EQ(content(tree.base + "/outside/secret"), "secret");
  EXPECT_EQ(std::distance(files::directory_iterator(tree.base + "/outside"), {}), 1);
}

TEST_F(Fuse, TheKernelsOwnFileSystemsAreShownEmpty) {
  Client slash("/", {true, false, std::nullopt, 0});
  ASSERT_EQ(slash.init(), 0);
  const u64 proc = slash.lookup(kRoot, "proc");
  if (proc == 0) GTEST_SKIP() << "there is no /proc";
  EXPECT_EQ(slash.get<fuse_entry_out>().attr.mode, S_IFDIR | 0555u);
  int error = 1;
  EXPECT_EQ(slash.lookup(proc, "self", &error), 0u);
  EXPECT_EQ(error, 0);  // a negative entry
  EXPECT_TRUE(slash.names(proc, false).empty());
}

// ---- Broken messages

TEST_F(Fuse, EveryRequestCutAnywhereIsAnswered) {
  put(tree.root + "/x", "x");
  const u64 x = client.lookup(kRoot, "x");
  u64 fh = 0;
  ASSERT_EQ(client.open_node(x, O_RDWR, fh), 0);
  std::mt19937 random(3);
  for (u32 opcode = 0; opcode < 64; opcode++) {
    for (std::size_t length = 0; length <= 96; length += 4) {
      Bytes message(sizeof(fuse_in_header) + length);
      for (u8& byte : message) byte = static_cast<u8>(random());
      fuse_in_header h{};
      h.len = static_cast<u32>(message.size());
      h.opcode = opcode;
      h.nodeid = length % 8 == 0 ? kRoot : x;
      std::memcpy(message.data(), &h, sizeof h);
      for (const std::size_t room : {std::size_t{0}, std::size_t{15}, std::size_t{16}, std::size_t{40}, std::size_t{4096}}) {
        Bytes reply(room);
        EXPECT_LE(client.server->handle(message, reply), room);
      }
      // Cut within the header, and with a length that lies.
      EXPECT_EQ(client.server->handle(std::span(message).first(20), {}), 0u);
      h.len++;
      std::memcpy(message.data(), &h, sizeof h);
      Bytes reply(64);
      EXPECT_LE(client.server->handle(message, reply), 64u);
    }
  }
}

}  // namespace
}  // namespace ring3::fs
