/* Code that changes while it runs, by itself and by another CPU, in the ways the SDM has (vol. 3A, 8.1.3): a guest program of boot_test.py.
   usage: changing_code [rounds]     prints "changing-code: NAME ok" for each part, or what went wrong and ends with status 1. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { kPage = 4096, kRwx = PROT_READ | PROT_WRITE | PROT_EXEC };
typedef uint32_t (*Function)(void);
typedef _Atomic uint32_t Word;

static unsigned long g_rounds = 20000;
static atomic_int g_stop;

static void expect(int ok, const char* what, unsigned long got, unsigned long wanted) {
  if (ok) return;
  printf("changing-code: %s: got %#lx, wanted %#lx\n", what, got, wanted);
  exit(1);
}
static void done(const char* name) {
  printf("changing-code: %s ok\n", name);
  fflush(stdout);
}
static void on_cpu(int n) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(n % (int)sysconf(_SC_NPROCESSORS_ONLN), &set);
  sched_setaffinity(0, sizeof set, &set);
}
static uint8_t* pages(int fd, unsigned n) {
  uint8_t* p = mmap(NULL, n * kPage, kRwx, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) perror("changing-code: mmap"), exit(1);
  return p;
}
/* mov eax, value; ret */
static void emit(uint8_t* at, uint32_t value) {
  at[0] = 0xb8;
  memcpy(at + 1, &value, 4);
  at[5] = 0xc3;
}
static uint32_t call(const uint8_t* at) {
  Function f;
  memcpy(&f, &at, sizeof f);
  return f();
}
static void serialise(void) {
  unsigned a, b, c, d;
  __cpuid(0, a, b, c, d);
}

/* One CPU: the function before it runs, also where its immediate lies on two pages, and an instruction just behind the store. */
static void own(void) {
  uint8_t* const p = pages(-1, 2);
  for (unsigned long n = 0; n < g_rounds; n++) {
    uint8_t* const at = n & 1 ? p + kPage - 3 : p + n % 1000;
    emit(at, (uint32_t)n);
    expect(call(at) == n, "own", 0, n);
  }
  /* mov eax, 1; mov byte [rip + 1], dil -> the immediate of the next one; mov eax, imm32; ret */
  static const uint8_t next[] = {0xb8, 1, 0, 0, 0, 0x40, 0x88, 0x3d, 1, 0, 0, 0, 0xb8, 0, 0, 0, 0, 0xc3};
  memcpy(p, next, sizeof next);
  uint32_t (*f)(uint32_t);
  memcpy(&f, &p, sizeof f);
  for (unsigned n = 0; n < 1000; n++) expect(f(n & 255) == (n & 255), "next instruction", n, n & 255);
  done("own");
}

/* Another CPU's running code: a naturally aligned immediate changes at once or later, never in part; it does change. */
static uint8_t* g_code;
static void* patch(void* unused) {
  on_cpu(1);
  for (uint32_t n = 1; !atomic_load(&g_stop); n++) {
    atomic_store((Word*)(g_code + 4), (n & 0xff) * 0x01010101u);
    for (volatile int k = 0; k < 200; k++) {
    }
  }
  return unused;
}
static void other(void) {
  g_code = pages(-1, 1);
  emit(g_code + 3, 0);
  pthread_t t;
  atomic_store(&g_stop, 0);
  pthread_create(&t, NULL, patch, NULL);
  on_cpu(0);
  uint32_t last = 0;
  unsigned long changes = 0;
  const time_t end = time(NULL) + 60;  // on a busy host a patch may take as long as other programs' turns
  for (unsigned long n = 0; changes < g_rounds / 20 && ((n & 0xffff) != 0 || time(NULL) < end); n++) {
    const uint32_t v = call(g_code + 3);
    expect(v % 0x01010101u == 0, "torn", v, last);
    changes += v != last;
    last = v;
  }
  atomic_store(&g_stop, 1);
  pthread_join(t, NULL);
  expect(changes >= g_rounds / 20, "another CPU's patches seen", changes, g_rounds / 20);
  done("other");
}

/* The protocols: written, told, serialised, run; through another mapping of the page; and by mapping another page there. */
enum How { Written, Aliased, Remapped };
static enum How g_how;
static int g_memfd;
static uint8_t* g_alias;
static atomic_ulong g_turn;
static void* tell(void* unused) {
  on_cpu(1);
  for (unsigned long n = 1; n <= g_rounds; n++) {
    while (atomic_load(&g_turn) != 2 * n - 1) sched_yield();
    if (g_how == Written) emit(g_code, (uint32_t)n);
    if (g_how == Aliased) emit(g_alias, (uint32_t)n);
    if (g_how == Remapped) {
      emit(g_alias + (n & 1) * kPage, (uint32_t)n);
      if (mmap(g_code, kPage, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, g_memfd, (off_t)((n & 1) * kPage)) == MAP_FAILED) exit(1);
    }
    atomic_store(&g_turn, 2 * n);
  }
  return unused;
}
static void protocol(enum How how, const char* name) {
  const unsigned long all = g_rounds;
  g_rounds /= 10;  // each waits for the other CPU twice
  g_how = how;
  g_memfd = memfd_create("code", 0);
  if (g_memfd < 0 || ftruncate(g_memfd, 2 * kPage) != 0) exit(1);
  g_code = pages(g_memfd, 2);
  g_alias = pages(g_memfd, 2);
  emit(g_code, 0);
  pthread_t t;
  atomic_store(&g_turn, 1);
  pthread_create(&t, NULL, tell, NULL);
  on_cpu(0);
  for (unsigned long n = 1; n <= g_rounds; n++) {
    while (atomic_load(&g_turn) != 2 * n) sched_yield();
    serialise();
    const uint32_t v = call(g_code);
    expect(v == n, name, v, n);
    atomic_store(&g_turn, 2 * n + 1);
  }
  pthread_join(t, NULL);
  close(g_memfd);
  g_rounds = all;
  done(name);
}

/* The kernel's own: socket filters, which it translates to code each time; and static keys, patched while all CPUs run. */
static void* filters(void* cpu) {
  on_cpu((int)(intptr_t)cpu);
  int s[2];
  if (socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, s) != 0) exit(1);
  for (uint32_t n = 0; n < g_rounds / 20; n++) {
    const uint32_t constant = n * 2654435761u + (uint32_t)(intptr_t)cpu;
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, constant, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, 4 + n % 4),
        BPF_STMT(BPF_RET | BPF_K, 0),
    };
    const struct sock_fprog program = {sizeof code / sizeof code[0], code};
    if (setsockopt(s[1], SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program) != 0) perror("changing-code: filter"), exit(1);
    const uint32_t right[2] = {__builtin_bswap32(constant), 0}, wrong[2] = {__builtin_bswap32(constant + 1), 0};
    uint8_t got[16];
    (void)!write(s[0], wrong, 8);
    expect(read(s[1], got, sizeof got) < 0, "filter refuses", n, 0);
    (void)!write(s[0], right, 8);
    const ssize_t size = read(s[1], got, sizeof got);
    expect(size == 4 + n % 4, "filter cuts", (unsigned long)size, 4 + n % 4);
  }
  return NULL;
}
static void* keys(void* unused) {
  static const char* const names[] = {"/proc/sys/kernel/sched_schedstats", "/proc/sys/kernel/task_delayacct"};
  for (unsigned n = 0; !atomic_load(&g_stop); n++) {
    const int fd = open(names[n / 2 % 2], O_WRONLY);
    if (fd >= 0) {
      (void)!write(fd, n & 1 ? "0" : "1", 1);
      close(fd);
    }
  }
  return unused;
}
static void kernel(void) {
  pthread_t t[3];
  atomic_store(&g_stop, 0);
  pthread_create(&t[0], NULL, keys, NULL);
  for (intptr_t n = 1; n <= 2; n++) pthread_create(&t[n], NULL, filters, (void*)n);
  pthread_join(t[1], NULL);
  pthread_join(t[2], NULL);
  atomic_store(&g_stop, 1);
  pthread_join(t[0], NULL);
  done("kernel");
}

int main(int argc, char** argv) {
  if (argc > 1) g_rounds = strtoul(argv[1], NULL, 0);
  own();
  if (sysconf(_SC_NPROCESSORS_ONLN) > 1) other();  // else the other one runs when it may, and is hardly seen
  protocol(Written, "written");
  protocol(Aliased, "aliased");
  protocol(Remapped, "remapped");
  kernel();
  return 0;
}
