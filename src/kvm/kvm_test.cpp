#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>

#include "base/mapping.hpp"
#include "kvm/kernel_provider.hpp"
#include "kvm/probe.hpp"
#include "kvm/system.hpp"

namespace ring3::kvm {
namespace {

// A KVM whose answers the test sets; KVM_RUN waits for a kick, or exits at once.
struct Script {
  std::map<unsigned long, long> answers;
  u32 cpuid_entries = 3;
  bool obey_kicks = true;
  bool run_waits = true;
  u32 exit_reason = KVM_EXIT_SHUTDOWN;
  std::function<void()> on_run;
  std::vector<unsigned long> calls;
  Hva ram;
  std::mutex mutex;
};

class FakeEndpoint final : public Endpoint {
 public:
  explicit FakeEndpoint(std::shared_ptr<Script> script) : script_(std::move(script)) { std::memset(page_, 0, sizeof page_); }
  long ioctl(unsigned long request, u64 arg) override {
    {
      std::lock_guard lock(script_->mutex);
      script_->calls.push_back(request);
    }
    if (request == KVM_GET_API_VERSION && !script_->answers.count(request)) return 12;
    if (request == KVM_GET_SUPPORTED_CPUID && !script_->answers.count(request)) {
      auto* c = reinterpret_cast<kvm_cpuid2*>(arg);
      if (c->nent < script_->cpuid_entries) return -E2BIG;
      c->nent = script_->cpuid_entries;
      for (u32 i = 0; i < c->nent; i++) c->entries[i].function = i;
      return 0;
    }
    if (request == KVM_SET_USER_MEMORY_REGION) {
      script_->ram = Hva(reinterpret_cast<kvm_userspace_memory_region*>(arg)->userspace_addr);
    }
    if (request == KVM_RUN) {
      if (script_->on_run) script_->on_run();
      run_page()->exit_reason = script_->exit_reason;
      std::unique_lock lock(kick_mutex_);
      if (script_->run_waits) kicked_cv_.wait(lock, [&] { return kicked_; });
      return script_->run_waits ? -EINTR : 0;
    }
    auto it = script_->answers.find(request);
    return it == script_->answers.end() ? 0 : it->second;
  }
  Result<std::unique_ptr<Endpoint>> create(unsigned long request, u64) override {
    auto it = script_->answers.find(request);
    if (it != script_->answers.end()) return Error::of(static_cast<int>(-it->second), "refused");
    return std::unique_ptr<Endpoint>(std::make_unique<FakeEndpoint>(script_));
  }
  kvm_run* run_page() override { return reinterpret_cast<kvm_run*>(page_); }
  void kick() override {
    if (!script_->obey_kicks) return;
    __atomic_store_n(&run_page()->immediate_exit, u8{1}, __ATOMIC_SEQ_CST);
    std::lock_guard lock(kick_mutex_);
    kicked_ = true;
    kicked_cv_.notify_all();
  }

 private:
  std::shared_ptr<Script> script_;
  alignas(16) u8 page_[8192];
  std::mutex kick_mutex_;
  std::condition_variable kicked_cv_;
  bool kicked_ = false;
};

TEST(System, RefusesAnotherApiVersion) {
  auto script = std::make_shared<Script>();
  script->answers[KVM_GET_API_VERSION] = 11;
  auto s = System::create(std::make_shared<FakeEndpoint>(script));
  ASSERT_FALSE(s.ok());
  EXPECT_NE(s.error().message.find("11"), std::string::npos);
}

TEST(System, GrowsTheCpuidBuffer) {
  auto script = std::make_shared<Script>();
  script->cpuid_entries = 200;
  auto s = System::create(std::make_shared<FakeEndpoint>(script));
  ASSERT_TRUE(s.ok());
  auto c = s->supported_cpuid();
  ASSERT_TRUE(c.ok());
  ASSERT_EQ(c->size(), 200u);
  EXPECT_EQ((*c).back().function, 199u);
}

TEST(Vm, ErrorsNameTheIoctl) {
  auto script = std::make_shared<Script>();
  script->answers[KVM_CREATE_IRQCHIP] = -EEXIST;
  script->answers[KVM_CREATE_VCPU] = -EMFILE;
  Vm vm(std::make_unique<FakeEndpoint>(script));
  auto r = vm.create_irqchip();
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.error().code, EEXIST);
  EXPECT_NE(r.error().message.find("KVM_CREATE_IRQCHIP"), std::string::npos);
  auto v = vm.create_vcpu(3);
  ASSERT_FALSE(v.ok());
  EXPECT_EQ(v.error().code, EMFILE);
}

TEST(Vcpu, MsrThatIsNotTakenIsNamed) {
  auto script = std::make_shared<Script>();
  script->answers[KVM_SET_MSRS] = 1;
  Vcpu vcpu(std::make_unique<FakeEndpoint>(script));
  kvm_msr_entry e[2] = {};
  e[1].index = 0x1a0;
  auto r = vcpu.set_msrs(e);
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message.find("0x1a0"), std::string::npos);
  EXPECT_TRUE(vcpu.set_msrs(std::span(e, 1)).ok());
}

TEST(Vcpu, IoDataStaysInTheMapping) {
  auto script = std::make_shared<Script>();
  Vcpu vcpu(std::make_unique<FakeEndpoint>(script));
  auto& run = vcpu.run_page();
  run.io.data_offset = 4096;
  run.io.size = 2;
  run.io.count = 2048;
  EXPECT_EQ(vcpu.io_data(8192).size(), 4096u);
  run.io.count = 2049;
  EXPECT_TRUE(vcpu.io_data(8192).empty());
  run.io.data_offset = ~u64{0};
  run.io.count = 1;
  EXPECT_TRUE(vcpu.io_data(8192).empty());
}

// A statistics file with the header given and two descriptors; the second one's value is a histogram.
int statistics_file(kvm_stats_header header) {
  const int fd = ::memfd_create("statistics", MFD_CLOEXEC);
  const auto put = [&](u64 at, const void* from, std::size_t size) {
    EXPECT_EQ(::pwrite(fd, from, size, static_cast<off_t>(at)), static_cast<ssize_t>(size));
  };
  put(0, &header, sizeof header);
  const u64 values[] = {7, 8, 9};
  for (u32 n = 0; n < 2; n++) {
    kvm_stats_desc d{};
    d.size = static_cast<u16>(n + 1);
    d.offset = 8 * n;
    put(64 + n * (sizeof d + 16), &d, sizeof d);
    put(64 + n * (sizeof d + 16) + sizeof d, n == 0 ? "exits\0\0\0\0\0\0\0\0\0\0" : "sixteen letters!", 16);
  }
  put(256, values, sizeof values);
  return fd;
}

TEST(Vcpu, StatisticsAreReadAsTheFileHasThem) {
  auto script = std::make_shared<Script>();
  Vcpu vcpu(std::make_unique<FakeEndpoint>(script));
  kvm_stats_header header{};
  header.name_size = 16;
  header.num_desc = 2;
  header.desc_offset = 64;
  header.data_offset = 256;
  script->answers[KVM_GET_STATS_FD] = statistics_file(header);
  auto all = vcpu.statistics();
  ASSERT_TRUE(all.ok()) << all.error().message;
  ASSERT_EQ(all->size(), 2u);
  EXPECT_EQ((*all)[0].name, "exits");
  EXPECT_EQ((*all)[0].value, 7u);
  EXPECT_EQ((*all)[1].name, "sixteen letters!");
  EXPECT_EQ((*all)[1].value, 8u);
  for (kvm_stats_header bad : {header, header, header, header}) {
    static int which = 0;
    switch (which++) {
      case 0: bad.num_desc = 0x7fffffff; break;
      case 1: bad.name_size = 0x7fffffff; break;
      case 2: bad.desc_offset = 1000; break;
      default: bad.data_offset = 272; break;
    }
    script->answers[KVM_GET_STATS_FD] = statistics_file(bad);
    all = vcpu.statistics();
    ASSERT_FALSE(all.ok()) << which;
    EXPECT_EQ(all.error().code, EPROTO);
  }
  script->answers[KVM_GET_STATS_FD] = -ENOTTY;
  all = vcpu.statistics();
  ASSERT_FALSE(all.ok());
  EXPECT_EQ(all.error().code, ENOTTY);
}

TEST(Probe, ReportsAnEarlyExit) {
  auto script = std::make_shared<Script>();
  script->run_waits = false;
  auto r = probe(std::make_shared<FakeEndpoint>(script), std::chrono::milliseconds(100));
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message.find("exit reason 8"), std::string::npos) << r.error().message;
}

TEST(Probe, TimesOutOnAGuestThatNeverArrives) {
  auto script = std::make_shared<Script>();
  const auto t = std::chrono::steady_clock::now();
  auto r = probe(std::make_shared<FakeEndpoint>(script), std::chrono::milliseconds(50));
  ASSERT_FALSE(r.ok());
  EXPECT_EQ(r.error().code, ETIMEDOUT);
  EXPECT_LT(std::chrono::steady_clock::now() - t, std::chrono::seconds(1));
}

TEST(Probe, DoesNotHangOnAProviderThatIgnoresKicks) {
  auto script = std::make_shared<Script>();
  script->obey_kicks = false;
  std::atomic<bool> stop{false};
  script->run_waits = false;
  script->on_run = [&] {
    while (!stop.load()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  auto r = probe(std::make_shared<FakeEndpoint>(script), std::chrono::milliseconds(20));
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message.find("cannot be interrupted"), std::string::npos);
  stop.store(true);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));  // the abandoned thread still uses `stop`
}

TEST(Probe, MeasuresTheCounter) {
  auto script = std::make_shared<Script>();
  script->on_run = [raw = script.get()] {
    // 1000 rounds at once, then 1000 more: a guest that counts, without a guest.
    auto* counter = reinterpret_cast<u64*>(raw->ram.value + 0x3000);
    for (int i = 0; i < 200; i++) {
      __atomic_fetch_add(counter, 1000, __ATOMIC_RELAXED);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  };
  auto r = probe(std::make_shared<FakeEndpoint>(script), std::chrono::milliseconds(150));
  ASSERT_TRUE(r.ok()) << r.error().message;
  EXPECT_GT(r->million_insns_per_second, 0.5);
  EXPECT_LT(r->million_insns_per_second, 10);
  EXPECT_FALSE(r->x86_64_v2);
}

TEST(Probe, WaitsForAGuestThatDidNotGetToRun) {
  // Nothing for longer than the limit, at no CPU time: a host that is busy with others.
  auto script = std::make_shared<Script>();
  script->on_run = [raw = script.get()] {
    auto* counter = reinterpret_cast<u64*>(raw->ram.value + 0x3000);
    for (int i = 0; i < 3; i++) {
      std::this_thread::sleep_for(std::chrono::milliseconds(120));
      __atomic_fetch_add(counter, 1000, __ATOMIC_RELAXED);
    }
  };
  auto r = probe(std::make_shared<FakeEndpoint>(script), std::chrono::milliseconds(60));
  ASSERT_TRUE(r.ok()) << r.error().message;
  EXPECT_GT(r->million_insns_per_second, 0);
}

TEST(KernelProvider, MissingAndWrongFiles) {
  auto missing = open_kernel_kvm("/nonexistent/kvm");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code, ENOENT);
  auto null = open_kernel_kvm("/dev/null");
  ASSERT_FALSE(null.ok());
  EXPECT_EQ(null.error().code, ENOTTY);
}

// On a host that has a KVM of whatever quality: a real-mode guest writes to a port and is kicked.
TEST(KernelProvider, RealModeGuest) {
  auto endpoint = open_kernel_kvm();
  if (!endpoint) GTEST_SKIP() << endpoint.error().message;
  auto sys = System::create(std::shared_ptr<Endpoint>(std::move(*endpoint)));
  ASSERT_TRUE(sys.ok());
  auto size = sys->vcpu_mmap_size();
  ASSERT_TRUE(size.ok());
  auto vm = sys->create_vm();
  if (!vm) GTEST_SKIP() << vm.error().message;
  auto ram = Mapping::anonymous(0x4000);
  ASSERT_TRUE(ram.ok());
  // mov al,0x42; out 0x80,al; jmp $
  const u8 code[] = {0xb0, 0x42, 0xe6, 0x80, 0xeb, 0xfe};
  std::memcpy(ram->data() + 0x1000, code, sizeof code);
  ASSERT_TRUE(vm->set_user_memory_region(0, Gpa(0), 0x4000, Hva(reinterpret_cast<u64>(ram->data()))).ok());
  auto vcpu = vm->create_vcpu(0);
  ASSERT_TRUE(vcpu.ok()) << vcpu.error().message;
  auto sregs = vcpu->sregs();
  ASSERT_TRUE(sregs.ok());
  sregs->cs.base = 0;
  sregs->cs.selector = 0;
  ASSERT_TRUE(vcpu->set_sregs(*sregs).ok());
  kvm_regs regs{};
  regs.rip = 0x1000;
  regs.rflags = 2;
  ASSERT_TRUE(vcpu->set_regs(regs).ok());
  const int first = vcpu->run();
  ASSERT_EQ(first, 0);
  ASSERT_EQ(vcpu->run_page().exit_reason, u32{KVM_EXIT_IO});
  EXPECT_EQ(vcpu->run_page().io.port, 0x80);
  auto data = vcpu->io_data(*size);
  ASSERT_EQ(data.size(), 1u);
  EXPECT_EQ(data[0], 0x42);

  // A kick from another thread ends the endless loop, one before KVM_RUN does so at once.
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    vcpu->kick();
  });
  EXPECT_EQ(vcpu->run(), -EINTR);
  kicker.join();
  EXPECT_EQ(vcpu->run_page().immediate_exit, 1);
  EXPECT_EQ(vcpu->run(), -EINTR);
  vcpu->clear_kick();
  auto after = vcpu->regs();
  ASSERT_TRUE(after.ok());
  EXPECT_EQ((*after).rip, 0x1004u);
}

// Whatever this host's KVM can do, the probe says so in time and does not hang.
TEST(KernelProvider, ProbeReturns) {
  auto endpoint = open_kernel_kvm();
  if (!endpoint) GTEST_SKIP() << endpoint.error().message;
  const auto t = std::chrono::steady_clock::now();
  auto r = probe(std::shared_ptr<Endpoint>(std::move(*endpoint)), std::chrono::milliseconds(300));
  EXPECT_LT(std::chrono::steady_clock::now() - t, std::chrono::seconds(5));
  if (r) {
    EXPECT_GT(r->million_insns_per_second, 0.0);
    RecordProperty("mips", static_cast<int>(r->million_insns_per_second));
    std::printf("kernel KVM: %.1f MIPS, long mode after %.1f ms, v2 %d\n", r->million_insns_per_second,
                r->milliseconds_to_long_mode, r->x86_64_v2);
  } else {
    std::printf("kernel KVM: %s\n", r.error().message.c_str());
  }
}

}  // namespace
}  // namespace ring3::kvm
