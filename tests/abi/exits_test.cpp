// Exits: ports, device memory, HLT, shutdown, debug, interrupt windows.
#include "harness.hpp"

namespace ring3::abitest {
namespace {

class Exits : public AbiTest {};
INSTANTIATE_TEST_SUITE_P(Providers, Exits, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

TEST_P(Exits, Ports) {
  TestVm m(system());
  m.start_real(guests::pio);
  std::memcpy(m.ram() + 0x600, "Hello", 5);
  m.expect_io(0x80, true, 0x42);
  m.expect_io(0x81, false, 0x99);
  m.expect_io(0x1234, false, 0xbeef, 2);
  m.expect_io(0x1234, false, 0xdeadc0de, 4);
  m.expect_io(0x1234, true, 0x89abcdef, 4);
  // String I/O: any number of elements an exit.
  std::string out;
  while (out.size() < 5) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0x3f8);
    ASSERT_EQ(m.vcpu().run_page().io.direction, KVM_EXIT_IO_OUT);
    const auto data = m.vcpu().io_data(m.mmap_size());
    ASSERT_FALSE(data.empty());
    out.append(reinterpret_cast<const char*>(data.data()), data.size());
  }
  EXPECT_EQ(out, "Hello");
  unsigned words = 0;
  while (words < 3) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.direction, KVM_EXIT_IO_IN);
    ASSERT_EQ(m.vcpu().run_page().io.size, 2);
    const auto data = m.vcpu().io_data(m.mmap_size());
    for (std::size_t i = 0; i + 1 < data.size(); i += 2) {
      const u16 v = static_cast<u16>(0x1111 * ++words);
      std::memcpy(data.data() + i, &v, 2);
    }
  }
  m.expect_end();
  EXPECT_EQ(m.at<u8>(0x500), 0x99);
  EXPECT_EQ(m.at<u16>(0x502), 0xbeef);
  EXPECT_EQ(m.at<u32>(0x504), 0xdeadc0de);
  EXPECT_EQ(m.at<u16>(0x700), 0x1111);
  EXPECT_EQ(m.at<u16>(0x702), 0x2222);
  EXPECT_EQ(m.at<u16>(0x704), 0x3333);
}

TEST_P(Exits, DeviceMemory) {
  SOFT_ONLY("how accesses across pages are taken apart is the provider's");
  TestVm m(system());
  m.start_real(guests::mmio);
  auto sregs = m.vcpu().sregs();
  ASSERT_TRUE(sregs.ok());
  sregs->es.base = 0xa0000;
  sregs->es.selector = 0xa000;
  ASSERT_TRUE(m.vcpu().set_sregs(*sregs).ok());
  m.put<u16>(0x7fffe, 0x7788);

  // The device: a byte array; each access must come exactly once, whatever is executed again.
  struct Access {
    u64 gpa;
    u32 len;
    bool write;
    u64 data;
  };
  std::vector<Access> seen;
  std::map<u64, u8> device;
  for (u64 i = 0; i < 0x2000; i++) device[0xa0000 + i] = static_cast<u8>(i * 7 + (i >> 8));
  device[0x80000] = 0x99;
  device[0x80001] = 0xaa;
  const auto original = device;
  for (;;) {
    const u32 reason = m.run();
    if (reason == KVM_EXIT_IO) break;
    ASSERT_EQ(reason, u32{KVM_EXIT_MMIO});
    auto& mmio = m.vcpu().run_page().mmio;
    ASSERT_LE(mmio.len, 8u);
    u64 data = 0;
    if (mmio.is_write) {
      std::memcpy(&data, mmio.data, mmio.len);
      for (u32 i = 0; i < mmio.len; i++) device[mmio.phys_addr + i] = mmio.data[i];
    } else {
      for (u32 i = 0; i < mmio.len; i++) mmio.data[i] = device[mmio.phys_addr + i];
    }
    seen.push_back({mmio.phys_addr, mmio.len, mmio.is_write != 0, data});
    ASSERT_LT(seen.size(), 50u);
  }
  const auto get32 = [&](u64 a) {
    u32 v = 0;
    for (unsigned i = 0; i < 4; i++) v |= u32{original.at(a + i)} << (8 * i);
    return v;
  };
  const std::vector<Access> expected = {
      {0xa0010, 4, true, 0x11223344},
      {0xa0020, 4, false, 0},
      {0xa0030, 4, false, 0},
      {0xa0030, 4, true, u64{static_cast<u32>(get32(0xa0030) + 0x11223344)}},
      {0xa0ffe, 2, false, 0},
      {0xa1000, 2, false, 0},
      {0xa0ffe, 2, true, 0x3344},
      {0xa1000, 2, true, 0x1122},
      {0xa0040, 1, false, 0},
      {0x80000, 2, false, 0},
      {0xa0050, 2, false, 0},
      {0xa0052, 2, false, 0},
      {0xa0054, 2, false, 0},
      {0xa00fe, 2, true, 0x3344},
      {0xa00fe, 2, false, 0},
  };
  ASSERT_EQ(seen.size(), expected.size());
  for (std::size_t i = 0; i < seen.size(); i++) {
    EXPECT_EQ(seen[i].gpa, expected[i].gpa) << i;
    EXPECT_EQ(seen[i].len, expected[i].len) << i;
    EXPECT_EQ(seen[i].write, expected[i].write) << i;
    EXPECT_EQ(seen[i].data, expected[i].data) << i;
  }
  EXPECT_EQ(m.at<u32>(0x500), get32(0xa0020));
  EXPECT_EQ(m.at<u32>(0x504), get32(0xa0ffe));
  EXPECT_EQ(m.at<u8>(0x508), original.at(0xa0040));
  EXPECT_EQ(m.at<u32>(0x50c), 0xaa997788u);
  EXPECT_EQ(m.at<u32>(0x510), get32(0xa0050));
  EXPECT_EQ(m.at<u16>(0x520), 0x3344);
}

// An access is completed by KVM_RUN with immediate_exit, which then runs no further.
TEST_P(Exits, ImmediateExitCompletesTheAccess) {
  TestVm m(system());
  m.start_real(guests::pio);
  m.expect_io(0x80, true, 0x42);
  m.expect_io(0x81, false, 0x77);
  m.vcpu().run_page().immediate_exit = 1;
  ASSERT_EQ(m.vcpu().run(), -EINTR);
  ASSERT_EQ(m.vcpu().run(), -EINTR);
  auto regs = m.vcpu().regs();
  ASSERT_TRUE(regs.ok());
  EXPECT_EQ(regs->rax & 0xff, 0x77u);
  EXPECT_EQ(regs->rip, 0x1006u);
  m.vcpu().run_page().immediate_exit = 0;
  m.expect_io(0x1234, false, 0xbeef, 2);
}

TEST_P(Exits, HltWithoutIrqchip) {
  TestVm m(system());
  m.start_real(guests::hlt);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HLT});
  auto regs = m.vcpu().regs();
  ASSERT_TRUE(regs.ok());
  EXPECT_EQ(regs->rip, 0x1001u);
  m.expect_end();
  EXPECT_EQ(m.at<u8>(0x500), 0x55);
}

TEST_P(Exits, TripleFault) {
  SOFT_ONLY("a paravirtual /dev/kvm emulates real mode without looking at the IDT's limit");
  TestVm m(system());
  m.start_real(guests::triple);
  EXPECT_EQ(m.run(), u32{KVM_EXIT_SHUTDOWN});
}

// As KVM, whose emulator cannot read an instruction from where no memory is.
TEST_P(Exits, CodeInDeviceMemory) {
  SOFT_ONLY("a paravirtual /dev/kvm emulates real mode and does otherwise");
  TestVm m(system());
  m.start_real(guests::spin);
  auto sregs = m.vcpu().sregs();
  sregs->cs.base = 0xc0000;
  ASSERT_TRUE(m.vcpu().set_sregs(*sregs).ok());
  for (int i = 0; i < 2; i++) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_INTERNAL_ERROR});
    EXPECT_EQ(m.vcpu().run_page().internal.suberror, u32{KVM_INTERNAL_ERROR_EMULATION});
  }
}

// REP INS: one exit brings what fits, as KVM batches it; the rest comes with the next.
TEST_P(Exits, StringInputComesInBatches) {
  SOFT_ONLY("a paravirtual /dev/kvm emulates real mode and does otherwise");
  TestVm m(system());
  // cld; rep insb; in al, dx; out 0x10, al
  static constexpr u8 kCode[] = {0xfc, 0xf3, 0x6c, 0xec, 0xe6, 0x10};
  m.start_real(Guest{kCode, kCode + sizeof kCode});
  kvm_regs regs{};
  regs.rip = 0x1000;
  regs.rflags = 2;
  regs.rdx = 0x80;
  regs.rcx = 1500;
  regs.rdi = 0x3f00;
  ASSERT_TRUE(m.vcpu().set_regs(regs).ok());
  u8 next = 0;
  std::vector<u32> counts;
  u32 total = 0;
  while (total < 1500) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    kvm_run& r = m.vcpu().run_page();
    ASSERT_EQ(r.io.port, 0x80);
    ASSERT_EQ(r.io.size, 1);
    counts.push_back(r.io.count);
    total += r.io.count;
    auto data = m.vcpu().io_data(m.mmap_size());
    ASSERT_EQ(data.size(), r.io.count);
    for (auto& b : data) b = next++;
  }
  EXPECT_EQ(counts, (std::vector<u32>{256, 1024, 220}));
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});  // IN AL, DX: one element, and no left-over
  EXPECT_EQ(m.vcpu().run_page().io.count, 1u);
  m.vcpu().io_data(m.mmap_size())[0] = 0x77;
  m.expect_io(0x10, true, 0x77);
  for (u32 i = 0; i < 1500; i++) ASSERT_EQ(m.at<u8>(0x3f00 + i), static_cast<u8>(i)) << i;
}

TEST_P(Exits, SingleStep) {
  SOFT_ONLY("a paravirtual /dev/kvm emulates real mode and steps otherwise");
  TestVm m(system());
  m.start_real(guests::step);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_GUEST_DEBUG, arg(debug)), 0);
  for (u64 pc : {0x1001, 0x1002, 0x1005, 0x1008, 0x1009, 0x100a}) {
    ASSERT_EQ(m.run(), u32{KVM_EXIT_DEBUG});
    const auto& d = m.vcpu().run_page().debug.arch;
    EXPECT_EQ(d.exception, 1u);
    EXPECT_EQ(d.pc, pc);
    EXPECT_TRUE(d.dr6 & 0x4000);
  }
  auto regs = m.vcpu().regs();
  ASSERT_TRUE(regs.ok());
  EXPECT_EQ(regs->rcx & 0xffff, 0x1234u);
  EXPECT_FALSE(regs->rflags & 0x100);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_DEBUG});  // INT3
  EXPECT_EQ(m.vcpu().run_page().debug.arch.exception, 3u);
  EXPECT_EQ(m.vcpu().run_page().debug.arch.pc, 0x100au);
  // A hardware breakpoint on the push.
  m.set_entry();
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
  debug.arch.debugreg[0] = 0x1008;
  debug.arch.debugreg[7] = 0x401;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_GUEST_DEBUG, arg(debug)), 0);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_DEBUG});
  EXPECT_EQ(m.vcpu().run_page().debug.arch.exception, 1u);
  EXPECT_EQ(m.vcpu().run_page().debug.arch.pc, 0x1008u);
}

TEST_P(Exits, InterruptWindow) {
  SOFT_ONLY("a paravirtual /dev/kvm refuses KVM_INTERRUPT");
  TestVm m(system());
  m.start_real(guests::window);
  auto& run = m.vcpu().run_page();
  for (int i = 1; i <= 2; i++) {
    run.request_interrupt_window = 1;
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IRQ_WINDOW_OPEN}) << i;
    EXPECT_EQ(run.ready_for_interrupt_injection, 1);
    EXPECT_EQ(run.if_flag, 1);
    kvm_interrupt irq{0x21};
    ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_INTERRUPT, arg(irq)), 0);
    EXPECT_EQ(m.at<u8>(0x500), i - 1);
    run.request_interrupt_window = 0;
    if (i == 1) {
      // The first was injected into a window of one instruction; ask for the second before the guest opens it.
      run.request_interrupt_window = 1;
    }
  }
  m.expect_end();
  EXPECT_EQ(m.at<u8>(0x500), 2);
  EXPECT_EQ(m.at<u8>(0x501), 1);
}

TEST_P(Exits, NoInterruptWindowWhileTheLapicTakesNone) {
  SOFT_ONLY("needs 32-bit code");
  VmOptions options;
  options.split = true;
  TestVm m(system(), options);
  static const u8 code[] = {0xc7, 0x05, 0xf0, 0x00, 0xe0, 0xfe, 0xff, 0x01, 0x00, 0x00,  // SVR: on
                            0xc7, 0x05, 0x50, 0x03, 0xe0, 0xfe, 0x00, 0x07, 0x01, 0x00,  // LVT0: ExtINT, masked
                            0xfb, 0x90, 0xe6, 0x10,                                      // sti; nop; out
                            0xc7, 0x05, 0x50, 0x03, 0xe0, 0xfe, 0x00, 0x07, 0x00, 0x00,  // LVT0: unmasked
                            0xeb, 0x00, 0xe6, 0x11, 0xeb, 0xfe};                          // jmp; out
  m.start_flat(Guest{code, code + sizeof code}, false);
  auto& run = m.vcpu().run_page();
  run.request_interrupt_window = 1;
  m.expect_io(0x10, true);  // the guest goes on although its IF is set
  EXPECT_EQ(run.if_flag, 1);
  EXPECT_EQ(run.ready_for_interrupt_injection, 0);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_IRQ_WINDOW_OPEN});
  EXPECT_EQ(run.ready_for_interrupt_injection, 1);
  run.request_interrupt_window = 0;
  m.expect_io(0x11, true);
}

TEST_P(Exits, LoweredTprWithoutIrqchip) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  static const u8 code[] = {0x44, 0x0f, 0x22, 0xc0,  // mov cr8, rax
                            0xe6, 0xf4, 0xf4};
  const Guest g{code, code + sizeof code};
  m.start_flat(g, true);
  m.vcpu().run_page().cr8 = 5;
  ASSERT_EQ(m.run(), u32{KVM_EXIT_SET_TPR});
  EXPECT_EQ(m.vcpu().run_page().cr8, 0u);
  m.expect_end();
}

TEST_P(Exits, SyncRegs) {
  SOFT_ONLY("an optional capability");
  TestVm m(system());
  m.start_real(guests::hlt);
  auto& run = m.vcpu().run_page();
  run.kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HLT});
  EXPECT_EQ(run.s.regs.regs.rip, 0x1001u);
  EXPECT_EQ(run.s.regs.sregs.cs.base, 0u);
  run.s.regs.regs.rip = 0x1000;
  run.kvm_dirty_regs = KVM_SYNC_X86_REGS;
  ASSERT_EQ(m.run(), u32{KVM_EXIT_HLT});
  EXPECT_EQ(run.kvm_dirty_regs, 0u);
  run.kvm_valid_regs = 1 << 9;
  EXPECT_EQ(m.vcpu().run(), -EINVAL);
}

TEST_P(Exits, DoorbellsAndCoalescedWrites) {
  SOFT_ONLY("a paravirtual /dev/kvm may lack both");
  TestVm m(system());
  m.start_real(guests::doorbell);
  const int any = eventfd_make(), seven = eventfd_make(), port = eventfd_make();
  const auto assign = [&](int fd, u64 addr, u32 len, u32 flags, u64 match) {
    kvm_ioeventfd r{};
    r.fd = fd;
    r.addr = addr;
    r.len = len;
    r.flags = flags;
    r.datamatch = match;
    return m.vm().endpoint().ioctl(KVM_IOEVENTFD, arg(r));
  };
  ASSERT_EQ(assign(any, 0xa0050, 0, 0, 0), 0);
  ASSERT_EQ(assign(seven, 0xa0054, 4, KVM_IOEVENTFD_FLAG_DATAMATCH, 7), 0);
  ASSERT_EQ(assign(port, 0x5000, 4, KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO, 3), 0);
  EXPECT_EQ(assign(any, 0xa0050, 2, 0, 0), -EEXIST);
  EXPECT_EQ(assign(any, 0xa0060, 3, 0, 0), -EINVAL);
  EXPECT_EQ(assign(any, 0xa0060, 4, 1 << 20, 0), -EINVAL);
  EXPECT_EQ(assign(any, ~0ull, 4, 0, 0), -EINVAL);
  EXPECT_EQ(assign(-1, 0xa0060, 4, 0, 0), -EBADF);
  EXPECT_EQ(assign(any, 0xa0060, 4, KVM_IOEVENTFD_FLAG_DEASSIGN, 0), -ENOENT);
  kvm_coalesced_mmio_zone zone{};
  zone.addr = 0xa0800;
  zone.size = 4;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_REGISTER_COALESCED_MMIO, arg(zone)), 0);

  ASSERT_EQ(m.run(), u32{KVM_EXIT_MMIO});
  EXPECT_EQ(m.vcpu().run_page().mmio.phys_addr, 0xa0054u);
  EXPECT_EQ(m.vcpu().run_page().mmio.data[0], 8);
  for (int fd : {any, seven, port}) {
    u64 count = 0;
    ASSERT_EQ(::read(fd, &count, 8), 8);
    EXPECT_EQ(count, 100u);
    ::close(fd);
  }
  auto* ring = reinterpret_cast<kvm_coalesced_mmio_ring*>(reinterpret_cast<u8*>(&m.vcpu().run_page()) +
                                                          KVM_COALESCED_MMIO_PAGE_OFFSET * kPageSize);
  ASSERT_EQ(ring->first, 0u);
  ASSERT_EQ(ring->last, 100u);
  for (u32 i = 0; i < 100; i++) {
    EXPECT_EQ(ring->coalesced_mmio[i].phys_addr, 0xa0800u);
    EXPECT_EQ(ring->coalesced_mmio[i].len, 1u);
    EXPECT_EQ(ring->coalesced_mmio[i].data[0], 100 - i);
  }
  m.expect_end();
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_UNREGISTER_COALESCED_MMIO, arg(zone)), 0);
}

TEST_P(Exits, Hypercalls) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  m.start_flat(guests::hypercall, true);
  m.expect_end();
  EXPECT_EQ(m.at<u64>(0x21000), 0u);
  EXPECT_EQ(m.at<u64>(0x21008), static_cast<u64>(-1000));
  EXPECT_LE(m.at<u64>(0x21010), m.at<u64>(0x21018));  // RDTSC and the MSR are one clock
  EXPECT_LT(m.at<u64>(0x21018) - m.at<u64>(0x21010), 1'000'000'000u);
  EXPECT_EQ(m.at<u32>(0x21020), 0x4b4d564bu);  // "KVMK"
  // The kvmclock page: an even version, time that the TSC leads to the VM's clock.
  EXPECT_NE(m.at<u32>(0x22000), 0u);
  EXPECT_EQ(m.at<u32>(0x22000) % 2, 0u);
  EXPECT_NE(m.at<u32>(0x22018), 0u);
}

TEST_P(Exits, PairedClocks) {
  SOFT_ONLY("needs 64-bit code");
  TestVm m(system());
  m.start_flat(guests::pair_clocks, true);
  const i64 before = ::time(nullptr);
  m.expect_end();
  const i64 after = ::time(nullptr);
  EXPECT_EQ(m.at<i64>(0x21018), -EOPNOTSUPP);
  EXPECT_EQ(m.at<i64>(0x21020), m.at<i64>(0x21008) == 0 ? -EFAULT : -EOPNOTSUPP);
  if (m.at<i64>(0x21008) != 0) {
    EXPECT_EQ(m.at<i64>(0x21008), -EOPNOTSUPP);  // a host whose TSC is no clock
    return;
  }
  EXPECT_GE(m.at<i64>(0x22000) + 1, before);  // the coarse clock lags
  EXPECT_LE(m.at<i64>(0x22000), after + 1);
  EXPECT_LT(m.at<u64>(0x22008), 1'000'000'000u);
  EXPECT_LE(m.at<u64>(0x21000), m.at<u64>(0x22010));
  EXPECT_LE(m.at<u64>(0x22010), m.at<u64>(0x21010));
}

}  // namespace
}  // namespace ring3::abitest
