#include "engine/irq/pic.hpp"

#include <cstring>

namespace ring3::engine {
namespace {

constexpr unsigned kCascade = 2;
constexpr unsigned kNone = 8;

constexpr u8 bit(unsigned n) { return static_cast<u8>(1u << (n & 7)); }

}  // namespace

Pic::Pic(std::function<void()> output_raised, std::function<void(unsigned)> acked,
         std::function<void(u32)> unmasked)
    : raised_(std::move(output_raised)), acked_(std::move(acked)), unmasked_(std::move(unmasked)) {
  reset();
}

void Pic::reset() {
  const std::lock_guard lock(mutex_);
  std::memset(chips_, 0, sizeof chips_);
  // IRQ 0, 1, 2, 8 and 13 are always edge triggered.
  chips_[0].elcr_mask = 0xf8;
  chips_[1].elcr_mask = 0xde;
  output_.store(false, std::memory_order_release);
}

// Distance of the highest-priority line in mask from the one that is highest at present; kNone: no line.
unsigned Pic::priority(const kvm_pic_state& c, u8 mask) {
  for (unsigned p = 0; p < 8; ++p) {
    if (mask & bit(p + c.priority_add)) return p;
  }
  return kNone;
}

// The line the chip would raise INTR for, or -1.
int Pic::request(unsigned chip) const {
  const kvm_pic_state& c = chips_[chip];
  const unsigned wanted = priority(c, static_cast<u8>(c.irr & ~c.imr));
  if (wanted == kNone) return -1;
  u8 in_service = c.isr;
  // Special mask mode: a masked line in service blocks nobody.
  if (c.special_mask) in_service = static_cast<u8>(in_service & ~c.imr);
  // Special fully nested mode: the slave may interrupt its own service.
  if (chip == 0 && c.special_fully_nested_mode) in_service = static_cast<u8>(in_service & ~bit(kCascade));
  const unsigned current = priority(c, in_service);
  if (wanted < current) return static_cast<int>((wanted + c.priority_add) & 7);
  return -1;
}

// The input of one line (0–15). -1 masked, 0 merged, 1 accepted.
int Pic::set_input(unsigned irq, bool level) {
  kvm_pic_state& c = chips_[irq >> 3];
  const u8 b = bit(irq);
  int result = 1;
  if (level) {
    if ((c.elcr & b) || !(c.last_irr & b)) {
      result = !(c.irr & b);
      c.irr |= b;
    }
    c.last_irr |= b;
  } else {
    if (c.elcr & b) c.irr &= static_cast<u8>(~b);
    c.last_irr &= static_cast<u8>(~b);
  }
  return c.imr & b ? -1 : result;
}

// Recomputes the cascade and INTR.
void Pic::update() {
  if (request(1) >= 0) {
    // A pulse, so that the next request of the slave is an edge again.
    set_input(kCascade, true);
    set_input(kCascade, false);
  }
  output_.store(request(0) >= 0, std::memory_order_release);
}

void Pic::end(unsigned chip, unsigned irq, Told* told) {
  chips_[chip].isr &= static_cast<u8>(~bit(irq));
  told->acked |= 1u << ((irq & 7) + 8 * chip);
}

void Pic::tell(const Told& told) {
  if (!told.was_high && output()) raised_();
  for (unsigned i = 0; i < 16; ++i) {
    if (told.acked >> i & 1) acked_(i);
  }
  if (told.unmasked) unmasked_(told.unmasked);
}

int Pic::set_line(unsigned irq, unsigned source, bool level) {
  if (irq >= 16 || source >= 32) return -1;
  Told told;
  int result;
  {
    const std::lock_guard lock(mutex_);
    told.was_high = output_.load(std::memory_order_relaxed);
    u32& sources = sources_[irq];
    sources = level ? sources | 1u << source : sources & ~(1u << source);
    result = set_input(irq, sources != 0);
    update();
  }
  tell(told);
  return result;
}

// An acknowledged line goes into service; with AEOI its service ends at once.
void Pic::take(unsigned chip, unsigned irq, Told* told) {
  kvm_pic_state& c = chips_[chip];
  c.isr |= bit(irq);
  if (!(c.elcr & bit(irq))) c.irr &= static_cast<u8>(~bit(irq));
  if (c.auto_eoi) {
    if (c.rotate_on_auto_eoi) c.priority_add = static_cast<u8>((irq + 1) & 7);
    end(chip, irq, told);
  }
}

u8 Pic::ack() {
  Told told;
  u8 vector;
  {
    const std::lock_guard lock(mutex_);
    const int line = request(0);
    if (line < 0) {
      vector = static_cast<u8>(chips_[0].irq_base + 7);  // the request went away: spurious
    } else {
      take(0, static_cast<unsigned>(line), &told);
      vector = static_cast<u8>(chips_[0].irq_base + line);
      if (line == kCascade) {
        const int second = request(1);
        if (second >= 0) take(1, static_cast<unsigned>(second), &told);
        vector = static_cast<u8>(chips_[1].irq_base + (second < 0 ? 7 : second));
      }
    }
    update();
  }
  // INTR falls during the acknowledgement, so that a further request raises it anew.
  told.was_high = false;
  tell(told);
  return vector;
}

// ICW1: the edge detector is reset, masks and priorities too (8259A, "Initialization").
void Pic::initialise(unsigned chip, u8 icw1, Told* told) {
  kvm_pic_state& c = chips_[chip];
  c.init4 = icw1 & 1;
  const u8 edges = static_cast<u8>(c.irr & ~c.elcr);
  c.last_irr = 0;
  c.irr &= c.elcr;
  c.imr = c.isr = 0;
  c.priority_add = c.special_mask = c.read_reg_select = c.poll = 0;
  if (!c.init4) c.special_fully_nested_mode = c.auto_eoi = 0;
  c.init_state = 1;
  // Requests that are forgotten count as ended: somebody may wait for it.
  told->acked |= static_cast<u32>(edges) << (8 * chip);
}

void Pic::write_command(unsigned chip, u8 value, Told* told) {
  kvm_pic_state& c = chips_[chip];
  if (value & 0x10) {
    initialise(chip, value, told);
    return;
  }
  if (value & 0x08) {  // OCW3
    if (value & 0x04) c.poll = 1;
    if (value & 0x02) c.read_reg_select = value & 1;
    if (value & 0x40) c.special_mask = value >> 5 & 1;
    return;
  }
  const unsigned named = value & 7;  // OCW2
  switch (value >> 5) {
    case 0:
      c.rotate_on_auto_eoi = 0;
      break;
    case 4:
      c.rotate_on_auto_eoi = 1;
      break;
    case 1:
    case 5: {  // non-specific EOI, and with rotation
      u8 in_service = c.isr;
      if (c.special_mask) in_service = static_cast<u8>(in_service & ~c.imr);
      const unsigned p = priority(c, in_service);
      if (p == kNone) break;
      const unsigned irq = (p + c.priority_add) & 7;
      if (value >> 5 == 5) c.priority_add = static_cast<u8>((irq + 1) & 7);
      end(chip, irq, told);
      break;
    }
    case 3:
      end(chip, named, told);
      break;
    case 7:
      c.priority_add = static_cast<u8>((named + 1) & 7);
      end(chip, named, told);
      break;
    case 6:
      c.priority_add = static_cast<u8>((named + 1) & 7);
      break;
    default:
      break;
  }
}

void Pic::write_data(unsigned chip, u8 value, Told* told) {
  kvm_pic_state& c = chips_[chip];
  switch (c.init_state) {
    case 1:
      c.irq_base = value & 0xf8;
      c.init_state = 2;
      break;
    case 2:
      c.init_state = c.init4 ? 3 : 0;
      break;  // the cascade's wiring is fixed
    case 3:
      c.special_fully_nested_mode = value >> 4 & 1;
      c.auto_eoi = value >> 1 & 1;
      c.init_state = 0;
      break;
    default:
      told->unmasked |= static_cast<u32>(c.imr & ~value) << (8 * chip);
      c.imr = value;
      break;
  }
}

// The read after OCW3's poll command acknowledges as INTA does.
u8 Pic::poll(unsigned chip, Told* told) {
  chips_[chip].poll = 0;
  const int line = request(chip);
  if (line < 0) return 0x07;
  // Who polls the slave has answered its request to the master.
  if (chip == 1) chips_[0].irr &= static_cast<u8>(~bit(kCascade));
  take(chip, static_cast<unsigned>(line), told);
  return static_cast<u8>(0x80 | line);
}

void Pic::write(u16 port, u8 value) {
  if (!handles(port)) return;
  Told told;
  {
    const std::lock_guard lock(mutex_);
    told.was_high = output_.load(std::memory_order_relaxed);
    if (port >= 0x4d0) {
      chips_[port & 1].elcr = value & chips_[port & 1].elcr_mask;
      return;
    }
    const unsigned chip = port >> 7 & 1;
    if (port & 1) {
      write_data(chip, value, &told);
    } else {
      write_command(chip, value, &told);
    }
    update();
  }
  tell(told);
}

u8 Pic::read(u16 port) {
  if (!handles(port)) return 0xff;
  Told told;
  u8 value;
  {
    const std::lock_guard lock(mutex_);
    told.was_high = output_.load(std::memory_order_relaxed);
    if (port >= 0x4d0) return chips_[port & 1].elcr;
    const unsigned chip = port >> 7 & 1;
    const kvm_pic_state& c = chips_[chip];
    if (!c.poll) return port & 1 ? c.imr : c.read_reg_select ? c.isr : c.irr;
    value = poll(chip, &told);
    update();
  }
  tell(told);
  return value;
}

void Pic::get_state(unsigned chip, kvm_pic_state* out) const {
  const std::lock_guard lock(mutex_);
  *out = chips_[chip & 1];
}

void Pic::set_state(unsigned chip, const kvm_pic_state& in) {
  Told told;
  {
    const std::lock_guard lock(mutex_);
    told.was_high = output_.load(std::memory_order_relaxed);
    kvm_pic_state& c = chips_[chip & 1];
    c = in;
    // What serves as an index is confined to what the chip can hold.
    c.priority_add &= 7;
    c.init_state &= 3;
    update();
  }
  tell(told);
}

}  // namespace ring3::engine
