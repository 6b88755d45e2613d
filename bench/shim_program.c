/* A minimal VMM on /dev/kvm, for bench/shim_start: makes a VM and a vCPU and ends, or, with a number, prints the CPU time
 * of that many exits by OUT and back. 64-bit code, the first 2 MiB mapped one to one. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static void need(int ok, const char *what) {
  if (ok) return;
  perror(what);
  exit(1);
}

static double cpu_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

int main(int argc, char **argv) {
  const long rounds = argc > 1 ? strtol(argv[1], NULL, 0) : 0;
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  need(kvm >= 0, "/dev/kvm");
  const int vm = ioctl(kvm, KVM_CREATE_VM, 0);
  need(vm >= 0, "KVM_CREATE_VM");
  const int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  need(vcpu >= 0, "KVM_CREATE_VCPU");
  if (rounds <= 0) return 0;
  unsigned char *memory = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct kvm_run *run = mmap(NULL, (size_t)ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  need(memory != MAP_FAILED && run != MAP_FAILED, "mmap");
  struct kvm_userspace_memory_region region = {0, 0, 0, 0x10000, (unsigned long)memory};
  need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0, "KVM_SET_USER_MEMORY_REGION");
  memcpy(memory + 0x3000, "\xe6\x10\xeb\xfc", 4); /* out 0x10, al; jmp back */
  const unsigned long long tables[] = {0x5003, 0x6003, 0x83};
  for (int i = 0; i < 3; i++) memcpy(memory + 0x4000 + 0x1000 * i, &tables[i], 8);
  struct kvm_sregs s;
  need(ioctl(vcpu, KVM_GET_SREGS, &s) == 0, "KVM_GET_SREGS");
  struct kvm_segment flat = {.limit = 0xffffffff, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1};
  s.cs = flat;
  flat.type = 3;
  flat.selector = 16;
  flat.l = 0;
  flat.db = 1;
  s.ds = s.es = s.ss = s.fs = s.gs = flat;
  s.cr3 = 0x4000;
  s.cr4 = 0x620;
  s.efer = 0x500;
  s.cr0 = 0x80000033;
  need(ioctl(vcpu, KVM_SET_SREGS, &s) == 0, "KVM_SET_SREGS");
  const struct kvm_regs r = {.rip = 0x3000, .rsp = 0x2000, .rflags = 2};
  need(ioctl(vcpu, KVM_SET_REGS, &r) == 0, "KVM_SET_REGS");
  double best = 1e18;
  for (int pass = 0; pass < 5; pass++) {
    const double begin = cpu_ns();
    for (long i = 0; i < rounds; i++) need(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO, "KVM_RUN");
    const double each = (cpu_ns() - begin) / (double)rounds;
    if (each < best) best = each;
  }
  printf("OUT, to the VMM and back: %.0f ns\n", best);
  return 0;
}
