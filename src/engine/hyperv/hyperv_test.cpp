#include <gtest/gtest.h>

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/split_mix.hpp"
#include "engine/hyperv/vp.hpp"
#include "engine/irq/test_machine.hpp"

namespace ring3::engine::hv {
namespace {

constexpr u64 kRam = 0x10000;

struct TestProcessor final : Processor {
  std::vector<u8>& ram;
  std::vector<unsigned> flushed;
  int timers = 0, exits = 0, clocks = 0;
  explicit TestProcessor(std::vector<u8>& r) : ram(r) {}
  bool has(Gpa a, std::size_t n) const { return a.value <= ram.size() && n <= ram.size() - a.value; }
  bool read(Gpa a, void* to, std::size_t n) override { return has(a, n) && (std::memcpy(to, ram.data() + a.value, n), true); }
  bool write(Gpa a, const void* p, std::size_t n) override { return has(a, n) && (std::memcpy(ram.data() + a.value, p, n), true); }
  void attend_timers() override { timers++; }
  void attend_exit() override { exits++; }
  void attend_clock() override { clocks++; }
  void flush_tlbs(const std::vector<unsigned>& vcpus) override { flushed = vcpus; }
};

struct HyperV : testing::Test, Host {
  TestMachine m{3};
  std::vector<u8> ram = std::vector<u8>(kRam);
  KvmClock clock{m.clock};
  Partition partition{clock, m.sync};
  std::vector<std::unique_ptr<TestProcessor>> processors;
  std::vector<std::unique_ptr<Vp>> vps;
  std::vector<std::pair<u32, u32>> acked;
  alignas(16) u8 xmm[96] = {};

  HyperV() {
    for (unsigned i = 0; i < 3; i++) {
      processors.push_back(std::make_unique<TestProcessor>(ram));
      vps.push_back(std::make_unique<Vp>(partition, *this, *processors[i], m.timers, *m.tscs[i], m.lapics[i].get(), i, i));
      vps[i]->set_cpuid(offered(), false);
    }
  }
  Vp* find_vp(u32 index) override { return index < vps.size() ? vps[index].get() : nullptr; }
  void each_vp(const std::function<void(Vp&)>& f) override {
    for (auto& v : vps) f(*v);
  }
  void sint_acked(u32 vp, u32 sint) override { acked.emplace_back(vp, sint); }

  static Cpuid offered() {
    const auto leaves = supported_cpuid(ApicBus::kMaxVcpus, true);
    return Cpuid::from([&](u32 leaf) -> const kvm_cpuid_entry2* {
      for (const auto& e : leaves) {
        if (e.function == leaf) return &e;
      }
      return nullptr;
    });
  }
  bool write(u32 index, u64 value, bool host = false, unsigned vp = 0) { return vps[vp]->write_msr(index, host, value); }
  u64 read(u32 index, bool host = false, unsigned vp = 0) {
    u64 value = 0;
    EXPECT_TRUE(vps[vp]->read_msr(index, host, &value)) << std::hex << index;
    return value;
  }
  u64 call(u64 control, u64 input = 0, u64 output = 0) {
    const HypercallResult r = vps[0]->hypercall({control, input, output, xmm});
    return r.kind == HypercallResult::Kind::kDone ? r.status : r.kind == HypercallResult::Kind::kToVmm ? ~0ull : ~1ull;
  }
  template <class T>
  T at(u64 a) const {
    T v;
    std::memcpy(&v, ram.data() + a, sizeof v);
    return v;
  }
  template <class T>
  void put(u64 a, T v) {
    std::memcpy(ram.data() + a, &v, sizeof v);
  }
  void pass(u64 ns) {
    m.pass(ns);
    for (auto& v : vps) {
      while (v->timers_pending()) v->process_timers();
    }
  }
  /// The SynIC on, messages at 0x2000, SINT 2 on a vector.
  void synic(u64 sint = 0x50) {
    vps[0]->activate_synic(true);
    ASSERT_TRUE(write(msr::kSimp, 0x2001));
    ASSERT_TRUE(write(msr::kSint0 + 2, sint));
    take_exits();
  }
  void take_exits() {
    while (vps[0]->exit_pending()) static_cast<void>(vps[0]->take_exit());
  }
};

constexpr u64 kStimerMessage = 1 | 2u << 16, kStimerPeriodic = 2, kStimerAuto = 8, kStimerDirect = 1 | 1u << 12 | 0x61u << 4;

TEST_F(HyperV, NothingWithoutItsLeaves) {
  vps[0]->set_cpuid(Cpuid{}, false);
  u64 value;
  EXPECT_FALSE(vps[0]->read_msr(msr::kGuestOsId, false, &value));
  EXPECT_TRUE(vps[0]->read_msr(msr::kGuestOsId, true, &value));
  EXPECT_FALSE(write(msr::kGuestOsId, 1));
  EXPECT_TRUE(write(msr::kGuestOsId, 1, true));
  EXPECT_FALSE(vps[0]->hypercalls());
  vps[0]->set_cpuid(offered(), false);
  EXPECT_TRUE(vps[0]->hypercalls());
}

TEST_F(HyperV, TheHypercallPage) {
  EXPECT_TRUE(write(msr::kHypercall, 0x3001));  // nobody has said who it is
  EXPECT_EQ(read(msr::kHypercall), 0u);
  EXPECT_TRUE(write(msr::kGuestOsId, 0x8100ull << 48));
  EXPECT_FALSE(write(msr::kHypercall, 0x7fff0001));  // no memory
  EXPECT_TRUE(write(msr::kHypercall, 0x3001));
  EXPECT_EQ(at<u32>(0x3000), 0xc3c1010fu);
  vps[0]->set_cpuid(offered(), true);
  EXPECT_TRUE(write(msr::kHypercall, 0x3001));
  EXPECT_EQ(at<u32>(0x3000), 0xc3d9010fu);
  EXPECT_TRUE(write(msr::kGuestOsId, 0));
  EXPECT_EQ(read(msr::kHypercall), 0x3000u);
}

TEST_F(HyperV, ReferenceTime) {
  const u64 before = read(msr::kTimeRefCount);
  m.clock.advance(1'000'000);
  EXPECT_EQ(read(msr::kTimeRefCount) - before, 10'000u);
  EXPECT_EQ(read(msr::kTscFrequency), u64{m.tscs[0]->khz()} * 1000);
  ASSERT_TRUE(write(msr::kReferenceTsc, 0x4001));
  auto page = at<TscPage>(0x4000);
  EXPECT_NE(page.sequence, 0u);
  const auto guests_time = [&] { return static_cast<u64>(static_cast<u128>(m.tscs[0]->read()) * page.scale >> 64) + page.offset; };
  EXPECT_NEAR(static_cast<double>(guests_time()), static_cast<double>(clock.now_ns() / 100), 2);
  m.clock.advance(3'000'000'000);
  EXPECT_EQ(read(msr::kTimeRefCount), guests_time());
  EXPECT_NEAR(static_cast<double>(guests_time()), static_cast<double>(clock.now_ns() / 100), 2);
  // The clock is set: the page follows, but not while the guest has its TSC emulated.
  kvm_clock_data data{};
  data.clock = 5'000'000'000;
  ASSERT_EQ(clock.set(data), 0);
  partition.clock_changed();
  vps[0]->update_tsc_page();
  page = at<TscPage>(0x4000);
  EXPECT_NEAR(static_cast<double>(guests_time()), 5e7, 2);
  ASSERT_TRUE(write(msr::kTscEmulationControl, 1));
  data.clock = 0;
  ASSERT_EQ(clock.set(data), 0);
  partition.clock_changed();
  vps[0]->update_tsc_page();
  EXPECT_EQ(at<TscPage>(0x4000).offset, page.offset);
  EXPECT_EQ(read(msr::kTimeRefCount), guests_time());
  // A page that is not there is never used.
  ASSERT_TRUE(write(msr::kReferenceTsc, 0x7fff0001));
  EXPECT_EQ(read(msr::kTimeRefCount), clock.now_ns() / 100);
}

TEST_F(HyperV, ARestoredTscPageIsWrittenBeforeTheGuestRuns) {
  ASSERT_TRUE(write(msr::kReferenceTsc, 0x4001, true));
  EXPECT_EQ(at<u32>(0x4000), 0u);
  EXPECT_EQ(processors[0]->clocks, 1);
  vps[0]->update_tsc_page();
  EXPECT_NE(at<u32>(0x4000), 0u);
}

TEST_F(HyperV, WhatTheVmmIsTold) {
  EXPECT_TRUE(write(msr::kReset, 1));
  ASSERT_TRUE(vps[0]->exit_pending());
  EXPECT_EQ(vps[0]->take_exit().kind, Exit::Kind::kReset);
  EXPECT_TRUE(write(msr::kCrashP0 + 3, 77));
  EXPECT_TRUE(write(msr::kCrashCtl, kCrashNotify));
  EXPECT_EQ(vps[0]->take_exit().kind, Exit::Kind::kCrash);
  EXPECT_EQ(read(msr::kCrashP0 + 3, true), 77u);
  vps[0]->activate_synic(true);
  put<u64>(0x2000, ~0ull);
  EXPECT_TRUE(write(msr::kSimp, 0x2001));
  EXPECT_EQ(at<u64>(0x2000), 0u);
  Exit e = vps[0]->take_exit();
  EXPECT_EQ(e.kind, Exit::Kind::kHyperv);
  EXPECT_EQ(e.hyperv.type, u32{KVM_EXIT_HYPERV_SYNIC});
  EXPECT_EQ(e.hyperv.u.synic.msr, msr::kSimp);
  EXPECT_EQ(e.hyperv.u.synic.msg_page, 0x2001u);
  EXPECT_FALSE(vps[0]->exit_pending());
  EXPECT_FALSE(write(msr::kSiefp, 0x7fff0001));  // no memory
  EXPECT_TRUE(write(msr::kSyndbgControl, 5));
  e = vps[0]->take_exit();
  EXPECT_EQ(e.hyperv.type, u32{KVM_EXIT_HYPERV_SYNDBG});
  e.hyperv.u.syndbg.status = 9;
  vps[0]->complete(e.hyperv);
  EXPECT_EQ(read(msr::kSyndbgStatus), 9u);
}

TEST_F(HyperV, ApicMsrs) {
  EXPECT_TRUE(write(msr::kTpr, 0x40));
  EXPECT_EQ(m.mmio(0, 0x80), 0x40u);
  EXPECT_TRUE(write(msr::kTpr, 0));
  EXPECT_TRUE(write(msr::kIcr, u64{1} << 56 | 0x45));  // to APIC 1
  EXPECT_EQ(m.lapics[1]->ack_interrupt(), 0x45);
  EXPECT_TRUE(write(msr::kEoi, 0, false, 1));
  EXPECT_EQ(m.mmio(1, 0x120), 0u);
  u64 value;
  EXPECT_FALSE(vps[0]->read_msr(msr::kEoi, false, &value));
  put<u32>(0x5000, 7);
  EXPECT_TRUE(write(msr::kVpAssistPage, 0x5001));
  EXPECT_EQ(at<u32>(0x5000), 0u);
  EXPECT_FALSE(write(msr::kVpAssistPage, 0x7fff0001));
  EXPECT_EQ(read(msr::kVpAssistPage), 0x5001u);
}

TEST_F(HyperV, SintsAndTheirEnd) {
  EXPECT_EQ(vps[0]->synic().raise(2), -EINVAL);
  synic();
  EXPECT_FALSE(write(msr::kSint0 + 3, 0x0f));  // no vector below 16
  EXPECT_EQ(vps[0]->synic().raise(3), -ENOENT);
  EXPECT_EQ(vps[0]->synic().raise(16), -EINVAL);
  EXPECT_EQ(vps[0]->synic().raise(2), 1);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x50);
  EXPECT_EQ(m.mmio(0, 0x120), 1u << 16);
  EXPECT_TRUE(write(msr::kEoi, 0));
  ASSERT_EQ(acked.size(), 1u);
  EXPECT_EQ(acked[0], (std::pair<u32, u32>{0, 2}));
  // By itself: never in service.
  ASSERT_TRUE(write(msr::kSint0 + 2, 0x50 | kSintAutoEoi));
  EXPECT_EQ(vps[0]->synic().raise(2), 1);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x50);
  EXPECT_EQ(m.mmio(0, 0x120), 0u);
}

TEST_F(HyperV, OneShotTimers) {
  synic();
  const u64 now = read(msr::kTimeRefCount);
  ASSERT_TRUE(write(msr::kStimer0Config, kStimerMessage));
  ASSERT_TRUE(write(msr::kStimer0Config + 1, now + 10'000));
  pass(0);
  pass(900'000);
  EXPECT_EQ(at<u32>(0x2200), 0u);
  pass(200'000);
  const auto message = at<TimerMessage>(0x2200);
  EXPECT_EQ(message.type, kMessageTimerExpired);
  EXPECT_EQ(message.payload_size, 24);
  EXPECT_EQ(message.timer, 0u);
  EXPECT_EQ(message.expiration, now + 10'000);
  EXPECT_GE(message.delivery, message.expiration);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x50);
  EXPECT_EQ(read(msr::kStimer0Config) & 1, 0u);
  EXPECT_TRUE(write(msr::kEoi, 0));
  // In the past, and the slot still taken: later, when the guest says that it is free.
  ASSERT_TRUE(write(msr::kStimer0Config, kStimerMessage));
  ASSERT_TRUE(write(msr::kStimer0Config + 1, 1));
  pass(0);
  EXPECT_EQ(ram[0x2205] & 1, 1);
  EXPECT_EQ(m.lapics[0]->pending_vector(), -1);
  put<u32>(0x2200, 0);
  ASSERT_TRUE(write(msr::kEom, 0));
  pass(0);
  EXPECT_EQ(at<u32>(0x2200), kMessageTimerExpired);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x50);
}

TEST_F(HyperV, PeriodicAndDirectTimers) {
  synic();
  ASSERT_TRUE(write(msr::kStimer0Config + 2, (kStimerDirect & ~1ull) | kStimerPeriodic | kStimerAuto));
  EXPECT_EQ(m.timers.next_deadline(), ~0ull);
  ASSERT_TRUE(write(msr::kStimer0Config + 3, 10'000));  // 1 ms
  int ticks = 0;
  for (int i = 0; i < 50; i++) {
    pass(100'000);
    if (m.lapics[0]->pending_vector() != 0x61) continue;
    ticks++;
    m.lapics[0]->ack_interrupt();
    ASSERT_TRUE(write(msr::kEoi, 0));
  }
  EXPECT_GE(ticks, 4);
  EXPECT_LE(ticks, 5);
  ASSERT_TRUE(write(msr::kStimer0Config + 3, 1));  // faster than a host can be asked for
  pass(0);
  EXPECT_GE(m.timers.next_deadline(), m.clock.monotonic_ns() + 200'000);
  ASSERT_TRUE(write(msr::kStimer0Config + 3, 0));
  EXPECT_EQ(m.timers.next_deadline(), ~0ull);
  EXPECT_EQ(read(msr::kStimer0Config + 2) & 1, 0u);
}

TEST_F(HyperV, TimersAreRestored) {
  synic();
  const u64 now = read(msr::kTimeRefCount);
  vps[1]->activate_synic(false);
  ASSERT_TRUE(write(msr::kSimp, 0x2001, true, 1));
  ASSERT_TRUE(write(msr::kSint0 + 2, 0x50, true, 1));
  ASSERT_TRUE(write(msr::kStimer0Config, kStimerMessage, true, 1));
  ASSERT_TRUE(write(msr::kStimer0Config + 1, now + 10'000, true, 1));
  EXPECT_EQ(read(msr::kStimer0Config, true, 1), kStimerMessage);
  EXPECT_EQ(read(msr::kStimer0Config + 1, true, 1), now + 10'000);
  pass(0);
  pass(1'100'000);
  EXPECT_EQ(m.lapics[1]->ack_interrupt(), 0x50);
  // Without a SynIC there is only zero to restore.
  EXPECT_FALSE(write(msr::kStimer0Config, 1, true, 2));
  EXPECT_TRUE(write(msr::kStimer0Config, 0, true, 2));
}

TEST_F(HyperV, Flushes) {
  EXPECT_EQ(call(call::kFlushSpace | 1u << 16, 0, 1), 0u);  // all
  EXPECT_EQ(processors[0]->flushed, (std::vector<unsigned>{0, 1, 2}));
  put<u64>(0x1000, 0);
  put<u64>(0x1008, 0);
  put<u64>(0x1010, 4);  // VP 2
  EXPECT_EQ(call(call::kFlushSpace, 0x1000), 0u);
  EXPECT_EQ(processors[0]->flushed, (std::vector<unsigned>{2}));
  EXPECT_EQ(call(call::kFlushList, 0x1000), status::kInvalidInput);  // no list
  EXPECT_EQ(call(call::kFlushList | 3ull << 32, 0x1000), 3ull << 32);
  // A sparse set: bank 0, VP 1.
  put<u64>(0x1010, 0);
  put<u64>(0x1018, 1);
  put<u64>(0x1020, 2);
  EXPECT_EQ(call(call::kFlushSpaceEx | 1u << 17, 0x1000), 0u);
  EXPECT_EQ(processors[0]->flushed, (std::vector<unsigned>{1}));
  EXPECT_EQ(call(call::kFlushSpaceEx, 0x1000), status::kInvalidInput);  // another count than the mask says
  put<u64>(0x1018, ~0ull);
  EXPECT_EQ(call(call::kFlushSpaceEx | 64u << 17, kRam - 32), status::kInvalidInput);
  EXPECT_EQ(call(call::kFlushSpace, ~0ull - 7), status::kInvalidInput);
}

TEST_F(HyperV, Ipis) {
  EXPECT_EQ(call(call::kSendIpi | 1u << 16, 0x77, 6), 0u);
  EXPECT_EQ(m.lapics[0]->pending_vector(), -1);
  EXPECT_EQ(m.lapics[1]->ack_interrupt(), 0x77);
  EXPECT_EQ(m.lapics[2]->ack_interrupt(), 0x77);
  EXPECT_EQ(call(call::kSendIpi | 1u << 16, 0x0f, 6), status::kInvalidInput);
  EXPECT_EQ(call(call::kSendIpi | 1u << 16, 1ull << 32, 6), status::kInvalidInput);
  const u64 banks[2] = {1, 1};  // by registers: bank 0, VP 0
  std::memcpy(xmm, banks, sizeof banks);
  EXPECT_EQ(call(call::kSendIpiEx | 1u << 16 | 1u << 17, 0x55, 0), 0u);
  EXPECT_EQ(m.lapics[0]->ack_interrupt(), 0x55);
  EXPECT_EQ(call(call::kSendIpiEx | 1u << 16, 0x55, 0), status::kInvalidInput);
}

TEST_F(HyperV, Connections) {
  const int fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  kvm_hyperv_eventfd c{};
  c.conn_id = 5;
  c.fd = fd;
  EXPECT_EQ(partition.change_connection(c), 0);
  EXPECT_EQ(partition.change_connection(c), -EEXIST);
  EXPECT_EQ(call(call::kSignalEvent | 1u << 16, 5), 0u);
  u64 count = 0;
  EXPECT_EQ(::read(fd, &count, sizeof count), 8);
  put<u64>(0x1000, 5);
  EXPECT_EQ(call(call::kSignalEvent, 0x1000), 0u);
  EXPECT_EQ(call(call::kSignalEvent, 0x1001), status::kInvalidAlignment);
  EXPECT_EQ(call(call::kSignalEvent, kRam), status::kInvalidAlignment);
  EXPECT_EQ(call(call::kSignalEvent | 1u << 16, 6), status::kInvalidInput);  // nobody's, and no SynIC
  synic();
  EXPECT_EQ(call(call::kSignalEvent | 1u << 16, 6), ~0ull);  // the VMM's
  EXPECT_EQ(call(call::kPostMessage, 0x1000), ~0ull);
  c.flags = KVM_HYPERV_EVENTFD_DEASSIGN;
  EXPECT_EQ(partition.change_connection(c), 0);
  EXPECT_EQ(partition.change_connection(c), -ENOENT);
  c.flags = 0;
  c.conn_id = 1u << 24;
  EXPECT_EQ(partition.change_connection(c), -EINVAL);
  ::close(fd);
}

TEST_F(HyperV, ByCpuidAlone) {
  vps[0]->set_enforce_cpuid(true);
  Cpuid c;
  c.present = true;
  vps[0]->set_cpuid(c, false);
  u64 value;
  EXPECT_FALSE(vps[0]->read_msr(msr::kVpIndex, false, &value));
  EXPECT_EQ(call(call::kSendIpi), status::kAccessDenied);
  EXPECT_EQ(call(call::kResetDebugSession), status::kInvalidCode);
  c.features_eax = feature::kVpIndex;
  c.recommend_eax = recommend::kRemoteTlbFlush;
  vps[0]->set_cpuid(c, false);
  EXPECT_TRUE(vps[0]->read_msr(msr::kVpIndex, false, &value));
  EXPECT_EQ(call(call::kFlushSpace | 1u << 16, 0, 1), ~1ull);  // #UD: input in XMM registers was not offered
}

/// Whatever a guest says, in whatever order. The sanitizers look on.
TEST_F(HyperV, AnythingAtAll) {
  SplitMix64 random(4);
  synic();
  ASSERT_TRUE(write(msr::kGuestOsId, 1));
  const auto number = [&]() -> u64 {
    switch (random.below(5)) {
      case 0: return random.next();
      case 1: return random.below(64);
      case 2: return random.below(kRam + 0x2000);
      case 3: return (random.below(20) << 12) | 1;
      default: return u64{1} << random.below(64);
    }
  };
  for (int i = 0; i < 200'000; i++) {
    const unsigned vp = static_cast<unsigned>(random.below(3));
    if (random.one_in(2)) {
      static constexpr u16 kCodes[] = {call::kFlushSpace, call::kFlushList, call::kLongSpinWait, call::kSendIpi, call::kFlushSpaceEx,
                                       call::kFlushListEx, call::kSendIpiEx, call::kPostMessage, call::kSignalEvent,
                                       call::kPostDebugData, call::kRetrieveDebugData, call::kResetDebugSession, 0};
      u64 control = kCodes[random.below(std::size(kCodes))];
      if (control == call::kLongSpinWait && !random.one_in(50)) continue;
      if (random.one_in(2)) control |= 1u << 16;
      if (random.one_in(2)) control |= random.below(70) << 17;
      if (random.one_in(3)) control |= random.below(4096) << 32;
      if (random.one_in(10)) control ^= number();
      for (unsigned b = 0; b < sizeof xmm; b += 8) {
        const u64 v = number();
        std::memcpy(xmm + b, &v, 8);
      }
      if (random.one_in(4)) put<u64>(random.below(kRam / 8) * 8, number());
      static_cast<void>(vps[vp]->hypercall({control, number(), number(), xmm}));
    } else {
      const u32 index = msr::kBegin + static_cast<u32>(random.below(random.one_in(4) ? 0x200 : 0xb8));
      u64 value = 0;
      if (random.one_in(3)) {
        static_cast<void>(vps[vp]->read_msr(index, random.one_in(4), &value));
      } else {
        static_cast<void>(vps[vp]->write_msr(index, random.one_in(4), number()));
      }
    }
    if (random.one_in(8)) {
      m.pass(random.below(3'000'000));
      for (auto& v : vps) {
        if (v->timers_pending()) v->process_timers();
        v->update_tsc_page();
        if (v->exit_pending()) static_cast<void>(v->take_exit());
      }
      static_cast<void>(m.lapics[vp]->ack_interrupt());
    }
  }
}

}  // namespace
}  // namespace ring3::engine::hv
