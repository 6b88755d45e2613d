#pragma once
#include <stdint.h>

#include "ring3/ring3.h"

/// libring3, loaded when the program opens /dev/kvm first: most processes that inherit the preload never do.
namespace ring3::shim {

struct Engine {
  decltype(&ring3_error) error = nullptr;
  decltype(&ring3_open) open = nullptr;
  decltype(&ring3_create) create = nullptr;
  decltype(&ring3_ioctl) ioctl = nullptr;
  decltype(&ring3_mapping) mapping = nullptr;
  decltype(&ring3_signal) signal = nullptr;
  decltype(&ring3_window_memory) window_memory = nullptr;
  decltype(&ring3_close) close = nullptr;
  uintptr_t begin = 0, end = 0;  ///< where its code lies
};

/// Loads it. 0 or -errno; what went wrong is written to standard error. Any thread.
int load_engine();
/// Precondition: load_engine() returned 0 once.
const Engine& engine();
/// Whether a call comes from the engine itself.
bool called_by_engine(const void* return_address);

}  // namespace ring3::shim
