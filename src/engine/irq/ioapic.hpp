#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/irq/apic_bus.hpp"

/// 82093AA I/O APIC: 24 pins, indirect registers, version 0x11 (no EOI register).
///
/// Spec:      82093AA datasheet; virt/kvm/api KVM_GET/SET_IRQCHIP (kvm_ioapic_state).
/// Deviation: polarity is stored and ignored (lines are asserted or not), delivery status is always idle, as
/// in KVM. Threading: everything from any thread; one mutex, held while messages go to LAPICs (which take no
/// lock),
///            never while the acknowledgement callback runs.
/// Trust:     MMIO from the guest, state from the VMM.
namespace ring3::engine {

class IoApic {
 public:
  static constexpr unsigned kPins = KVM_IOAPIC_NUM_PINS;
  static constexpr u64 kDefaultBase = 0xfec00000;
  static constexpr u64 kSize = 0x100;

  /// acked(pin): the guest ended an interrupt of the pin. changed(unmasked): redirection entries changed;
  /// unmasked holds a bit for each pin that was unmasked. Both are called without the lock.
  IoApic(ApicBus& bus, std::function<void(unsigned)> acked, std::function<void(u32)> changed);

  bool contains(Gpa a) const;
  /// offset within the 256-byte window. Other offsets and sizes read 0 and ignore writes.
  void mmio_read(u32 offset, void* data, u32 size);
  void mmio_write(u32 offset, const void* data, u32 size);

  /// source < 32. The pin is the OR of its sources. Returns as KVM_IRQ_LINE_STATUS: -1 ignored
  /// (masked, no destination), 0 coalesced, > 0 vCPUs reached; 1 for a lowered line.
  int set_line(unsigned pin, unsigned source, bool level);
  /// A LAPIC ended vector. Only level entries whose LAPIC does not suppress it lose their remote IRR.
  void eoi(u8 vector, bool suppress);

  void get_state(kvm_ioapic_state* out) const;
  void set_state(const kvm_ioapic_state& in);
  void reset();

  /// Vectors of entries for which wanted(pin) or that are level triggered, as four words of bits.
  void vectors(u64 out[4], const std::function<bool(unsigned)>& wanted) const;

 private:
  struct Entry {
    u64 bits = 1u << 16;
    u8 vector() const { return static_cast<u8>(bits); }
    bool level() const { return bits >> 15 & 1; }
    bool masked() const { return bits >> 16 & 1; }
    bool remote_irr() const { return bits >> 14 & 1; }
    void set_remote_irr(bool v) { bits = (bits & ~(1ull << 14)) | (static_cast<u64>(v) << 14); }
  };
  u32 read_window() const;
  bool write_window(u32 value, u32* unmasked);
  int raise_locked(unsigned pin);
  int service_locked(unsigned pin);

  ApicBus& bus_;
  const std::function<void(unsigned)> acked_;
  const std::function<void(u32)> changed_;
  mutable std::mutex mutex_;
  std::atomic<u64> base_{kDefaultBase};
  u32 select_ = 0;
  u32 id_ = 0;
  u32 irr_ = 0;
  u32 irr_delivered_ = 0;  // edges in irr_ that were sent: not part of the saved irr
  Entry entries_[kPins];
  u32 sources_[kPins] = {};  // asserting sources, a bit each
};

}  // namespace ring3::engine
