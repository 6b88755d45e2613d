// Guest memory that vanishes under a running guest: KVM_RUN answers EFAULT, as the kernel's, and the process lives.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

constexpr u64 kExtra = 0x100000;

class Vanished : public AbiTest {
 protected:
  /// mov rax, [0x100000]; out 0x10, al; jmp back. With the access at another address when size is given.
  static constexpr u8 kReader[] = {0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0x10, 0x00, 0xe6, 0x10, 0xeb, 0xf4};
  /// lock inc qword [0x100ffc], across two pages; out 0x10, al; jmp back
  static constexpr u8 kSplit[] = {0xf0, 0x48, 0xff, 0x04, 0x25, 0xfc, 0x0f, 0x10, 0x00, 0xe6, 0x10, 0xeb, 0xf3};
  /// mov ecx, 0x2000; mov edi, 0x100000; mov esi, 0x8000; rep movsb; out 0x10, al; jmp back
  static constexpr u8 kCopy[] = {0xb9, 0x00, 0x20, 0x00, 0x00, 0xbf, 0x00, 0x00, 0x10, 0x00, 0xbe, 0x00, 0x80, 0x00, 0x00,
                                 0xf3, 0xa4, 0xe6, 0x10, 0xeb, 0xeb};

  template <std::size_t N>
  static Guest guest(const u8 (&code)[N]) {
    return {code, code + N};
  }

  u8* map_extra(int fd = -1) {
    void* p = ::mmap(nullptr, 0x2000, PROT_READ | PROT_WRITE, fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
    EXPECT_NE(p, MAP_FAILED);
    return static_cast<u8*>(p);
  }
};

TEST_P(Vanished, UnmappedMemoryGivesEfaultAndTheGuestGoesOnWhenItIsBack) {
  SOFT_ONLY("the kernel's own");
  for (const Guest& g : {guest(kReader), guest(kSplit), guest(kCopy)}) {
    TestVm vm(system());
    u8* extra = map_extra();
    ASSERT_TRUE(vm.vm().set_user_memory_region(1, Gpa(kExtra), 0x2000, Hva(reinterpret_cast<u64>(extra))).ok());
    vm.start_flat(g, true);
    for (int i = 0; i < 100; i++) {
      ASSERT_EQ(vm.run(), u32{KVM_EXIT_IO});
    }
    ASSERT_EQ(::mprotect(extra, 0x2000, PROT_NONE), 0);
    for (int i = 0; i < 3; i++)
      ASSERT_EQ(vm.vcpu().run(), -EFAULT) << "guest of " << g.end - g.begin << " bytes, the " << i << "th time, exit " << vm.vcpu().run_page().exit_reason << ", rip " << vm.vcpu().regs()->rip;
    ASSERT_EQ(::mprotect(extra, 0x2000, PROT_READ | PROT_WRITE), 0);
    for (int i = 0; i < 100; i++) {
      ASSERT_EQ(vm.run(), u32{KVM_EXIT_IO});
    }
    ASSERT_EQ(::munmap(extra, 0x2000), 0);
    ASSERT_EQ(vm.vcpu().run(), -EFAULT);
    auto regs = vm.vcpu().regs();
    ASSERT_TRUE(regs.ok());
    EXPECT_GE(regs->rip, 0x1000u);
    EXPECT_LT(regs->rip, 0x1020u);
  }
}

TEST_P(Vanished, AFileCutShortGivesEfault) {
  SOFT_ONLY("the kernel's own");
  TestVm vm(system());
  const int fd = ::memfd_create("guest", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(::ftruncate(fd, 0x2000), 0);
  u8* extra = map_extra(fd);
  ASSERT_TRUE(vm.vm().set_user_memory_region(1, Gpa(kExtra), 0x2000, Hva(reinterpret_cast<u64>(extra))).ok());
  vm.start_flat(guest(kReader), true);
  ASSERT_EQ(vm.run(), u32{KVM_EXIT_IO});
  ASSERT_EQ(::ftruncate(fd, 0), 0);
  ASSERT_EQ(vm.vcpu().run(), -EFAULT);
  ASSERT_EQ(::ftruncate(fd, 0x2000), 0);
  ASSERT_EQ(vm.run(), u32{KVM_EXIT_IO});
  ::munmap(extra, 0x2000);
  ::close(fd);
}

TEST_P(Vanished, PageTablesAndCodeThatVanish) {
  SOFT_ONLY("the kernel's own");
  // The tables, then the code, are where nothing is mapped from the start.
  for (const bool code : {false, true}) {
    TestVm vm(system());
    void* hole = ::mmap(nullptr, 0x2000, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(hole, MAP_FAILED);
    ASSERT_TRUE(vm.vm().set_user_memory_region(1, Gpa(kExtra), 0x2000, Hva(reinterpret_cast<u64>(hole))).ok());
    vm.start_flat(guest(kReader), true);
    if (code) {
      kvm_regs regs{};
      regs.rip = kExtra;
      regs.rflags = 2;
      ASSERT_TRUE(vm.vcpu().set_regs(regs).ok());
    } else {
      auto sregs = vm.vcpu().sregs();
      ASSERT_TRUE(sregs.ok());
      sregs->cr3 = kExtra;
      ASSERT_TRUE(vm.vcpu().set_sregs(*sregs).ok());
    }
    for (int i = 0; i < 2; i++) ASSERT_EQ(vm.vcpu().run(), -EFAULT);
    ::munmap(hole, 0x2000);
  }
}

/// A memslot at kExtra over memory that is not there; from start() to stop() another thread deletes it and makes it again.
class BlinkingHole {
 public:
  explicit BlinkingHole(TestVm& vm) : vm_(vm) {
    EXPECT_NE(hole_, MAP_FAILED);
    set(kSize);
  }
  BlinkingHole(const BlinkingHole&) = delete;
  BlinkingHole& operator=(const BlinkingHole&) = delete;
  ~BlinkingHole() {
    stop();
    ::munmap(hole_, kSize);
  }
  void start() {
    changer_ = std::thread([this] {
      while (!over_.load()) {
        set(0);
        set(kSize);
      }
    });
  }
  void stop() {
    over_.store(true);
    if (changer_.joinable()) changer_.join();
  }

 private:
  static constexpr u64 kSize = 0x2000;
  void set(u64 size) {
    EXPECT_TRUE(vm_.vm().set_user_memory_region(1, Gpa(kExtra), size, Hva(reinterpret_cast<u64>(hole_))).ok());
  }

  TestVm& vm_;
  void* const hole_ = ::mmap(nullptr, kSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  std::atomic<bool> over_{false};
  std::thread changer_;
};

TEST_P(Vanished, AMemslotThatIsDeletedWhileTheGuestFaultsInIt) {
  SOFT_ONLY("the kernel's own");
  TestVm vm(system());
  BlinkingHole hole(vm);
  vm.start_flat(guest(kReader), true);
  hole.start();
  // The load finds the hole, or no memory: a read of a device then.
  int faults = 0, devices = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (std::chrono::steady_clock::now() < end) {
    const long r = vm.vcpu().run();
    if (r == -EFAULT) {
      faults++;
    } else {
      EXPECT_EQ(r, 0);
      const u32 exit = vm.exit_reason();
      EXPECT_TRUE(exit == KVM_EXIT_MMIO || exit == KVM_EXIT_IO) << exit;
      devices++;
    }
  }
  hole.stop();
  EXPECT_GT(faults, 0);
  EXPECT_GT(devices, 0);
}

TEST_P(Vanished, AMemslotThatIsDeletedWhileItsPageTablesAreRead) {
  SOFT_ONLY("the kernel's own");
  TestVm vm(system());
  BlinkingHole hole(vm);
  vm.start_flat(guest(kReader), true);
  auto sregs = vm.vcpu().sregs();
  ASSERT_TRUE(sregs.ok());
  sregs->cr3 = kExtra;
  ASSERT_TRUE(vm.vcpu().set_sregs(*sregs).ok());
  hole.start();
  int faults = 0, none = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(1);
  while (std::chrono::steady_clock::now() < end) {
    kvm_translation t{};
    t.linear_address = 0x1000;
    const long r = vm.vcpu().endpoint().ioctl(KVM_TRANSLATE, arg(t));
    if (r == -EFAULT) {
      faults++;
    } else {
      EXPECT_EQ(r, 0);
      EXPECT_EQ(t.valid, 0);
      none++;
    }
  }
  hole.stop();
  EXPECT_GT(faults, 0);
  EXPECT_GT(none, 0);
}

INSTANTIATE_TEST_SUITE_P(Providers, Vanished, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel),
                         provider_name);

}  // namespace
}  // namespace ring3::abitest
