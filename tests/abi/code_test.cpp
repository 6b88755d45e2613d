// Code that others change: another vCPU while it runs, the VMM between two runs.
#include <atomic>
#include <chrono>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace guests {
GUEST(patched);
GUEST(patcher);
GUEST(dma);
GUEST(dma_running);
}  // namespace guests
namespace {

using namespace std::chrono_literals;

class Code : public AbiTest {};
INSTANTIATE_TEST_SUITE_P(Providers, Code, testing::Values(Provider::Interpreter, Provider::Translator), provider_name);

u32 seen(TestVm& m, u64 gpa) { return __atomic_load_n(reinterpret_cast<u32*>(m.ram() + gpa), __ATOMIC_ACQUIRE); }

// An aligned store into an instruction that another vCPU runs in a loop, with nothing that serialises: the loop sees the old
// value or the new one, never a mix, and the new one before long.
TEST_P(Code, AnotherVcpuPatchesARunningLoop) {
  constexpr u32 kTimes = 100;
  TestVm m(system(), {.vcpus = 2});
  m.start_flat(guests::patched, true);
  m.load(guests::patcher, 0x3000);
  auto first = m.vcpu(0).sregs();
  auto second = m.vcpu(1).sregs();
  ASSERT_TRUE(first.ok() && second.ok());
  first->apic_base = second->apic_base;
  ASSERT_TRUE(m.vcpu(1).set_sregs(*first).ok());
  kvm_regs regs{};
  regs.rip = 0x3000;
  regs.rsp = 0x9000;
  regs.rflags = 2;
  regs.r8 = kTimes;
  ASSERT_TRUE(m.vcpu(1).set_regs(regs).ok());

  std::atomic<bool> over{false};
  std::thread watch([&] {
    const auto end = std::chrono::steady_clock::now() + 60s;
    while (!over.load() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(5ms);
    if (!over.load()) __atomic_store_n(reinterpret_cast<u32*>(m.ram() + 0x20008), 1, __ATOMIC_RELEASE);
  });
  std::thread patcher([&] { m.run(1); });
  m.run(0);
  patcher.join();
  over.store(true);
  watch.join();
  EXPECT_EQ(seen(m, 0x20004), kTimes);
  EXPECT_EQ(seen(m, 0x20010), 0u);
}

void vmm_writes_into_code(TestVm& m, bool tells) {
  m.start_flat(guests::dma, true);
  m.expect_io(0x90, true, 0x11);
  for (u32 i = 0; i < 300; i++) {
    m.put<u32>(0x1004, i);
    if (tells) m.vm().endpoint().stored(Gpa(0x1004), 4);
    m.expect_io(0x90, true, i & 0xff);
  }
}

TEST_P(Code, TheVmmWritesIntoCode) {
  TestVm m(system());
  vmm_writes_into_code(m, false);
}

TEST_P(Code, TheVmmWritesIntoCodeAndTells) {
  TestVm m(system());
  m.vm().endpoint().announces_stores();
  vmm_writes_into_code(m, true);
}

// A store that is told of is seen by a vCPU that neither exits nor sleeps.
TEST_P(Code, TheVmmWritesIntoARunningLoopAndTells) {
  TestVm m(system());
  m.vm().endpoint().announces_stores();
  m.start_flat(guests::dma_running, true);
  std::thread writer([&] {
    u32 i = 0x11111111;
    for (u32 last = i + 50;;) {
      const auto end = std::chrono::steady_clock::now() + 60s;
      while (seen(m, 0x20000) != i && std::chrono::steady_clock::now() < end) std::this_thread::yield();
      EXPECT_EQ(seen(m, 0x20000), i);
      if (HasFailure() || i == last) break;
      __atomic_store_n(reinterpret_cast<u32*>(m.ram() + 0x1004), ++i, __ATOMIC_RELEASE);
      // Across a page's end: what has no code is passed over.
      m.vm().endpoint().stored(Gpa(0xff8), 0x10);
    }
    __atomic_store_n(reinterpret_cast<u32*>(m.ram() + 0x20004), 1, __ATOMIC_RELEASE);
  });
  m.expect_end();
  writer.join();
}

}  // namespace
}  // namespace ring3::abitest
