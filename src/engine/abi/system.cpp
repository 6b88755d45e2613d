#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "engine/abi/config.hpp"
#include "engine/abi/cpuid.hpp"
#include "engine/abi/msr_list.hpp"
#include "engine/abi/provider.hpp"
#include "engine/abi/user_memory.hpp"
#include "engine/abi/vcpu.hpp"
#include "engine/abi/vm.hpp"
#include "engine/translate/thunks.hpp"

namespace ring3::engine {
namespace abi {
namespace {

class VcpuEndpoint final : public kvm::Endpoint {
 public:
  VcpuEndpoint(std::shared_ptr<Vm> vm, Vcpu& vcpu) : vm_(std::move(vm)), vcpu_(vcpu) {}
  long ioctl(unsigned long request, u64 arg) override { return vcpu_.ioctl(request, arg); }
  Result<std::unique_ptr<Endpoint>> create(unsigned long, u64) override {
    return Error::of(ENOTTY, "a vCPU makes no other objects");
  }
  kvm_run* run_page() override { return vcpu_.run_page(); }
  void kick() override { vcpu_.kick(); }
  void signal_came() override { vcpu_.signal_came(); }
  std::span<u8> mappable(u64 offset) override { return vcpu_.mappable(offset); }

 private:
  std::shared_ptr<Vm> vm_;
  Vcpu& vcpu_;  // the VM's
};

class VmEndpoint final : public kvm::Endpoint {
 public:
  explicit VmEndpoint(std::shared_ptr<Vm> vm) : vm_(std::move(vm)) {}
  long ioctl(unsigned long request, u64 arg) override { return vm_->ioctl(request, arg); }
  Result<std::unique_ptr<Endpoint>> create(unsigned long request, u64 arg) override {
    if (request == KVM_CREATE_DEVICE) {
      const long error = vm_->ioctl(request, arg);
      return Error::of(static_cast<int>(-error), "no such device");
    }
    if (request != KVM_CREATE_VCPU) return Error::of(ENOTTY, "a VM makes vCPUs only");
    auto vcpu = vm_->create_vcpu(arg);
    if (!vcpu) return vcpu.error();
    return std::unique_ptr<Endpoint>(std::make_unique<VcpuEndpoint>(vm_, **vcpu));
  }
  kvm_run* run_page() override { return nullptr; }
  void kick() override {}
  void announces_stores() override { vm_->announce_stores(); }
  void while_halted(std::function<void(bool)> look) override { vm_->set_look_while_halted(std::move(look)); }
  bool window_memory(u64 begin, u64 size, bool may) override { return vm_->window_memory(begin, size, may); }
  void stored(Gpa start, u64 size) override { vm_->tracker().host_wrote(start, size); }

 private:
  std::shared_ptr<Vm> vm_;
};

class SystemEndpoint final : public kvm::Endpoint {
 public:
  explicit SystemEndpoint(Config config) : config_(std::move(config)) {}

  long ioctl(unsigned long request, u64 arg) override {
    switch (request) {
      case KVM_GET_API_VERSION:
        return arg == 0 ? KVM_API_VERSION : -EINVAL;
      case KVM_CHECK_EXTENSION:
        return check_extension(arg);
      case KVM_GET_VCPU_MMAP_SIZE:
        return arg == 0 ? static_cast<long>(Vcpu::kRunSize) : -EINVAL;
      case KVM_GET_SUPPORTED_CPUID:
        return answer_list<kvm_cpuid2>(arg, supported_cpuid(), &kvm_cpuid2::nent, false);
      case KVM_GET_SUPPORTED_HV_CPUID:
        return answer_list<kvm_cpuid2>(arg, hv::supported_cpuid(kMaxVcpus, true), &kvm_cpuid2::nent, false);
      case KVM_GET_EMULATED_CPUID:
        if (const long error = check_padding(arg); error != 0) return error;
        return answer_list<kvm_cpuid2>(arg, emulated_cpuid(), &kvm_cpuid2::nent, false);
      case KVM_GET_MSR_INDEX_LIST:
        return answer_list<kvm_msr_list>(arg, msr_index_list(), &kvm_msr_list::nmsrs, true);
      case KVM_GET_MSR_FEATURE_INDEX_LIST:
        return answer_list<kvm_msr_list>(arg, msr_feature_list(), &kvm_msr_list::nmsrs, true);
      case KVM_GET_MSRS:
        return feature_msrs(arg);
      case KVM_HAS_DEVICE_ATTR:
      case KVM_GET_DEVICE_ATTR: {
        kvm_device_attr attr;
        if (!copy_in(arg, &attr)) return -EFAULT;
        if (attr.group != 0 || attr.attr != KVM_X86_XCOMP_GUEST_SUPP) return -ENXIO;
        if (request == KVM_HAS_DEVICE_ATTR) return 0;
        u64 features = 3;
        for (const auto& e : supported_cpuid()) {
          if (e.function == 0xd && e.index == 0) features = e.eax | u64{e.edx} << 32;
        }
        return copy_out(attr.addr, features) ? 0 : -EFAULT;
      }
      case KVM_X86_GET_MCE_CAP_SUPPORTED:
        return copy_out(arg, mce_cap_supported()) ? 0 : -EFAULT;
      case KVM_TRACE_ENABLE:  // which the kernel once had
      case KVM_TRACE_PAUSE:
      case KVM_TRACE_DISABLE:
        return -EOPNOTSUPP;
      default:
        return -EINVAL;  // not ENOTTY: the kernel's own answer on /dev/kvm
    }
  }
  Result<std::unique_ptr<Endpoint>> create(unsigned long request, u64 arg) override {
    if (request != KVM_CREATE_VM) return Error::of(ENOTTY, "the system makes VMs only");
    if (arg != 0) return Error::of(EINVAL, "machine type 0 is the only one");
    auto vm = Vm::create(config_);
    if (!vm) return vm.error();
    return std::unique_ptr<Endpoint>(std::make_unique<VmEndpoint>(std::move(*vm)));
  }
  kvm_run* run_page() override { return nullptr; }
  void kick() override {}

 private:
  /// KVM_GET_EMULATED_CPUID alone wants its entries' padding zero, for what may come to stand there; what cannot be read is not.
  static long check_padding(u64 arg) {
    kvm_cpuid2 head;
    if (!copy_in(arg, &head)) return -EFAULT;
    if (head.nent == 0) return -E2BIG;
    for (u32 i = 0; i < std::min(head.nent, kMaxCpuidEntries); i++) {
      kvm_cpuid_entry2 e;
      if (!copy_in(arg + sizeof head + i * sizeof e, &e) || e.padding[0] != 0 || e.padding[1] != 0 || e.padding[2] != 0) return -EINVAL;
    }
    return 0;
  }

  static long feature_msrs(u64 arg) {
    kvm_msrs head;
    if (!copy_in(arg, &head)) return -EFAULT;
    if (head.nmsrs >= 256) return -E2BIG;
    const u64 at = arg + sizeof head;
    for (u32 i = 0; i < head.nmsrs; i++) {
      kvm_msr_entry e;
      if (!copy_in(at + i * sizeof e, &e)) return -EFAULT;
      u64 value = 0;
      if (!feature_msr(e.index, &value)) return i;
      e.data = value;
      if (!copy_out(at + i * sizeof e, e)) return -EFAULT;
    }
    return head.nmsrs;
  }

  const Config config_;
};

}  // namespace
}  // namespace abi

bool can_translate() { return host_can_translate(); }

Result<std::unique_ptr<kvm::Endpoint>> create_soft_system(const EngineOptions& options) {
  auto config = abi::Config::create(options, can_translate());
  if (!config) return config.error();
  return std::unique_ptr<kvm::Endpoint>(std::make_unique<abi::SystemEndpoint>(std::move(*config)));
}

}  // namespace ring3::engine
