#include "engine/translate/lockstep.hpp"

#include <Zydis/Zydis.h>

#include <algorithm>
#include <cstdarg>
#include <cstddef>
#include <cstring>

#include "engine/decode/decoder.hpp"
#include "engine/translate/frame_layout.h"
#include "engine/translate/liveness.hpp"
#include "engine/translate/thunks.hpp"

namespace ring3::engine {
namespace {

constexpr std::size_t kXsaveUsed = XsaveArea::kEnd;  ///< x87, SSE, AVX and AVX-512
constexpr std::size_t kXsaveAt = offsetof(VcpuState, xsave);
constexpr std::size_t kAfterXsave = kXsaveAt + sizeof(XsaveArea);
constexpr u32 kAll = ~0u;
constexpr const char* kNames[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                  "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};

const u8* bytes_of(const VcpuState& s) { return reinterpret_cast<const u8*>(&s); }

[[gnu::format(printf, 1, 2)]] std::string format(const char* f, ...) {
  char text[400];
  va_list list;
  va_start(list, f);
  std::vsnprintf(text, sizeof text, f, list);
  va_end(list);
  return text;
}
unsigned long long wide(u64 v) { return v; }

}  // namespace

Result<std::unique_ptr<Lockstep>> Lockstep::create(VcpuState& state, Mmu& mmu, Interpreter& interpreter,
                                                   JitFrame& frame, BlockTranslator& translator, Owner owner,
                                                   const Options& options) {
  auto arena = CodeArena::create(1u << 20);
  if (!arena) return arena.error();
  return std::unique_ptr<Lockstep>(
      new Lockstep(state, mmu, interpreter, frame, translator, std::move(owner), options, std::move(*arena)));
}

Lockstep::Lockstep(VcpuState& state, Mmu& mmu, Interpreter& interpreter, JitFrame& frame,
                   BlockTranslator& translator, Owner owner, const Options& options,
                   std::unique_ptr<CodeArena> arena)
    : s_(state),
      mmu_(mmu),
      interpreter_(interpreter),
      c_(interpreter.context()),
      frame_(frame),
      translator_(translator),
      owner_(std::move(owner)),
      options_(options),
      arena_(std::move(arena)),
      fault_range_(arena_->begin(), arena_->end(), fault_thunk()),
      shadow_(new Mmu::TlbEntry[Mmu::kTlbSize]) {
  for (unsigned i = 0; i < Mmu::kTlbSize; i++) shadow_[i] = Mmu::no_entry(i);
}

// ---- state and memory ----

void Lockstep::save(Snapshot* to) const {
  u8* t = reinterpret_cast<u8*>(to->state.get());
  std::memcpy(t, bytes_of(s_), kXsaveAt + kXsaveUsed);
  std::memcpy(t + kAfterXsave, bytes_of(s_) + kAfterXsave, sizeof(VcpuState) - kAfterXsave);
}

void Lockstep::load(const Snapshot& from) {
  u8* t = reinterpret_cast<u8*>(&s_);
  std::memcpy(t, bytes_of(*from.state), kXsaveAt + kXsaveUsed);
  std::memcpy(t + kAfterXsave, bytes_of(*from.state) + kAfterXsave, sizeof(VcpuState) - kAfterXsave);
}

void Lockstep::clear_shadow() {
  for (const unsigned i : filled_) shadow_[i] = Mmu::no_entry(i);
  filled_.clear();
}

bool Lockstep::fill(u64 linear, u64 size, bool write) {
  const unsigned i = static_cast<unsigned>(linear >> kPageShift) & (Mmu::kTlbSize - 1);
  const u64 page = linear & kPageMask;
  const Mmu::TlbEntry& real = mmu_.tlb()[i];
  if ((write ? real.write_tag : real.read_tag) != page) {
    walked_ = true;  // may set accessed and dirty bits, in a page that was copied already
    if (!owner_.fill(linear, size, write)) return false;
  }
  u8* host = reinterpret_cast<u8*>(page + real.addend);
  Page*& p = by_host_[reinterpret_cast<u64>(host)];
  if (p == nullptr) {
    if (used_ == pages_.size()) {
      pages_.push_back(std::make_unique<Page>());
    }
    p = pages_[used_++].get();
    p->real = host;
    // SAFETY: a hit of the TLB says that the page is RAM.
    std::memcpy(p->before, host, kPageSize);
    std::memcpy(p->copy, p->before, kPageSize);
  }
  Mmu::TlbEntry& e = shadow_[i];
  const u64 addend = reinterpret_cast<u64>(p->copy) - page;
  if (e.addend != addend || (e.read_tag != page && e.write_tag != page)) e = Mmu::no_entry(i);
  e.addend = addend;
  (write ? e.write_tag : e.read_tag) = page;
  if (write && real.read_tag == page) e.read_tag = page;
  filled_.push_back(i);
  return true;
}

void Lockstep::restore_memory() {
  for (std::size_t n = 0; n < used_; n++) {
    Page& p = *pages_[n];
    if (std::memcmp(p.real, p.before, kPageSize) != 0) std::memcpy(p.real, p.before, kPageSize);
    std::memcpy(p.copy, p.before, kPageSize);
  }
  clear_shadow();
}

// ---- runs ----

bool Lockstep::fault_rip(u64 pc, u64* rip) const {
  if (!arena_->contains(reinterpret_cast<const void*>(pc))) return owner_.fault_rip(pc, rip);
  for (const HostFaultPoint& f : out_.faults) {
    if (reinterpret_cast<u64>(prefix_) + f.offset != pc) continue;
    *rip = f.rip;
    return true;
  }
  return false;
}

void Lockstep::translated(const u8* code, const Snapshot& before) {
  load(before);
  c_.mode_changed();
  active_ = true;
  owner_.enter(code);
  active_ = false;
  if (frame_.exit_reason == RING3_REASON_FAULT) fault_rip(frame_.exit_rip, &s_.rip);
}

Interpreter::Result Lockstep::interpret(u64 n, bool* all) {
  const u64 retired = c_.retired;
  Interpreter::Result r = Interpreter::Result::Budget;
  c_.mode_changed();
  if (n != 0) r = interpreter_.run(n);
  *all = r == Interpreter::Result::Budget && c_.retired - retired == n;
  c_.retired = retired;
  return r;
}

bool Lockstep::decode_block(u64 rip, unsigned count) {
  insns_.resize(count);
  Gpa gpa;
  const u8* host = nullptr;
  const Stop kept = mmu_.stop();
  const bool ok = mmu_.fetch(rip, &gpa, &host) && host != nullptr;
  mmu_.stop() = kept;
  if (!ok) return false;
  unsigned at = 0;
  const unsigned room = static_cast<unsigned>(kPageSize - (rip & ~kPageMask));
  for (DecodedInsn& insn : insns_) {
    // SAFETY: host is readable to the end of its page.
    if (at >= room || decode(host + at, std::min(room - at, 15u), c_.code_mode, false, c_.features.amd, &insn) !=
                          DecodeResult::Ok)
      return false;
    at += insn.length;
  }
  return true;
}

unsigned Lockstep::done(u64 rip, unsigned count, bool prefix) const {
  const u32 reason = frame_.exit_reason;
  const bool inside = frame_.exit_tag != frame::kNoTag && (frame_.exit_tag & DirectExit::kUngrouped) != 0;
  if (reason == RING3_REASON_NEXT && !inside && frame_.exit_tag != frame::kNoTag) {
    const u32 tag = frame_.exit_tag;
    const unsigned n = !prefix ? owner_.exit_insns(tag) : tag < out_.exits.size() ? out_.exits[tag].insns : 0;
    return n != 0 && n < count ? n : count;
  }
  if ((reason == RING3_REASON_NEXT && !inside) || reason == RING3_REASON_INDIRECT || reason == RING3_REASON_ATTENTION) return count;
  u64 at = before_.state->rip;
  for (unsigned n = 0; n < count; n++) {
    if (at == rip) return n;
    at += insns_[n].length;
  }
  return at == rip ? count : kAll;
}

/// Status flags that are the same in both engines after the first n instructions.
u64 Lockstep::compared_flags(unsigned n, bool complete) const {
  u64 live = rflags::STATUS;
  if (!complete) {
    for (std::size_t i = insns_.size(); i-- > n;) {
      live = live_before(insns_[i], flag_use(insns_[i]), live);
    }
  }
  u64 undefined = 0;
  for (unsigned i = 0; i < n; i++) undefined = (undefined & ~flag_use(insns_[i]).writes) | flags_left_undefined(insns_[i]);
  return live & ~undefined;
}

Lockstep::Comparison Lockstep::compare(const VcpuState& a, const VcpuState& b, u64 flags) const {
  Comparison r;
  const auto say = [&](const std::string& text) {
    r.same = false;
    if (r.what.size() < 2000) r.what += "  " + text + "\n";
  };
  if (a.rip != b.rip) say(format("rip: interpreted %llx, translated %llx", wide(a.rip), wide(b.rip)));
  for (unsigned n = 0; n < 16; n++)
    if (a.gpr[n] != b.gpr[n])
      say(format("%s: interpreted %llx, translated %llx", kNames[n], wide(a.gpr[n]), wide(b.gpr[n])));
  if ((a.rflags ^ b.rflags) & (flags | ~rflags::STATUS))
    say(format("rflags: interpreted %llx, translated %llx (compared: %llx)", wide(a.rflags), wide(b.rflags),
               wide(flags | ~rflags::STATUS)));
  for (unsigned n = 0; n < 16; n++) {
    const u8 *x = a.xsave.bytes + XsaveArea::kXmm + 16 * n, *y = b.xsave.bytes + XsaveArea::kXmm + 16 * n;
    if (std::memcmp(x, y, 16) != 0) say(format("xmm%u", n));
    const u8 *xh = a.xsave.bytes + XsaveArea::kYmmHigh + 16 * n, *yh = b.xsave.bytes + XsaveArea::kYmmHigh + 16 * n;
    if (std::memcmp(xh, yh, 16) != 0) say(format("the high half of ymm%u", n));
    const std::size_t high = XsaveArea::kZmmHigh + 32 * n, hi16 = XsaveArea::kHi16 + 64 * n;
    if (std::memcmp(a.xsave.bytes + high, b.xsave.bytes + high, 32) != 0) say(format("the high half of zmm%u", n));
    if (std::memcmp(a.xsave.bytes + hi16, b.xsave.bytes + hi16, 64) != 0) say(format("zmm%u", n + 16));
  }
  if (std::memcmp(a.xsave.bytes + XsaveArea::kOpmask, b.xsave.bytes + XsaveArea::kOpmask, 64) != 0) say("k0..k7");
  if (std::memcmp(a.xsave.bytes, b.xsave.bytes, 160) != 0) say("x87, MMX or MXCSR");
  const std::size_t skip = std::max(offsetof(VcpuState, rflags), offsetof(VcpuState, rip)) + 8;
  for (const auto& [from, to] : {std::pair{skip, kXsaveAt}, std::pair{kAfterXsave, sizeof(VcpuState)}}) {
    if (std::memcmp(bytes_of(a) + from, bytes_of(b) + from, to - from) == 0) continue;
    std::size_t at = from;
    while (bytes_of(a)[at] == bytes_of(b)[at]) at++;
    say(format("VcpuState, byte %zu: interpreted %02x, translated %02x", at, bytes_of(a)[at], bytes_of(b)[at]));
  }
  for (std::size_t n = 0; n < used_; n++) {
    const Page& p = *pages_[n];
    if (std::memcmp(p.real, p.copy, kPageSize) == 0) continue;
    u64 at = 0;
    while (p.real[at] == p.copy[at]) at++;
    u64 x = 0, y = 0, was = 0;
    const std::size_t size = std::min<u64>(8, kPageSize - at);
    std::memcpy(&x, p.real + at, size);
    std::memcpy(&y, p.copy + at, size);
    std::memcpy(&was, p.before + at, size);
    u64 linear = at;
    for (const unsigned i : filled_) {
      const Mmu::TlbEntry& e = shadow_[i];
      const u64 tag = e.read_tag & Mmu::kNoTag ? e.write_tag : e.read_tag;
      if (tag + e.addend == reinterpret_cast<u64>(p.copy)) linear = tag + at;
    }
    say(format("memory at %llx: was %llx, interpreted %llx, translated %llx", wide(linear), wide(was), wide(x), wide(y)));
  }
  return r;
}

std::string Lockstep::describe(unsigned n) const {
  u64 at = before_.state->rip;
  for (unsigned i = 0; i < n; i++) at += insns_[i].length;
  const DecodedInsn& insn = insns_[n];
  std::string text = format("%016llx ", wide(at));
  for (unsigned i = 0; i < insn.length; i++) text += format(" %02x", insn.raw[i]);
  ZydisDecoder decoder;
  ZydisDecodedInstruction z;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
  ZydisFormatter formatter;
  char line[160];
  if (ZYAN_SUCCESS(ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64)) &&
      ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, insn.raw, insn.length, &z, operands)) &&
      ZYAN_SUCCESS(ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL)) &&
      ZYAN_SUCCESS(ZydisFormatterFormatInstruction(&formatter, &z, operands, z.operand_count_visible, line, sizeof line,
                                                   at, nullptr)))
    text += std::string("  ") + line;
  return text;
}

void Lockstep::report(const std::string& text) {
  if (options_.sink) {
    options_.sink(text);
  } else if (stats_.differences <= options_.max_reports) {
    std::fprintf(options_.report, "%s", text.c_str());
    std::fflush(options_.report);
  }
}

/// Runs longer and longer prefixes of the block on the memory and state before it; leaves both there.
void Lockstep::name_difference(const Snapshot& before, unsigned count, TranslateMode mode, const std::string& whole) {
  std::string text = format("lockstep: translated code differs from the interpreter, block of %u instructions at %llx, CPL %u\n",
                            count, wide(before.state->rip), mode.user ? 3u : 0u);
  const std::unique_ptr<bool[]> has(new bool[count]);
  for (unsigned n = 0; n < count; n++) has[n] = insns_[n].op != Op::Invalid && c_.features.allows(insns_[n]);
  const std::vector<DecodedInsn> all = insns_;
  bool found = false;
  for (unsigned k = 1; k <= count && !found; k++) {
    restore_memory();
    load(before);
    BlockRequest request;
    request.rip = before.state->rip;
    request.mode = mode;
    request.insns = std::span<const DecodedInsn>(all.data(), k);
    request.has_feature = std::span<const bool>(has.get(), k);
    out_.clear();
    arena_->clear();
    if (!translator_.translate(request, &out_) || out_.insns != k) continue;
    prefix_ = arena_->append(out_.code);  // all in one part
    if (prefix_ == nullptr) break;
    insns_.assign(all.begin(), all.begin() + k);
    translated(prefix_ + out_.entry, before);
    const unsigned n = done(s_.rip, k, true);
    save(&after_translated_);
    if (n == kAll) continue;
    load(before);
    bool complete;
    interpret(n, &complete);
    if (!complete) continue;
    const Comparison c = compare(s_, *after_translated_.state, compared_flags(n, n == k));
    if (c.same) continue;
    found = true;
    text += "first difference after\n  " + describe(std::max(n, 1u) - 1) + "\n" + c.what;
  }
  insns_ = all;
  if (!found) text += "no prefix of the block differs by itself; the whole does:\n" + whole;
  text += "the block:\n";
  for (unsigned n = 0; n < count; n++) text += "  " + describe(n) + "\n";
  text += "before it:\n ";
  for (unsigned n = 0; n < 16; n++)
    text += format(" %s=%llx%s", kNames[n], wide(before.state->gpr[n]), n == 7 ? "\n " : "");
  text += format(" rflags=%llx cr3=%llx\n", wide(before.state->rflags), wide(before.state->cr3));
  restore_memory();
  load(before);
  report(text);
}

Lockstep::End Lockstep::run(const u8* code, unsigned count, TranslateMode mode, Interpreter::Result* result) {
  // The clock runs on between the two.
  const auto clock = [](const DecodedInsn& i) { return i.op == Op::Rdtsc || i.op == Op::Rdtscp; };
  if (!decode_block(s_.rip, count) || std::any_of(insns_.begin(), insns_.end(), clock)) {
    stats_.given_up++;
    bool all;
    *result = interpret(1, &all);
    return *result == Interpreter::Result::Budget ? End::Other : End::Stopped;
  }
  save(&before_);
  unsigned tries = 0;
  for (;;) {
    clear_shadow();
    by_host_.clear();
    used_ = 0;
    walked_ = false;
    translated(code, before_);
    if (!walked_ || ++tries == 2) break;
  }
  const u32 reason = frame_.exit_reason, tag = frame_.exit_tag;
  const u64 exit_rip = frame_.exit_rip;
  unsigned n = done(s_.rip, count, false);
  const bool lost = n == kAll;
  if (lost) n = count;
  save(&after_translated_);
  load(before_);
  bool all;
  *result = interpret(n, &all);
  if (*result != Interpreter::Result::Budget) {
    stats_.given_up++;
    return End::Stopped;
  }
  stats_.compared++;
  const bool by_exit = reason == RING3_REASON_NEXT && (tag == frame::kNoTag || (tag & DirectExit::kUngrouped) == 0);
  const u64 flags = compared_flags(n, n == count || by_exit);
  Comparison c = compare(s_, *after_translated_.state, flags);
  if (lost && c.same) c = {false, "  it left at no instruction of the block\n"};
  if (c.same) {
    frame_.exit_reason = reason;
    frame_.exit_tag = tag;
    frame_.exit_rip = exit_rip;
    return End::Same;
  }
  // Once more from the same start: what another thread's store made is not found again.
  restore_memory();
  translated(code, before_);
  save(&after_translated_);
  load(before_);
  *result = interpret(n, &all);
  if (*result != Interpreter::Result::Budget) {
    stats_.given_up++;
    return End::Stopped;
  }
  if (!lost && compare(s_, *after_translated_.state, flags).same) {
    stats_.gone++;
    return End::Other;
  }
  stats_.differences++;
  name_difference(before_, count, mode, c.what);
  *result = interpret(n, &all);
  c_.mode_changed();
  return *result == Interpreter::Result::Budget ? End::Other : End::Stopped;
}

}  // namespace ring3::engine
