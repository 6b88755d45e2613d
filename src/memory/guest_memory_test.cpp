#include "memory/guest_memory.hpp"

#include <gtest/gtest.h>
#include <linux/kvm.h>

#include <thread>

#include "base/mapping.hpp"

namespace ring3::memory {
namespace {

constexpr u64 kMiB = 1 << 20;

struct MemoryTest : testing::Test {
  Mapping ram = std::move(Mapping::anonymous(16 * kMiB)).value();
  GuestMemory memory;
  Hva hva(u64 offset = 0) const { return Hva(reinterpret_cast<u64>(ram.data()) + offset); }
  int set(u32 slot, u64 gpa, u64 size, u64 offset = 0, u32 flags = 0) {
    return memory.set_region(slot, flags, Gpa(gpa), size, hva(offset));
  }
};

TEST_F(MemoryTest, EmptyHasNothing) {
  u8 b = 7;
  EXPECT_EQ(memory.table()->find(Gpa(0)), nullptr);
  EXPECT_FALSE(memory.read(Gpa(0), &b, 1));
  EXPECT_TRUE(memory.read(Gpa(0), &b, 0));
  EXPECT_EQ(b, 7);
}

TEST_F(MemoryTest, ArgumentsAreCheckedAsTheKernelDoes) {
  EXPECT_EQ(set(0, 0x1000, 0x1800), -EINVAL);                                    // size
  EXPECT_EQ(set(0, 0x1800, 0x1000), -EINVAL);                                    // gpa
  EXPECT_EQ(set(0, 0x1000, 0x1000, 0x10), -EINVAL);                              // hva
  EXPECT_EQ(set(0, 0x1000, 0x1000, 0, 4), -EINVAL);                              // unknown flag
  EXPECT_EQ(set(kMaxSlots, 0x1000, 0x1000), -EINVAL);                            // id
  EXPECT_EQ(set(0x10000, 0x1000, 0x1000), -EINVAL);                              // address space 1
  EXPECT_EQ(set(0, 0x1000, 0), -EINVAL);                                         // delete what is not there
  EXPECT_EQ(memory.set_region(0, 0, Gpa(~0xfffull), 0x2000, hva()), -EINVAL);    // wraps
  EXPECT_EQ(memory.set_region(0, 0, Gpa(1ull << 52), 0x1000, hva()), -EINVAL);   // beyond 52 bits
  EXPECT_EQ(memory.set_region(0, 0, Gpa(0), 1ull << 43, Hva(0x1000)), -EINVAL);  // too many pages
  EXPECT_EQ(memory.set_region(0, 0, Gpa(0), 0x2000, Hva((1ull << 47) - 0x2000)), -EINVAL);
  EXPECT_EQ(memory.set_region(0, 0, Gpa(0), 0x1000, Hva((1ull << 47) - 0x2000)), 0);
  EXPECT_EQ(memory.set_region(0, 0, Gpa(0), 0, Hva(0)), 0);
  EXPECT_EQ(memory.set_region(0, 0, Gpa(0), 0x1000, Hva(0xffff800000000000)), -EINVAL);
  EXPECT_EQ(set(kMaxSlots - 1, 0x1000, 0x1000), 0);
}

TEST_F(MemoryTest, OverlapIsEexist) {
  ASSERT_EQ(set(0, 0x10000, 0x4000), 0);
  EXPECT_EQ(set(1, 0x13000, 0x1000, kMiB), -EEXIST);
  EXPECT_EQ(set(1, 0xf000, 0x2000, kMiB), -EEXIST);
  EXPECT_EQ(set(1, 0x11000, 0x1000, kMiB), -EEXIST);
  EXPECT_EQ(set(1, 0x0, 0x100000, kMiB), -EEXIST);
  EXPECT_EQ(set(1, 0x14000, 0x1000, kMiB), 0);
  EXPECT_EQ(set(2, 0xf000, 0x1000, kMiB), 0);
  EXPECT_EQ(set(2, 0x10000, 0x1000, kMiB), -EEXIST);  // a move
  EXPECT_EQ(set(2, 0x20000, 0x1000, kMiB), 0);
  EXPECT_EQ(memory.table()->find(Gpa(0xf000)), nullptr);
}

TEST_F(MemoryTest, ModifyMoveDelete) {
  ASSERT_EQ(set(3, 0x10000, 0x4000), 0);
  const u64 g = memory.generation();
  EXPECT_EQ(set(3, 0x10000, 0x4000), 0);  // nothing to change
  EXPECT_EQ(memory.generation(), g);
  EXPECT_EQ(set(3, 0x10000, 0x3000), -EINVAL);
  EXPECT_EQ(set(3, 0x10000, 0x4000, kMiB), -EINVAL);
  EXPECT_EQ(set(3, 0x10000, 0x4000, 0, KVM_MEM_READONLY), -EINVAL);
  EXPECT_EQ(set(3, 0x12000, 0x4000), 0);  // moves onto itself
  EXPECT_GT(memory.generation(), g);
  EXPECT_EQ(memory.table()->find(Gpa(0x11fff)), nullptr);
  ASSERT_NE(memory.table()->find(Gpa(0x15fff)), nullptr);
  EXPECT_EQ(memory.table()->find(Gpa(0x15fff))->host(Gpa(0x15fff)), ram.data() + 0x3fff);
  EXPECT_EQ(memory.table()->find(Gpa(0x16000)), nullptr);
  EXPECT_EQ(set(3, 0x12000, 0), 0);
  EXPECT_EQ(memory.table()->find(Gpa(0x12000)), nullptr);
  EXPECT_EQ(set(3, 0x12000, 0), -EINVAL);
}

TEST_F(MemoryTest, TablesAreImmutable) {
  ASSERT_EQ(set(0, 0, 0x1000), 0);
  const auto before = memory.table();
  ASSERT_EQ(set(0, 0, 0), 0);
  EXPECT_NE(before->find(Gpa(0)), nullptr);
  EXPECT_EQ(memory.table()->find(Gpa(0)), nullptr);
  EXPECT_NE(before->generation, memory.table()->generation);
}

TEST_F(MemoryTest, AliasesAreNoticed) {
  ASSERT_EQ(set(0, 0, 0x4000), 0);
  EXPECT_FALSE(memory.table()->has_aliases);
  ASSERT_EQ(set(1, 0x100000, 0x4000, 0x4000), 0);
  EXPECT_FALSE(memory.table()->has_aliases);
  ASSERT_EQ(set(2, 0x200000, 0x2000, 0x3000), 0);
  EXPECT_TRUE(memory.table()->has_aliases);
}

TEST_F(MemoryTest, CopiesAcrossSlotsAndNeverInPart) {
  ASSERT_EQ(set(0, 0x1000, 0x1000, 0x5000), 0);
  ASSERT_EQ(set(1, 0x2000, 0x1000, 0x9000), 0);
  const u64 value = 0x1122334455667788;
  EXPECT_TRUE(memory.write(Gpa(0x1ffc), &value, 8));
  u64 back = 0;
  EXPECT_TRUE(memory.read(Gpa(0x1ffc), &back, 8));
  EXPECT_EQ(back, value);
  EXPECT_EQ(ram.data()[0x5ffc], 0x88);
  EXPECT_EQ(ram.data()[0x9000], 0x44);
  EXPECT_FALSE(memory.write(Gpa(0x2ffc), &value, 8));
  EXPECT_EQ(ram.data()[0x9ffc], 0);
  EXPECT_FALSE(memory.read(Gpa(~0ull - 3), &back, 8));
  EXPECT_FALSE(memory.read(Gpa(0xffc), &back, 8));
}

TEST_F(MemoryTest, ReadOnlySlots) {
  ASSERT_EQ(set(0, 0, 0x1000, 0, KVM_MEM_READONLY), 0);
  const u8 b = 1;
  u8 r = 9;
  EXPECT_FALSE(memory.write(Gpa(0), &b, 1));
  EXPECT_TRUE(memory.read(Gpa(0), &r, 1));
  EXPECT_EQ(r, 0);
}

TEST_F(MemoryTest, DirtyLog) {
  u64 bits[2] = {~0ull, ~0ull};
  ASSERT_EQ(set(0, 0x100000, 70 * kPageSize), 0);
  EXPECT_EQ(memory.get_dirty_log(0, bits, false), -ENOENT);
  EXPECT_EQ(memory.get_dirty_log(9, bits, false), -ENOENT);
  EXPECT_EQ(memory.get_dirty_log(0x10000, bits, false), -EINVAL);
  ASSERT_EQ(set(0, 0x100000, 70 * kPageSize, 0, KVM_MEM_LOG_DIRTY_PAGES), 0);
  ASSERT_EQ(memory.get_dirty_log(0, bits, false), 0);
  EXPECT_EQ(bits[0], 0u);
  EXPECT_EQ(bits[1], 0u);
  const u64 v = 5;
  ASSERT_TRUE(memory.write(Gpa(0x100000 + 3 * kPageSize - 4), &v, 8));
  memory.table()->find(Gpa(0x100000))->mark_dirty(Gpa(0x100000 + 69 * kPageSize + 5));
  ASSERT_EQ(memory.get_dirty_log(0, bits, true), 0);
  EXPECT_EQ(bits[0], 0xcu);
  EXPECT_EQ(bits[1], 1u << 5);
  ASSERT_EQ(memory.get_dirty_log(0, bits, false), 0);  // manual protect had kept them
  EXPECT_EQ(bits[0], 0xcu);
  ASSERT_EQ(memory.get_dirty_log(0, bits, false), 0);
  EXPECT_EQ(bits[0] | bits[1], 0u);
  ASSERT_EQ(set(0, 0x100000, 70 * kPageSize), 0);
  EXPECT_EQ(memory.get_dirty_log(0, bits, false), -ENOENT);
}

TEST_F(MemoryTest, ClearDirtyLog) {
  memory.set_dirty_initially_set(true);
  ASSERT_EQ(set(0, 0, 130 * kPageSize, 0, KVM_MEM_LOG_DIRTY_PAGES), 0);
  u64 bits[3];
  ASSERT_EQ(memory.get_dirty_log(0, bits, true), 0);
  EXPECT_EQ(bits[0], ~0ull);
  EXPECT_EQ(bits[2], 3u);
  const u64 some[3] = {0xff, 0, ~0ull};
  EXPECT_EQ(memory.clear_dirty_log(0, 1, 64, some), -EINVAL);
  EXPECT_EQ(memory.clear_dirty_log(0, 0, 63, some), -EINVAL);
  EXPECT_EQ(memory.clear_dirty_log(0, 0, 131, some), -EINVAL);
  EXPECT_EQ(memory.clear_dirty_log(0, 192, 0, some), -EINVAL);
  EXPECT_EQ(memory.clear_dirty_log(1, 0, 64, some), -ENOENT);
  EXPECT_EQ(memory.clear_dirty_log(0, 0, 130, some), 0);
  ASSERT_EQ(memory.get_dirty_log(0, bits, true), 0);
  EXPECT_EQ(bits[0], ~0xffull);
  EXPECT_EQ(bits[1], ~0ull);
  EXPECT_EQ(bits[2], 0u);
  const u64 tail = 1;
  const u64 all[2] = {~0ull, ~0ull};
  EXPECT_EQ(memory.clear_dirty_log(0, 64, 66, all), 0);  // up to the end, not a multiple of 64
  EXPECT_EQ(memory.clear_dirty_log(0, 128, 2, &tail), 0);
  ASSERT_EQ(memory.get_dirty_log(0, bits, true), 0);
  EXPECT_EQ(bits[1], 0u);
}

TEST_F(MemoryTest, LookupsWhileSlotsChange) {
  ASSERT_EQ(set(0, 0, kMiB), 0);
  std::atomic<bool> stop{false};
  std::atomic<u64> looked{0};
  std::thread reader([&] {
    while (!stop.load()) {
      const auto t = memory.table();
      const Slot* s = t->find(Gpa(0x1000));
      EXPECT_NE(s, nullptr);
      const Slot* m = t->find(Gpa(2 * kMiB));
      if (m != nullptr) {
        EXPECT_EQ(m->id, 1u);
      }
      looked++;
    }
  });
  for (int i = 0; i < 300 || looked.load() < 100; i++) {
    ASSERT_EQ(set(1, 2 * kMiB, kMiB, kMiB), 0);
    ASSERT_EQ(set(1, 2 * kMiB, 0), 0);
  }
  stop.store(true);
  reader.join();
}

}  // namespace
}  // namespace ring3::memory
