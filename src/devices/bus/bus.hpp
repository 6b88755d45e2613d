#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.hpp"
#include "base/types.hpp"
#include "devices/bus/device.hpp"

namespace ring3::devices {

/// An address space of devices: the 64 KiB of ports, or guest physical memory outside RAM.
///
/// Unclaimed: reads give all ones, writes vanish.
/// Straddle:  an access belongs to the device that holds its first byte.
/// Ownership: shares the devices it holds.
/// Threading: add() before the vCPUs start; read() and write() from any thread after that, without a lock.
/// Trust:     address and length come from the guest; longer accesses are cut into pieces of 8 bytes.
class Bus {
 public:
  /// `limit`: the size of the address space; 0 means 2^64.
  explicit Bus(u64 limit = 0) : limit_(limit) {}

  /// Refuses an empty range, one that does not fit, and one that overlaps another (EEXIST, naming both).
  Status add(u64 start, u64 size, std::shared_ptr<Device> device, std::string name);

  /// Whether a device took it.
  bool read(u64 address, std::span<u8> data) const;
  bool write(u64 address, std::span<const u8> data) const;

 private:
  struct Range {
    u64 start;
    u64 last;  // inclusive, so that a range may end at 2^64
    std::shared_ptr<Device> device;
    std::string name;
  };
  const Range* find(u64 address) const;

  u64 limit_;
  std::vector<Range> ranges_;  // sorted by start
};

}  // namespace ring3::devices
