#include "sandbox/jail.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>

namespace ring3::sandbox {
namespace {

/// Runs `body` in a jailed child; its exit status, or minus the signal that ended it.
int jailed(const JailPolicy& policy, const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    auto report = enter_jail(policy);
    if (!report) {
      [[maybe_unused]] const ssize_t n = write(2, report.error().message.data(), report.error().message.size());
      _exit(99);
    }
    _exit(body());
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SKIP_UNDER_SANITIZERS() GTEST_SKIP() << "a sanitizer's runtime makes system calls of its own"
#else
#define SKIP_UNDER_SANITIZERS() (void)0
#endif

JailPolicy small() {
  JailPolicy p;
  p.role = "test";
  p.open_files = 64;
  for (const int nr : {SYS_write, SYS_exit_group, SYS_close}) p.system_calls.push_back({nr, {}});
  p.system_calls.push_back({SYS_socket, {{0, ~u64{0}, AF_INET}, {1, ~u64{SOCK_NONBLOCK}, SOCK_STREAM}}});
  p.system_calls.push_back({SYS_mmap, {{2, 4, 0}}});
  return p;
}

TEST(Jail, AllowedCallsWork) {
  SKIP_UNDER_SANITIZERS();
  EXPECT_EQ(jailed(small(), [] { return 7; }), 7);
  EXPECT_EQ(jailed(small(), [] { return socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0) >= 0 ? 3 : 4; }), 3);
  EXPECT_EQ(jailed(small(), [] { return mmap(nullptr, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED ? 3 : 4; }), 3);
}

TEST(Jail, ArgumentsAreLookedAt) {
  SKIP_UNDER_SANITIZERS();
  EXPECT_EQ(jailed(small(), [] { return socket(AF_UNIX, SOCK_STREAM, 0) >= 0; }), -SIGSYS);
  EXPECT_EQ(jailed(small(), [] { return socket(AF_INET, SOCK_RAW, 1) >= 0; }), -SIGSYS);
  EXPECT_EQ(jailed(small(), [] { return mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) != MAP_FAILED; }), -SIGSYS);
}

TEST(Jail, EveryOtherCallKills) {
  SKIP_UNDER_SANITIZERS();
  for (long nr = 0; nr < 460; nr++) {
    if (nr == SYS_write || nr == SYS_exit_group || nr == SYS_close || nr == SYS_socket || nr == SYS_mmap) continue;
    if (nr >= 335 && nr < 424) continue;  // no such calls
    ASSERT_EQ(jailed(small(), [nr] { return syscall(nr, 0, 0, 0, 0, 0, 0) == 0 ? 1 : 2; }), -SIGSYS) << "system call " << nr;
  }
}

TEST(Jail, NothingOfTheFileSystemIsLeft) {
  SKIP_UNDER_SANITIZERS();
  JailPolicy p = small();
  p.system_calls.push_back({SYS_openat, {}});
  p.system_calls.push_back({SYS_open, {}});
  p.system_calls.push_back({SYS_mkdir, {}});
  const int result = jailed(p, [] {
    if (open("/etc/passwd", O_RDONLY) >= 0 || open("/", O_RDONLY) >= 0 || open("/proc/self/maps", O_RDONLY) >= 0) return 1;
    if (mkdir("/x", 0700) == 0) return 2;
    return 0;
  });
  EXPECT_EQ(result, 0);
}

TEST(Jail, CloseAllBut) {
  const int a = open("/dev/null", O_RDONLY), b = open("/dev/null", O_RDONLY), c = open("/dev/null", O_RDONLY);
  const pid_t child = fork();
  if (child == 0) {
    close_all_but({b});
    const bool good = fcntl(a, F_GETFD) < 0 && fcntl(b, F_GETFD) >= 0 && fcntl(c, F_GETFD) < 0 && fcntl(1, F_GETFD) >= 0;
    _exit(good ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  close(a), close(b), close(c);
}

}  // namespace
}  // namespace ring3::sandbox
