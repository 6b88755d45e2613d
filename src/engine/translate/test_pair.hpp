#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "base/split_mix.hpp"
#include "engine/interp/features.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// For tests of translated code: the same code on the same state, once in the interpreter and once translated, and random
/// instructions to fill it with.
namespace ring3::engine::test {

using Random = SplitMix64;

inline constexpr u64 kLow = 0x50000, kHigh = 0x6ff00;  // data and stack pages of the test machine

/// One machine, run by the interpreter or by translation.
class Side {
 public:
  /// windowed: in user mode, memory is reached through a host window, and translations are kept.
  Side(bool translated, unsigned max_insns, bool windowed) : m(TestMode::Long64, windowed) {
    m.c().features = host_features();
    m.c().event_filter = [this](const Event& event) {
      has_event = true;
      vector = event.vector;
      return true;
    };
    if (!translated) return;
    std::string refused;
    if (windowed) kept = KeptCode::parse({}, 0, &refused);
    auto made = TranslatorVcpu::create(m.s, m.mmu(), m.interpreter(), create_block_translator(),
                                       {.arena_bytes = 4u << 20, .max_insns = max_insns, .kept = kept.get(), .window_samples = windowed});
    CHECK(made.ok());
    vcpu = std::move(*made);
  }
  void run(u64 budget) {
    has_event = false;
    vector = 0;
    m.c().mode_changed();
    result = vcpu ? vcpu->run(budget) : m.interpreter().run(budget);
  }

  TestMachine m;
  std::shared_ptr<KeptCode> kept;
  std::unique_ptr<TranslatorVcpu> vcpu;
  bool has_event = false;
  u8 vector = 0;
  Interpreter::Result result = Interpreter::Result::Budget;
};

/// What may be drawn: everything that the translator knows, and little else.
inline bool wanted(const DecodedInsn& i) {
  if (i.op >= Op::Add && i.op <= Op::Idiv) return true;
  if (i.op >= Op::Rol && i.op <= Op::Bswap) return true;
  switch (i.op) {
    case Op::Mov:
    case Op::Movbe:
    case Op::Movnti:
    case Op::Movzx:
    case Op::Movsx:
    case Op::Movsxd:
    case Op::Lea:
    case Op::Xchg:
    case Op::Cmovcc:
    case Op::Setcc:
    case Op::Cbw:
    case Op::Cwd:
    case Op::Lahf:
    case Op::Sahf:
    case Op::Nop:
    case Op::Pause:
    case Op::Prefetch:
    case Op::Push:
    case Op::Pop:
    case Op::Leave:
    case Op::Clc:
    case Op::Stc:
    case Op::Cmc:
    case Op::HostVec:
    case Op::Vzeroupper:
    case Op::Vzeroall:
    case Op::Mfence:
    case Op::Xlat:
    case Op::Pushf:
    case Op::Cli:
    case Op::Sti:
    case Op::Swapgs:
    case Op::Stac:
    case Op::Clac:
    case Op::Popf:
      return true;
    default:
      return false;
  }
}
inline bool is_branch(Op op) { return op >= Op::Jmp && op <= Op::Ret && op != Op::CallFar; }

enum class Draw { Any, Vector, Branch };

/// Random bytes of a plausible instruction.
inline DecodedInsn draw(Random& rng, Draw what) {
  for (;;) {
    u8 b[15];
    for (u8& x : b) x = static_cast<u8>(rng.next());
    unsigned n = 0;
    const auto put = [&](u64 v) { b[n++] = static_cast<u8>(v); };
    if (rng.one_in(20)) put(rng.below(2) ? 0x64 : 0x65);
    if (rng.one_in(30)) put(0x67);
    const bool vex = what == Draw::Vector ? rng.below(2) : rng.one_in(10);
    if (vex && what != Draw::Branch) {
      if (rng.below(2)) {
        put(0xc5);
        put(rng.next());
      } else {
        put(0xc4);
        put((rng.below(8) << 5) | (1 + rng.below(3)));
        put(rng.next());
      }
      if (what == Draw::Any) {
        static constexpr u8 kBmi[] = {0xf2, 0xf3, 0xf5, 0xf6, 0xf7, 0xf0, 0x6e, 0x7e};
        put(kBmi[rng.below(8)]);
      }
    } else {
      if (rng.one_in(5)) put(0x66);
      if (rng.one_in(10) && what == Draw::Any) put(0xf0);
      if (rng.one_in(what == Draw::Vector ? 2 : 8)) put(rng.below(2) ? 0xf2 : 0xf3);
      if (rng.below(3)) put(0x40 | rng.below(16));
      if (what == Draw::Branch) {
        static constexpr u8 kBranches[] = {0xe0, 0xe1, 0xe2, 0xe3, 0xe8, 0xe9, 0xeb, 0xc2, 0xc3, 0xff};
        const u64 k = rng.below(16);
        if (k < 4) {
          put(0x70 | rng.below(16));
        } else if (k < 6) {
          put(0x0f);
          put(0x80 | rng.below(16));
        } else {
          put(kBranches[k - 6]);
          if (b[n - 1] == 0xff) b[n] = static_cast<u8>((b[n] & 0xc7) | (2 + 2 * rng.below(2)) << 3);
        }
      } else if (what == Draw::Vector || rng.below(3) == 0) {
        put(0x0f);
        if (rng.one_in(4)) put(rng.below(2) ? 0x38 : 0x3a);
      }
    }
    DecodedInsn i;
    if (decode(b, 15, CodeMode::Bits64, false, true, &i) != DecodeResult::Ok) continue;
    if (what == Draw::Branch) {
      if (!is_branch(i.op)) continue;
    } else if (!wanted(i) || (what == Draw::Vector && i.op != Op::HostVec)) {
      continue;
    }
    return i;
  }
}

inline u64 random_value(Random& rng) {
  switch (rng.below(8)) {
    case 0:
      return rng.below(4);
    case 1:
      return ~rng.below(4);
    case 2:
      return 1ull << rng.below(64);
    case 3:
      return static_cast<u64>(static_cast<i64>(static_cast<i8>(rng.next())));
    default:
      return rng.next();
  }
}
inline u64 random_address(Random& rng) {
  if (rng.one_in(16)) return kLow + 0x1000 * (1 + rng.below(8)) - rng.below(40);
  const u64 a = kLow + 0x100 + rng.below(0xe00) + 0x1000 * rng.below(16);
  return rng.below(2) ? a & ~31ull : a;
}

inline std::string describe(const DecodedInsn& i) {
  std::string s = name(i.op);
  char hex[4];
  for (unsigned n = 0; n < i.length; n++) {
    std::snprintf(hex, sizeof hex, " %02x", i.raw[n]);
    s += hex;
  }
  return s;
}

class Pair {
 public:
  explicit Pair(unsigned max_insns, bool windowed = false) : a_(false, max_insns, windowed), b_(true, max_insns, windowed) {}

  /// Gives both the same random state, in which the memory operand of insn (if any) is mapped most of the
  /// time.
  void randomise(Random& rng, const DecodedInsn& insn, u64 rip) {
    VcpuState& s = a_.m.s;
    for (u64& g : s.gpr) g = rng.below(3) ? random_value(rng) : random_address(rng);
    s.gpr[RSP] = random_address(rng) & ~7ull;
    if (rng.below(4)) s.gpr[RBP] = random_address(rng) & ~7ull;
    s.rflags = rflags::FIXED1 | (rng.next() & rflags::STATUS);
    s.seg[FS].base = rng.below(2) ? 0 : kLow + 0x2000;
    s.seg[GS].base = rng.below(2) ? 0 : kLow - 0x100000;
    for (unsigned n = 0; n < 16; n++) {
      for (unsigned k = 0; k < 16; k += 8) {
        const u64 x = random_value(rng), y = random_value(rng);
        std::memcpy(s.xsave.xmm(n) + k, &x, 8);
        std::memcpy(s.xsave.ymm_high(n) + k, &y, 8);
      }
    }
    s.xsave.mxcsr() = static_cast<u32>(0x1f80 | (rng.below(4) << 13) | (rng.one_in(4) ? 0x8000 : 0));
    if (insn.has(kHasMem) && insn.mem.base < 16) {
      const u64 segment = insn.mem.seg == FS || insn.mem.seg == GS ? s.seg[insn.mem.seg].base : 0;
      u64 index = 0;
      if (insn.mem.index < 16 && insn.mem.index != insn.mem.base)
        index = s.gpr[insn.mem.index] << insn.mem.scale_log2;
      const u64 target = random_address(rng) - segment - static_cast<u64>(insn.disp) - index;
      const u64 factor = insn.mem.index == insn.mem.base ? 1 + (1ull << insn.mem.scale_log2) : 1;
      s.gpr[insn.mem.base] = target / factor;
    }
    if (insn.op >= Op::Bt && insn.op <= Op::Btc && insn.has(kHasMem) &&
        insn.operands[1].kind == OperandKind::Gpr && insn.operands[1].reg != insn.mem.base && rng.below(4))
      s.gpr[insn.operands[1].reg] = rng.below(4096) - 2048;
    if (rng.below(2)) s.rflags |= rflags::IF;
    s.rip = rip;
    VcpuState& t = b_.m.s;
    std::memcpy(t.gpr, s.gpr, sizeof s.gpr);
    t.rflags = s.rflags;
    t.rip = rip;
    t.seg[FS].base = s.seg[FS].base;
    t.seg[GS].base = s.seg[GS].base;
    std::memcpy(t.xsave.bytes, s.xsave.bytes, 1024);
  }
  void randomise_memory(Random& rng) {
    for (u64 at = kLow - 0x1000; at < kHigh + 0x1000; at += 8) {
      const u64 v = rng.below(4) ? random_value(rng) : random_address(rng);
      a_.m.store(at, v);
      b_.m.store(at, v);
    }
  }
  void load(const Bytes& code) {
    a_.m.load_code(code);
    b_.m.load_code(code);
  }
  void run(u64 budget) {
    a_.run(budget);
    b_.run(budget);
  }

  /// The first difference; empty: none. flags: which of them count.
  std::string difference(u64 flags) {
    const VcpuState &s = a_.m.s, &t = b_.m.s;
    char text[160];
    const auto say = [&](const char* what, u64 x, u64 y) {
      std::snprintf(text, sizeof text, "%s: interpreted %llx, translated %llx", what,
                    static_cast<unsigned long long>(x), static_cast<unsigned long long>(y));
      return std::string(text);
    };
    if (a_.has_event != b_.has_event || a_.vector != b_.vector)
      return say("event", a_.has_event ? a_.vector : 999, b_.has_event ? b_.vector : 999);
    if (a_.result != b_.result)
      return say("result", static_cast<u64>(a_.result), static_cast<u64>(b_.result));
    if (s.rip != t.rip) return say("rip", s.rip, t.rip);
    for (unsigned n = 0; n < 16; n++)
      if (s.gpr[n] != t.gpr[n]) return say(("gpr" + std::to_string(n)).c_str(), s.gpr[n], t.gpr[n]);
    if ((s.rflags ^ t.rflags) & (flags | ~rflags::STATUS)) return say("rflags", s.rflags, t.rflags);
    for (unsigned at = 0; at < 832; at++) {
      if (at >= 512 && at < 576) continue;
      if (s.xsave.bytes[at] != t.xsave.bytes[at])
        return say(("xsave+" + std::to_string(at)).c_str(), s.xsave.bytes[at], t.xsave.bytes[at]);
    }
    if (std::memcmp(a_.m.ram(kLow - 0x1000), b_.m.ram(kLow - 0x1000), kHigh + 0x2000 - kLow) != 0) {
      for (u64 at = kLow - 0x1000; at < kHigh + 0x1000; at++)
        if (*a_.m.ram(at) != *b_.m.ram(at))
          return say(("memory " + std::to_string(at)).c_str(), *a_.m.ram(at), *b_.m.ram(at));
    }
    return {};
  }
  /// After a difference: b's memory is made a's.
  void heal() { std::memcpy(b_.m.ram(kLow - 0x1000), a_.m.ram(kLow - 0x1000), kHigh + 0x2000 - kLow); }
  Side& translated() { return b_; }
  Side& interpreted() { return a_; }

 private:
  Side a_, b_;
};

/// Flags that the architecture leaves undefined and that processors may leave as they were.
inline u64 undefined_flags(const DecodedInsn& i) {
  using namespace rflags;
  switch (i.op) {
    case Op::Div:
    case Op::Idiv:
      return STATUS;
    case Op::Bsf:
    case Op::Bsr:
      return CF | SF | AF | PF | OF;
    case Op::Tzcnt:
    case Op::Lzcnt:
      return SF | AF | PF | OF;
    case Op::Mul:
    case Op::Imul1:
    case Op::Imul2:
    case Op::Imul3:
      return SF | ZF | AF | PF;
    case Op::Rol:
    case Op::Ror:
    case Op::Rcl:
    case Op::Rcr:
      return i.operands[1].kind == OperandKind::Imm && i.imm == 1 ? 0 : OF;
    default:
      return 0;
  }
}

inline unsigned rounds(unsigned normal) {
  const char* s = std::getenv("RING3_TRANSLATE_ROUNDS");
  return s != nullptr ? normal * static_cast<unsigned>(std::atoi(s)) : normal;
}
inline u64 first_seed() {
  const char* s = std::getenv("RING3_TRANSLATE_SEED");
  return s != nullptr ? std::strtoull(s, nullptr, 0) : 1;
}

}  // namespace ring3::engine::test
