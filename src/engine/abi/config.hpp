#pragma once
#include <cstddef>
#include <memory>

#include "base/result.hpp"
#include "engine/abi/provider.hpp"
#include "engine/timer/clock.hpp"
#include "engine/translate/interpreted_ops.hpp"
#include "engine/translate/kept_code.hpp"
#include "engine/translate/perf_map.hpp"

/// EngineOptions, checked.
namespace ring3::engine::abi {

struct Config {
  std::size_t cache_bytes = 16u << 20;  ///< decoded-code cache of a VM, shared out among its vCPUs
  bool translate = true;                ///< engine=translator; false: the interpreter alone
  std::size_t code_bytes = 512u << 20;  ///< translated code of a VM, shared out likewise; at least 4 MiB a vCPU
  u64 lockstep = 0;                     ///< not 0: the translator's every n-th block is compared with the interpreter
  std::shared_ptr<KeptCode> kept;       ///< code-cache=: translations of earlier runs; null: none
  std::shared_ptr<PerfMap> perf_map;    ///< null: none is written
  std::shared_ptr<InterpretedOps> interpreted_ops;  ///< null: nobody asks
  unsigned windows = 0;                 ///< TranslatorVcpu::Options::window_samples
  u64 halt_poll_ns = 0;                 ///< HaltPoll's limit, until KVM_CAP_HALT_POLL sets another
  u64 quantum = 1u << 18;               ///< instructions between two looks at signals and steal time
  bool windows_announced = false;       ///< windows have what Endpoint::window_memory() says alone
  bool signals_announced = false;       ///< EngineOptions::signals_announced
  std::shared_ptr<const HostClock> clock;
  std::shared_ptr<const void> user_copies;  ///< guard_user_copies(): ioctls survive bad pointers while a VM lives

  /// Without engine= the translator, where can_translate; asking for it elsewhere is ENOTSUP.
  static Result<Config> create(const EngineOptions& options, bool can_translate);
};

}  // namespace ring3::engine::abi
