#include "devices/pci/function.hpp"

namespace ring3::pci {

Function::Function(const Identity& id) {
  set_config(0x00, id.vendor, 2);
  set_config(0x02, id.device, 2);
  set_config(0x08, id.revision, 1);
  set_config(0x09, id.class_code, 3);
  set_config(0x2c, id.subsystem_vendor, 2);
  set_config(0x2e, id.subsystem, 2);
  set_writable(kCommand, kMemoryEnable | kBusMaster | kIntxDisable | 0x140, 2);  // and parity, SERR
  set_writable(0x0c, 0xff, 1);                                                  // cache line size
}

void Function::set_config(u32 offset, u64 value, u32 bytes) {
  for (u32 i = 0; i < bytes; i++) config_[offset + i] = static_cast<u8>(value >> (8 * i));
}

void Function::set_writable(u32 offset, u64 mask, u32 bytes) {
  for (u32 i = 0; i < bytes; i++) writable_[offset + i] = static_cast<u8>(mask >> (8 * i));
}

void Function::add_bar(u8 index, u64 size) {
  bars_.push_back({index, size, 0, false});
  const u32 at = 0x10 + 4u * index;
  set_config(at, 0x4, 8);  // memory, 64 bits, not prefetchable
  set_writable(at, ~(size - 1), 8);
}

void Function::place_bar(u8 index, u64 address) {
  set_config(0x10 + 4u * index, address | 0x4, 8);
  set_config(kCommand, config16(kCommand) | kMemoryEnable, 2);
  decode_changed();
}

void Function::use_intx_pin() {
  set_config(0x3d, 1, 1);        // INTA
  set_writable(0x3c, 0xff, 1);   // the line: firmware's note to itself
}

u32 Function::add_capability(u8 id, std::span<const u8> body, std::span<const u8> writable) {
  const u32 at = next_capability_;
  set_config(last_link_, at, 1);
  set_config(kStatus, config16(kStatus) | 0x10, 2);
  set_config(at, id, 1);
  last_link_ = at + 1;
  for (std::size_t i = 0; i < body.size(); i++) config_[at + 2 + i] = body[i];
  for (std::size_t i = 0; i < writable.size(); i++) writable_[at + 2 + i] = writable[i];
  next_capability_ = (at + 2 + static_cast<u32>(body.size()) + 3) & ~3u;
  return at;
}

std::vector<Function::Bar> Function::bars() const {
  std::vector<Bar> out = bars_;
  for (Bar& b : out) {
    const u32 at = 0x10 + 4u * b.index;
    b.address = (u64{config32(at + 4)} << 32 | config32(at)) & ~u64{15};
    b.decoded = (config16(kCommand) & kMemoryEnable) != 0;
  }
  return out;
}

void Function::read_config(u32 offset, std::span<u8> data) {
  for (std::size_t i = 0; i < data.size() && offset + i < kConfigSize; i++) data[i] = config_[offset + i];
  config_read(offset, data);
}

void Function::write_config(u32 offset, std::span<const u8> data) {
  for (std::size_t i = 0; i < data.size() && offset + i < kConfigSize; i++) {
    u8& byte = config_[offset + i];
    const u8 mask = writable_[offset + i];
    byte = static_cast<u8>((byte & ~mask) | (data[i] & mask));
  }
  config_written(offset, data);
  if (overlaps(offset, data.size(), kCommand, 2) || overlaps(offset, data.size(), 0x10, 24)) decode_changed();
}

}  // namespace ring3::pci
