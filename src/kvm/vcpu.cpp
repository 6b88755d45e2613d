#include "kvm/vcpu.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/checked.hpp"
#include "base/unique_fd.hpp"

namespace ring3::kvm {
namespace {
Status status(const char* name, long r) {
  if (r < 0) return Error::from_errno(name, static_cast<int>(-r));
  return Ok{};
}

template <class T>
Result<T> get(Endpoint& e, const char* name, unsigned long request) {
  T object{};
  const long r = e.ioctl(request, reinterpret_cast<u64>(&object));
  if (r < 0) return Error::from_errno(name, static_cast<int>(-r));
  return object;
}

template <class T>
Status set(Endpoint& e, const char* name, unsigned long request, const T& object) {
  return status(name, e.ioctl(request, reinterpret_cast<u64>(&object)));
}
}  // namespace

Result<kvm_regs> Vcpu::regs() const { return get<kvm_regs>(*endpoint_, "KVM_GET_REGS", KVM_GET_REGS); }
Status Vcpu::set_regs(const kvm_regs& v) { return set(*endpoint_, "KVM_SET_REGS", KVM_SET_REGS, v); }
Result<kvm_sregs> Vcpu::sregs() const { return get<kvm_sregs>(*endpoint_, "KVM_GET_SREGS", KVM_GET_SREGS); }
Status Vcpu::set_sregs(const kvm_sregs& v) { return set(*endpoint_, "KVM_SET_SREGS", KVM_SET_SREGS, v); }
Result<kvm_fpu> Vcpu::fpu() const { return get<kvm_fpu>(*endpoint_, "KVM_GET_FPU", KVM_GET_FPU); }
Status Vcpu::set_fpu(const kvm_fpu& v) { return set(*endpoint_, "KVM_SET_FPU", KVM_SET_FPU, v); }
Result<kvm_lapic_state> Vcpu::lapic() const {
  return get<kvm_lapic_state>(*endpoint_, "KVM_GET_LAPIC", KVM_GET_LAPIC);
}
Status Vcpu::set_lapic(const kvm_lapic_state& v) { return set(*endpoint_, "KVM_SET_LAPIC", KVM_SET_LAPIC, v); }
Result<kvm_vcpu_events> Vcpu::vcpu_events() const {
  return get<kvm_vcpu_events>(*endpoint_, "KVM_GET_VCPU_EVENTS", KVM_GET_VCPU_EVENTS);
}
Status Vcpu::set_vcpu_events(const kvm_vcpu_events& v) {
  return set(*endpoint_, "KVM_SET_VCPU_EVENTS", KVM_SET_VCPU_EVENTS, v);
}
Result<kvm_mp_state> Vcpu::mp_state() const {
  return get<kvm_mp_state>(*endpoint_, "KVM_GET_MP_STATE", KVM_GET_MP_STATE);
}
Status Vcpu::set_mp_state(u32 state) {
  kvm_mp_state v{};
  v.mp_state = state;
  return set(*endpoint_, "KVM_SET_MP_STATE", KVM_SET_MP_STATE, v);
}
Result<kvm_xcrs> Vcpu::xcrs() const { return get<kvm_xcrs>(*endpoint_, "KVM_GET_XCRS", KVM_GET_XCRS); }
Status Vcpu::set_xcrs(const kvm_xcrs& v) { return set(*endpoint_, "KVM_SET_XCRS", KVM_SET_XCRS, v); }

Status Vcpu::set_cpuid2(std::span<const kvm_cpuid_entry2> entries) {
  std::vector<u64> buffer((sizeof(kvm_cpuid2) + entries.size_bytes() + 7) / 8);
  auto* head = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  head->nent = static_cast<u32>(entries.size());
  std::memcpy(head->entries, entries.data(), entries.size_bytes());
  return status("KVM_SET_CPUID2", endpoint_->ioctl(KVM_SET_CPUID2, reinterpret_cast<u64>(head)));
}

Result<std::vector<kvm_cpuid_entry2>> Vcpu::cpuid2() const {
  constexpr u32 kEntries = 512;
  std::vector<u64> buffer((sizeof(kvm_cpuid2) + kEntries * sizeof(kvm_cpuid_entry2) + 7) / 8);
  auto* head = reinterpret_cast<kvm_cpuid2*>(buffer.data());
  head->nent = kEntries;
  const long r = endpoint_->ioctl(KVM_GET_CPUID2, reinterpret_cast<u64>(head));
  if (r < 0) return Error::from_errno("KVM_GET_CPUID2", static_cast<int>(-r));
  std::vector<kvm_cpuid_entry2> entries(head->nent < kEntries ? head->nent : kEntries);
  std::memcpy(entries.data(), head->entries, entries.size() * sizeof(entries[0]));
  return entries;
}

Status Vcpu::set_msrs(std::span<const kvm_msr_entry> entries) {
  std::vector<u64> buffer((sizeof(kvm_msrs) + entries.size_bytes() + 7) / 8);
  auto* head = reinterpret_cast<kvm_msrs*>(buffer.data());
  head->nmsrs = static_cast<u32>(entries.size());
  std::memcpy(head->entries, entries.data(), entries.size_bytes());
  const long r = endpoint_->ioctl(KVM_SET_MSRS, reinterpret_cast<u64>(head));
  if (r < 0) return Error::from_errno("KVM_SET_MSRS", static_cast<int>(-r));
  if (static_cast<u64>(r) < entries.size()) {
    char text[64];
    std::snprintf(text, sizeof text, "KVM_SET_MSRS: MSR %#x was not taken", entries[static_cast<u64>(r)].index);
    return Error::of(EINVAL, text);
  }
  return Ok{};
}

Status Vcpu::get_msrs(std::span<kvm_msr_entry> entries) const {
  std::vector<u64> buffer((sizeof(kvm_msrs) + entries.size_bytes() + 7) / 8);
  auto* head = reinterpret_cast<kvm_msrs*>(buffer.data());
  head->nmsrs = static_cast<u32>(entries.size());
  std::memcpy(head->entries, entries.data(), entries.size_bytes());
  const long r = endpoint_->ioctl(KVM_GET_MSRS, reinterpret_cast<u64>(head));
  if (r < 0) return Error::from_errno("KVM_GET_MSRS", static_cast<int>(-r));
  if (static_cast<u64>(r) < entries.size()) {
    char text[64];
    std::snprintf(text, sizeof text, "KVM_GET_MSRS: MSR %#x cannot be read", entries[static_cast<u64>(r)].index);
    return Error::of(EINVAL, text);
  }
  std::memcpy(entries.data(), head->entries, entries.size_bytes());
  return Ok{};
}

Result<std::vector<Vcpu::Statistic>> Vcpu::statistics() const {
  const long r = endpoint_->ioctl(KVM_GET_STATS_FD, 0);
  if (r < 0) return Error::from_errno("KVM_GET_STATS_FD", static_cast<int>(-r));
  const UniqueFd fd(static_cast<int>(r));
  const auto read_at = [&](u64 at, void* to, std::size_t size) {
    return ::pread(fd.get(), to, size, static_cast<off_t>(at)) == static_cast<ssize_t>(size);
  };
  constexpr u32 kMostNames = 4096, kLongestName = 256;
  const Error odd = Error::of(EPROTO, "KVM_GET_STATS_FD: the file is not as the API has it");
  kvm_stats_header header{};
  if (!read_at(0, &header, sizeof header) || header.num_desc > kMostNames || header.name_size > kLongestName) return odd;
  std::vector<u8> descriptor(sizeof(kvm_stats_desc) + header.name_size);
  std::vector<Statistic> all;
  for (u32 n = 0; n < header.num_desc; n++) {
    kvm_stats_desc d{};
    Statistic s;
    if (!read_at(header.desc_offset + u64{n} * descriptor.size(), descriptor.data(), descriptor.size())) return odd;
    std::memcpy(&d, descriptor.data(), sizeof d);
    if (!read_at(u64{header.data_offset} + d.offset, &s.value, sizeof s.value)) return odd;
    const char* name = reinterpret_cast<const char*>(descriptor.data() + sizeof d);
    s.name.assign(name, ::strnlen(name, header.name_size));
    all.push_back(std::move(s));
  }
  return all;
}

Result<u32> Vcpu::tsc_khz() const {
  const long r = endpoint_->ioctl(KVM_GET_TSC_KHZ, 0);
  if (r < 0) return Error::from_errno("KVM_GET_TSC_KHZ", static_cast<int>(-r));
  return static_cast<u32>(r);
}

std::span<u8> Vcpu::io_data(u64 mmap_size) const {
  kvm_run& run = run_page();
  const u64 offset = run.io.data_offset;
  const u64 bytes = u64{run.io.size} * run.io.count;
  if (!range_within(offset, bytes, mmap_size)) return {};
  return {reinterpret_cast<u8*>(&run) + offset, bytes};
}

}  // namespace ring3::kvm
