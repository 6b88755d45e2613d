/* Reads and writes of a disk, sequential and at random, one or many in flight: the guest's side and the host's of bench/disk.
 *
 *   disk PATH MIB SECONDS JOB
 *
 * With O_DIRECT and io_submit(2), over the first MIB of PATH. Prints "JOB seconds S bytes B ios N". Jobs: fill, which comes first;
 * {seq,rand}-{read,write}-{1,32}; sequential ones move 128 KiB at a time, others 4 KiB.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { kMostDeep = 32, kLarge = 128 * 1024, kSmall = 4096 };

static void die(const char* what) {
  perror(what);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static uint64_t state = 88172645463325252u;
static uint64_t chance(void) {
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

static void job(int fd, uint64_t size, double seconds, int at_random, int writes, int depth) {
  static struct iocb blocks[kMostDeep];
  static void* buffers[kMostDeep];
  const uint64_t each = at_random ? kSmall : kLarge;
  const uint64_t places = size / each;
  aio_context_t context = 0;
  if (syscall(SYS_io_setup, kMostDeep, &context) != 0) die("io_setup");
  uint64_t next = 0, ios = 0;
  int flying = 0;
  struct iocb* idle[kMostDeep];
  int idle_count = 0;
  for (int i = 0; i < depth; i++) {
    if (buffers[i] == NULL) {
      if (posix_memalign(&buffers[i], 4096, kLarge) != 0) die("memory");
      memset(buffers[i], i + 1, kLarge);
    }
    idle[idle_count++] = &blocks[i];
  }
  const double began = now();
  double end = began;
  int over = 0;
  while (!over || flying > 0) {
    struct iocb* list[kMostDeep];
    int count = 0;
    while (!over && idle_count > 0) {
      struct iocb* b = idle[--idle_count];
      const int slot = (int)(b - blocks);
      memset(b, 0, sizeof *b);
      b->aio_lio_opcode = writes ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
      b->aio_fildes = (uint32_t)fd;
      b->aio_buf = (uint64_t)(uintptr_t)buffers[slot];
      b->aio_nbytes = each;
      b->aio_offset = (int64_t)((at_random ? chance() % places : next++ % places) * each);
      b->aio_data = (uint64_t)slot;
      list[count++] = b;
    }
    for (int sent = 0; sent < count;) {
      const long n = syscall(SYS_io_submit, context, count - sent, list + sent);
      if (n < 0 && errno != EINTR && errno != EAGAIN) die("io_submit");
      if (n > 0) sent += (int)n;
    }
    flying += count;
    struct io_event events[kMostDeep];
    const long n = syscall(SYS_io_getevents, context, 1, kMostDeep, events, NULL);
    if (n < 0 && errno != EINTR) die("io_getevents");
    for (long i = 0; i < n; i++) {
      if (events[i].res != (int64_t)each) {
        errno = (int)-events[i].res;
        die("an access");
      }
      idle[idle_count++] = &blocks[events[i].data];
      flying--;
      ios++;
    }
    end = now();
    over = end - began >= seconds;
  }
  syscall(SYS_io_destroy, context);
  printf("%s-%s-%d seconds %.3f bytes %llu ios %llu\n", at_random ? "rand" : "seq", writes ? "write" : "read", depth, end - began,
         (unsigned long long)(ios * each), (unsigned long long)ios);
  fflush(stdout);
}

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const uint64_t size = (uint64_t)atoi(argv[2]) << 20;
  const double seconds = atof(argv[3]);
  const int fd = open(argv[1], O_RDWR | O_DIRECT);
  if (fd < 0) die(argv[1]);
  if (strcmp(argv[4], "fill") != 0) {
    for (int kind = 0; kind < 8; kind++) {
      char name[32];
      const int depth = kind & 4 ? kMostDeep : 1;
      snprintf(name, sizeof name, "%s-%s-%d", kind & 2 ? "rand" : "seq", kind & 1 ? "write" : "read", depth);
      if (strcmp(name, argv[4]) != 0) continue;
      job(fd, size, seconds, kind & 2, kind & 1, depth);
      return 0;
    }
    return 2;
  }
  void* whole;
  if (posix_memalign(&whole, 4096, 1 << 20) != 0) die("memory");
  memset(whole, 7, 1 << 20);
  for (uint64_t at = 0; at < size; at += 1 << 20) {
    if (pwrite(fd, whole, 1 << 20, (off_t)at) != 1 << 20) die("write");
  }
  fsync(fd);
  puts("fill seconds 1 bytes 0 ios 0");
  return 0;
}
