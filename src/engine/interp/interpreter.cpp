#include "engine/interp/interpreter.hpp"

#include <optional>

#include "engine/interp/block_cache.hpp"
#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"

namespace ring3::engine {
namespace {

namespace dr6 {
constexpr u64 BS = 1u << 14;
}

}  // namespace

struct Interpreter::Impl {
  Impl(VcpuState& state, Mmu& m, Environment& e, std::size_t cache_bytes) : c(state, m, e), cache(cache_bytes, m) {}

  Context c;
  BlockCache cache;
  u64 dr6 = 0;
  u8 vector = 0;
  u64 held_db = 0;  ///< DR6 bits of data breakpoints that a MOV SS shadow holds back
  unsigned max_insns = BlockCache::kMaxInsns;
  // For rewind(): the block that runs and where it began, or the single instruction.
  Block* running = nullptr;
  u64 running_rip = 0;
  bool stepping = false, step_sti = false, step_mov_ss = false, step_rf = false;

  using Ended = std::optional<Result>;

  Result run(u64 budget);
  Result execute(const DecodedInsn& insn, Handler handler);
  Result run_one();
  Ended step();
  void rewind();
  Block* lookup(u64 linear, u64 key, bool single);
  Ended stopped(const DecodedInsn* insn, bool* retired);
  Ended raise(const Event& event);
  Ended trap_debug(u64 bits);
  Result debug(u8 v, u64 bits) {
    vector = v;
    dr6 = bits;
    return Result::Debug;
  }

  u64 linear_rip() const { return c.code64 ? c.s.rip : static_cast<u32>(c.s.seg[CS].base + c.s.rip); }
  static u64 jump_key(u64 linear, u32 mode) { return (linear & 0xffff'ffff'ffffull) | static_cast<u64>(mode | 0x8000) << 48; }
  u64 execute_hits(u64 linear) const;
  /// What makes the next instruction run alone.
  bool special() const {
    const VcpuState& s = c.s;
    return c.slow_step || s.sti_shadow || s.mov_ss_shadow || (s.rflags & rflags::RF) || c.env.replaying;
  }
};

/// The engine was cut off in the middle of an instruction (GuestMemoryTrap), which has changed nothing but RIP, or
/// elements of a string: back to its beginning.
void Interpreter::Impl::rewind() {
  VcpuState& s = c.s;
  if (c.split_lock != nullptr) std::exchange(c.split_lock, nullptr)->clear(std::memory_order_release);
  if (stepping) {
    s.rip = running_rip;
    s.sti_shadow = step_sti;
    s.mov_ss_shadow = step_mov_ss;
    if (step_rf) s.rflags |= rflags::RF;
  } else if (running != nullptr) {
    u64 at = running_rip;
    for (unsigned i = 0; i < running->count; i++) {
      const u64 next = at + running->insns()[i].insn.length;
      if (next == s.rip) {
        s.rip = at;
        break;
      }
      at = next;
    }
  }
  stepping = false;
  running = nullptr;
}

/// Enabled execute breakpoints at linear, as DR6 bits.
u64 Interpreter::Impl::execute_hits(u64 linear) const {
  const u64 dr7 = c.guest_debug_hw_bp ? c.guest_dr7 : c.s.dr7;
  const u64* dr = c.guest_debug_hw_bp ? c.guest_dr : c.s.dr;
  u64 hits = 0;
  for (unsigned n = 0; n < 4; n++) {
    const bool enabled = dr7 >> (2 * n) & 3;
    const bool execute = (dr7 >> (16 + 4 * n) & 15) == 0;
    if (enabled && execute && dr[n] == linear) hits |= 1ull << n;
  }
  return hits;
}

/// The block at linear, through a fetch with all of its checks. null: stop() says why.
Block* Interpreter::Impl::lookup(u64 linear, u64 key, bool single) {
  const u64 generation = c.mmu.fetch_generation();
  if (c.code64 && !canonical(linear)) {
    c.gp0();
    return nullptr;
  }
  BlockCache::Source source;
  source.linear = linear;
  if (!c.mmu.fetch(linear, &source.gpa, &source.host)) return nullptr;
  if (source.host == nullptr) {
    no_code(c);
    return nullptr;
  }
  source.mode = (c.fetch_key & ~BlockCache::kUserBit) | (single ? BlockCache::kSingle : 0);
  Block* b = cache.get(c, source, single ? 1 : max_insns);
  if (b != nullptr && b->mode == source.mode && b->gpa == source.gpa) cache.remember(key, generation, b);
  return b;
}

/// Delivers an event; s.rip is its return address.
Interpreter::Impl::Ended Interpreter::Impl::raise(const Event& event) {
  if (c.event_filter && c.event_filter(event)) return debug(event.vector, event.payload);
  switch (deliver_event(c, event)) {
    case Delivered::Ok: return std::nullopt;
    case Delivered::Exit: return Result::Exit;
    case Delivered::TripleFault: return Result::TripleFault;
  }
  return Result::TripleFault;
}

/// A #DB trap between instructions. Kept in s.exception when the VMM must act before it can be delivered.
Interpreter::Impl::Ended Interpreter::Impl::trap_debug(u64 bits) {
  Event e;
  e.vector = vec::DB;
  e.payload = bits;
  const Ended ended = raise(e);
  if (ended == Result::Exit) {
    c.s.exception = PendingException{};
    c.s.exception.pending = true;
    c.s.exception.vector = vec::DB;
    c.s.exception.has_payload = true;
    c.s.exception.payload = bits;
  }
  return ended;
}

/// A handler (or a fetch: insn null) stopped; s.rip is past the instruction.
Interpreter::Impl::Ended Interpreter::Impl::stopped(const DecodedInsn* insn, bool* retired) {
  VcpuState& s = c.s;
  const Stop stop = c.stop();
  const u64 after = s.rip;
  const u64 start = insn != nullptr ? after - insn->length : after;
  *retired = false;
  if (stop.kind == Stop::Kind::Exit) {
    s.rip = start;
    return Result::Exit;
  }
  Event e;
  e.vector = stop.vector;
  e.has_error = stop.has_error;
  e.error = stop.error;
  e.payload = stop.payload;
  if (stop.kind == Stop::Kind::Trap && insn != nullptr) {
    const Op op = insn->op;
    if (op == Op::Int3 && c.guest_debug_sw_bp) {
      s.rip = start;
      return debug(vec::BP, 0);
    }
    if (op == Op::Sysret) {  // it is done, and nothing of it can be executed again
      *retired = true;
      if (c.env.replaying) c.env.retired();
      return trap_debug(dr6::BS);
    }
    if (op == Op::Int1) e.type = Event::Type::PrivilegedSoftware;
    if (stop.soft) e.type = op == Op::Int ? Event::Type::Software : Event::Type::SoftwareException;
    *retired = true;
  } else {
    s.rip = start;
    if (insn != nullptr && insn->op == Op::MovDr && stop.vector == vec::DB && c.guest_debug_hw_bp) {
      return debug(vec::DB, stop.payload);  // DR7.GD
    }
  }
  const bool replaying = c.env.replaying;
  stepping = true;  // cut off in here, the instruction is executed and raises it again
  running_rip = start;
  step_sti = step_mov_ss = step_rf = false;
  const Ended ended = raise(e);
  stepping = false;
  if (ended == Result::Exit) {
    s.rip = start;  // executed again, and raised again
    *retired = false;
    return ended;
  }
  if (replaying) c.env.retired();
  s.sti_shadow = s.mov_ss_shadow = false;
  return ended;
}

/// Executes one instruction with everything that can go on around it: shadows, RF, breakpoints, TF.
/// Order of what happens at a boundary: SDM vol. 3A table 6-2 and 17.3.
Interpreter::Impl::Ended Interpreter::Impl::step() {
  VcpuState& s = c.s;
  const bool tf = s.rflags & rflags::TF, rf = s.rflags & rflags::RF;
  const bool sti = s.sti_shadow, mov_ss = s.mov_ss_shadow;
  const bool debugged = c.guest_debug_step;
  const u64 linear = linear_rip(), start = s.rip;
  if (c.slow_step && !rf && (!mov_ss || c.features.amd)) {  // Intel: none behind a MOV SS
    if (const u64 hits = execute_hits(linear)) {
      if (c.guest_debug_hw_bp) return debug(vec::DB, hits);
      s.mov_ss_shadow = false;
      // A fault: its handler returns with RF set, and the instruction runs then.
      s.rflags |= rflags::RF;
      const Ended ended = trap_debug(hits);
      if (ended && c.s.exception.pending) {
        c.s.exception = PendingException{};
        s.rflags &= ~rflags::RF;
      }
      return ended;
    }
  }
  const u64 key = jump_key(linear, c.fetch_key | BlockCache::kSingle);
  Block* b = cache.recall(key, c.mmu.fetch_generation());
  bool retired;
  if (b == nullptr) b = lookup(linear, key, true);
  if (b == nullptr) return stopped(nullptr, &retired);
  CachedInsn& i = b->insns()[0];
  const DecodedInsn insn = i.insn;  // the block may be gone when the handler returns
  if (!c.code64 && static_cast<u32>(start) + static_cast<u64>(insn.length) - 1 > s.seg[CS].limit) {
    c.gp0();
    return stopped(nullptr, &retired);
  }

  s.sti_shadow = s.mov_ss_shadow = false;
  s.rflags &= ~rflags::RF;
  s.rip = start + insn.length;
  stepping = true;
  running_rip = start;
  step_sti = sti;
  step_mov_ss = mov_ss;
  step_rf = rf;
  const Exec e = i.handler(c, i.insn);
  stepping = false;
  if (e == Exec::BlockEnd) return std::nullopt;  // cannot be: the block is alive
  if (e == Exec::Stop) {
    const bool exit = c.stop().kind == Stop::Kind::Exit;
    if (rf && c.stop().kind != Stop::Kind::Trap) s.rflags |= rflags::RF;
    const u64 hits = c.slow_step ? c.mmu.take_breakpoint_hits() : 0;  // void when it did not retire
    const Ended ended = stopped(&insn, &retired);
    if (exit || ended == Result::Exit) {
      s.sti_shadow = sti;
      s.mov_ss_shadow = mov_ss;
      if (rf) s.rflags |= rflags::RF;
      return ended;
    }
    if (retired) {
      c.retired++;
      held_db |= hits;
    }
    if (ended) return ended;
    if (debugged) return debug(vec::DB, dr6::BS);
    // INT1 behind a MOV SS: what was held back is reported with INT1's own #DB. A second one would run
    // on the IST stack that the first has not left.
    if (retired && insn.op == Op::Int1) s.dr6 |= std::exchange(held_db, 0);
    if (held_db != 0) return trap_debug(std::exchange(held_db, 0));
    return std::nullopt;
  }

  c.retired++;
  const bool partial = e == Exec::Branch && s.rip == start && insn.has(kMayFaultAfterPartial);
  if (!partial && c.env.replaying) c.env.retired();
  if (partial && rf) s.rflags |= rflags::RF;  // the same instruction goes on
  if (debugged || c.slow_step || tf) {
    held_db |= c.mmu.take_breakpoint_hits();
    if (c.guest_debug_hw_bp && held_db != 0) return debug(vec::DB, std::exchange(held_db, 0) | (debugged ? dr6::BS : 0));
    if (debugged) return debug(vec::DB, dr6::BS);
    if (s.mov_ss_shadow) return std::nullopt;  // held until after the next instruction
    const bool sampled = insn.op == Op::Syscall || insn.op == Op::Sysret ? (s.rflags & rflags::TF) != 0 : tf;
    const u64 bits = std::exchange(held_db, 0) | (sampled ? dr6::BS : 0);
    if (bits != 0) {
      if (partial) s.rflags |= rflags::RF;
      return trap_debug(bits);
    }
  }
  if (e == Exec::Halt) return Result::Halted;
  return std::nullopt;
}

Interpreter::Result Interpreter::Impl::execute(const DecodedInsn& insn, Handler handler) {
  VcpuState& s = c.s;
  const bool rf = s.rflags & rflags::RF;
  const u64 start = s.rip;
  s.rflags &= ~rflags::RF;
  s.rip = start + insn.length;
  stepping = true;
  running_rip = start;
  step_sti = step_mov_ss = false;
  step_rf = rf;
  const Exec e = handler(c, insn);
  stepping = false;
  if (e == Exec::Stop) {
    const bool exit = c.stop().kind == Stop::Kind::Exit;
    if (rf && c.stop().kind != Stop::Kind::Trap) s.rflags |= rflags::RF;
    bool retired;
    const Ended ended = stopped(&insn, &retired);
    if ((exit || ended == Result::Exit) && rf) s.rflags |= rflags::RF;
    c.retired += retired;
    return ended ? *ended : Result::Budget;
  }
  c.retired++;
  if (rf && e == Exec::Branch && s.rip == start && insn.has(kMayFaultAfterPartial)) s.rflags |= rflags::RF;
  return e == Exec::Halt ? Result::Halted : Result::Budget;
}

Interpreter::Result Interpreter::Impl::run_one() {
  if (c.s.exception.pending) return run(1);
  if (!c.code64) c.s.rip = static_cast<u32>(c.s.rip);
  if (const Ended ended = step()) return *ended;
  return Result::Budget;
}

Interpreter::Result Interpreter::Impl::run(u64 budget) {
  VcpuState& s = c.s;
  const u64 limit = c.retired + budget < c.retired ? ~0ull : c.retired + budget;
  if (s.exception.pending && s.exception.vector == vec::DB && s.exception.has_payload) {
    const u64 bits = s.exception.payload;
    s.exception = PendingException{};
    if (const Ended ended = trap_debug(bits)) return *ended;
  }
  for (;;) {
    // An instruction boundary, with everything looked at.
    if (!s.sti_shadow && !s.mov_ss_shadow) {
      if (c.attention().raised()) return Result::Attention;
      if (c.interrupt_window && (s.rflags & rflags::IF)) return Result::Attention;
    }
    if (c.retired >= limit) return Result::Budget;
    if (!c.code64) s.rip = static_cast<u32>(s.rip);
    // One instruction (what the translator leaves out) needs no block around it.
    if (special() || limit - c.retired == 1) {
      if (const Ended ended = step()) return *ended;
      continue;
    }

    u64 linear = linear_rip();
    u64 key = jump_key(linear, c.fetch_key);
    Block* b = cache.recall(key, c.mmu.fetch_generation());
    if (b == nullptr) {
      b = lookup(linear, key, false);
      if (b == nullptr) {
        bool retired;
        if (const Ended ended = stopped(nullptr, &retired)) return *ended;
        continue;
      }
    }

    // Blocks, one after another, for as long as nothing but near branches lies between them.
    for (;;) {
      if (c.retired + b->count > limit ||
          (!c.code64 && static_cast<u32>(s.rip) + static_cast<u64>(b->bytes) - 1 > s.seg[CS].limit)) [[unlikely]] {
        if (c.retired < limit) {
          if (const Ended ended = step()) return *ended;
        }
        break;
      }
      const CachedInsn* const first = b->insns();
      const CachedInsn* i = first;
      Exec e;
      running = b;
      running_rip = s.rip;
      do {
        s.rip += i->insn.length;
        e = i->handler(c, i->insn);
        ++i;
      } while (e == Exec::Next);
      running = nullptr;
      const u64 n = static_cast<u64>(i - first);
      if (e == Exec::Branch || e == Exec::BlockEnd) [[likely]] {
        c.retired += n - (e == Exec::BlockEnd);
        if (n < b->count || !b->plain_end || b->dead || c.attention().raised()) break;
        if (!c.code64) s.rip = static_cast<u32>(s.rip);
        linear = linear_rip();
        key = jump_key(linear, c.fetch_key);
        const u64 generation = c.mmu.fetch_generation();
        Block::Link* link = &b->links[0];
        if (link->key != key || link->generation != generation || link->to->dead) {
          link = &b->links[1];
          if (link->key != key || link->generation != generation || link->to->dead) {
            Block* next = cache.recall(key, generation);
            if (next == nullptr) break;
            b->links[1] = b->links[0];
            b->links[0] = {key, generation, next};
            b = next;
            continue;
          }
        }
        b = link->to;
        continue;
      }
      if (e == Exec::Halt) {
        c.retired += n;
        return Result::Halted;
      }
      const DecodedInsn insn = i[-1].insn;
      c.retired += n - 1;
      bool retired;
      const Ended ended = stopped(&insn, &retired);
      c.retired += retired;
      if (ended) return *ended;
      break;
    }
  }
}

std::unique_ptr<Interpreter> Interpreter::create(VcpuState& state, Mmu& mmu, Environment& env, std::size_t cache_bytes) {
  auto impl = std::make_unique<Impl>(state, mmu, env, cache_bytes);
  std::unique_ptr<Interpreter> interpreter(new Interpreter(std::move(impl)));
  mmu.set_code_observer(interpreter.get());
  return interpreter;
}
Interpreter::Interpreter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Interpreter::~Interpreter() { impl_->c.mmu.set_code_observer(nullptr); }

Context& Interpreter::context() { return impl_->c; }
Interpreter::Result Interpreter::run_one() { return impl_->run_one(); }
Interpreter::Result Interpreter::run(u64 budget) { return impl_->run(budget); }
Interpreter::Result Interpreter::execute(const DecodedInsn& insn, Handler handler) { return impl_->execute(insn, handler); }

Delivered Interpreter::inject(const Event& event) {
  Context& c = impl_->c;
  // A device may have written code before it raised its interrupt, and without paging no TLB fill tells.
  if (!(c.s.cr0 & cr0::PG)) c.mmu.expire_fetches();
  const Delivered d = deliver_event(c, event);
  if (d == Delivered::Ok) c.s.sti_shadow = c.s.mov_ss_shadow = false;
  return d;
}

void Interpreter::rewind() { impl_->rewind(); }
u64 Interpreter::debug_dr6() const { return impl_->dr6; }
u8 Interpreter::debug_vector() const { return impl_->vector; }

void Interpreter::set_max_block_insns(unsigned n) {
  impl_->max_insns = n == 0 || n > BlockCache::kMaxInsns ? BlockCache::kMaxInsns : n;
  impl_->cache.flush(true);
}

void Interpreter::set_page_sharer(CodePageSharer* sharer) { impl_->cache.set_sharer(sharer); }

void Interpreter::code_written(Gpa gpa, unsigned size) { impl_->cache.written(gpa, size); }
void Interpreter::validate_page(Gpa page, const u8* host) { impl_->cache.validate(page, host); }
void Interpreter::code_flush() { impl_->cache.flush(true); }

}  // namespace ring3::engine
