/* Long doubles and MMX: x87 NAME. */
#include <math.h>
#include <string.h>

#include "work.h"

/* --- long-double: nbody's step in long double, and a polynomial ----------------------------------------------- */

struct body {
  long double x[3], v[3], mass;
};

static uint64_t bits_of(long double v) {
  uint64_t mantissa;
  memcpy(&mantissa, &v, 8);
  return mantissa;
}

static void long_double(void) {
  struct body b[5];
  uint64_t seed = 4711;
  for (int i = 0; i < 5; i++) {
    b[i].mass = i == 0 ? 39.5L : 0.001L * (long double)(1 + work_random(&seed) % 40);
    for (int k = 0; k < 3; k++) {
      b[i].x[k] = i == 0 ? 0 : (long double)(work_random(&seed) % 60000) / 1000 - 30;
      b[i].v[k] = i == 0 ? 0 : (long double)(work_random(&seed) % 2000) / 1000 - 1;
    }
  }
  struct work w = work_begin("long-double");
  for (int step = 0; step < 60000; step++) {
    for (int i = 0; i < 5; i++) {
      for (int j = i + 1; j < 5; j++) {
        const long double dx = b[i].x[0] - b[j].x[0], dy = b[i].x[1] - b[j].x[1], dz = b[i].x[2] - b[j].x[2];
        const long double d2 = dx * dx + dy * dy + dz * dz + 0.01L;
        const long double mag = 0.001L / (d2 * sqrtl(d2));
        b[i].v[0] -= dx * b[j].mass * mag;
        b[i].v[1] -= dy * b[j].mass * mag;
        b[i].v[2] -= dz * b[j].mass * mag;
        b[j].v[0] += dx * b[i].mass * mag;
        b[j].v[1] += dy * b[i].mass * mag;
        b[j].v[2] += dz * b[i].mass * mag;
      }
    }
    for (int i = 0; i < 5; i++)
      for (int k = 0; k < 3; k++) b[i].x[k] += 0.001L * b[i].v[k];
  }
  uint64_t sum = bits_of(b[1].x[0]);
  long double total = 0;
  for (int n = 0; n < 300000; n++) {
    const long double x = (long double)n / 300000;
    total += ((((x * 0.3L - 1.1L) * x + 2.7L) * x - 0.4L) * x + 1.9L) * x - floorl(x * 17);
  }
  sum = work_mix(sum, bits_of(total));
  work_end(w);
  work_sum(w, sum, "");
}

/* --- mmx: saturated sums and products of 16-bit samples ------------------------------------------------------- */

#define SAMPLES 8192

static void mmx(void) {
  static int16_t a[SAMPLES] __attribute__((aligned(8))), c[SAMPLES] __attribute__((aligned(8))), out[SAMPLES] __attribute__((aligned(8)));
  uint64_t seed = 31;
  for (int i = 0; i < SAMPLES; i++) {
    a[i] = (int16_t)work_random(&seed);
    c[i] = (int16_t)work_random(&seed);
  }
  struct work w = work_begin("mmx");
  uint64_t sum = 0;
  for (int round = 0; round < 3000; round++) {
    const uint64_t gain = 0x0001000100010001ull * (uint64_t)(1000 + round);
    uint64_t products;
    const int16_t *x = a, *y = c;
    int16_t* to = out;
    long left = SAMPLES / 4;
    /* By hand: compilers make SSE of the intrinsics. */
    __asm__ volatile(
        "movq %[gain], %%mm7\n"
        "pxor %%mm6, %%mm6\n"
        "1: movq (%[x]), %%mm0\n"
        "movq (%[y]), %%mm1\n"
        "pmulhw %%mm7, %%mm0\n"
        "movq %%mm1, %%mm2\n"
        "psraw $2, %%mm2\n"
        "paddsw %%mm2, %%mm0\n"
        "movq %%mm0, (%[to])\n"
        "pmaddwd %%mm1, %%mm0\n"
        "paddd %%mm0, %%mm6\n"
        "add $8, %[x]\n"
        "add $8, %[y]\n"
        "add $8, %[to]\n"
        "dec %[left]\n"
        "jnz 1b\n"
        "movq %%mm6, %[products]\n"
        "emms\n"
        : [x] "+r"(x), [y] "+r"(y), [to] "+r"(to), [left] "+r"(left), [products] "=m"(products)
        : [gain] "m"(gain)
        : "memory", "cc", "mm0", "mm1", "mm2", "mm6", "mm7");
    sum = work_mix(sum, products ^ (uint16_t)out[round]);
  }
  work_end(w);
  work_sum(w, sum, "");
}

int main(int argc, char** argv) {
  const char* name = argc == 2 ? argv[1] : "";
  if (strcmp(name, "long-double") == 0) long_double();
  else if (strcmp(name, "mmx") == 0) mmx();
  else {
    fprintf(stderr, "x87: no workload '%s'\n", name);
    return 2;
  }
  return 0;
}
