#pragma once
#include "base/linux_kvm.hpp"

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "base/types.hpp"
#include "base/unique_fd.hpp"
#include "base/wake_pipe.hpp"
#include "engine/irq/irq_chip.hpp"

/// eventfds tied to a VM: ioeventfds (a guest write signals one) and irqfds (one raises a GSI).
///
/// Spec:      virt/kvm/api KVM_IOEVENTFD, KVM_IRQFD.
/// Ownership: an ioeventfd holds a duplicate of the caller's fd. An irqfd holds none: it ends with DEASSIGN, the VM, or the
///            last of the eventfd's fds in any process, as the kernel's.
/// Threading: any thread.
namespace ring3::engine::abi {

struct IoEventfd {
  UniqueFd fd;
  u64 id = 0;  ///< identity of the eventfd
  u64 address = 0;
  u32 length = 0;  ///< 0: any
  u64 datamatch = 0;
  bool wildcard = true;
  bool pio = false;
};

class IoEventfds {
 public:
  using List = std::vector<std::shared_ptr<const IoEventfd>>;
  static constexpr std::size_t kMax = 1000;

  /// KVM_IOEVENTFD. 0 or -errno.
  int change(const kvm_ioeventfd& request);

  /// One vCPU's copy of the list.
  class View {
   public:
    explicit View(const IoEventfds& owner) : owner_(owner) {}
    /// Whether a write is an ioeventfd's, which is then signalled. size 1 to 8.
    bool signal(bool pio, u64 address, unsigned size, const void* data) {
      const u64 now = owner_.generation_.load(std::memory_order_acquire);
      if (now != generation_) [[unlikely]] refresh();
      return !list_->empty() && signal_slow(pio, address, size, data);
    }

   private:
    void refresh();
    bool signal_slow(bool pio, u64 address, unsigned size, const void* data);
    const IoEventfds& owner_;
    u64 generation_ = 0;
    std::shared_ptr<const List> list_;
  };

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const List> list_ = std::make_shared<List>();  // guarded by mutex_
  std::atomic<u64> generation_{1};
};

/// A thread waits for the eventfds by epoll, which forgets a file with its last fd; it starts with the first one.
class Irqfds {
 public:
  explicit Irqfds(IrqChip& chip) : chip_(chip) {}
  ~Irqfds();
  Irqfds(const Irqfds&) = delete;
  Irqfds& operator=(const Irqfds&) = delete;

  /// KVM_IRQFD. 0 or -errno. After a DEASSIGN returns, no event of it is being delivered.
  int change(const kvm_irqfd& request);
  /// The same of a VM that has no irqchip, and so no irqfds.
  static int without_irqchip(const kvm_irqfd& request);

 private:
  struct Irqfd {
    int fd = -1;  // the VMM's: it may be closed by now, and another file's
    UniqueFd resample;
    u64 id = 0;
    u32 gsi = 0;
    u64 notifier = 0;  // of a resampler
    bool unread = false;  // delivered, and its count stands: only another process had it
  };
  using Map = std::map<u64, std::shared_ptr<Irqfd>>;  // by the key that epoll has
  int assign(const kvm_irqfd& request);
  int deassign(const kvm_irqfd& request);
  void thread_main();
  /// Delivers all that epoll knows of. False: the thread is to end.
  bool serve_locked();
  int start_locked();
  bool watched_locked(int fd);
  bool consume_locked(Irqfd& irqfd);
  void deliver_locked(const Irqfd& irqfd);
  void forget_closed_locked();
  Map::iterator erase_locked(Map::iterator it);

  IrqChip& chip_;
  std::mutex mutex_;  // held while events are delivered
  Map irqfds_;        // those whose eventfd was closed stand until somebody looks
  u64 next_key_ = 1;
  UniqueFd epoll_;
  WakePipe stop_;
  std::thread thread_;
};

/// A number that two fds of one eventfd share. -errno (as a negative number) when fd is no eventfd.
i64 eventfd_identity(int fd);

}  // namespace ring3::engine::abi
