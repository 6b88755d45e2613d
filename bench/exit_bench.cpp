// What an exit to the VMM and back costs, and what a VM costs to make: a tiny guest on libring3, in CPU time of this thread.
//
//   exit_bench [interpreter|translator]
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string>

#include "ring3/ring3.h"

namespace {

double cpu_ns() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) * 1e9 + static_cast<double>(t.tv_nsec);
}

void need(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "exit_bench: %s: %s\n", what, ring3_error());
  std::exit(1);
}

kvm_segment flat(bool code) {
  kvm_segment s{};
  s.limit = 0xffffffff;
  s.selector = code ? 8 : 16;
  s.type = code ? 11 : 3;
  s.present = s.s = s.g = 1;
  s.l = code;
  s.db = !code;
  return s;
}

/// 64-bit code at 0x3000, the first 2 MiB mapped one to one, the GiB above too, of which nothing is memory.
void start(ring3_kvm* vcpu, unsigned char* memory, const unsigned char* code, std::size_t size) {
  std::memcpy(memory + 0x3000, code, size);
  const unsigned long long tables[] = {0x5003, 0x6003, 0x83, 0x40000083};
  std::memcpy(memory + 0x4000, &tables[0], 8);
  std::memcpy(memory + 0x5000, &tables[1], 8);
  std::memcpy(memory + 0x5008, &tables[3], 8);
  std::memcpy(memory + 0x6000, &tables[2], 8);
  kvm_sregs s;
  need(ring3_ioctl(vcpu, KVM_GET_SREGS, &s) == 0, "KVM_GET_SREGS");
  s.cs = flat(true);
  s.ds = s.es = s.ss = s.fs = s.gs = flat(false);
  s.cr3 = 0x4000;
  s.cr4 = 0x620;
  s.efer = 0x500;
  s.cr0 = 0x80000033;
  need(ring3_ioctl(vcpu, KVM_SET_SREGS, &s) == 0, "KVM_SET_SREGS");
  kvm_regs r{};
  r.rip = 0x3000;
  r.rsp = 0x2000;
  r.rflags = 2;
  r.rbx = 0x40000000;
  need(ring3_ioctl(vcpu, KVM_SET_REGS, &r) == 0, "KVM_SET_REGS");
}

void measure(const char* what, ring3_kvm* vcpu, unsigned reason) {
  constexpr int kRounds = 200'000;
  double best = 1e18;
  for (int pass = 0; pass < 3; pass++) {
    const double begin = cpu_ns();
    for (int i = 0; i < kRounds; i++) need(ring3_run(vcpu) == 0 && ring3_run_page(vcpu)->exit_reason == reason, what);
    const double each = (cpu_ns() - begin) / kRounds;
    if (each < best) best = each;
  }
  std::printf("%-28s %6.0f ns\n", what, best);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string options = argc > 1 ? std::string("engine=") + argv[1] : "";
  const double begin = cpu_ns();
  ring3_kvm *system = nullptr, *vm = nullptr, *vcpu = nullptr;
  need(ring3_open(options.c_str(), RING3_SIGNALS_ANNOUNCED, &system) == 0, "ring3_open");
  const double opened = cpu_ns();
  need(ring3_create(system, KVM_CREATE_VM, 0, &vm) == 0, "KVM_CREATE_VM");
  need(ring3_create(vm, KVM_CREATE_VCPU, 0, &vcpu) == 0, "KVM_CREATE_VCPU");
  std::printf("%-28s %6.0f us\n%-28s %6.0f us\n", "the engine opened", (opened - begin) / 1e3, "a VM and a vCPU made",
              (cpu_ns() - opened) / 1e3);
  auto* memory = static_cast<unsigned char*>(
      mmap(nullptr, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  need(memory != MAP_FAILED && ring3_set_memory(vm, 0, 0, memory, 0x10000, 0) == 0, "memory");

  const unsigned char out[] = {0xe6, 0x10, 0xeb, 0xfc};  // out 0x10, al; jmp back
  start(vcpu, memory, out, sizeof out);
  measure("OUT, to the VMM and back", vcpu, KVM_EXIT_IO);
  const unsigned char in[] = {0xe4, 0x10, 0xeb, 0xfc};  // in al, 0x10; jmp back
  start(vcpu, memory, in, sizeof in);
  measure("IN, to the VMM and back", vcpu, KVM_EXIT_IO);
  const unsigned char store[] = {0x89, 0x03, 0xeb, 0xfc};  // mov [rbx], eax; jmp back
  start(vcpu, memory, store, sizeof store);
  measure("MMIO store, and back", vcpu, KVM_EXIT_MMIO);

  // An ioeventfd takes the store: no exit until the loop ends. mov ecx, 200000; mov [rbx], eax; dec ecx; jnz; out 0x10, al
  const unsigned char doorbell[] = {0xb9, 0x40, 0x0d, 0x03, 0x00, 0x89, 0x03, 0xff, 0xc9, 0x75, 0xfa, 0xe6, 0x10};
  kvm_ioeventfd kick{};
  kick.addr = 0x40000000;
  kick.len = 4;
  kick.fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  need(ring3_ioctl(vm, KVM_IOEVENTFD, &kick) == 0, "KVM_IOEVENTFD");
  start(vcpu, memory, doorbell, sizeof doorbell);
  const double before = cpu_ns();
  need(ring3_run(vcpu) == 0 && ring3_run_page(vcpu)->exit_reason == KVM_EXIT_IO, "doorbells");
  const double each = (cpu_ns() - before) / 200'000;
  unsigned long long count = 0;
  need(read(kick.fd, &count, sizeof count) == sizeof count && count == 200'000, "the eventfd's count");
  std::printf("%-28s %6.0f ns\n", "ioeventfd, without an exit", each);
  ring3_close(vcpu);
  ring3_close(vm);
  ring3_close(system);
  return 0;
}
