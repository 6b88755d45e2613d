#include "engine/abi/pv_eoi.hpp"

#include "engine/abi/user_memory.hpp"

namespace ring3::engine::abi {

bool PvEoi::load(u8* value) {
  if (table_ == nullptr || table_->generation != memory_.generation()) [[unlikely]] {
    table_ = memory_.table();
    slot_ = table_->find(address());
    if (slot_ != nullptr && slot_->readonly()) slot_ = nullptr;
  }
  return slot_ != nullptr && copy_in(reinterpret_cast<u64>(slot_->host(address())), value);
}

bool PvEoi::store(u8 value) {
  const Gpa at = address();
  if (!copy_out(reinterpret_cast<u64>(slot_->host(at)), value)) return false;
  if (slot_->mark_dirty(at)) sink_.page_dirtied(slot_->id, (at - slot_->gpa) >> kPageShift);
  tracker_.host_wrote(*table_, *slot_, at, sizeof value);
  return true;
}

bool PvEoi::write_msr(u64 value) {
  constexpr u64 kEnable = 1, kReserved = 2;
  if (value & kReserved) return false;
  if ((value & kEnable) && memory_.table()->find(Gpa(value & ~kEnable)) == nullptr) return false;
  msr_ = value;
  table_ = nullptr;
  return true;
}

void PvEoi::reset() {
  msr_ = 0;
  offered_ = false;
  table_ = nullptr;
}

void PvEoi::offer() {
  u8 value;
  offered_ = load(&value) && store(value | 1);
}

bool PvEoi::take_back() {
  offered_ = false;
  u8 value;
  if (!load(&value)) return false;
  if (!(value & 1)) return true;
  store(value & 0xfe);
  return false;
}

}  // namespace ring3::engine::abi
