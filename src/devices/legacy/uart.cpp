#include "devices/legacy/uart.hpp"

#include <algorithm>

namespace ring3::devices {
namespace {
enum : u8 { kRbrThr = 0, kIer = 1, kIirFcr = 2, kLcr = 3, kMcr = 4, kLsr = 5, kMsr = 6, kScr = 7 };

constexpr u8 kIerRda = 1, kIerThre = 2, kIerRls = 4, kIerMs = 8;
constexpr u8 kIirNone = 1, kIirMs = 0, kIirThre = 2, kIirRda = 4, kIirTimeout = 0xc, kIirRls = 6;
constexpr u8 kFcrEnable = 1, kFcrClearRx = 2;
constexpr u8 kLcrDlab = 0x80;
constexpr u8 kMcrDtr = 1, kMcrRts = 2, kMcrOut1 = 4, kMcrOut2 = 8, kMcrLoop = 0x10;
constexpr u8 kLsrDr = 1, kLsrOe = 2, kLsrThre = 0x20, kLsrTemt = 0x40, kLsrErrors = 0x1e;
constexpr u8 kMsrCts = 0x10, kMsrDsr = 0x20, kMsrRi = 0x40, kMsrDcd = 0x80;
constexpr u8 kTrigger[4] = {1, 4, 8, 14};
}  // namespace

void Uart::read(u64 offset, std::span<u8> data) {
  bool freed = false;
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) data[i] = read_register(offset + i, freed);
    update_irq();
    freed = freed && refused_ && queue_.size() <= kQueue / 2;
    if (freed) refused_ = false;
  }
  if (freed && config_.on_room) config_.on_room();
}

void Uart::write(u64 offset, std::span<const u8> data) {
  bool freed = false;
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < data.size() && offset + i < kPorts; i++) write_register(offset + i, data[i]);
    if (refill() && refused_ && queue_.size() <= kQueue / 2) {
      freed = true;
      refused_ = false;
    }
    update_irq();
  }
  if (freed && config_.on_room) config_.on_room();
}

u8 Uart::read_register(u64 offset, bool& freed) {
  switch (offset) {
    case kRbrThr: {  // datasheet 8.1; DLAB: divisor latch, 8.3
      if (lcr_ & kLcrDlab) return dll_;
      u8 value = 0;
      if (!fifo_.empty()) {
        value = fifo_.front();
        fifo_.pop_front();
      }
      freed |= refill();
      return value;
    }
    case kIer:
      return (lcr_ & kLcrDlab) ? dlm_ : ier_;
    case kIirFcr: {  // 8.6: reading it clears the THRE interrupt when that is the one reported
      const u8 id = interrupt_id();
      if (id == kIirThre) thre_pending_ = false;
      return static_cast<u8>(id | ((fcr_ & kFcrEnable) ? 0xc0 : 0));
    }
    case kLcr:
      return lcr_;
    case kMcr:
      return mcr_;
    case kLsr: {  // 8.4: errors clear on read
      const u8 value = static_cast<u8>((fifo_.empty() ? 0 : kLsrDr) | lsr_errors_ | kLsrThre | kLsrTemt);
      lsr_errors_ = 0;
      return value;
    }
    case kMsr: {  // 8.8: deltas clear on read
      const u8 value = static_cast<u8>(msr_lines() | msr_delta_);
      msr_delta_ = 0;
      return value;
    }
    default:
      return scr_;
  }
}

void Uart::write_register(u64 offset, u8 value) {
  switch (offset) {
    case kRbrThr:
      if (lcr_ & kLcrDlab) {
        dll_ = value;
      } else {
        if (mcr_ & kMcrLoop) {
          push_fifo(value);
        } else if (config_.transmit) {
          config_.transmit(value);
        }
        thre_pending_ = true;  // the holding register is empty again at once
      }
      break;
    case kIer:
      if (lcr_ & kLcrDlab) {
        dlm_ = value;
      } else {
        // 8.7: enabling the THRE interrupt while the register is empty raises it.
        if ((value & kIerThre) && !(ier_ & kIerThre)) thre_pending_ = true;
        ier_ = value & 0x0f;
      }
      break;
    case kIirFcr:  // 8.5: a change of bit 0 clears both FIFOs
      if (((value ^ fcr_) & kFcrEnable) || (value & kFcrClearRx)) fifo_.clear();
      fcr_ = (value & kFcrEnable) ? value & 0xc9 : 0;
      break;
    case kLcr:
      lcr_ = value;
      break;
    case kMcr: {
      const u8 before = msr_lines();
      mcr_ = value & 0x1f;
      const u8 after = msr_lines();
      const u8 changed = before ^ after;
      // 8.8: CTS, DSR, DCD report any change, RI only its trailing edge.
      if (changed & kMsrCts) msr_delta_ |= 1;
      if (changed & kMsrDsr) msr_delta_ |= 2;
      if ((changed & kMsrRi) && !(after & kMsrRi)) msr_delta_ |= 4;
      if (changed & kMsrDcd) msr_delta_ |= 8;
      break;
    }
    case kScr:
      scr_ = value;
      break;
    default:  // LSR and MSR: factory test writes are ignored
      break;
  }
}

void Uart::push_fifo(u8 byte) {
  if (fifo_.size() < fifo_depth()) {
    fifo_.push_back(byte);
  } else {
    lsr_errors_ |= kLsrOe;
  }
}

bool Uart::refill() {
  const bool open = !(mcr_ & kMcrLoop) && ((mcr_ & kMcrRts) || (ier_ & kIerRda));
  bool moved = false;
  while (open && !queue_.empty() && fifo_.size() < fifo_depth()) {
    fifo_.push_back(queue_.front());
    queue_.pop_front();
    moved = true;
  }
  return moved;
}

u8 Uart::msr_lines() const {
  if (!(mcr_ & kMcrLoop)) return kMsrCts | kMsrDsr | kMsrDcd;
  return static_cast<u8>(((mcr_ & kMcrRts) ? kMsrCts : 0) | ((mcr_ & kMcrDtr) ? kMsrDsr : 0) |
                         ((mcr_ & kMcrOut1) ? kMsrRi : 0) | ((mcr_ & kMcrOut2) ? kMsrDcd : 0));
}

u8 Uart::interrupt_id() const {  // 8.6, table IV: by priority
  if ((ier_ & kIerRls) && (lsr_errors_ & kLsrErrors)) return kIirRls;
  if ((ier_ & kIerRda) && !fifo_.empty()) {
    if (!(fcr_ & kFcrEnable) || fifo_.size() >= kTrigger[fcr_ >> 6]) return kIirRda;
    return kIirTimeout;
  }
  if ((ier_ & kIerThre) && thre_pending_) return kIirThre;
  if ((ier_ & kIerMs) && msr_delta_) return kIirMs;
  return kIirNone;
}

void Uart::update_irq() {
  const bool level = interrupt_id() != kIirNone;
  if (level == line_) return;
  line_ = level;
  if (config_.irq) config_.irq(level);
}

std::size_t Uart::room() const {
  std::lock_guard lock(mutex_);
  return kQueue - queue_.size();
}

std::size_t Uart::receive(std::span<const u8> bytes) {
  std::lock_guard lock(mutex_);
  const std::size_t n = std::min(bytes.size(), kQueue - queue_.size());
  queue_.insert(queue_.end(), bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(n));
  refill();
  if (queue_.size() == kQueue) refused_ = true;
  update_irq();
  return n;
}

Uart::State Uart::state() const {
  std::lock_guard lock(mutex_);
  State s;
  s.ier = ier_, s.lcr = lcr_, s.mcr = mcr_, s.lsr_errors = lsr_errors_, s.msr_delta = msr_delta_;
  s.scr = scr_, s.dll = dll_, s.dlm = dlm_, s.fcr = fcr_, s.thre_pending = thre_pending_;
  s.fifo.assign(fifo_.begin(), fifo_.end());
  s.queue.assign(queue_.begin(), queue_.end());
  return s;
}

void Uart::restore(const State& s) {
  std::lock_guard lock(mutex_);
  ier_ = s.ier & 0x0f, lcr_ = s.lcr, mcr_ = s.mcr & 0x1f, lsr_errors_ = s.lsr_errors & kLsrErrors;
  msr_delta_ = s.msr_delta & 0x0f, scr_ = s.scr, dll_ = s.dll, dlm_ = s.dlm;
  fcr_ = (s.fcr & kFcrEnable) ? s.fcr & 0xc9 : 0, thre_pending_ = s.thre_pending;
  const auto cut = [](const std::vector<u8>& v, std::size_t n) {
    return std::deque<u8>(v.begin(), v.begin() + static_cast<std::ptrdiff_t>(std::min(v.size(), n)));
  };
  fifo_ = cut(s.fifo, fifo_depth());
  queue_ = cut(s.queue, kQueue);
  update_irq();
}

}  // namespace ring3::devices
