#pragma once
#include <array>
#include <atomic>

#include "base/types.hpp"
#include "engine/irq/vcpu_sink.hpp"

/// Delivery of interrupt messages to the VM's LAPICs: what the APIC bus is in hardware.
///
/// Spec:      SDM vol. 3A 11.6 (IPIs, destinations, lowest priority), 11.11 (MSI), 11.12.10 (x2APIC ids).
/// Threading: deliver() from any thread, lock-free. attach/detach are serialised by the caller; a
///            LAPIC is detached only when no other thread can deliver to it any more.
namespace ring3::engine {

class Lapic;

enum class DeliveryMode : u8 {
  kFixed = 0,
  kLowestPriority = 1,
  kSmi = 2,
  kReserved = 3,
  kNmi = 4,
  kInit = 5,
  kStartup = 6,
  kExtInt = 7,
};
enum class Shorthand : u8 { kNone = 0, kSelf = 1, kAll = 2, kAllButSelf = 3 };

struct InterruptMessage {
  u32 dest = 0;  ///< APIC id or logical destination; 8 bits, or 32 with x2APIC
  u8 vector = 0;
  DeliveryMode mode = DeliveryMode::kFixed;
  bool logical = false;           ///< destination mode
  bool level = false;             ///< trigger mode: level
  bool assert_ = true;            ///< the level of a level-triggered message (INIT de-assert has no effect)
  bool redirection_hint = false;  ///< MSI: choose the lowest priority among the destinations
  Shorthand shorthand = Shorthand::kNone;
};

/// Told about EOIs that an IOAPIC (or the VMM's) must see. Called on the vCPU's thread, no lock held.
class EoiListener {
 public:
  virtual ~EoiListener() = default;
  /// level: the vector's TMR bit. suppress: the LAPIC is set not to broadcast (SVR bit 12).
  virtual void eoi(Lapic& from, u8 vector, bool level, bool suppress) = 0;
};

/// KVM_CAP_X2APIC_API and what CPUID says about interrupts; VM-wide.
struct ApicOptions {
  bool x2apic_format = false;       ///< KVM_X2APIC_API_USE_32BIT_IDS
  bool no_broadcast_quirk = false;  ///< KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
  bool ext_dest_id = false;         ///< MSI address bits 11:5 are destination bits 14:8 (no x2apic_format)
};

/// Decodes an MSI's address and data (SDM 11.11). Any values.
InterruptMessage decode_msi(u32 address_lo, u32 address_hi, u32 data, const ApicOptions& options);

class ApicBus {
 public:
  static constexpr unsigned kMaxVcpus = 1024;  ///< ids below this

  explicit ApicBus(VcpuSink& sink) : sink_(sink) {}

  VcpuSink& sink() const { return sink_; }
  /// Null when no such vCPU has a LAPIC.
  Lapic* lapic(unsigned vcpu) const {
    return vcpu < kMaxVcpus ? lapics_[vcpu].load(std::memory_order_acquire) : nullptr;
  }

  /// Whether a LAPIC has ever been attached.
  bool has_any() const { return limit_.load(std::memory_order_acquire) != 0; }

  /// Delivers to every LAPIC the message addresses (one of them for lowest priority). source: the sender
  /// of an IPI, null for devices. Returns how many LAPICs took it: 0 when it merged with one that
  /// was still pending everywhere, -1 when there was no destination.
  int deliver(const InterruptMessage& message, const Lapic* source = nullptr);
  /// KVM_SIGNAL_MSI and MSI routes. As deliver(); -EINVAL for an address_hi that options forbid.
  int deliver_msi(u32 address_lo, u32 address_hi, u32 data);

  /// Set before the vCPUs run.
  ApicOptions& options() { return options_; }
  const ApicOptions& options() const { return options_; }

  /// The PIT's tick reaches LINT0 of LAPICs that route it as NMI (Linux's I/O APIC NMI watchdog).
  void pulse_lint0_nmi();

  void set_eoi_listener(EoiListener* listener) { listener_.store(listener, std::memory_order_release); }

 private:
  friend class Lapic;
  friend class IrqChip;
  void attach(Lapic& lapic);
  void detach(Lapic& lapic);
  bool eoi_wanted(u8 vector) const {
    return eoi_vectors_[vector >> 6].load(std::memory_order_relaxed) >> (vector & 63) & 1;
  }

  VcpuSink& sink_;
  ApicOptions options_;
  std::array<std::atomic<Lapic*>, kMaxVcpus> lapics_{};
  std::atomic<unsigned> limit_{0};      // 1 + the highest id attached
  std::atomic<bool> ids_moved_{false};  // some guest wrote an APIC id: slot numbers are no ids any more
  std::atomic<int> lint0_nmi_{0};       // LAPICs whose LINT0 delivers NMI
  std::atomic<EoiListener*> listener_{nullptr};
  std::array<std::atomic<u64>, 4> eoi_vectors_{};  // edge vectors whose EOI the listener wants too
};

}  // namespace ring3::engine
