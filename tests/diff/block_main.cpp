// Random programs, run by the interpreter and by the translator: the state at every stop is compared. See
// docs/testing.md.
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <span>
#include <string>

#include "block_program.hpp"
#include "engine/decode/decoder.hpp"
#include "engine/interp/features.hpp"
#include "engine/translate/liveness.hpp"

namespace ring3::diff {
namespace {

using namespace engine;  // NOLINT: a test of that room

struct Options {
  std::string mode = "all", repro;
  u64 count = 1000, seed = 0;
  unsigned seconds = 0, jobs = 1;
  int insns = -1;
  unsigned stop_after = 0;
  bool verbose = false;
};

constexpr unsigned kRounds = 8;
/// An iteration of a loop that is NOPs for the most part costs the translator nothing: 15 million instructions in 300 us were seen.
constexpr u64 kMaxSteps = 100'000'000;
constexpr u64 kManySteps = 10'000'000;

AttentionWord* g_attention = nullptr;

void raise_attention(int) {
  if (g_attention != nullptr) g_attention->raise(1);
}

void arm(unsigned microseconds) {
  itimerval t{};
  t.it_value.tv_usec = static_cast<suseconds_t>(microseconds);
  ::setitimer(ITIMER_REAL, &t, nullptr);
}

/// The instruction at rip, wherever it lies: programs also run what they find in their data.
bool decode_at(const BlockGuest& g, BlockMode mode, u64 rip, DecodedInsn* i) {
  u8 bytes[15];
  std::size_t count = 0;
  for (std::span<const u8> part; count < sizeof bytes && !(part = g.fetched(rip + count)).empty();) {
    const std::size_t more = std::min(part.size(), sizeof bytes - count);
    std::memcpy(bytes + count, part.data(), more);
    count += more;
  }
  const CodeMode code_mode = mode == BlockMode::User32 ? CodeMode::Bits32 : CodeMode::Bits64;
  static const bool amd = host_features().amd;
  return decode(bytes, static_cast<unsigned>(count), code_mode, false, amd, i) == DecodeResult::Ok;
}

/// Status flags that code from rip on overwrites before it reads them: where a block was left in its middle they may
/// differ (docs/adr/0004).
u64 dead_flags(BlockGuest& g, BlockMode mode, u64 rip) {
  u64 dead = 0, live = 0;
  for (unsigned n = 0; n < kMaxBlockInsns; n++) {
    DecodedInsn i;
    if (!decode_at(g, mode, rip, &i)) break;
    const FlagUse use = flag_use(i);
    live |= use.reads & ~dead;
    dead |= use.writes & ~live;
    if (i.has(kEndsBlock) && i.op != Op::Sti) break;
    rip += i.length;
  }
  return dead;
}

class Comparison {
 public:
  Comparison(BlockMode mode, unsigned max_insns, u64 seed, const Options& options)
      : mode_(mode), max_insns_(max_insns), seed_(seed), verbose_(options.verbose), stop_after_(options.stop_after), reference_(mode, {}),
        subject_(mode, {true, max_insns, max_insns != 64 && max_insns != 3}) {}

  /// A program of this number; false: a difference was found and printed.
  bool program(u64 number) {
    number_ = number;
    Random rng(seed_ * 0x9e3779b97f4a7c15 + number * 0xd1b54a32d192ed03 + static_cast<u64>(mode_));
    const Program p = generate_program(mode_, rng);
    for (BlockGuest* g : {&reference_, &subject_}) {
      std::memcpy(g->code(), p.code.data(), p.code.size());
      for (unsigned n = 0; n < kBlockDataPages; n++) g->protect(n, true, true);
    }
    fill_memory(rng, reference_.data(), kBlockDataPages * kPageSize);
    fill_memory(rng, reference_.read_only(), kPageSize);
    std::memset(reference_.stack(), 0, kBlockStackPages * kPageSize);
    std::memcpy(subject_.data(), reference_.data(), kBlockDataPages * kPageSize);
    std::memcpy(subject_.read_only(), reference_.read_only(), kPageSize);
    std::memcpy(subject_.stack(), reference_.stack(), kBlockStackPages * kPageSize);
    std::memcpy(subject_.ram() + BlockGuest::kTables, reference_.ram() + BlockGuest::kTables,
                BlockGuest::kRamSize - BlockGuest::kTables);
    for (BlockGuest* g : {&reference_, &subject_}) g->changed();
    fresh_state(rng, p);
    programs_++;
    for (round_ = 0; round_ < kRounds; round_++) {
      if (round_ != 0) {
        if (rng.one_in(3)) {
          const unsigned page = static_cast<unsigned>(rng.below(kBlockDataPages));
          const bool present = rng.below(4) != 0, writable = rng.below(3) != 0;
          for (BlockGuest* g : {&reference_, &subject_}) g->protect(page, present, writable);
        }
        if (faulted_ || rng.one_in(4)) fresh_state(rng, p);
      }
      if (!one(rng)) return false;
    }
    return true;
  }

  u64 programs_ = 0, events_ = 0, attentions_ = 0, steps_ = 0;
  u64 interpreted() const { return subject_.interpreted(); }
  u64 blocks() const { return subject_.blocks(); }

 private:
  void fresh_state(Random& rng, const Program& p) {
    VcpuState& s = reference_.state();
    Case c;
    c.insn = DecodedInsn{};
    generate_state(rng.one_in(3) ? (rng.below(2) ? Family::Avx512 : Family::Avx) : rng.one_in(3) ? Family::X87 : Family::Integer, mode_ == BlockMode::User32, rng, &c);
    std::memcpy(s.gpr, c.regs.gpr, sizeof s.gpr);
    for (u8 r = 0; r < 16; r++)
      if (is_pointer(mode_, r)) s.gpr[r] = pointer_value(rng);
    s.gpr[RSP] = kBlockStack + 0x1000 + 8 * rng.below(0x300);
    if (rng.one_in(6)) s.gpr[RSP] = kBlockStack + 0x1000 * (1 + rng.below(3)) + 4 * rng.below(16);
    if (mode_ == BlockMode::Window64 && rng.below(3) != 0) s.gpr[RSP] += kBlockFarStack - kBlockStack;
    if (mode_ == BlockMode::User32)
      for (u64& g : s.gpr) g = static_cast<u32>(g);
    s.rflags = rflags::FIXED1 | rflags::IF | (c.regs.rflags & rflags::STATUS);
    std::memcpy(s.xsave.bytes, c.regs.xsave, sizeof c.regs.xsave);
    u32 mxcsr;
    std::memcpy(&mxcsr, s.xsave.bytes + 24, 4);
    mxcsr |= rng.one_in(10) ? 0 : 0x1f80;
    std::memcpy(s.xsave.bytes + 24, &mxcsr, 4);
    s.rip = kCode + p.entries[rng.below(p.entries.size())];
    s.sti_shadow = s.mov_ss_shadow = false;
    copy_registers(reference_, subject_);
  }
  static void copy_registers(BlockGuest& from, BlockGuest& to) {
    VcpuState &a = from.state(), &b = to.state();
    std::memcpy(b.gpr, a.gpr, sizeof a.gpr);
    b.rip = a.rip;
    b.rflags = a.rflags;
    std::memcpy(b.xsave.bytes, a.xsave.bytes, sizeof(Registers::xsave));
    b.sti_shadow = a.sti_shadow;
    b.mov_ss_shadow = a.mov_ss_shadow;
    for (BlockGuest* g : {&from, &to}) g->context().mode_changed();
  }

  bool one(Random& rng) {
    AttentionWord& attention = subject_.context().attention();
    const VcpuState before = reference_.state();
    code_before_.assign(subject_.code(), subject_.code() + kBlockCodePages * kPageSize);
    attention.take();
    g_attention = &attention;
    const u64 interpreted_before = subject_.interpreted();
    const unsigned stop = 20 + static_cast<unsigned>(rng.below(rng.one_in(8) ? 500 : 100));
    arm(stop_after_ != 0 ? stop_after_ : stop);
    BlockGuest::End end = subject_.run(~0ull);
    arm(0);
    g_attention = nullptr;
    attention.take();
    if (end == BlockGuest::End::Attention) {
      // Not in the middle of a repeated instruction: the interpreter does these at once.
      for (unsigned n = 0; n < 100 && repeats(subject_); n++) {
        const u64 rip = subject_.state().rip;
        const BlockGuest::End e = subject_.step();
        if (e == BlockGuest::End::Event) end = e;
        if (e == BlockGuest::End::Event || subject_.state().rip != rip) break;
      }
    }
    // A program in the kernel that wrote HLT into its own code halts.
    const bool halted = end == BlockGuest::End::Halted && mode_ == BlockMode::Kernel64;
    if (end != BlockGuest::End::Event && end != BlockGuest::End::Attention && !halted)
      return report("the translator ended in a way that no program can", before);
    faulted_ = end == BlockGuest::End::Event || halted;
    (faulted_ ? events_ : attentions_)++;

    reference_.context().attention().take();
    std::string why;
    near_ = "never";
    const u64 dead_here = dead_flags(subject_, mode_, subject_.state().rip);
    u64 changed = 0;  // all flags, from changed code on
    for (u64 n = 0;; n++) {
      if (changed == 0 && at_changed_code()) changed = rflags::STATUS;
      if (!faulted_ && same_registers(dead_here | changed, &why) && same_memory(&why)) {
        copy_registers(reference_, subject_);
        return true;
      }
      if (!faulted_ && reference_.state().rip == subject_.state().rip) near_ = why;
      if (n == kMaxSteps) return report(faulted_ ? "the interpreter meets no fault" : "the interpreter is never in this state; when it was there last: " + near_, before);
      trail_[n % kTrail] = reference_.state().rip;
      trailed_ = n + 1;
      const BlockGuest::End e = reference_.step();
      steps_++;
      if (e == BlockGuest::End::Budget) {
        // A program in a loop that changes nothing is everywhere at once; one that only faults later is not.
        if (faulted_ && n > 100000 && subject_.interpreted() - interpreted_before > kManySteps) break;
        continue;
      }
      if (halted && e == BlockGuest::End::Halted) {
        if (!same_registers(0, &why) || !same_memory(&why)) return report("halted: " + why, before);
        copy_registers(reference_, subject_);
        return true;
      }
      if (e != BlockGuest::End::Event) return report("the interpreter ended in a way that no program can", before);
      if (!faulted_ || halted) return report("the interpreter faults before it comes to this state: " + describe(reference_) + "; when it was there last: " + near_, before);
      break;
    }
    const Event &a = reference_.event(), &b = subject_.event();
    const bool same_event = a.vector == b.vector && a.has_error == b.has_error && a.error == b.error && a.payload == b.payload;
    if (!same_event) return report("events: " + describe(reference_) + " and " + describe(subject_), before);
    // A repeated comparison that faults has iterations left, which replace the flags: Intel's are those from before it (SDM vol. 2,
    // REP), AMD's and translated code's those of the last one done.
    const u64 dead = repeats(reference_) ? rflags::STATUS : dead_flags(reference_, mode_, reference_.state().rip) | changed;
    if (!same_registers(dead, &why) || !same_memory(&why)) return report(why, before);
    copy_registers(reference_, subject_);
    return true;
  }

  /// Whether the program has changed the instruction that comes now. A block that writes into its own next instructions was made of those
  /// that were there: flags that these would have overwritten may be gone from here on.
  bool at_changed_code() {
    constexpr u64 kLongest = 15;
    const u64 at = reference_.state().rip - kCode;
    return at < code_before_.size() &&
           std::memcmp(reference_.code() + at, code_before_.data() + at, std::min<u64>(kLongest, code_before_.size() - at)) != 0;
  }

  bool repeats(BlockGuest& g) const {
    DecodedInsn i;
    return decode_at(g, mode_, g.state().rip, &i) && i.has(kRep | kRepne) && i.op >= Op::Movs && i.op <= Op::Stos;
  }

  bool same_registers(u64 dead, std::string* why) {
    const VcpuState &a = reference_.state(), &b = subject_.state();
    if (a.rip != b.rip) return *why = "rip", false;
    const unsigned registers = mode_ == BlockMode::User32 ? 8 : 16;
    for (unsigned n = 0; n < registers; n++) {
      const u64 mask = mode_ == BlockMode::User32 ? 0xffffffffull : ~0ull;
      if ((a.gpr[n] ^ b.gpr[n]) & mask) return *why = "register " + std::to_string(n), false;
    }
    const u64 ignored = rflags::AF | rflags::RF | dead;
    if ((a.rflags ^ b.rflags) & ~ignored) return *why = "flags", false;
    for (const auto& [from, to] : {std::pair{0u, 416u}, std::pair{576u, 832u}, std::pair{1088u, kXsaveBytes}})
      for (unsigned at = from; at < to; at++)
        if (a.xsave.bytes[at] != b.xsave.bytes[at]) return *why = "vector or x87 state at " + std::to_string(at), false;
    return true;
  }
  /// Accessed bits may be set early: a translation is made before the instruction that asked for it is executed. Dirty
  /// bits may not.
  bool same_memory(std::string* why) {
    constexpr u64 kAccessed = 0x20;
    u64 at = 0;
    const u8 *a = reference_.ram(), *b = subject_.ram();
    if (std::memcmp(a, b, BlockGuest::kTables) != 0) {
      while (a[at] == b[at]) at++;
    } else {
      const u64 end = reference_.tables_end();
      for (at = BlockGuest::kTables; at < end; at += 8) {
        u64 x, y;
        std::memcpy(&x, a + at, 8);
        std::memcpy(&y, b + at, 8);
        if ((x ^ y) & ~kAccessed) break;
      }
      if (at == end) at = BlockGuest::kRamSize;
    }
    if (at != BlockGuest::kRamSize) {
      char buf[96];
      std::snprintf(buf, sizeof buf, "memory at guest-physical %llx: %02x and %02x", static_cast<unsigned long long>(at), a[at], b[at]);
      *why = buf;
      return false;
    }
    if (reference_.device_log() != subject_.device_log()) return *why = "what the device saw", false;
    return true;
  }

  static std::string describe(BlockGuest& g) {
    char buf[128];
    const Event& e = g.event();
    std::snprintf(buf, sizeof buf, "vector %u error %x payload %llx at %llx", e.vector, e.error,
                  static_cast<unsigned long long>(e.payload), static_cast<unsigned long long>(g.state().rip));
    return buf;
  }
  bool report(const std::string& what, const VcpuState& before) {
    std::printf("DIFFERENCE %s:%u:%llu:%llu round %u: %s\n", name(mode_), max_insns_, static_cast<unsigned long long>(seed_),
                static_cast<unsigned long long>(number_), round_, what.c_str());
    const VcpuState &a = reference_.state(), &b = subject_.state();
    std::printf("  began at %llx flags %llx; interpreter at %llx flags %llx, translator at %llx flags %llx\n",
                static_cast<unsigned long long>(before.rip), static_cast<unsigned long long>(before.rflags),
                static_cast<unsigned long long>(a.rip), static_cast<unsigned long long>(a.rflags),
                static_cast<unsigned long long>(b.rip), static_cast<unsigned long long>(b.rflags));
    if (faulted_) std::printf("  event: %s\n", describe(subject_).c_str());
    for (BlockGuest* g : {&reference_, &subject_}) {
      const std::span<const u8> bytes = g->fetched(g->state().rip);
      if (bytes.empty() || (g == &subject_ && a.rip == b.rip)) continue;
      std::printf("  at %llx:", static_cast<unsigned long long>(g->state().rip));
      for (std::size_t n = 0; n < 32 && n < bytes.size(); n++) std::printf(" %02x", bytes[n]);
      std::printf("\n");
    }
    for (unsigned n = 0; n < 16; n++)
      if (a.gpr[n] != b.gpr[n])
        std::printf("  register %u: %llx before; interpreter %llx, translator %llx\n", n, static_cast<unsigned long long>(before.gpr[n]),
                    static_cast<unsigned long long>(a.gpr[n]), static_cast<unsigned long long>(b.gpr[n]));
    if (verbose_) {
      std::printf("  the interpreter's way:");
      for (u64 n = trailed_ > kTrail ? trailed_ - kTrail : 0; n < trailed_; n++)
        std::printf(" %llx", static_cast<unsigned long long>(trail_[n % kTrail]));
      std::printf("\n");
      std::FILE* f = std::fopen("block-diff-code.bin", "wb");
      if (f != nullptr) {
        std::fwrite(reference_.code(), 1, kBlockCodePages * kPageSize, f);
        std::fclose(f);
        std::printf("  code as the interpreter left it: block-diff-code.bin, at %llx\n", static_cast<unsigned long long>(kCode));
      }
    }
    std::fflush(stdout);
    return false;
  }

  BlockMode mode_;
  unsigned max_insns_;
  u64 seed_, number_ = 0;
  bool verbose_;
  unsigned stop_after_;
  unsigned round_ = 0;
  std::vector<u8> code_before_;
  static constexpr u64 kTrail = 24;
  u64 trail_[kTrail] = {}, trailed_ = 0;
  std::string near_;
  bool faulted_ = false;
  BlockGuest reference_, subject_;
};

int work(const Options& o, u64 job) {
  struct sigaction action {};
  action.sa_handler = raise_attention;
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGALRM, &action, nullptr);
  const std::time_t end = o.seconds != 0 ? std::time(nullptr) + static_cast<std::time_t>(o.seconds) : 0;
  u64 programs = 0, events = 0, attentions = 0, steps = 0, differences = 0, interpreted = 0, blocks = 0;
  Random rng(o.seed + job * 1000003);
  for (u64 number = 0; o.seconds != 0 ? std::time(nullptr) < end : number < o.count;) {
    BlockMode mode = static_cast<BlockMode>(rng.below(static_cast<u64>(BlockMode::kCount)));
    if (o.mode != "all") {
      mode = BlockMode::User64;
      while (o.mode != name(mode) && mode != BlockMode::User32) mode = static_cast<BlockMode>(static_cast<int>(mode) + 1);
    }
    static constexpr unsigned kInsns[] = {kMaxBlockInsns, 64, 1, 3, 16};
    const unsigned insns = o.insns > 0 ? static_cast<unsigned>(o.insns) : kInsns[rng.below(5)];
    Comparison c(mode, insns, o.seed + job, o);
    // Several programs in one machine: the cache has old code of the same addresses.
    for (unsigned n = 0; n < 40 && (o.seconds != 0 ? std::time(nullptr) < end : number < o.count); n++, number++)
      if (!c.program(number) && ++differences > 20) return 1;
    programs += c.programs_, events += c.events_, attentions += c.attentions_, steps += c.steps_;
    interpreted += c.interpreted(), blocks += c.blocks();
  }
  std::printf("ring3_block_diff: seed %llu: %llu programs, %llu blocks translated, %llu instructions, %llu of them left to the "
              "interpreter, %llu stops at faults, %llu at random points, %llu differences\n",
              static_cast<unsigned long long>(o.seed + job), static_cast<unsigned long long>(programs),
              static_cast<unsigned long long>(blocks), static_cast<unsigned long long>(steps),
              static_cast<unsigned long long>(interpreted), static_cast<unsigned long long>(events),
              static_cast<unsigned long long>(attentions), static_cast<unsigned long long>(differences));
  return differences == 0 ? 0 : 1;
}

/// MODE:INSNS:SEED:NUMBER. Where a program is stopped depends on time: it is run many times.
int reproduce(const Options& o) {
  char mode_name[16];
  unsigned insns;
  unsigned long long seed, number;
  if (std::sscanf(o.repro.c_str(), "%15[^:]:%u:%llu:%llu", mode_name, &insns, &seed, &number) != 4) return 2;
  BlockMode mode = BlockMode::User64;
  while (std::string(mode_name) != name(mode) && mode != BlockMode::User32) mode = static_cast<BlockMode>(static_cast<int>(mode) + 1);
  struct sigaction action {};
  action.sa_handler = raise_attention;
  ::sigaction(SIGALRM, &action, nullptr);
  for (unsigned n = 0; n < 200; n++) {
    Comparison c(mode, insns, seed, o);
    if (!c.program(number)) return 1;
  }
  std::printf("no difference in 200 runs\n");
  return 0;
}

}  // namespace
}  // namespace ring3::diff

int main(int argc, char** argv) {
  using namespace ring3::diff;  // NOLINT: this program
  Options o;
  o.seed = static_cast<ring3::u64>(std::time(nullptr));
  CLI::App app("random programs in the interpreter and in the translator");
  app.add_option("--mode", o.mode, "user64, kernel64, window64, user32 or all")->check(CLI::IsMember({"user64", "kernel64", "window64", "user32", "all"}));
  app.add_option("--count", o.count, "programs (each is stopped and compared 8 times)");
  app.add_option("--seconds", o.seconds, "for so long, in place of --count");
  app.add_option("--seed", o.seed, "default: the time");
  app.add_option("--insns", o.insns, "instructions in a block at most; default: 1 to 64, at random");
  app.add_option("--jobs", o.jobs, "processes");
  app.add_option("--repro", o.repro, "the second word of a DIFFERENCE line");
  app.add_option("--stop-after", o.stop_after, "microseconds after which a program is stopped; default: 20 to 520, at random");
  app.add_flag("--verbose", o.verbose, "keep the code of a difference");
  CLI11_PARSE(app, argc, argv);
  if (!o.repro.empty()) return reproduce(o);
  int failed = 0;
  if (o.jobs <= 1) return work(o, 0);
  for (unsigned j = 0; j < o.jobs; j++) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      const int status = work(o, j);
      std::fflush(stdout);
      ::_exit(status);
    }
    if (pid < 0) return 2;
  }
  for (unsigned j = 0; j < o.jobs; j++) {
    int status = 0;
    ::wait(&status);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) failed = 1;
  }
  return failed;
}
