/* Guest memory of a VMM under `ring3 with` (argument "on"), and with `--engine-option windows=0` (argument "off"): which becomes shared,
 * and that the program does not notice. Ends with status 0 and "all passed". */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/mempolicy.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      printf("line %d: %s does not hold (errno %d)\n", __LINE__, #condition, errno);       \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

enum { kSize = 32 << 20, kPage = 4096 };

static int vm;

static unsigned char *reserve(size_t size) {
  unsigned char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(p != MAP_FAILED);
  return p;
}

static void set_slot(unsigned slot, unsigned long at, unsigned long size, void *memory) {
  struct kvm_userspace_memory_region r = {.slot = slot, .guest_phys_addr = at, .memory_size = size, .userspace_addr = (unsigned long)memory};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &r) == 0);
}

/* A vCPU in real mode that begins at ip, where code is put. */
static int make_vcpu(unsigned id, unsigned char *memory, unsigned ip, const unsigned char *code, size_t size) {
  const int vcpu = ioctl(vm, KVM_CREATE_VCPU, id);
  CHECK(vcpu >= 0);
  memcpy(memory + ip, code, size);
  struct kvm_sregs s;
  CHECK(ioctl(vcpu, KVM_GET_SREGS, &s) == 0);
  s.cs.base = s.cs.selector = 0;
  CHECK(ioctl(vcpu, KVM_SET_SREGS, &s) == 0);
  struct kvm_regs regs = {.rip = ip, .rflags = 2};
  CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
  return vcpu;
}

/* A word of the guest's stores to address 0x1000 of its memory, read by the VMM: HLT ends it. */
static void run_guest(unsigned char *memory) {
  static const unsigned char code[] = {0xc7, 0x06, 0x00, 0x10, 0x34, 0x12, 0xf4}; /* mov word [0x1000], 0x1234; hlt */
  const int vcpu = make_vcpu(0, memory, 0x100, code, sizeof code);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  CHECK(memory[0x1000] == 0x34 && memory[0x1001] == 0x12);
}

/* A guest that runs on and on, on a thread of its own. */
static int spinning;
static struct kvm_run *run;
static volatile int ended;

static void handler(int sig) { (void)sig; }

static void *spin(void *nothing) {
  int result;
  do {
    result = ioctl(spinning, KVM_RUN, 0);
  } while (result < 0 && errno == EINTR && !run->immediate_exit);
  CHECK(result < 0 && errno == EINTR);
  ended = 1;
  return nothing;
}

static pthread_t start_spinning(int system, unsigned char *memory) {
  static const unsigned char code[] = {0xff, 0x06, 0x00, 0x20, 0xeb, 0xfa}; /* again: inc word [0x2000]; jmp again */
  spinning = make_vcpu(1, memory, 0x200, code, sizeof code);
  run = mmap(NULL, (size_t)ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, spinning, 0);
  CHECK(run != MAP_FAILED);
  const struct sigaction action = {.sa_handler = handler};
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  pthread_t thread;
  CHECK(pthread_create(&thread, NULL, spin, NULL) == 0);
  volatile unsigned short *counter = (volatile unsigned short *)(memory + 0x2000);
  while (*counter == 0) usleep(1000);
  return thread;
}

/* Whether the mapping at p is shared, as /proc/self/maps has it. */
static int is_shared(const void *p) {
  FILE *f = fopen("/proc/self/maps", "r");
  char line[512];
  int result = -1;
  CHECK(f != NULL);
  while (result < 0 && fgets(line, sizeof line, f) != NULL) {
    unsigned long begin, end;
    char rights[5];
    CHECK(sscanf(line, "%lx-%lx %4s", &begin, &end, rights) == 3);
    if (begin <= (unsigned long)p && (unsigned long)p < end) result = rights[3] == 's';
  }
  fclose(f);
  CHECK(result >= 0);
  return result;
}

/* Threads that write to memory while it becomes shared, with instructions and by system calls: nothing that they write is lost. */
enum { kPages = kSize / kPage };
struct writer {
  unsigned char *memory;
  int file; /* that system calls read from; -1: with instructions */
  int lone; /* userfaultfd knows of user mode's accesses alone: a system call may fail */
  volatile int stop;
  volatile unsigned rounds;
  unsigned long last[kPages];
};

static void *write_on(void *argument) {
  struct writer *w = argument;
  for (unsigned long n = 1; !w->stop; w->rounds++) {
    for (unsigned i = 0; i < kPages; i++, n++) {
      unsigned char *at = w->memory + (size_t)i * kPage + (w->file < 0 ? 0 : 64);
      CHECK(*(volatile unsigned long *)at == w->last[i]);
      if (w->file < 0) {
        *(volatile unsigned long *)at = n;
      } else {
        CHECK(pwrite(w->file, &n, sizeof n, 0) == sizeof n);
        if (pread(w->file, at, sizeof n, 0) != sizeof n) {
          CHECK(w->lone && errno == EFAULT);
          continue;
        }
      }
      w->last[i] = n;
    }
  }
  return NULL;
}

static int has_userfaultfd(int *lone) {
  int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  *lone = fd < 0 && access("/dev/userfaultfd", R_OK | W_OK) != 0;
  if (fd < 0) fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

static void test_writers(int on) {
  static struct writer writers[2];
  int lone;
  if (!has_userfaultfd(&lone)) return; /* without userfaultfd they may lose it */
  unsigned char *memory = reserve(kSize);
  CHECK(madvise(memory, kSize, MADV_DONTFORK) == 0);
  pthread_t threads[2];
  for (int i = 0; i < 2; i++) {
    writers[i].memory = memory;
    writers[i].lone = lone;
    writers[i].file = i == 0 ? -1 : memfd_create("numbers", MFD_CLOEXEC);
    CHECK(pthread_create(&threads[i], NULL, write_on, &writers[i]) == 0);
  }
  for (int i = 0; i < 2; i++) {
    while (writers[i].rounds == 0) usleep(1000);
  }
  set_slot(4, 3ul << 32, kSize, memory);
  CHECK(is_shared(memory) == on);
  for (int i = 0; i < 2; i++) {
    const unsigned rounds = writers[i].rounds;
    while (writers[i].rounds < rounds + 2) usleep(1000);
    writers[i].stop = 1;
    CHECK(pthread_join(threads[i], NULL) == 0);
  }
  close(writers[1].file);
  set_slot(4, 3ul << 32, 0, NULL);
  CHECK(munmap(memory, kSize) == 0);
}

static unsigned resident(unsigned char *memory) {
  static unsigned char map[kPages];
  unsigned n = 0;
  CHECK(mincore(memory, kSize, map) == 0);
  for (unsigned i = 0; i < kPages; i++) n += map[i] & 1;
  return n;
}

/* Memory that was made to be there stays there, and what is only read is not; where it may lie on the host goes along. */
static void test_preallocated(void) {
  for (int full = 0; full < 2; full++) {
    unsigned char *memory = reserve(kSize);
    CHECK(madvise(memory, kSize, MADV_DONTFORK) == 0);
    unsigned long node = 1, nodes[16] = {0};
    const int bound = syscall(SYS_mbind, memory, kSize, MPOL_BIND, &node, 8 * sizeof node, 0) == 0;
    volatile unsigned char sum = 0;
    for (size_t i = 0; i < kPages; i++) {
      if (full) memory[i * kPage] = 0;
      sum += memory[i * kPage];
    }
    set_slot(4, 3ul << 32, kSize, memory);
    const unsigned there = resident(memory);
    CHECK(full ? there == kPages : is_shared(memory) == 0 || there == 0);
    int mode = -1;
    CHECK(!bound || (syscall(SYS_get_mempolicy, &mode, nodes, 8 * sizeof nodes, memory, MPOL_F_ADDR) == 0 && mode == MPOL_BIND && nodes[0] == 1));
    /* Locked memory refuses advice that takes it away. */
    if (mlock(memory, kPage) == 0) {
      memory[0] = 7;
      CHECK(madvise(memory, kPage, MADV_DONTNEED) < 0 && errno == EINVAL && memory[0] == 7);
      CHECK(munlock(memory, kPage) == 0);
    }
    set_slot(4, 3ul << 32, 0, NULL);
    CHECK(munmap(memory, kSize) == 0);
  }
}

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const int on = strcmp(argv[1], "on") == 0;
  if (on && !(__builtin_cpu_supports("avx") && __builtin_cpu_supports("bmi2"))) return 77; /* guest code is interpreted */
  const int system = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(system >= 0);
  vm = ioctl(system, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);

  /* What the program keeps from its children becomes shared as a whole, with what it holds. */
  unsigned char *memory = reserve(kSize);
  CHECK(madvise(memory, kSize, MADV_DONTFORK) == 0);
  for (unsigned i = 0; i < kSize / kPage; i += 7) memory[(size_t)i * kPage + i % kPage] = (unsigned char)(i | 1);
  set_slot(0, 0, 640 << 10, memory);
  CHECK(is_shared(memory) == on && is_shared(memory + kSize - 1) == on);
  set_slot(1, 1 << 20, kSize - (1 << 20), memory + (1 << 20));
  for (unsigned i = 0; i < kSize / kPage; i++) CHECK(memory[(size_t)i * kPage + i % kPage] == (i % 7 == 0 ? (unsigned char)(i | 1) : 0));
  run_guest(memory);

  /* Advice still means zeroes, and a page in the middle only that. */
  memset(memory + 5 * kPage, 5, 3 * kPage);
  CHECK(madvise(memory + 6 * kPage, kPage, MADV_DONTNEED) == 0);
  CHECK(memory[6 * kPage - 1] == 5 && memory[6 * kPage] == 0 && memory[7 * kPage - 1] == 0 && memory[7 * kPage] == 5);
  CHECK(madvise(memory + 5 * kPage, 3 * kPage, MADV_FREE) == 0);
  CHECK(madvise(memory + 1, kPage, MADV_DONTNEED) < 0 && errno == EINVAL);

  /* A child has none of it still. */
  const pid_t child = fork();
  if (child == 0) {
    int ends[2];
    if (pipe(ends) != 0) _exit(2);
    _exit(write(ends[1], memory, 1) < 0 && errno == EFAULT ? 0 : 1);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);

  /* What children get, small memory, and mappings of files stay as they are. */
  unsigned char *inherited = reserve(kSize), *small = reserve(1 << 20);
  CHECK(mprotect(small + (1 << 20) - kPage, kPage, PROT_NONE) == 0);
  CHECK(madvise(small, 1 << 20, MADV_DONTFORK) == 0);
  set_slot(2, 1ul << 32, kSize, inherited);
  set_slot(3, 2ul << 32, 64 << 10, small);
  CHECK(!is_shared(inherited) && !is_shared(small));

  test_writers(on);
  test_preallocated();

  /* The engine lets go of what is protected, given to userfaultfd, unmapped, while the guest runs. */
  const pthread_t thread = start_spinning(system, memory);
  CHECK(mprotect(memory + (20 << 20), 1 << 20, PROT_NONE) == 0);
  CHECK(mprotect(memory + (20 << 20), 1 << 20, PROT_READ | PROT_WRITE) == 0);
  const int faults = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
  if (faults >= 0) { /* not everybody may */
    struct uffdio_api api = {.api = UFFD_API};
    CHECK(ioctl(faults, UFFDIO_API, &api) == 0);
    /* The guest waits for a page that this thread brings; what it does before that must not wait for the guest. */
    struct uffdio_register part = {.range = {(unsigned long)memory + 0x2000, kPage}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(faults, UFFDIO_REGISTER, &part) == 0);
    CHECK(madvise(memory + 0x2000, kPage, MADV_DONTNEED) == 0);
    struct uffd_msg message;
    CHECK(read(faults, &message, sizeof message) == sizeof message && message.event == UFFD_EVENT_PAGEFAULT);
    CHECK((message.arg.pagefault.address & ~(kPage - 1ul)) == part.range.start);
    struct uffdio_register more = {.range = {(unsigned long)memory + (24 << 20), 1 << 20}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    CHECK(ioctl(faults, UFFDIO_REGISTER, &more) == 0);
    struct uffdio_zeropage zero = {.range = part.range};
    CHECK(ioctl(faults, UFFDIO_ZEROPAGE, &zero) == 0);
    while (*(volatile unsigned short *)(memory + 0x2000) == 0) usleep(1000);
    CHECK(ioctl(faults, UFFDIO_REGISTER, NULL) < 0 && errno == EFAULT);
    close(faults);
  }
  CHECK(munmap(memory + (30 << 20), 1 << 20) == 0);
  CHECK(!ended);
  run->immediate_exit = 1;
  CHECK(pthread_kill(thread, SIGUSR1) == 0 && pthread_join(thread, NULL) == 0);

  /* Another file's memory where the guest's was is none of ours: advice leaves what the file holds. */
  set_slot(1, 0, 0, NULL);
  const int file = memfd_create("other", MFD_CLOEXEC);
  CHECK(file >= 0 && ftruncate(file, 4 << 20) == 0);
  unsigned char *other = mmap(memory + (8 << 20), 4 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
  CHECK(other == memory + (8 << 20));
  memset(other, 9, 4 << 20);
  CHECK(madvise(memory + (7 << 20), 6 << 20, MADV_DONTNEED) == 0);
  CHECK(other[0] == 9 && other[(4 << 20) - 1] == 9 && memory[(7 << 20)] == 0);
  CHECK(munmap(memory, kSize) == 0);
  other = mmap(memory, kSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
  CHECK(other == memory);
  CHECK(madvise(memory, 4 << 20, MADV_DONTNEED) == 0 && memory[0] == 9);
  printf("all passed\n");
  return 0;
}
