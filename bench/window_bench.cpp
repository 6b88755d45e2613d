/// What host-MMU windows would cost and gain on this host (docs/adr/0008): a page's way into a window and out of it,
/// and a pointer chase through 16 KiB in three ways of reaching a guest address.
#include <signal.h>
#include <sys/mman.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/types.hpp"

namespace {

using ring3::u64;
using ring3::u8;

constexpr u64 kPage = 4096, kPages = 4096;
u8* g_ram = nullptr;
u8* g_window = nullptr;

double now_ns() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
}

/// Maps the page that was missed: the same memory as g_ram's, at another place, without a descriptor.
void on_miss(int, siginfo_t* info, void*) {
  const u64 page = (reinterpret_cast<u64>(info->si_addr) - reinterpret_cast<u64>(g_window)) / kPage;
  if (page >= kPages ||
      mremap(g_ram + page * 1999 % kPages * kPage, 0, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, g_window + page * kPage) ==
          MAP_FAILED) {
    _Exit(1);
  }
}

void* reserve(u64 size, int flags) {
  void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  if (p == MAP_FAILED) std::exit(1);
  return p;
}

void measure_pages() {
  g_ram = static_cast<u8*>(mmap(nullptr, kPages * kPage, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  if (g_ram == MAP_FAILED) std::exit(1);
  std::memset(g_ram, 1, kPages * kPage);
  g_window = static_cast<u8*>(reserve(kPages * kPage, 0));
  struct sigaction action;
  std::memset(&action, 0, sizeof action);
  action.sa_sigaction = on_miss;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  const double begin = now_ns();
  for (u64 i = 0; i < kPages; i++) *reinterpret_cast<volatile u8*>(g_window + i * kPage) = 2;
  const double in = now_ns();
  if (mmap(g_window, kPages * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
      MAP_FAILED) {
    std::exit(1);
  }
  const double out = now_ns();
  std::printf("a page into the window (SIGSEGV, mremap, host fault)  %8.0f ns\n", (in - begin) / kPages);
  std::printf("a page out of it (all at once)                        %8.0f ns\n", (out - in) / kPages);
}

struct Entry {
  u64 read, write, exec, addend;
};

template <class Step>
void chase(const char* name, u64 start, Step step) {
  constexpr u64 kSteps = 20'000'000;
  double best = 1e9;
  for (int round = 0; round < 5; round++) {
    u64 at = start;
    const double begin = now_ns();
    for (u64 i = 0; i < kSteps; i++) at = step(at);
    const double took = (now_ns() - begin) / kSteps;
    if (took < best) best = took;
    asm volatile("" : : "r"(at));
  }
  std::printf("pointer chase, %-20s %22.2f ns\n", name, best);
}

void measure_chase() {
  constexpr u64 kLines = 256;  // 16 KiB
  struct alignas(64) Line {
    u64 next;
  };
  std::vector<Line> lines(kLines + 64);
  const u64 base = (reinterpret_cast<u64>(lines.data()) + kPage - 1) & ~(kPage - 1);
  std::vector<unsigned> order(kLines);
  for (unsigned i = 0; i < kLines; i++) order[i] = i;
  u64 seed = 12345;
  for (unsigned i = kLines - 1; i > 0; i--) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(order[i], order[(seed >> 33) % i]);
  }
  for (unsigned i = 0; i < kLines; i++) *reinterpret_cast<u64*>(base + i * 64) = base + order[i] * 64;

  std::vector<Entry> tlb(8192, Entry{1, 1, 1, 0});
  for (u64 page = base; page < base + kLines * 64; page += kPage) tlb[(page >> 12) & 8191] = {page, page, page, 0};
  const u64 tag = base >> 40, delta = 0;
  const Entry* entries = tlb.data();
  chase("native", base, [](u64 at) {
    asm volatile("mov (%0), %0" : "+r"(at));
    return at;
  });
  chase("software TLB", base, [&](u64 at) {
    asm volatile(
        "rorx $7, %0, %%r15\n and $0x3ffe0, %%r15d\n add %1, %%r15\n lea 7(%0), %%r14\n and $-4096, %%r14\n"
        "cmp (%%r15), %%r14\n jne 1f\n mov 24(%%r15), %%r15\n mov (%0, %%r15), %0\n1:"
        : "+r"(at)
        : "m"(entries)
        : "r14", "r15", "cc");
    return at;
  });
  chase("predicted window", base, [&](u64 at) {
    asm volatile(
        "rorx $40, %0, %%r14\n cmp %1, %%r14w\n jne 1f\n mov %2, %%r15\n mov (%0, %%r15), %0\n1:"
        : "+r"(at)
        : "m"(tag), "m"(delta)
        : "r14", "r15", "cc");
    return at;
  });
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("bmi2")) return 0;
  measure_pages();
  measure_chase();
  return 0;
}
