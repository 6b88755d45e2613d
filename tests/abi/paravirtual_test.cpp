// What KVM offers beside a machine's own: EOI by a bit in memory, asynchronous page faults' MSRs, hypercalls that are the VMM's;
// quirks and exits that a VMM can switch off.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

constexpr u32 kSystemTime = 0x4b564d01, kAsyncPf = 0x4b564d02, kStealTime = 0x4b564d03, kPvEoi = 0x4b564d04, kPollControl = 0x4b564d05,
              kAsyncPfInt = 0x4b564d06, kAsyncPfAck = 0x4b564d07;

struct OneMsr {
  kvm_msrs head{};
  kvm_msr_entry entry{};
};

class Paravirtual : public AbiTest {
 protected:
  bool set(TestVm& m, u32 index, u64 value) {
    OneMsr msr;
    msr.head.nmsrs = 1;
    msr.entry.index = index;
    msr.entry.data = value;
    const long r = m.vcpu().endpoint().ioctl(KVM_SET_MSRS, arg(msr));
    EXPECT_TRUE(r == 0 || r == 1) << r;
    return r == 1;
  }
  u64 get(TestVm& m, u32 index) {
    OneMsr msr;
    msr.head.nmsrs = 1;
    msr.entry.index = index;
    EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_MSRS, arg(msr)), 1) << std::hex << index;
    return msr.entry.data;
  }
  long enable(Endpoint& on, u32 capability, u64 value) {
    kvm_enable_cap cap{};
    cap.cap = capability;
    cap.args[0] = value;
    return on.ioctl(KVM_ENABLE_CAP, arg(cap));
  }
  u32 lapic_register(TestVm& m, u32 offset) {
    kvm_lapic_state lapic;
    EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_LAPIC, arg(lapic)), 0);
    u32 value;
    std::memcpy(&value, lapic.regs + offset, sizeof value);
    return value;
  }
};

TEST_P(Paravirtual, EoiByABitInMemory) {
  SOFT_ONLY("needs 64-bit code");
  constexpr u32 kCount = 100, kIsr1 = 0x110;
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::pv_eoi, {{0x30, 256}, {0x31, 384}}));
  m.put<u32>(0x600, kCount);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(m.vcpu().run_page().io.port, 0x91);
  EXPECT_EQ(m.at<u32>(0x504), kCount);
  EXPECT_EQ(m.at<u32>(0x508), kCount) << "an EOI that was not offered";
  EXPECT_EQ(m.at<u32>(0x22000), 0u);
  EXPECT_EQ(lapic_register(m, kIsr1), 0u);
  EXPECT_EQ(lapic_register(m, 0xa0) & 0xf0, 0u) << "PPR";
  // Out of the handler to the VMM: there the LAPIC says what is in service, and the guest has to end it by an EOI.
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(m.vcpu().run_page().io.port, 0x92);
  EXPECT_EQ(m.at<u32>(0x22000), 0u);
  EXPECT_EQ(lapic_register(m, kIsr1), 1u << 17);
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x504), kCount + 1);
  EXPECT_EQ(m.at<u32>(0x508), kCount);
  EXPECT_EQ(m.at<u32>(0x21000), 0u);
}

// A bit that the guest leaves alone: the interrupt stays in service, and a lower one waits.
TEST_P(Paravirtual, EoiThatTheGuestDoesNotGive) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::spin64, {{0x50, 64}}));  // whose handler ends without an EOI
  ASSERT_TRUE(set(m, kPvEoi, 0x22001));
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
  m.put<u32>(0x22000, 0xfffffff0);
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x50;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 1);
  m.expect_end();
  EXPECT_EQ(m.at<u32>(0x22000), 0xfffffff0);
  EXPECT_EQ(lapic_register(m, 0x120), 1u << 16);
  EXPECT_EQ(lapic_register(m, 0xa0), 0x50u);
}

// The byte's memory went, or cannot be written any more: nothing is offered, and the guest goes on.
TEST_P(Paravirtual, EoiWhereNoMemoryIsLeft) {
  SOFT_ONLY("needs 64-bit code");
  for (const bool readable : {false, true}) {
    SCOPED_TRACE(readable);
    TestVm m(system(), {.irqchip = true});
    u8* const page = static_cast<u8*>(::mmap(nullptr, kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    ASSERT_NE(page, MAP_FAILED);
    ASSERT_TRUE(m.vm().set_user_memory_region(1, Gpa(0x100000), kPageSize, Hva(reinterpret_cast<u64>(page))).ok());
    ASSERT_NO_FATAL_FAILURE(start_long(m, guests::spin64, {{0x50, 64}}));
    ASSERT_TRUE(set(m, kPvEoi, 0x100001));
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(::mprotect(page, kPageSize, readable ? PROT_READ : PROT_NONE), 0);
    kvm_msi msi{};
    msi.address_lo = 0xfee00000;
    msi.data = 0x50;
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 1);
    m.expect_end();
    EXPECT_EQ(lapic_register(m, 0x120), 1u << 16);
    // A slot that is gone is none to write to either.
    ASSERT_TRUE(m.vm().set_user_memory_region(1, Gpa(0x100000), 0, Hva(reinterpret_cast<u64>(page))).ok());
    EXPECT_FALSE(set(m, kPvEoi, 0x100001));
    ::munmap(page, kPageSize);
  }
}

TEST_P(Paravirtual, MsrsOfEoiAndAsynchronousPageFaults) {
  SOFT_ONLY("a kernel may have them switched off");
  TestVm m(system(), {.irqchip = true}), bare(system());
  EXPECT_EQ(get(m, kPollControl), 1u);
  const struct {
    u32 index;
    u64 value;
    bool taken;
  } rows[] = {
      {kPvEoi, 0x22001, true},          {kPvEoi, 0x22003, false}, {kPvEoi, 0x10000001, false}, {kPvEoi, 0x10000000, true},
      {kAsyncPf, 0x2204f, true},        {kAsyncPf, 0x22051, false}, {kAsyncPf, 0x10000009, false}, {kAsyncPf, 0x10000001, true},
      {kAsyncPfInt, 0xf3, true},        {kAsyncPfInt, 0x1f3, false}, {kPollControl, 0, true}, {kPollControl, 2, false},
  };
  for (const auto& row : rows) {
    SCOPED_TRACE(testing::Message() << std::hex << row.index << " " << row.value);
    const u64 before = get(m, row.index);
    EXPECT_EQ(set(m, row.index, row.value), row.taken);
    EXPECT_EQ(get(m, row.index), row.taken ? row.value : before);
  }
  EXPECT_TRUE(set(m, kAsyncPfAck, 1));
  EXPECT_EQ(get(m, kAsyncPfAck), 0u);
  // Without LAPICs nothing could be told.
  EXPECT_FALSE(set(bare, kAsyncPf, 0x22001));
  EXPECT_TRUE(set(bare, kAsyncPf, 0));
  EXPECT_FALSE(set(bare, kAsyncPfInt, 0xf3));
}

// Whoever asks is told once that all pages are there: a guest that comes from elsewhere may have tasks that wait for some.
TEST_P(Paravirtual, WhoAsksForAsynchronousPageFaultsIsToldThatAllPagesAreThere) {
  SOFT_ONLY("a kernel may have them switched off");
  TestVm m(system(), {.irqchip = true});
  ASSERT_NO_FATAL_FAILURE(start_long(m, guests::async_pf, {{0x30, 256}}));
  m.expect_io(0x90, true, 0);
  EXPECT_TRUE(set(m, kAsyncPf, 0x22009));
  EXPECT_TRUE(set(m, kAsyncPfInt, 0x30));
  m.expect_io(0x91, true, 1);
  EXPECT_EQ(m.at<u32>(0x22000), 0u);
  EXPECT_EQ(m.at<u32>(0x22004), ~0u);
  // Again, but what was told has not been taken: after the guest has said so, not before.
  EXPECT_TRUE(set(m, kAsyncPf, 0x22009));
  m.expect_io(0x92, true, 1);
  m.put<u32>(0x22004, 0);
  m.expect_io(0x93, true, 1);
  EXPECT_TRUE(set(m, kAsyncPfAck, 1));
  m.expect_io(0x91, true, 2);
  EXPECT_EQ(m.at<u32>(0x22004), ~0u);
  // Not without interrupts.
  m.put<u32>(0x22004, 0);
  EXPECT_TRUE(set(m, kAsyncPf, 0x22001));
  m.expect_io(0x92, true, 2);
  m.expect_io(0x93, true, 2);
  EXPECT_EQ(m.at<u32>(0x22004), 0u);
}

// After an INIT the guest's memory is its own again.
TEST_P(Paravirtual, InitEndsWhatIsShared) {
  SOFT_ONLY("needs an INIT by MSI");
  TestVm m(system(), {.irqchip = true});
  for (const u32 index : {kSystemTime, kStealTime, kPvEoi, kAsyncPf}) EXPECT_TRUE(set(m, index, 0x22001));
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x4500;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_SIGNAL_MSI, arg(msi)), 1);
  // Until it is taken it is part of the vCPU's events.
  kvm_vcpu_events events;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_VCPU_EVENTS, arg(events)), 0);
  EXPECT_EQ(events.smi.latched_init, 1);
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_VCPU_EVENTS, arg(events)), 0);
  kvm_mp_state state;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_MP_STATE, arg(state)), 0);  // takes the INIT
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_VCPU_EVENTS, arg(events)), 0);
  EXPECT_EQ(events.smi.latched_init, 0);
  for (const u32 index : {kSystemTime, kStealTime, kPvEoi, kAsyncPf}) EXPECT_EQ(get(m, index), 0u) << std::hex << index;
}

TEST_P(Paravirtual, HypercallsOfTheVmm) {
  SOFT_ONLY("needs 64-bit code");
  constexpr u64 kMapGpaRange = 12;
  TestVm m(system());
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_CHECK_EXTENSION, KVM_CAP_EXIT_HYPERCALL), 1L << kMapGpaRange);
  EXPECT_EQ(enable(m.vm().endpoint(), KVM_CAP_EXIT_HYPERCALL, 1), -EINVAL);
  m.start_flat(guests::map_gpa_range, true);
  m.expect_end();
  for (const u64 at : {0x21000, 0x21008, 0x21010}) EXPECT_EQ(m.at<i64>(at), -1000);
  ASSERT_EQ(enable(m.vm().endpoint(), KVM_CAP_EXIT_HYPERCALL, 1u << kMapGpaRange), 0);
  m.start_flat(guests::map_gpa_range, true);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HYPERCALL});
  auto& call = m.vcpu().run_page().hypercall;
  EXPECT_EQ(call.nr, kMapGpaRange);
  EXPECT_EQ(call.args[0], 0x5000u);
  EXPECT_EQ(call.args[1], 2u);
  EXPECT_EQ(call.args[2], 0x10u);
  EXPECT_EQ(call.longmode, 1u);
  call.ret = 77;
  m.expect_end();
  EXPECT_EQ(m.at<i64>(0x21000), 77);
  EXPECT_EQ(m.at<i64>(0x21008), -EINVAL);
  EXPECT_EQ(m.at<i64>(0x21010), -EINVAL);
}

// KVM_CAP_X86_DISABLE_EXITS: a HLT waits in KVM_RUN although the VMM has the interrupt controllers, until it is kicked for an
// interrupt of theirs.
TEST_P(Paravirtual, HltThatIsNoExit) {
  SOFT_ONLY("a kernel may not offer it");
  using namespace std::chrono_literals;
  TestVm m(system());
  Endpoint& vm = m.vm().endpoint();
  const long offered = vm.ioctl(KVM_CHECK_EXTENSION, KVM_CAP_X86_DISABLE_EXITS);
  EXPECT_EQ(offered, KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE);
  EXPECT_EQ(enable(vm, KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_MWAIT), -EINVAL);
  ASSERT_EQ(enable(vm, KVM_CAP_X86_DISABLE_EXITS, static_cast<u64>(offered)), 0);
  m.start_real(guests::hlt);
  m.put<u16>(0x20 * 4, 0x1001);  // the interrupt's handler is what comes after the HLT
  m.put<u16>(0x20 * 4 + 2, 0);
  auto regs = m.vcpu().regs();
  regs->rflags |= 0x200;
  ASSERT_TRUE(m.vcpu().set_regs(*regs).ok());
  std::atomic<bool> back{false};
  std::thread kicker([&] {
    std::this_thread::sleep_for(20ms);
    EXPECT_FALSE(back.load()) << "HLT was an exit";
    m.vcpu().kick();
  });
  EXPECT_EQ(m.vcpu().run(), -EINTR);
  back.store(true);
  kicker.join();
  m.vcpu().run_page().immediate_exit = 0;
  kvm_mp_state state;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_MP_STATE, arg(state)), 0);
  EXPECT_EQ(state.mp_state, u32{KVM_MP_STATE_RUNNABLE});
  EXPECT_EQ(m.vcpu().run_page().ready_for_interrupt_injection, 1);
  kvm_interrupt irq{0x20};
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_INTERRUPT, arg(irq)), 0);
  m.expect_end();
  EXPECT_EQ(m.at<u8>(0x500), 0x55);

  // A vCPU that runs hears no kick of a spinning one: its guest is not told of them.
  TestVm other(system(), {.cpuid = false});
  ASSERT_EQ(enable(other.vm().endpoint(), KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT), 0);
  auto cpuid = system().supported_cpuid();
  ASSERT_TRUE(other.vcpu().set_cpuid2(*cpuid).ok());
  std::vector<u8> buffer(sizeof(kvm_cpuid2) + 256 * sizeof(kvm_cpuid_entry2));
  auto* head = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  head->nent = 256;
  ASSERT_EQ(other.vcpu().endpoint().ioctl(KVM_GET_CPUID2, reinterpret_cast<u64>(head)), 0);
  for (u32 i = 0; i < head->nent; i++) {
    const auto& e = reinterpret_cast<const kvm_cpuid_entry2*>(head + 1)[i];
    if (e.function == 0x40000001) {
      EXPECT_EQ(e.eax & (1u << 7), 0u) << "KVM_FEATURE_PV_UNHALT";
    }
  }
}

// KVM_CAP_EXIT_ON_EMULATION_FAILURE: user code where no memory is is told to the VMM, which else the guest's kernel hears of.
TEST_P(Paravirtual, UserCodeInDeviceMemory) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  const auto start = [&] {
    m.start_flat(guests::hlt, true);
    for (const u64 at : {0x30000, 0x31000, 0x32000}) m.put<u64>(at, m.at<u64>(at) | 4);
    auto sregs = m.vcpu().sregs();
    for (kvm_segment* s : {&sregs->cs, &sregs->ss}) {
      s->dpl = 3;
      s->selector |= 3;
    }
    sregs->idt.limit = 0;
    ASSERT_TRUE(m.vcpu().set_sregs(*sregs).ok());
    auto regs = m.vcpu().regs();
    regs->rip = 0x100000;
    ASSERT_TRUE(m.vcpu().set_regs(*regs).ok());
  };
  ASSERT_NO_FATAL_FAILURE(start());
  EXPECT_EQ(m.run(), u32{KVM_EXIT_SHUTDOWN});  // #UD, with no IDT
  EXPECT_EQ(enable(m.vm().endpoint(), KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2), -EINVAL);
  ASSERT_EQ(enable(m.vm().endpoint(), KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1), 0);
  ASSERT_NO_FATAL_FAILURE(start());
  ASSERT_EQ(m.run(), u32{KVM_EXIT_INTERNAL_ERROR});
  const auto& failure = m.vcpu().run_page().emulation_failure;
  EXPECT_EQ(failure.suberror, u32{KVM_INTERNAL_ERROR_EMULATION});
  EXPECT_EQ(failure.ndata, 1u);
  EXPECT_EQ(failure.flags, 0u);
  EXPECT_EQ(m.vcpu().regs()->rip, 0x100000u);
}

TEST_P(Paravirtual, QuirksOfTheLapic) {
  SOFT_ONLY("a paravirtual /dev/kvm has its own");
  const u64 quirks = static_cast<u64>(system().endpoint().ioctl(KVM_CHECK_EXTENSION, KVM_CAP_DISABLE_QUIRKS2));
  for (const bool off : {false, true}) {
    SCOPED_TRACE(off);
    TestVm m(system(), {.irqchip = true, .vcpus = 0});
    if (off) {
      EXPECT_EQ(enable(m.vm().endpoint(), KVM_CAP_DISABLE_QUIRKS2, ~quirks), -EINVAL);
      ASSERT_EQ(enable(m.vm().endpoint(), KVM_CAP_DISABLE_QUIRKS, ~u64{0}), 0);  // the older one asks for nothing
      ASSERT_EQ(enable(m.vm().endpoint(), KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_LINT0_REENABLED | KVM_X86_QUIRK_LAPIC_MMIO_HOLE), 0);
    }
    m.add_vcpu(0);
    EXPECT_EQ(lapic_register(m, 0x350), off ? 0x10000u : 0x700u);
    ASSERT_TRUE(set(m, 0x1b, 0xfee00d00));  // x2APIC
    m.start_flat(guests::lapic_page, false);
    if (off) {
      ASSERT_EQ(m.run(), u32{KVM_EXIT_MMIO});
      EXPECT_EQ(m.vcpu().run_page().mmio.phys_addr, 0xfee00020u);
      const u32 answer = 0x1234;
      std::memcpy(m.vcpu().run_page().mmio.data, &answer, sizeof answer);
    }
    m.expect_end();
    EXPECT_EQ(m.at<u32>(0x21000), off ? 0x1234u : ~0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Providers, Paravirtual, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel),
                         provider_name);

}  // namespace
}  // namespace ring3::abitest
