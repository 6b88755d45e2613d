#pragma once
#include <array>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "devices/bus/bus.hpp"
#include "devices/pci/function.hpp"

namespace ring3::pci {

/// Where the bus stands in the machine. ACPI (MCFG, the DSDT) tells the guest the same.
struct Layout {
  u64 ecam = 0xe0000000;            ///< 1 MiB: bus 0
  u64 window = 0xc0000000;          ///< for BARs
  u64 window_size = 0x20000000;
  u32 first_line = 16;              ///< GSIs of INTA of devices 0, 4, 8…; then one more a device
  u32 lines = 4;
};

/// The PCI Express host bridge and bus 0.
///
/// Spec:      PCI Express Base 4.0, 7.2.2 (ECAM); PCI Local Bus 3.0, 3.2.2.3.2 (0xcf8 and 0xcfc).
/// Modelled:  one bus of 32 devices with one function each; BARs that the guest moves within the window; INTA of device
///            n on line n modulo 4, shared.
/// Threading: add() before the vCPUs start. After that any vCPU thread; configuration accesses are serialised.
/// Ownership: shares the functions. The services outlive it.
class Host {
 public:
  static constexpr u64 kEcamSize = u64{1} << 20;
  explicit Host(Services services, Layout layout = {});
  ~Host();
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  /// Puts a function at the next free device number, with its BARs placed and decoded, as firmware leaves them.
  Status add(std::shared_ptr<Function> function);
  /// Claims the ports, the ECAM range and the window.
  Status attach(devices::Bus& ports, devices::Bus& memory);

  const Layout& layout() const { return layout_; }

 private:
  class Ecam;
  class ConfigAddress;
  class ConfigData;
  class Window;
  struct Route {
    u64 start, last;
    std::shared_ptr<Function> function;
    u8 bar;
  };
  void read_config(u32 device, u32 function, u32 offset, std::span<u8> data);
  void write_config(u32 device, u32 function, u32 offset, std::span<const u8> data);
  void rebuild_routes();
  bool find(u64 address, Route& route) const;
  void set_intx(u32 device, bool level);

  const Services services_;
  const Layout layout_;
  std::mutex config_mutex_;
  std::array<std::shared_ptr<Function>, 32> functions_;
  u32 config_address_ = 0;      // guarded by config_mutex_
  u32 next_device_ = 0;
  u64 next_bar_;
  mutable std::shared_mutex routes_mutex_;
  std::vector<Route> routes_;   // guarded by routes_mutex_
  std::mutex lines_mutex_;      // held while a line is set, so that levels arrive in order
  std::array<u32, 32> raised_{};  // by line: a bit a device
};

}  // namespace ring3::pci
