// Error numbers, call by call: what the kernel's documentation and sources say, on the engine and, where the host has one, on
// the kernel's own /dev/kvm.
#include <sys/mman.h>

#include "base/unique_fd.hpp"
#include "engine/abi/newer_kvm.hpp"
#include "harness.hpp"

namespace ring3::abitest {
namespace {

enum class On : u8 { System, Vm, Irqchip /* a VM with one */, Vcpu };
enum class With : u8 {
  Integer,   // value
  Null,      // a pointer to nothing
  Kernel,    // a pointer into the kernel's half
  Struct,    // bytes, then zeros
};

struct Row {
  const char* what;
  On on;
  unsigned long request;
  With with;
  u64 value;  // of Integer, or what stands in the struct's first 8 bytes
  long answer;
  bool kernel = true;  // whether the host's kernel is asked too: not where its version decides
};

constexpr u64 k32 = 32;

const Row kRows[] = {
    {"API version with an argument", On::System, KVM_GET_API_VERSION, With::Integer, 1, -EINVAL},
    {"vCPU area with an argument", On::System, KVM_GET_VCPU_MMAP_SIZE, With::Integer, 1, -EINVAL},
    {"an unknown capability", On::System, KVM_CHECK_EXTENSION, With::Integer, 99999, 0},
    {"tracing, which the kernel once had", On::System, KVM_TRACE_DISABLE, With::Integer, 0, -EOPNOTSUPP, false},
    {"emulated CPUID to nowhere", On::System, KVM_GET_EMULATED_CPUID, With::Null, 0, -EFAULT},
    {"emulated CPUID without room", On::System, KVM_GET_EMULATED_CPUID, With::Struct, 1, -E2BIG},
    {"KVM_RUN on the system", On::System, KVM_RUN, With::Integer, 0, -EINVAL},
    {"an unknown ioctl", On::System, _IO(KVMIO, 0xfe), With::Integer, 0, -EINVAL},
    {"an unknown ioctl of a VM", On::Vm, _IO(KVMIO, 0xfe), With::Integer, 0, -ENOTTY},
    {"an unknown ioctl of a vCPU", On::Vcpu, _IO(KVMIO, 0xfe), With::Integer, 0, -EINVAL},
    {"supported CPUID to nowhere", On::System, KVM_GET_SUPPORTED_CPUID, With::Null, 0, -EFAULT},
    {"supported CPUID without room", On::System, KVM_GET_SUPPORTED_CPUID, With::Struct, 1, -E2BIG},
    {"MSR list to nowhere", On::System, KVM_GET_MSR_INDEX_LIST, With::Null, 0, -EFAULT},
    {"MSR list without room", On::System, KVM_GET_MSR_INDEX_LIST, With::Struct, 0, -E2BIG},
    {"feature MSR list without room", On::System, KVM_GET_MSR_FEATURE_INDEX_LIST, With::Struct, 0, -E2BIG},
    {"feature MSRs from nowhere", On::System, KVM_GET_MSRS, With::Null, 0, -EFAULT},
    {"too many feature MSRs", On::System, KVM_GET_MSRS, With::Struct, 4096, -E2BIG},

    {"KVM_RUN on a VM", On::Vm, KVM_RUN, With::Integer, 0, -ENOTTY},
    {"a memslot from nowhere", On::Vm, KVM_SET_USER_MEMORY_REGION, With::Null, 0, -EFAULT},
    {"a memslot from the kernel", On::Vm, KVM_SET_USER_MEMORY_REGION, With::Kernel, 0, -EFAULT},
    {"a slot number out of range", On::Vm, KVM_SET_USER_MEMORY_REGION, With::Struct, 0xffff, -EINVAL},
    {"an unknown slot flag", On::Vm, KVM_SET_USER_MEMORY_REGION, With::Struct, 1ull << (k32 + 31), -EINVAL},
    {"deleting a slot that is not", On::Vm, KVM_SET_USER_MEMORY_REGION, With::Struct, 77, -EINVAL},
    {"a PMU's event filter from nowhere", On::Vm, KVM_SET_PMU_EVENT_FILTER, With::Null, 0, -EFAULT},
    {"a filter that neither allows nor denies", On::Vm, KVM_SET_PMU_EVENT_FILTER, With::Struct, 2, -EINVAL},
    {"a filter of too many events", On::Vm, KVM_SET_PMU_EVENT_FILTER, With::Struct, 1 | 301ull << k32, -E2BIG},
    {"a filter of as many as may be", On::Vm, KVM_SET_PMU_EVENT_FILTER, With::Struct, 1 | 300ull << k32, 0},
    {"the dirty log from nowhere", On::Vm, KVM_GET_DIRTY_LOG, With::Null, 0, -EFAULT},
    {"the dirty log of no slot", On::Vm, KVM_GET_DIRTY_LOG, With::Struct, 77, -ENOENT},
    {"the dirty log of a slot out of range", On::Vm, KVM_GET_DIRTY_LOG, With::Struct, 0xffff, -EINVAL},
    {"the TSS too high", On::Vm, KVM_SET_TSS_ADDR, With::Integer, 0xfffffff0, -EINVAL, false},
    {"a longer memslot from nowhere", On::Vm, KVM_SET_USER_MEMORY_REGION2, With::Null, 0, -EFAULT, false},
    {"a longer memslot of memory of the guest's own", On::Vm, KVM_SET_USER_MEMORY_REGION2, With::Struct, 4ull << k32, -EINVAL, false},
    {"a boot vCPU that cannot be", On::Irqchip, KVM_SET_BOOT_CPU_ID, With::Integer, 1, -EBUSY},
    {"the identity map from nowhere", On::Vm, KVM_SET_IDENTITY_MAP_ADDR, With::Null, 0, -EINVAL},  // there are vCPUs: asked first
    {"clearing the dirty log from nowhere", On::Vm, KVM_CLEAR_DIRTY_LOG, With::Null, 0, -EFAULT},
    {"clearing the dirty log of no slot", On::Vm, KVM_CLEAR_DIRTY_LOG, With::Struct, 77, -ENOENT},
    {"clearing the dirty log of a slot that has none", On::Vm, KVM_CLEAR_DIRTY_LOG, With::Struct, 0, -ENOENT},
    {"the dirty log of a slot that has none", On::Vm, KVM_GET_DIRTY_LOG, With::Struct, 0, -ENOENT},
    {"no exits to disable", On::Vm, KVM_ENABLE_CAP, With::Struct, KVM_CAP_X86_DISABLE_EXITS, 0, false},
    {"how many MMU pages", On::Vm, KVM_GET_NR_MMU_PAGES, With::Integer, 0, 0, false},
    {"Xen's configuration from nowhere", On::Vm, KVM_XEN_HVM_CONFIG, With::Null, 0, -EFAULT, false},
    {"too few MMU pages", On::Vm, KVM_SET_NR_MMU_PAGES, With::Integer, 63, -EINVAL},
    {"more vCPU ids than there have been", On::Vm, KVM_ENABLE_CAP, With::Struct, KVM_CAP_MAX_VCPU_ID, -EINVAL, false},
    {"a TSC rate beyond all", On::Vm, KVM_SET_TSC_KHZ, With::Integer, 0xffffffff, -EINVAL, false},
    {"a PIT without irqchip", On::Vm, KVM_CREATE_PIT2, With::Struct, 0, -ENOENT},
    {"a PIT from nowhere", On::Vm, KVM_CREATE_PIT2, With::Null, 0, -EFAULT},
    {"an irqchip's state without irqchip", On::Vm, KVM_GET_IRQCHIP, With::Struct, 0, -ENXIO},
    {"PIT state without PIT", On::Vm, KVM_GET_PIT2, With::Struct, 0, -ENXIO},
    {"PIT state without PIT, to nowhere", On::Vm, KVM_GET_PIT2, With::Null, 0, -ENXIO},
    {"older PIT state without PIT, to nowhere", On::Vm, KVM_GET_PIT, With::Null, 0, -EFAULT},
    {"PIT state from nowhere", On::Vm, KVM_SET_PIT2, With::Kernel, 0, -EFAULT},
    {"reinjection without PIT, from nowhere", On::Vm, KVM_REINJECT_CONTROL, With::Null, 0, -EFAULT},
    {"reinjection without PIT", On::Vm, KVM_REINJECT_CONTROL, With::Struct, 0, -ENXIO},
    {"a line without irqchip", On::Vm, KVM_IRQ_LINE, With::Struct, 0, -ENXIO},
    {"a line from nowhere", On::Vm, KVM_IRQ_LINE, With::Null, 0, -EFAULT},
    {"an MSI without irqchip", On::Vm, KVM_SIGNAL_MSI, With::Struct, 0, -EINVAL},
    {"a capability from nowhere", On::Vm, KVM_ENABLE_CAP, With::Null, 0, -EFAULT},
    {"an unknown capability to enable", On::Vm, KVM_ENABLE_CAP, With::Struct, 99999, -EINVAL},
    {"a capability with flags", On::Vm, KVM_ENABLE_CAP, With::Struct, KVM_CAP_X2APIC_API | 1ull << k32, -EINVAL},
    {"resetting rings that are not", On::Vm, KVM_RESET_DIRTY_RINGS, With::Integer, 0, -EINVAL, false},
    {"an ioeventfd from nowhere", On::Vm, KVM_IOEVENTFD, With::Null, 0, -EFAULT},
    {"a clock from nowhere", On::Vm, KVM_SET_CLOCK, With::Null, 0, -EFAULT},
    {"a device of no kind", On::Vm, KVM_CREATE_DEVICE, With::Struct, 99, -ENODEV},
    {"a connection from nowhere", On::Vm, KVM_HYPERV_EVENTFD, With::Null, 0, -EFAULT, false},
    {"a connection to no eventfd", On::Vm, KVM_HYPERV_EVENTFD, With::Struct, 0xffffffffull << k32, -EBADF, false},
    {"an MSR filter from nowhere", On::Vm, KVM_X86_SET_MSR_FILTER, With::Null, 0, -EFAULT, false},

    {"a second irqchip", On::Irqchip, KVM_CREATE_IRQCHIP, With::Integer, 0, -EEXIST},
    {"a chip that is not", On::Irqchip, KVM_GET_IRQCHIP, With::Struct, 3, -EINVAL},
    {"routing flags", On::Irqchip, KVM_SET_GSI_ROUTING, With::Struct, 1ull << k32, -EINVAL},
    {"too many routes", On::Irqchip, KVM_SET_GSI_ROUTING, With::Struct, 5000, -EINVAL},
    {"an irqfd of no eventfd", On::Irqchip, KVM_IRQFD, With::Struct, 0xffffffff, -EBADF},

    {"KVM_RUN with an argument", On::Vcpu, KVM_RUN, With::Integer, 1, -EINVAL, false},
    {"KVM_CREATE_IRQCHIP on a vCPU", On::Vcpu, KVM_CREATE_IRQCHIP, With::Integer, 0, -EINVAL},
    {"registers to nowhere", On::Vcpu, KVM_GET_REGS, With::Null, 0, -EFAULT},
    {"registers from nowhere", On::Vcpu, KVM_SET_REGS, With::Null, 0, -EFAULT},
    {"registers from the kernel", On::Vcpu, KVM_SET_SREGS, With::Kernel, 0, -EFAULT},
    {"XSAVE from nowhere", On::Vcpu, KVM_SET_XSAVE, With::Null, 0, -EFAULT},
    {"too many MSRs", On::Vcpu, KVM_GET_MSRS, With::Struct, 4096, -E2BIG},
    {"MSRs from nowhere", On::Vcpu, KVM_SET_MSRS, With::Null, 0, -EFAULT},
    {"too much CPUID", On::Vcpu, KVM_SET_CPUID2, With::Struct, 4096, -E2BIG},
    {"CPUID from nowhere", On::Vcpu, KVM_SET_CPUID2, With::Null, 0, -EFAULT},
    {"an interrupt out of range", On::Vcpu, KVM_INTERRUPT, With::Struct, 256, -EINVAL},
    {"a LAPIC that is not", On::Vcpu, KVM_GET_LAPIC, With::Struct, 0, -EINVAL},
    {"an MP state out of range", On::Vcpu, KVM_SET_MP_STATE, With::Struct, 99, -EINVAL},
    {"events with unknown flags", On::Vcpu, KVM_SET_VCPU_EVENTS, With::Null, 0, -EFAULT},
    {"machine checks from nowhere", On::Vcpu, KVM_X86_SETUP_MCE, With::Null, 0, -EFAULT},
    {"no machine-check banks", On::Vcpu, KVM_X86_SETUP_MCE, With::Struct, 0, -EINVAL},
    {"too many machine-check banks", On::Vcpu, KVM_X86_SETUP_MCE, With::Struct, 200, -EINVAL},
    {"a signal mask from nowhere", On::Vcpu, KVM_SET_SIGNAL_MASK, With::Kernel, 0, -EFAULT},
    {"no XCR0 among the XCRs", On::Vcpu, KVM_SET_XCRS, With::Struct, 0, 0, false},
    {"the vAPIC without LAPIC, from nowhere", On::Vcpu, KVM_SET_VAPIC_ADDR, With::Null, 0, -EINVAL},
    {"a signal mask of odd length", On::Vcpu, KVM_SET_SIGNAL_MASK, With::Struct, 4, -EINVAL},
    {"too little room for Hyper-V's CPUID", On::Vcpu, KVM_GET_SUPPORTED_HV_CPUID, With::Struct, 0, -E2BIG, false},
    {"Hyper-V's CPUID to nowhere", On::Vcpu, KVM_GET_SUPPORTED_HV_CPUID, With::Null, 0, -EFAULT, false},
    {"a SynIC without LAPIC", On::Vcpu, KVM_ENABLE_CAP, With::Struct, KVM_CAP_HYPERV_SYNIC2, -EINVAL, false},
    {"a vCPU capability with flags", On::Vcpu, KVM_ENABLE_CAP, With::Struct, 1ull << k32, -EINVAL},
    {"an attribute that is not", On::Vcpu, KVM_HAS_DEVICE_ATTR, With::Struct, 99ull << k32, -ENXIO, false},
    {"the vAPIC without LAPIC", On::Vcpu, KVM_SET_VAPIC_ADDR, With::Struct, 0, -EINVAL},
};

// What is not offered: its capability is 0, and its ioctls are unknown ones: ENOTTY on a VM, EINVAL elsewhere. A kernel of the host may
// offer them.
struct Lacking {
  const char* what;
  u64 capability;
  On on;
  unsigned long request;  // 0: none
  With with = With::Struct;
};

constexpr unsigned long kNone = 0;

const Lacking kLacking[] = {
    {"a PMU to switch off", KVM_CAP_PMU_CAPABILITY, On::Vm, kNone},
    {"Hyper-V inside VMX", KVM_CAP_HYPERV_ENLIGHTENED_VMCS, On::Vcpu, kNone},
    {"nested state", KVM_CAP_NESTED_STATE, On::Vcpu, KVM_GET_NESTED_STATE},
    {"system management mode", KVM_CAP_X86_SMM, On::Vcpu, KVM_SMI},
    {"encrypted memory", KVM_CAP_VM_COPY_ENC_CONTEXT_FROM, On::Vm, KVM_MEMORY_ENCRYPT_OP},
};

class ErrorNumbers : public AbiTest {};

TEST_P(ErrorNumbers, OfWhatIsNotOffered) {
  SOFT_ONLY("a kernel may offer it");
  TestVm vm(system());
  std::vector<u64> bytes(8192);
  for (const Lacking& row : kLacking) {
    SCOPED_TRACE(row.what);
    EXPECT_EQ(system().endpoint().ioctl(KVM_CHECK_EXTENSION, row.capability), 0);
    EXPECT_EQ(vm.vm().endpoint().ioctl(KVM_CHECK_EXTENSION, row.capability), 0);
    kvm_enable_cap cap{};
    cap.cap = static_cast<u32>(row.capability);
    for (const u64 value : {0, 1}) {
      cap.args[0] = value;
      EXPECT_EQ(vm.vm().endpoint().ioctl(KVM_ENABLE_CAP, arg(cap)), -EINVAL);
      EXPECT_EQ(vm.vcpu().endpoint().ioctl(KVM_ENABLE_CAP, arg(cap)), -EINVAL);
    }
    if (row.request == kNone) continue;
    Endpoint& on = row.on == On::System ? system().endpoint() : row.on == On::Vcpu ? vm.vcpu().endpoint() : vm.vm().endpoint();
    EXPECT_EQ(on.ioctl(row.request, row.with == With::Null ? 0 : reinterpret_cast<u64>(bytes.data())), row.on == On::Vm ? -ENOTTY : -EINVAL);
  }
  // The guest is not told of them either.
  auto cpuid = system().supported_cpuid();
  ASSERT_TRUE(cpuid.ok());
  for (const auto& e : *cpuid) {
    if (e.function == 0xa) {
      EXPECT_EQ(e.eax | e.ebx | e.ecx | e.edx, 0u) << "a PMU";
    }
    if (e.function == 0x80000001) {
      EXPECT_EQ(e.ecx & (1u << 23), 0u) << "a core's performance counters";
      EXPECT_EQ(e.ecx & (1u << 2), 0u) << "SVM";
    }
    if (e.function == 1) {
      EXPECT_EQ(e.ecx & (1u << 5 | 1u << 15), 0u) << "VMX, PMU capabilities";
    }
    if (e.function == 0x40000000) {
      EXPECT_EQ(e.ebx, 0x4b4d564bu) << "not KVM's signature";
    }
  }
}

TEST_P(ErrorNumbers, AreTheKernels) {
  std::vector<u64> bytes(8192);
  for (const Row& row : kRows) {
    if (!soft() && !row.kernel) continue;
    VmOptions options;
    options.irqchip = row.on == On::Irqchip;
    TestVm vm(system(), options);
    Endpoint& on = row.on == On::System ? system().endpoint() : row.on == On::Vcpu ? vm.vcpu().endpoint() : vm.vm().endpoint();
    std::fill(bytes.begin(), bytes.end(), 0);
    bytes[0] = row.value;
    const u64 arg = row.with == With::Integer  ? row.value
                    : row.with == With::Null   ? 0
                    : row.with == With::Kernel ? 0xffff'8000'0000'0000
                                               : reinterpret_cast<u64>(bytes.data());
    EXPECT_EQ(on.ioctl(row.request, arg), row.answer) << row.what;
  }
}

// Where one struct has two things wrong, or none that matters.
TEST_P(ErrorNumbers, WhatIsAskedFirst) {
  SOFT_ONLY("a paravirtual /dev/kvm has its own");
  VmOptions options;
  options.irqchip = true;
  TestVm m(system(), options);
  Endpoint& vm = m.vm().endpoint();
  kvm_dirty_log log{};
  log.padding2 = 0;
  EXPECT_EQ(vm.ioctl(KVM_GET_DIRTY_LOG, arg(log)), -ENOENT);  // no log: the pointer does not come into it
  std::vector<u64> bits(TestVm::kRam / kPageSize / 64, 0x5555);
  log.padding2 = reinterpret_cast<u64>(bits.data());
  EXPECT_EQ(vm.ioctl(KVM_GET_DIRTY_LOG, arg(log)), -ENOENT);
  EXPECT_EQ(bits[0], 0x5555u) << "written to";
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), TestVm::kRam, m.hva(), KVM_MEM_LOG_DIRTY_PAGES).ok());
  kvm_clear_dirty_log clear{};
  clear.num_pages = TestVm::kRam / kPageSize;
  EXPECT_EQ(vm.ioctl(KVM_CLEAR_DIRTY_LOG, arg(clear)), -EFAULT);
  clear.first_page = 1;
  EXPECT_EQ(vm.ioctl(KVM_CLEAR_DIRTY_LOG, arg(clear)), -EINVAL);
  clear.first_page = 0;
  clear.num_pages++;
  EXPECT_EQ(vm.ioctl(KVM_CLEAR_DIRTY_LOG, arg(clear)), -EINVAL);

  const UniqueFd event(eventfd_make());
  kvm_ioeventfd io{};
  io.fd = event.get();
  io.len = 3;
  io.addr = ~0ull;
  EXPECT_EQ(vm.ioctl(KVM_IOEVENTFD, arg(io)), -EINVAL);
  io.flags = KVM_IOEVENTFD_FLAG_DEASSIGN;
  EXPECT_EQ(vm.ioctl(KVM_IOEVENTFD, arg(io)), -ENOENT);
  io.fd = -1;
  EXPECT_EQ(vm.ioctl(KVM_IOEVENTFD, arg(io)), -EBADF);
  kvm_irqfd irqfd{};
  irqfd.fd = static_cast<u32>(event.get());
  irqfd.gsi = 100000;  // no route leads from there
  EXPECT_EQ(vm.ioctl(KVM_IRQFD, arg(irqfd)), 0);
  EXPECT_EQ(vm.ioctl(KVM_IRQFD, arg(irqfd)), -EBUSY);

  // A zone goes when the one that is named lies in it.
  kvm_coalesced_mmio_zone zone{};
  zone.addr = 0xa0000;
  EXPECT_EQ(vm.ioctl(KVM_REGISTER_COALESCED_MMIO, arg(zone)), 0);  // of no bytes
  zone.size = 0x1000;
  EXPECT_EQ(vm.ioctl(KVM_REGISTER_COALESCED_MMIO, arg(zone)), 0);
  zone.pio = 2;
  EXPECT_EQ(vm.ioctl(KVM_REGISTER_COALESCED_MMIO, arg(zone)), -EINVAL);
  EXPECT_EQ(vm.ioctl(KVM_UNREGISTER_COALESCED_MMIO, arg(zone)), -EINVAL);

  kvm_vapic_addr vapic{0x10000000};
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_VAPIC_ADDR, arg(vapic)), -EINVAL);
  vapic.vapic_addr = 0x22000;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_VAPIC_ADDR, arg(vapic)), 0);

  std::vector<u8> buffer(sizeof(kvm_cpuid2) + 8 * sizeof(kvm_cpuid_entry2));
  auto* const list = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  list->nent = 8;
  EXPECT_EQ(system().endpoint().ioctl(KVM_GET_EMULATED_CPUID, reinterpret_cast<u64>(list)), 0);
  list->nent = 8;
  reinterpret_cast<kvm_cpuid_entry2*>(list + 1)[7].padding[2] = 1;
  EXPECT_EQ(system().endpoint().ioctl(KVM_GET_EMULATED_CPUID, reinterpret_cast<u64>(list)), -EINVAL);

  // The newer call with the fields of the older.
  kvm_userspace_memory_region2 region{};
  region.slot = 1;
  region.guest_phys_addr = 0x100000;
  region.memory_size = kPageSize;
  region.userspace_addr = m.hva().value;
  EXPECT_EQ(system().endpoint().ioctl(KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY2), 1);
  EXPECT_EQ(vm.ioctl(KVM_SET_USER_MEMORY_REGION2, arg(region)), 0);
  region.slot = 2;
  EXPECT_EQ(vm.ioctl(KVM_SET_USER_MEMORY_REGION2, arg(region)), -EEXIST);

  // The boot vCPU is among the ids that there can be.
  auto empty = system().create_vm();
  ASSERT_TRUE(empty.ok());
  const auto max_vcpu_id = [&](u64 value) {
    kvm_enable_cap cap{};
    cap.cap = KVM_CAP_MAX_VCPU_ID;
    cap.args[0] = value;
    return empty->endpoint().ioctl(KVM_ENABLE_CAP, arg(cap));
  };
  EXPECT_EQ(empty->endpoint().ioctl(KVM_SET_BOOT_CPU_ID, 100000), -EINVAL);
  EXPECT_EQ(empty->endpoint().ioctl(KVM_SET_BOOT_CPU_ID, 4), 0);
  EXPECT_EQ(max_vcpu_id(3), -EINVAL);
  EXPECT_EQ(max_vcpu_id(4), 0);
  EXPECT_EQ(max_vcpu_id(5), -EINVAL);

  // Bit 63 of CR3 is an instruction's, no state's.
  auto sregs = m.vcpu().sregs();
  ASSERT_TRUE(sregs.ok());
  sregs->cr0 = 0x80000033;
  sregs->cr4 = 0x20;
  sregs->efer = 0x500;
  sregs->cr3 = 0x30000;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_SREGS, arg(*sregs)), 0);
  sregs->cr3 |= 1ull << 63;
  EXPECT_EQ(m.vcpu().endpoint().ioctl(KVM_SET_SREGS, arg(*sregs)), -EINVAL);
}

// Pages that begin readable and end nowhere: what is asked first decides, and nothing crashes.
TEST_P(ErrorNumbers, StructsThatRunOffThePage) {
  TestVm vm(system());
  u8* page = static_cast<u8*>(::mmap(nullptr, 2 * kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(page, MAP_FAILED);
  ASSERT_EQ(::mprotect(page + kPageSize, kPageSize, PROT_NONE), 0);
  const u64 at = reinterpret_cast<u64>(page + kPageSize - 4);
  for (const unsigned long request :
       {static_cast<unsigned long>(KVM_GET_REGS), static_cast<unsigned long>(KVM_SET_REGS), static_cast<unsigned long>(KVM_GET_SREGS),
        static_cast<unsigned long>(KVM_SET_SREGS), static_cast<unsigned long>(KVM_GET_FPU), static_cast<unsigned long>(KVM_SET_FPU),
        static_cast<unsigned long>(KVM_GET_XSAVE), static_cast<unsigned long>(KVM_SET_XSAVE), static_cast<unsigned long>(KVM_GET_XCRS),
        static_cast<unsigned long>(KVM_GET_DEBUGREGS), static_cast<unsigned long>(KVM_GET_VCPU_EVENTS),
        static_cast<unsigned long>(KVM_TRANSLATE)}) {
    EXPECT_EQ(vm.vcpu().endpoint().ioctl(request, at), -EFAULT) << request;
  }
  EXPECT_EQ(vm.vm().endpoint().ioctl(KVM_SET_USER_MEMORY_REGION, at), -EFAULT);
  EXPECT_EQ(vm.vm().endpoint().ioctl(KVM_GET_CLOCK, at), -EFAULT);
  ::munmap(page, 2 * kPageSize);
}

INSTANTIATE_TEST_SUITE_P(Providers, ErrorNumbers, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

}  // namespace
}  // namespace ring3::abitest
