#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "base/temporary_directory.hpp"
#include "control/vms/boot_stage.hpp"
#include "control/vms/registry.hpp"
#include "control/vms/shared_console.hpp"

namespace ring3::vms {
namespace {

class Directory : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_FALSE(root.empty()); }

  /// A child that claims the name and then waits for a signal (its value) or for ever.
  pid_t child_claims(const std::string& name, int* value_pipe = nullptr) {
    int ready[2], values[2];
    EXPECT_EQ(pipe(ready), 0);
    EXPECT_EQ(pipe(values), 0);
    const pid_t pid = fork();
    if (pid == 0) {
      sigset_t set;
      sigemptyset(&set);
      sigaddset(&set, SIGTERM);
      sigprocmask(SIG_BLOCK, &set, nullptr);
      auto claim = Claim::take(root, name);
      VmInfo info;
      info.started = 7;
      info.cpus = 3;
      info.engine = "soft";
      const char ok = claim && claim->publish(info) ? 'y' : 'n';
      if (::write(ready[1], &ok, 1) != 1) _exit(1);
      siginfo_t got{};
      sigwaitinfo(&set, &got);
      const int value = got.si_code == SI_QUEUE ? got.si_value.sival_int : -1;
      if (::write(values[1], &value, sizeof value) != sizeof value) _exit(1);
      _exit(0);
    }
    char answer = 0;
    EXPECT_EQ(::read(ready[0], &answer, 1), 1);
    EXPECT_EQ(answer, 'y');
    close(ready[0]), close(ready[1]), close(values[1]);
    if (value_pipe != nullptr) *value_pipe = values[0];
    else close(values[0]);
    return pid;
  }

  const TemporaryDirectory place;
  const std::string root = place.path();
};

using Registry = Directory;
using Consoles = Directory;

TEST_F(Registry, ARunningVmIsSeenAndItsNameIsTaken) {
  const pid_t pid = child_claims("a");
  auto all = list(root);
  ASSERT_TRUE(all);
  ASSERT_EQ(all->size(), 1u);
  EXPECT_EQ((*all)[0].pid, pid);
  EXPECT_EQ((*all)[0].cpus, 3u);
  EXPECT_EQ((*all)[0].engine, "soft");
  auto second = Claim::take(root, "a");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, EEXIST);
  EXPECT_EQ(remove(root, "a").error().code, EBUSY);
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
}

TEST_F(Registry, AKilledVmIsNotTakenForARunningOne) {
  const pid_t pid = child_claims("a");
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  auto info = find(root, "a");
  ASSERT_TRUE(info);
  EXPECT_FALSE(info->running());
  EXPECT_FALSE(info->status);
  auto sent = signal_stop(root, "a", 3);
  ASSERT_TRUE(sent);
  EXPECT_FALSE(*sent);
  EXPECT_TRUE(Claim::take(root, "a"));
}

TEST_F(Registry, AForkedHelperDoesNotKeepTheNameTaken) {
  int hold[2];
  ASSERT_EQ(pipe(hold), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    auto claim = Claim::take(root, "a");
    if (fork() == 0) {
      char c;
      const ssize_t n = ::read(hold[0], &c, 1);  // the helper outlives its VM
      _exit(n == 1 ? 0 : 1);
    }
    _exit(claim ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_FALSE(find(root, "a")->running());
  EXPECT_EQ(::write(hold[1], "x", 1), 1);
  close(hold[0]), close(hold[1]);
}

TEST_F(Registry, StopCarriesTheGracePeriod) {
  int values = -1;
  const pid_t pid = child_claims("a", &values);
  auto sent = signal_stop(root, "a", 42);
  ASSERT_TRUE(sent);
  EXPECT_TRUE(*sent);
  int value = 0;
  EXPECT_EQ(::read(values, &value, sizeof value), static_cast<ssize_t>(sizeof value));
  EXPECT_EQ(value, 42);
  waitpid(pid, nullptr, 0);
  close(values);
}

TEST_F(Registry, TheEndIsKeptUntilTheNextOfThatName) {
  {
    auto claim = Claim::take(root, "a");
    ASSERT_TRUE(claim);
    ASSERT_TRUE(claim->publish({}));
    ASSERT_TRUE(claim->finish(3, "the guest panicked"));
  }
  auto info = find(root, "a");
  ASSERT_TRUE(info);
  EXPECT_FALSE(info->running());
  EXPECT_EQ(info->status, 3);
  EXPECT_EQ(info->why, "the guest panicked");
  ASSERT_TRUE(Claim::take(root, "a"));
  EXPECT_FALSE(find(root, "a")->status);
  EXPECT_TRUE(remove(root, "a"));
  EXPECT_EQ(find(root, "a").error().code, ENOENT);
  EXPECT_TRUE(std::filesystem::is_empty(root));
}

TEST_F(Registry, NamesChooseThemselvesAndOldEndsArePruned) {
  for (int i = 1; i <= 5; i++) {
    auto claim = Claim::take_any(root);
    ASSERT_TRUE(claim);
    EXPECT_EQ(claim->name(), "vm-" + std::to_string(i));
    VmInfo info;
    info.started = static_cast<u64>(i);
    ASSERT_TRUE(claim->publish(info));
  }
  prune(root, 2);
  auto all = list(root);
  ASSERT_TRUE(all);
  ASSERT_EQ(all->size(), 2u);
  EXPECT_EQ((*all)[0].name, "vm-4");
}

TEST_F(Registry, NothingOfAnothersIsFollowed) {
  ASSERT_EQ(mkdir((root + "/open").c_str(), 0755), 0);
  EXPECT_EQ(Claim::take(root, "open").error().code, EPERM);
  ASSERT_EQ(symlink("/tmp", (root + "/link").c_str()), 0);
  EXPECT_EQ(Claim::take(root, "link").error().code, EPERM);
  EXPECT_FALSE(find(root, "link"));
  for (const char* name : {"..", "", "a/b", "-x", ".hidden"}) {
    EXPECT_FALSE(Claim::take(root, name)) << name;
    EXPECT_FALSE(find(root, name)) << name;
  }
}

TEST_F(Registry, ABrokenInfoIsAnEntryWithoutFacts) {
  std::mt19937 random(5);
  ASSERT_EQ(mkdir((root + "/a").c_str(), 0700), 0);
  const std::string samples[] = {"", "{", "[]", "null", R"({"started":-1,"cpus":"x","status":"y","why":3})", std::string(100000, '[')};
  for (const std::string& text : samples) {
    std::ofstream(root + "/a/info.json") << text;
    auto info = find(root, "a");
    ASSERT_TRUE(info);
    EXPECT_EQ(info->cpus, 0u);
    EXPECT_FALSE(info->status);
  }
}

TEST_F(Registry, AnEntryOfPipesIsWaitedForByNobody) {
  ASSERT_EQ(mkdir((root + "/a").c_str(), 0700), 0);
  for (const char* file : {"/a/lock", "/a/info.json"}) ASSERT_EQ(mkfifo((root + file).c_str(), 0600), 0);
  auto info = find(root, "a");
  ASSERT_TRUE(info);
  EXPECT_FALSE(info->running());
  auto sent = signal_stop(root, "a", 0);
  EXPECT_TRUE(sent && !*sent);
}

/// A client as `ring3 console` is one.
struct Client {
  explicit Client(int directory) : fd(socket(AF_UNIX, SOCK_STREAM, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strcpy(address.sun_path, socket_path(directory).c_str());
    EXPECT_EQ(connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  }
  void frame(u8 kind, const std::string& body) {
    std::string all{static_cast<char>(kind), static_cast<char>(body.size() & 0xff), static_cast<char>(body.size() >> 8)};
    all += body;
    EXPECT_EQ(::write(fd.get(), all.data(), all.size()), static_cast<ssize_t>(all.size()));
  }
  std::string read_some(int timeout_ms = 2000) {
    pollfd p{fd.get(), POLLIN, 0};
    if (poll(&p, 1, timeout_ms) <= 0) return "";
    char buffer[4096];
    const ssize_t got = ::read(fd.get(), buffer, sizeof buffer);
    return got > 0 ? std::string(buffer, static_cast<std::size_t>(got)) : "<end>";
  }
  UniqueFd fd;
};

std::span<const u8> bytes(const std::string& text) { return {reinterpret_cast<const u8*>(text.data()), text.size()}; }

std::string input_of(SharedConsole& console) {
  pollfd p{console.input_fd(), POLLIN, 0};
  if (poll(&p, 1, 2000) <= 0) return "";
  u8 buffer[512];
  const auto got = console.read(buffer);
  return std::string(buffer, buffer + got.bytes);
}

TEST_F(Consoles, AttachTypeAndSeeWhatIsWritten) {
  const UniqueFd directory(open(root.c_str(), O_RDONLY | O_DIRECTORY));
  int rows = 0, columns = 0;
  auto console = SharedConsole::create(directory.get(), [&](u16 r, u16 c) { rows = r, columns = c; });
  ASSERT_TRUE(console) << console.error().message;
  (*console)->write(bytes("old line\nlogin: "));
  Client client(directory.get());
  EXPECT_EQ(client.read_some(), "login: ");  // the line that is being written on
  (*console)->write(bytes("hello"));
  EXPECT_EQ(client.read_some(), "hello");
  client.frame(SharedConsole::kSize, std::string("\x18\x00\x50\x00", 4));
  client.frame(SharedConsole::kInput, "root\r");
  EXPECT_EQ(input_of(**console), "root\r");
  EXPECT_EQ(rows, 24);
  EXPECT_EQ(columns, 80);
  Client second(directory.get());
  EXPECT_EQ(second.read_some(), "login: hello");
  console->reset();
  EXPECT_EQ(client.read_some(), "<end>");
  std::ifstream log(root + "/console.log");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(log), {}), "old line\nlogin: hello");
}

TEST_F(Consoles, AClientThatDoesNotReadIsDroppedAndTheGuestGoesOn) {
  const UniqueFd directory(open(root.c_str(), O_RDONLY | O_DIRECTORY));
  auto console = SharedConsole::create(directory.get(), nullptr);
  ASSERT_TRUE(console);
  Client lazy(directory.get());
  (*console)->write(bytes("x"));
  EXPECT_NE(lazy.read_some(), "");
  const std::string block(4096, 'y');
  for (int i = 0; i < 3000; i++) EXPECT_TRUE((*console)->write(bytes(block)));
  std::string last;
  for (int i = 0; i < 100000 && last != "<end>"; i++) last = lazy.read_some();
  EXPECT_EQ(last, "<end>");
  // 12 MB were written; the log keeps the end of it only.
  EXPECT_LE(std::filesystem::file_size(root + "/console.log"), SharedConsole::kLogBytes + block.size());
  EXPECT_LE(std::filesystem::file_size(root + "/console.log.1"), SharedConsole::kLogBytes + block.size());
}

// What was read of the output once is not kept, though the client never comes to its end.
TEST_F(Consoles, AClientThatIsAlwaysBehindCostsNoMore) {
  const UniqueFd directory(open(root.c_str(), O_RDONLY | O_DIRECTORY));
  auto console = SharedConsole::create(directory.get(), nullptr, SharedConsole::Serving::kByCaller);
  ASSERT_TRUE(console);
  Client client(directory.get());
  const std::string block(64 << 10, 'y');
  std::vector<char> buffer(block.size());
  const auto settle = [&] {
    for (int i = 0; i < 3; i++) (*console)->serve_once(0);
  };
  settle();
  const auto held = [] {  // kB
    std::ifstream status("/proc/self/status");
    long size = 0;
    for (std::string line; std::getline(status, line);) {
      if (line.rfind("VmRSS:", 0) == 0) size = std::stol(line.substr(6));
    }
    return size;
  };
  for (int i = 0; i < 12; i++) (*console)->write(bytes(block));  // more than its socket takes
  long before = 0;
  for (int i = 0; i < 1000; i++) {
    settle();
    std::size_t got = 0;
    while (got < block.size()) {
      const ssize_t n = ::read(client.fd.get(), buffer.data(), block.size() - got);
      ASSERT_GT(n, 0);
      got += static_cast<std::size_t>(n);
      settle();
    }
    (*console)->write(bytes(block));
    if (i == 100) before = held();
  }
  EXPECT_LT(held() - before, 16 << 10) << "56 MiB went through it since";
}

TEST_F(Consoles, WithoutDescriptorsNobodyIsLookedForAllTheTime) {
  const UniqueFd directory(open(root.c_str(), O_RDONLY | O_DIRECTORY));
  auto console = SharedConsole::create(directory.get(), nullptr, SharedConsole::Serving::kByCaller);
  ASSERT_TRUE(console);
  Client client(directory.get());
  rlimit old{}, none{};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &old), 0);
  none.rlim_cur = 3, none.rlim_max = old.rlim_max;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  const int at_once = (*console)->serve_once(0);
  const int again = (*console)->serve_once(0);
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &old), 0);
  EXPECT_EQ(at_once, 1);
  EXPECT_EQ(again, 0);
  EXPECT_EQ((*console)->serve_once(0), 1);  // it has waited
  (*console)->write(bytes("hello"));
  while ((*console)->serve_once(0) > 0) {
  }
  EXPECT_EQ(client.read_some(), "hello");
}

TEST_F(Consoles, NoiseFromAClientEndsItAlone) {
  const UniqueFd directory(open(root.c_str(), O_RDONLY | O_DIRECTORY));
  auto console = SharedConsole::create(directory.get(), nullptr);
  ASSERT_TRUE(console);
  Client good(directory.get());
  Client bad(directory.get());
  bad.frame(9, "?");
  EXPECT_EQ(bad.read_some(), "<end>");
  Client short_size(directory.get());
  short_size.frame(SharedConsole::kSize, "ab");
  EXPECT_EQ(short_size.read_some(), "<end>");
  good.frame(SharedConsole::kInput, "still here");
  EXPECT_EQ(input_of(**console), "still here");
}

TEST(BootStages, FollowTheConsole) {
  BootStage stage;
  using Stage = BootStage::Stage;
  EXPECT_TRUE(stage.observe(bytes("SeaBIOS (version 1.16)\r\n")));
  EXPECT_EQ(stage.stage(), Stage::kFirmware);
  EXPECT_FALSE(stage.observe(bytes("[    0.000000] Linux ver")));
  EXPECT_TRUE(stage.observe(bytes("sion 6.1.0-56-cloud-amd64\r\n")));
  EXPECT_EQ(stage.stage(), Stage::kKernel);
  EXPECT_TRUE(stage.observe(bytes("[    1.0] Run /init as init process\r\n")));
  EXPECT_TRUE(stage.observe(bytes("systemd[1]: Hello\r\n")));
  EXPECT_FALSE(stage.observe(bytes("[ 2.0] Linux version\r\n")));  // never back
  EXPECT_EQ(stage.stage(), Stage::kUserSpace);
  EXPECT_TRUE(stage.observe(bytes("debian login: ")));
  EXPECT_EQ(stage.stage(), Stage::kLogin);
  stage.reset();
  EXPECT_EQ(stage.stage(), Stage::kStarting);
  stage.observe(bytes(std::string(1 << 20, 'a')));  // a line without an end is no leak
  EXPECT_EQ(stage.stage(), Stage::kStarting);
}

}  // namespace
}  // namespace ring3::vms
