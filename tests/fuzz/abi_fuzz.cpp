// Random ioctls with random and hostile arguments, on several threads, against the engine: bad pointers, lengths and
// descriptors, wrong states, objects that are closed while another thread uses them, guest memory that is not there.
//
//   ring3_abi_fuzz [--calls N] [--seconds N] [--seed S] [--threads N] [--engine interpreter|translator]
//
// Every answer must be a result or an errno that the kernel's documentation knows; nothing may crash, hang or leak (the
// sanitizers, and a count of descriptors at the end, say so). Meant for the asan preset. The order in which
// threads meet differs from run to run; each thread's own sequence follows from --seed.
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/linux_kvm.hpp"
#include "base/split_mix.hpp"
#include "engine/abi/newer_kvm.hpp"
#include "engine/abi/provider.hpp"

namespace ring3::fuzz {
namespace {

using kvm::Endpoint;

using Random = SplitMix64;

enum class On : u8 { System, Vm, Vcpu };
/// What the argument is.
enum class Arg : u8 {
  Integer,
  In,     // a struct that is read; random, or what the getter gives with a few bytes changed
  Out,    // a struct that is written
  InOut,
};

struct Call {
  On on;
  unsigned long request;
  Arg arg;
  unsigned long getter = 0;  // gives what an In struct starts from
};

const Call kCalls[] = {
    {On::System, KVM_GET_API_VERSION, Arg::Integer},
    {On::System, KVM_CHECK_EXTENSION, Arg::Integer},
    {On::System, KVM_GET_VCPU_MMAP_SIZE, Arg::Integer},
    {On::System, KVM_GET_SUPPORTED_CPUID, Arg::InOut},
    {On::System, KVM_GET_EMULATED_CPUID, Arg::InOut},
    {On::System, KVM_GET_MSR_INDEX_LIST, Arg::InOut},
    {On::System, KVM_GET_MSR_FEATURE_INDEX_LIST, Arg::InOut},
    {On::System, KVM_GET_MSRS, Arg::InOut},
    {On::System, KVM_HAS_DEVICE_ATTR, Arg::In},
    {On::System, KVM_GET_DEVICE_ATTR, Arg::In},
    {On::System, KVM_X86_GET_MCE_CAP_SUPPORTED, Arg::Out},
    {On::System, KVM_GET_SUPPORTED_HV_CPUID, Arg::InOut},

    {On::Vm, KVM_CHECK_EXTENSION, Arg::Integer},
    {On::Vm, KVM_SET_USER_MEMORY_REGION, Arg::In},
    {On::Vm, KVM_SET_USER_MEMORY_REGION2, Arg::In},
    {On::Vm, KVM_GET_DIRTY_LOG, Arg::In},
    {On::Vm, KVM_CLEAR_DIRTY_LOG, Arg::In},
    {On::Vm, KVM_SET_TSS_ADDR, Arg::Integer},
    {On::Vm, KVM_SET_IDENTITY_MAP_ADDR, Arg::In},
    {On::Vm, KVM_SET_NR_MMU_PAGES, Arg::Integer},
    {On::Vm, KVM_X86_SET_MSR_FILTER, Arg::In},
    {On::Vm, KVM_GET_STATS_FD, Arg::Integer},
    {On::Vm, KVM_CREATE_DEVICE, Arg::InOut},
    {On::Vm, KVM_ENABLE_CAP, Arg::In},
    {On::Vm, KVM_CREATE_IRQCHIP, Arg::Integer},
    {On::Vm, KVM_CREATE_PIT, Arg::Integer},
    {On::Vm, KVM_CREATE_PIT2, Arg::In},
    {On::Vm, KVM_GET_IRQCHIP, Arg::InOut},
    {On::Vm, KVM_SET_IRQCHIP, Arg::In, KVM_GET_IRQCHIP},
    {On::Vm, KVM_GET_PIT, Arg::Out},
    {On::Vm, KVM_SET_PIT, Arg::In, KVM_GET_PIT},
    {On::Vm, KVM_GET_PIT2, Arg::Out},
    {On::Vm, KVM_SET_PIT2, Arg::In, KVM_GET_PIT2},
    {On::Vm, KVM_REINJECT_CONTROL, Arg::In},
    {On::Vm, KVM_IRQ_LINE, Arg::In},
    {On::Vm, KVM_IRQ_LINE_STATUS, Arg::InOut},
    {On::Vm, KVM_SIGNAL_MSI, Arg::In},
    {On::Vm, KVM_SET_GSI_ROUTING, Arg::In},
    {On::Vm, KVM_IRQFD, Arg::In},
    {On::Vm, KVM_IOEVENTFD, Arg::In},
    {On::Vm, KVM_REGISTER_COALESCED_MMIO, Arg::In},
    {On::Vm, KVM_UNREGISTER_COALESCED_MMIO, Arg::In},
    {On::Vm, KVM_GET_CLOCK, Arg::Out},
    {On::Vm, KVM_SET_CLOCK, Arg::In, KVM_GET_CLOCK},
    {On::Vm, KVM_SET_BOOT_CPU_ID, Arg::Integer},
    {On::Vm, KVM_SET_TSC_KHZ, Arg::Integer},
    {On::Vm, KVM_GET_TSC_KHZ, Arg::Integer},
    {On::Vm, KVM_RESET_DIRTY_RINGS, Arg::Integer},
    {On::Vm, KVM_SET_PMU_EVENT_FILTER, Arg::In},
    {On::Vm, KVM_HYPERV_EVENTFD, Arg::In},
    {On::Vm, KVM_XEN_HVM_CONFIG, Arg::In},
    {On::Vm, KVM_XEN_HVM_SET_ATTR, Arg::In},
    {On::Vm, KVM_XEN_HVM_SET_ATTR, Arg::In},
    {On::Vm, KVM_XEN_HVM_GET_ATTR, Arg::InOut},
    {On::Vm, KVM_XEN_HVM_EVTCHN_SEND, Arg::In},
    {On::Vm, KVM_GET_NR_MMU_PAGES, Arg::Integer},

    {On::Vcpu, KVM_RUN, Arg::Integer},
    {On::Vcpu, KVM_RUN, Arg::Integer},
    {On::Vcpu, KVM_RUN, Arg::Integer},
    {On::Vcpu, KVM_GET_REGS, Arg::Out},
    {On::Vcpu, KVM_SET_REGS, Arg::In, KVM_GET_REGS},
    {On::Vcpu, KVM_GET_SREGS, Arg::Out},
    {On::Vcpu, KVM_SET_SREGS, Arg::In, KVM_GET_SREGS},
    {On::Vcpu, KVM_GET_SREGS2, Arg::Out},
    {On::Vcpu, KVM_SET_SREGS2, Arg::In, KVM_GET_SREGS2},
    {On::Vcpu, KVM_GET_FPU, Arg::Out},
    {On::Vcpu, KVM_SET_FPU, Arg::In, KVM_GET_FPU},
    {On::Vcpu, KVM_GET_XSAVE, Arg::Out},
    {On::Vcpu, KVM_SET_XSAVE, Arg::In, KVM_GET_XSAVE},
    {On::Vcpu, KVM_GET_XSAVE2, Arg::Out},
    {On::Vcpu, KVM_GET_XCRS, Arg::Out},
    {On::Vcpu, KVM_SET_XCRS, Arg::In, KVM_GET_XCRS},
    {On::Vcpu, KVM_GET_DEBUGREGS, Arg::Out},
    {On::Vcpu, KVM_SET_DEBUGREGS, Arg::In, KVM_GET_DEBUGREGS},
    {On::Vcpu, KVM_GET_VCPU_EVENTS, Arg::Out},
    {On::Vcpu, KVM_SET_VCPU_EVENTS, Arg::In, KVM_GET_VCPU_EVENTS},
    {On::Vcpu, KVM_GET_MP_STATE, Arg::Out},
    {On::Vcpu, KVM_SET_MP_STATE, Arg::In, KVM_GET_MP_STATE},
    {On::Vcpu, KVM_GET_LAPIC, Arg::Out},
    {On::Vcpu, KVM_SET_LAPIC, Arg::In, KVM_GET_LAPIC},
    {On::Vcpu, KVM_GET_MSRS, Arg::InOut},
    {On::Vcpu, KVM_SET_MSRS, Arg::In},
    {On::Vcpu, KVM_SET_CPUID, Arg::In},
    {On::Vcpu, KVM_SET_CPUID2, Arg::In, KVM_GET_CPUID2},
    {On::Vcpu, KVM_GET_CPUID2, Arg::InOut},
    {On::Vcpu, KVM_INTERRUPT, Arg::In},
    {On::Vcpu, KVM_NMI, Arg::Integer},
    {On::Vcpu, KVM_SMI, Arg::Integer},
    {On::Vcpu, KVM_TRANSLATE, Arg::InOut},
    {On::Vcpu, KVM_SET_GUEST_DEBUG, Arg::In},
    {On::Vcpu, KVM_SET_SIGNAL_MASK, Arg::In},
    {On::Vcpu, KVM_X86_SETUP_MCE, Arg::In},
    {On::Vcpu, KVM_X86_SET_MCE, Arg::In},
    {On::Vcpu, KVM_TPR_ACCESS_REPORTING, Arg::InOut},
    {On::Vcpu, KVM_SET_VAPIC_ADDR, Arg::In},
    {On::Vcpu, KVM_SET_TSC_KHZ, Arg::Integer},
    {On::Vcpu, KVM_GET_TSC_KHZ, Arg::Integer},
    {On::Vcpu, KVM_KVMCLOCK_CTRL, Arg::Integer},
    {On::Vcpu, KVM_ENABLE_CAP, Arg::In},
    {On::Vcpu, KVM_HAS_DEVICE_ATTR, Arg::In},
    {On::Vcpu, KVM_GET_DEVICE_ATTR, Arg::In},
    {On::Vcpu, KVM_SET_DEVICE_ATTR, Arg::In},
    {On::Vcpu, KVM_GET_STATS_FD, Arg::Integer},
    {On::Vcpu, KVM_XEN_VCPU_SET_ATTR, Arg::In},
    {On::Vcpu, KVM_XEN_VCPU_SET_ATTR, Arg::In},
    {On::Vcpu, KVM_XEN_VCPU_GET_ATTR, Arg::InOut},
    {On::Vcpu, KVM_GET_NESTED_STATE, Arg::InOut},
    {On::Vcpu, KVM_SET_NESTED_STATE, Arg::In},
    {On::Vcpu, KVM_GET_SUPPORTED_HV_CPUID, Arg::InOut},
};

constexpr u32 kCaps[] = {KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
                         KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_MSR_PLATFORM_INFO,
                         KVM_CAP_MAX_VCPU_ID, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_DISABLE_QUIRKS, KVM_CAP_DISABLE_QUIRKS2,
                         KVM_CAP_DIRTY_LOG_RING, KVM_CAP_HYPERV_SYNIC, KVM_CAP_HYPERV_SYNIC2, KVM_CAP_HYPERV_ENFORCE_CPUID, KVM_CAP_X86_BUS_LOCK_EXIT, KVM_CAP_PMU_CAPABILITY,
                         KVM_CAP_X86_DISABLE_EXITS, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_EXIT_ON_EMULATION_FAILURE};

constexpr u32 kMsrs[] = {0x10,       0x1b,       0x3a,       0x3b,       0x8b,       0x174,      0x175,      0x176,      0x179,
                         0x17a,      0x17b,      0x1a0,      0x200,      0x2ff,      0x277,      0x400,      0x401,      0x6e0,
                         0x808,      0x830,      0xc0000080, 0xc0000081, 0xc0000082, 0xc0000084, 0xc0000100, 0xc0000101,
                         0xc0000102, 0xc0000103, 0x11,       0x12,       0x4b564d00, 0x4b564d01, 0x4b564d02, 0x4b564d03,
                         0x4b564d04, 0x4b564d05, 0x4b564d06, 0x4b564d07, 0x40000000, 0x40000001, 0x40000002, 0x40000003, 0x40000010, 0x40000020, 0x40000021,
                         0x40000070, 0x40000071, 0x40000072, 0x40000073, 0x40000080, 0x40000082, 0x40000083, 0x40000084,
                         0x40000090, 0x40000092, 0x400000b0, 0x400000b1, 0x400000b2, 0x400000b3, 0x400000f1, 0x40000105, 0x40000107,
                         0xda0,      0xc0010015};

bool known_error(long r) {
  switch (-r) {
    case EFAULT: case EINVAL: case EBADF: case ENXIO: case E2BIG: case EEXIST: case ENOENT: case ENOTTY: case EBUSY:
    case EAGAIN: case EINTR: case ENOMEM: case ENODEV: case ENOSPC: case EPERM: case EOPNOTSUPP:
      return true;
    default:
      return false;
  }
}

/// Guest memory of all kinds. Lives as long as the process: memslots of any VM may refer to it.
struct Memory {
  static constexpr u64 kRam = 1u << 20;
  u8* ram;        // kRam bytes
  u8* half;       // a file whose second half is cut off: SIGBUS there
  u8* hole;       // no access
  u8* readonly;
  Memory() {
    ram = map(PROT_READ | PROT_WRITE);
    hole = map(PROT_NONE);
    readonly = map(PROT_READ);
    const int fd = ::memfd_create("half", MFD_CLOEXEC);
    if (fd < 0 || ::ftruncate(fd, kRam / 2) != 0) std::abort();
    half = static_cast<u8*>(::mmap(nullptr, kRam, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    ::close(fd);
    if (half == MAP_FAILED) std::abort();
  }
  static u8* map(int protection) {
    void* p = ::mmap(nullptr, kRam, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) std::abort();
    return static_cast<u8*>(p);
  }
};

struct Shared {
  std::unique_ptr<Endpoint> system;
  Memory memory;
  std::atomic<u64> calls{0};
  std::atomic<u64> hypercall{0};  // where VMCALL and VMMCALL stood last
  u64 limit = 0;
  std::chrono::steady_clock::time_point deadline;
  std::atomic<bool> stop{false};

  struct Machine {
    std::shared_ptr<Endpoint> vm;
    std::array<std::shared_ptr<Endpoint>, 3> vcpus;
    u64 age = 0;
  };
  static constexpr unsigned kMachines = 3;
  std::mutex mutex;  // guards the pointers, not the objects
  std::array<Machine, kMachines> machines;
  std::atomic<u64> errors[256] = {};
  std::atomic<u64> good{0};
};

class Worker {
 public:
  Worker(Shared& shared, u64 seed) : s_(shared), rng_(seed) {
    // Arguments stand in front of a page without access, so that a struct may run into it.
    arena_ = static_cast<u8*>(::mmap(nullptr, kArena + kPageSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (arena_ == MAP_FAILED || ::mprotect(arena_ + kArena, kPageSize, PROT_NONE) != 0) std::abort();
    for (int& fd : eventfds_) fd = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    null_ = ::open("/dev/null", O_RDWR | O_CLOEXEC);
  }
  ~Worker() {
    ::munmap(arena_, kArena + kPageSize);
    for (const int fd : eventfds_) ::close(fd);
    ::close(null_);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void run() {
    while (!s_.stop.load(std::memory_order_relaxed)) {
      const u64 n = s_.calls.fetch_add(1, std::memory_order_relaxed);
      if (n != 0 && n % 1'000'000 == 0) std::fprintf(stderr, "abi_fuzz: %llu calls\n", static_cast<unsigned long long>(n));
      if (n >= s_.limit || ((n & 255) == 0 && std::chrono::steady_clock::now() >= s_.deadline)) break;
      one();
    }
  }

 private:
  static constexpr u64 kArena = 16 * kPageSize;

  /// An address of the VMM's that the engine may read and write, or may not.
  u64 pointer(u64 size) {
    switch (rng_.below(24)) {
      case 0: return 0;
      case 1: return rng_.below(4096);
      case 2: return 0xffff'8000'0000'0000 | rng_.next();
      case 3: return 0x7fff'ffff'f000;
      case 4: return reinterpret_cast<u64>(s_.memory.hole);
      case 5: return reinterpret_cast<u64>(s_.memory.readonly) + rng_.below(64);
      case 6: return reinterpret_cast<u64>(s_.memory.half) + Memory::kRam / 2 - rng_.below(64);
      case 7: return reinterpret_cast<u64>(arena_) + kArena - rng_.below(std::min(size + 1, kArena));  // runs off
      case 8: return 0x0008'0000'0000'0000 + rng_.next() % 4096;                                         // not canonical
      default: return reinterpret_cast<u64>(arena_) + kArena - std::min(size, kArena);
    }
  }

  u64 integer() {
    switch (rng_.below(8)) {
      case 0: return 0;
      case 1: return rng_.below(8);
      case 2: return rng_.below(256);
      case 3: return ~0ull;
      case 4: return rng_.next();
      case 5: return rng_.next() & 0xffffffff;
      case 6: return 1ull << rng_.below(64);
      default: return rng_.below(1u << 16);
    }
  }

  int descriptor() {
    switch (rng_.below(8)) {
      case 0: return -1;
      case 1: return null_;
      case 2: return static_cast<int>(rng_.next());
      case 3: return 1000 + static_cast<int>(rng_.below(1000));
      default: return eventfds_[rng_.below(eventfds_.size())];
    }
  }

  /// Mostly in what is memory.
  u64 guest_address() { return rng_.one_in(8) ? integer() : rng_.below(Memory::kRam + kPageSize) & (rng_.one_in(4) ? ~0ull : ~63ull); }
  kvm_irq_routing_xen_evtchn event() {
    kvm_irq_routing_xen_evtchn e;
    e.port = static_cast<u32>(rng_.one_in(8) ? integer() : rng_.below(40));
    e.vcpu = static_cast<u32>(rng_.below(5));
    e.priority = rng_.one_in(16) ? static_cast<u32>(rng_.next()) : KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL;
    return e;
  }

  template <class T>
  T* as() { return reinterpret_cast<T*>(arg_); }

  void noise(u64 size) {
    switch (rng_.below(3)) {
      case 0: std::memset(arg_, 0, size); break;
      case 1:
        for (u64 i = 0; i < size; i += 8) {
          const u64 v = rng_.next();
          std::memcpy(arg_ + i, &v, std::min<u64>(8, size - i));
        }
        break;
      default:
        std::memset(arg_, 0, size);
        for (u64 n = rng_.below(8); n > 0; n--) arg_[rng_.below(size)] = static_cast<u8>(rng_.next());
        break;
    }
  }

  void flip(u64 size) {
    for (u64 n = rng_.below(4); n > 0; n--) {
      if (rng_.one_in(2)) {
        arg_[rng_.below(size)] ^= static_cast<u8>(1u << rng_.below(8));
      } else {
        const u64 v = integer();
        const u64 at = rng_.below(size);
        std::memcpy(arg_ + at, &v, std::min<u64>(8, size - at));
      }
    }
  }

  /// The struct's parts that must not be random: host addresses and what makes a call meaningful now and then.
  void shape(const Call& call, u64 size) {
    switch (call.request) {
      case KVM_SET_USER_MEMORY_REGION:
      case KVM_SET_USER_MEMORY_REGION2: {  // which begins with the fields of the other
        auto* r = as<kvm_userspace_memory_region>();
        u8* const bases[] = {s_.memory.ram, s_.memory.ram, s_.memory.ram, s_.memory.half, s_.memory.hole, s_.memory.readonly};
        r->userspace_addr = reinterpret_cast<u64>(bases[rng_.below(6)]) + kPageSize * rng_.below(16);
        if (rng_.one_in(16)) r->userspace_addr += rng_.below(4096);
        if (rng_.one_in(16)) r->userspace_addr = 0xffff'8000'0000'0000;
        if (!rng_.one_in(8)) {
          r->slot = static_cast<u32>(rng_.below(6));
          r->flags = static_cast<u32>(rng_.below(4));
          r->guest_phys_addr = kPageSize * rng_.below(512);
          r->memory_size = rng_.one_in(3) ? 0 : kPageSize * rng_.below(128);
        } else if (r->userspace_addr < (1ull << 47)) {
          r->memory_size %= Memory::kRam / 2;
        }
        break;
      }
      case KVM_GET_DIRTY_LOG: {
        auto* r = as<kvm_dirty_log>();
        r->slot = static_cast<u32>(rng_.one_in(8) ? rng_.next() : rng_.below(6));
        r->padding2 = pointer(64);
        break;
      }
      case KVM_CLEAR_DIRTY_LOG: {
        auto* r = as<kvm_clear_dirty_log>();
        r->slot = static_cast<u32>(rng_.one_in(8) ? rng_.next() : rng_.below(6));
        if (!rng_.one_in(4)) {
          r->first_page = 64 * rng_.below(3);
          r->num_pages = static_cast<u32>(rng_.below(256));
        }
        r->padding2 = pointer(64);
        break;
      }
      case KVM_X86_SET_MSR_FILTER: {
        auto* f = as<kvm_msr_filter>();
        for (auto& range : f->ranges) {
          if (rng_.one_in(2)) range.nmsrs = static_cast<u32>(rng_.below(512));
          if (rng_.one_in(2)) range.flags = static_cast<u32>(rng_.below(4));
          range.bitmap = reinterpret_cast<u8*>(pointer(512));
        }
        break;
      }
      case KVM_HAS_DEVICE_ATTR:
      case KVM_GET_DEVICE_ATTR:
      case KVM_SET_DEVICE_ATTR:
        if (!rng_.one_in(4)) as<kvm_device_attr>()->group = as<kvm_device_attr>()->attr = 0;
        as<kvm_device_attr>()->addr = pointer(8);
        break;
      case KVM_ENABLE_CAP: {
        auto* c = as<kvm_enable_cap>();
        c->cap = rng_.one_in(8) ? static_cast<u32>(rng_.next()) : kCaps[rng_.below(std::size(kCaps))];
        if (!rng_.one_in(8)) c->flags = 0;
        if (rng_.one_in(2)) c->args[0] = integer();
        break;
      }
      case KVM_IRQFD: {
        auto* r = as<kvm_irqfd>();
        r->fd = static_cast<u32>(descriptor());
        r->resamplefd = static_cast<u32>(descriptor());
        if (!rng_.one_in(8)) {
          r->gsi = static_cast<u32>(rng_.below(26));
          r->flags = static_cast<u32>(rng_.below(4));
        }
        break;
      }
      case KVM_IOEVENTFD: {
        auto* r = as<kvm_ioeventfd>();
        r->fd = descriptor();
        if (!rng_.one_in(8)) {
          r->addr = rng_.below(4) * 0x10;
          r->len = static_cast<u32>(rng_.one_in(2) ? 0 : 1u << rng_.below(4));
          r->flags = static_cast<u32>(rng_.below(8));
        }
        break;
      }
      case KVM_IRQ_LINE:
      case KVM_IRQ_LINE_STATUS:
        if (!rng_.one_in(4)) as<kvm_irq_level>()->irq = static_cast<u32>(rng_.below(26));
        break;
      case KVM_SIGNAL_MSI:
        if (!rng_.one_in(4)) {
          auto* m = as<kvm_msi>();
          m->flags = 0;
          m->address_hi = 0;
          m->address_lo = 0xfee00000 | static_cast<u32>(rng_.below(16)) << 12;
          m->data = static_cast<u32>(rng_.next());
        }
        break;
      case KVM_SET_GSI_ROUTING: {
        auto* r = as<kvm_irq_routing>();
        r->nr = static_cast<u32>(rng_.one_in(8) ? rng_.next() : rng_.below(24));
        if (!rng_.one_in(8)) r->flags = 0;
        for (u32 i = 0; i < 24; i++) {
          r->entries[i].gsi = static_cast<u32>(rng_.below(30));
          r->entries[i].type = static_cast<u32>(rng_.below(6));
          if (!rng_.one_in(8)) r->entries[i].flags = 0;
          r->entries[i].u.irqchip.irqchip = static_cast<u32>(rng_.below(4));
          r->entries[i].u.irqchip.pin = static_cast<u32>(rng_.below(26));
          if (r->entries[i].type == KVM_IRQ_ROUTING_XEN_EVTCHN) r->entries[i].u.xen_evtchn = event();
        }
        break;
      }
      case KVM_REGISTER_COALESCED_MMIO:
      case KVM_UNREGISTER_COALESCED_MMIO:
        if (!rng_.one_in(4)) {
          auto* z = as<kvm_coalesced_mmio_zone>();
          z->addr = 0x10 * rng_.below(16);
          z->size = static_cast<u32>(rng_.below(64));
          z->pio = static_cast<u32>(rng_.below(2));
        }
        break;
      case KVM_GET_IRQCHIP:
      case KVM_SET_IRQCHIP:
        as<kvm_irqchip>()->chip_id = static_cast<u32>(rng_.below(4));
        break;
      case KVM_GET_SUPPORTED_CPUID:
      case KVM_GET_EMULATED_CPUID:
      case KVM_GET_CPUID2:
      case KVM_SET_CPUID:
      case KVM_SET_CPUID2:
      case KVM_GET_SUPPORTED_HV_CPUID:
      case KVM_GET_MSR_INDEX_LIST:
      case KVM_GET_MSR_FEATURE_INDEX_LIST: {
        const u32 n = static_cast<u32>(rng_.one_in(4) ? integer() : rng_.below(300));
        if (call.getter == 0 || rng_.one_in(4)) std::memcpy(arg_, &n, 4);
        break;
      }
      case KVM_GET_MSRS:
      case KVM_SET_MSRS: {
        auto* m = as<kvm_msrs>();
        m->nmsrs = static_cast<u32>(rng_.one_in(8) ? integer() : rng_.below(12));
        for (u32 i = 0; i < 12; i++) {
          m->entries[i].index = rng_.one_in(4) ? static_cast<u32>(rng_.next()) : kMsrs[rng_.below(std::size(kMsrs))];
          m->entries[i].data = integer();
        }
        break;
      }
      case KVM_SET_SIGNAL_MASK: {
        as<kvm_signal_mask>()->len = rng_.one_in(4) ? static_cast<u32>(rng_.next()) : 8;
        const u64 mask = 0;
        std::memcpy(arg_ + sizeof(kvm_signal_mask), &mask, sizeof mask);  // nothing stays blocked for good
        break;
      }
      case KVM_SET_REGS: {
        auto* r = as<kvm_regs>();
        if (!rng_.one_in(4)) r->rip = rng_.below(Memory::kRam);
        if (rng_.one_in(8)) {  // a hypercall of Xen's
          constexpr u64 kNumbers[] = {15, 17, 24, 29, 32};
          r->rip = s_.hypercall.load(std::memory_order_relaxed);
          r->rax = kNumbers[rng_.below(std::size(kNumbers))];
          r->rdi = r->rbx = rng_.below(12);
          r->rsi = r->rcx = rng_.one_in(2) ? rng_.below(4) : guest_address();
          r->rdx = guest_address();
        }
        break;
      }
      case KVM_SET_PMU_EVENT_FILTER:
        if (!rng_.one_in(4)) {
          auto* f = as<kvm_pmu_event_filter>();
          f->action = static_cast<u32>(rng_.below(3));
          f->nevents = static_cast<u32>(rng_.below(310));
          f->flags = rng_.one_in(8);
        }
        break;
      case KVM_XEN_HVM_CONFIG: {
        auto* c = as<kvm_xen_hvm_config>();
        if (rng_.one_in(8)) break;
        *c = kvm_xen_hvm_config{};
        c->flags = static_cast<u32>(rng_.below(4)) * KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL & ~4u;
        if (rng_.one_in(2)) c->flags |= KVM_XEN_HVM_CONFIG_EVTCHN_SEND;
        c->msr = rng_.one_in(4) ? 0 : 0x40000000;
        if (rng_.one_in(4)) {
          c->blob_size_32 = c->blob_size_64 = static_cast<u8>(rng_.below(3));
          c->blob_addr_32 = pointer(kPageSize);
          c->blob_addr_64 = pointer(kPageSize);
        }
        break;
      }
      case KVM_XEN_HVM_SET_ATTR:
      case KVM_XEN_HVM_GET_ATTR: {
        auto* a = as<kvm_xen_hvm_attr>();
        a->type = static_cast<u16>(rng_.one_in(16) ? rng_.next() : rng_.below(5));
        if (rng_.one_in(8)) break;
        switch (a->type) {
          case KVM_XEN_ATTR_TYPE_LONG_MODE: a->u.long_mode = !rng_.one_in(4); break;
          case KVM_XEN_ATTR_TYPE_SHARED_INFO: a->u.shared_info.gfn = rng_.one_in(8) ? ~0ull : guest_address() >> 12; break;
          case KVM_XEN_ATTR_TYPE_UPCALL_VECTOR: a->u.vector = static_cast<u8>(rng_.next()); break;
          case KVM_XEN_ATTR_TYPE_EVTCHN: {
            auto& e = a->u.evtchn;
            e.send_port = event().port;
            e.type = rng_.one_in(8) ? static_cast<u32>(rng_.below(7)) : 2 + 3 * static_cast<u32>(rng_.below(2));
            e.flags = rng_.one_in(8) ? 1u << rng_.below(4) : 0;
            const kvm_irq_routing_xen_evtchn to = event();
            e.deliver.port.port = rng_.one_in(4) ? e.send_port : to.port;
            e.deliver.port.vcpu = to.vcpu;
            e.deliver.port.priority = to.priority;
            if (rng_.one_in(2)) {
              e.deliver.eventfd.port = 0;
              e.deliver.eventfd.fd = descriptor();
            }
            break;
          }
          default: break;
        }
        break;
      }
      case KVM_XEN_HVM_EVTCHN_SEND: *as<kvm_irq_routing_xen_evtchn>() = event(); break;
      case KVM_XEN_VCPU_SET_ATTR:
      case KVM_XEN_VCPU_GET_ATTR: {
        auto* a = as<kvm_xen_vcpu_attr>();
        a->type = static_cast<u16>(rng_.one_in(16) ? rng_.next() : rng_.below(9));
        if (rng_.one_in(8)) break;
        switch (a->type) {
          case KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO:
          case KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO:
          case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR: a->u.gpa = rng_.one_in(8) ? ~0ull : guest_address(); break;
          case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT:
          case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA:
          case KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST: {
            auto& r = a->u.runstate;
            r.state = rng_.below(6) - 1;
            r.time_running = rng_.below(1000);
            r.time_blocked = rng_.one_in(4) ? integer() : rng_.below(1000);
            r.time_runnable = r.time_offline = 0;
            r.state_entry_time = r.time_running + r.time_blocked;
            break;
          }
          case KVM_XEN_VCPU_ATTR_TYPE_TIMER:
            a->u.timer.port = event().port;
            a->u.timer.priority = event().priority;
            a->u.timer.expires_ns = rng_.one_in(2) ? integer() : rng_.below(20'000'000'000);
            break;
          default: break;
        }
        break;
      }
      default:
        static_cast<void>(size);
        break;
    }
  }

  void new_machine(unsigned n) {
    auto vm = s_.system->create(KVM_CREATE_VM, rng_.one_in(16) ? integer() : 0);
    if (!vm) {
      check(-vm.error().code, "KVM_CREATE_VM");
      return;
    }
    Shared::Machine m;
    m.vm = std::shared_ptr<Endpoint>(std::move(*vm));
    kvm_userspace_memory_region region{};
    region.memory_size = Memory::kRam / 2;
    region.userspace_addr = reinterpret_cast<u64>(s_.memory.ram);
    if (!rng_.one_in(4)) m.vm->ioctl(KVM_SET_USER_MEMORY_REGION, reinterpret_cast<u64>(&region));
    if (rng_.one_in(2)) m.vm->ioctl(KVM_CREATE_IRQCHIP, 0);
    const std::lock_guard lock(s_.mutex);
    std::swap(s_.machines[n], m);  // what was there ends when the last thread that uses it lets go
  }

  void one() {
    const unsigned n = static_cast<unsigned>(rng_.below(Shared::kMachines));
    std::shared_ptr<Endpoint> vm, vcpu;
    {
      const std::lock_guard lock(s_.mutex);
      vm = s_.machines[n].vm;
      vcpu = s_.machines[n].vcpus[rng_.below(3)];
    }
    if (vm == nullptr || rng_.one_in(20000)) {
      new_machine(n);
      return;
    }
    if (vcpu == nullptr || rng_.one_in(3000)) {
      const u64 id = rng_.one_in(4) ? integer() : rng_.below(4);
      auto made = vm->create(rng_.one_in(32) ? rng_.next() : KVM_CREATE_VCPU, id);
      if (!made) {
        check(-made.error().code, "KVM_CREATE_VCPU");
        return;
      }
      const std::lock_guard lock(s_.mutex);
      if (s_.machines[n].vm == vm) s_.machines[n].vcpus[rng_.below(3)] = std::shared_ptr<Endpoint>(std::move(*made));
      return;
    }
    if (rng_.one_in(4096)) {  // closed, whoever uses it
      const std::lock_guard lock(s_.mutex);
      s_.machines[n].vcpus[rng_.below(3)].reset();
      return;
    }
    if (rng_.one_in(64)) {
      for (const int fd : eventfds_) {
        const u64 one = 1;
        if (rng_.one_in(4) && ::write(fd, &one, sizeof one) < 0 && errno != EAGAIN) std::abort();
      }
    }
    if (rng_.one_in(256)) {  // other code for the guests
      u64 at = rng_.below(Memory::kRam - 64);
      for (int i = 0; i < 8; i++, at += 8) {
        const u64 v = rng_.next();
        std::memcpy(s_.memory.ram + at, &v, 8);
      }
      if (rng_.one_in(4)) {
        constexpr u8 kVmcall[] = {0x0f, 0x01, 0xc1, 0x0f, 0x01, 0xd9};
        at = rng_.below(Memory::kRam / 2 - sizeof kVmcall);
        std::memcpy(s_.memory.ram + at, kVmcall, sizeof kVmcall);
        s_.hypercall.store(at, std::memory_order_relaxed);
      }
    }
    const Call& call = kCalls[rng_.below(std::size(kCalls))];
    Endpoint* on = call.on == On::System ? s_.system.get() : call.on == On::Vm ? vm.get() : vcpu.get();
    if (rng_.one_in(64)) on = rng_.one_in(2) ? vm.get() : vcpu.get();  // a wrong object
    make(*on, call, vcpu.get());
  }

  void make(Endpoint& on, const Call& call, Endpoint* vcpu) {
    unsigned long request = call.request;
    if (request == KVM_RUN) {
      kvm_run* run = on.run_page();
      if (run == nullptr) return;
      // The VMM's page holds what the VMM likes. Without a kick a guest may spin for ever.
      u8* bytes = reinterpret_cast<u8*>(run);
      if (rng_.one_in(8)) bytes[rng_.below(2 * kPageSize)] = static_cast<u8>(rng_.next());
      on.kick();
      // A little guest code: the kick of another thread ends it.
      if (rng_.one_in(3)) __atomic_store_n(&run->immediate_exit, u8{0}, __ATOMIC_SEQ_CST);
      {
        // Those that begin with immediate_exit too: other workers may have cleared it again.
        const std::lock_guard lock(g_running_mutex);
        g_running[this] = &on;
      }
      check(on.ioctl(KVM_RUN, rng_.one_in(64) ? integer() : 0), "KVM_RUN");
      const std::lock_guard lock(g_running_mutex);
      g_running.erase(this);
      return;
    }
    if (rng_.one_in(512)) request = rng_.one_in(2) ? _IO(KVMIO, rng_.below(256)) : rng_.next();
    if (request == KVM_RUN) return;
    u64 arg;
    if (call.arg == Arg::Integer) {
      arg = integer();
    } else {
      const u64 size = std::max<u64>(_IOC_SIZE(call.request), 8);
      // Lists stand behind their head: up to the end of the arena.
      const u64 room = size <= 64 ? 0x4000 : size;
      arg_ = arena_ + kArena - room;
      if (call.getter != 0 && !rng_.one_in(8)) {
        shape({call.on, call.getter, Arg::InOut}, size);
        if (call.getter == KVM_GET_CPUID2) as<kvm_cpuid2>()->nent = 256;
        on.ioctl(call.getter, reinterpret_cast<u64>(arg_));
        flip(std::min<u64>(room, size <= 64 ? 512 : size));
      } else {
        noise(size);
      }
      shape(call, size);
      arg = reinterpret_cast<u64>(arg_);
      if (rng_.one_in(6)) arg = pointer(size);
      if (rng_.one_in(8)) {  // at the very end, where it runs into the page without access
        std::memmove(arena_ + kArena - size, arg_, size);
        arg = reinterpret_cast<u64>(arena_ + kArena - size + rng_.below(size + 1));
      }
      if (holds_addresses(request)) arg = shaped(arg, size);
    }
    const long r = on.ioctl(request, arg);
    check(r, "ioctl", request);
    if (request == KVM_GET_STATS_FD && r >= 0) {
      char bytes[64];
      static_cast<void>(!::read(static_cast<int>(r), bytes, sizeof bytes));
      ::close(static_cast<int>(r));
    }
    static_cast<void>(vcpu);
  }

  static bool holds_addresses(unsigned long request) {
    return request == KVM_SET_USER_MEMORY_REGION || request == KVM_SET_USER_MEMORY_REGION2 || request == KVM_GET_DIRTY_LOG || request == KVM_CLEAR_DIRTY_LOG ||
           request == KVM_X86_SET_MSR_FILTER || request == KVM_GET_DEVICE_ATTR || request == KVM_SET_DEVICE_ATTR ||
           request == KVM_HAS_DEVICE_ATTR;
  }

  /// The engine and guests write where such a struct says, and the fuzzer's own heap must not be there: what can be read
  /// at the argument is what shape() has made, not what another call left.
  u64 shaped(u64 arg, u64 size) {
    if (arg == reinterpret_cast<u64>(arg_)) return arg;
    const auto in = [&](const u8* base, u64 bytes) {
      return arg >= reinterpret_cast<u64>(base) && arg < reinterpret_cast<u64>(base) + bytes;
    };
    u8* const tail = arena_ + kArena - size;
    std::memmove(tail, arg_, size);
    if (in(s_.memory.readonly, Memory::kRam) || in(s_.memory.half, Memory::kRam)) return reinterpret_cast<u64>(tail);
    return arg;
  }

  void check(long r, const char* what, unsigned long request = 0) {
    if (r >= 0) {
      s_.good.fetch_add(1, std::memory_order_relaxed);
      return;
    }
    if (!known_error(r)) {
      std::fprintf(stderr, "abi_fuzz: %s 0x%lx answers %ld (%s)\n", what, request, r, std::strerror(static_cast<int>(-r)));
      std::abort();
    }
    s_.errors[-r & 255].fetch_add(1, std::memory_order_relaxed);
  }

 public:
  static std::mutex g_running_mutex;
  static std::map<Worker*, Endpoint*> g_running;

 private:
  Shared& s_;
  Random rng_;
  u8* arena_;
  u8* arg_ = nullptr;
  std::array<int, 4> eventfds_{};
  int null_ = -1;
};
std::mutex Worker::g_running_mutex;
std::map<Worker*, Endpoint*> Worker::g_running;

std::ptrdiff_t open_descriptors() {
  return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
}

int fuzz(int argc, char** argv) {
  u64 calls = ~0ull, seconds = 20, seed = static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count());
  unsigned threads = 3;
  std::string which = "translator";
  for (int i = 1; i < argc; i++) {
    const std::string name = argv[i];
    if (i + 1 >= argc) {
      std::fprintf(stderr, "usage: ring3_abi_fuzz [--calls N] [--seconds N] [--seed S] [--threads N] [--engine NAME]\n");
      return 2;
    }
    const char* value = argv[++i];
    if (name == "--calls") {
      calls = std::strtoull(value, nullptr, 0);
      seconds = 1'000'000;
    } else if (name == "--seconds") {
      seconds = std::strtoull(value, nullptr, 0);
    } else if (name == "--seed") {
      seed = std::strtoull(value, nullptr, 0);
    } else if (name == "--threads") {
      threads = static_cast<unsigned>(std::strtoul(value, nullptr, 0));
    } else if (name == "--engine") {
      which = value;
    } else {
      std::fprintf(stderr, "abi_fuzz: unknown option %s\n", name.c_str());
      return 2;
    }
  }
  std::printf("abi_fuzz: seed %llu, engine %s, %u threads\n", static_cast<unsigned long long>(seed), which.c_str(), threads);
  std::fflush(stdout);

  Shared shared;
  engine::EngineOptions options;
  options.values["engine"] = which;
  options.values["code-mib"] = "4";
  options.values["cache-mib"] = "1";
  const std::ptrdiff_t before = open_descriptors();
  auto system = engine::create_soft_system(options);
  if (!system) {
    std::fprintf(stderr, "abi_fuzz: %s\n", system.error().message.c_str());
    return 2;
  }
  shared.system = std::move(*system);
  shared.limit = calls;
  shared.deadline = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  const auto start = std::chrono::steady_clock::now();

  std::atomic<bool> over{false};
  std::thread kicker([&] {
    while (!over.load()) {
      std::this_thread::sleep_for(std::chrono::microseconds(200));
      const std::lock_guard lock(Worker::g_running_mutex);
      for (auto& [worker, vcpu] : Worker::g_running) vcpu->kick();
    }
  });
  {
    std::vector<std::unique_ptr<Worker>> workers;
    std::vector<std::thread> running;
    for (unsigned i = 0; i < threads; i++) workers.push_back(std::make_unique<Worker>(shared, seed + i * 0x9e37));
    for (auto& w : workers) running.emplace_back([&w] { w->run(); });
    for (auto& t : running) t.join();
  }
  over = true;
  kicker.join();
  for (auto& m : shared.machines) m = {};
  shared.system.reset();

  const u64 made = std::min<u64>(shared.calls.load(), calls);
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("abi_fuzz: %llu calls in %.1f s, %llu answered without error\n", static_cast<unsigned long long>(made), took,
              static_cast<unsigned long long>(shared.good.load()));
  for (int e = 0; e < 256; e++) {
    if (const u64 n = shared.errors[e].load(); n != 0) {
      std::printf("abi_fuzz:   %-14s %llu\n", ::strerrorname_np(e), static_cast<unsigned long long>(n));
    }
  }
  const std::ptrdiff_t after = open_descriptors();
  if (after != before) {
    std::fprintf(stderr, "abi_fuzz: %td descriptors before, %td after\n", before, after);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace ring3::fuzz

int main(int argc, char** argv) { return ring3::fuzz::fuzz(argc, argv); }
