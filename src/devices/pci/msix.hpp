#pragma once
#include <mutex>
#include <span>
#include <vector>

#include "devices/pci/function.hpp"

namespace ring3::pci {

/// The MSI-X table and pending bits of a function.
///
/// Spec:      PCI Local Bus 3.0, 6.8.2.
/// Threading: any thread; one mutex, held while a message is sent.
class Msix {
 public:
  explicit Msix(u16 vectors) : table_(vectors), pending_((vectors + 63) / 64) {}

  u16 vectors() const { return static_cast<u16>(table_.size()); }
  void connect(const Services* services) { services_ = services; }

  /// The capability's body: control, table and PBA at offsets (8-byte aligned) of a BAR.
  std::vector<u8> capability(u8 bar, u32 table_offset, u32 pba_offset) const;

  /// The control word's enable and function mask.
  void set_control(bool enabled, bool masked);
  bool enabled() const;

  void read_table(u64 offset, std::span<u8> data) const;
  void write_table(u64 offset, std::span<const u8> data);
  void read_pba(u64 offset, std::span<u8> data) const;

  /// Sends the vector's message, or keeps it pending while masked. A vector that is not there: nothing.
  void trigger(u16 vector);
  void reset();

 private:
  struct Entry {
    u64 address = 0;
    u32 data = 0;
    u32 control = 1;  // masked
  };
  void flush_locked(u16 vector);

  mutable std::mutex mutex_;
  const Services* services_ = nullptr;
  std::vector<Entry> table_;
  std::vector<u64> pending_;
  bool enabled_ = false, masked_ = false;
};

}  // namespace ring3::pci
