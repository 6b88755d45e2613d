#include "kvm/system.hpp"

#include <cstring>

namespace ring3::kvm {
namespace {
Error ioctl_error(const char* name, long r) { return Error::from_errno(name, static_cast<int>(-r)); }
}  // namespace

Result<System> System::create(std::shared_ptr<Endpoint> endpoint) {
  const long version = endpoint->ioctl(KVM_GET_API_VERSION, 0);
  if (version < 0) return ioctl_error("KVM_GET_API_VERSION", version);
  if (version != KVM_API_VERSION) {
    return Error::of(ENOTSUP, "this KVM speaks API version " + std::to_string(version) + "; 12 is needed");
  }
  return System(std::move(endpoint));
}

int System::check_extension(int capability) const {
  const long r = endpoint_->ioctl(KVM_CHECK_EXTENSION, static_cast<u64>(capability));
  return r < 0 ? 0 : static_cast<int>(r);
}

Result<Vm> System::create_vm() const {
  auto vm = endpoint_->create(KVM_CREATE_VM, 0);
  if (!vm) return Error::of(vm.error().code, "KVM_CREATE_VM: " + vm.error().message);
  return Vm(std::move(*vm));
}

Result<std::vector<kvm_cpuid_entry2>> System::supported_cpuid() const {
  for (u32 n = 80; n <= 1280; n *= 2) {
    std::vector<u64> buffer((sizeof(kvm_cpuid2) + n * sizeof(kvm_cpuid_entry2) + 7) / 8);
    auto* head = reinterpret_cast<kvm_cpuid2*>(buffer.data());
    head->nent = n;
    const long r = endpoint_->ioctl(KVM_GET_SUPPORTED_CPUID, reinterpret_cast<u64>(head));
    if (r == -E2BIG) continue;
    if (r < 0) return ioctl_error("KVM_GET_SUPPORTED_CPUID", r);
    std::vector<kvm_cpuid_entry2> entries(head->nent < n ? head->nent : n);
    std::memcpy(entries.data(), head->entries, entries.size() * sizeof(entries[0]));
    return entries;
  }
  return Error::of(E2BIG, "KVM_GET_SUPPORTED_CPUID: more entries than any known KVM has");
}

Result<std::vector<u32>> System::msr_index_list() const {
  for (u32 n = 256; n <= 4096; n *= 2) {
    std::vector<u32> buffer(1 + n);
    buffer[0] = n;
    const long r = endpoint_->ioctl(KVM_GET_MSR_INDEX_LIST, reinterpret_cast<u64>(buffer.data()));
    if (r == -E2BIG) continue;
    if (r < 0) return ioctl_error("KVM_GET_MSR_INDEX_LIST", r);
    const u32 count = buffer[0] < n ? buffer[0] : n;
    return std::vector<u32>(buffer.begin() + 1, buffer.begin() + 1 + count);
  }
  return Error::of(E2BIG, "KVM_GET_MSR_INDEX_LIST: more MSRs than any known KVM has");
}

Result<u64> System::vcpu_mmap_size() const {
  const long r = endpoint_->ioctl(KVM_GET_VCPU_MMAP_SIZE, 0);
  if (r < 0) return ioctl_error("KVM_GET_VCPU_MMAP_SIZE", r);
  return static_cast<u64>(r);
}

}  // namespace ring3::kvm
