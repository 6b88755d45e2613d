// Xen's interface as a VMM and a guest see it.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <chrono>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

constexpr u64 kShared = 0x23000, kInfo = 0x22000;
constexpr u32 kTwoLevel = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;

class Xen : public AbiTest {
 protected:
  static kvm_xen_hvm_attr attr(u16 type, u64 value) {
    kvm_xen_hvm_attr a{};
    a.type = type;
    std::memcpy(&a.u, &value, sizeof value);
    return a;
  }
  static long set(TestVm& m, u16 type, u64 value) {
    kvm_xen_hvm_attr a = attr(type, value);
    return m.vm().endpoint().ioctl(KVM_XEN_HVM_SET_ATTR, arg(a));
  }
  static long set_vcpu(TestVm& m, u16 type, u64 value) {
    kvm_xen_vcpu_attr a{};
    a.type = type;
    a.u.gpa = value;
    return m.vcpu().endpoint().ioctl(KVM_XEN_VCPU_SET_ATTR, arg(a));
  }
  static long timer(TestVm& m, u32 port, u64 expires) {
    kvm_xen_vcpu_attr a{};
    a.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER;
    a.u.timer = {port, kTwoLevel, expires};
    return m.vcpu().endpoint().ioctl(KVM_XEN_VCPU_SET_ATTR, arg(a));
  }
  static long channel(TestVm& m, u32 from, u32 port, u32 vcpu, int fd = -1) {
    kvm_xen_hvm_attr a{};
    a.type = KVM_XEN_ATTR_TYPE_EVTCHN;
    a.u.evtchn.send_port = from;
    a.u.evtchn.type = 2;
    a.u.evtchn.deliver.port = {port, vcpu, kTwoLevel};
    if (port == 0) a.u.evtchn.deliver.eventfd.fd = fd;
    return m.vm().endpoint().ioctl(KVM_XEN_HVM_SET_ATTR, arg(a));
  }
  static long send(TestVm& m, u32 port) {
    kvm_irq_routing_xen_evtchn e{port, 0, kTwoLevel};
    return m.vm().endpoint().ioctl(KVM_XEN_HVM_EVTCHN_SEND, arg(e));
  }
  /// Intercepted hypercalls, the page shared, vector 0x30.
  static void set_up(TestVm& m, bool long_mode = true, u64 shared = kShared) {
    kvm_xen_hvm_config config{};
    config.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
    config.msr = 0x40000200;
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_CONFIG, arg(config)), 0);
    ASSERT_EQ(set(m, KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode), 0);
    ASSERT_EQ(set(m, KVM_XEN_ATTR_TYPE_SHARED_INFO, shared >> 12), 0);
    ASSERT_EQ(set(m, KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 0x30), 0);
    ASSERT_EQ(set_vcpu(m, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, kInfo), 0);
  }
  /// An irqfd on GSI 32, which is an event channel.
  static void add_irqfd(TestVm& m, int fd, u32 port) {
    struct {
      kvm_irq_routing head;
      kvm_irq_routing_entry entry;
    } routes{};
    routes.head.nr = 1;
    routes.entry.gsi = 32;
    routes.entry.type = KVM_IRQ_ROUTING_XEN_EVTCHN;
    routes.entry.u.xen_evtchn = {port, 0, kTwoLevel};
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_SET_GSI_ROUTING, arg(routes)), 0);
    kvm_irqfd irqfd{};
    irqfd.fd = static_cast<u32>(fd);
    irqfd.gsi = 32;
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_IRQFD, arg(irqfd)), 0);
  }
  static void signal(int fd) {
    const u64 one = 1;
    ASSERT_EQ(::write(fd, &one, sizeof one), 8);
  }
  /// Until f, or for ten seconds.
  template <class F>
  static bool comes(F&& f) {
    for (int i = 0; i < 10000 && !f(); i++) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return f();
  }
};
INSTANTIATE_TEST_SUITE_P(Providers, Xen, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

TEST_P(Xen, WhatIsOffered) {
  SOFT_ONLY("a kernel may be built without");
  EXPECT_EQ(system().check_extension(KVM_CAP_XEN_HVM), 0x3f);
  TestVm m(system());
  kvm_xen_hvm_attr a = attr(77, 0);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_SET_ATTR, arg(a)), -ENOENT);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_GET_ATTR, arg(a)), -ENOENT);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_SET_ATTR, 8), -EFAULT);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_GET_ATTR, 8), -EFAULT);
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_EVTCHN_SEND, 8), -EFAULT);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_XEN_VCPU_SET_ATTR, 8), -EFAULT);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_XEN_VCPU_GET_ATTR, 8), -EFAULT);
  EXPECT_EQ(channel(m, 9, 0, 0, -1), -EBADF);
  const int other = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(channel(m, 9, 0, 0, other), -EINVAL);
  ::close(other);
  EXPECT_EQ(send(m, 9), -EINVAL);
}

TEST_P(Xen, EventsInterruptTheGuest) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::xen_upcalls, {{0x30, 256}}));
  ASSERT_NO_FATAL_FAILURE(set_up(m));
  m.expect_io(0x90, true, 0);
  EXPECT_EQ(send(m, 5), 0);
  m.expect_io(0x91, true, 0);
  EXPECT_EQ(m.at<u64>(kShared + 0x800), 1u << 5);

  // To a guest that waits, from another thread, by an irqfd.
  const int fd = eventfd_make();
  ASSERT_NO_FATAL_FAILURE(add_irqfd(m, fd, 70));
  std::thread later([fd] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    signal(fd);
  });
  m.expect_io(0x91, true, 0);
  later.join();
  EXPECT_EQ(m.at<u64>(kShared + 0x808), 1u << 6);

  ASSERT_EQ(timer(m, 7, 1), 0);  // long past
  m.expect_io(0x91, true, 0);
  EXPECT_EQ(m.at<u64>(kShared + 0x800), 1u << 5 | 1u << 7);
  EXPECT_EQ(m.at<u32>(0x504), 3u);
  ::close(fd);
}

TEST_P(Xen, AHypercallLooksForEvents) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::xen_forced_upcall, {{0x30, 256}}));
  ASSERT_NO_FATAL_FAILURE(set_up(m));
  ASSERT_EQ(set(m, KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40012), 0);
  m.expect_end();
  EXPECT_EQ(m.at<u64>(0x21000), 0x40012u);
  EXPECT_EQ(m.at<u32>(0x504), 1u) << "the upcall came before the next instruction";
  EXPECT_EQ(m.at<u32>(0x508), 1u);
}

TEST_P(Xen, SendsAndPolls) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::xen_send_and_poll, {{0x30, 256}}));
  ASSERT_NO_FATAL_FAILURE(set_up(m));
  const int fd = eventfd_make();
  ASSERT_EQ(channel(m, 20, 0, 0, fd), 0);
  ASSERT_EQ(timer(m, 9, 0), 0);
  m.put<u64>(kShared + 0xa00, ~0ull);  // all masked: the poll alone ends
  m.put<u32>(0x24000, 20);             // struct evtchn_send
  m.put<u64>(0x24010, 0x24030);        // struct sched_poll
  m.put<u32>(0x24018, 1);
  m.put<u32>(0x24030, 9);
  m.expect_io(0x90, true, 0);
  u64 count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), 8) << "EVTCHNOP_send";
  kvm_clock_data clock{};
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_CLOCK, arg(clock)), 0);
  ASSERT_EQ(timer(m, 9, clock.clock + 20'000'000), 0);
  m.expect_end();
  EXPECT_EQ(m.at<u64>(0x21000), 0u);
  EXPECT_EQ(m.at<u64>(0x21008), 0u);
  EXPECT_EQ(m.at<u64>(kShared + 0x800), 1u << 9);
  const u64 began = clock.clock;
  clock = {};
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_CLOCK, arg(clock)), 0);
  EXPECT_GE(clock.clock, began + 20'000'000);
  ::close(fd);
}

TEST_P(Xen, ThirtyTwoBits) {
  SOFT_ONLY("needs 32-bit code");
  TestVm m(system(), {.irqchip = true});
  m.start_flat(guests::xen_send32, false);
  ASSERT_NO_FATAL_FAILURE(set_up(m, false));
  ASSERT_EQ(channel(m, 20, 40, 0), 0);
  m.put<u32>(0x24000, 20);
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x21000), 0u);
  EXPECT_EQ(m.at<u32>(kShared + 0x804), 1u << 8);
  EXPECT_EQ(m.at<u32>(kInfo + 4), 1u << 1);
  EXPECT_EQ(m.at<u8>(kInfo), 1);
}

TEST_P(Xen, TheSharedPageMayVanish) {
  SOFT_ONLY("the kernel's own");
  TestVm m(system(), {.irqchip = true});
  void* const page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(page, MAP_FAILED);
  constexpr u64 kAt = 0x100000;
  ASSERT_TRUE(m.vm().set_user_memory_region(1, Gpa(kAt), 4096, Hva(reinterpret_cast<u64>(page))).ok());
  ASSERT_NO_FATAL_FAILURE(set_up(m, true, kAt));
  const int fd = eventfd_make();
  ASSERT_NO_FATAL_FAILURE(add_irqfd(m, fd, 5));
  ASSERT_EQ(::mprotect(page, 4096, PROT_NONE), 0);
  signal(fd);  // by a thread of the engine's own
  EXPECT_EQ(send(m, 6), -EFAULT);
  EXPECT_TRUE(comes([&] {
    pollfd p{fd, POLLIN, 0};
    return ::poll(&p, 1, 0) == 0;
  }));
  EXPECT_EQ(set(m, KVM_XEN_ATTR_TYPE_SHARED_INFO, kAt >> 12), -EFAULT);
  ASSERT_EQ(::mprotect(page, 4096, PROT_READ | PROT_WRITE), 0);
  EXPECT_EQ(send(m, 6), 0);
  signal(fd);
  EXPECT_TRUE(comes([&] { return (__atomic_load_n(static_cast<u64*>(page) + 0x800 / 8, __ATOMIC_SEQ_CST) & 1u << 5) != 0; }));
  // Without its memslot, and where none ever was.
  ASSERT_TRUE(m.vm().set_user_memory_region(1, Gpa(kAt), 0, Hva(reinterpret_cast<u64>(page))).ok());
  EXPECT_EQ(send(m, 7), -EFAULT);
  EXPECT_EQ(::munmap(page, 4096), 0);
  EXPECT_EQ(set_vcpu(m, KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, kAt), -EFAULT);
  ::close(fd);
}

TEST_P(Xen, AVmEndsWithTimersAndChannels) {
  SOFT_ONLY("leaks are the sanitizer's to find");
  const int fd = eventfd_make();
  for (int i = 0; i < 20; i++) {
    TestVm m(system(), {.irqchip = true});
    ASSERT_NO_FATAL_FAILURE(set_up(m));
    ASSERT_NO_FATAL_FAILURE(add_irqfd(m, fd, 5));
    ASSERT_EQ(channel(m, 20, 0, 0, fd), 0);
    kvm_clock_data clock{};
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_CLOCK, arg(clock)), 0);
    ASSERT_EQ(timer(m, 9, clock.clock + 200'000 * static_cast<u64>(i)), 0);
  }
  ::close(fd);
}

TEST_P(Xen, Hypercalls) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  Endpoint& vm = m.vm().endpoint();
  add_hyperv_cpuid(m);
  kvm_xen_hvm_config config{};
  config.msr = 0x40000200;
  config.flags = KVM_XEN_HVM_CONFIG_SHARED_INFO;
  EXPECT_EQ(vm.ioctl(KVM_XEN_HVM_CONFIG, arg(config)), -EINVAL);
  config.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
  config.blob_size_64 = 1;
  EXPECT_EQ(vm.ioctl(KVM_XEN_HVM_CONFIG, arg(config)), -EINVAL);
  config.blob_size_64 = 0;
  ASSERT_EQ(vm.ioctl(KVM_XEN_HVM_CONFIG, arg(config)), 0);
  m.start_flat(guests::xen_hypercalls, true);
  auto expect_call = [&](u64 input, u64 result) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_XEN});
    auto& call = m.vcpu().run_page().xen;
    EXPECT_EQ(call.type, u32{KVM_EXIT_XEN_HCALL});
    EXPECT_EQ(call.u.hcall.longmode, 1u);
    EXPECT_EQ(call.u.hcall.cpl, 0u);
    EXPECT_EQ(call.u.hcall.input, input);
    call.u.hcall.result = result;
  };
  ASSERT_NO_FATAL_FAILURE(expect_call(17, 0xcafef00dfbfbffff));
  for (u64 i = 0; i < 6; i++) EXPECT_EQ(m.vcpu().run_page().xen.u.hcall.params[i], 0x101 + i);
  ASSERT_NO_FATAL_FAILURE(expect_call(20, 2));
  m.expect_end();
  EXPECT_EQ(m.at<u64>(0x21000), 0xcafef00dfbfbffffu);
  EXPECT_EQ(m.at<u64>(0x21008), 2u);
  EXPECT_EQ(m.at<u64>(0x21010), 4u);  // HV_STATUS_INVALID_ALIGNMENT
}

TEST_P(Xen, HypercallPagesOfTheVmm) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  std::vector<u8> blob(2 * 4096, 0x90);
  blob[4096] = 0x91;
  kvm_xen_hvm_config config{};
  config.msr = 0x40000200;
  config.blob_addr_32 = reinterpret_cast<u64>(blob.data());
  config.blob_size_32 = 2;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_XEN_HVM_CONFIG, arg(config)), 0);
  auto write = [&](u64 value) {
    struct {
      kvm_msrs head;
      kvm_msr_entry entry;
    } msrs{};
    msrs.head.nmsrs = 1;
    msrs.entry.index = config.msr;
    msrs.entry.data = value;
    return m.vcpu().endpoint().ioctl(KVM_SET_MSRS, arg(msrs));
  };
  EXPECT_EQ(write(0x36000), 1);
  EXPECT_EQ(write(0x37001), 1);
  EXPECT_EQ(write(0x37002), 0);       // there is no third
  EXPECT_EQ(write(0x10000000), 0);    // no memory
  EXPECT_EQ(m.at<u8>(0x36000), 0x90);
  EXPECT_EQ(m.at<u8>(0x37000), 0x91);
}

}  // namespace
}  // namespace ring3::abitest
