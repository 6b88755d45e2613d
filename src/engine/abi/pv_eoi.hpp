#pragma once
#include <memory>

#include "base/types.hpp"
#include "engine/mmu/mmu.hpp"
#include "memory/guest_memory.hpp"

/// EOI by a bit in guest memory: who takes an interrupt that only its LAPIC knows of ends it without an access to the LAPIC.
///
/// Spec:      virt/kvm/x86/msr MSR_KVM_PV_EOI_EN.
/// The bit is set when such an interrupt is delivered, and taken back before anything looks at the LAPIC again: from
/// then on, and in guest memory that a VMM saves, the LAPIC alone says what is in service.
/// Threading: the vCPU's owner only; offer() and take_back() while the vCPU counts as in guest code, so that no memslot goes.
/// Trust:     the address and the byte there are the guest's; a byte that has gone counts as not cleared.
namespace ring3::engine::abi {

class PvEoi {
 public:
  static constexpr u32 kMsr = 0x4b564d04;

  /// sink: is told of pages that become dirty.
  PvEoi(memory::GuestMemory& memory, PhysicalTracker& tracker, DirtySink& sink) : memory_(memory), tracker_(tracker), sink_(sink) {}

  /// False: #GP (reserved bit, no memory there); nothing changed.
  bool write_msr(u64 value);
  u64 read_msr() const { return msr_; }
  void reset();

  bool enabled() const { return msr_ & 1; }
  /// Whether the bit is set, and the guest may have cleared it.
  bool offered() const { return offered_; }
  /// Precondition: enabled(), and ending the interrupt in service means no more than that.
  void offer();
  /// Precondition: offered(). Whether the guest has cleared the bit, which is an EOI; it is clear afterwards.
  bool take_back();

 private:
  Gpa address() const { return Gpa(msr_ & ~u64{1}); }
  /// The byte, whose other bits are the guest's. False where none is, or it cannot be written.
  bool load(u8* value);
  bool store(u8 value);

  memory::GuestMemory& memory_;
  PhysicalTracker& tracker_;
  DirtySink& sink_;
  u64 msr_ = 0;
  bool offered_ = false;
  std::shared_ptr<const memory::SlotTable> table_;  // null: not looked up
  const memory::Slot* slot_ = nullptr;              // in table_
};

}  // namespace ring3::engine::abi
