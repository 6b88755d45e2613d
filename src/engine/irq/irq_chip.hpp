#pragma once
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"
#include "engine/irq/apic_bus.hpp"
#include "engine/irq/ioapic.hpp"
#include "engine/irq/irq_routing.hpp"
#include "engine/irq/lapic.hpp"
#include "engine/irq/pic.hpp"

/// A VM's interrupt controllers beside the LAPICs: routing, and in full mode the 8259 pair and the IOAPIC.
///
/// Spec:      virt/kvm/api KVM_CREATE_IRQCHIP, KVM_IRQ_LINE(_STATUS), KVM_SET_GSI_ROUTING, KVM_IRQFD,
///            KVM_CAP_SPLIT_IRQCHIP.
/// Threading: everything from any thread.
/// Lifetime:  outlives no LAPIC and no device that calls it; the bus outlives it.
namespace ring3::engine {

/// Who drives a line: a line is high while any source holds it high.
enum IrqSource : unsigned { kIrqSourceUser = 0, kIrqSourceResample = 1, kIrqSourcePit = 2 };

class IrqChip final : public EoiListener {
 public:
  enum class Mode {
    kFull,   ///< KVM_CREATE_IRQCHIP: PIC pair, IOAPIC and default routing
    kSplit,  ///< KVM_CAP_SPLIT_IRQCHIP: only LAPICs; PIC and IOAPIC are the VMM's
  };
  /// reserved_pins: kSplit, the GSIs whose MSI routes stand for the VMM's IOAPIC pins.
  IrqChip(ApicBus& bus, Mode mode, unsigned reserved_pins = 0);
  ~IrqChip() override;
  IrqChip(const IrqChip&) = delete;
  IrqChip& operator=(const IrqChip&) = delete;

  Mode mode() const { return mode_; }

  /// KVM_IRQ_LINE_STATUS's meaning: < 0 ignored, 0 coalesced, > 0 how many vCPUs it reached. MSI routes fire
  /// when level is true. Unrouted GSIs: -1.
  int set_irq(unsigned source, u32 gsi, bool level);
  /// An irqfd without resampling: up and down.
  int pulse(u32 gsi);
  /// The PIT's tick: GSI 0 and LINT0 NMIs.
  void pit_tick();

  int set_routing(const kvm_irq_routing_entry* entries, u32 count, u32 flags);
  const IrqRouting& routing() const { return routing_; }

  /// KVM_GET/SET_IRQCHIP; chip_id as in the struct. 0; -EINVAL for an unknown id; -ENXIO in split mode.
  int get_irqchip(kvm_irqchip* chip) const;
  int set_irqchip(const kvm_irqchip& chip);

  /// The 8259 pair's output reaches this vCPU. In split mode: see set_user_extint.
  bool has_extint(const Lapic& lapic) const { return pic_ && pic_->output() && lapic.accepts_extint(); }
  /// kvm_cpu_has_interrupt / kvm_cpu_get_interrupt: ExtINT first, then the LAPIC. Owner of the vCPU. -1:
  /// none.
  bool has_interrupt(const Lapic& lapic) const { return has_extint(lapic) || lapic.has_interrupt(); }
  int ack_interrupt(Lapic& lapic);

  /// Ports 0x20/0x21/0xa0/0xa1/0x4d0/0x4d1 and the IOAPIC's window; false: not ours (always in split mode).
  /// PIO: only 1-byte accesses are the chip's; wider ones are taken apart by the caller or ignored here
  /// (return true, read as ones).
  bool pio_read(u16 port, void* data, u32 size);
  bool pio_write(u16 port, const void* data, u32 size);
  bool mmio_read(Gpa a, void* data, u32 size);
  bool mmio_write(Gpa a, const void* data, u32 size);

  /// Calls notify whenever the guest ends an interrupt of gsi (resample irqfds, the PIT's reinjection).
  /// notify may call set_irq. Returns an id for remove_ack_notifier, after which notify is not running.
  u64 add_ack_notifier(u32 gsi, std::function<void()> notify);
  void remove_ack_notifier(u64 id);

  /// The guest has ended what a SINT said: acknowledges the GSIs that are routed to it.
  void hv_sint_acked(u32 vp_index, u32 sint);

  /// Calls notify (no lock held) when the guest unmasks the PIC line or IOAPIC pin of gsi. One per VM: the
  /// PIT's.
  void set_unmask_notifier(u32 gsi, std::function<void()> notify);

  // EoiListener
  void eoi(Lapic& from, u8 vector, bool level, bool suppress) override;

  IoApic* ioapic() { return ioapic_.get(); }
  Pic* pic() { return pic_.get(); }

 private:
  struct Notifier {
    u32 gsi;
    std::function<void()> notify;
    std::mutex running;
  };
  void notify_acked(u32 gsi);
  void notify_unmasked(u32 gsi);
  void update_eoi_vectors();
  void extint_raised();

  ApicBus& bus_;
  const Mode mode_;
  const unsigned reserved_pins_;
  IrqRouting routing_;
  mutable std::mutex notifiers_mutex_;
  std::map<u64, std::shared_ptr<Notifier>> notifiers_;  // guarded by notifiers_mutex_
  u64 next_notifier_ = 1;
  u32 unmask_gsi_ = RoutingTable::kNoGsi;                 // guarded by notifiers_mutex_
  std::shared_ptr<std::function<void()>> unmask_notify_;  // guarded by notifiers_mutex_
  std::mutex eoi_vectors_mutex_;
  std::atomic<u64> split_level_[4] = {};  // split: level-triggered vectors of the reserved pins' routes
  std::unique_ptr<Pic> pic_;
  std::unique_ptr<IoApic> ioapic_;
};

}  // namespace ring3::engine
