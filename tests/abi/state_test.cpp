// What each setter wrote, its getter returns; what is impossible is refused as the kernel refuses it.
#include <sys/mman.h>

#include <random>
#include <set>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

class State : public AbiTest {
 protected:
  std::mt19937_64 rng_{20240611};
  u64 random() { return rng_(); }
  kvm_segment random_segment(bool code) {
    kvm_segment s{};
    s.base = static_cast<u32>(random());
    s.limit = static_cast<u32>(random());
    s.selector = static_cast<u16>(random());
    s.type = code ? 11 : 3;
    s.present = 1;
    s.db = random() & 1;
    s.s = 1;
    s.g = random() & 1;
    s.avl = random() & 1;
    return s;
  }
  template <class T>
  long call(TestVm& m, unsigned long request, T& v) { return m.vcpu().endpoint().ioctl(request, arg(v)); }
  template <class T>
  long vm_call(TestVm& m, unsigned long request, T& v) { return m.vm().endpoint().ioctl(request, arg(v)); }
};
INSTANTIATE_TEST_SUITE_P(Providers, State, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

// Exceptions whose state round-trips: no NMI, no software ones.
u8 vec_of(u64 r) {
  const u8 v[] = {0, 1, 6, 7, 8, 10, 11, 12, 13, 14, 16, 17, 18, 19};
  return v[r % sizeof v];
}

template <class T>
void expect_same(const T& a, const T& b, const char* what) {
  const auto* x = reinterpret_cast<const u8*>(&a);
  const auto* y = reinterpret_cast<const u8*>(&b);
  for (std::size_t i = 0; i < sizeof(T); i++) {
    ASSERT_EQ(x[i], y[i]) << what << ": byte " << i;
  }
}

TEST_P(State, Regs) {
  TestVm m(system());
  for (int round = 0; round < 100; round++) {
    kvm_regs in{};
    auto* words = reinterpret_cast<u64*>(&in);
    for (unsigned i = 0; i < 16; i++) words[i] = random();
    in.rip = static_cast<u32>(random());
    in.rflags = 2 | (random() & 0xed5);
    ASSERT_TRUE(m.vcpu().set_regs(in).ok());
    auto out = m.vcpu().regs();
    ASSERT_TRUE(out.ok());
    expect_same(in, *out, "kvm_regs");
  }
}

TEST_P(State, Sregs) {
  SOFT_ONLY("a paravirtual /dev/kvm normalises segments");
  TestVm m(system(), {.irqchip = true});
  for (int round = 0; round < 200; round++) {
    auto base = m.vcpu().sregs();
    ASSERT_TRUE(base.ok());
    kvm_sregs in = *base;
    in.cs = random_segment(true);
    for (kvm_segment* s : {&in.ds, &in.es, &in.fs, &in.gs, &in.ss}) *s = random_segment(false);
    in.es.unusable = round & 1;
    in.tr = random_segment(true);
    in.tr.s = 0;
    in.ldt = random_segment(false);
    in.ldt.s = 0;
    in.ldt.type = 2;
    in.gdt.base = random() & 0x7fffffffffff;
    in.gdt.limit = static_cast<u16>(random());
    in.idt.base = random() & 0x7fffffffffff;
    in.idt.limit = static_cast<u16>(random());
    in.cr2 = random();
    in.cr8 = random() & 15;
    std::memset(in.interrupt_bitmap, 0, sizeof in.interrupt_bitmap);
    if (round % 5 == 0) in.interrupt_bitmap[random() % 4] = 1ull << (random() % 64);
    switch (round % 3) {
      case 0:  // real or protected, without paging
        in.cr0 = 0x10 | (random() & 0x2f);
        in.cr4 = random() & 0x6c;
        in.cr3 = 0;
        in.efer = (random() & 1) | (random() & 0x800);
        break;
      case 1:  // 32-bit paging
        in.cr0 = 0x80000011 | (random() & 0x1002e);
        in.cr4 = 0x10 | (random() & 0x680);
        in.cr3 = random() & 0xfffff000;
        in.efer = 0;
        break;
      default:  // long mode
        in.cr0 = 0x80050033;
        in.cr4 = 0x6a0 | (random() & 0x300000);
        in.cr3 = random() & 0x7ffff000;
        in.efer = 0xd01;
        in.cs.l = 1;
        in.cs.db = 0;
        in.fs.base = random() & 0x7fffffffffff;
        in.gs.base = random() & 0x7fffffffffff;
    }
    const auto ok = m.vcpu().set_sregs(in);
    ASSERT_TRUE(ok.ok()) << ok.error().message << " round " << round;
    auto out = m.vcpu().sregs();
    ASSERT_TRUE(out.ok());
    expect_same(in, *out, "kvm_sregs");
  }
}

TEST_P(State, Sregs2KeepsPdptrs) {
  SOFT_ONLY("KVM_CAP_SREGS2 may be missing");
  TestVm m(system());
  kvm_sregs2 in{};
  ASSERT_EQ(call(m, KVM_GET_SREGS2, in), 0);
  in.cr0 = 0x80000011;
  in.cr4 = 0x20;
  in.cr3 = 0x1000;
  in.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
  for (u64 i = 0; i < 4; i++) in.pdptrs[i] = 0x10000 * (i + 1) + 1;
  ASSERT_EQ(call(m, KVM_SET_SREGS2, in), 0);
  kvm_sregs2 out{};
  ASSERT_EQ(call(m, KVM_GET_SREGS2, out), 0);
  expect_same(in, out, "kvm_sregs2");
  in.flags = 2;
  EXPECT_EQ(call(m, KVM_SET_SREGS2, in), -EINVAL);
  in.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
  in.cr4 = 0;
  EXPECT_EQ(call(m, KVM_SET_SREGS2, in), -EINVAL);
}

TEST_P(State, ImpossibleSregsAreRefused) {
  SOFT_ONLY("a paravirtual /dev/kvm checks less");
  TestVm m(system());
  auto good = m.vcpu().sregs();
  ASSERT_TRUE(good.ok());
  const auto refused = [&](auto change) {
    kvm_sregs s = *good;
    change(s);
    const auto r = m.vcpu().set_sregs(s);
    EXPECT_FALSE(r.ok());
    if (!r.ok()) {
      EXPECT_EQ(r.error().code, EINVAL);
    }
    auto now = m.vcpu().sregs();
    ASSERT_TRUE(now.ok());
    expect_same(*good, *now, "unchanged kvm_sregs");
  };
  refused([](kvm_sregs& s) { s.cr0 = 0x80000010; });                            // PG without PE
  refused([](kvm_sregs& s) { s.cr0 = 0x20000010; });                            // NW without CD
  refused([](kvm_sregs& s) { s.cr0 |= 1ull << 32; });
  refused([](kvm_sregs& s) { s.cr4 = 1ull << 40; });
  refused([](kvm_sregs& s) { s.cr4 = 1u << 13; });                              // VMXE: not offered
  refused([](kvm_sregs& s) { s.efer = 0x500; });                                // LMA without paging
  refused([](kvm_sregs& s) { s.cs.l = 1; });                                    // 64-bit code outside long mode
  refused([](kvm_sregs& s) { s.cr0 = 0x80000011, s.efer = 0x500, s.cr4 = 0; }); // long mode without PAE
  refused([](kvm_sregs& s) { s.cr0 = 0x80000011, s.efer = 0x100, s.cr4 = 0x20; });
  refused([](kvm_sregs& s) { s.cr0 = 0x80000011, s.efer = 0x500, s.cr4 = 0x20, s.cr3 = 1ull << 60; });
}

// Without a LAPIC of the engine's too.
TEST_P(State, ImpossibleApicBasesAreRefused) {
  for (const bool irqchip : {false, true}) {
    TestVm m(system(), {.irqchip = irqchip});
    auto s = m.vcpu().sregs();
    ASSERT_TRUE(s.ok());
    for (const u64 value : {0xfee00500ull, 0xfee00901ull, 0xfee00900ull | 1ull << 60}) {
      s->apic_base = value;
      EXPECT_EQ(call(m, KVM_SET_SREGS, *s), -EINVAL) << value;
    }
    s->apic_base = 0xfee00100;
    EXPECT_EQ(call(m, KVM_SET_SREGS, *s), 0);
  }
}

// 32 banks as long as the VMM has not said how many.
TEST_P(State, MachineCheckBanksBeforeTheirSetup) {
  TestVm m(system());
  struct {
    kvm_msrs head;
    kvm_msr_entry entry;
  } msrs{};
  msrs.head.nmsrs = 1;
  for (const auto& [index, value, there] : {std::tuple<u32, u64, int>{0x179, 32, 1}, {0x400, 0, 1}, {0x400 + 4 * 31, 0, 1}, {0x400 + 4 * 32, 0, 0}}) {
    msrs.entry = {};
    msrs.entry.index = index;
    EXPECT_EQ(call(m, KVM_GET_MSRS, msrs), there) << index;
    EXPECT_EQ(msrs.entry.data, value) << index;
  }
}

// As after FNINIT: a guest that never initialises the x87 has its exceptions masked.
TEST_P(State, FpuOfANewVcpu) {
  TestVm m(system());
  kvm_fpu fpu{};
  ASSERT_EQ(call(m, KVM_GET_FPU, fpu), 0);
  EXPECT_EQ(fpu.fcw, 0x37f);
  EXPECT_EQ(fpu.fsw, 0);
  EXPECT_EQ(fpu.ftwx, 0);
}

TEST_P(State, FpuAndXsave) {
  TestVm m(system());
  for (int round = 0; round < 50; round++) {
    kvm_fpu in{};
    for (auto& r : in.fpr) {
      for (unsigned i = 0; i < 10; i++) r[i] = static_cast<u8>(random());
    }
    for (auto& r : in.xmm) {
      for (u8& b : r) b = static_cast<u8>(random());
    }
    in.fcw = 0x37f;
    in.fsw = static_cast<u16>(random() & 0x3800);
    in.ftwx = static_cast<u8>(random());
    in.last_opcode = static_cast<u16>(random() & 0x7ff);
    in.last_ip = static_cast<u32>(random());
    in.last_dp = static_cast<u32>(random());
    in.mxcsr = 0x1f80;
    ASSERT_TRUE(m.vcpu().set_fpu(in).ok());
    auto out = m.vcpu().fpu();
    ASSERT_TRUE(out.ok());
    out->mxcsr = in.mxcsr;  // the kernel's does not carry it
    expect_same(in, *out, "kvm_fpu");
  }
  if (!soft()) return;
  alignas(64) static u8 in[4096], out[4096];
  auto& x = *reinterpret_cast<kvm_xsave*>(in);
  auto& y = *reinterpret_cast<kvm_xsave*>(out);
  for (int round = 0; round < 50; round++) {
    ASSERT_EQ(call(m, KVM_GET_XSAVE, x), 0);
    for (unsigned i = 160; i < 416; i++) in[i] = static_cast<u8>(random());
    for (unsigned r = 0; r < 8; r++) {
      for (unsigned i = 0; i < 10; i++) in[32 + 16 * r + i] = static_cast<u8>(random());
    }
    in[4] = static_cast<u8>(random());
    const u32 mxcsr = static_cast<u32>(random() & 0xffff);
    std::memcpy(in + 24, &mxcsr, 4);
    u64 bv = 3;
    auto cpuid = system().supported_cpuid();
    for (const auto& e : *cpuid) {  // AVX's component, AVX-512's
      if (e.function != 0xd || e.index < 2 || e.eax == 0) continue;
      bv |= u64{1} << e.index;
      for (unsigned i = e.ebx; i < e.ebx + e.eax; i++) in[i] = static_cast<u8>(random());
    }
    std::memcpy(in + 512, &bv, 8);
    ASSERT_EQ(call(m, KVM_SET_XSAVE, x), 0);
    ASSERT_EQ(call(m, round & 1 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, y), 0);
    ASSERT_EQ(std::memcmp(in, out, 4096), 0) << "round " << round;
  }
  // Components that the header leaves out are in their initial state.
  const u64 only_x87 = 1;
  std::memcpy(in + 512, &only_x87, 8);
  ASSERT_EQ(call(m, KVM_SET_XSAVE, x), 0);
  ASSERT_EQ(call(m, KVM_GET_XSAVE, y), 0);
  for (unsigned i = 160; i < 416; i++) ASSERT_EQ(out[i], 0);
  for (unsigned i = 576; i < 4096; i++) ASSERT_EQ(out[i], 0);
  const u64 unknown = 1 << 9;
  std::memcpy(in + 512, &unknown, 8);
  EXPECT_EQ(call(m, KVM_SET_XSAVE, x), -EINVAL);
  const u64 both = 3;
  std::memcpy(in + 512, &both, 8);
  const u32 bad_mxcsr = 0x10000;
  std::memcpy(in + 24, &bad_mxcsr, 4);
  EXPECT_EQ(call(m, KVM_SET_XSAVE, x), -EINVAL);
}

TEST_P(State, Xcrs) {
  SOFT_ONLY("a paravirtual /dev/kvm may lack AVX");
  TestVm m(system());
  auto in = m.vcpu().xcrs();
  ASSERT_TRUE(in.ok());
  ASSERT_EQ(in->nr_xcrs, 1u);
  EXPECT_EQ(in->xcrs[0].value, 1u);
  in->xcrs[0].value = 3;
  ASSERT_TRUE(m.vcpu().set_xcrs(*in).ok());
  auto out = m.vcpu().xcrs();
  ASSERT_TRUE(out.ok());
  expect_same(*in, *out, "kvm_xcrs");
  for (u64 bad : {u64{0}, u64{2}, u64{5}, ~u64{0}, u64{1} << 9}) {
    in->xcrs[0].value = bad;
    EXPECT_FALSE(m.vcpu().set_xcrs(*in).ok()) << bad;
  }
  in->xcrs[0].value = 1;
  in->nr_xcrs = 17;
  EXPECT_FALSE(m.vcpu().set_xcrs(*in).ok());
}

TEST_P(State, DebugRegs) {
  TestVm m(system());
  for (int round = 0; round < 50; round++) {
    kvm_debugregs in{};
    for (auto& d : in.db) d = random() & 0x7fffffffffff;
    in.dr6 = 0xffff0ff0 | (random() & 0xe00f);
    in.dr7 = 0x400;
    if (soft()) in.dr7 |= random() & 0xffff03ff;
    ASSERT_EQ(call(m, KVM_SET_DEBUGREGS, in), 0);
    kvm_debugregs out{};
    ASSERT_EQ(call(m, KVM_GET_DEBUGREGS, out), 0);
    expect_same(in, out, "kvm_debugregs");
  }
  // What the VMM sets stays as it is, also where a MOV to the register would not leave it so.
  for (const u64 value : {u64{0}, u64{0xffffffff}}) {
    kvm_debugregs in{}, out{};
    in.dr6 = value;
    in.dr7 = soft() ? value : 0x400;
    ASSERT_EQ(call(m, KVM_SET_DEBUGREGS, in), 0);
    ASSERT_EQ(call(m, KVM_GET_DEBUGREGS, out), 0);
    expect_same(in, out, "kvm_debugregs");
  }
  kvm_debugregs bad{};
  bad.flags = 1;
  EXPECT_EQ(call(m, KVM_SET_DEBUGREGS, bad), -EINVAL);
  bad.flags = 0;
  bad.dr6 = 1ull << 40;
  EXPECT_EQ(call(m, KVM_SET_DEBUGREGS, bad), -EINVAL);
}

TEST_P(State, VcpuEvents) {
  SOFT_ONLY("hardware providers differ in what they latch");
  TestVm m(system(), {.irqchip = true});
  kvm_enable_cap cap{};
  cap.cap = KVM_CAP_EXCEPTION_PAYLOAD;
  cap.args[0] = 1;
  for (int payload = 0; payload < 2; payload++) {
    if (payload) {
      ASSERT_EQ(vm_call(m, KVM_ENABLE_CAP, cap), 0);
    }
    for (int round = 0; round < 200; round++) {
      kvm_vcpu_events in{};
      in.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
      if (payload) in.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
      in.nmi.masked = random() & 1;
      in.nmi.pending = random() & 1;
      in.nmi.injected = random() & 1;
      in.interrupt.shadow = random() & 3;
      switch (random() % 3) {
        case 0:
          in.exception.nr = vec_of(random());
          in.exception.has_error_code = random() & 1;
          in.exception.error_code = static_cast<u32>(random() & 0xffff);
          if (payload && (random() & 1)) {
            in.exception.pending = 1;
            in.exception_has_payload = random() & 1;
            if (in.exception_has_payload) in.exception_payload = random();
          } else {
            in.exception.injected = 1;
          }
          break;
        case 1:
          in.interrupt.injected = 1;
          in.interrupt.nr = static_cast<u8>(random());
          break;
        default: break;
      }
      ASSERT_EQ(call(m, KVM_SET_VCPU_EVENTS, in), 0);
      kvm_vcpu_events out{};
      ASSERT_EQ(call(m, KVM_GET_VCPU_EVENTS, out), 0);
      expect_same(in, out, "kvm_vcpu_events");
    }
  }
  kvm_vcpu_events bad{};
  bad.flags = 1 << 20;
  EXPECT_EQ(call(m, KVM_SET_VCPU_EVENTS, bad), -EINVAL);
  bad.flags = 0;
  bad.exception.injected = 1;
  bad.exception.nr = 2;
  EXPECT_EQ(call(m, KVM_SET_VCPU_EVENTS, bad), -EINVAL);
  bad.exception.nr = 32;
  EXPECT_EQ(call(m, KVM_SET_VCPU_EVENTS, bad), -EINVAL);
  bad = {};
  bad.flags = KVM_VCPUEVENT_VALID_SMM;
  bad.smi.smm = 1;
  EXPECT_EQ(call(m, KVM_SET_VCPU_EVENTS, bad), -EINVAL);  // no SMM
}

TEST_P(State, MpState) {
  SOFT_ONLY("KVM_CREATE_IRQCHIP may be missing");
  TestVm m(system(), {.irqchip = true});
  for (u32 s : {KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_UNINITIALIZED}) {
    ASSERT_TRUE(m.vcpu().set_mp_state(s).ok());
    EXPECT_EQ(m.vcpu().mp_state()->mp_state, s);
  }
  for (u32 s : {KVM_MP_STATE_STOPPED, KVM_MP_STATE_LOAD, 99}) EXPECT_FALSE(m.vcpu().set_mp_state(s).ok());
  TestVm plain(system());
  EXPECT_FALSE(plain.vcpu().set_mp_state(KVM_MP_STATE_HALTED).ok());
  EXPECT_TRUE(plain.vcpu().set_mp_state(KVM_MP_STATE_RUNNABLE).ok());
}

TEST_P(State, EveryListedMsrRoundTrips) {
  TestVm m(system(), {.irqchip = soft()});
  auto list = system().msr_index_list();
  ASSERT_TRUE(list.ok());
  EXPECT_LT(list->size(), 256u);
  EXPECT_EQ(std::set<u32>(list->begin(), list->end()).size(), list->size());
  if (!soft()) GTEST_SKIP() << "what the kernel lists it may refuse to take back";
  std::vector<kvm_msr_entry> all;
  for (u32 index : *list) all.push_back({index, 0, 0});
  ASSERT_TRUE(m.vcpu().get_msrs(all).ok());
  for (const auto& e : all) {
    kvm_msr_entry one = e;
    const auto r = m.vcpu().set_msrs({&one, 1});
    EXPECT_TRUE(r.ok()) << std::hex << e.index << ": " << e.data;
  }
  // Exactly as many as there are: QEMU insists.
  std::vector<u64> buffer(1 + 2 * all.size());
  auto* head = reinterpret_cast<kvm_msrs*>(buffer.data());
  head->nmsrs = static_cast<u32>(all.size());
  std::memcpy(head->entries, all.data(), all.size() * sizeof all[0]);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_MSRS, reinterpret_cast<u64>(head)), static_cast<long>(all.size()));
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_MSRS, reinterpret_cast<u64>(head)), static_cast<long>(all.size()));

  // Legal values are kept.
  const std::pair<u32, u64> values[] = {
      {0x174, 0x10},         {0x175, 0xffff888000001000}, {0x176, 0xffffffff81000000}, {0xc0000081, 0x0023001000000000},
      {0xc0000082, 0xffffffff81200000}, {0xc0000083, 0xffffffff81300000}, {0xc0000084, 0x47700}, {0xc0000100, 0x7f0012345678},
      {0xc0000101, 0xffff88801f000000}, {0xc0000102, 0x7fff12340000}, {0xc0000103, 5}, {0x277, 0x0407050600070106},
      {0x3b, 0x1234}, {0x4b564d03, 0x1000 | 1}, {0x1a0, 1}, {0x8b, 0x0a00117700000000}, {0x6e0, 0}, {0x200, 0x6}, {0x201, 0xfff000800},
  };
  for (const auto& [index, value] : values) {
    kvm_msr_entry e{index, 0, value};
    const auto r = m.vcpu().set_msrs({&e, 1});
    ASSERT_TRUE(r.ok()) << std::hex << index << ": " << r.error().message;
    e.data = 0;
    ASSERT_TRUE(m.vcpu().get_msrs({&e, 1}).ok());
    EXPECT_EQ(e.data, value) << std::hex << index;
  }
  // The TSC goes on from what was written.
  kvm_msr_entry tsc{0x10, 0, 1'000'000'000'000};
  ASSERT_TRUE(m.vcpu().set_msrs({&tsc, 1}).ok());
  ASSERT_TRUE(m.vcpu().get_msrs({&tsc, 1}).ok());
  EXPECT_GE(tsc.data, 1'000'000'000'000u);
  EXPECT_LT(tsc.data, 1'100'000'000'000u);
  // The count stops at the first that is refused.
  kvm_msr_entry bad[3] = {{0x174, 0, 1}, {0xdeadbeef, 0, 1}, {0x175, 0, 1}};
  std::memcpy(head->entries, bad, sizeof bad);
  head->nmsrs = 3;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_MSRS, reinterpret_cast<u64>(head)), 1);
  head->nmsrs = 256;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_MSRS, reinterpret_cast<u64>(head)), -E2BIG);
}

TEST_P(State, Cpuid) {
  TestVm m(system());
  auto offered = system().supported_cpuid();
  ASSERT_TRUE(offered.ok());
  EXPECT_LE(offered->size(), 80u);
  auto out = m.vcpu().cpuid2();
  ASSERT_TRUE(out.ok());
  if (soft()) {
    ASSERT_EQ(out->size(), offered->size());
    for (std::size_t i = 0; i < out->size(); i++) {
      if ((*out)[i].function == 0xd && (*out)[i].index <= 1) (*out)[i].ebx = (*offered)[i].ebx;  // the size for XCR0 of now
      expect_same((*out)[i], (*offered)[i], "kvm_cpuid_entry2");
    }
  }
  // What the guest's features rest on.
  std::map<u32, kvm_cpuid_entry2> leaf;
  for (const auto& e : *offered) leaf.emplace(e.function, e);
  if (!soft()) return;
  EXPECT_EQ(leaf.at(0x40000000).ebx, 0x4b4d564bu);
  EXPECT_TRUE(leaf.at(0x80000001).edx >> 29 & 1);
  EXPECT_FALSE(leaf.at(1).ecx >> 3 & 1);   // MONITOR
  EXPECT_FALSE(leaf.at(1).ecx >> 5 & 1);   // VMX
  EXPECT_FALSE(leaf.at(0x80000001).ecx >> 2 & 1);  // SVM
  u32 xcr0 = 0;
  for (const auto& e : *offered)
    if (e.function == 0xd && e.index == 0) xcr0 = e.eax;
  EXPECT_EQ(xcr0 & ~0xe7u, 0u);  // AMX among others
  EXPECT_EQ((xcr0 & 0xe0) == 0xe0, (leaf.at(7).ebx >> 16 & 1) != 0);  // AVX-512 with its state
  EXPECT_TRUE((xcr0 & 0xe0) == 0xe0 || (xcr0 & 0xe0) == 0);
  std::vector<u64> small(1 + 5);
  auto* head = reinterpret_cast<kvm_cpuid2*>(small.data());
  head->nent = 1;
  EXPECT_EQ(system().endpoint().ioctl(KVM_GET_SUPPORTED_CPUID, reinterpret_cast<u64>(head)), -E2BIG);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_CPUID2, reinterpret_cast<u64>(head)), -E2BIG);
  head->nent = 257;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_CPUID2, reinterpret_cast<u64>(head)), -E2BIG);
  // After the first KVM_RUN: only the same again.
  m.start_real(guests::hlt);
  m.run();
  EXPECT_TRUE(m.vcpu().set_cpuid2(*offered).ok());
  (*offered)[0].eax = 1;
  EXPECT_FALSE(m.vcpu().set_cpuid2(*offered).ok());
}

TEST_P(State, Lapic) {
  SOFT_ONLY("KVM_CREATE_IRQCHIP may be missing");
  TestVm m(system(), {.irqchip = true});
  auto in = m.vcpu().lapic();
  ASSERT_TRUE(in.ok());
  const auto put = [&](unsigned offset, u32 v) { std::memcpy(in->regs + offset, &v, 4); };
  put(0x80, 0x20);
  put(0xd0, 0x01000000);
  put(0xf0, 0x1ff);
  put(0x100 + 0x10, 1u << 5);  // in service
  put(0x200 + 0x20, 1u << 9);  // requested
  put(0x320, 0x20030);
  put(0x350, 0x700);
  put(0x370, 0xfe);
  put(0x3e0, 0xb);
  ASSERT_TRUE(m.vcpu().set_lapic(*in).ok());
  auto out = m.vcpu().lapic();
  ASSERT_TRUE(out.ok());
  for (unsigned offset : {0x20, 0x30, 0x80, 0xd0, 0xe0, 0xf0, 0x110, 0x220, 0x320, 0x350, 0x360, 0x370, 0x3e0}) {
    EXPECT_EQ(std::memcmp(in->regs + offset, out->regs + offset, 4), 0) << std::hex << offset;
  }
}

TEST_P(State, Irqchips) {
  SOFT_ONLY("KVM_CREATE_IRQCHIP may be missing");
  TestVm m(system(), {.irqchip = true, .pit = true});
  for (u32 id = 0; id < 3; id++) {
    kvm_irqchip in{}, out{};
    in.chip_id = out.chip_id = id;
    ASSERT_TRUE(m.vm().get_irqchip(in).ok());
    if (id == KVM_IRQCHIP_IOAPIC) {
      in.chip.ioapic.id = 1;
      in.chip.ioapic.ioregsel = 0x10;
      for (unsigned i = 0; i < 24; i++) in.chip.ioapic.redirtbl[i].bits = 0x10000 | (0x30 + i) | (i % 2) << 15;
    } else {
      in.chip.pic.imr = 0xa5;
      in.chip.pic.irq_base = static_cast<u8>(0x20 + 8 * id);
      in.chip.pic.special_mask = 1;
      in.chip.pic.isr = 0x10;
      in.chip.pic.elcr = id == 0 ? 0x20 : 0x08;
    }
    ASSERT_TRUE(m.vm().set_irqchip(in).ok());
    ASSERT_TRUE(m.vm().get_irqchip(out).ok());
    expect_same(in, out, "kvm_irqchip");
  }
  kvm_irqchip bad{};
  bad.chip_id = 3;
  EXPECT_EQ(vm_call(m, KVM_GET_IRQCHIP, bad), -EINVAL);
  kvm_pit_state2 pit{}, back{};
  ASSERT_TRUE(m.vm().get_pit2(pit).ok());
  pit.channels[2].mode = 3;
  pit.channels[2].count = 0x1234;
  pit.channels[2].rw_mode = 3;
  pit.channels[2].gate = 1;
  pit.flags = KVM_PIT_FLAGS_SPEAKER_DATA_ON;
  ASSERT_TRUE(m.vm().set_pit2(pit).ok());
  ASSERT_TRUE(m.vm().get_pit2(back).ok());
  for (unsigned i = 0; i < 3; i++) {
    EXPECT_EQ(pit.channels[i].mode, back.channels[i].mode);
    EXPECT_EQ(pit.channels[i].count, back.channels[i].count);
    EXPECT_EQ(pit.channels[i].rw_mode, back.channels[i].rw_mode);
    EXPECT_EQ(pit.channels[i].gate, back.channels[i].gate);
  }
  EXPECT_EQ(pit.flags, back.flags);
  kvm_reinject_control control{};
  EXPECT_EQ(vm_call(m, KVM_REINJECT_CONTROL, control), 0);
}

// The guest's writes of TSC and TSC_ADJUST move both by the same; the VMM's move the one it writes. Told by the offset, which is exact.
TEST_P(State, TscAdjustFollowsTheOffset) {
  SOFT_ONLY("needs 32-bit code");
  TestVm m(system());
  static const u8 code[] = {0x8b, 0x0d, 0x00, 0x06, 0x00, 0x00,  // 1: mov ecx, [0x600]
                            0xa1, 0x04, 0x06, 0x00, 0x00,        // mov eax, [0x604]
                            0x8b, 0x15, 0x08, 0x06, 0x00, 0x00,  // mov edx, [0x608]
                            0x0f, 0x30, 0xe6, 0x10,              // wrmsr; out 0x10, al
                            0xeb, 0xe9};                         // jmp 1b
  m.start_flat(Guest{code, code + sizeof code}, false);
  constexpr u32 kTsc = 0x10, kAdjust = 0x3b;
  const auto offset = [&] {
    u64 value = 0;
    kvm_device_attr attr{};
    attr.group = KVM_VCPU_TSC_CTRL;
    attr.attr = KVM_VCPU_TSC_OFFSET;
    attr.addr = reinterpret_cast<u64>(&value);
    EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_DEVICE_ATTR, arg(attr)), 0);
    return value;
  };
  const auto read = [&](u32 index) {
    kvm_msr_entry e{index, 0, 0};
    EXPECT_TRUE(m.vcpu().get_msrs({&e, 1}).ok());
    return e.data;
  };
  const auto host_writes = [&](u32 index, u64 value) {
    const kvm_msr_entry e{index, 0, value};
    EXPECT_TRUE(m.vcpu().set_msrs({&e, 1}).ok());
  };
  const auto guest_writes = [&](u32 index, u64 value) {
    m.put<u32>(0x600, index);
    m.put<u64>(0x604, value);
    m.expect_io(0x10, true, static_cast<u8>(value));
  };
  EXPECT_EQ(read(kAdjust), 0u);
  u64 before = offset();
  ASSERT_NO_FATAL_FAILURE(guest_writes(kAdjust, 1ull << 40));
  EXPECT_EQ(read(kAdjust), 1ull << 40);
  EXPECT_EQ(offset() - before, 1ull << 40);

  before = offset();
  ASSERT_NO_FATAL_FAILURE(guest_writes(kTsc, 5ull << 40));
  EXPECT_GE(read(kTsc), 5ull << 40);
  EXPECT_EQ(read(kAdjust) - (1ull << 40), offset() - before);

  before = offset();
  host_writes(kAdjust, 123);
  EXPECT_EQ(read(kAdjust), 123u);
  EXPECT_EQ(offset(), before);
  host_writes(kTsc, 9ull << 40);
  EXPECT_GE(read(kTsc), 9ull << 40);
  EXPECT_NE(offset(), before);
  EXPECT_EQ(read(kAdjust), 123u);
}

TEST_P(State, ClockAndTsc) {
  SOFT_ONLY("the host's rate cannot be changed everywhere");
  TestVm m(system());
  kvm_clock_data in{};
  in.clock = 123'456'789'000;
  ASSERT_TRUE(m.vm().set_clock(in).ok());
  kvm_clock_data out{};
  ASSERT_TRUE(m.vm().get_clock(out).ok());
  EXPECT_GE(out.clock, in.clock);
  EXPECT_LT(out.clock, in.clock + 10'000'000'000);
  in.flags = 1 << 20;
  EXPECT_FALSE(m.vm().set_clock(in).ok());
  const long khz = m.vcpu().endpoint().ioctl(KVM_GET_TSC_KHZ, 0);
  ASSERT_GT(khz, 1000);
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_TSC_KHZ, static_cast<u64>(khz / 2)), 0);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_TSC_KHZ, 0), khz / 2);
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_TSC_KHZ, 0xffffffff), -EINVAL);
}

TEST_P(State, Translate) {
  SOFT_ONLY("a paravirtual /dev/kvm answers for its shadow");
  TestVm m(system());
  m.start_flat(guests::work64, true);
  kvm_translation t{};
  t.linear_address = 0x12345;
  ASSERT_EQ(call(m, KVM_TRANSLATE, t), 0);
  EXPECT_EQ(t.valid, 1);
  EXPECT_EQ(t.physical_address, 0x12345u);
  EXPECT_EQ(t.usermode, 0);
  t.linear_address = 0x200000;
  ASSERT_EQ(call(m, KVM_TRANSLATE, t), 0);
  EXPECT_EQ(t.valid, 0);
}

// Without paging an address is its own translation, but for the one that stands for "none".
TEST_P(State, TranslateWithoutPaging) {
  SOFT_ONLY("a paravirtual /dev/kvm answers for its shadow");
  TestVm m(system());
  kvm_translation t{};
  t.linear_address = 0x10000;
  ASSERT_EQ(call(m, KVM_TRANSLATE, t), 0);
  EXPECT_EQ(t.valid, 1);
  EXPECT_EQ(t.physical_address, 0x10000u);
  t.linear_address = 0x123456789000;
  ASSERT_EQ(call(m, KVM_TRANSLATE, t), 0);
  EXPECT_EQ(t.physical_address, 0x123456789000u);
  t.linear_address = ~0ull;
  ASSERT_EQ(call(m, KVM_TRANSLATE, t), 0);
  EXPECT_EQ(t.valid, 0);
  EXPECT_EQ(t.physical_address, ~0ull);
}

TEST_P(State, Errors) {
  SOFT_ONLY("the kernel's are the model");
  TestVm m(system());
  auto& sys = system().endpoint();
  auto& vm = m.vm().endpoint();
  auto& vcpu = m.vcpu().endpoint();
  EXPECT_EQ(sys.ioctl(KVM_GET_API_VERSION, 0), 12);
  EXPECT_EQ(sys.ioctl(0xdead, 0), -EINVAL);
  EXPECT_EQ(vm.ioctl(0xdead, 0), -ENOTTY);
  EXPECT_EQ(vcpu.ioctl(0xdead, 0), -EINVAL);
  EXPECT_EQ(sys.ioctl(KVM_RUN, 0), -EINVAL);
  EXPECT_EQ(vcpu.ioctl(KVM_RUN, 1), -EINVAL);
  EXPECT_EQ(sys.create(KVM_CREATE_VM, 7).error().code, EINVAL);
  EXPECT_EQ(sys.create(KVM_CREATE_VCPU, 0).error().code, ENOTTY);
  EXPECT_EQ(vm.create(KVM_CREATE_VCPU, 0).error().code, EEXIST);
  EXPECT_EQ(vm.create(KVM_CREATE_VCPU, 1u << 20).error().code, EINVAL);
  EXPECT_EQ(vcpu.ioctl(KVM_GET_LAPIC, 0x1000000), -EINVAL);
  EXPECT_EQ(vm.ioctl(KVM_CREATE_IRQCHIP, 0), -EINVAL);  // a vCPU exists
  EXPECT_EQ(vm.ioctl(KVM_SET_BOOT_CPU_ID, 1), -EBUSY);
  EXPECT_EQ(vm.ioctl(KVM_SET_TSS_ADDR, ~0ull), -EINVAL);
  for (unsigned long request : {KVM_SET_REGS, KVM_GET_REGS, KVM_SET_SREGS, KVM_GET_VCPU_EVENTS, KVM_SET_XSAVE, KVM_SET_MSRS, KVM_SET_CPUID2,
                                KVM_SET_GUEST_DEBUG, KVM_TRANSLATE}) {
    EXPECT_EQ(vcpu.ioctl(request, 0), -EFAULT) << request;
    EXPECT_EQ(vcpu.ioctl(request, 0xffff800000000000), -EFAULT) << request;
  }
  kvm_userspace_memory_region region{};
  region.slot = 1;
  region.guest_phys_addr = 0x1000;
  region.memory_size = 0x1000;
  region.userspace_addr = m.hva().value;
  EXPECT_EQ(vm.ioctl(KVM_SET_USER_MEMORY_REGION, arg(region)), -EEXIST);
  region.guest_phys_addr = 0x100001;
  EXPECT_EQ(vm.ioctl(KVM_SET_USER_MEMORY_REGION, arg(region)), -EINVAL);
  region.guest_phys_addr = 0x100000;
  region.flags = 1 << 8;
  EXPECT_EQ(vm.ioctl(KVM_SET_USER_MEMORY_REGION, arg(region)), -EINVAL);
  kvm_irq_level line{};
  EXPECT_EQ(vm.ioctl(KVM_IRQ_LINE, arg(line)), -ENXIO);
  kvm_interrupt irq{256};
  EXPECT_EQ(vcpu.ioctl(KVM_INTERRUPT, arg(irq)), -EINVAL);
  // Nothing is offered that does not work.
  for (int cap : {KVM_CAP_X86_SMM, KVM_CAP_NESTED_STATE, KVM_CAP_HYPERV_ENLIGHTENED_VMCS, 9999}) {
    EXPECT_EQ(system().check_extension(cap), 0) << cap;
  }
  // Pointers to what is not there, or may not be written.
  void* none = ::mmap(nullptr, 0x2000, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(none, MAP_FAILED);
  for (unsigned long request : {static_cast<unsigned long>(KVM_GET_REGS), static_cast<unsigned long>(KVM_SET_SREGS),
                                static_cast<unsigned long>(KVM_GET_XSAVE), static_cast<unsigned long>(KVM_SET_CPUID2),
                                static_cast<unsigned long>(KVM_GET_MSRS)}) {
    EXPECT_EQ(vcpu.ioctl(request, reinterpret_cast<u64>(none)), -EFAULT) << request;
  }
  EXPECT_EQ(vm.ioctl(KVM_X86_SET_MSR_FILTER, reinterpret_cast<u64>(none)), -EFAULT);
  ::munmap(none, 0x2000);
  kvm_msr_filter filter{};
  filter.flags = KVM_MSR_FILTER_DEFAULT_DENY;  // nothing at all allowed
  EXPECT_EQ(vm.ioctl(KVM_X86_SET_MSR_FILTER, arg(filter)), -EINVAL);
  // A list of MSRs that does not fit says how long it is.
  u32 list[3] = {1, 0, 0};
  EXPECT_EQ(sys.ioctl(KVM_GET_MSR_INDEX_LIST, arg(list)), -E2BIG);
  EXPECT_GT(list[0], 10u);
}

TEST(Options, UnknownOnesAreNamed) {
  engine::EngineOptions options;
  options.values["no-such-thing"] = "1";
  auto r = engine::create_soft_system(options);
  ASSERT_FALSE(r.ok());
  EXPECT_NE(r.error().message.find("no-such-thing"), std::string::npos);
  options.values = {{"cache-mib", "zero"}};
  EXPECT_FALSE(engine::create_soft_system(options).ok());
  options.values = {{"cache-mib", "2"}, {"quantum", "1000"}};
  EXPECT_TRUE(engine::create_soft_system(options).ok());
}

}  // namespace
}  // namespace ring3::abitest
