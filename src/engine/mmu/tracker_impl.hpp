#pragma once
#include "engine/mmu/mmu.hpp"
#include "engine/mmu/tracker_core.hpp"

namespace ring3::engine {

struct PhysicalTracker::Impl {
  explicit Impl(memory::GuestMemory& memory) : core(memory) {}
  TrackerCore core;
  std::atomic_flag split_lock = ATOMIC_FLAG_INIT;
};

}  // namespace ring3::engine
