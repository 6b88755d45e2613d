#pragma once
#include <array>
#include <functional>
#include <span>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"

namespace ring3::pci {

struct MsiMessage {
  u64 address = 0;
  u32 data = 0;
};

/// What functions need of the machine. Any thread.
struct Services {
  std::function<void(const MsiMessage&)> send_msi;
  /// The level of an interrupt line of the IOAPIC.
  std::function<void(u32 gsi, bool level)> set_line;
  /// A guest write of any length at `address` signals `fd` instead of reaching the device. False: not to be had here,
  /// the write comes as any other. Null: never.
  std::function<bool(bool assign, Gpa address, int fd)> ioeventfd;
};

/// One PCI function: 4 KiB of configuration space, up to three 64-bit memory BARs, capabilities.
///
/// Spec:      PCI Local Bus 3.0, chapter 6; PCI Express Base 4.0, 7.5 and 7.7.
/// Threading: configuration accesses one at a time (the Host serialises them); read_bar and write_bar on any vCPU
///            thread, several at once; interrupts on any thread.
/// Trust:     offsets, lengths and bytes come from the guest. The Host promises that an access lies within the
///            configuration space, or begins within a BAR, and has 1 to 8 bytes.
class Function {
 public:
  static constexpr u32 kConfigSize = 4096;
  static constexpr u8 kNoBar = 0xff;
  struct Identity {
    u16 vendor = 0, device = 0;
    u8 revision = 0;
    u32 class_code = 0;  ///< class, subclass, interface: 24 bits
    u16 subsystem_vendor = 0, subsystem = 0;
  };
  struct Bar {
    u8 index = kNoBar;  ///< 0, 2 or 4
    u64 size = 0;       ///< a power of two, at least 4096
    u64 address = 0;    ///< where it is, when it answers
    bool decoded = false;
  };

  explicit Function(const Identity& identity);
  virtual ~Function() = default;
  Function(const Function&) = delete;
  Function& operator=(const Function&) = delete;

  void read_config(u32 offset, std::span<u8> data);
  void write_config(u32 offset, std::span<const u8> data);

  virtual void read_bar(u8 bar, u64 offset, std::span<u8> data) { (void)bar, (void)offset, (void)data; }
  virtual void write_bar(u8 bar, u64 offset, std::span<const u8> data) { (void)bar, (void)offset, (void)data; }

  /// The BARs as the guest has set them. Under the Host's configuration lock.
  std::vector<Bar> bars() const;

  // For the Host, before the guest runs.
  const std::vector<Bar>& bar_list() const { return bars_; }
  void place_bar(u8 index, u64 address);
  void connect(const Services* services, std::function<void(bool)> intx) { services_ = services, intx_ = std::move(intx); }

 protected:
  static constexpr u32 kCommand = 4, kStatus = 6;
  static constexpr u16 kMemoryEnable = 2, kBusMaster = 4, kIntxDisable = 0x400;

  void add_bar(u8 index, u64 size);
  void use_intx_pin();
  /// Appends a capability: its id, the link, then `body`. `writable`: a mask of the same length. Returns its offset.
  u32 add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable = {});

  /// The function's own registers, after the generic bytes were read, or written where they are writable. Under the
  /// configuration lock. A range may hold several registers, or a part of one.
  virtual void config_read(u32 offset, std::span<u8> data) { (void)offset, (void)data; }
  virtual void config_written(u32 offset, std::span<const u8> data) { (void)offset, (void)data; }
  /// The command register or a BAR changed.
  virtual void decode_changed() {}

  u16 config16(u32 offset) const { return static_cast<u16>(config_[offset] | config_[offset + 1] << 8); }
  u32 config32(u32 offset) const { return config16(offset) | static_cast<u32>(config16(offset + 2)) << 16; }
  void set_config(u32 offset, u64 value, u32 bytes);
  void set_writable(u32 offset, u64 mask, u32 bytes);
  static bool overlaps(u32 offset, std::size_t size, u32 field, u32 field_size) {
    return offset < field + field_size && field < offset + size;
  }

  const Services* services_ = nullptr;
  std::function<void(bool)> intx_;  // the function's share of its interrupt line

 private:
  std::array<u8, kConfigSize> config_{};
  std::array<u8, kConfigSize> writable_{};
  std::vector<Bar> bars_;
  u32 next_capability_ = 0x40;
  u32 last_link_ = 0x34;
};

}  // namespace ring3::pci
