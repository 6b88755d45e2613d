// Interrupts: 8259, PIT, LAPIC timers, lines, MSI, irqfds, NMI, IPIs between vCPUs; waiting and waking.
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

using namespace std::chrono_literals;

class Interrupts : public AbiTest {};
INSTANTIATE_TEST_SUITE_P(Providers, Interrupts, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

#define HARDWARE_OR_SOFT SOFT_ONLY("a paravirtual /dev/kvm runs real mode with the x2APIC in its own way")

/// Ends a KVM_RUN that takes too long, so that a lost interrupt fails a test and does not hang it.
class Watchdog {
 public:
  explicit Watchdog(Vcpu& vcpu, std::chrono::milliseconds limit = 20s)
      : thread_([this, &vcpu, limit] {
          const auto end = std::chrono::steady_clock::now() + limit;
          while (!done_.load()) {
            if (std::chrono::steady_clock::now() > end) {
              vcpu.kick();
              return;
            }
            std::this_thread::sleep_for(2ms);
          }
        }) {}
  ~Watchdog() {
    done_.store(true);
    thread_.join();
  }

 private:
  std::atomic<bool> done_{false};
  std::thread thread_;
};

void expect_ready(TestVm& m) {
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(m.vcpu().run_page().io.port, 0x90);
}

void prepare(TestVm& m, u8 pic_mask, u8 timer, u32 events) {
  m.start_real(guests::irq);
  m.put<u8>(0x600, pic_mask);
  m.put<u8>(0x601, timer);
  m.put<u32>(0x604, events);
  expect_ready(m);
}

/// An MSI of a vector, edge or level, to APIC 0.
kvm_irq_routing_entry msi_route(u32 gsi, u8 vector, bool level = false) {
  kvm_irq_routing_entry route{};
  route.gsi = gsi;
  route.type = KVM_IRQ_ROUTING_MSI;
  route.u.msi.address_lo = 0xfee00000;
  route.u.msi.data = vector | (level ? 0xc000u : 0u);
  return route;
}

TEST_P(Interrupts, Pit) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true, .pit = true});
  Watchdog dog(m.vcpu());
  const auto begin = std::chrono::steady_clock::now();
  prepare(m, 0xfe, 1, 20);
  m.expect_end();
  EXPECT_GE(m.at<u32>(0x500), 20u);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 15ms);
}

TEST_P(Interrupts, LapicTimer) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  const auto begin = std::chrono::steady_clock::now();
  prepare(m, 0xff, 2, 10);
  m.expect_end();
  EXPECT_GE(m.at<u32>(0x504), 10u);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 8ms);
}

TEST_P(Interrupts, TscDeadline) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xff, 3, 1);
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x504), 1u);
}

TEST_P(Interrupts, LineThroughThePic) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xef, 0, 10);  // IRQ 4, edge
  for (u32 i = 0; i < 10; i++) {
    ASSERT_TRUE(m.vm().irq_line(4, true).ok());
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0x91);
    EXPECT_EQ(m.at<u32>(0x500), i + 1);
    ASSERT_TRUE(m.vm().irq_line(4, false).ok());
  }
  m.expect_end();
  kvm_irq_level line{};
  line.irq = 4;
  line.level = 1;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_IRQ_LINE_STATUS, arg(line)), 0);
}

TEST_P(Interrupts, Msi) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xff, 0, 50);
  std::thread sender([&] {
    kvm_msi msi{};
    msi.address_lo = 0xfee00000;
    msi.data = 0x30;
    u32 seen = 0;
    while (seen < 50) {
      EXPECT_GE(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 0);
      while (__atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE) == seen) std::this_thread::yield();
      seen = __atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE);
    }
  });
  m.expect_end();
  sender.join();
  EXPECT_GE(m.at<u32>(0x504), 50u);
}

// Blocked, but no error: the LAPIC is off by software, or another one is meant. Without any LAPIC there is nobody.
TEST_P(Interrupts, MsiThatNobodyTakes) {
  TestVm m(system(), {.irqchip = true, .vcpus = 0});
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x30;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), -1);
  m.add_vcpu(0);
  for (const u32 address : {0xfee00000, 0xfee09000, 0xfee09004}) {
    msi.address_lo = address;
    EXPECT_EQ(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 0) << address;
  }
}

// A vCPU that executed HLT looks for its interrupts for a while, as KVM_CAP_HALT_POLL says, and gets each one way or the other.
TEST_P(Interrupts, HaltsLookForWhatWakesThem) {
  SOFT_ONLY("statistics have more in the kernel");
  for (const u64 limit : {u64{0}, u64{1'000'000'000}}) {
    TestVm m(system(), {.irqchip = true});
    Watchdog dog(m.vcpu());
    ASSERT_TRUE(m.vm().enable_cap(KVM_CAP_HALT_POLL, limit).ok());
    EXPECT_FALSE(m.vm().enable_cap(KVM_CAP_HALT_POLL, u64{1} << 32).ok());
    prepare(m, 0xff, 0, 30);
    std::thread sender([&] {
      kvm_msi msi{};
      msi.address_lo = 0xfee00000;
      msi.data = 0x30;
      for (u32 seen = 0; seen < 30;) {
        std::this_thread::sleep_for(500us);
        EXPECT_GE(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 0);
        while (__atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE) == seen) std::this_thread::yield();
        seen = __atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE);
      }
    });
    m.expect_end();
    sender.join();
    auto statistics = m.vcpu().statistics();
    ASSERT_TRUE(statistics.ok());
    std::map<std::string, u64> by_name;
    for (const auto& s : *statistics) by_name[s.name] = s.value;
    EXPECT_GT(by_name.at("halt_wakeup"), 15u);
    EXPECT_EQ(by_name.at("blocking"), 0u);
    if (limit == 0) {
      EXPECT_EQ(by_name.at("halt_attempted_poll"), 0u);
      EXPECT_GT(by_name.at("halt_wait_ns"), 0u);
    } else {
      EXPECT_GT(by_name.at("halt_successful_poll"), 5u);
      EXPECT_GT(by_name.at("halt_poll_success_ns"), 0u);
    }
  }
}

// What comes while the VMM has the vCPU in the middle of an instruction is taken when that is done, also before code that
// never leaves the engine by itself.
TEST_P(Interrupts, ComesInTheMiddleOfAnInstruction) {
  HARDWARE_OR_SOFT;
  for (const bool from_vmm : {true, false}) {
    TestVm m(system(), {.irqchip = true});
    Watchdog dog(m.vcpu());  // a kick makes the engine look at everything: the time tells
    ASSERT_NO_FATAL_FAILURE(start_long(m, guests::spin64, {{0x30, 64}}));
    m.expect_io(0x90, true, 0xff);
    const auto begin = std::chrono::steady_clock::now();
    kvm_msi msi{};
    msi.address_lo = 0xfee00000;
    msi.data = 0x30;
    if (from_vmm) {
      EXPECT_GE(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 0);
      m.expect_end();
    } else {
      std::thread sender([&] { EXPECT_GE(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 0); });
      m.expect_end();
      sender.join();
    }
    EXPECT_LT(std::chrono::steady_clock::now() - begin, 15s);
  }
}

TEST_P(Interrupts, Irqfd) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xff, 0, 50);
  const kvm_irq_routing_entry route = msi_route(30, 0x30);
  ASSERT_TRUE(m.vm().set_gsi_routing({&route, 1}).ok());
  const int fd = eventfd_make();
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(fd);
  irqfd.gsi = 30;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), -EBUSY);
  std::thread sender([&] {
    for (u32 seen = 0; seen < 50;) {
      const u64 one = 1;
      EXPECT_EQ(::write(fd, &one, 8), 8);
      while (__atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE) == seen) std::this_thread::yield();
      seen = __atomic_load_n(reinterpret_cast<u32*>(m.ram() + 0x504), __ATOMIC_ACQUIRE);
    }
  });
  m.expect_end();
  sender.join();
  irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  const u32 before = m.at<u32>(0x504);
  const u64 one = 1;
  EXPECT_EQ(::write(fd, &one, 8), 8);
  std::this_thread::sleep_for(5ms);
  EXPECT_EQ(m.at<u32>(0x504), before);
  irqfd.flags = 1 << 8;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), -EINVAL);
  ::close(fd);
}

// A client may name any fd of the process, those of the engine among them: a VM still wakes up, and comes to its end.
TEST_P(Interrupts, IrqfdsOfWhateverIsOpen) {
  HARDWARE_OR_SOFT;
  const int fd = eventfd_make();
  {
    TestVm m(system(), {.irqchip = true});
    Watchdog dog(m.vcpu());
    prepare(m, 0xff, 0, 1);
    const kvm_irq_routing_entry routes[] = {msi_route(30, 0x30)};
    ASSERT_TRUE(m.vm().set_gsi_routing(routes).ok());
    kvm_irqfd irqfd{};
    irqfd.gsi = 30;
    irqfd.fd = static_cast<u32>(fd);
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
    unsigned taken = 0;
    for (irqfd.fd = 0; irqfd.fd < 256; irqfd.fd++) {
      irqfd.gsi = 1000;  // no route leads from there
      const long r = m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd));
      EXPECT_TRUE(r == 0 || r == -EBADF || r == -EINVAL || r == -EBUSY) << irqfd.fd << ": " << r;
      taken += r == 0;
    }
    EXPECT_LT(taken, 8u);  // what the test itself has as an eventfd
    std::thread sender([&] {
      std::this_thread::sleep_for(20ms);  // the guest halts
      const u64 one = 1;
      EXPECT_EQ(::write(fd, &one, 8), 8);
    });
    m.expect_end();
    sender.join();
  }
  ::close(fd);
}

// An irqfd ends with the last of its eventfd's fds, no sooner.
TEST_P(Interrupts, IrqfdAndItsEventfdsFds) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::lapic64, {{0x30, 64}, {0x31, 128}}));
  const kvm_irq_routing_entry routes[] = {msi_route(30, 0x30), msi_route(31, 0x31)};
  ASSERT_TRUE(m.vm().set_gsi_routing({routes, 2}).ok());
  m.expect_io(0x90, true, 0xff);
  const auto change = [&](int fd, u32 gsi, u32 flags = 0) {
    kvm_irqfd irqfd{};
    irqfd.fd = static_cast<u32>(fd);
    irqfd.gsi = gsi;
    irqfd.flags = flags;
    return m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd));
  };
  const auto write_to = [](int fd) {
    const u64 one = 1;
    EXPECT_EQ(::write(fd, &one, 8), 8);
  };
  const auto expect_told = [&](u32 times) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0x91);
    EXPECT_EQ(m.at<u32>(0x508), times);
  };
  const auto count = [] {
    u32 n = 0;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
      std::error_code error;
      n += std::filesystem::read_symlink(entry.path(), error).string() == "anon_inode:[eventfd]" ? 1 : 0;
    }
    return n;
  };
  int fd = eventfd_make();
  ASSERT_EQ(change(fd, 31), 0);
  write_to(fd);
  ASSERT_NO_FATAL_FAILURE(expect_told(1));
  u64 left = 0;
  EXPECT_EQ(::read(fd, &left, 8), -1) << "what was delivered has been read";
  ::close(fd);
  const u32 before = count();
  for (int i = 0; i < 10; i++) {  // never deassigned; numbers come again
    fd = eventfd_make();
    ASSERT_EQ(change(fd, 30), 0);
    EXPECT_EQ(change(fd, 30), -EBUSY);
    ::close(fd);
  }
  EXPECT_EQ(count(), before);

  // Through another fd, while the first is another file, which nobody reads.
  fd = eventfd_make();
  ASSERT_EQ(change(fd, 31), 0);
  const int copy = ::dup(fd);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ASSERT_EQ(::dup2(ends[0], fd), fd);
  write_to(ends[1]);
  for (u32 i = 2; i <= 5; i++) {
    write_to(copy);
    ASSERT_NO_FATAL_FAILURE(expect_told(i));
  }
  EXPECT_EQ(change(copy, 31), -EBUSY);
  EXPECT_EQ(::read(fd, &left, 8), 8);
  // What could not be read was delivered all the same, and does not come again.
  EXPECT_EQ(change(copy, 31, KVM_IRQFD_FLAG_DEASSIGN), 0);
  kvm_lapic_state lapic{};
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_LAPIC, arg(lapic)), 0);
  u32 pending;
  std::memcpy(&pending, lapic.regs + 0x210, sizeof pending);
  EXPECT_EQ(pending, 0u);
  // Back on its number: what epoll has of it still is taken over.
  ASSERT_EQ(::dup2(copy, fd), fd);
  ASSERT_EQ(change(fd, 31), 0);
  ::close(copy);
  write_to(fd);
  ASSERT_NO_FATAL_FAILURE(expect_told(6));
  // What was written before DEASSIGN comes.
  for (u32 i = 7; i < 50; i++) {
    write_to(fd);
    EXPECT_EQ(change(fd, 31, KVM_IRQFD_FLAG_DEASSIGN), 0);
    ASSERT_NO_FATAL_FAILURE(expect_told(i));
    ASSERT_EQ(change(fd, 31), 0);
  }
  for (const int end : {fd, ends[0], ends[1]}) ::close(end);
}

// A level-triggered irqfd with resampling: the line goes down at the EOI and the VMM is told.
TEST_P(Interrupts, IrqfdResample) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xff, 0, 3);
  // IOAPIC pin 20: vector 0x30, level, to APIC 0.
  kvm_irqchip chip{};
  chip.chip_id = KVM_IRQCHIP_IOAPIC;
  ASSERT_TRUE(m.vm().get_irqchip(chip).ok());
  chip.chip.ioapic.redirtbl[20].bits = 0x30 | 1u << 15;
  ASSERT_TRUE(m.vm().set_irqchip(chip).ok());
  const int fd = eventfd_make(), resample = eventfd_make();
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(fd);
  irqfd.resamplefd = static_cast<u32>(resample);
  irqfd.gsi = 20;
  irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  std::atomic<bool> stop{false};
  std::atomic<u64> told{0};
  std::thread device([&] {
    const u64 one = 1;
    EXPECT_EQ(::write(fd, &one, 8), 8);
    while (!stop.load()) {
      u64 n = 0;
      if (::read(resample, &n, 8) == 8) {
        told += n;
        if (told < 3) {
          EXPECT_EQ(::write(fd, &one, 8), 8);
        }
      }
      std::this_thread::yield();
    }
  });
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x504), 3u);
  for (int i = 0; i < 1000 && told < 3; i++) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(told.load(), 3u);
  stop.store(true);
  device.join();
  ::close(fd);
  ::close(resample);
}

TEST_P(Interrupts, Nmi) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  prepare(m, 0xff, 0, 2);
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_NMI, 0), 0);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(m.vcpu().run_page().io.port, 0x92);
  EXPECT_EQ(m.at<u32>(0x508), 1u);
  // Inside the handler: two more merge into one, which waits for IRET.
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_NMI, 0), 0);
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_NMI, 0), 0);
  auto events = m.vcpu().vcpu_events();
  ASSERT_TRUE(events.ok());
  EXPECT_EQ(events->nmi.masked, 1);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(m.vcpu().run_page().io.port, 0x92);
  EXPECT_EQ(m.at<u32>(0x508), 2u);
  EXPECT_EQ(m.at<u32>(0x50c), 1u);  // the first handler had ended
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x508), 2u);
}

TEST_P(Interrupts, StartupAndIpisBetweenTwoVcpus) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true, .vcpus = 2});
  m.start_real(guests::bsp);
  m.load(guests::ap, 0x9000);
  constexpr u32 kRounds = 2000;
  m.put<u32>(0x604, kRounds);
  auto state = m.vcpu(1).mp_state();
  ASSERT_TRUE(state.ok());
  EXPECT_EQ(state->mp_state, u32{KVM_MP_STATE_UNINITIALIZED});
  std::atomic<bool> stop{false};
  std::thread ap([&] {
    while (!stop.load()) {
      const int r = m.vcpu(1).run();
      EXPECT_TRUE(r == -EAGAIN || r == -EINTR) << r;
      if (r != -EAGAIN && r != -EINTR) return;
    }
  });
  {
    Watchdog dog(m.vcpu());
    m.expect_end();
  }
  stop.store(true);
  m.vcpu(1).kick();
  ap.join();
  EXPECT_GE(m.at<u32>(0x504), kRounds);  // the other vCPU serves on between the last count and the port
  EXPECT_GE(m.at<u32>(0x508), kRounds - 1);
  EXPECT_EQ(m.at<u16>(0x510), 0x900);
}

TEST_P(Interrupts, IpisByHypercall) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::ipi_hypercall, {{0x30, 256}}));
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x504), 1u);
  EXPECT_EQ(m.at<u64>(0x21000), 1u);
  EXPECT_EQ(m.at<u64>(0x21008), 0u);
  EXPECT_EQ(m.at<u64>(0x21010), 0u);
  EXPECT_EQ(m.at<u64>(0x21018), static_cast<u64>(-EINVAL));
}

// Hyper-V's: hypercalls and the SynIC's registers that the VMM sees, an interrupt of a source by a route.
TEST_P(Interrupts, HypervExitsAndRoutesToASource) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  Watchdog dog(m.vcpu());
  add_hyperv_cpuid(m);
  kvm_enable_cap cap{};
  cap.cap = KVM_CAP_HYPERV_SYNIC;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_ENABLE_CAP, arg(cap)), 0);
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::hyperv_sint, {{0x30, 256}}));
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HYPERV});
  auto& exit = m.vcpu().run_page().hyperv;
  ASSERT_EQ(exit.type, u32{KVM_EXIT_HYPERV_HCALL});
  EXPECT_EQ(exit.u.hcall.input, 0x5cu);
  EXPECT_EQ(exit.u.hcall.params[0], 0x22000u);
  EXPECT_EQ(exit.u.hcall.params[1], 0x23000u);
  exit.u.hcall.result = 0x1234;
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HYPERV});
  ASSERT_EQ(exit.type, u32{KVM_EXIT_HYPERV_SYNIC});
  EXPECT_EQ(exit.u.synic.msr, 0x40000080u);
  EXPECT_EQ(exit.u.synic.control, 1u);
  ASSERT_NO_FATAL_FAILURE(m.expect_io(0x90, true, 0x30));
  EXPECT_EQ(m.at<u64>(0x21000), 0x1234u);

  kvm_irq_routing_entry route{};
  route.gsi = 40;
  route.type = KVM_IRQ_ROUTING_HV_SINT;
  route.u.hv_sint.vcpu = 0;
  route.u.hv_sint.sint = 2;
  ASSERT_TRUE(m.vm().set_gsi_routing({&route, 1}).ok());
  const int fd = eventfd_make();
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(fd);
  irqfd.gsi = 40;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  for (u32 i = 1; i <= 3; i++) {
    const u64 one = 1;
    ASSERT_EQ(::write(fd, &one, sizeof one), 8);
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0x91);
    EXPECT_EQ(m.at<u32>(0x504), i);
  }
  ::close(fd);
}

// ---- waiting, kicks, signals ----

TEST_P(Interrupts, KicksAreNeverLost) {
  TestVm m(system(), {.irqchip = soft()});
  constexpr int kKicks = 10000;
  for (const Guest* g : {&guests::spin, &guests::idle}) {
    if (g == &guests::idle && !soft()) continue;
    const int kicks = soft() ? kKicks : 200;
    m.start_real(*g);
    std::atomic<int> taken{0};
    std::atomic<bool> bad{false}, over{false};
    std::thread runner([&] {
      while (!over) {
        const int r = m.vcpu().run();
        if (r != -EINTR) bad = true;
        if (bad) return;
        // Not before the kick that ended it: a spurious EINTR takes nobody's turn.
        if (!m.vcpu().run_page().immediate_exit) continue;
        m.vcpu().clear_kick();
        taken++;
      }
    });
    int lost = -1;
    // Where others compute, each turn may take the two threads a time slice.
    const auto enough = std::chrono::steady_clock::now() + 5s;
    for (int i = 0; i < kicks && !bad && lost < 0; i++) {
      if (i >= 200 && std::chrono::steady_clock::now() > enough) break;
      // At every phase of the runner: entering, running, halting, leaving.
      for (int spin = 0; spin < (i * 37) % 500; spin++) __builtin_ia32_pause();
      m.vcpu().kick();
      const auto limit = std::chrono::steady_clock::now() + 10s;
      for (unsigned turn = 1; taken.load() <= i && !bad; turn++) {
        if (turn % 100 == 0) std::this_thread::yield();
        if (std::chrono::steady_clock::now() < limit) continue;
        lost = i;
        bad = true;
        m.vcpu().kick();
      }
    }
    EXPECT_EQ(lost, -1) << "the number of the kick that was lost";
    over = true;
    m.vcpu().kick();
    runner.join();
    m.vcpu().clear_kick();
    EXPECT_FALSE(bad.load());
  }
}

void ignore_signal(int) {}

TEST_P(Interrupts, SignalsEndKvmRun) {
  SOFT_ONLY("the kernel's own behaviour");
  struct sigaction action {};
  action.sa_handler = ignore_signal;
  struct sigaction old {};
  sigaction(SIGUSR1, &action, &old);
  TestVm m(system(), {.irqchip = true});
  for (const Guest* g : {&guests::spin, &guests::idle}) {
    m.start_real(*g);
    for (int i = 0; i < 50; i++) {
      // Sent only when the guest runs: what is handled before KVM_RUN is the VMM's own affair.
      m.set_entry();
      ASSERT_TRUE(m.vcpu().set_mp_state(KVM_MP_STATE_RUNNABLE).ok());
      std::atomic<bool> returned{false};
      const pthread_t self = pthread_self();
      auto* counter = reinterpret_cast<u32*>(m.ram() + 0x500);
      const u32 before = *counter;
      std::thread sender([&] {
        while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) == before) std::this_thread::yield();
        std::this_thread::sleep_for(std::chrono::microseconds(i * 37 % 1000));
        pthread_kill(self, SIGUSR1);
        for (int wait = 0; wait < 5000 && !returned.load(); wait++) std::this_thread::sleep_for(1ms);
        if (!returned.load()) m.vcpu().kick();
      });
      EXPECT_EQ(m.vcpu().run(), -EINTR);
      EXPECT_EQ(m.exit_reason(), u32{KVM_EXIT_INTR});
      returned.store(true);
      sender.join();
      EXPECT_EQ(m.vcpu().run_page().immediate_exit, 0) << "the signal was lost";
      m.vcpu().clear_kick();
    }
  }
  // KVM_SET_SIGNAL_MASK: a signal blocked outside is seen inside.
  sigset_t block, before;
  sigemptyset(&block);
  sigaddset(&block, SIGUSR1);
  pthread_sigmask(SIG_BLOCK, &block, &before);
  struct {
    kvm_signal_mask head;
    u8 set[8];
  } mask{};
  mask.head.len = 8;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_SIGNAL_MASK, arg(mask)), 0);
  pthread_kill(pthread_self(), SIGUSR1);
  EXPECT_EQ(m.vcpu().run(), -EINTR);
  sigset_t pending;
  sigpending(&pending);
  EXPECT_TRUE(sigismember(&pending, SIGUSR1));  // it stays pending for the VMM to take
  mask.head.len = 4;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_SIGNAL_MASK, arg(mask)), -EINVAL);
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_SIGNAL_MASK, 0), 0);
  const timespec none{};
  sigtimedwait(&block, nullptr, &none);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  sigaction(SIGUSR1, &old, nullptr);
}

TEST_P(Interrupts, HaltedStateIsSeenAndRestored) {
  HARDWARE_OR_SOFT;
  TestVm m(system(), {.irqchip = true});
  m.start_real(guests::idle);
  // On a busy machine the first kick may come before the guest's HLT.
  auto state = m.vcpu().mp_state();
  for (auto wait = 5ms; wait < 5s; wait *= 2) {
    std::thread kicker([&] {
      std::this_thread::sleep_for(wait);
      m.vcpu().kick();
    });
    EXPECT_EQ(m.vcpu().run(), -EINTR);
    kicker.join();
    m.vcpu().clear_kick();
    state = m.vcpu().mp_state();
    ASSERT_TRUE(state.ok());
    if (state->mp_state == KVM_MP_STATE_HALTED) break;
  }
  EXPECT_EQ(state->mp_state, u32{KVM_MP_STATE_HALTED});
  ASSERT_TRUE(m.vcpu().set_mp_state(KVM_MP_STATE_RUNNABLE).ok());
  EXPECT_EQ(m.vcpu().mp_state()->mp_state, u32{KVM_MP_STATE_RUNNABLE});
}

// Split irqchip: the LAPIC here, the rest in the VMM, which is told of EOIs.
TEST_P(Interrupts, SplitIrqchipErrors) {
  SOFT_ONLY("an optional capability");
  const auto make = [&] { return std::move(*system().create_vm()); };
  const auto split = [&](Vm& vm, u64 pins) {
    kvm_enable_cap cap{};
    cap.cap = KVM_CAP_SPLIT_IRQCHIP;
    cap.args[0] = pins;
    return vm.endpoint().ioctl(KVM_ENABLE_CAP, arg(cap));
  };
  Vm vm = make();
  const long routes = vm.endpoint().ioctl(KVM_CHECK_EXTENSION, KVM_CAP_IRQ_ROUTING);
  EXPECT_EQ(vm.endpoint().ioctl(KVM_CHECK_EXTENSION, KVM_CAP_SPLIT_IRQCHIP), 1);
  EXPECT_EQ(split(vm, static_cast<u64>(routes) + 1), -EINVAL);
  EXPECT_EQ(split(vm, ~0ull), -EINVAL);
  // Without an irqchip: irqfds are not there yet, and what would end is not looked for.
  const int fd = eventfd_make();
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(fd);
  irqfd.gsi = 5;
  EXPECT_EQ(vm.endpoint().ioctl(KVM_IRQFD, arg(irqfd)), -EAGAIN);
  irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
  EXPECT_EQ(vm.endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  irqfd.flags = 1 << 8;
  EXPECT_EQ(vm.endpoint().ioctl(KVM_IRQFD, arg(irqfd)), -EINVAL);

  ASSERT_EQ(split(vm, 120), 0);  // other VMMs' IOAPICs have more than 24
  EXPECT_EQ(split(vm, 24), -EEXIST);
  EXPECT_EQ(vm.endpoint().ioctl(KVM_CREATE_IRQCHIP, 0), -EEXIST);
  kvm_pit_config pit{};
  EXPECT_EQ(vm.endpoint().ioctl(KVM_CREATE_PIT2, arg(pit)), -ENOENT);
  kvm_irqchip chip{};
  EXPECT_EQ(vm.endpoint().ioctl(KVM_GET_IRQCHIP, arg(chip)), -ENXIO);
  EXPECT_EQ(vm.endpoint().ioctl(KVM_SET_IRQCHIP, arg(chip)), -ENXIO);
  // Its routes are MSIs, and a line that is never lowered by it cannot be sampled again.
  kvm_irq_routing_entry route{};
  route.gsi = 5;
  route.type = KVM_IRQ_ROUTING_IRQCHIP;
  route.u.irqchip.irqchip = KVM_IRQCHIP_IOAPIC;
  route.u.irqchip.pin = 5;
  const auto error_of = [](const auto& result) { return result.ok() ? 0 : result.error().code; };
  EXPECT_EQ(error_of(vm.set_gsi_routing({&route, 1})), EINVAL);
  kvm_irq_routing_entry twice[] = {msi_route(5, 0x30), msi_route(5, 0x31)};
  EXPECT_EQ(error_of(vm.set_gsi_routing({twice, 2})), EINVAL);
  EXPECT_TRUE(vm.set_gsi_routing({twice, 1}).ok());
  irqfd.flags = KVM_IRQFD_FLAG_RESAMPLE;
  irqfd.resamplefd = static_cast<u32>(fd);
  EXPECT_EQ(vm.endpoint().ioctl(KVM_IRQFD, arg(irqfd)), -EINVAL);
  auto vcpu = vm.create_vcpu(0);
  ASSERT_TRUE(vcpu.ok());
  EXPECT_TRUE(vcpu->lapic().ok());

  Vm late = make();
  ASSERT_TRUE(late.create_vcpu(0).ok());
  EXPECT_EQ(split(late, 24), -EEXIST);
  Vm full = make();
  ASSERT_TRUE(full.create_irqchip().ok());
  EXPECT_EQ(split(full, 24), -EEXIST);
  ::close(fd);
}

TEST_P(Interrupts, SplitIrqchipTellsOfEois) {
  SOFT_ONLY("an optional capability");
  TestVm m(system(), {.split = true});
  Watchdog dog(m.vcpu());
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::lapic64, {{0x30, 64}, {0x31, 128}, {0x32, 64}, {0x41, 64}}));
  // Pin 5 is level-triggered, pin 6 is not; GSI 24 is, but is no pin.
  kvm_irq_routing_entry routes[] = {msi_route(5, 0x30, true), msi_route(6, 0x31), msi_route(24, 0x32, true)};
  ASSERT_TRUE(m.vm().set_gsi_routing({routes, 3}).ok());
  m.expect_io(0x90, true, 0xff);
  const auto expect_eoi = [&](u8 vector) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IOAPIC_EOI});
    EXPECT_EQ(m.vcpu().run_page().eoi.vector, vector);
  };
  const auto expect_none = [&] {  // of the two, the other vector comes last
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0x91);
  };
  // By line, which the chip does not hold: an MSI at each rise.
  for (u32 i = 1; i <= 3; i++) {
    ASSERT_TRUE(m.vm().irq_line(5, true).ok());
    ASSERT_NO_FATAL_FAILURE(expect_eoi(0x30));
    EXPECT_EQ(m.at<u32>(0x504), i);
    ASSERT_TRUE(m.vm().irq_line(5, false).ok());
  }
  ASSERT_TRUE(m.vm().irq_line(6, true).ok());
  ASSERT_TRUE(m.vm().irq_line(24, true).ok());
  ASSERT_NO_FATAL_FAILURE(expect_none());
  EXPECT_EQ(m.at<u32>(0x504), 4u);
  EXPECT_EQ(m.at<u32>(0x508), 1u);
  // By irqfd, while the vCPU waits in HLT.
  const int fd = eventfd_make();
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(fd);
  irqfd.gsi = 5;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  const u64 one = 1;
  ASSERT_EQ(::write(fd, &one, 8), 8);
  ASSERT_NO_FATAL_FAILURE(expect_eoi(0x30));
  // A route that changes takes its vector along, for the same irqfd.
  routes[0] = msi_route(5, 0x41, true);
  ASSERT_TRUE(m.vm().set_gsi_routing({routes, 2}).ok());
  ASSERT_EQ(::write(fd, &one, 8), 8);
  ASSERT_NO_FATAL_FAILURE(expect_eoi(0x41));
  // And one that is no longer level-triggered says nothing.
  routes[0] = msi_route(5, 0x41);
  ASSERT_TRUE(m.vm().set_gsi_routing({routes, 2}).ok());
  ASSERT_TRUE(m.vm().irq_line(5, true).ok());
  ASSERT_TRUE(m.vm().irq_line(6, true).ok());
  ASSERT_NO_FATAL_FAILURE(expect_none());
  EXPECT_EQ(m.at<u32>(0x504), 7u);
  EXPECT_EQ(m.at<u32>(0x508), 2u);
  ::close(fd);
}

}  // namespace
}  // namespace ring3::abitest
