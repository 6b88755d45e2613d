#include <thread>

#include "engine/abi/dirty_ring.hpp"
#include "engine/abi/newer_kvm.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"

namespace ring3::engine::abi {

int check_extension(u64 capability) {
  switch (capability) {
    case KVM_CAP_IRQCHIP:
    case KVM_CAP_HLT:
    case KVM_CAP_USER_MEMORY:
    case KVM_CAP_USER_MEMORY2:
    case KVM_CAP_SET_TSS_ADDR:
    case KVM_CAP_EXT_CPUID:
    case KVM_CAP_EXT_EMUL_CPUID:
    case KVM_CAP_CLOCKSOURCE:
    case KVM_CAP_PIT:
    case KVM_CAP_NOP_IO_DELAY:
    case KVM_CAP_MP_STATE:
    case KVM_CAP_SYNC_MMU:
    case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
    case KVM_CAP_USER_NMI:
    case KVM_CAP_REINJECT_CONTROL:
    case KVM_CAP_IRQ_INJECT_STATUS:
    case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
    case KVM_CAP_IRQFD:
    case KVM_CAP_IRQFD_RESAMPLE:
    case KVM_CAP_PIT2:
    case KVM_CAP_SET_BOOT_CPU_ID:
    case KVM_CAP_PIT_STATE2:
    case KVM_CAP_IOEVENTFD:
    case KVM_CAP_IOEVENTFD_NO_LENGTH:
    case KVM_CAP_IOEVENTFD_ANY_LENGTH:
    case KVM_CAP_SET_IDENTITY_MAP_ADDR:
    case KVM_CAP_INTERNAL_ERROR_DATA:
    case KVM_CAP_VCPU_EVENTS:
    case KVM_CAP_INTR_SHADOW:
    case KVM_CAP_DEBUGREGS:
    case KVM_CAP_X86_ROBUST_SINGLESTEP:
    case KVM_CAP_SET_GUEST_DEBUG:
    case KVM_CAP_ENABLE_CAP:
    case KVM_CAP_ENABLE_CAP_VM:
    case KVM_CAP_CHECK_EXTENSION_VM:
    case KVM_CAP_XSAVE:
    case KVM_CAP_XCRS:
    case KVM_CAP_TSC_CONTROL:
    case KVM_CAP_VM_TSC_CONTROL:
    case KVM_CAP_GET_TSC_KHZ:
    case KVM_CAP_TSC_DEADLINE_TIMER:
    case KVM_CAP_KVMCLOCK_CTRL:
    case KVM_CAP_SIGNAL_MSI:
    case KVM_CAP_READONLY_MEM:
    case KVM_CAP_IOAPIC_POLARITY_IGNORED:
    case KVM_CAP_IMMEDIATE_EXIT:
    case KVM_CAP_GET_MSR_FEATURES:
    case KVM_CAP_EXCEPTION_PAYLOAD:
    case KVM_CAP_X86_TRIPLE_FAULT_EVENT:
    case KVM_CAP_SREGS2:
    case KVM_CAP_SPLIT_IRQCHIP:
    case KVM_CAP_STEAL_TIME:
    case KVM_CAP_COALESCED_PIO:
    case KVM_CAP_X86_USER_SPACE_MSR:
    case KVM_CAP_X86_MSR_FILTER:
    case KVM_CAP_MSR_PLATFORM_INFO:
    case KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
    case KVM_CAP_HYPERV:
    case KVM_CAP_HYPERV_VAPIC:
    case KVM_CAP_HYPERV_SPIN:
    case KVM_CAP_HYPERV_TIME:
    case KVM_CAP_HYPERV_SYNIC:
    case KVM_CAP_HYPERV_SYNIC2:
    case KVM_CAP_HYPERV_VP_INDEX:
    case KVM_CAP_HYPERV_EVENTFD:
    case KVM_CAP_HYPERV_TLBFLUSH:
    case KVM_CAP_HYPERV_SEND_IPI:
    case KVM_CAP_HYPERV_CPUID:
    case KVM_CAP_SYS_HYPERV_CPUID:
    case KVM_CAP_HYPERV_ENFORCE_CPUID:
    case KVM_CAP_BINARY_STATS_FD:
    case KVM_CAP_DEVICE_CTRL:
    case KVM_CAP_VCPU_ATTRIBUTES:
    case KVM_CAP_SYS_ATTRIBUTES:
    case KVM_CAP_HALT_POLL:
    case KVM_CAP_MMU_SHADOW_CACHE_CONTROL:
    case KVM_CAP_SYSTEM_EVENT_DATA:
    case KVM_CAP_DISABLE_QUIRKS:
    case KVM_CAP_EXIT_ON_EMULATION_FAILURE:
    case KVM_CAP_ASYNC_PF:
    case KVM_CAP_ASYNC_PF_INT:
    case KVM_CAP_PMU_EVENT_FILTER:
      return 1;
    case KVM_CAP_EXIT_HYPERCALL:
      return static_cast<int>(kHypercallExits);
    case KVM_CAP_X86_DISABLE_EXITS:
      return static_cast<int>(kDisabledExits);
    case KVM_CAP_DISABLE_QUIRKS2:
      return static_cast<int>(kQuirks);
    case KVM_CAP_DIRTY_LOG_RING:
    case KVM_CAP_DIRTY_LOG_RING_ACQ_REL:
      return static_cast<int>(DirtyRing::kMaxEntries * sizeof(kvm_dirty_gfn));
    case KVM_CAP_COALESCED_MMIO:
      return KVM_COALESCED_MMIO_PAGE_OFFSET;
    case KVM_CAP_NR_VCPUS: {
      const unsigned n = std::thread::hardware_concurrency();
      return static_cast<int>(n == 0 ? 1 : n > kMaxVcpus ? kMaxVcpus : n);
    }
    case KVM_CAP_MAX_VCPUS:
    case KVM_CAP_MAX_VCPU_ID:
      return static_cast<int>(kMaxVcpus);
    case KVM_CAP_NR_MEMSLOTS:
      return static_cast<int>(memory::kMaxSlots);
    case KVM_CAP_IRQ_ROUTING:
      return static_cast<int>(RoutingTable::kMaxRoutes);
    case KVM_CAP_MCE:
      return 32;
    case KVM_CAP_ADJUST_CLOCK:
      return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    case KVM_CAP_SYNC_REGS:
      return KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    case KVM_CAP_X2APIC_API:
      return KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    case KVM_CAP_XEN_HVM:
      return static_cast<int>(xen::Domain::kOffered);
    case KVM_CAP_XSAVE2:
      return static_cast<int>(sizeof(kvm_xsave));
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
      return KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
    case KVM_CAP_SET_GUEST_DEBUG2:
      return KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP |
             KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP | KVM_GUESTDBG_BLOCKIRQ;
    default:
      return 0;
  }
}

}  // namespace ring3::engine::abi
