#pragma once
#include "base/linux_kvm.hpp"

#include <gtest/gtest.h>

#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/mapping.hpp"
#include "engine/abi/provider.hpp"
#include "kvm/kernel_provider.hpp"
#include "kvm/system.hpp"

/// What the ABI tests share: a VM with 512 KiB of RAM and a small guest, on a provider chosen by the test's parameter.
namespace ring3::abitest {

using kvm::Endpoint;
using kvm::System;
using kvm::Vcpu;
using kvm::Vm;

enum class Provider { Interpreter, Translator, Kernel };
inline std::string provider_name(const testing::TestParamInfo<Provider>& info) {
  return info.param == Provider::Interpreter ? "interpreter" : info.param == Provider::Translator ? "translator" : "kernel";
}

inline Result<std::unique_ptr<Endpoint>> open_provider(Provider p) {
  if (p == Provider::Kernel) return kvm::open_kernel_kvm();
  engine::EngineOptions options;
  options.values["engine"] = p == Provider::Translator ? "translator" : "interpreter";
  return engine::create_soft_system(options);
}

struct Guest {
  const u8* begin;
  const u8* end;
};
#define GUEST(name)                                                 \
  extern "C" const ring3::u8 guest_##name[], guest_##name##_end[]; \
  inline const ring3::abitest::Guest name{guest_##name, guest_##name##_end}
namespace guests {
GUEST(pio);
GUEST(mmio);
GUEST(hlt);
GUEST(spin);
GUEST(idle);
GUEST(triple);
GUEST(step);
GUEST(window);
GUEST(irq);
GUEST(bsp);
GUEST(ap);
GUEST(dirty);
GUEST(watch);
GUEST(doorbell);
GUEST(work32);
GUEST(work64);
GUEST(hypercall);
GUEST(ipi_hypercall);
GUEST(xen_hypercalls);
GUEST(async_pf);
GUEST(xen_upcalls);
GUEST(xen_forced_upcall);
GUEST(xen_send_and_poll);
GUEST(xen_send32);
GUEST(hyperv_sint);
GUEST(pair_clocks);
GUEST(spin64);
GUEST(lapic64);
GUEST(pv_eoi);
GUEST(map_gpa_range);
GUEST(lapic_page);
}  // namespace guests

struct VmOptions {
  bool irqchip = false;
  bool split = false;  ///< the LAPICs alone, with 24 pins of the VMM's
  bool pit = false;
  unsigned vcpus = 1;
  bool cpuid = true;
};

class TestVm {
 public:
  static constexpr u64 kRam = 0x80000;

  TestVm(const System& system, VmOptions options = {}) : system_(system) {
    auto vm = system.create_vm();
    EXPECT_TRUE(vm.ok()) << vm.error().message;
    vm_ = std::make_unique<Vm>(std::move(*vm));
    ram_ = std::move(*Mapping::anonymous(kRam));
    EXPECT_TRUE(vm_->set_tss_addr(Gpa(0xfffbd000)).ok());
    EXPECT_TRUE(vm_->set_user_memory_region(0, Gpa(0), kRam, hva()).ok());
    if (options.irqchip) {
      EXPECT_TRUE(vm_->create_irqchip().ok());
    }
    if (options.split) {
      EXPECT_TRUE(vm_->enable_cap(KVM_CAP_SPLIT_IRQCHIP, 24).ok());
    }
    if (options.pit) {
      EXPECT_TRUE(vm_->create_pit2(KVM_PIT_SPEAKER_DUMMY).ok());
    }
    auto size = system.vcpu_mmap_size();
    mmap_size_ = size.ok() ? *size : 0;
    options_ = options;
    for (unsigned i = 0; i < options.vcpus; i++) add_vcpu(i);
  }

  void add_vcpu(unsigned i) {
    auto v = vm_->create_vcpu(i);
    ASSERT_TRUE(v.ok()) << v.error().message;
    vcpus_.push_back(std::make_unique<Vcpu>(std::move(*v)));
    auto cpuid = system_.supported_cpuid();
    if (!options_.cpuid || !cpuid.ok()) return;
    for (auto& e : *cpuid) {
      if (e.function != 1) continue;
      e.ebx = (e.ebx & 0xffffff) | i << 24;
      // Not in the list: it comes with the LAPICs.
      if ((options_.irqchip || options_.split) && system_.check_extension(KVM_CAP_TSC_DEADLINE_TIMER) != 0) e.ecx |= 1u << 24;
    }
    EXPECT_TRUE(vcpus_.back()->set_cpuid2(*cpuid).ok());
  }

  Vm& vm() { return *vm_; }
  Vcpu& vcpu(unsigned i = 0) { return *vcpus_[i]; }
  u8* ram() { return ram_.data(); }
  Hva hva() const { return Hva(reinterpret_cast<u64>(ram_.data())); }
  u64 mmap_size() const { return mmap_size_; }
  const System& system() const { return system_; }
  template <class T>
  T at(u64 gpa) const {
    T v;
    std::memcpy(&v, ram_.data() + gpa, sizeof v);
    return v;
  }
  template <class T>
  void put(u64 gpa, T v) {
    std::memcpy(ram_.data() + gpa, &v, sizeof v);
  }
  void load(const Guest& g, u64 gpa = 0x1000) { std::memcpy(ram() + gpa, g.begin, static_cast<std::size_t>(g.end - g.begin)); }

  void start_real(const Guest& g, unsigned i = 0) {
    load(g);
    auto sregs = vcpu(i).sregs();
    ASSERT_TRUE(sregs.ok());
    for (kvm_segment* s : {&sregs->cs, &sregs->ds, &sregs->es, &sregs->ss, &sregs->fs, &sregs->gs}) {
      s->base = 0;
      s->selector = 0;
    }
    ASSERT_TRUE(vcpu(i).set_sregs(*sregs).ok());
    set_entry(i);
  }
  void set_entry(unsigned i = 0) {
    kvm_regs regs{};
    regs.rip = 0x1000;
    regs.rsp = 0x8000;
    regs.rflags = 2;
    ASSERT_TRUE(vcpu(i).set_regs(regs).ok());
  }

  static kvm_segment flat(bool code, bool l) {
    kvm_segment s{};
    s.limit = 0xffffffff;
    s.selector = code ? 0x8 : 0x10;
    s.type = code ? 11 : 3;
    s.present = 1;
    s.db = !l || !code;
    s.s = 1;
    s.l = l && code;
    s.g = 1;
    return s;
  }
  /// Flat 32-bit ring 0 without paging, or 64-bit with the first 2 MiB mapped one to one.
  void start_flat(const Guest& g, bool long_mode) {
    load(g);
    auto sregs = vcpu().sregs();
    ASSERT_TRUE(sregs.ok());
    sregs->cs = flat(true, long_mode);
    for (kvm_segment* s : {&sregs->ds, &sregs->es, &sregs->ss, &sregs->fs, &sregs->gs}) *s = flat(false, long_mode);
    sregs->cr0 = 0x33;  // PE, MP, ET, NE
    sregs->cr4 = 0x600;
    if (long_mode) {
      put<u64>(0x30000, 0x31003);
      put<u64>(0x31000, 0x32003);
      put<u64>(0x32000, 0x83);
      sregs->cr3 = 0x30000;
      sregs->cr4 |= 0x20;
      sregs->efer = 0x500;
      sregs->cr0 |= 0x80000000;
      sregs->tr.type = 11;
      sregs->tr.present = 1;
      sregs->tr.s = 0;
      sregs->tr.limit = 0xffff;
    }
    const auto ok = vcpu().set_sregs(*sregs);
    ASSERT_TRUE(ok.ok()) << ok.error().message;
    set_entry();
  }

  u32 exit_reason(unsigned i = 0) { return vcpu(i).run_page().exit_reason; }
  /// KVM_RUN, which must succeed.
  u32 run(unsigned i = 0) {
    const int r = vcpu(i).run();
    EXPECT_EQ(r, 0) << "KVM_RUN: " << std::strerror(-r);
    return r == 0 ? exit_reason(i) : ~0u;
  }
  /// Runs and expects a port access.
  void expect_io(u16 port, bool out, u32 value = 0, unsigned size = 1) {
    ASSERT_EQ(run(), u32{KVM_EXIT_IO});
    kvm_run& r = vcpu().run_page();
    ASSERT_EQ(r.io.port, port);
    ASSERT_EQ(r.io.direction, out ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN);
    ASSERT_EQ(r.io.size, size);
    auto data = vcpu().io_data(mmap_size_);
    ASSERT_EQ(data.size(), size * r.io.count);
    u32 v = 0;
    if (out) {
      std::memcpy(&v, data.data(), size);
      EXPECT_EQ(v, value) << "port " << port;
    } else {
      std::memcpy(data.data(), &value, size);
    }
  }
  void expect_end() {
    ASSERT_EQ(run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(vcpu().run_page().io.port, 0xf4);
  }

 private:
  System system_;
  VmOptions options_;
  Mapping ram_;
  std::unique_ptr<Vm> vm_;
  std::vector<std::unique_ptr<Vcpu>> vcpus_;
  u64 mmap_size_ = 0;
};

/// 64-bit code with an IDT: each vector's handler stands so many bytes into the guest.
inline void start_long(TestVm& m, const Guest& guest, std::initializer_list<std::pair<u8, u64>> handlers) {
  m.start_flat(guest, true);
  auto sregs = m.vcpu().sregs();
  ASSERT_TRUE(sregs.ok());
  sregs->idt.base = 0x34000;
  sregs->idt.limit = 0xfff;
  sregs->gdt.base = 0x35000;
  sregs->gdt.limit = 0x17;
  ASSERT_TRUE(m.vcpu().set_sregs(*sregs).ok());
  m.put<u64>(0x35008, 0x00af9b000000ffff);
  m.put<u64>(0x35010, 0x00cf93000000ffff);
  for (const auto& [vector, offset] : handlers) {
    m.put<u64>(0x34000 + vector * 16u, (0x1000 + offset) | u64{0x8e000008} << 16);
    m.put<u64>(0x34000 + vector * 16u + 8, 0);
  }
}

/// The first vCPU's CPUID, with Hyper-V's leaves.
inline void add_hyperv_cpuid(TestVm& m) {
  constexpr u32 kRoom = 64;
  std::vector<u8> buffer(sizeof(kvm_cpuid2) + kRoom * sizeof(kvm_cpuid_entry2));
  auto* head = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  head->nent = kRoom;
  ASSERT_EQ(m.vcpu().endpoint().ioctl(KVM_GET_SUPPORTED_HV_CPUID, reinterpret_cast<u64>(head)), 0);
  auto all = m.system().supported_cpuid();
  ASSERT_TRUE(all.ok());
  std::erase_if(*all, [](const kvm_cpuid_entry2& e) { return e.function >> 8 == 0x400000; });
  const auto* leaves = reinterpret_cast<const kvm_cpuid_entry2*>(head + 1);
  all->insert(all->end(), leaves, leaves + head->nent);
  ASSERT_TRUE(m.vcpu().set_cpuid2(*all).ok());
}

inline int eventfd_make() { return ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK); }

/// One test on one provider; skipped, with the reason, where the host lacks it.
class AbiTest : public testing::TestWithParam<Provider> {
 protected:
  void SetUp() override {
    auto endpoint = open_provider(GetParam());
    if (!endpoint) GTEST_SKIP() << endpoint.error().message;
    auto system = System::create(std::shared_ptr<Endpoint>(std::move(*endpoint)));
    if (!system) GTEST_SKIP() << system.error().message;
    auto probe = system->create_vm();
    if (!probe) GTEST_SKIP() << probe.error().message;
    system_ = std::make_unique<System>(std::move(*system));
  }
  bool soft() const { return GetParam() != Provider::Kernel; }
  System& system() { return *system_; }
  template <class T>
  static u64 arg(T& v) { return reinterpret_cast<u64>(&v); }

 private:
  std::unique_ptr<System> system_;
};

// The kernel's device may be a paravirtual one without VT-x or SVM, which is no reference for anything but simple 16-bit code.
#define SOFT_ONLY(reason) \
  if (!soft()) GTEST_SKIP() << reason

}  // namespace ring3::abitest
