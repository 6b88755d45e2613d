#include "kvm/probe.hpp"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <thread>

#include "base/mapping.hpp"
#include "kvm/system.hpp"

extern "C" {
extern const ring3::u8 ring3_probe_guest[];
extern const ring3::u8 ring3_probe_guest_end[];
}

namespace ring3::kvm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr u64 kRam = 64 * 1024;
constexpr u64 kEntry = 0x1000;
constexpr u64 kCounter = 0x3000;
constexpr u64 kPml4 = 0x4000;
constexpr int kPatience = 10;         // times the limit, for a thread that does not get to run
constexpr u64 kInsnsPerRound = 8;  // of probe_guest.S

// Shared with the vCPU thread, which may outlive probe() when a provider ignores kicks.
struct Session {
  Mapping ram;
  std::optional<Vcpu> vcpu;
  std::optional<Vm> vm;
  std::shared_ptr<Endpoint> system;
  std::atomic<bool> done{false};
  int run_result = 0;
};

void write64(u8* at, u64 v) { std::memcpy(at, &v, sizeof v); }

u64 counter(const Session& s) {
  return __atomic_load_n(reinterpret_cast<const u64*>(s.ram.data() + kCounter), __ATOMIC_RELAXED);
}

bool offers_v2(const std::vector<kvm_cpuid_entry2>& entries) {
  constexpr u32 kLeaf1Ecx = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23;
  bool leaf1 = false;
  bool lahf = false;
  for (const auto& e : entries) {
    if (e.function == 1) leaf1 = (e.ecx & kLeaf1Ecx) == kLeaf1Ecx;
    if (e.function == 0x80000001) lahf = (e.ecx & 1) != 0;
  }
  return leaf1 && lahf;
}

Status set_up(Session& s, const std::vector<kvm_cpuid_entry2>& cpuid) {
  auto ram = Mapping::anonymous(kRam);
  if (!ram) return ram.error();
  s.ram = std::move(*ram);
  u8* p = s.ram.data();
  std::memcpy(p + kEntry, ring3_probe_guest, static_cast<std::size_t>(ring3_probe_guest_end - ring3_probe_guest));
  write64(p + kPml4, (kPml4 + 0x1000) | 3);
  write64(p + kPml4 + 0x1000, (kPml4 + 0x2000) | 3);
  write64(p + kPml4 + 0x2000, 0x83);  // one 2 MiB page, identity

  auto sys = System::create(s.system);
  if (!sys) return sys.error();
  auto vm = sys->create_vm();
  if (!vm) return vm.error();
  s.vm.emplace(std::move(*vm));
  // Needed by VMX hosts without unrestricted guest; a KVM without it will say so by failing to run.
  (void)s.vm->set_tss_addr(Gpa(0xfffbd000));
  if (auto r = s.vm->set_user_memory_region(0, Gpa(0), kRam, Hva(reinterpret_cast<u64>(p))); !r) return r;
  auto vcpu = s.vm->create_vcpu(0);
  if (!vcpu) return vcpu.error();
  s.vcpu.emplace(std::move(*vcpu));
  if (auto r = s.vcpu->set_cpuid2(cpuid); !r) return r;
  auto sregs = s.vcpu->sregs();
  if (!sregs) return sregs.error();
  for (kvm_segment* seg : {&sregs->cs, &sregs->ds, &sregs->es, &sregs->fs, &sregs->gs, &sregs->ss}) {
    seg->base = 0;
    seg->selector = 0;
  }
  if (auto r = s.vcpu->set_sregs(*sregs); !r) return r;
  kvm_regs regs{};
  regs.rip = kEntry;
  regs.rflags = 2;
  return s.vcpu->set_regs(regs);
}

Error unexpected_end(const Session& s) {
  if (s.run_result < 0) return Error::from_errno("the probe guest did not run: KVM_RUN", -s.run_result);
  return Error::of(EIO, "the probe guest stopped with exit reason " +
                            std::to_string(s.vcpu->run_page().exit_reason) + " before its loop");
}

}  // namespace

Result<ProbeResult> probe(std::shared_ptr<Endpoint> system, std::chrono::milliseconds limit) {
  auto s = std::make_shared<Session>();
  s->system = std::move(system);
  auto sys = System::create(s->system);
  if (!sys) return sys.error();
  auto cpuid = sys->supported_cpuid();
  if (!cpuid) return cpuid.error();
  ProbeResult result;
  result.x86_64_v2 = offers_v2(*cpuid);
  if (auto r = set_up(*s, *cpuid); !r) return r.error();

  std::thread runner([s] {
    // Stray signals of the embedding program end KVM_RUN too; only the watchdog's kick counts.
    do {
      s->run_result = s->vcpu->run();
    } while ((s->run_result == -EINTR || s->run_result == -EAGAIN) &&
             __atomic_load_n(&s->vcpu->run_page().immediate_exit, __ATOMIC_SEQ_CST) == 0);
    s->done.store(true);
  });

  const auto start = Clock::now();
  // On a busy host the guest's thread may not have run at all when the limit is over; it gets a while longer then.
  clockid_t runners_clock;
  const bool has_clock = pthread_getcpuclockid(runner.native_handle(), &runners_clock) == 0;
  const auto waited_enough = [&] {
    const auto waited = Clock::now() - start;
    timespec ran{};
    if (waited < limit) return false;
    if (waited >= limit * kPatience || !has_clock || clock_gettime(runners_clock, &ran) != 0) return true;
    return std::chrono::seconds(ran.tv_sec) + std::chrono::nanoseconds(ran.tv_nsec) >= limit / 2;
  };
  // Arrival in the loop, then at least half of the limit to measure in.
  while (!s->done.load() && counter(*s) == 0 && !waited_enough()) {
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  const u64 count0 = counter(*s);
  const auto t0 = Clock::now();
  const bool arrived = count0 != 0;
  if (arrived) {
    result.milliseconds_to_long_mode = std::chrono::duration<double, std::milli>(t0 - start).count();
    const auto window_end = t0 + std::max(limit / 3, std::chrono::milliseconds(1));
    while (!s->done.load() && (Clock::now() < window_end || (counter(*s) == count0 && !waited_enough()))) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  const u64 count1 = counter(*s);
  const double seconds = std::chrono::duration<double>(Clock::now() - t0).count();
  const bool ended_early = s->done.load();

  const auto patience = Clock::now() + std::chrono::seconds(2);
  while (!s->done.load() && Clock::now() < patience) {
    s->vcpu->kick();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  if (!s->done.load()) {
    runner.detach();  // the session stays alive through its own reference
    return Error::of(ETIMEDOUT, "the probe guest cannot be interrupted");
  }
  runner.join();
  if (ended_early) return unexpected_end(*s);
  if (!arrived) {
    return Error::of(ETIMEDOUT, "the probe guest did not reach its 64-bit loop within " +
                                    std::to_string(limit.count()) + " ms");
  }
  if (count1 <= count0 || seconds <= 0) return Error::of(ETIMEDOUT, "the probe guest stands still");
  result.million_insns_per_second = static_cast<double>((count1 - count0) * kInsnsPerRound) / seconds / 1e6;
  return result;
}

}  // namespace ring3::kvm
