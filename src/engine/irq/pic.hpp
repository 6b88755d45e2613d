#pragma once
#include <atomic>
#include <functional>
#include <mutex>

#include "base/linux_kvm.hpp"
#include "base/types.hpp"

/// The two cascaded 8259A interrupt controllers of a PC, with the ELCR.
///
/// Spec:      8259A datasheet; PIIX ELCR (0x4d0/0x4d1); virt/kvm/api KVM_GET/SET_IRQCHIP (kvm_pic_state).
/// Threading: everything from any thread; one mutex. Callbacks run without it.
/// Trust:     ports and values from the guest, state from the VMM.
namespace ring3::engine {

class Pic {
 public:
  /// output(true): INTR rose; acked(irq): the guest ended irq (0–15), or AEOI did.
  /// unmasked(irqs): lines that were just unmasked, a bit each.
  Pic(std::function<void()> output_raised, std::function<void(unsigned)> acked,
      std::function<void(u32)> unmasked);

  static bool handles(u16 port) {
    return port == 0x20 || port == 0x21 || port == 0xa0 || port == 0xa1 || port == 0x4d0 || port == 0x4d1;
  }
  /// One byte, for handled ports.
  u8 read(u16 port);
  void write(u16 port, u8 value);

  /// irq < 16, source < 32; the line is the OR of its sources. -1: ignored (masked), 0 coalesced, 1 accepted.
  int set_line(unsigned irq, unsigned source, bool level);
  /// INTR: a relaxed atomic load.
  bool output() const { return output_.load(std::memory_order_acquire); }
  /// INTA: the vector of the highest request; the spurious vector (IRQ 7 or 15) when it went away.
  u8 ack();

  /// chip: 0 master, 1 slave.
  void get_state(unsigned chip, kvm_pic_state* out) const;
  void set_state(unsigned chip, const kvm_pic_state& in);
  void reset();

 private:
  // What a locked section leaves to be told without the lock: lines as bits.
  struct Told {
    u32 acked = 0, unmasked = 0;
    bool was_high = false;
  };
  static unsigned priority(const kvm_pic_state& c, u8 mask);
  int request(unsigned chip) const;
  int set_input(unsigned irq, bool level);
  void update();
  void end(unsigned chip, unsigned irq, Told* told);
  void take(unsigned chip, unsigned irq, Told* told);
  void initialise(unsigned chip, u8 icw1, Told* told);
  void write_command(unsigned chip, u8 value, Told* told);
  void write_data(unsigned chip, u8 value, Told* told);
  u8 poll(unsigned chip, Told* told);
  void tell(const Told& told);

  const std::function<void()> raised_;
  const std::function<void(unsigned)> acked_;
  const std::function<void(u32)> unmasked_;
  mutable std::mutex mutex_;
  kvm_pic_state chips_[2] = {};
  u32 sources_[16] = {};
  std::atomic<bool> output_{false};
};

}  // namespace ring3::engine
