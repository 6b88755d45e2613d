#pragma once
#include <memory>
#include <vector>

#include "control/cli/console_port_option.hpp"
#include "vmm/machine/machine.hpp"

namespace ring3::control {

/// The host's ends of `ring3 run --console-port`: named byte channels of a virtio console.
///
/// pty:       a new pseudo-terminal, its name on standard error. What the guest writes while nobody has it open is dropped.
/// file:      what the guest writes, in a file that is created or truncated; no input.
/// unix:      a listening socket, one client at a time; the others wait. The guest sees whether a client is there: without one
///            its reads come to an end and its writes wait.
/// Bound:     kMostHeld bytes of output wait for a slow client; then the guest is held back, on that port.
/// Life:      outlives the Machine, and resets of the guest.
/// Threading: a thread of its own serves all of them.
class ConsolePorts {
 public:
  static constexpr std::size_t kMostHeld = 64 << 10;
  /// Errors: what cannot be opened, in one line.
  static Result<ConsolePorts> open(const std::vector<ConsolePortOption>& options);
  ConsolePorts(ConsolePorts&&) noexcept;
  ConsolePorts& operator=(ConsolePorts&&) = delete;
  ~ConsolePorts();

  /// One device for all ports; none without ports. Starts the thread: after all forks.
  Status add_to(vmm::MachineConfig& config);

 private:
  struct Impl;
  explicit ConsolePorts(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace ring3::control
