// The host as oracle: random user-mode instructions with random registers, flags and memory, run on
// the host CPU and in the engine, all state compared. See docs/testing.md.
#include <cpuid.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

#include "generator.hpp"
#include "guest.hpp"
#include "native.hpp"

namespace ring3::diff {
namespace {

constexpr unsigned kStatesPerInstruction = 8;
constexpr unsigned kMaxReports = 20;

struct Options {
  std::string family = "all", mode = "both", engine = "interpreter", repro;
  u64 count = 1000000, seed = 0;
  unsigned jobs = 1;
  bool list = false;
};

std::string hex(const u8* bytes, unsigned n) {
  std::string s;
  char buf[4];
  for (unsigned i = 0; i < n; ++i) {
    std::snprintf(buf, sizeof buf, "%02x", bytes[i]);
    s += buf;
  }
  return s;
}

std::string describe(const Outcome& o) {
  char buf[96];
  if (o.kind == Outcome::Kind::FellThrough) return "retired";
  if (o.kind == Outcome::Kind::Branched) return "branched";
  std::snprintf(buf, sizeof buf, "fault %u error %x cr2 %llx", o.vector, o.error, static_cast<unsigned long long>(o.cr2));
  return buf;
}

u64 mix(u64 a, u64 b) {
  Random r(a * 0x9e3779b97f4a7c15 + b);
  return r.next();
}

/// The status flags the SDM leaves undefined after this instruction. They are not compared: what a CPU
/// leaves there may depend on its history.
u64 undefined_flags(const engine::DecodedInsn& i, const Registers& in) {
  using engine::Op;
  namespace f = engine::rflags;
  const auto count = [&]() -> u64 {
    const engine::Operand& o = i.operands[i.op == Op::Shld || i.op == Op::Shrd ? 2 : 1];
    const u64 n = o.kind == engine::OperandKind::Gpr ? in.gpr[engine::RCX] : static_cast<u64>(i.imm);
    return n & (i.opsize == 8 ? 63 : 31);
  };
  switch (i.op) {
    case Op::And: case Op::Or: case Op::Xor: case Op::Test: return f::AF;
    case Op::Bsf: case Op::Bsr: return f::OF | f::SF | f::AF | f::PF | f::CF;
    case Op::Tzcnt: case Op::Lzcnt: return f::OF | f::SF | f::AF | f::PF;
    case Op::Mul: case Op::Imul1: case Op::Imul2: case Op::Imul3: return f::SF | f::ZF | f::AF | f::PF;
    case Op::Div: case Op::Idiv: return f::STATUS;
    case Op::Bt: case Op::Bts: case Op::Btr: case Op::Btc: return f::OF | f::SF | f::AF | f::PF;
    case Op::Shl: case Op::Shr: case Op::Sar: {
      const u64 n = count();
      return n == 0 ? 0 : f::AF | (n > 1 ? f::OF : 0) | (i.op != Op::Sar && n >= 8u * i.opsize ? f::CF : 0);
    }
    case Op::Rol: case Op::Ror: case Op::Rcl: case Op::Rcr: return count() > 1 ? f::OF : 0;
    case Op::Shld: case Op::Shrd: {
      const u64 n = count();
      return n == 0 ? 0 : n > 8u * i.opsize ? f::STATUS : f::AF | (n > 1 ? f::OF : 0);
    }
    case Op::Andn: return f::AF | f::PF;
    case Op::Bextr: return f::AF | f::SF | f::PF;
    case Op::Blsi: case Op::Blsmsk: case Op::Blsr: case Op::Bzhi: return f::AF | f::PF;
    case Op::Aaa: case Op::Aas: return f::OF | f::SF | f::ZF | f::PF;
    case Op::Aad: case Op::Aam: return f::OF | f::AF | f::CF;
    case Op::Daa: case Op::Das: return f::OF;
    default: return 0;
  }
}

/// One side's memory: the data pages and the read-only page.
struct Memory {
  u8* data;
  u8* read_only;
};

class Comparison {
 public:
  Comparison(NativeRunner& native, Family family, bool compat32, bool translated)
      : native_(native), guest_(compat32, translated), family_(family), compat32_(compat32), translated_(translated) {
    Random rng(1);
    pristine_.resize(kDataSize + kPageSize);
    fill_memory(rng, pristine_.data(), pristine_.size());
    for (const Memory& m : {native_memory(), guest_memory()}) {
      std::memcpy(m.data, pristine_.data(), kDataSize);
      std::memcpy(m.read_only, pristine_.data() + kDataSize, kPageSize);
    }
  }

  /// All states of one instruction; the number of differences.
  unsigned instruction(u64 seed, int only_state, bool verbose) {
    Random rng(mix(seed, static_cast<u64>(family_) * 2 + compat32_));
    Case c;
    generate_instruction(family_, compat32_, rng, &c);
    native_.set_code(c.code_offset, c.bytes, c.size, compat32_);
    guest_.set_code(native_.code(), c.code_offset, c.size, seed & 1);
    unsigned differences = 0;
    for (unsigned n = 0; n < kStatesPerInstruction; ++n) {
      Random state_rng(mix(seed, 1000 + n));
      if (only_state >= 0 && static_cast<unsigned>(only_state) != n) continue;
      generate_state(family_, compat32_, state_rng, &c);
      differences += one(c, seed, n, verbose);
      ++ran_;
    }
    seen_[static_cast<unsigned>(c.insn.op)] += kStatesPerInstruction;
    return differences;
  }

  u64 ran() const { return ran_; }
  u64 faults() const { return faults_; }
  const u64* seen() const { return seen_; }

 private:
  /// Where the host keeps the x87 pointers as the engine does (FDP_EXCPTN_ONLY), they are compared. AMD's do not load them.
  static bool same_pointers() {
    u32 a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b >> 6 & 1) != 0;
  }

  Memory native_memory() { return {native_.data(), native_.read_only()}; }
  Memory guest_memory() { return {guest_.data(), guest_.read_only()}; }

  /// Stores into both memories, where the value decides where control or flags go.
  void plant(u64 address, u64 value, unsigned size) {
    if (address < kData || address + size > kData + kDataSize) return;
    for (const Memory& m : {native_memory(), guest_memory()}) std::memcpy(m.data + (address - kData), &value, size);
  }
  /// Of the memory operand. The segments that the cases use have base 0.
  static u64 address(const Case& c) {
    const auto& m = c.insn.mem;
    u64 at = static_cast<u64>(c.insn.disp);
    if (m.base == engine::kRipBase) at += c.regs.rip + c.size;
    else if (m.base != engine::kNoReg) at += c.regs.gpr[m.base];
    if (m.index != engine::kNoReg) at += c.regs.gpr[m.index] << m.scale_log2;
    if (c.insn.addrsize != 8) at &= c.insn.addrsize == 4 ? 0xffffffff : 0xffff;
    return at;
  }
  void plant_targets(const Case& c) {
    using engine::Op;
    const u64 width = compat32_ ? 4 : 8;
    const u64 pad_b = c.regs.rip + kFarPad;
    if (c.insn.op == Op::Ret) plant(c.regs.gpr[engine::RSP], pad_b, static_cast<unsigned>(width));
    if (c.insn.op == Op::Popf) {
      u64 flags = 0;
      const u64 at = c.regs.gpr[engine::RSP];
      if (at >= kData && at + 8 <= kData + kDataSize) {
        std::memcpy(&flags, native_.data() + (at - kData), 8);
        plant(at, flags & ~0x100ull, 8);  // TF would trap behind the instruction
      }
    }
    if ((c.insn.op == Op::Jmp || c.insn.op == Op::Call) && c.insn.has(engine::kHasMem)) {
      plant(address(c), pad_b, static_cast<unsigned>(width));
    }
  }

  /// Whether control could leave our pages: then the case is not run.
  bool escapes(const Case& c) {
    using engine::Op;
    const u64 pad_b = c.regs.rip + kFarPad;
    u64 at = 0;
    if (c.insn.op == Op::Ret || c.insn.op == Op::Popf) {
      at = c.regs.gpr[engine::RSP];
    } else if ((c.insn.op == Op::Jmp || c.insn.op == Op::Call) && c.insn.operands[0].kind == engine::OperandKind::Gpr) {
      return c.regs.gpr[c.insn.operands[0].reg] != pad_b;
    } else if ((c.insn.op == Op::Jmp || c.insn.op == Op::Call) && c.insn.has(engine::kHasMem)) {
      at = address(c);
    } else {
      return false;
    }
    if (at >= kData && at + 8 <= kData + kDataSize) return false;            // holds pad B
    return !(at >= kAbsent && at + 8 <= kAbsent + kPageSize);                 // faults
  }

  /// Where the architecture leaves the fault to the processor and Intel's (Sapphire Rapids) differ from AMD's (Zen 3) and
  /// from the engine: what the engine is to answer when the host answers a.
  Outcome expected(const Case& c, const Outcome& a, const Outcome& b) const {
    using engine::Op;
    namespace vec = engine::vec;
    Outcome e = a;
    if (a.kind != Outcome::Kind::Fault || b.kind != a.kind) return e;
    // A read that wraps behind the end of a segment of 4 GiB may or may not be #SS (SDM vol. 3A 5.3): Intel's processors do
    // not check what ENTER and LEAVE read through EBP, and come to its alignment and its page.
    // In 64-bit code a misaligned one is #AC to them before it is not canonical: no order is given (SDM vol. 3A 6.9).
    if ((c.insn.op == Op::Enter || c.insn.op == Op::Leave) && b.vector == vec::SS) {
      const bool page = compat32_ && a.vector == vec::PF && !(a.error & 2) && a.cr2 > 0xffffffff - 3 && a.cr2 <= 0xffffffff;
      if (page || (a.vector == vec::AC && (c.regs.rflags & engine::rflags::AC))) return b;
    }
    if (a.vector != vec::PF) return e;
    // Addresses of the upper half hold the host's own kernel: there, but not for us.
    if (b.vector == a.vector && (a.cr2 >> 63 || a.cr2 >= 0x7fffffffe000)) e.error = (a.error & ~1u) | (b.error & 1u);
    // CR2 is the address that caused the fault (SDM vol. 3A 4.7), not necessarily the first: where an element crosses into
    // the page, Intel's say the last byte that VMASKMOV or a store under a mask would write.
    const u64 at = address(c);
    const bool masked = c.insn.op == Op::Vmaskmov || c.insn.mask != 0;
    if (masked && b.vector == vec::PF && (a.error & 2) && a.cr2 / kPageSize == b.cr2 / kPageSize &&
        at / kPageSize != a.cr2 / kPageSize && a.cr2 - at < 64 && b.cr2 - at < 64)
      e.cr2 = b.cr2;
    return e;
  }
  /// A store of 80 bits may have written its first word of 64 when its second faults (SDM vol. 3A, Guaranteed Atomic
  /// Operations): Intel's has, the engine's never.
  void undo_first_word(const Case& c, const Outcome& a) {
    const engine::Operand& o = c.insn.operands[0];
    if (c.insn.op != engine::Op::HostX87 || o.kind != engine::OperandKind::Mem || o.size != 10 || !(o.access & engine::kWrite)) return;
    const u64 at = address(c);
    if (a.kind != Outcome::Kind::Fault || a.vector != engine::vec::PF || a.cr2 < at + 8 || a.cr2 >= at + 10) return;
    if (at >= kData && at + 8 <= kData + kDataSize)
      std::memcpy(native_memory().data + (at - kData), guest_memory().data + (at - kData), 8);
  }

  unsigned one(Case& c, u64 seed, unsigned n, bool verbose) {
    plant_targets(c);
    if (escapes(c)) {
      restore();
      return 0;
    }
    Registers host = c.regs, soft = c.regs;
    const Outcome a = native_.run(&host, compat32_);
    const std::optional<Outcome> b = guest_.run(&soft, c.regs.rip + c.size);
    if (a.kind == Outcome::Kind::Fault) ++faults_;
    // AMD's MXCSR.MM (misaligned SSE) is not offered to guests: setting it is #GP there.
    const bool sets_mm = c.insn.op == engine::Op::Ldmxcsr && a.kind != Outcome::Kind::Fault && (host.xsave[26] & 2);
    if (sets_mm) {
      restore();
      return 0;
    }
    std::string why;
    if (!b) {
      why = "the engine neither retired nor faulted";
    } else {
      compare(c, a, *b, host, soft, &why);
    }
    undo_first_word(c, a);
    const bool dirty = memory_differs(&why);
    if (!why.empty() || verbose) {
      std::printf("%s %s:%d:%llx:%u insn %s %s host: %s engine: %s %s\n", why.empty() ? "SAME" : "DIFFERENCE", name(family_),
                  compat32_ ? 32 : 64, static_cast<unsigned long long>(seed), n, hex(c.bytes, c.size).c_str(),
                  engine::name(c.insn.op), describe(a).c_str(), b ? describe(*b).c_str() : "-", why.c_str());
      if (verbose) dump(c.regs, host, soft);
      std::fflush(stdout);
    }
    if (dirty) restore();
    return why.empty() ? 0 : 1;
  }

  void compare(const Case& c, const Outcome& a, const Outcome& b, const Registers& h, const Registers& s, std::string* why) {
    char buf[160];
    const auto differ = [&](const char* what, u64 x, u64 y) {
      std::snprintf(buf, sizeof buf, " %s host=%llx engine=%llx", what, static_cast<unsigned long long>(x),
                    static_cast<unsigned long long>(y));
      *why += buf;
    };
    if (expected(c, a, b) != b) *why += " outcome";
    const bool faulted = a.kind == Outcome::Kind::Fault;
    // The oracle pops registers before it checks the rest: ESP stands, so the instruction can be restarted.
    const bool popa = faulted && c.insn.op == engine::Op::Popa;
    // A gather may or may not have widened its mask; MASKMOVQ may or may not have entered MMX state.
    const bool gather = faulted && c.insn.op == engine::Op::Vgather && !c.insn.has(engine::kEvex);
    const bool maskmov = faulted && c.insn.op == engine::Op::Maskmov;
    if (a.kind == Outcome::Kind::Fault && b.kind == a.kind && h.rip != s.rip) differ("rip", h.rip, s.rip);
    static constexpr const char* kNames[] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                             "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
    // In 32-bit code the upper halves and R8..R15 are undefined.
    for (int i = 0; i < (compat32_ ? 8 : 16); ++i) {
      const u64 mask = compat32_ ? 0xffffffff : ~0ull;
      if (popa && i != engine::RSP) continue;
      if ((h.gpr[i] ^ s.gpr[i]) & mask) differ(kNames[i], h.gpr[i], s.gpr[i]);
    }
    // RF stands in the fault frame alone; IOPL and IF belong to the kernel.
    // Translated code drops flags that the instruction itself would replace (docs/adr/0004): not seen in a fault.
    const u64 defined = a.kind != Outcome::Kind::Fault ? engine::rflags::STATUS & ~undefined_flags(c.insn, c.regs)
                        : translated_                   ? 0
                                                        : engine::rflags::STATUS;
    const u64 compared = defined | engine::rflags::DF | engine::rflags::AC | engine::rflags::ID | engine::rflags::NT;
    if ((h.rflags ^ s.rflags) & compared) differ("flags", h.rflags & compared, s.rflags & compared);
    const auto bytes = [&](const char* what, unsigned at, unsigned size) {
      if (std::memcmp(h.xsave + at, s.xsave + at, size) != 0)
        *why += std::string(" ") + what + " host=" + hex(h.xsave + at, size) + " engine=" + hex(s.xsave + at, size);
    };
    bytes("fcw", 0, 2);
    bytes("fsw", 2, 2);
    if (!maskmov) bytes("ftw", 4, 1);
    if (pointers_) {
      bytes("fop", 6, 2);
      bytes("fip", 8, 8);
      bytes("fdp", 16, 8);
    }
    bytes("mxcsr", 24, 4);
    for (unsigned i = 0; i < 8; ++i) bytes("st", 32 + 16 * i, 10);
    for (unsigned i = 0; i < (compat32_ ? 8u : 16u); ++i) {
      if (gather && i == c.insn.operands[2].reg) continue;
      bytes("xmm", 160 + 16 * i, 16);
      bytes("ymmh", 576 + 16 * i, 16);
    }
    if (!host_has_avx512() || std::memcmp(h.xsave + 1088, s.xsave + 1088, kXsaveBytes - 1088) == 0) return;
    for (unsigned i = 0; i < 8; ++i) bytes("k", 1088 + 8 * i, 8);
    for (unsigned i = 0; i < 16; ++i) bytes("zmmh", 1152 + 32 * i, 32);
    for (unsigned i = 0; i < 16; ++i) bytes("zmm16+", 1664 + 64 * i, 64);
  }

  /// Compares both memories; true when they are no longer pristine.
  bool memory_differs(std::string* why) {
    const Memory h = native_memory(), s = guest_memory();
    const bool same = std::memcmp(h.data, s.data, kDataSize) == 0;
    if (!same) {
      u64 at = 0;
      while (h.data[at] == s.data[at]) ++at;
      char buf[120];
      const u64 n = kDataSize - at < 16 ? kDataSize - at : 16;
      std::snprintf(buf, sizeof buf, " memory at %llx", static_cast<unsigned long long>(kData + at));
      *why += std::string(buf) + " host=" + hex(h.data + at, static_cast<unsigned>(n)) +
              " engine=" + hex(s.data + at, static_cast<unsigned>(n));
    }
    if (std::memcmp(s.read_only, pristine_.data() + kDataSize, kPageSize) != 0) *why += " read-only page written";
    return !same || std::memcmp(h.data, pristine_.data(), kDataSize) != 0;
  }
  void restore() {
    for (const Memory& m : {native_memory(), guest_memory()}) std::memcpy(m.data, pristine_.data(), kDataSize);
    std::memcpy(guest_memory().read_only, pristine_.data() + kDataSize, kPageSize);
  }

  static void dump(const Registers& in, const Registers& h, const Registers& s) {
    for (int i = 0; i < 16; ++i)
      std::printf("  gpr%-2d in %016llx host %016llx engine %016llx\n", i, static_cast<unsigned long long>(in.gpr[i]),
                  static_cast<unsigned long long>(h.gpr[i]), static_cast<unsigned long long>(s.gpr[i]));
    std::printf("  flags in %llx host %llx engine %llx; mxcsr in %s; fcw, fsw, ftw in %s\n",
                static_cast<unsigned long long>(in.rflags), static_cast<unsigned long long>(h.rflags),
                static_cast<unsigned long long>(s.rflags), hex(in.xsave + 24, 4).c_str(), hex(in.xsave, 5).c_str());
    for (unsigned i = 0; i < 8; ++i) std::printf("  st%u in %s\n", i, hex(in.xsave + 32 + 16 * i, 10).c_str());
    for (unsigned i = 0; i < 8; ++i) std::printf("  k%u in %s\n", i, hex(in.xsave + 1088 + 8 * i, 8).c_str());
    for (unsigned i = 0; i < 16; ++i)
      std::printf("  ymm%-2u in %s%s\n", i, hex(in.xsave + 576 + 16 * i, 16).c_str(), hex(in.xsave + 160 + 16 * i, 16).c_str());
  }

  NativeRunner& native_;
  GuestRunner guest_;
  Family family_;
  bool compat32_, translated_;
  const bool pointers_ = same_pointers();
  std::vector<u8> pristine_;
  u64 ran_ = 0, faults_ = 0;
  u64 seen_[static_cast<unsigned>(engine::Op::Count)] = {};
};

/// The family is asked for and can be compared on this host.
bool wanted(const Options& o, unsigned f) {
  if (static_cast<Family>(f) == Family::Avx512 && !host_has_avx512()) return false;
  return o.family == "all" || o.family == name(static_cast<Family>(f));
}

/// One worker's share; the number of differences found (at most kMaxReports a family and mode).
u64 work(const Options& o, NativeRunner& native, unsigned worker, int report_fd) {
  u64 differences = 0;
  u64 total[3] = {};
  std::vector<u64> seen(static_cast<unsigned>(engine::Op::Count));
  const unsigned families = static_cast<unsigned>(Family::kCount);
  unsigned kinds = 0;
  for (unsigned f = 0; f < families; ++f)
    if (wanted(o, f)) kinds += o.mode == "both" ? 2 : 1;
  for (unsigned f = 0; f < families; ++f) {
    if (!wanted(o, f)) continue;
    for (const bool compat32 : {false, true}) {
      if ((o.mode == "64" && compat32) || (o.mode == "32" && !compat32)) continue;
      Comparison comparison(native, static_cast<Family>(f), compat32, o.engine == "translator");
      const u64 share = o.count / kinds / o.jobs;
      u64 found = 0;
      for (u64 i = worker; comparison.ran() < share && found < kMaxReports; i += o.jobs)
        found += comparison.instruction(mix(o.seed, i), -1, false);
      differences += found;
      total[0] += comparison.ran();
      total[1] += comparison.faults();
      for (unsigned n = 0; n < seen.size(); ++n) seen[n] += comparison.seen()[n];
    }
  }
  total[2] = differences;
  if (::write(report_fd, total, sizeof total) < 0 || ::write(report_fd, seen.data(), seen.size() * 8) < 0) return 1;
  return differences;
}

int reproduce(const Options& o, NativeRunner& native) {
  char family[32];
  int mode = 64;
  unsigned long long seed = 0;
  unsigned n = 0;
  if (std::sscanf(o.repro.c_str(), "%31[^:]:%d:%llx:%u", family, &mode, &seed, &n) != 4) {
    std::fprintf(stderr, "ring3_diff: --repro takes FAMILY:MODE:SEED:STATE as a report prints it\n");
    return 2;
  }
  for (unsigned f = 0; f < static_cast<unsigned>(Family::kCount); ++f) {
    if (std::strcmp(family, name(static_cast<Family>(f))) != 0) continue;
    Comparison comparison(native, static_cast<Family>(f), mode == 32, o.engine == "translator");
    return comparison.instruction(seed, static_cast<int>(n), true) ? 1 : 0;
  }
  std::fprintf(stderr, "ring3_diff: no family %s\n", family);
  return 2;
}

int run(const Options& options) {
  Options o = options;
  if (o.seed == 0) o.seed = static_cast<u64>(::time(nullptr));
  auto native = NativeRunner::create();
  if (!native) {
    std::fprintf(stderr, "ring3_diff: %s\n", native.error().message.c_str());
    return 2;
  }
  if (!o.repro.empty()) return reproduce(o, **native);
  if (!host_has_avx512() && (o.family == "all" || o.family == "avx512"))
    std::printf("ring3_diff: avx512 is left out: this host's CPU or kernel has none\n");
  std::printf("ring3_diff: seed %llu, %llu states, family %s, mode %s\n", static_cast<unsigned long long>(o.seed),
              static_cast<unsigned long long>(o.count), o.family.c_str(), o.mode.c_str());
  std::fflush(stdout);

  u64 total[3] = {};
  std::vector<u64> seen(static_cast<unsigned>(engine::Op::Count));
  bool died = false;
  std::vector<std::pair<pid_t, int>> workers;
  for (unsigned w = 0; w < o.jobs; ++w) {
    int fds[2];
    if (::pipe(fds) != 0) return 2;
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::close(fds[0]);
      // The pages are shared with the parent and the siblings: each worker makes its own.
      auto own = NativeRunner::create_in_child();
      ::_exit(own ? (work(o, **own, w, fds[1]) ? 1 : 0) : 2);
    }
    ::close(fds[1]);
    workers.emplace_back(pid, fds[0]);
  }
  for (auto& [pid, fd] : workers) {
    u64 t[3] = {};
    std::vector<u64> s(seen.size());
    const bool complete = ::read(fd, t, sizeof t) == sizeof t &&
                          ::read(fd, s.data(), s.size() * 8) == static_cast<ssize_t>(s.size() * 8);
    int status = 0;
    ::waitpid(pid, &status, 0);
    if (!complete || !WIFEXITED(status)) died = true;
    for (int i = 0; i < 3; ++i) total[i] += t[i];
    for (unsigned i = 0; i < seen.size(); ++i) seen[i] += s[i];
  }
  if (o.list)
    for (unsigned i = 0; i < seen.size(); ++i)
      if (seen[i]) std::printf("%-12s %llu\n", engine::name(static_cast<engine::Op>(i)), static_cast<unsigned long long>(seen[i]));
  std::printf("ring3_diff: %llu states compared, %llu of them faulted, %llu differences\n",
              static_cast<unsigned long long>(total[0]), static_cast<unsigned long long>(total[1]),
              static_cast<unsigned long long>(total[2]));
  if (died) std::printf("ring3_diff: a worker died\n");
  return died || total[2] != 0 || total[0] == 0;
}

}  // namespace
}  // namespace ring3::diff

int main(int argc, char** argv) {
  ring3::diff::Options o;
  CLI::App app("Compares random user-mode instructions on the host CPU and in the engine");
  app.add_option("--family", o.family, "integer, shift, branch, string, stack, bmi, x87, mmx, sse, avx, privileged, avx512 or all");
  app.add_option("--mode", o.mode, "64, 32 or both")->check(CLI::IsMember({"64", "32", "both"}));
  app.add_option("--engine", o.engine, "interpreter or translator")->check(CLI::IsMember({"interpreter", "translator"}));
  app.add_option("--count", o.count, "states to compare, over all families and modes");
  app.add_option("--seed", o.seed, "0: from the clock");
  app.add_option("--jobs", o.jobs, "worker processes")->check(CLI::Range(1, 64));
  app.add_option("--repro", o.repro, "one case, FAMILY:MODE:SEED:STATE, with all its state");
  app.add_flag("--list", o.list, "list the operations covered and how often");
  CLI11_PARSE(app, argc, argv);
  return ring3::diff::run(o);
}
