#pragma once
#include <vector>

#include "engine/abi/eventfd.hpp"
#include "engine/interp/environment.hpp"

namespace ring3::engine::abi {

class Vcpu;
class Vm;

/// What a vCPU's instructions reach: ports, device memory, MSRs of other rooms, hypercalls.
///
/// In the engine: LAPIC, IOAPIC, 8259, PIT, ioeventfds, coalesced zones. Everything else is the VMM's: the access is put
/// into the run page and the instruction stops. When KVM_RUN comes back, complete() takes the VMM's answer into
/// a log and the instruction is executed again; its accesses are answered from the log in order, so that each reaches the
/// VMM once, until the instruction retires.
/// Trust: everything the guest gives; and the run page, which the VMM writes: sizes are kept here, not read back.
class VcpuEnvironment final : public Environment {
 public:
  explicit VcpuEnvironment(Vcpu& vcpu);

  Answer port_in(u16 port, unsigned size, u32* value) override;
  Answer port_out(u16 port, unsigned size, u32 value) override;
  Answer rdmsr(u32 index, u64* value) override;
  Answer wrmsr(u32 index, u64 value) override;
  Answer msr_before(u32 index, bool write, u64* value, bool* handled) override;
  Answer msr_faulted(u32 index, bool write, u64* value) override;
  void cpuid(u32 leaf, u32 subleaf, u32 out[4]) override;
  u64 rdtsc() override;
  HostTsc host_tsc() const override;
  u64 get_cr8() override;
  void set_cr8(u64 value) override;
  Answer hypercall(u64 nr, const u64 args[4], u64* result) override;
  bool hv_hypercalls() override;
  Answer hv_hypercall(u64 control, u64 input, u64 output, u64* result) override;
  bool xen_hypercalls(u64 number) override;
  Answer xen_hypercall(u64 number, const u64 args[6], bool long_mode, unsigned cpl, u64* result) override;
  void nmi_unblocked() override;
  void retired() override;
  bool mmio_read(Gpa gpa, void* data, unsigned size) override;
  bool mmio_write(Gpa gpa, const void* data, unsigned size) override;

  /// The page of a LAPIC that is off or in x2APIC mode reads as ones and ignores writes; else it is the VMM's then
  /// (KVM_X86_QUIRK_LAPIC_MMIO_HOLE).
  bool lapic_mmio_hole = true;

  /// Whether the run page holds an access for the VMM that it has not answered.
  bool exit_pending() const { return exit_pending_; }
  /// KVM_RUN entered again: the VMM has acted on the access in the run page.
  void complete();
  /// The vCPU's instruction pointer was changed from outside: what was recorded belongs to no instruction.
  void drop();

 private:
  enum class Kind : u8 { PortIn, PortOut, MmioRead, MmioWrite, MsrRead, MsrWrite, Hypercall, HvCall, XenCall };
  struct Access {
    Kind kind;
    u8 size;
    u64 address;
    u64 data;
    u32 reason = 0;      // MSRs: KVM_MSR_EXIT_REASON_*
    bool error = false;  // MSRs: the VMM wants #GP
  };
  u64 own_hypercall(u64 nr, const u64 args[4]);
  u64 send_ipis(const u64 args[4]);
  u64 pair_clocks(const u64 args[4]);
  /// A Hyper-V hypercall that is the VMM's.
  void ask_hypercall(u64 control, u64 input, u64 output);
  // A longer log is no instruction's; see log_full().
  static constexpr std::size_t kMaxLog = 1024;

  /// The recorded answer to the next access of this instruction, or null.
  const Access* replay(Kind kind, u64 address, unsigned size);
  void ask(Kind kind, u64 address, unsigned size, u64 data, u32 reason = 0);
  /// The VMM's answer to an MSR access that failed for `reason`, from the log or by an exit; #GP where it does not want to
  /// be asked.
  Answer msr_to_vmm(u32 index, bool write, u64* value, u32 reason);
  void drop_batch();
  bool mmio_read_part(u64 address, u8* data, unsigned size);
  bool mmio_write_part(u64 address, const u8* data, unsigned size);

  Vcpu& vcpu_;
  Vm& vm_;
  IoEventfds::View ioeventfds_;
  std::vector<Access> log_;
  std::size_t next_ = 0;  // the access that comes next in this execution
  Access asked_{};
  // Elements of a REP INS beyond the first that one exit brought.
  std::vector<u8> batch_;
  std::size_t batch_at_ = 0;
  u64 batch_port_ = 0;
  unsigned asked_count_ = 1;  // elements that the exit in the run page asks for
  bool exit_pending_ = false;
  friend class Vcpu;
};

}  // namespace ring3::engine::abi
