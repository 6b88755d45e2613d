// A VM's whole state, read at a random moment and written into a second VM, which ends as an undisturbed run does.
#include <chrono>
#include <random>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

class Migrate : public AbiTest {
 protected:
  template <class T>
  static void move_state(Endpoint& from, Endpoint& to, unsigned long get, unsigned long set) {
    alignas(64) static T state;
    std::memset(&state, 0, sizeof state);
    ASSERT_EQ(from.ioctl(get, arg(state)), 0);
    ASSERT_EQ(to.ioctl(set, arg(state)), 0);
  }
  struct Xsave {
    u8 bytes[4096];
  };

  void move_vm(TestVm& from, TestVm& to, bool irqchip) {
    std::memcpy(to.ram(), from.ram(), TestVm::kRam);
    Endpoint& a = from.vcpu().endpoint();
    Endpoint& b = to.vcpu().endpoint();
    move_state<kvm_xcrs>(a, b, KVM_GET_XCRS, KVM_SET_XCRS);
    move_state<Xsave>(a, b, KVM_GET_XSAVE, KVM_SET_XSAVE);
    move_state<kvm_sregs>(a, b, KVM_GET_SREGS, KVM_SET_SREGS);
    move_state<kvm_regs>(a, b, KVM_GET_REGS, KVM_SET_REGS);
    auto list = system().msr_index_list();
    ASSERT_TRUE(list.ok());
    std::vector<kvm_msr_entry> msrs;
    for (u32 index : *list) msrs.push_back({index, 0, 0});
    ASSERT_TRUE(from.vcpu().get_msrs(msrs).ok());
    if (irqchip) {
      for (u32 id = 0; id < 3; id++) {
        kvm_irqchip chip{};
        chip.chip_id = id;
        ASSERT_TRUE(from.vm().get_irqchip(chip).ok());
        ASSERT_TRUE(to.vm().set_irqchip(chip).ok());
      }
      kvm_pit_state2 pit{};
      ASSERT_TRUE(from.vm().get_pit2(pit).ok());
      ASSERT_TRUE(to.vm().set_pit2(pit).ok());
      move_state<kvm_lapic_state>(a, b, KVM_GET_LAPIC, KVM_SET_LAPIC);
      move_state<kvm_mp_state>(a, b, KVM_GET_MP_STATE, KVM_SET_MP_STATE);
    }
    const auto set = to.vcpu().set_msrs(msrs);
    ASSERT_TRUE(set.ok()) << set.error().message;
    move_state<kvm_debugregs>(a, b, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS);
    move_state<kvm_vcpu_events>(a, b, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS);
  }

  /// Runs until a kick that comes after delay. True when the guest ended instead.
  bool run_for(TestVm& m, std::chrono::microseconds delay) {
    std::thread kicker([&] {
      std::this_thread::sleep_for(delay);
      m.vcpu().kick();
    });
    bool ended = false;
    for (;;) {
      const int r = m.vcpu().run();
      if (r == -EINTR) break;
      EXPECT_EQ(r, 0);
      if (r != 0) break;
      EXPECT_EQ(m.exit_reason(), u32{KVM_EXIT_IO});
      if (m.exit_reason() != KVM_EXIT_IO) break;
      if (m.vcpu().run_page().io.port == 0xf4) {
        ended = true;
        break;
      }
    }
    kicker.join();
    m.vcpu().clear_kick();
    return ended;
  }

  void compute(const Guest& guest, bool long_mode, u32 rounds) {
    VmOptions options{.irqchip = true, .pit = true};
    const auto start = [&](TestVm& m) {
      m.start_flat(guest, long_mode);
      auto regs = m.vcpu().regs();
      regs->rbx = rounds;
      ASSERT_TRUE(m.vcpu().set_regs(*regs).ok());
    };
    // Long enough on any engine for the kicks to land in the middle.
    std::unique_ptr<TestVm> reference_vm;
    std::chrono::microseconds whole{0};
    for (; whole < std::chrono::milliseconds(40); rounds *= 2) {
      reference_vm = std::make_unique<TestVm>(system(), options);
      start(*reference_vm);
      const auto begin = std::chrono::steady_clock::now();
      reference_vm->expect_end();
      if (HasFatalFailure()) return;
      whole = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - begin);
      if (whole >= std::chrono::milliseconds(40)) break;
    }
    TestVm& reference = *reference_vm;
    std::mt19937_64 rng(7);
    unsigned moves = 0;
    for (int trial = 0; trial < 12 || moves < 60; trial++) {
      ASSERT_LT(trial, 200);
      auto m = std::make_unique<TestVm>(system(), options);
      start(*m);
      for (;;) {
        const std::chrono::microseconds delay(rng() % static_cast<u64>(whole.count() / 4 + 1));
        if (run_for(*m, delay)) break;
        auto next = std::make_unique<TestVm>(system(), options);
        move_vm(*m, *next, true);
        if (HasFatalFailure()) return;
        m = std::move(next);
        ASSERT_LT(++moves, 5000u);
      }
      ASSERT_EQ(std::memcmp(m->ram() + 0x20000, reference.ram() + 0x20000, 0x1100), 0) << "trial " << trial;
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Providers, Migrate, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

TEST_P(Migrate, ComputingIn64Bits) {
  SOFT_ONLY("needs 64-bit code");
  compute(guests::work64, true, 100000);
}

TEST_P(Migrate, ComputingIn32BitsWithX87AndSse) {
  SOFT_ONLY("a paravirtual /dev/kvm refuses part of the state");
  compute(guests::work32, false, 100000);
}

// Timers and interrupts in flight: every tick that was due arrives in one VM or the other, and the guest ends.
TEST_P(Migrate, WithTimersRunning) {
  SOFT_ONLY("a paravirtual /dev/kvm refuses part of the state");
  std::mt19937_64 rng(11);
  VmOptions options{.irqchip = true, .pit = true};
  for (u8 timer : {1, 2, 3}) {
    auto m = std::make_unique<TestVm>(system(), options);
    m->start_real(guests::irq);
    m->put<u8>(0x600, 0xfe);
    m->put<u8>(0x601, timer);
    m->put<u32>(0x604, timer == 3 ? 1 : 30);
    unsigned moves = 0;
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!run_for(*m, std::chrono::microseconds(rng() % 3000))) {
      ASSERT_LT(std::chrono::steady_clock::now(), limit) << "timer " << int{timer} << " stopped after " << moves << " moves";
      auto next = std::make_unique<TestVm>(system(), options);
      move_vm(*m, *next, true);
      if (HasFatalFailure()) return;
      m = std::move(next);
      moves++;
    }
    EXPECT_GE(m->at<u32>(0x500) + m->at<u32>(0x504), timer == 3 ? 1u : 30u);
  }
}

}  // namespace
}  // namespace ring3::abitest
