/* Boots a guest of seven bytes with libring3: it adds two numbers and writes the sum to a port.
 *
 *   cc tiny_guest.c $(pkg-config --cflags --libs ring3) -o tiny_guest && ./tiny_guest
 */
#include <ring3/ring3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const unsigned char guest[] = {
    0xb0, 40,   /* mov al, 40 */
    0x04, 2,    /* add al, 2 */
    0xe6, 0x10, /* out 0x10, al */
    0xf4,       /* hlt */
};

static void check(long result, const char *what) {
  if (result >= 0) return;
  fprintf(stderr, "%s: %s (%ld)\n", what, strerror((int)-result), result);
  exit(1);
}

int main(void) {
  ring3_kvm *system, *vm, *vcpu;
  check(ring3_open(NULL, 0, &system), "ring3_open");
  check(ring3_create(system, KVM_CREATE_VM, 0, &vm), "KVM_CREATE_VM");
  void *memory = aligned_alloc(4096, 4096);
  if (memory == NULL) return 1;
  memcpy(memory, guest, sizeof guest);
  check(ring3_set_memory(vm, 0, 0x1000, memory, 4096, 0), "memory");
  check(ring3_create(vm, KVM_CREATE_VCPU, 0, &vcpu), "KVM_CREATE_VCPU");

  struct kvm_sregs sregs;
  check(ring3_ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  check(ring3_ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
  struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
  check(ring3_ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");

  struct kvm_run *run = ring3_run_page(vcpu);
  for (;;) {
    check(ring3_run(vcpu), "KVM_RUN");
    if (run->exit_reason == KVM_EXIT_HLT) break;
    if (run->exit_reason != KVM_EXIT_IO) {
      fprintf(stderr, "unexpected exit %u\n", run->exit_reason);
      return 1;
    }
    printf("port 0x%x: %u\n", run->io.port, *((unsigned char *)run + run->io.data_offset));
  }
  puts("the guest halted");
  ring3_close(vcpu);
  ring3_close(vm);
  ring3_close(system);
  free(memory);
  return 0;
}
