#include "devices/legacy/fw_cfg.hpp"

namespace ring3::devices {

FwCfg::FwCfg() {
  set(kSignature, {'Q', 'E', 'M', 'U'});
  set(kId, {1, 0, 0, 0});               // bit 0: the traditional interface
  set(kFileDirectory, {0, 0, 0, 0});    // no files
}

void FwCfg::set_u16(u16 key, u16 value) {
  std::vector<u8> bytes(2);
  store_le(bytes, value);
  set(key, std::move(bytes));
}

void FwCfg::set_u64(u16 key, u64 value) {
  std::vector<u8> bytes(8);
  store_le(bytes, value);
  set(key, std::move(bytes));
}

void FwCfg::read(u64 offset, std::span<u8> data) {
  std::lock_guard lock(mutex_);
  if (offset == 0) {
    store_le(data.first(data.size() < 2 ? data.size() : 2), s_.selector);
    return;
  }
  if (offset != 1 || data.empty()) return;
  // The port is a byte wide: what a wider access reads past it is no register.
  const auto it = items_.find(s_.selector);
  data[0] = it != items_.end() && s_.position < it->second.size() ? it->second[s_.position] : 0;
  s_.position++;
}

void FwCfg::write(u64 offset, std::span<const u8> data) {
  if (offset != 0 || data.size() < 2) return;
  std::lock_guard lock(mutex_);
  s_.selector = static_cast<u16>(data[0] | data[1] << 8);
  s_.position = 0;
}

FwCfg::State FwCfg::state() const {
  std::lock_guard lock(mutex_);
  return s_;
}

void FwCfg::restore(const State& state) {
  std::lock_guard lock(mutex_);
  s_ = state;
}

}  // namespace ring3::devices
