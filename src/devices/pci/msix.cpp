#include "devices/pci/msix.hpp"

#include <algorithm>

namespace ring3::pci {

std::vector<u8> Msix::capability(u8 bar, u32 table_offset, u32 pba_offset) const {
  std::vector<u8> body(10);
  const auto put = [&](std::size_t at, u32 v, int n) {
    for (int i = 0; i < n; i++) body[at + static_cast<std::size_t>(i)] = static_cast<u8>(v >> (8 * i));
  };
  put(0, static_cast<u32>(table_.size() - 1), 2);
  put(2, table_offset | bar, 4);
  put(6, pba_offset | bar, 4);
  return body;
}

void Msix::set_control(bool enabled, bool masked) {
  const std::lock_guard lock(mutex_);
  enabled_ = enabled;
  masked_ = masked;
  for (u16 v = 0; v < table_.size(); v++) flush_locked(v);
}

bool Msix::enabled() const {
  const std::lock_guard lock(mutex_);
  return enabled_;
}

void Msix::read_table(u64 offset, std::span<u8> data) const {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < data.size(); i++) {
    const u64 at = offset + i, entry = at / 16, byte = at % 16;
    if (entry >= table_.size()) return;
    const Entry& e = table_[entry];
    data[i] = static_cast<u8>(byte < 8 ? e.address >> (8 * byte) : byte < 12 ? e.data >> (8 * (byte - 8)) : e.control >> (8 * (byte - 12)));
  }
}

void Msix::write_table(u64 offset, std::span<const u8> data) {
  const std::lock_guard lock(mutex_);
  const auto set = [](auto& field, u64 byte, u8 v) {
    using T = std::remove_reference_t<decltype(field)>;
    field = static_cast<T>((field & ~(T{0xff} << (8 * byte))) | (T{v} << (8 * byte)));
  };
  for (std::size_t i = 0; i < data.size(); i++) {
    const u64 at = offset + i, entry = at / 16, byte = at % 16;
    if (entry >= table_.size()) return;
    Entry& e = table_[entry];
    if (byte < 8) {
      set(e.address, byte, data[i]);
    } else if (byte < 12) {
      set(e.data, byte - 8, data[i]);
    } else if (byte == 12) {
      e.control = data[i] & 1;
    }
  }
  if (const u64 entry = offset / 16; entry < table_.size()) flush_locked(static_cast<u16>(entry));
}

void Msix::read_pba(u64 offset, std::span<u8> data) const {
  const std::lock_guard lock(mutex_);
  for (std::size_t i = 0; i < data.size(); i++) {
    const u64 at = offset + i;
    data[i] = at / 8 < pending_.size() ? static_cast<u8>(pending_[at / 8] >> (8 * (at % 8))) : u8{0};
  }
}

void Msix::trigger(u16 vector) {
  const std::lock_guard lock(mutex_);
  if (vector >= table_.size() || !enabled_) return;
  pending_[vector / 64] |= u64{1} << (vector % 64);
  flush_locked(vector);
}

void Msix::flush_locked(u16 vector) {
  const u64 bit = u64{1} << (vector % 64);
  if ((pending_[vector / 64] & bit) == 0 || !enabled_ || masked_ || (table_[vector].control & 1) != 0) return;
  pending_[vector / 64] &= ~bit;
  if (services_ != nullptr && services_->send_msi) services_->send_msi({table_[vector].address, table_[vector].data});
}

void Msix::reset() {
  const std::lock_guard lock(mutex_);
  std::fill(pending_.begin(), pending_.end(), 0);
}

}  // namespace ring3::pci
