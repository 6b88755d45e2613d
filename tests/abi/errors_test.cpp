// Error numbers, call by call: what the kernel's documentation and sources say, on the engine and, where the host has one, on
// the kernel's own /dev/kvm.
#include <sys/mman.h>

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
    {"the dirty log from nowhere", On::Vm, KVM_GET_DIRTY_LOG, With::Null, 0, -EFAULT},
    {"the dirty log of no slot", On::Vm, KVM_GET_DIRTY_LOG, With::Struct, 77, -ENOENT},
    {"the dirty log of a slot out of range", On::Vm, KVM_GET_DIRTY_LOG, With::Struct, 0xffff, -EINVAL},
    {"the TSS too high", On::Vm, KVM_SET_TSS_ADDR, With::Integer, 0xfffffff0, -EINVAL, false},
    {"no exits to disable", On::Vm, KVM_ENABLE_CAP, With::Struct, KVM_CAP_X86_DISABLE_EXITS, 0, false},
    {"how many MMU pages", On::Vm, KVM_GET_NR_MMU_PAGES, With::Integer, 0, 0, false},
    {"Xen's configuration from nowhere", On::Vm, KVM_XEN_HVM_CONFIG, With::Null, 0, -EFAULT, false},
    {"too few MMU pages", On::Vm, KVM_SET_NR_MMU_PAGES, With::Integer, 1, -EINVAL},
    {"a PIT without irqchip", On::Vm, KVM_CREATE_PIT2, With::Struct, 0, -ENOENT},
    {"a PIT from nowhere", On::Vm, KVM_CREATE_PIT2, With::Null, 0, -EFAULT},
    {"an irqchip's state without irqchip", On::Vm, KVM_GET_IRQCHIP, With::Struct, 0, -ENXIO},
    {"PIT state without PIT", On::Vm, KVM_GET_PIT2, With::Struct, 0, -ENXIO},
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
    {"a PMU's event filter", KVM_CAP_PMU_EVENT_FILTER, On::Vm, KVM_SET_PMU_EVENT_FILTER},
    {"a PMU's event filter, from nowhere", KVM_CAP_PMU_EVENT_FILTER, On::Vm, KVM_SET_PMU_EVENT_FILTER, With::Null},
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
  struct {
    kvm_msrs head;
    kvm_msr_entry entry;
  } msrs{};
  msrs.head.nmsrs = 1;
  msrs.entry.index = 0x4b564d02;  // MSR_KVM_ASYNC_PF_EN
  msrs.entry.data = 1;
  EXPECT_EQ(vm.vcpu().endpoint().ioctl(KVM_SET_MSRS, arg(msrs)), 0);
  EXPECT_EQ(vm.vcpu().endpoint().ioctl(KVM_GET_MSRS, arg(msrs)), 0);
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
