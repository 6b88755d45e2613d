#pragma once
#include <array>
#include <atomic>
#include <memory>

#include "base/types.hpp"
#include "engine/hyperv/partition.hpp"
#include "engine/irq/lapic.hpp"
#include "engine/timer/timer_queue.hpp"

/// A virtual processor's synthetic interrupt controller and its four synthetic timers.
///
/// Spec:      TLFS "Virtual interrupts" (SynIC, message page) and "Timers".
/// Deviation: a periodic timer comes every 200 µs at most.
/// Threading: the vCPU's owner, but for what stands under "any thread".
namespace ring3::engine::hv {

class Processor;

class Synic final : public VectorListener {
 public:
  Synic(Partition& partition, Host& host, Processor& processor, TimerQueue& timers, const Tsc& tsc, Lapic* lapic,
        const std::atomic<u32>& vp_index);
  ~Synic() override;
  Synic(const Synic&) = delete;
  Synic& operator=(const Synic&) = delete;

  void activate(bool zero_pages);

  /// SCONTROL to EOM, and SINTx. False: #GP.
  bool read_msr(u32 index, bool host, u64* value) const;
  bool write_msr(u32 index, bool host, u64 value);
  /// STIMERx. direct: CPUID lets the guest use direct mode.
  u64 read_stimer(u32 index) const;
  bool write_stimer(u32 index, bool host, bool direct, u64 value);

  u64 control() const { return control_; }
  u64 event_page() const { return event_page_; }
  u64 message_page() const { return message_page_; }

  /// Timers that expired are delivered, others armed anew. Between instructions.
  void process_timers();

  // VectorListener
  bool auto_eoi(u8 vector) const override;
  void eoi(u8 vector) override;

  // --- any thread ---
  bool active() const { return active_.load(std::memory_order_acquire); }
  bool timers_pending() const { return pending_.load(std::memory_order_relaxed) != 0; }
  /// Raises the vector of a SINT: as Lapic::accept(); -EINVAL: no such SINT, or no SynIC; -ENOENT: masked.
  int raise(u32 sint);

 private:
  struct Stimer {
    u64 config = 0, count = 0;
    u64 expires = 0;       // reference time; 0: not running
    bool undelivered = false;  // expired, and its message's slot was not free
    std::unique_ptr<TimerQueue::Timer> timer;
  };
  void mark(unsigned timer);
  void stop(Stimer& t, unsigned index);
  void start(Stimer& t, unsigned index);
  void expire(Stimer& t, unsigned index);
  /// 0: delivered, or given up as a periodic timer's may be; else later again.
  bool send_message(const Stimer& t, unsigned index);
  void acked(u32 sint);
  bool clear_page(u64 value, bool host);

  Partition& partition_;
  Host& host_;
  Processor& processor_;
  TimerQueue& queue_;
  const Tsc& tsc_;
  Lapic* const lapic_;
  const std::atomic<u32>& vp_index_;
  std::atomic<bool> active_{false};
  bool zero_pages_ = false;
  u64 control_ = 0, version_ = 1, event_page_ = 0, message_page_ = 0;
  std::array<std::atomic<u64>, kSints> sint_;
  std::array<Stimer, kStimers> stimers_;
  std::atomic<u32> pending_{0};
};

}  // namespace ring3::engine::hv
