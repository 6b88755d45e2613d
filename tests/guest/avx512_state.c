/* AVX-512's state where a system keeps it for programs: over system calls, signals, other processes and threads.
   usage: avx512_state     prints "avx512-state: NAME ok" for each part, "avx512-state: none" where the CPU has none, or what
   went wrong and ends with status 1. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

struct registers {
  uint8_t zmm[32][64];
  uint64_t k[8];
};

#define EACH_LOW(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11) op(12) op(13) op(14) op(15)
#define EACH_HIGH(op) op(16) op(17) op(18) op(19) op(20) op(21) op(22) op(23) op(24) op(25) op(26) op(27) op(28) op(29) op(30) op(31)
#define EACH_MASK(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7)
#define LOAD(n) "vmovdqu64 64*" #n "(%[in]), %%zmm" #n "\n"
#define STORE(n) "vmovdqu64 %%zmm" #n ", 64*" #n "(%[out])\n"
#define LOAD_MASK(n) "kmovq 2048+8*" #n "(%[in]), %%k" #n "\n"
#define STORE_MASK(n) "kmovq %%k" #n ", 2048+8*" #n "(%[out])\n"
#define CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
  "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", \
  "xmm27", "xmm28", "xmm29", "xmm30", "xmm31", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "memory", "cc"

/* All registers in, so many system calls (or loop rounds, number < 0), all registers out. */
__attribute__((target("avx512f,avx512bw"), noinline)) static void through(const struct registers* in, struct registers* out,
                                                                          long number, long rounds) {
  __asm__ volatile(
      EACH_LOW(LOAD) EACH_HIGH(LOAD) EACH_MASK(LOAD_MASK)
      "1: mov %[number], %%rax\n test %%rax, %%rax\n js 2f\n syscall\n"
      "2: dec %[rounds]\n jnz 1b\n"
      EACH_LOW(STORE) EACH_HIGH(STORE) EACH_MASK(STORE_MASK)
      : [rounds] "+r"(rounds)
      : [in] "r"(in), [out] "r"(out), [number] "r"(number)
      : "rax", "rcx", "r11", CLOBBERS);
}

static void make(struct registers* r, unsigned seed, int upper) {
  uint8_t* p = (uint8_t*)r;
  for (unsigned i = 0; i < sizeof *r; i++) p[i] = (uint8_t)((seed = seed * 1103515245 + 12345) >> 16);
  for (unsigned n = 0; n < 16 && !upper; n++) memset(r->zmm[n] + 32, 0, 32); /* as what uses 256 bits leaves them */
}

static int stays(unsigned seed, long number, long rounds) {
  struct registers in, out;
  make(&in, seed, seed & 1);
  memset(&out, 0, sizeof out);
  through(&in, &out, number, rounds);
  return memcmp(&in, &out, sizeof in) == 0;
}

static void result(const char* part, int ok) {
  printf("avx512-state: %s %s\n", part, ok ? "ok" : "differs");
  fflush(stdout);
  if (!ok) exit(1);
}

static volatile sig_atomic_t signals;
static void handler(int sig) {
  struct registers in, out;
  (void)sig;
  make(&in, 99u + (unsigned)signals, 1);
  through(&in, &out, -1, 3);
  signals++;
}

static void* thread(void* argument) {
  unsigned seed = (unsigned)(uintptr_t)argument;
  for (int n = 0; n < 60; n++)
    if (!stays(seed + (unsigned)n, n & 1 ? SYS_sched_yield : -1, n & 1 ? 50 : 300000)) return (void*)1;
  return NULL;
}

int main(void) {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b >> 16 & 1) || !(b >> 30 & 1)) {
    puts("avx512-state: none");
    return 0;
  }
  int ok = 1;
  for (unsigned n = 0; n < 200; n++) ok &= stays(n, SYS_getppid, 20);
  result("calls", ok);

  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_handler = handler;
  sigaction(SIGALRM, &action, NULL);
  struct itimerval timer = {{0, 2000}, {0, 2000}};
  setitimer(ITIMER_REAL, &timer, NULL);
  for (unsigned n = 0; n < 400 && (signals < 40 || n < 40); n++) ok &= stays(n, -1, 1000000);
  memset(&timer, 0, sizeof timer);
  setitimer(ITIMER_REAL, &timer, NULL);
  result("signals", ok && signals > 0);

  pid_t children[3];
  for (unsigned i = 0; i < 3; i++) {
    children[i] = fork();
    if (children[i] == 0) _exit(thread((void*)(uintptr_t)(1000 * i + 7)) == NULL ? 0 : 1);
  }
  for (unsigned i = 0; i < 3; i++) {
    int status = 1;
    waitpid(children[i], &status, 0);
    ok &= status == 0;
  }
  result("processes", ok);

  pthread_t threads[3];
  for (uintptr_t i = 0; i < 3; i++) pthread_create(&threads[i], NULL, thread, (void*)(500 * i));
  for (unsigned i = 0; i < 3; i++) {
    void* bad = NULL;
    pthread_join(threads[i], &bad);
    ok &= bad == NULL;
  }
  result("threads", ok);
  return 0;
}
