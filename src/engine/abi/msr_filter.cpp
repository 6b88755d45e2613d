#include "engine/abi/msr_filter.hpp"

#include <cerrno>

#include "engine/abi/user_memory.hpp"

namespace ring3::engine::abi {
namespace {
constexpr u32 kPlatformInfo = 0xce;
constexpr u32 kAllReasons = KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER;
}  // namespace

long MsrFilter::set(u64 arg) {
  kvm_msr_filter in;
  if (!copy_in(arg, &in)) return -EFAULT;
  if (in.flags & ~static_cast<u32>(KVM_MSR_FILTER_DEFAULT_DENY)) return -EINVAL;
  auto table = std::make_shared<Table>();
  table->default_allow = !(in.flags & KVM_MSR_FILTER_DEFAULT_DENY);
  bool empty = true;
  for (const kvm_msr_filter_range& r : in.ranges) empty = empty && r.nmsrs == 0;
  if (empty && !table->default_allow) return -EINVAL;
  for (const kvm_msr_filter_range& r : in.ranges) {
    if (r.nmsrs == 0) continue;
    if (r.flags == 0 || (r.flags & ~static_cast<u32>(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE))) return -EINVAL;
    const u64 bytes = (u64{r.nmsrs} + 63) / 64 * 8;
    if (bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE) return -EINVAL;
    Range range{r.flags, r.base, r.nmsrs, std::vector<u64>(bytes / 8)};
    if (!copy_bytes_in(reinterpret_cast<u64>(r.bitmap), range.bitmap.data(), bytes)) return -EFAULT;
    table->ranges.push_back(std::move(range));
  }
  std::lock_guard lock(mutex_);
  table_ = std::move(table);
  refresh_active();
  return 0;
}

long MsrFilter::set_user_space(u64 reasons) {
  if (reasons & ~u64{kAllReasons}) return -EINVAL;
  std::lock_guard lock(mutex_);
  user_space_.store(static_cast<u32>(reasons), std::memory_order_relaxed);
  refresh_active();
  return 0;
}

void MsrFilter::set_platform_info(bool readable) {
  std::lock_guard lock(mutex_);
  platform_info_.store(readable, std::memory_order_relaxed);
  refresh_active();
}

void MsrFilter::refresh_active() {
  active_.store(table_ != nullptr || user_space_.load(std::memory_order_relaxed) != 0 ||
                    !platform_info_.load(std::memory_order_relaxed),
                std::memory_order_release);
}

bool MsrFilter::allows(u32 index, bool write) const {
  if (index == kPlatformInfo && !write && !platform_info_.load(std::memory_order_relaxed)) return false;
  if (index >= 0x800 && index <= 0x8ff) return true;  // the x2APIC's are not filtered
  std::shared_ptr<const Table> table;
  {
    std::lock_guard lock(mutex_);
    table = table_;
  }
  if (!table) return true;
  const u32 kind = write ? KVM_MSR_FILTER_WRITE : KVM_MSR_FILTER_READ;
  for (const Range& r : table->ranges) {
    if (!(r.flags & kind) || index < r.base || index - r.base >= r.count) continue;
    const u32 n = index - r.base;
    return (r.bitmap[n / 64] >> (n % 64)) & 1;
  }
  return table->default_allow;
}

}  // namespace ring3::engine::abi
