// Memory slots under a running guest, and the dirty log.
#include <atomic>
#include <thread>

#include "harness.hpp"

namespace ring3::abitest {
namespace {

class Memory : public AbiTest {};
INSTANTIATE_TEST_SUITE_P(Providers, Memory, testing::Values(Provider::Interpreter, Provider::Translator, Provider::Kernel), provider_name);

TEST_P(Memory, DirtyLog) {
  TestVm m(system());
  m.start_real(guests::dirty);
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), TestVm::kRam, m.hva(), KVM_MEM_LOG_DIRTY_PAGES).ok());
  kvm_dirty_log log{};
  alignas(8) u8 bitmap[TestVm::kRam / 4096 / 8];
  log.dirty_bitmap = bitmap;
  const auto pages = [&](std::initializer_list<u16> frames) {
    u64 at = 0x600;
    for (u16 f : frames) {
      m.put<u16>(at, f);
      at += 2;
    }
    m.put<u16>(at, 0);
    ASSERT_EQ(m.run(), u32{KVM_EXIT_IO});
    ASSERT_EQ(m.vcpu().run_page().io.port, 0xf4);
  };
  const auto dirty = [&] {
    std::vector<u16> out;
    EXPECT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), 0);
    for (u16 p = 0; p < TestVm::kRam / 4096; p++) {
      if (bitmap[p / 8] >> (p % 8) & 1) out.push_back(p);
    }
    return out;
  };
  pages({0x10, 0x20, 0x7f});
  EXPECT_EQ(dirty(), (std::vector<u16>{0x10, 0x20, 0x7f}));
  EXPECT_EQ(dirty(), (std::vector<u16>{}));
  // Pages that were writable and known to the guest are logged anew, every time.
  for (int round = 0; round < 20; round++) {
    pages({0x10, 0x33, 0x7f});
    ASSERT_EQ(dirty(), (std::vector<u16>{0x10, 0x33, 0x7f})) << round;
  }
  log.slot = 5;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), -ENOENT);
  log.slot = 0;
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), TestVm::kRam, m.hva(), 0).ok());
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), -ENOENT);
}

TEST_P(Memory, ManualDirtyLogProtect) {
  SOFT_ONLY("an optional capability");
  TestVm m(system());
  ASSERT_TRUE(m.vm().enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE).ok());
  m.start_real(guests::dirty);
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), TestVm::kRam, m.hva(), KVM_MEM_LOG_DIRTY_PAGES).ok());
  alignas(8) u8 bitmap[TestVm::kRam / 4096 / 8];
  kvm_dirty_log log{};
  log.dirty_bitmap = bitmap;
  m.put<u16>(0x600, 0x40);
  m.put<u16>(0x602, 0x41);
  m.expect_end();
  for (int i = 0; i < 2; i++) {  // reading does not clear
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), 0);
    EXPECT_EQ(bitmap[8], 3);
  }
  kvm_clear_dirty_log clear{};
  clear.first_page = 64;
  clear.num_pages = 64;
  u64 bits = 1;
  clear.dirty_bitmap = &bits;
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_CLEAR_DIRTY_LOG, arg(clear)), 0);
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), 0);
  EXPECT_EQ(bitmap[8], 2);
  clear.first_page = 1;
  EXPECT_EQ(m.vm().endpoint().ioctl(KVM_CLEAR_DIRTY_LOG, arg(clear)), -EINVAL);
}

// The log is read while the guest writes: every write is either in the copy made afterwards or in a later log.
TEST_P(Memory, DirtyLogUnderFire) {
  SOFT_ONLY("the guest's port exits make this slow on a paravirtual /dev/kvm");
  TestVm m(system());
  m.start_real(guests::spin);  // increments 0x500 without end
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), TestVm::kRam, m.hva(), KVM_MEM_LOG_DIRTY_PAGES).ok());
  std::thread runner([&] { EXPECT_EQ(m.vcpu().run(), -EINTR); });
  alignas(8) u8 bitmap[TestVm::kRam / 4096 / 8];
  kvm_dirty_log log{};
  log.dirty_bitmap = bitmap;
  auto* live = reinterpret_cast<u32*>(m.ram() + 0x500);
  u32 copy = 0;
  bool clean_since_copy = false;
  u32 at_clean = 0;
  for (int i = 0; i < 2000; i++) {
    ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), 0);
    if (bitmap[0] & 1) {
      copy = __atomic_load_n(live, __ATOMIC_RELAXED);
      clean_since_copy = false;
    } else {
      // Not written since the last call: the content must be what was copied, or newer only by writes that
      // this call's shootdown ended, which then stand in the next log.
      if (clean_since_copy) {
        ASSERT_EQ(at_clean, copy) << i;
      }
      at_clean = copy;
      clean_since_copy = true;
    }
  }
  m.vcpu().kick();
  runner.join();
  ASSERT_EQ(m.vm().endpoint().ioctl(KVM_GET_DIRTY_LOG, arg(log)), 0);
  if (bitmap[0] & 1) copy = *live;
  EXPECT_EQ(copy, *live);
}

// A slot is taken away and given back with other memory while the guest reads it.
TEST_P(Memory, SlotsChangeUnderARunningGuest) {
  SOFT_ONLY("a paravirtual /dev/kvm is slow at this");
  TestVm m(system());
  m.start_real(guests::watch);
  // RAM below 0x20000 stays; the watched page comes from one of two mappings, or from nowhere.
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), 0, m.hva()).ok());
  ASSERT_TRUE(m.vm().set_user_memory_region(0, Gpa(0), 0x20000, m.hva()).ok());
  auto other = Mapping::anonymous(0x2000);
  ASSERT_TRUE(other.ok());
  const u32 first = 0x11111111, second = 0x22222222;
  std::memcpy(other->data(), &first, 4);
  std::memcpy(other->data() + 0x1000, &second, 4);
  const auto slot = [&](u64 offset, u64 size) {
    return m.vm().set_user_memory_region(1, Gpa(0x20000), size, Hva(reinterpret_cast<u64>(other->data()) + offset)).ok();
  };
  ASSERT_TRUE(slot(0, 0x1000));
  std::atomic<bool> stop{false};
  std::atomic<u32> device_reads{0};
  std::thread runner([&] {
    while (!stop.load()) {
      const int r = m.vcpu().run();
      if (r == -EINTR) break;
      ASSERT_EQ(r, 0);
      ASSERT_EQ(m.exit_reason(), u32{KVM_EXIT_MMIO});
      ASSERT_EQ(m.vcpu().run_page().mmio.phys_addr, 0x20000u);
      const u32 absent = 0x33333333;
      std::memcpy(m.vcpu().run_page().mmio.data, &absent, 4);
      device_reads++;
    }
  });
  auto* seen = reinterpret_cast<u32*>(m.ram() + 0x500);
  auto* turns = reinterpret_cast<u32*>(m.ram() + 0x504);
  // After a change has returned, two turns of the guest's loop later it cannot see the old memory.
  const auto settled = [&](u32 expected) {
    const u32 begin = __atomic_load_n(turns, __ATOMIC_ACQUIRE);
    while (__atomic_load_n(turns, __ATOMIC_ACQUIRE) - begin < 3) std::this_thread::yield();
    EXPECT_EQ(__atomic_load_n(seen, __ATOMIC_ACQUIRE), expected);
  };
  for (int i = 0; i < 100; i++) {
    ASSERT_TRUE(slot(0, 0));
    settled(0x33333333);
    ASSERT_TRUE(slot(0x1000, 0x1000));
    settled(second);
    ASSERT_TRUE(slot(0, 0));
    ASSERT_TRUE(slot(0, 0x1000));
    settled(first);
  }
  stop.store(true);
  m.vcpu().kick();
  runner.join();
  EXPECT_GT(device_reads.load(), 100u);
}

TEST_P(Memory, ReadonlySlotsExitOnWrites) {
  SOFT_ONLY("KVM_CAP_READONLY_MEM may be missing");
  TestVm m(system());
  m.start_real(guests::dirty);
  auto rom = Mapping::anonymous(0x1000);
  ASSERT_TRUE(rom.ok());
  ASSERT_TRUE(m.vm().set_user_memory_region(1, Gpa(0x90000), 0x1000, Hva(reinterpret_cast<u64>(rom->data())), KVM_MEM_READONLY).ok());
  m.put<u16>(0x600, 0x90);
  ASSERT_EQ(m.run(), u32{KVM_EXIT_MMIO});
  EXPECT_EQ(m.vcpu().run_page().mmio.phys_addr, 0x90123u);
  EXPECT_EQ(m.vcpu().run_page().mmio.is_write, 1);
  m.expect_end();
  EXPECT_EQ(rom->data()[0x123], 0);
}

// Code that the VMM changes between two KVM_RUNs is seen.
TEST_P(Memory, CodeWrittenByTheVmm) {
  TestVm m(system());
  m.start_real(guests::pio);
  m.expect_io(0x80, true, 0x42);
  for (u8 v : {0x43, 0x44, 0x45}) {
    m.set_entry();
    m.put<u8>(0x1001, v);
    m.expect_io(0x80, true, v);
  }
}

}  // namespace
}  // namespace ring3::abitest
