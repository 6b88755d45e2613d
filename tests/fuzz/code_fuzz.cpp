// Random guest code in every mode, through the KVM ABI: nothing a guest executes may crash, hang or
// trip an assertion of the engine. Meant for the asan preset. A failing run prints the seed of its
// last iteration: --seed S --iterations 1 runs just that one.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/split_mix.hpp"
#include "engine/abi/provider.hpp"

namespace ring3::fuzz {
namespace {

constexpr u64 kRam = 2u << 20;
constexpr u64 kGdt = 0x1000, kIdt = 0x2000, kTss = 0x3000, kTables = 0x10000, kCode = 0x40000, kData = 0x80000,
              kStack = 0x9f000;

using Random = SplitMix64;

/// Ends every KVM_RUN after a slice: random code loops, halts and blocks.
class Watchdog {
 public:
  explicit Watchdog(kvm::Endpoint* vcpu) : vcpu_(vcpu), thread_([this] { loop(); }) {}
  ~Watchdog() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    cv_.notify_all();
    thread_.join();
  }
  void arm() {
    std::lock_guard lock(mutex_);
    deadline_ = std::chrono::steady_clock::now() + std::chrono::milliseconds(3);
    armed_ = true;
    cv_.notify_all();
  }
  /// After this no kick of an earlier arm() is under way.
  void disarm() {
    std::lock_guard lock(mutex_);
    armed_ = false;
  }

 private:
  void loop() {
    std::unique_lock lock(mutex_);
    while (!stop_) {
      if (!armed_) {
        cv_.wait(lock);
      } else if (std::chrono::steady_clock::now() >= deadline_) {
        vcpu_->kick();
        deadline_ += std::chrono::milliseconds(3);
      } else {
        cv_.wait_until(lock, deadline_);
      }
    }
  }

  kvm::Endpoint* vcpu_;
  std::mutex mutex_;
  std::condition_variable cv_;
  std::chrono::steady_clock::time_point deadline_;
  bool armed_ = false, stop_ = false;
  std::thread thread_;
};

u64 address(Random& rng) {
  switch (rng.below(8)) {
    case 0: return rng.below(kRam);
    case 1: return kData + rng.below(0x2000);
    case 2: return (kCode & ~0xfffull) + rng.below(0x3000);
    case 3: return rng.next();
    case 4: return 0xfee00000 + rng.below(0x1000);
    case 5: return 0xfec00000 + rng.below(0x20);
    case 6: return kRam - 8 + rng.below(16);
    default: return 0xffff800000000000 | rng.below(kRam);
  }
}

/// A mixture of noise and of bytes that decode to something with an effect.
void random_code(Random& rng, u8* at, u64 size) {
  static constexpr u8 kSystem[][4] = {
      {0x0f, 0x22, 0xc0, 0x90}, {0x0f, 0x22, 0xd8, 0x90}, {0x0f, 0x22, 0xe0, 0x90}, {0x0f, 0x20, 0xc0, 0x90},
      {0x0f, 0x30, 0x90, 0x90}, {0x0f, 0x32, 0x90, 0x90}, {0x0f, 0x01, 0x17, 0x90}, {0x0f, 0x01, 0x1f, 0x90},
      {0x0f, 0x00, 0x1f, 0x90}, {0x0f, 0x00, 0x17, 0x90}, {0x8e, 0xd8, 0x90, 0x90}, {0x8e, 0xd0, 0x90, 0x90},
      {0x0f, 0x01, 0x3f, 0x90}, {0x0f, 0x05, 0x90, 0x90}, {0x0f, 0x07, 0x90, 0x90}, {0x48, 0xcf, 0x90, 0x90},
      {0xcf, 0x90, 0x90, 0x90}, {0xcb, 0x90, 0x90, 0x90}, {0xcd, 0x03, 0x90, 0x90}, {0xf4, 0x90, 0x90, 0x90},
      {0xfb, 0xf4, 0x90, 0x90}, {0x0f, 0xae, 0x07, 0x90}, {0x0f, 0xae, 0x0f, 0x90}, {0x0f, 0xae, 0x27, 0x90},
      {0x0f, 0xae, 0x2f, 0x90}, {0x0f, 0x01, 0xd1, 0x90}, {0x0f, 0x21, 0xf8, 0x90}, {0x0f, 0x23, 0xf8, 0x90},
      {0x0f, 0x01, 0xca, 0x90}, {0x0f, 0x01, 0xcb, 0x90}, {0x9d, 0x90, 0x90, 0x90}, {0xff, 0x1f, 0x90, 0x90},
      {0xff, 0x2f, 0x90, 0x90}, {0xee, 0x90, 0x90, 0x90}, {0xed, 0x90, 0x90, 0x90}, {0xf3, 0x6c, 0x90, 0x90},
      {0xf3, 0x6e, 0x90, 0x90}, {0xf3, 0xa4, 0x90, 0x90}, {0xf3, 0x48, 0xab, 0x90}, {0x0f, 0x01, 0xf8, 0x90},
      {0x66, 0x0f, 0x38, 0x82}, {0x0f, 0xa2, 0x90, 0x90}, {0x0f, 0x0b, 0x90, 0x90}, {0x0f, 0x09, 0x90, 0x90}};
  u64 n = 0;
  while (n + 16 < size) {
    switch (rng.below(5)) {
      case 0: {
        std::memcpy(at + n, kSystem[rng.below(std::size(kSystem))], 4);
        n += 4;
        break;
      }
      case 1: {  // prefixes, opcode, ModRM
        static constexpr u8 kPrefixes[] = {0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x64, 0x65, 0x48, 0x4f};
        if (rng.below(2)) at[n++] = kPrefixes[rng.below(10)];
        if (rng.below(2)) at[n++] = 0x0f;
        at[n++] = static_cast<u8>(rng.next());
        at[n++] = static_cast<u8>(rng.next());
        break;
      }
      case 2: {  // short branches keep control nearby
        at[n++] = static_cast<u8>(0x70 + rng.below(16));
        at[n++] = static_cast<u8>(rng.below(64) - 32);
        break;
      }
      case 3: {  // VEX
        at[n++] = 0xc4;
        at[n++] = static_cast<u8>(0xe0 | (1 + rng.below(3)));
        at[n++] = static_cast<u8>(rng.next());
        at[n++] = static_cast<u8>(rng.next());
        at[n++] = static_cast<u8>(rng.next());
        break;
      }
      default:
        for (int i = 0; i < 6; ++i) at[n++] = static_cast<u8>(rng.next());
    }
  }
}

kvm_segment segment(u16 selector, u64 base, u32 limit, u8 type, u8 dpl, bool db, bool l, bool s = true) {
  kvm_segment k{};
  k.selector = selector;
  k.base = base;
  k.limit = limit;
  k.type = type;
  k.dpl = dpl;
  k.present = 1;
  k.db = db;
  k.l = l;
  k.s = s;
  k.g = limit > 0xfffff;
  return k;
}

u64 descriptor(u32 base, u32 limit, u8 access, u8 flags) {
  return (limit & 0xffffu) | (static_cast<u64>(base & 0xffffff) << 16) | (static_cast<u64>(access) << 40) |
         (static_cast<u64>(limit >> 16 & 0xf) << 48) | (static_cast<u64>(flags & 0xf) << 52) |
         (static_cast<u64>(base >> 24) << 56);
}

class Fuzzer {
 public:
  explicit Fuzzer(const std::string& which) {
    auto system = engine::create_soft_system({.values = {{"engine", which}, {"code-mib", "4"}}});
    if (!system) {
      std::fprintf(stderr, "code_fuzz: %s\n", system.error().message.c_str());
      std::exit(2);
    }
    system_ = std::move(*system);
    vm_ = std::move(*system_->create(KVM_CREATE_VM, 0));
    void* p = ::mmap(nullptr, kRam, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::abort();
    ram_ = static_cast<u8*>(p);
    vm_->ioctl(KVM_CREATE_IRQCHIP, 0);
    kvm_pit_config pit{};
    vm_->ioctl(KVM_CREATE_PIT2, reinterpret_cast<u64>(&pit));
    kvm_userspace_memory_region region{};
    region.memory_size = kRam;
    region.userspace_addr = reinterpret_cast<u64>(ram_);
    if (vm_->ioctl(KVM_SET_USER_MEMORY_REGION, reinterpret_cast<u64>(&region)) != 0) std::abort();
    vcpu_ = std::move(*vm_->create(KVM_CREATE_VCPU, 0));
    alignas(kvm_cpuid2) static u8 buffer[sizeof(kvm_cpuid2) + 100 * sizeof(kvm_cpuid_entry2)];
    auto* cpuid = reinterpret_cast<kvm_cpuid2*>(buffer);
    cpuid->nent = 100;
    if (system_->ioctl(KVM_GET_SUPPORTED_CPUID, reinterpret_cast<u64>(cpuid)) != 0) std::abort();
    if (vcpu_->ioctl(KVM_SET_CPUID2, reinterpret_cast<u64>(cpuid)) != 0) std::abort();
    watchdog_ = std::make_unique<Watchdog>(vcpu_.get());
  }
  ~Fuzzer() {
    watchdog_.reset();
    vcpu_.reset();
    vm_.reset();
    ::munmap(ram_, kRam);
  }

  void iteration(u64 seed) {
    Random rng(seed);
    prepare_memory(rng);
    prepare_state(rng);
    kvm_run* run = vcpu_->run_page();
    watchdog_->arm();
    for (int exits = 0; exits < 60; ++exits) {
      const long r = vcpu_->ioctl(KVM_RUN, 0);
      if (r == -EINTR) break;
      if (r < 0) break;  // an impossible state is refused, as the kernel would
      ++exits_[run->exit_reason < 64 ? run->exit_reason : 63];
      if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_IN) {
        u8* data = reinterpret_cast<u8*>(run) + run->io.data_offset;
        for (u32 i = 0; i < run->io.size * run->io.count && i < 4096; ++i) data[i] = static_cast<u8>(rng.next());
      } else if (run->exit_reason == KVM_EXIT_MMIO && !run->mmio.is_write) {
        for (u8& b : run->mmio.data) b = static_cast<u8>(rng.next());
      } else if (run->exit_reason == KVM_EXIT_SHUTDOWN || run->exit_reason == KVM_EXIT_INTERNAL_ERROR) {
        break;
      }
      if (rng.one_in(8)) inject(rng);
    }
    watchdog_->disarm();
    run->immediate_exit = 1;  // complete what is pending
    vcpu_->ioctl(KVM_RUN, 0);
    run->immediate_exit = 0;
  }

  const u64* exits() const { return exits_; }

 private:
  void inject(Random& rng) {
    kvm_irq_level level{};
    level.irq = static_cast<u32>(rng.below(26));
    level.level = static_cast<u32>(rng.below(2));
    vm_->ioctl(KVM_IRQ_LINE, reinterpret_cast<u64>(&level));
    if (rng.one_in(4)) vcpu_->ioctl(KVM_NMI, 0);
    if (rng.one_in(4)) {
      kvm_msi msi{};
      msi.address_lo = static_cast<u32>(0xfee00000 | (rng.next() & 0xff01c));
      msi.data = static_cast<u32>(rng.next() & 0xcfff);
      vm_->ioctl(KVM_SIGNAL_MSI, reinterpret_cast<u64>(&msi));
    }
  }

  void put(u64 gpa, u64 value) { std::memcpy(ram_ + gpa, &value, 8); }

  void prepare_memory(Random& rng) {
    for (u64 i = 0; i < 0x2000; i += 8) put(kData + i, rng.below(3) ? address(rng) : rng.next());
    random_code(rng, ram_ + kCode, 0x2000);
    for (u64 i = 0; i < 0x400; i += 4) put(i, (kCode >> 4) << 16 | rng.below(0x1000));  // IVT
    // GDT: sane first, then noise.
    const u64 sane[] = {0, descriptor(0, 0xfffff, 0x9b, 0xc), descriptor(0, 0xfffff, 0x9b, 0xa), descriptor(0, 0xfffff, 0x93, 0xc),
                        descriptor(0, 0xfffff, 0xfb, 0xc), descriptor(0, 0xfffff, 0xf3, 0xc), descriptor(0, 0xfffff, 0xfb, 0xa),
                        descriptor(kCode, 0xffff, 0x9b, 0), descriptor(kData, 0xffff, 0x93, 0), descriptor(kTss, 0x67, 0x8b, 0), 0};
    for (u64 i = 0; i < 512; ++i) put(kGdt + 8 * i, i < std::size(sane) ? sane[i] : rng.next());
    for (u64 i = 0; i < 512; ++i) {
      const u64 to = kCode + rng.below(0x1800);
      const u64 access = rng.one_in(8) ? rng.below(256) : 0x8e | (rng.below(2) ? 0x60 : 0);
      const u64 gate = (to & 0xffff) | (rng.one_in(8) ? rng.below(0x80) : 0x10) << 16 | access << 40 | (to >> 16 & 0xffff) << 48 |
                       (rng.one_in(8) ? rng.below(8) << 32 : 0);
      put(kIdt + 8 * i, rng.one_in(16) ? rng.next() : gate);
    }
    for (u64 i = 0; i < 0x100; i += 8) put(kTss + i, rng.below(2) ? kStack - rng.below(64) : rng.next());
    // Four levels that map everything one to one, with random holes and permissions.
    std::memset(ram_ + kTables, 0, 0x8000);
    const u64 pml4 = kTables, pdpt = kTables + 0x1000, pd = kTables + 0x2000, pt = kTables + 0x3000;
    put(pml4, pdpt | 7);
    put(pml4 + 8 * 256, pdpt | 7);
    put(pdpt, pd | 7);
    put(pdpt + 24, (kTables + 0x4000) | 7);
    put(kTables + 0x4000 + 8 * 502, 0xfec00000 | 0x87);
    put(kTables + 0x4000 + 8 * 503, 0xfee00000 | 0x87);
    put(pd, pt | 7);
    for (u64 i = 1; i < 512; ++i) put(pd + 8 * i, rng.one_in(3) ? rng.next() : (i << 21) | 0x87);
    for (u64 i = 0; i < 512; ++i) {
      u64 e = (i << 12) | 7;
      if (rng.one_in(16)) e ^= rng.next() & 0x8000000000000fff;
      if (rng.one_in(64)) e = rng.next();
      put(pt + 8 * i, e);
    }
  }

  void prepare_state(Random& rng) {
    kvm_sregs s{};
    vcpu_->ioctl(KVM_GET_SREGS, reinterpret_cast<u64>(&s));
    const unsigned mode = static_cast<unsigned>(rng.below(8));  // 0,1 real; 2 v86; 3 prot16; 4 prot32; 5 compat; 6,7 long
    const u8 dpl = rng.below(3) == 0 ? 3 : 0;
    s.cr0 = 0x10 | (rng.below(2) ? 0x20 : 0);
    s.cr4 = 0x600 | (rng.below(2) ? 1u << 18 : 0);
    s.efer = 0;
    s.cr3 = kTables;
    s.cr2 = rng.next();
    s.gdt.base = kGdt;
    s.gdt.limit = 0xfff;
    s.idt.base = mode < 2 ? 0 : kIdt;
    s.idt.limit = 0xfff;
    s.tr = segment(0x48, kTss, 0x67, 11, 0, false, false, false);
    s.ldt = segment(0, 0, 0, 2, 0, false, false, false);
    kvm_regs r{};
    for (__u64* g : {&r.rax, &r.rbx, &r.rcx, &r.rdx, &r.rsi, &r.rdi, &r.rbp, &r.r8, &r.r9, &r.r10, &r.r11, &r.r12, &r.r13, &r.r14, &r.r15})
      *g = rng.below(3) ? address(rng) : rng.below(2) ? rng.below(300) : rng.next();
    r.rsp = kStack;
    r.rip = kCode + rng.below(0x1000);
    r.rflags = 2 | (rng.next() & 0x0cd5) | (rng.below(2) ? 0x200 : 0) | (rng.one_in(16) ? 0x100 : 0) | (rng.one_in(8) ? 0x3000 : 0);
    if (mode < 2 || mode == 2) {
      const u8 d = mode == 2 ? 3 : 0;
      s.cs = segment(kCode >> 4, kCode, 0xffff, mode == 2 ? 3 : 11, d, false, false);
      s.ss = segment(kData >> 4, kData, 0xffff, 3, d, false, false);
      s.ds = s.es = s.fs = s.gs = s.ss;
      r.rip &= 0x1fff;
      r.rsp = 0xf000;
      if (mode == 2) {
        s.cr0 |= 1;
        r.rflags |= 0x20000;
      }
    } else if (mode == 3) {
      s.cr0 |= 1;
      s.cs = segment(0x38 | dpl, kCode, 0xffff, 11, dpl, false, false);
      s.ss = segment(0x40 | dpl, kData, 0xffff, 3, dpl, false, false);
      s.ds = s.es = s.fs = s.gs = s.ss;
      r.rip &= 0x1fff;
      r.rsp = 0xf000;
    } else {
      const bool l = mode >= 6;
      s.cr0 |= 1;
      s.cs = segment(l ? (dpl ? 0x33 : 0x10) : (dpl ? 0x23 : 0x08), 0, 0xffffffff, 11, dpl, !l, l);
      s.ss = segment(dpl ? 0x2b : 0x18, 0, 0xffffffff, 3, dpl, true, false);
      s.ds = s.es = s.fs = s.gs = s.ss;
      if (mode >= 5) {
        s.cr0 |= 0x80000000;
        s.cr4 |= 0x20 | (rng.below(2) ? 1u << 7 : 0) | (rng.one_in(4) ? 3u << 20 : 0);
        s.efer = 0xd01;
      }
      if (rng.below(2)) s.cr0 |= 0x10000;
    }
    vcpu_->ioctl(KVM_SET_SREGS, reinterpret_cast<u64>(&s));
    vcpu_->ioctl(KVM_SET_REGS, reinterpret_cast<u64>(&r));
    kvm_fpu f{};
    f.fcw = static_cast<u16>(rng.below(4) ? 0x37f : rng.next());
    f.mxcsr = static_cast<u32>(rng.below(4) ? 0x1f80 : rng.next() & 0xffff);
    for (auto& x : f.xmm)
      for (u8& b : x) b = static_cast<u8>(rng.next());
    vcpu_->ioctl(KVM_SET_FPU, reinterpret_cast<u64>(&f));
    kvm_xcrs x{};
    x.nr_xcrs = 1;
    x.xcrs[0].value = rng.below(4) ? 7 : 1;
    vcpu_->ioctl(KVM_SET_XCRS, reinterpret_cast<u64>(&x));
    kvm_debugregs d{};
    d.dr6 = 0xffff0ff0;
    d.dr7 = 0x400;
    if (rng.one_in(6)) {
      for (auto& b : d.db) b = address(rng);
      d.dr7 |= rng.next() & 0xffff03ff;
    }
    vcpu_->ioctl(KVM_SET_DEBUGREGS, reinterpret_cast<u64>(&d));
    kvm_vcpu_events e{};
    vcpu_->ioctl(KVM_SET_VCPU_EVENTS, reinterpret_cast<u64>(&e));
    kvm_mp_state m{};
    m.mp_state = KVM_MP_STATE_RUNNABLE;
    vcpu_->ioctl(KVM_SET_MP_STATE, reinterpret_cast<u64>(&m));
  }

  std::unique_ptr<kvm::Endpoint> system_, vm_, vcpu_;
  std::unique_ptr<Watchdog> watchdog_;
  u8* ram_ = nullptr;
  u64 exits_[64] = {};
};

/// What a crash leaves for the reader: the seed of the iteration it happened in.
std::atomic<u64> g_current{0};
void print_seed() {
  char buf[80];
  const int n = std::snprintf(buf, sizeof buf, "code_fuzz: last seed %llu\n", static_cast<unsigned long long>(g_current.load()));
  if (::write(2, buf, static_cast<std::size_t>(n)) < 0) return;
}

int worker(const std::string& which, u64 seed, double seconds, u64 iterations) {
  std::signal(SIGABRT, [](int) {
    print_seed();
    std::signal(SIGABRT, SIG_DFL);
    std::raise(SIGABRT);
  });
  std::signal(SIGALRM, [](int) {
    print_seed();
    const char hung[] = "code_fuzz: an iteration hung\n";
    if (::write(2, hung, sizeof hung - 1) < 0) _exit(4);
    _exit(3);
  });
  std::atexit(print_seed);
  Fuzzer fuzzer(which);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  u64 n = 0;
  while (iterations ? n < iterations : std::chrono::steady_clock::now() < end) {
    g_current = seed + n;
    ::alarm(20);
    fuzzer.iteration(seed + n);
    ++n;
  }
  ::alarm(0);
  std::printf("code_fuzz: %llu iterations from seed %llu; exits:", static_cast<unsigned long long>(n), static_cast<unsigned long long>(seed));
  for (unsigned i = 0; i < 64; ++i)
    if (fuzzer.exits()[i]) std::printf(" %u×%llu", i, static_cast<unsigned long long>(fuzzer.exits()[i]));
  std::printf("\n");
  return n == 0;
}

}  // namespace
}  // namespace ring3::fuzz

int main(int argc, char** argv) {
  double seconds = 10;
  ring3::u64 seed = static_cast<ring3::u64>(std::chrono::system_clock::now().time_since_epoch().count()), iterations = 0;
  int jobs = 1;
  std::string which = "translator";
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string a = argv[i];
    if (a == "--seconds") seconds = std::atof(argv[i + 1]);
    else if (a == "--seed") seed = std::strtoull(argv[i + 1], nullptr, 0);
    else if (a == "--iterations") iterations = std::strtoull(argv[i + 1], nullptr, 0);
    else if (a == "--jobs") jobs = std::atoi(argv[i + 1]);
    else if (a == "--engine") which = argv[i + 1];
    else {
      std::fprintf(stderr, "code_fuzz: --seconds N --seed N --iterations N --jobs N --engine translator|interpreter\n");
      return 2;
    }
  }
  if (jobs <= 1) return ring3::fuzz::worker(which, seed, seconds, iterations);
  std::vector<pid_t> pids;
  for (int j = 0; j < jobs; ++j) {
    const pid_t pid = ::fork();
    if (pid == 0) return ring3::fuzz::worker(which, seed + static_cast<ring3::u64>(j) * 1000000000, seconds, iterations);
    pids.push_back(pid);
  }
  int failed = 0;
  for (const pid_t pid : pids) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    failed |= status;
  }
  return failed != 0;
}
