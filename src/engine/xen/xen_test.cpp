#include <gtest/gtest.h>

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include "base/split_mix.hpp"
#include "engine/irq/test_machine.hpp"
#include "engine/xen/vcpu.hpp"

namespace ring3::engine::xen {
namespace {

constexpr u64 kRam = 0x10000, kShared = 0x4000, kInfo = 0x5040, kTime = 0x6000, kArea = 0x6100;
constexpr u32 kTwoLevel = KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
constexpr u64 kMs = 1'000'000;

/// Memory up to kRam; a page that is missing can be made.
struct Ram {
  std::vector<u8> bytes = std::vector<u8>(kRam);
  u64 missing = ~0ull;
  bool has(Gpa a, std::size_t n) const {
    return a.value <= kRam && n <= kRam - a.value && a.value >> kPageShift != missing;
  }
  bool read(Gpa a, void* to, std::size_t n) const { return has(a, n) && (std::memcpy(to, bytes.data() + a.value, n), true); }
  bool write(Gpa a, const void* p, std::size_t n) { return has(a, n) && (std::memcpy(bytes.data() + a.value, p, n), true); }
  int set_bits(Gpa a, u8 bits) {
    if (!has(a, 1)) return -1;
    const u8 before = bytes[a.value];
    bytes[a.value] |= bits;
    return before;
  }
};

struct TestProcessor final : Processor {
  Ram& ram;
  int events = 0, times = 0;
  explicit TestProcessor(Ram& r) : ram(r) {}
  bool read(Gpa a, void* to, std::size_t n) override { return ram.read(a, to, n); }
  bool write(Gpa a, const void* p, std::size_t n) override { return ram.write(a, p, n); }
  int set_bits(Gpa a, u8 bits) override { return ram.set_bits(a, bits); }
  void attend_events() override { events++; }
  void attend_time() override { times++; }
  /// Linear pages in another order, so that what crosses a page shows.
  bool translate(u64 linear, Gpa* at) override {
    if (linear >= kRam) return false;
    *at = Gpa(linear ^ 0x1000);
    return true;
  }
};

struct Xen : testing::Test, Host {
  TestMachine m{2};
  Ram ram;
  KvmClock clock{m.clock};
  Domain domain{*this, m.clock, clock};
  std::vector<std::unique_ptr<TestProcessor>> processors;
  std::vector<std::unique_ptr<Vcpu>> vcpus;

  Xen() {
    for (unsigned i = 0; i < 2; i++) {
      processors.push_back(std::make_unique<TestProcessor>(ram));
      vcpus.push_back(std::make_unique<Vcpu>(domain, *processors[i], m.timers, *m.tscs[i], m.sync, m.lapics[i].get(), i, i));
    }
    m.clock.advance(1000 * kMs);
  }
  bool read(Gpa a, void* to, std::size_t n) override { return ram.read(a, to, n); }
  bool write(Gpa a, const void* p, std::size_t n) override { return ram.write(a, p, n); }
  int set_bits(Gpa a, u8 bits) override { return ram.set_bits(a, bits); }
  bool read_vmm(u64 address, void* to, std::size_t n) override {
    return address == 0x77000 && (std::memset(to, 0x77, n), true);
  }
  Vcpu* find_vcpu(u32 id) override { return id < vcpus.size() ? vcpus[id].get() : nullptr; }
  int copy_eventfd(int fd) override {
    const int copy = ::dup(fd);
    return copy < 0 ? -errno : copy;
  }

  template <class T>
  T at(u64 a) const {
    T v;
    std::memcpy(&v, ram.bytes.data() + a, sizeof v);
    return v;
  }
  template <class T>
  void put(u64 a, T v) {
    std::memcpy(ram.bytes.data() + a, &v, sizeof v);
  }
  int set(u16 type, u64 value) {
    kvm_xen_hvm_attr attr{};
    attr.type = type;
    std::memcpy(&attr.u, &value, sizeof value);
    return domain.set_attr(attr);
  }
  int set_vcpu(u16 type, u64 value, unsigned v = 0) {
    kvm_xen_vcpu_attr attr{};
    attr.type = type;
    attr.u.gpa = value;
    return vcpus[v]->set_attr(attr);
  }
  kvm_xen_vcpu_attr get_vcpu(u16 type, unsigned v = 0) {
    kvm_xen_vcpu_attr attr{};
    attr.type = type;
    EXPECT_EQ(vcpus[v]->get_attr(&attr), 0) << type;
    return attr;
  }
  int channel(u32 from, u32 type, u32 flags, u32 port, u32 vcpu_or_fd, u32 priority = kTwoLevel) {
    kvm_xen_hvm_attr attr{};
    attr.type = KVM_XEN_ATTR_TYPE_EVTCHN;
    attr.u.evtchn.send_port = from;
    attr.u.evtchn.type = type;
    attr.u.evtchn.flags = flags;
    attr.u.evtchn.deliver.port.port = port;
    attr.u.evtchn.deliver.port.vcpu = vcpu_or_fd;
    attr.u.evtchn.deliver.port.priority = priority;
    return domain.set_attr(attr);
  }
  int timer(u32 port, u64 deadline, u32 priority = kTwoLevel) {
    kvm_xen_vcpu_attr attr{};
    attr.type = KVM_XEN_VCPU_ATTR_TYPE_TIMER;
    attr.u.timer.port = port;
    attr.u.timer.priority = priority;
    attr.u.timer.expires_ns = deadline;
    return vcpus[0]->set_attr(attr);
  }
  /// Pages and areas of both vCPUs, in the layout of 64 bits or 32.
  void share(bool long_mode = true) {
    EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_LONG_MODE, long_mode), 0);
    EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, kShared >> kPageShift), 0);
    EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, kInfo), 0);
    EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, kInfo + 64, 1), 0);
  }
  void all_events_here() {
    kvm_xen_hvm_config config{};
    config.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL | KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
    config.msr = 0x40000000;
    ASSERT_EQ(domain.configure(config), 0);
  }
  std::optional<u64> call(u64 number, u64 a = 0, u64 b = 0, u64 c = 0, bool long_mode = true) {
    const u64 args[6] = {a, b, c, 0, 0, 0};
    return vcpus[0]->hypercall({number, args, long_mode});
  }
  static u64 error(int e) { return static_cast<u64>(-i64{e}); }
};

TEST_F(Xen, AttributesComeBack) {
  kvm_xen_hvm_attr attr{};
  attr.type = KVM_XEN_ATTR_TYPE_SHARED_INFO;
  EXPECT_EQ(domain.get_attr(&attr), 0);
  EXPECT_EQ(attr.u.shared_info.gfn, ~0ull);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, 5), 0);
  EXPECT_EQ(domain.get_attr(&attr), 0);
  EXPECT_EQ(attr.u.shared_info.gfn, 5u);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, kRam >> kPageShift), -EFAULT);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, 1ull << 60), -EFAULT);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, ~0ull), 0);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 15), -EINVAL);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 0x31), 0);
  EXPECT_EQ(domain.upcall_vector(), 0x31);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40011), 0);
  EXPECT_EQ(domain.version(), 0x40011u);
  EXPECT_EQ(set(5, 0), -ENOENT);
  attr.type = KVM_XEN_ATTR_TYPE_EVTCHN;
  EXPECT_EQ(domain.get_attr(&attr), -ENOENT);

  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO).u.gpa, ~0ull);
  for (const u16 type : {KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO, KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR}) {
    EXPECT_EQ(set_vcpu(type, 0x3008), 0);
    EXPECT_EQ(get_vcpu(type).u.gpa, 0x3008u);
    EXPECT_EQ(set_vcpu(type, 0x3ff0), -EINVAL) << "crosses a page";
    EXPECT_EQ(get_vcpu(type).u.gpa, 0x3008u);
    EXPECT_EQ(set_vcpu(type, 0x40000), -EFAULT);
    EXPECT_EQ(set_vcpu(type, ~0ull), 0);
  }
  kvm_xen_vcpu_attr vcpu_attr{};
  vcpu_attr.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR;
  EXPECT_EQ(vcpus[0]->get_attr(&vcpu_attr), -ENOENT);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, 1).u.vcpu_id, 1u);
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, 7), 0);
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID, ApicBus::kMaxVcpus), -EINVAL);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID).u.vcpu_id, 7u);
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 3), -EINVAL);
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 0x33), 0);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR).u.vector, 0x33);
  EXPECT_EQ(set_vcpu(9, 0), -ENOENT);
  EXPECT_EQ(timer(13, 0, 0), -EINVAL);
  EXPECT_EQ(timer(0, 0, 0), 0);
}

TEST_F(Xen, HypercallPages) {
  const GuestWriter writer = [this](Gpa a, const void* p, std::size_t n) { return ram.write(a, p, n); };
  kvm_xen_hvm_config config{};
  config.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
  config.msr = 0x40000000;
  config.blob_size_64 = 1;
  EXPECT_EQ(domain.configure(config), -EINVAL);
  config.flags = KVM_XEN_HVM_CONFIG_SHARED_INFO;
  EXPECT_EQ(domain.configure(config), -EINVAL);
  EXPECT_FALSE(domain.enabled());

  config = {};
  config.msr = 0x40000000;
  config.blob_addr_64 = 0x76000;
  config.blob_size_64 = 2;
  EXPECT_EQ(domain.configure(config), 0);
  EXPECT_TRUE(domain.is_msr(0x40000000));
  EXPECT_FALSE(domain.intercepts());
  EXPECT_TRUE(domain.write_page(0x2001, true, false, writer));
  EXPECT_EQ(at<u64>(0x2ff8), 0x7777777777777777u);
  EXPECT_TRUE(domain.long_mode());
  EXPECT_FALSE(domain.write_page(0x2000, true, false, writer)) << "not there in the VMM";
  EXPECT_FALSE(domain.write_page(0x2002, true, false, writer));
  EXPECT_FALSE(domain.write_page(0x2001, false, false, writer)) << "none for 32 bits";
  EXPECT_FALSE(domain.long_mode());

  config = {};
  config.flags = KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL;
  config.msr = 0x40000000;
  EXPECT_EQ(domain.configure(config), 0);
  EXPECT_TRUE(domain.write_page(0x2000, true, true, writer));
  EXPECT_EQ(at<u64>(0x2000 + 32 * 29), 0xd9010f0000001db8u);
  EXPECT_EQ(at<u16>(0x2000 + 32 * 29 + 8), 0xccc3u);
  EXPECT_FALSE(domain.write_page(0x2001, true, true, writer));
  EXPECT_FALSE(domain.write_page(kRam, true, true, writer));
}

TEST_F(Xen, TheSharedPagesClock) {
  for (const bool long_mode : {true, false}) {
    share(long_mode);
    const u64 at_clock = kShared + (long_mode ? 0xc00 : 0x900);
    const u64 ns = m.clock.realtime_ns() - clock.now_ns();
    EXPECT_EQ(at<u32>(at_clock), long_mode ? 2u : 2u);
    EXPECT_EQ(at<u32>(at_clock + 4), ns / 1'000'000'000);
    EXPECT_EQ(at<u32>(at_clock + 8), ns % 1'000'000'000);
    EXPECT_EQ(at<u32>(kShared + (long_mode ? 0xc0c : 0x924)), 0u);
  }
}

TEST_F(Xen, EventsInBothLayouts) {
  for (const bool long_mode : {true, false}) {
    ram.bytes.assign(kRam, 0);
    share(long_mode);
    const u32 bits = long_mode ? 64 : 32, last = bits * bits - 1;
    const u64 mask = kShared + 0x800 + last / 8 + 1, select = kInfo + 64 + (long_mode ? 8 : 4);
    EXPECT_EQ(domain.deliver(1, last), 1);
    EXPECT_EQ(at<u8>(kShared + 0x800 + last / 8), 0x80);
    EXPECT_EQ(at<u8>(select + bits / 8 - 1), 0x80);
    EXPECT_EQ(at<u8>(kInfo + 64), 1);
    EXPECT_EQ(at<u8>(kInfo), 0);
    EXPECT_EQ(domain.deliver(1, last), 0) << "was pending";
    EXPECT_EQ(domain.deliver(1, last + 1), -EINVAL);
    EXPECT_EQ(domain.deliver(2, 5), -EINVAL);
    put<u8>(mask, 0x20);
    EXPECT_EQ(domain.deliver(0, 5), -ENOTCONN);
    EXPECT_EQ(at<u8>(kShared + 0x800), 0x20);
    EXPECT_EQ(at<u8>(kInfo), 0);
  }
}

TEST_F(Xen, EventsOfTheVmm) {
  kvm_irq_routing_xen_evtchn e{9, 0, kTwoLevel};
  EXPECT_EQ(domain.send(e), -EINVAL) << "nothing is shared";
  share();
  EXPECT_EQ(domain.send(e), 0);
  EXPECT_EQ(domain.send(e), 0);
  put<u16>(kShared + 0xa00, 0x400);
  e.port = 10;
  EXPECT_EQ(domain.send(e), 0) << "masked";
  e.priority = 0;
  EXPECT_EQ(domain.send(e), -EINVAL);
  e = {0, 0, kTwoLevel};
  EXPECT_EQ(domain.send(e), -EINVAL);
  e = {4096, 0, kTwoLevel};
  EXPECT_EQ(domain.send(e), -EINVAL);
  e = {11, 0, kTwoLevel};
  ram.missing = kShared >> kPageShift;
  EXPECT_EQ(domain.send(e), -EFAULT);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_SHARED_INFO, ~0ull), 0);
  EXPECT_EQ(domain.send(e), -EINVAL);
}

TEST_F(Xen, UpcallsByTheVectorOfAll) {
  share();
  EXPECT_EQ(domain.deliver(0, 70), 1);
  EXPECT_GT(processors[0]->events, 0);
  EXPECT_FALSE(vcpus[0]->upcall_pending()) << "no vector";
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_UPCALL_VECTOR, 0x31), 0);
  EXPECT_TRUE(vcpus[0]->upcall_pending());
  EXPECT_FALSE(vcpus[1]->upcall_pending());
  put<u8>(kInfo, 0);
  EXPECT_FALSE(vcpus[0]->upcall_pending());
}

TEST_F(Xen, UpcallsByTheLapic) {
  share();
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 0x51, 1), 0);
  EXPECT_EQ(domain.deliver(1, 3), 1);
  EXPECT_EQ(m.lapics[1]->ack_interrupt(), 0x51);
  m.lapics[1]->write_eoi();
  EXPECT_EQ(domain.deliver(1, 4), 1) << "of a word that the guest knows of already";
  EXPECT_EQ(m.lapics[1]->ack_interrupt(), -1);
}

TEST_F(Xen, EventsWaitForTheirArea) {
  share();
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR, 0x51), 0);
  ram.missing = kInfo >> kPageShift;
  EXPECT_EQ(domain.deliver(0, 64), 1);
  vcpus[0]->attend();
  EXPECT_EQ(at<u8>(kInfo), 0);
  ram.missing = ~0ull;
  vcpus[0]->attend();
  EXPECT_EQ(at<u8>(kInfo), 1);
  EXPECT_EQ(at<u64>(kInfo + 8), 2u);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x51);
}

TEST_F(Xen, WhatTheGuestSends) {
  share();
  put<u32>(0x1ffe ^ 0x1000, 0);
  const auto send = [&](u32 port) {
    put<u32>(0x3000, port);
    return call(32, 4, 0x2000);
  };
  EXPECT_EQ(send(127), std::nullopt) << "the VMM's";
  EXPECT_EQ(call(32, 4, kRam), error(EFAULT));
  EXPECT_EQ(call(32, 5, 0x2000), std::nullopt);
  EXPECT_EQ(channel(127, kInterdomain, 0, 15, 1), 0);
  EXPECT_EQ(channel(127, kInterdomain, 0, 15, 1), -EEXIST);
  EXPECT_EQ(send(127), 0u);
  EXPECT_EQ(at<u8>(kInfo + 64), 1);
  EXPECT_EQ(channel(127, kInterdomain, KVM_XEN_EVTCHN_UPDATE, 15, 0), 0);
  put<u64>(kShared + 0x800, 0);
  EXPECT_EQ(send(127), 0u);
  EXPECT_EQ(at<u8>(kInfo), 1);
  EXPECT_EQ(channel(127, kInterdomain, KVM_XEN_EVTCHN_UPDATE, 16, 0), -EINVAL);
  EXPECT_EQ(channel(127, kIpi, KVM_XEN_EVTCHN_UPDATE, 15, 0), -EINVAL);
  EXPECT_EQ(channel(128, kInterdomain, KVM_XEN_EVTCHN_UPDATE, 15, 0), -ENOENT);
  EXPECT_EQ(channel(127, kInterdomain, KVM_XEN_EVTCHN_UPDATE, 15, 9), 0) << "a vCPU that may come";
  put<u64>(kShared + 0x800, 0);
  EXPECT_EQ(send(127), std::nullopt) << "which is not there";
  EXPECT_EQ(channel(20, kIpi, 0, 21, 0), -EINVAL) << "an IPI is of one number";
  EXPECT_EQ(channel(20, kIpi, 0, 20, 0), 0);
  EXPECT_EQ(channel(21, 4, 0, 21, 0), -EINVAL);
  EXPECT_EQ(channel(21, kInterdomain, 0, 4096, 0), -EINVAL);
  EXPECT_EQ(channel(21, kInterdomain, 0, 22, 0, 1), -EINVAL);
  EXPECT_EQ(channel(0, kInterdomain, 0, 22, 0), -EINVAL);
  EXPECT_EQ(channel(4096, kInterdomain, 0, 22, 0), -EINVAL);
  EXPECT_EQ(channel(21, kInterdomain, 3, 22, 0), -EINVAL);

  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  EXPECT_EQ(channel(22, kInterdomain, 0, 0, static_cast<u32>(fd)), 0);
  EXPECT_EQ(channel(23, kInterdomain, 0, 0, static_cast<u32>(-1)), -EBADF);
  EXPECT_EQ(send(22), 0u);
  u64 count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), 8);
  EXPECT_EQ(count, 1u);
  ::close(fd);
  EXPECT_EQ(send(22), 0u) << "by a copy of its own";
  EXPECT_EQ(channel(22, 0, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), 0);
  EXPECT_EQ(channel(22, 0, KVM_XEN_EVTCHN_DEASSIGN, 0, 0), -ENOENT);
  EXPECT_EQ(channel(0, 0, KVM_XEN_EVTCHN_RESET, 0, 0), 0);
  EXPECT_EQ(send(20), std::nullopt);
}

TEST_F(Xen, TheTimer) {
  share();
  EXPECT_EQ(call(15, 1000), std::nullopt) << "has no port";
  EXPECT_EQ(call(24, 8, 0, 0x2000), std::nullopt);
  EXPECT_EQ(timer(13, 0), 0);
  const u64 now = clock.now_ns();
  EXPECT_EQ(call(15, now + 100 * kMs), 0u);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, now + 100 * kMs);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.port, 13u);
  m.pass(99 * kMs);
  vcpus[0]->attend();
  EXPECT_EQ(at<u8>(kInfo), 0);
  m.pass(2 * kMs);
  vcpus[0]->attend();
  EXPECT_EQ(at<u8>(kInfo), 1);
  EXPECT_EQ(at<u16>(kShared + 0x800), 1u << 13);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, 0u);

  put<u16>(kShared + 0x800, 0);
  EXPECT_EQ(call(15, 1), 0u) << "past";
  vcpus[0]->attend();
  EXPECT_EQ(at<u16>(kShared + 0x800), 1u << 13);
  EXPECT_EQ(call(15, clock.now_ns() + kMs), 0u);
  EXPECT_EQ(call(15, 0), 0u) << "stopped";
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, 0u);
  EXPECT_EQ(call(15, ~0ull), 0u) << "an overflow: soon";
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, clock.now_ns() + 100 * kMs);
  const u64 in_two_words = clock.now_ns() + (1ull << 33);
  EXPECT_EQ(call(15, in_two_words & 0xffffffff, in_two_words >> 32, 0, false), 0u);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, in_two_words);
}

TEST_F(Xen, TheSingleshotTimer) {
  share();
  EXPECT_EQ(timer(13, 0), 0);
  // At the end of memory: 12 bytes are there, 16 are not.
  const u64 deadline = clock.now_ns() + kMs, linear = kRam - 12;
  put<u64>(linear ^ 0x1000, deadline);
  put<u32>((linear ^ 0x1000) + 8, 0);
  EXPECT_EQ(call(24, 8, 0, linear, true), error(EFAULT));
  EXPECT_EQ(call(24, 8, 0, linear, false), 0u);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, deadline);
  EXPECT_EQ(call(24, 8, 1, linear, false), error(EINVAL)) << "another vCPU's";
  EXPECT_EQ(call(24, 9, 1, 0), error(EINVAL));
  EXPECT_EQ(call(24, 9, 0, 0), 0u);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_TIMER).u.timer.expires_ns, 0u);
  // Across two pages, which do not follow each other in memory.
  put<u64>(0x1ff8 ^ 0x1000, clock.now_ns() - 1);
  put<u32>(0x2000 ^ 0x1000, kTimerInFuture);
  EXPECT_EQ(call(24, 8, 0, 0x1ff8), error(ETIME));
  EXPECT_EQ(call(24, 4, 0, 0x1ff8), std::nullopt);
}

TEST_F(Xen, Polls) {
  share();
  const auto poll = [&](std::initializer_list<u32> ports, u64 timeout = 0) {
    u64 to = 0x3100;
    for (const u32 p : ports) put<u32>(std::exchange(to, to + 4), p);
    put<SchedPoll>(0x3000, {0x2100, static_cast<u32>(ports.size()), 0, timeout});
    return call(29, 3, 0x2000);
  };
  EXPECT_EQ(poll({5}), 0u);
  EXPECT_FALSE(vcpus[0]->polling()) << "the VMM may send events by itself";
  all_events_here();
  EXPECT_EQ(poll({5}), 0u);
  EXPECT_TRUE(vcpus[0]->polling());
  EXPECT_FALSE(vcpus[0]->poll_over());
  put<u64>(kShared + 0xa00, ~0ull);  // masked: no upcall, but who polls wakes
  EXPECT_EQ(domain.deliver(0, 6), -ENOTCONN);
  EXPECT_FALSE(vcpus[0]->poll_over());
  EXPECT_EQ(domain.deliver(0, 5), -ENOTCONN);
  EXPECT_TRUE(vcpus[0]->poll_over());
  vcpus[0]->end_poll();
  EXPECT_EQ(poll({5}), 0u);
  EXPECT_FALSE(vcpus[0]->polling()) << "pending already";
  EXPECT_EQ(poll({7, 8}), 0u);
  EXPECT_EQ(domain.deliver(0, 9), -ENOTCONN);
  EXPECT_TRUE(vcpus[0]->poll_over()) << "any wakes who polls several";
  vcpus[0]->end_poll();
  EXPECT_EQ(poll({10}, 20 * kMs), 0u);
  m.pass(19 * kMs);
  EXPECT_FALSE(vcpus[0]->poll_over());
  m.pass(2 * kMs);
  EXPECT_TRUE(vcpus[0]->poll_over());
  vcpus[0]->end_poll();
  put<u64>(kShared + 0xa00, 0);
  EXPECT_EQ(poll({10}), 0u);
  EXPECT_EQ(domain.deliver(0, 11), 1);
  EXPECT_TRUE(vcpus[0]->poll_over()) << "an event of another port";
  vcpus[0]->end_poll();

  EXPECT_EQ(poll({4096}), error(EINVAL));
  put<SchedPoll>(0x3000, {kRam - 4, 2, 0, 0});
  EXPECT_EQ(call(29, 3, 0x2000), error(EFAULT));
  put<SchedPoll>(0x3000, {0x2100, 129, 0, 0});
  EXPECT_EQ(call(29, 3, 0x2000), error(EINVAL));
  EXPECT_EQ(call(29, 3, kRam), error(EFAULT));
  EXPECT_EQ(call(29, 3, 0x2000, 0, false), 0u) << "32 bits: comes back at once";
  EXPECT_FALSE(vcpus[0]->polling());
  EXPECT_EQ(call(29, 0), 0u);
  EXPECT_EQ(call(29, 1), std::nullopt) << "SCHEDOP_block is the VMM's";
}

TEST_F(Xen, Version) {
  EXPECT_EQ(call(17, 0), std::nullopt);
  EXPECT_EQ(set(KVM_XEN_ATTR_TYPE_XEN_VERSION, 0x40012), 0);
  EXPECT_EQ(call(17, 0), 0x40012u);
  EXPECT_EQ(call(17, 1), std::nullopt);
  EXPECT_EQ(call(18), std::nullopt);
}

TEST_F(Xen, TimePages) {
  share();
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO, kTime), 0);
  EXPECT_GT(processors[0]->times, 0);
  put<u32>(kTime, 7);
  vcpus[0]->update_time();
  EXPECT_EQ(at<u32>(kInfo + 32), 2u);
  EXPECT_EQ(at<u32>(kTime), 10u);
  EXPECT_EQ(std::memcmp(ram.bytes.data() + kInfo + 36, ram.bytes.data() + kTime + 4, 28), 0);
  EXPECT_NE(at<u32>(kTime + 24), 0u);
  vcpus[0]->update_time();
  EXPECT_EQ(at<u32>(kTime), 10u) << "not due";
  vcpus[0]->request_time_update();
  ram.missing = kTime >> kPageShift;
  vcpus[0]->update_time();
  EXPECT_EQ(at<u32>(kInfo + 32), 4u);
}

kvm_xen_vcpu_attr runstate(u16 type, u64 state, u64 entry, u64 running, u64 runnable, u64 blocked, u64 offline) {
  kvm_xen_vcpu_attr a{};
  a.type = type;
  a.u.runstate.state = state;
  a.u.runstate.state_entry_time = entry;
  a.u.runstate.time_running = running;
  a.u.runstate.time_runnable = runnable;
  a.u.runstate.time_blocked = blocked;
  a.u.runstate.time_offline = offline;
  return a;
}

TEST(XenRunstate, Adds) {
  Runstate r;
  r.enter(State::kRunning, 1000, 50, false);
  kvm_xen_vcpu_attr a{};
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_offline, 1000u);
  r.enter(State::kBlocked, 1500, 150, true);
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_running, 400u);
  EXPECT_EQ(a.u.runstate.time_runnable, 100u) << "it waited for a CPU";
  r.enter(State::kRunning, 1800, 250, true);
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_blocked, 300u);
  EXPECT_EQ(a.u.runstate.time_runnable, 100u) << "blocked is not waiting for one";
  r.enter(State::kRunning, 1900, 9250, true);
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_runnable, 200u) << "never more than has passed";
  r.enter(State::kRunning, 2000, 9300, false);
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_runnable, 200u) << "another thread's";
  EXPECT_EQ(a.u.runstate.state_entry_time, 2000u);
  EXPECT_EQ(a.u.runstate.time_running + a.u.runstate.time_runnable + a.u.runstate.time_blocked + a.u.runstate.time_offline, 2000u);
}

TEST(XenRunstate, SetAndAdjust) {
  Runstate r;
  constexpr u16 kData = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA, kAdjust = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST;
  EXPECT_EQ(r.set(runstate(kData, 4, 0, 0, 0, 0, 0), 100, 0), -EINVAL);
  EXPECT_EQ(r.set(runstate(kData, 2, 10, 1, 2, 3, 5), 100, 0), -EINVAL) << "does not add up";
  EXPECT_EQ(r.set(runstate(kData, 2, 110, 100, 2, 3, 5), 100, 0), -EINVAL) << "of the future";
  EXPECT_EQ(r.set(runstate(kData, 2, 10, 1, 2, 3, 4), 100, 0), 0);
  kvm_xen_vcpu_attr a{};
  r.get(&a);
  EXPECT_EQ(a.u.runstate.state, 2u);
  EXPECT_EQ(a.u.runstate.time_offline, 4u);
  EXPECT_EQ(r.adjust(runstate(kAdjust, ~0ull, 0, -1ull, 1, 0, 0), 100), 0);
  EXPECT_EQ(r.adjust(runstate(kAdjust, ~0ull, 1, -1ull, 1, 0, 0), 100), -EINVAL);
  EXPECT_EQ(r.adjust(runstate(kAdjust, ~0ull, 91, 91, 0, 0, 0), 100), -EINVAL) << "of the future";
  r.get(&a);
  EXPECT_EQ(a.u.runstate.time_running, 0u);
  EXPECT_EQ(a.u.runstate.time_runnable, 3u);
}

TEST_F(Xen, TheGuestsRunstate) {
  for (const bool long_mode : {true, false}) {
    share(long_mode);
    EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR, kArea), 0);
    EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, 2), 0);
    m.clock.advance(5 * kMs);
    vcpus[0]->running();
    const u64 entry = kArea + (long_mode ? 8 : 4);
    EXPECT_EQ(at<u32>(kArea), 0u);
    EXPECT_EQ(at<u64>(entry), clock.now_ns());
    EXPECT_GE(at<u64>(entry + 8 + 16), 5 * kMs);
    EXPECT_EQ(at<u64>(entry + 8) + at<u64>(entry + 16) + at<u64>(entry + 24) + at<u64>(entry + 32), at<u64>(entry));
    ram.missing = kArea >> kPageShift;
    vcpus[0]->running();
    ram.missing = ~0ull;
  }
  EXPECT_EQ(set_vcpu(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT, 4), -EINVAL);
  kvm_xen_vcpu_attr a{};
  a.type = KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST;
  EXPECT_EQ(vcpus[0]->get_attr(&a), -EINVAL);
  EXPECT_EQ(get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT).u.runstate.state, 0u);
}

TEST_F(Xen, AnythingAGuestOrAVmmSays) {
  SplitMix64 rng(20261122);
  all_events_here();
  for (int i = 0; i < 50000; i++) {
    const auto address = [&] { return rng.one_in(8) ? rng.next() : rng.below(kRam + 64); };
    if (rng.one_in(50)) ram.missing = rng.below(16);
    switch (rng.below(6)) {
      case 0: static_cast<void>(call(rng.one_in(8) ? rng.next() : 15 + rng.below(18), rng.below(12), rng.one_in(2) ? rng.below(3) : address(),
                                     address(), rng.one_in(2))); break;
      case 1: static_cast<void>(set(static_cast<u16>(rng.below(6)), rng.one_in(2) ? rng.next() : rng.below(20))); break;
      case 2: static_cast<void>(set_vcpu(static_cast<u16>(rng.below(10)), rng.one_in(2) ? address() : rng.next(), rng.below(2))); break;
      case 3: static_cast<void>(domain.deliver(static_cast<u32>(rng.below(3)), static_cast<u32>(rng.one_in(8) ? rng.next() : rng.below(4200)))); break;
      case 4: static_cast<void>(channel(static_cast<u32>(rng.below(5000)), rng.one_in(2) ? 2 : 5, 0, static_cast<u32>(1 + rng.below(5000)), 0)); break;
      default:
        m.pass(rng.below(kMs));
        for (auto& v : vcpus) {
          v->attend();
          v->update_time();
          v->running();
          static_cast<void>(v->upcall_pending());
          if (v->poll_over()) v->end_poll();
        }
        break;
    }
  }
  // Whatever was set and adjusted: it still adds up.
  const auto r = get_vcpu(KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA).u.runstate;
  EXPECT_EQ(r.time_running + r.time_runnable + r.time_blocked + r.time_offline, r.state_entry_time);
  EXPECT_LT(r.state, 4u);
}

}  // namespace
}  // namespace ring3::engine::xen
