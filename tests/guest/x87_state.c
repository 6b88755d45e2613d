/* x87 and MMX state where a system keeps it for programs: over calls, signals, other processes and traps.
   usage: x87_state     prints "x87-state: NAME ok" for each part, or what went wrong and ends with status 1. */
#define _GNU_SOURCE
#include <fenv.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

static void fail(const char* part, const char* what) {
  printf("x87-state: %s: %s\n", part, what);
  exit(1);
}

/* Eight values on the stack over a system call each round: sums in registers that the kernel never sees. */
static long double sums(long number, long seed, int rounds) {
  long double top = 0;
  long one = seed;
  __asm__ volatile(
      "fldz\n fld1\n fldpi\n fldl2e\n fldln2\n fldlg2\n fildq %[one]\n fldz\n"
      "1: fadd %%st(1), %%st\n"
      "mov %[number], %%rax\n syscall\n"
      "fxch %%st(3)\n fadd %%st(4), %%st\n fxch %%st(3)\n"
      "dec %[rounds]\n jnz 1b\n"
      "faddp\n faddp\n faddp\n faddp\n faddp\n faddp\n faddp\n"
      "fstpt %[top]\n"
      : [top] "=m"(top), [rounds] "+r"(rounds)
      : [one] "m"(one), [number] "r"(number)
      : "rax", "rcx", "r11", "memory", "cc", "st", "st(1)", "st(2)", "st(3)", "st(4)", "st(5)", "st(6)", "st(7)");
  return top;
}

/* Without calls: what the sums must be. */
static long double sums_alone(long seed, int rounds) {
  volatile long double a = 0, b = 0;
  long double pi, l2e, ln2, lg2;
  __asm__("fldpi" : "=t"(pi));
  __asm__("fldl2e" : "=t"(l2e));
  __asm__("fldln2" : "=t"(ln2));
  __asm__("fldlg2" : "=t"(lg2));
  b = ln2;
  for (int n = 0; n < rounds; n++) {
    a = a + (long double)seed;
    b = b + l2e;
  }
  long double v = a + (long double)seed;
  v = v + lg2;
  v = v + b;
  v = v + l2e;
  v = v + pi;
  v = v + 1;
  return v + 0;
}

static void check_sums(const char* part, int yields, long seed, int rounds) {
  const long double v = sums(yields ? SYS_sched_yield : SYS_getppid, seed, rounds), w = sums_alone(seed, rounds);
  if (v != w) fail(part, "a value on the stack changed");
}

static void* thread(void* seed) {
  check_sums("threads", 1, (long)seed, 200);
  return NULL;
}

static uint64_t mmx(uint64_t seed, int rounds) {
  uint64_t out;
  __asm__ volatile(
      "movq %[seed], %%mm0\n movq %%mm0, %%mm5\n"
      "1: paddw %%mm5, %%mm0\n psrlq $3, %%mm5\n pxor %%mm0, %%mm5\n"
      "mov %[number], %%eax\n syscall\n"
      "dec %[rounds]\n jnz 1b\n"
      "pxor %%mm5, %%mm0\n movq %%mm0, %[out]\n emms\n"
      : [out] "=m"(out), [rounds] "+r"(rounds)
      : [seed] "m"(seed), [number] "i"(SYS_getppid)
      : "rax", "rcx", "r11", "memory", "cc", "mm0", "mm5");
  return out;
}

static uint64_t mmx_alone(uint64_t seed, int rounds) {
  uint64_t a = seed, b = seed;
  while (rounds-- > 0) {
    uint64_t sum = 0;
    for (int lane = 0; lane < 64; lane += 16) sum |= (uint64_t)(uint16_t)((a >> lane) + (b >> lane)) << lane;
    a = sum;
    b = (b >> 3) ^ a;
  }
  return a ^ b;
}

static volatile sig_atomic_t alarms;
static void on_alarm(int signal) {
  (void)signal;
  volatile long double v = 1.5L;
  v = v * v + sqrtl(v);
  alarms++;
}

static sigjmp_buf back;
static volatile int fpe_code, trapped;
static void on_fpe(int signal, siginfo_t* info, void* context) {
  (void)signal;
  const ucontext_t* const uc = context;
  fpe_code = info->si_code;
  trapped = uc->uc_mcontext.fpregs->swd & 4;
  siglongjmp(back, 1);
}

int main(void) {
  setbuf(stdout, NULL);
  check_sums("calls", 0, 3, 50000);
  for (uint64_t seed = 1; seed < 4; seed++)
    if (mmx(seed * 0x123456789abcdefull, 20000) != mmx_alone(seed * 0x123456789abcdefull, 20000)) fail("calls", "an MMX register changed");
  puts("x87-state: calls ok");

  pthread_t threads[4];
  for (long n = 0; n < 4; n++)
    if (pthread_create(&threads[n], NULL, thread, (void*)(n + 5)) != 0) fail("threads", "pthread_create");
  for (int n = 0; n < 4; n++) pthread_join(threads[n], NULL);
  for (int n = 0; n < 3; n++) {
    if (fork() == 0) {
      check_sums("processes", 1, 11 + n, 200);
      _exit(0);
    }
  }
  check_sums("processes", 1, 10, 200);
  for (int n = 0; n < 3; n++) {
    int status = 0;
    if (wait(&status) < 0 || status != 0) fail("processes", "a child failed");
  }
  puts("x87-state: processes ok");

  const struct itimerval often = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
  signal(SIGALRM, on_alarm);
  setitimer(ITIMER_REAL, &often, NULL);
  for (int n = 0; n < 20; n++) check_sums("signals", 0, 20 + n, 20000);
  setitimer(ITIMER_REAL, &never, NULL);
  if (alarms == 0) fail("signals", "there were none");
  puts("x87-state: signals ok");

  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fpe;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGFPE, &action, NULL);
  for (int n = 0; n < 100; n++) {
    fpe_code = 0;
    if (sigsetjmp(back, 1) == 0) {
      feenableexcept(FE_DIVBYZERO);
      volatile long double zero = 0, one = 1;
      one = one / zero;
      fail("exceptions", "none was raised");
    }
    if (fpe_code != FPE_FLTDIV || !trapped) fail("exceptions", "another one was raised");
    feclearexcept(FE_ALL_EXCEPT);
    fedisableexcept(FE_ALL_EXCEPT);
    check_sums("exceptions", 0, 50, 100);
  }
  puts("x87-state: exceptions ok");

  char text[64];
  fesetround(FE_TOWARDZERO);
  const long down = lrintl(-2.75L);
  fesetround(FE_TONEAREST);
  snprintf(text, sizeof text, "%ld %ld %.20Lg %La", down, lrintl(-2.75L), strtold("3.14159265358979323846264338327950288", NULL), powl(2.0L, 0.5L));
  if (strcmp(text, "-2 -3 3.1415926535897932385 0xb.504f333f9de6484p-3") != 0) fail("libm", text);
  puts("x87-state: libm ok");
  return 0;
}
