#pragma once
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

/* One measurement: work_begin(), the work, work_end() with a checksum of its results. Three lines on stdout say what
 * bench/run reads:
 *   ring3-bench: begin NAME
 *   ring3-bench: end NAME WALL_MS CPU_MS
 *   ring3-bench: sum NAME CHECKSUM [KEY=VALUE]...
 * The pauses around the work let a host that watches the lines read its own clocks before the work goes on. */

struct work {
  const char* name;
  double wall, cpu;
};

static inline double work_wall(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static inline double work_usage(int who) {
  struct rusage u;
  getrusage(who, &u);
  return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
}

/* Of this process and those it waited for. */
static inline double work_cpu(void) { return work_usage(RUSAGE_SELF) + work_usage(RUSAGE_CHILDREN); }

static inline void work_pause(void) {
  struct timespec t = {0, 50 * 1000 * 1000};
  nanosleep(&t, NULL);
}

static inline struct work work_begin(const char* name) {
  struct work w;
  w.name = name;
  printf("ring3-bench: begin %s\n", name);
  fflush(stdout);
  work_pause();
  w.cpu = work_cpu();
  w.wall = work_wall();
  return w;
}

static inline void work_end(struct work w) {
  const double wall = work_wall() - w.wall, cpu = work_cpu() - w.cpu;
  printf("ring3-bench: end %s %.3f %.3f\n", w.name, wall, cpu);
  fflush(stdout);
  work_pause();
}

static inline void work_sum(struct work w, uint64_t checksum, const char* more) {
  printf("ring3-bench: sum %s %016llx %s\n", w.name, (unsigned long long)checksum, more);
  fflush(stdout);
}

/* FNV-1a over 64-bit words. */
static inline uint64_t work_mix(uint64_t hash, uint64_t value) { return (hash ^ value) * 0x100000001b3ull; }

static inline uint64_t work_random(uint64_t* state) {
  uint64_t x = *state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return *state = x;
}

static inline void work_fail(const char* what) {
  perror(what);
  exit(1);
}
