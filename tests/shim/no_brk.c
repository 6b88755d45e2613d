/* A VMM whose seccomp filter kills it at brk(2), as it would run on the kernel's KVM, which needs no memory of the process: the engine does.
 * Its argument says how the filter is installed: prctl or seccomp. Ends with status 0. */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/kvm.h>
#include <linux/seccomp.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CHECK(condition)                                            \
  do {                                                              \
    if (!(condition)) {                                             \
      printf("line %d: %s does not hold\n", __LINE__, #condition);  \
      exit(1);                                                      \
    }                                                               \
  } while (0)

int main(int argc, char **argv) {
  CHECK(argc == 2);
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(kvm >= 0);
  const int vm = ioctl(kvm, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);
  unsigned char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  struct kvm_userspace_memory_region region = {.memory_size = 1 << 20, .userspace_addr = (unsigned long)memory};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  const int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  struct kvm_run *run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(run != MAP_FAILED);

  struct sock_filter rules[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_brk, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {.len = sizeof rules / sizeof *rules, .filter = rules};
  CHECK(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  if (strcmp(argv[1], "prctl") == 0) {
    CHECK(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
  } else {
    CHECK(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) == 0);
  }

  /* More than stood in the heap before, in pieces that malloc takes from it. */
  for (int i = 0; i < 20000; i++) {
    char *piece = malloc(1000);
    CHECK(piece != NULL);
    memset(piece, i, 1000);
    if (i % 3 == 0) free(piece);
  }
  CHECK(sbrk(4096) == (void *)-1);

  /* A jump at each of many addresses, then port 0xf4: much code to translate. */
  for (unsigned at = 0x1000; at < 0xe000; at += 16) {
    memory[at] = 0xe9; /* JMP to the next, 16 bytes on */
    memory[at + 1] = 16 - 3;
    memory[at + 2] = 0;
  }
  memcpy(memory + 0xe000, "\xe6\xf4", 2);
  struct kvm_sregs sregs;
  CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
  for (int i = 0; i < 50; i++) {
    struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
    CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
    CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
    CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == 0xf4);
  }
  puts("all passed");
  return 0;
}
