#include "engine/interp/host_fault.hpp"

#include <gtest/gtest.h>

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace ring3::engine {
namespace {

const u8 code[16]{};
struct sigaction g_found;
volatile sig_atomic_t g_seen;

/// Takes the place of whatever handles SIGFPE, as an embedding program does after the engine has started.
void put_over(void (*f)(int, siginfo_t*, void*)) {
  struct sigaction theirs;
  std::memset(&theirs, 0, sizeof theirs);
  theirs.sa_sigaction = f;
  theirs.sa_flags = SA_SIGINFO;
  ASSERT_EQ(sigaction(SIGFPE, &theirs, &g_found), 0);
  arm_host_faults();
}

/// In a process of its own, begun anew (death_test_style): the engine has found nobody's handler yet. The signal ends it, with f over the
/// engine's handler.
[[noreturn]] void raise_with(void (*f)(int, siginfo_t*, void*)) {
  alarm(20);
  signal(SIGFPE, SIG_DFL);  // not a sanitizer's
  const HostFaultRange range(code, code + sizeof code, code);
  arm_host_faults();
  put_over(f);
  raise(SIGFPE);
  _exit(1);
}

// A handler of crashes: puts back what it found, and raises the signal again for that.
TEST(HostFault, AHandlerThatGivesUpEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto gives_up = [](int sig, siginfo_t*, void*) {
    sigaction(sig, &g_found, nullptr);
    raise(sig);
  };
  EXPECT_EXIT(raise_with(gives_up), testing::KilledBySignal(SIGFPE), "");
}

TEST(HostFault, AHandlerThatCallsWhatItFoundEndsTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto calls = [](int sig, siginfo_t* info, void* context) { g_found.sa_sigaction(sig, info, context); };
  EXPECT_EXIT(raise_with(calls), testing::KilledBySignal(SIGFPE), "");
}

TEST(HostFault, AHandlerThatStaysIsCalledEachTime) {
  struct sigaction before;
  ASSERT_EQ(sigaction(SIGFPE, nullptr, &before), 0);
  const HostFaultRange range(code, code + sizeof code, code);
  g_seen = 0;
  put_over([](int, siginfo_t*, void*) { g_seen = g_seen + 1; });
  raise(SIGFPE);
  arm_host_faults();
  raise(SIGFPE);
  EXPECT_EQ(g_seen, 2);
  struct sigaction now;
  ASSERT_EQ(sigaction(SIGFPE, nullptr, &now), 0);
  EXPECT_EQ(now.sa_sigaction, g_found.sa_sigaction);
}

// Guest memory vanishes while C++ works for translated code: the guest's x87 state stands in the registers.
TEST(HostFault, ATrapKeepsX87) {
  const HostFaultRange range(code, code + sizeof code, code);
  void* const page = mmap(nullptr, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(page, MAP_FAILED);
  GuestMemoryTrap trap([](void* at, u64 address) { return reinterpret_cast<u64>(at) == address; }, page);
  double kept = 0;
  asm volatile("fldpi");
  const bool whole = trap.run([&] { *static_cast<volatile u8*>(page) = 1; });
  asm volatile("fstpl %0" : "=m"(kept));
  EXPECT_FALSE(whole);
  EXPECT_EQ(kept, 0x1.921fb54442d18p+1);
  munmap(page, 4096);
}

}  // namespace
}  // namespace ring3::engine
