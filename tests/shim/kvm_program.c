/* A VMM of the smallest kind, through /dev/kvm alone: run under `ring3 with`. Ends with status 0 and "all passed".
 *
 * The guest is 16-bit code; each check names what the kernel's KVM does and the shim has to. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      printf("line %d: %s does not hold (errno %d)\n", __LINE__, #condition, errno);       \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

static int vm, vcpu;
static struct kvm_run *run;
static unsigned char *memory;

static void set_ip(unsigned ip) {
  struct kvm_regs regs = {.rip = ip, .rflags = 2, .rsp = 0x800};
  CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static volatile int handled;
static volatile pthread_t handled_on;
static void handler(int sig) {
  (void)sig;
  handled++;
  handled_on = pthread_self();
}
static sigjmp_buf away;
static void leaving_handler(int sig) { siglongjmp(away, sig); }

static void *kicker(void *target) {
  usleep(100000);
  pthread_kill(*(pthread_t *)target, SIGUSR1);
  return NULL;
}

static void run_and_kick(void) {
  pthread_t self = pthread_self(), thread;
  pthread_create(&thread, NULL, kicker, &self);
  const int result = ioctl(vcpu, KVM_RUN, 0);
  const int error = errno;
  pthread_join(thread, NULL);
  CHECK(result == -1);
  CHECK(error == EINTR);
}

int main(void) {
  alarm(60);
  /* The path. */
  struct stat st;
  CHECK(access("/dev/kvm", R_OK | W_OK) == 0);
  CHECK(stat("/dev/kvm", &st) == 0 && S_ISCHR(st.st_mode));
  const int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(kvm >= 0);
  CHECK(ioctl(kvm, KVM_GET_API_VERSION, 0) == 12);
  CHECK(fcntl(kvm, F_GETFD) == FD_CLOEXEC);
  CHECK(syscall(SYS_ioctl, kvm, KVM_GET_API_VERSION, 0) == 12);
  const int copy = dup(kvm);
  CHECK(copy >= 0 && copy != kvm && ioctl(copy, KVM_GET_API_VERSION, 0) == 12);
  CHECK(close(copy) == 0);
  CHECK(ioctl(copy, KVM_GET_API_VERSION, 0) == -1 && errno == EBADF);
  CHECK(ioctl(kvm, KVM_RUN, 0) == -1 && errno == EINVAL);

  /* A VM, its memory and a vCPU. */
  vm = ioctl(kvm, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);
  CHECK(ioctl(kvm, KVM_CREATE_VM, 77) == -1 && errno == EINVAL);
  memory = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (unsigned long)memory};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  CHECK(ioctl(vm, KVM_CREATE_VCPU, 0) == -1 && errno == EEXIST);
  const int size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
  CHECK(size >= 4096);
  run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(run != MAP_FAILED);
  struct kvm_run *second = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(second != MAP_FAILED && second != run);
  CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, vm, 0) == MAP_FAILED && errno == ENODEV);
  struct kvm_sregs sregs;
  CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);

  /* An exit, seen through both mappings: mov al, 42; out 0x10, al; hlt */
  memcpy(memory + 0x1000, "\xb0\x2a\xe6\x10\xf4", 5);
  set_ip(0x1000);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == 0x10 && run->io.count == 1);
  CHECK(*((unsigned char *)run + run->io.data_offset) == 42);
  CHECK(second->exit_reason == KVM_EXIT_IO);
  CHECK(munmap(second, (size_t)size) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_HLT);

  /* Signals while the guest spins: jmp . */
  memcpy(memory + 0x2000, "\xeb\xfe", 2);
  set_ip(0x2000);
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  CHECK(sigaction(SIGUSR1, NULL, &before) == 0 && before.sa_handler == handler);
  run_and_kick();
  CHECK(handled == 1 && pthread_equal(handled_on, pthread_self()));
  run->immediate_exit = 1;
  CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
  run->immediate_exit = 0;

  /* KVM_SET_SIGNAL_MASK: a blocked signal ends KVM_RUN and stays pending; no handler is needed for that. */
  for (int with_handler = 1; with_handler >= 0; with_handler--) {
    struct sigaction dfl = {.sa_handler = SIG_DFL};
    CHECK(sigaction(SIGUSR1, with_handler ? &action : &dfl, NULL) == 0);
    sigset_t usr1, pending;
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    CHECK(pthread_sigmask(SIG_BLOCK, &usr1, NULL) == 0);
    struct {
      struct kvm_signal_mask head;
      unsigned char set[8];
    } mask = {.head.len = 8};
    CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
    handled = 0;
    run_and_kick();
    CHECK(handled == 0);
    CHECK(sigpending(&pending) == 0 && sigismember(&pending, SIGUSR1) == 1);
    const struct timespec none = {0, 0};
    CHECK(sigtimedwait(&usr1, NULL, &none) == SIGUSR1);
    CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
    CHECK(pthread_sigmask(SIG_UNBLOCK, &usr1, NULL) == 0);
  }

  CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, (void *)8) == -1 && errno == EFAULT);
  struct kvm_signal_mask odd = {.len = 4};
  CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &odd) == -1 && errno == EINVAL);

  /* A handler that does not return, and the vCPU goes on. */
  action.sa_handler = leaving_handler;
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  pthread_t self = pthread_self(), thread;
  pthread_create(&thread, NULL, kicker, &self);
  if (sigsetjmp(away, 1) == 0) {
    ioctl(vcpu, KVM_RUN, 0);
    CHECK(0);
  }
  pthread_join(thread, NULL);
  set_ip(0x1000);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_IO);

  /* The program's own fault handler, with the engine's in front of it. */
  action.sa_handler = leaving_handler;
  CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
  if (sigsetjmp(away, 1) == 0) {
    volatile int *volatile nowhere = (volatile int *)16;
    *nowhere = 1;
    CHECK(0);
  }

  /* A child: the VM is its parent's; /dev/kvm is open to it as to anyone. */
  const pid_t child = fork();
  if (child == 0) {
    if (ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) != -1 || errno != EIO) _exit(1);
    if (ioctl(kvm, KVM_GET_API_VERSION, 0) != 12) _exit(2);
    close(vcpu);
    close(vm);
    const int other = ioctl(kvm, KVM_CREATE_VM, 0);
    _exit(other >= 0 && ioctl(other, KVM_CREATE_VCPU, 0) >= 0 ? 0 : 3);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_HLT);

  /* Everything else is left alone. */
  const int other = open("/dev/null", O_RDWR);
  CHECK(other >= 0 && ioctl(other, KVM_GET_API_VERSION, 0) == -1 && errno == ENOTTY);
  CHECK(close(other) == 0);

  /* PIO round trips: out 0x10, al; jmp back */
  memcpy(memory + 0x3000, "\xe6\x10\xeb\xfc", 4);
  set_ip(0x3000);
  struct timespec begin, end;
  const int rounds = 200000;
  clock_gettime(CLOCK_MONOTONIC, &begin);
  for (int i = 0; i < rounds; i++) CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  clock_gettime(CLOCK_MONOTONIC, &end);
  printf("PIO exit and back: %.0f ns\n",
         ((double)(end.tv_sec - begin.tv_sec) * 1e9 + (double)(end.tv_nsec - begin.tv_nsec)) / rounds);
  CHECK(close(vcpu) == 0 && close(vm) == 0 && close(kvm) == 0);
  puts("all passed");
  return 0;
}
