#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "base/unique_fd.hpp"
#include "devices/pci/function.hpp"
#include "devices/pci/msix.hpp"
#include "devices/virtio/core/device.hpp"

namespace ring3::virtio {

/// A virtio device as a PCI function: modern virtio-pci.
///
/// Spec:      VIRTIO 1.2, 4.1; no legacy interface.
/// Modelled:  common, notify, ISR, device and PCI configuration access structures; MSI-X with a vector for the
///            configuration and one a queue, INTx without it; queue reset where the device can.
/// Kicks:     an ioeventfd a queue where there are some, else the write signals the queue's eventfd: the device's threads
///            see no difference, and no vCPU thread serves a queue, but of devices that want it so (Device::takes_kicks).
/// Frozen:    features at FEATURES_OK; a queue's size and addresses from queue_enable on, and everything at DRIVER_OK.
/// Threading: any thread. mutex_ guards the registers and is held over the device's start() and stop(); the interrupt
///            side (Transport, Queue hooks) takes only irq_mutex_, since the device's threads use it.
/// Lifetime:  stops the device when it goes.
class VirtioPci final : public pci::Function, public Transport {
 public:
  static Result<std::shared_ptr<VirtioPci>> create(std::shared_ptr<Device> device, const memory::GuestMemory& memory);
  ~VirtioPci() override;

  void read_bar(u8 bar, u64 offset, std::span<u8> data) override;
  void write_bar(u8 bar, u64 offset, std::span<const u8> data) override;

  void config_changed() override;
  void needs_reset(const std::string& why) override;

  // Where things lie in BAR 0.
  static constexpr u64 kCommon = 0x0000, kIsr = 0x1000, kDevice = 0x2000, kNotify = 0x3000, kMsixTable = 0x4000,
                       kMsixPba = 0x5000, kBarSize = 0x8000;

 private:
  struct QueueRegisters {
    u16 size = 0, most = 0;
    u64 descriptors = 0, driver = 0, device = 0;
    bool enabled = false;
    UniqueFd kick;
    bool ioeventfd = false;         // registered
    std::unique_ptr<Queue> queue;   // between start and stop
  };
  VirtioPci(std::shared_ptr<Device> device, const memory::GuestMemory& memory, const Identity& identity);
  Status make_queues();
  void make_capabilities();

  void config_read(u32 offset, std::span<u8> data) override;
  void config_written(u32 offset, std::span<const u8> data) override;
  void decode_changed() override;

  // Under mutex_ (registers.cpp).
  u64 offered() const;
  void read_common(u64 offset, std::span<u8> data);
  void write_common(u64 offset, std::span<const u8> data);
  void write_status(u8 value);
  void start();
  void stop();
  bool open_queue(u16 index);
  void enable_queue(u16 index);
  void reset_queue(u16 index);
  bool queue_is_open_to_change(const QueueRegisters& q) const;
  void set_ioeventfds(bool on);

  void kick(u64 index);
  void interrupt_queue(u16 index);
  void interrupt_config();
  void raise_locked(u16 vector, u8 isr);
  void update_intx_locked();

  std::shared_ptr<Device> device_;
  const memory::GuestMemory& memory_;
  pci::Msix msix_;
  u32 cfg_access_ = 0;   // offset of the PCI configuration access capability
  u32 msix_cap_ = 0;

  std::mutex mutex_;
  u32 device_feature_select_ = 0, driver_feature_select_ = 0;
  u64 driver_features_ = 0;
  u16 queue_select_ = 0;
  std::vector<QueueRegisters> queues_;
  std::atomic<u8> status_{0};
  bool running_ = false;
  std::shared_ptr<std::atomic<bool>> broken_;
  std::atomic<u64> bar_address_{0};   // of BAR 0 when it is decoded, else 0
  u64 registered_at_ = 0;             // where the ioeventfds are

  std::mutex irq_mutex_;
  u8 isr_ = 0;
  bool intx_disabled_ = false, intx_level_ = false;
  u16 config_vector_ = 0xffff;
  std::vector<u16> queue_vectors_;
  std::atomic<u8> generation_{0};
};

}  // namespace ring3::virtio
