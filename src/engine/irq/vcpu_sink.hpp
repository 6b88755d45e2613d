#pragma once
#include "base/types.hpp"

/// What the interrupt rooms need of vCPUs; the abi room implements it.
///
/// vcpu:      the id given to KVM_CREATE_VCPU (the initial APIC id).
/// Threading: called from any thread (another vCPU's, the timer thread, an ioctl's), also with locks of the
///            interrupt rooms held: implementations must not call back into them, must not block,
///            and make a host system call only when the target sleeps (halted) and must be woken.
///            When called on the vCPU's own thread, setting its attention flag is all that is needed.
namespace ring3::engine {

enum class Attention : u32 {
  kInterrupt = 1,  ///< the LAPIC may have an interrupt to deliver: see Lapic::has_interrupt()
  kExtInt = 2,     ///< the 8259 pair's output rose and this vCPU takes it: see IrqChip::has_extint()
};

class VcpuSink {
 public:
  virtual ~VcpuSink() = default;
  /// Make the vCPU look at its interrupt sources before its next block; wake it when it is halted.
  virtual void wake(unsigned vcpu, Attention why) = 0;
  virtual void nmi(unsigned vcpu) = 0;
  virtual void smi(unsigned vcpu) = 0;
  /// INIT: latched by the implementation, which resets the vCPU and calls Lapic::reset(true).
  virtual void init(unsigned vcpu) = 0;
  /// Start-up IPI: counts only while the vCPU waits for it. vector: start page, CS:IP = vector << 12.
  virtual void sipi(unsigned vcpu, u8 vector) = 0;
  /// Split irqchip only, on the vCPU's own thread: EOI of a level-triggered vector that a route below the
  /// reserved IOAPIC pins uses: leave KVM_RUN with KVM_EXIT_IOAPIC_EOI.
  virtual void ioapic_eoi(unsigned vcpu, u8 vector) = 0;
  /// A route to a SINT of Hyper-V's SynIC fires: as Lapic::accept(), or below 0 where there is none. No lock is held.
  virtual int hv_sint(u32 vp_index, u32 sint) {
    static_cast<void>(vp_index), static_cast<void>(sint);
    return -1;
  }
  /// The same of a route to one of Xen's event channels.
  virtual int xen_event(u32 vcpu, u32 port) {
    static_cast<void>(vcpu), static_cast<void>(port);
    return -1;
  }
};

}  // namespace ring3::engine
