/* Small workloads: micro NAME. What each measures stands at its function. */
#define _GNU_SOURCE
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "work.h"

/* --- integer: hashing, a string table, qsort with a callback, a branchy parser ------------------------------ */

static int compare_u32(const void* a, const void* b) {
  const uint32_t x = *(const uint32_t*)a, y = *(const uint32_t*)b;
  return x < y ? -1 : x > y;
}

struct entry {
  char key[24];
  uint32_t count;
};

static uint32_t find_or_add(struct entry* table, uint32_t mask, const char* key) {
  uint32_t h = 2166136261u;
  for (const char* p = key; *p; p++) h = (h ^ (uint8_t)*p) * 16777619u;
  for (;; h++) {
    struct entry* e = &table[h & mask];
    if (e->count == 0) {
      strcpy(e->key, key);
      e->count = 1;
      return 1;
    }
    if (strcmp(e->key, key) == 0) return ++e->count;
  }
}

static uint64_t crc_bits(const uint8_t* p, size_t n) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < n; i++) {
    crc ^= p[i];
    for (int k = 0; k < 8; k++) crc = (crc & 1) ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
  }
  return crc;
}

/* Evaluates "a+b*c-(d)..." by recursive descent. */
static long expression(const char** s);
static long factor(const char** s) {
  if (**s == '(') {
    ++*s;
    const long v = expression(s);
    ++*s;
    return v;
  }
  long v = 0;
  while (**s >= '0' && **s <= '9') v = v * 10 + *(*s)++ - '0';
  return v;
}
static long term(const char** s) {
  long v = factor(s);
  while (**s == '*' || **s == '/') {
    const char op = *(*s)++;
    const long w = factor(s);
    v = op == '*' ? (long)((unsigned long)v * (unsigned long)w & 0xfffffff) : v / (w ? w : 1);
  }
  return v;
}
static long expression(const char** s) {
  long v = term(s);
  while (**s == '+' || **s == '-') {
    const char op = *(*s)++;
    const long w = term(s);
    v = op == '+' ? v + w : v - w;
  }
  return v;
}

static void integer(void) {
  struct work w = work_begin("integer");
  uint64_t seed = 88172645463325252ull, sum = 0;
  static struct entry table[1 << 15];
  static uint32_t numbers[200000];
  static uint8_t buffer[1 << 16];
  char text[512];
  for (int round = 0; round < 3; round++) {
    memset(table, 0, sizeof table);
    for (int i = 0; i < 150000; i++) {
      snprintf(text, sizeof text, "k%llx", (unsigned long long)(work_random(&seed) % 20000));
      sum += find_or_add(table, (1 << 15) - 1, text);
    }
    for (size_t i = 0; i < 200000; i++) numbers[i] = (uint32_t)work_random(&seed);
    qsort(numbers, 200000, sizeof numbers[0], compare_u32);
    sum = work_mix(sum, numbers[777] ^ numbers[199999]);
    for (size_t i = 0; i < sizeof buffer; i++) buffer[i] = (uint8_t)work_random(&seed);
    for (int k = 0; k < 4; k++) sum = work_mix(sum, crc_bits(buffer, sizeof buffer));
    for (int i = 0; i < 20000; i++) {
      char* p = text;
      for (int k = 0; k < 12; k++) {
        const uint64_t r = work_random(&seed);
        if (r & 1) *p++ = '(';
        p += sprintf(p, "%u%c%u", (unsigned)(r >> 8 & 0xffff), "+-*/"[r >> 4 & 3], (unsigned)(r >> 32 & 0xfff));
        if (r & 1) *p++ = ')';
        *p++ = "+-*"[(r >> 1) % 3];
      }
      strcpy(p, "1");
      const char* s = text;
      sum = work_mix(sum, (uint64_t)expression(&s));
    }
  }
  work_end(w);
  work_sum(w, sum, "");
}

/* --- nbody: scalar double ------------------------------------------------------------------------------------ */

struct body {
  double x[3], v[3], mass;
};

static double energy(const struct body* b, int n) {
  double e = 0;
  for (int i = 0; i < n; i++) {
    e += 0.5 * b[i].mass * (b[i].v[0] * b[i].v[0] + b[i].v[1] * b[i].v[1] + b[i].v[2] * b[i].v[2]);
    for (int j = i + 1; j < n; j++) {
      double d2 = 0;
      for (int k = 0; k < 3; k++) d2 += (b[i].x[k] - b[j].x[k]) * (b[i].x[k] - b[j].x[k]);
      e -= b[i].mass * b[j].mass / sqrt(d2);
    }
  }
  return e;
}

static void nbody(void) {
  struct body b[5];
  uint64_t seed = 4711;
  for (int i = 0; i < 5; i++) {
    b[i].mass = i == 0 ? 39.5 : 0.001 * (double)(1 + work_random(&seed) % 40);
    for (int k = 0; k < 3; k++) {
      b[i].x[k] = i == 0 ? 0 : (double)(work_random(&seed) % 60000) / 1000 - 30;
      b[i].v[k] = i == 0 ? 0 : (double)(work_random(&seed) % 2000) / 1000 - 1;
    }
  }
  struct work w = work_begin("nbody");
  for (int step = 0; step < 2000000; step++) {
    for (int i = 0; i < 5; i++) {
      for (int j = i + 1; j < 5; j++) {
        const double dx = b[i].x[0] - b[j].x[0], dy = b[i].x[1] - b[j].x[1], dz = b[i].x[2] - b[j].x[2];
        const double d2 = dx * dx + dy * dy + dz * dz + 0.01;
        const double mag = 0.001 / (d2 * sqrt(d2));
        b[i].v[0] -= dx * b[j].mass * mag;
        b[i].v[1] -= dy * b[j].mass * mag;
        b[i].v[2] -= dz * b[j].mass * mag;
        b[j].v[0] += dx * b[i].mass * mag;
        b[j].v[1] += dy * b[i].mass * mag;
        b[j].v[2] += dz * b[i].mass * mag;
      }
    }
    for (int i = 0; i < 5; i++)
      for (int k = 0; k < 3; k++) b[i].x[k] += 0.001 * b[i].v[k];
  }
  const double e = energy(b, 5);
  uint64_t sum;
  memcpy(&sum, &e, 8);
  work_end(w);
  work_sum(w, sum, "");
}

/* --- matmul: float vectors, AVX2 where the CPU has it, else SSE; the results are the same ------------------- */

#define N 512
static float ma[N][N], mb[N][N], mc[N][N];

#define MULTIPLY(name, attribute)                                     \
  attribute static void name(void) {                                  \
    for (int i = 0; i < N; i++) {                                     \
      memset(mc[i], 0, sizeof mc[i]);                                 \
      for (int k = 0; k < N; k++) {                                   \
        const float a = ma[i][k];                                     \
        for (int j = 0; j < N; j++) mc[i][j] += a * mb[k][j];         \
      }                                                               \
    }                                                                 \
  }
MULTIPLY(multiply_avx2, __attribute__((target("avx2"), optimize("O3"), noinline)))
MULTIPLY(multiply_sse, __attribute__((optimize("O3"), noinline)))

static void matmul(void) {
  uint64_t seed = 99;
  for (int i = 0; i < N; i++)
    for (int j = 0; j < N; j++) {
      ma[i][j] = (float)(work_random(&seed) % 1000) / 1000;
      mb[i][j] = (float)(work_random(&seed) % 1000) / 1000;
    }
  const int avx2 = __builtin_cpu_supports("avx2");
  struct work w = work_begin("matmul");
  uint64_t sum = 0;
  for (int round = 0; round < 12; round++) {
    if (avx2) multiply_avx2();
    else multiply_sse();
    uint32_t bits;
    memcpy(&bits, &mc[17][round * 31 + 5], 4);
    sum = work_mix(sum, bits);
    ma[round][3] += 1;
  }
  work_end(w);
  work_sum(w, sum, avx2 ? "with=avx2" : "with=sse");
}

/* --- chase-l1, chase-dram: a pointer chase through a random cycle of cache lines ----------------------------- */

static void chase(const char* name, size_t lines, long steps) {
  struct line {
    struct line* next;
    uint64_t number, pad[6];
  };
  struct line* base = mmap(NULL, lines * sizeof(struct line), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint32_t* order = malloc(lines * sizeof *order);
  if (base == MAP_FAILED || order == NULL) work_fail(name);
  uint64_t seed = 12345;
  for (size_t i = 0; i < lines; i++) order[i] = (uint32_t)i;
  for (size_t i = lines - 1; i > 0; i--) { /* Sattolo: one cycle */
    const size_t j = work_random(&seed) % i;
    const uint32_t t = order[i];
    order[i] = order[j];
    order[j] = t;
  }
  for (size_t i = 0; i < lines; i++) {
    base[i].next = &base[order[i]];
    base[i].number = i;
  }
  struct work w = work_begin(name);
  struct line* p = base;
  for (long i = 0; i < steps; i++) p = p->next;
  work_end(w);
  work_sum(w, p->number, "");
}

/* --- the kernel's hot paths ----------------------------------------------------------------------------------- */

static void null_syscall(void) {
  struct work w = work_begin("syscall");
  long sum = 0;
  for (int i = 0; i < 500000; i++) sum += syscall(SYS_getppid) > 0;
  work_end(w);
  work_sum(w, (uint64_t)sum, "calls=500000");
}

static void page_fault(void) {
  const size_t pages = 40000, size = pages * 4096;
  uint8_t* p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) work_fail("mmap");
  madvise(p, size, MADV_NOHUGEPAGE);
  struct work w = work_begin("fault");
  for (size_t i = 0; i < pages; i++) p[i * 4096] = (uint8_t)(i + 1);
  uint64_t sum = 0;
  for (size_t i = 0; i < pages; i++) sum += p[i * 4096];
  work_end(w);
  work_sum(w, sum, "");
}

static int wait_for(pid_t child) {
  int status;
  if (child < 0 || waitpid(child, &status, 0) != child) work_fail("fork");
  return WEXITSTATUS(status);
}

static void fork_wait(void) {
  struct work w = work_begin("fork");
  uint64_t sum = 0;
  for (int i = 0; i < 500; i++) {
    const pid_t child = fork();
    if (child == 0) _exit(i & 63);
    sum = work_mix(sum, (uint64_t)wait_for(child));
  }
  work_end(w);
  work_sum(w, sum, "");
}

static void fork_exec(void) {
  struct work w = work_begin("exec");
  uint64_t sum = 0;
  for (int i = 0; i < 200; i++) {
    const pid_t child = fork();
    if (child == 0) {
      execl("/bin/true", "true", (char*)NULL);
      _exit(99);
    }
    sum += (uint64_t)wait_for(child);
  }
  if (sum != 0) work_fail("/bin/true");
  work_end(w);
  work_sum(w, sum, "");
}

static void ping_pong(void) {
  int to[2], from[2];
  if (pipe(to) != 0 || pipe(from) != 0) work_fail("pipe");
  struct work w = work_begin("pipe");
  const pid_t child = fork();
  uint32_t v;
  if (child == 0) {
    close(to[1]);
    close(from[0]);
    while (read(to[0], &v, 4) == 4) {
      v = v * 3 + 1;
      if (write(from[1], &v, 4) != 4) _exit(1);
    }
    _exit(0);
  }
  close(to[0]);
  close(from[1]);
  uint64_t sum = 0;
  for (uint32_t i = 0; i < 20000; i++) {
    v = i;
    if (write(to[1], &v, 4) != 4 || read(from[0], &v, 4) != 4) work_fail("pipe");
    sum = work_mix(sum, v);
  }
  close(to[1]);
  sum += (uint64_t)wait_for(child);
  work_end(w);
  work_sum(w, sum, "");
}

int main(int argc, char** argv) {
  const char* name = argc == 2 ? argv[1] : "";
  if (strcmp(name, "integer") == 0) integer();
  else if (strcmp(name, "nbody") == 0) nbody();
  else if (strcmp(name, "matmul") == 0) matmul();
  else if (strcmp(name, "chase-l1") == 0) chase(name, 256, 100000007);
  else if (strcmp(name, "chase-dram") == 0) chase(name, 4u << 20, 1500000);
  else if (strcmp(name, "syscall") == 0) null_syscall();
  else if (strcmp(name, "fault") == 0) page_fault();
  else if (strcmp(name, "fork") == 0) fork_wait();
  else if (strcmp(name, "exec") == 0) fork_exec();
  else if (strcmp(name, "pipe") == 0) ping_pong();
  else {
    fprintf(stderr, "micro: no workload '%s'\n", name);
    return 2;
  }
  return 0;
}
