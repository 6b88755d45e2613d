#pragma once
#include <functional>
#include <span>

#include "base/types.hpp"

namespace ring3::devices {

/// What a bus sees of a device: a window of registers.
///
/// Threading: any vCPU thread, several at once; each device guards itself.
/// Trust:     offset, length and bytes come from the guest. The bus promises offset < the registered
///            size and data.size() in 1..8, no more: an access may run past the window's end, or be of
///            a width the device does not know. No access may fail, block, or panic.
class Device {
 public:
  virtual ~Device() = default;
  /// Fills all of data, which comes preset to all ones: what the device leaves is what an open bus gives.
  virtual void read(u64 offset, std::span<u8> data) = 0;
  virtual void write(u64 offset, std::span<const u8> data) = 0;
};

/// The level of a device's interrupt line. Called with the device's lock held, so it must not call
/// back into the device; calls for one line never overlap.
using IrqLine = std::function<void(bool level)>;

/// The value of a little-endian access of up to 8 bytes.
inline u64 load_le(std::span<const u8> data) {
  u64 v = 0;
  for (std::size_t i = 0; i < data.size() && i < 8; i++) v |= u64{data[i]} << (8 * i);
  return v;
}

/// Stores the low bytes of v; bytes of data past the eighth are untouched.
inline void store_le(std::span<u8> data, u64 v) {
  for (std::size_t i = 0; i < data.size() && i < 8; i++) data[i] = static_cast<u8>(v >> (8 * i));
}

}  // namespace ring3::devices
