/* Runs more and more code that has not run before, and says what each share of it took: what an engine pays to make code grow.
 *
 *   growing_code MIB [SHARES [ROUNDS]]
 *
 * MIB MiB of functions of 60 to 70 instructions each (arithmetic, loads, stores, branches) are made in memory, a share at a time, and all of a share are
 * called once in turn: nanoseconds an instruction for each share, then the same for ROUNDS more rounds (default 0) through all of it. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { kSlot = 256, kBody = 230 };

static uint64_t random_state = 88172645463325252u;

static unsigned next_random(void) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (unsigned)(random_state >> 32);
}

/* One function into 256 bytes: the number of instructions that a call of it runs. rdi points to 128 bytes of its own. */
static unsigned make_function(unsigned char* at) {
  unsigned n = 0;
  unsigned length = 0;
  while (length < kBody) {
    unsigned char code[8];
    unsigned size = 0;
    const unsigned r = next_random();
    const unsigned char offset = (unsigned char)((r >> 8) & 0x78);
    switch (r & 7) {
      case 0: memcpy(code, "\x48\x01\xc8", size = 3); break;             /* add rax, rcx */
      case 1: memcpy(code, "\x48\x31\xd0", size = 3); break;             /* xor rax, rdx */
      case 2: memcpy(code, "\x48\x8d\x44\x08", size = 4); code[size++] = offset; break; /* lea rax, [rax+rcx+n] */
      case 3: memcpy(code, "\x48\x8b\x57", size = 3); code[size++] = offset; break;     /* mov rdx, [rdi+n] */
      case 4: memcpy(code, "\x48\x89\x47", size = 3); code[size++] = offset; break;     /* mov [rdi+n], rax */
      case 5: memcpy(code, "\x48\x0f\xaf\xc2", size = 4); break;         /* imul rax, rdx */
      case 6: memcpy(code, "\x48\xff\xc1", size = 3); break;             /* inc rcx */
      default: memcpy(code, "\x48\x39\xc0\x75\x02", size = 5); ++n; break; /* cmp rax, rax; jne to the next but one, never taken */
    }
    memcpy(at + length, code, size);
    length += size;
    ++n;
  }
  memset(at + length, 0x90, 2); /* where the last of the branches would go */
  at[length + 2] = 0xc3;
  return n + 3;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static uint64_t call_all(const unsigned char* code, size_t size, uint64_t* memory) {
  uint64_t sum = 0;
  for (size_t at = 0; at < size; at += kSlot) {
    uint64_t (*function)(uint64_t*, uint64_t, uint64_t, uint64_t);
    const unsigned char* address = code + at;
    memcpy(&function, &address, sizeof function);
    sum += function(memory, at, 1, 2);
  }
  return sum;
}

int main(int argc, char** argv) {
  const size_t mib = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
  const size_t shares = argc > 2 ? strtoul(argv[2], NULL, 10) : 8;
  const size_t rounds = argc > 3 ? strtoul(argv[3], NULL, 10) : 0;
  if (mib == 0 || shares == 0 || mib % shares != 0) {
    fprintf(stderr, "growing_code: wants a number of MiB, and of shares that divides it\n");
    return 2;
  }
  const size_t share = (mib << 20) / shares;
  uint64_t memory[16] = {0};
  uint64_t sum = 0;
  unsigned char* code = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint64_t* instructions = calloc(shares, sizeof *instructions);
  if (code == MAP_FAILED || instructions == NULL) {
    fprintf(stderr, "growing_code: no memory\n");
    return 1;
  }
  for (size_t round = 0; round <= rounds; ++round) {
    for (size_t i = 0; i < shares; ++i) {
      unsigned char* const from = code + i * share;
      if (round == 0) {
        for (size_t at = 0; at < share; at += kSlot) instructions[i] += make_function(from + at);
        if (mprotect(from, share, PROT_READ | PROT_EXEC) != 0) {
          perror("growing_code: mprotect");
          return 1;
        }
      }
      const double begin = now();
      sum += call_all(from, share, memory);
      printf("growing_code: round %zu, %zu to %zu MiB: %.2f ns an instruction\n", round, i * share >> 20, (i + 1) * share >> 20,
             (now() - begin) / (double)instructions[i]);
    }
  }
  printf("growing_code: sum %016llx\n", (unsigned long long)sum);
  return 0;
}
