#include "engine/translate/kept_code.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>

#include "base/temporary_directory.hpp"
#include "engine/interp/test_machine.hpp"
#include "engine/translate/translator_vcpu.hpp"

namespace ring3::engine {
namespace {

using test::hex;
using test::TestMachine;
using test::TestMode;

constexpr u64 kBuild = 77;
constexpr u64 kHigh = 0xffffffff81234567;

/// Blocks of the kernel's kind; in {} the absolute addresses, as bytes that the test fills in.
struct Piece {
  const char* text;
  std::vector<u16> addresses;
};
const Piece kPieces[] = {
    {"48 01 d8 48 89 45 10 74 10", {}},                      // add; mov [rbp+16]; je
    {"e8 00 10 00 00", {}},                                  // call
    {"48 8b 05 f4 15 dc 01 48 85 c0 74 ed", {}},             // mov rax, [rip + ...]; test; je back
    {"48 89 05 00 20 00 00 ff 05 00 10 00 00 c3", {}},       // mov [rip + ...], rax; inc dword [rip + ...]; ret
    {"48 c7 c7 00 00 00 00 e8 00 20 00 00", {3}},            // mov rdi, address; call
    {"48 8b 04 c5 00 00 00 00 ff e0", {4}},                  // mov rax, [rax*8 + address]; jmp rax
    {"41 54 55 53 48 89 fb 48 f7 f1 e9 00 f0 ff ff", {}},    // push; div rcx; jmp back
    {"0f a2", {}},                                           // cpuid: left to the interpreter
    {"48 89 d8 0f 01 f8 c3", {}},                            // mov; swapgs; ret
};

std::vector<u8> bytes_of(const Piece& p, u64 rip) {
  std::vector<u8> b = hex(p.text);
  for (u16 at : p.addresses) {
    const u32 address = static_cast<u32>(rip + 0x345678);
    std::memcpy(b.data() + at, &address, 4);
  }
  return b;
}

/// False: nothing is made of it.
bool make(const std::vector<u8>& bytes, u64 rip, u32 first_tag, TranslatedBlock* out, TranslateMode mode = {.lazy = true}, bool pic = false) {
  static const std::unique_ptr<BlockTranslator> translator = create_block_translator();
  std::vector<DecodedInsn> insns;
  for (std::size_t at = 0; at < bytes.size();) {
    DecodedInsn i;
    if (decode(bytes.data() + at, static_cast<unsigned>(bytes.size() - at), CodeMode::Bits64, false, true, &i) != DecodeResult::Ok) return false;
    at += i.length;
    insns.push_back(i);
  }
  const bool has[16] = {true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true};
  BlockRequest r;
  r.insns = insns;
  r.has_feature = {has, insns.size()};
  r.rip = rip;
  r.mode = mode;
  r.position_independent = pic;
  r.first_tag = first_tag;
  out->clear();
  return translator->translate(r, out);
}

KeptCode::Source source(const std::vector<u8>& bytes, u64 rip) { return {5, rip, 8, false, bytes}; }

/// Adds the piece as at rip; false: it is none.
bool add(KeptCode* k, const Piece& p, u64 rip) {
  TranslatedBlock block, moved;
  const std::vector<u8> bytes = bytes_of(p, rip);
  if (!make(bytes, rip, 0, &block)) return false;
  EXPECT_TRUE(make(bytes_of(p, rip + KeptCode::kMove), rip + KeptCode::kMove, 0, &moved));
  const KeptCode::Moved m{p.addresses, &moved};
  k->add(source(bytes, rip), static_cast<unsigned>(bytes.size()), {&block, 0}, &m);
  return true;
}

void expect_same(const TranslatedBlock& a, const TranslatedBlock& b) {
  EXPECT_EQ(a.code, b.code);
  EXPECT_EQ(a.relatives, b.relatives);
  EXPECT_EQ(a.left_at, b.left_at);
  EXPECT_EQ(a.entry, b.entry);
  EXPECT_EQ(a.frame_entry, b.frame_entry);
  EXPECT_EQ(a.cold, b.cold);
  EXPECT_EQ(a.dead_stub, b.dead_stub);
  EXPECT_EQ(a.insns, b.insns);
  EXPECT_EQ(a.bytes, b.bytes);
  ASSERT_EQ(a.exits.size(), b.exits.size());
  for (std::size_t n = 0; n < a.exits.size(); n++) {
    const DirectExit &x = a.exits[n], &y = b.exits[n];
    EXPECT_TRUE(x.field == y.field && x.slot == y.slot && x.stub == y.stub && x.target == y.target && x.bias == y.bias &&
                x.frame_flags == y.frame_flags && x.wide == y.wide && x.ungrouped == y.ungrouped && x.unguarded == y.unguarded &&
                x.insns == y.insns && x.tag == y.tag);
  }
  ASSERT_EQ(a.faults.size(), b.faults.size());
  for (std::size_t n = 0; n < a.faults.size(); n++)
    EXPECT_TRUE(a.faults[n].offset == b.faults[n].offset && a.faults[n].rip == b.faults[n].rip && a.faults[n].window == b.faults[n].window &&
                a.faults[n].frame_flags == b.faults[n].frame_flags);
}

std::shared_ptr<KeptCode> parsed(RawBytes file, std::string* refused, u64 build = kBuild) {
  return KeptCode::parse(std::move(file), build, refused);
}

std::shared_ptr<KeptCode> filled() {
  std::string refused;
  auto k = parsed({}, &refused);
  u64 rip = kHigh;
  for (const Piece& p : kPieces) add(k.get(), p, rip += 0x200);
  return k;
}

/// What is found elsewhere is what would be made there, byte for byte: new or from the file.
TEST(KeptCode, MovesAsTheTranslatorWould) {
  std::string refused;
  const auto fresh = filled();
  const auto again = parsed(fresh->file(kBuild), &refused);
  ASSERT_EQ(refused, "");
  for (KeptCode* k : {fresh.get(), again.get()}) {
    for (const u64 move : {u64{0}, u64{2} << 20, u64{0x1fc} << 20, 0 - (u64{0x4} << 20)}) {
      u64 rip = kHigh;
      unsigned found = 0;
      for (const Piece& p : kPieces) {
        rip += 0x200;
        const std::vector<u8> bytes = bytes_of(p, rip + move);
        TranslatedBlock here, there;
        if (!make(bytes, rip + move, 0x1234, &there)) continue;
        KeptCode::Block block{&here, 0};
        ASSERT_TRUE(k->find(source(bytes, rip + move), 0x1234, &block)) << p.text << " " << move;
        expect_same(here, there);
        found++;
      }
      EXPECT_GE(found, 7u);
    }
  }
}

/// Where accesses stand, with the flags in the frame or not, and links without a guard come back as they were.
TEST(KeptCode, WindowedCode) {
  const std::vector<u8> bytes = hex("48 8b 07 74 10 48 3b 06 48 89 4f 08 e9 00 20 00 00");  // mov rax, [rdi]; je; cmp rax, [rsi]; mov [rdi + 8], rcx; jmp
  std::string refused;
  unsigned in_frame = 0, in_host = 0, unguarded = 0;
  for (const bool pic : {false, true}) {
    for (const bool stacked : {false, true}) {
      const u64 rip = pic ? 0x5580'0000'0123 : 0x401123;
      const TranslateMode mode{.user = true, .sse = true, .windowed = true, .stacked = stacked};
      const auto k = parsed({}, &refused);
      TranslatedBlock made, found;
      ASSERT_TRUE(make(bytes, rip, 7, &made, mode, pic));
      const KeptCode::Source source{5, rip, mode.bits(), pic, bytes};
      k->add(source, static_cast<unsigned>(bytes.size()), {&made, 0}, nullptr);
      const auto again = parsed(k->file(kBuild), &refused);
      ASSERT_EQ(refused, "");
      for (KeptCode* from : {k.get(), again.get()}) {
        KeptCode::Block block{&found, 0};
        ASSERT_TRUE(from->find(source, 7, &block));
        expect_same(made, found);
      }
      for (const HostFaultPoint& f : found.faults) (f.window && f.frame_flags ? in_frame : in_host) += f.window;
      for (const DirectExit& e : found.exits) unguarded += e.unguarded;
    }
  }
  EXPECT_GT(in_frame, 0u);
  EXPECT_GT(in_host, 0u);
  EXPECT_EQ(unguarded, 2u);
}

TEST(KeptCode, NothingElseIsFound) {
  const auto k = filled();
  const u64 rip = kHigh + 0x200;
  const std::vector<u8> bytes = bytes_of(kPieces[0], rip);
  TranslatedBlock out;
  KeptCode::Block block{&out, 0};
  ASSERT_TRUE(k->find(source(bytes, rip), 0, &block));
  for (std::size_t n = 0; n < bytes.size(); n++) {
    std::vector<u8> other = bytes;
    other[n] ^= 1;
    EXPECT_FALSE(k->find(source(other, rip), 0, &block)) << n;
  }
  KeptCode::Source s = source(bytes, rip);
  s.context++;
  EXPECT_FALSE(k->find(s, 0, &block));
  s = source(bytes, rip);
  s.mode ^= 1;
  EXPECT_FALSE(k->find(s, 0, &block));
  s = source(bytes, rip);
  s.pic = true;
  EXPECT_FALSE(k->find(s, 0, &block));
  s = source(bytes, rip);
  s.bytes = s.bytes.first(bytes.size() - 1);
  EXPECT_FALSE(k->find(s, 0, &block));
  EXPECT_FALSE(k->find(source(bytes, rip + 1), 0, &block));
  EXPECT_FALSE(k->find(source(bytes, rip + kPageSize), 0, &block));
  EXPECT_FALSE(k->find(source(bytes, rip & 0x7fffffff), 0, &block));
  // An address that did not move along.
  const u64 at = kHigh + 5 * 0x200, moved = at + (2u << 20);
  EXPECT_TRUE(k->find(source(bytes_of(kPieces[4], moved), moved), 0, &block));
  EXPECT_FALSE(k->find(source(bytes_of(kPieces[4], at), moved), 0, &block));
}

TEST(KeptCode, DamageAndForeignBuildsAreRefused) {
  const RawBytes file = filled()->file(kBuild);
  std::string refused;
  parsed(file, &refused, kBuild + 1);
  EXPECT_NE(refused.find("another build"), std::string::npos);
  for (std::size_t n = 0; n < file.size(); n += 7) {
    if (n >= 40 && n < 64) continue;  // reserved
    RawBytes bad = file;
    bad[n] ^= 0x10;
    parsed(bad, &refused);
    EXPECT_NE(refused, "") << n;
  }
  for (std::size_t size = 0; size < file.size(); size += 13) {
    const auto k = parsed({file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size)}, &refused);
    EXPECT_NE(refused, "") << size;
    EXPECT_EQ(k->file(kBuild).size(), 64u);
  }
}

/// Behind a right checksum any number may stand: what is found has its offsets in its code.
TEST(KeptCode, NumbersOutOfRange) {
  const RawBytes file = filled()->file(kBuild);
  std::mt19937_64 rng(5);
  for (int round = 0; round < 5000; round++) {
    RawBytes bad = file;
    for (u64 n = 1 + rng() % 3; n > 0; n--) bad[64 + rng() % (bad.size() - 64)] = static_cast<u8>(rng());
    KeptCode::seal(&bad, kBuild);
    std::string refused;
    const auto k = parsed(std::move(bad), &refused);
    k->for_each([&](const KeptCode::Source& s) {
      TranslatedBlock out;
      KeptCode::Block block{&out, 0};
      if (!k->find(s, 9, &block)) return;
      for (const DirectExit& e : out.exits) ASSERT_TRUE(e.field + 4 <= out.code.size() && e.stub < out.code.size() && e.tag + 4 <= out.code.size());
      for (u32 field : out.relatives) ASSERT_LE(field + 4, out.code.size());
      ASSERT_LE(out.frame_entry + 5, out.cold);
      ASSERT_LE(out.bytes, s.bytes.size());
    });
  }
}

TEST(KeptCode, AFileOfTheUsersOwn) {
  const TemporaryDirectory d;
  ASSERT_FALSE(d.path().empty());
  const auto file = [&](const char* name) { return d.path() + "/" + name; };
  const std::string path = file("code");
  const std::vector<u8> bytes = bytes_of(kPieces[0], kHigh);
  TranslatedBlock out;
  KeptCode::Block block{&out, 0};
  {
    auto k = KeptCode::create(path);
    ASSERT_TRUE(k.ok());
    EXPECT_FALSE((*k)->find(source(bytes, kHigh), 0, &block));
    ASSERT_TRUE(add(k->get(), kPieces[0], kHigh));
  }
  struct stat st;
  ASSERT_EQ(::stat(path.c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  {
    auto k = KeptCode::create(path);
    ASSERT_TRUE(k.ok());
    EXPECT_TRUE((*k)->find(source(bytes, kHigh), 0, &block));
  }
  ASSERT_EQ(::symlink("code", file("link").c_str()), 0);
  EXPECT_EQ(KeptCode::create(file("link")).error().code, EPERM);
  EXPECT_EQ(KeptCode::create(d.path()).error().code, EPERM);  // a directory
  EXPECT_EQ(KeptCode::create(file("nowhere/code")).error().code, ENOENT);
  ASSERT_EQ(::chmod(path.c_str(), 0620), 0);
  EXPECT_EQ(KeptCode::create(path).error().code, EPERM);
  ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
  std::ofstream(path) << "nonsense";
  {
    auto k = KeptCode::create(path);  // warns
    ASSERT_TRUE(k.ok());
    EXPECT_FALSE((*k)->find(source(bytes, kHigh), 0, &block));
    ASSERT_TRUE(add(k->get(), kPieces[0], kHigh));
  }
  auto k = KeptCode::create(path);
  ASSERT_TRUE(k.ok());
  EXPECT_TRUE((*k)->find(source(bytes, kHigh), 0, &block));
}

struct Machine : TestMachine {
  explicit Machine(KeptCode* kept) : TestMachine(TestMode::Long64) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    options.kept = kept;
    auto v = TranslatorVcpu::create(s, mmu(), interpreter(), create_block_translator(), options);
    CHECK(v.ok());
    vcpu = std::move(*v);
    runner = [this](u64 budget) { return vcpu->run(budget); };
  }
  ~Machine() { vcpu.reset(); }
  std::unique_ptr<TranslatorVcpu> vcpu;
};

/// Found code is killed as made code is when its bytes change.
TEST(KeptCode, SelfModifyingCode) {
  std::string refused;
  const auto kept = parsed({}, &refused);
  for (int run = 0; run < 3; run++) {
    Machine m(kept.get());
    m.s.gpr[RAX] = 0;
    m.s.gpr[RCX] = 3;
    // l: add rax, 1; inc byte [rip - 7 -> imm]; dec rcx; jnz l
    EXPECT_TRUE(m.run(hex("48 83 c0 01 fe 05 f9 ff ff ff 48 ff c9 75 f1")).halted());
    EXPECT_EQ(m.s.gpr[RAX], 1u + 2 + 3);
    EXPECT_GE(m.vcpu->cache().stats().killed, 1u);
    if (run > 0) {
      EXPECT_EQ(m.vcpu->stats().translated, 0u);
    }
  }
  EXPECT_GE(kept->stats().found, 4u);
}

/// What a block leaves to the interpreter is a part of it, made or found.
TEST(KeptCode, AnInstructionThatIsLeftChanges) {
  std::string refused;
  const auto kept = parsed({}, &refused);
  for (int run = 0; run < 3; run++) {
    Machine m(run == 0 ? nullptr : kept.get());
    m.env.leaves[0] = {1, 2, 3, 4};
    m.s.gpr[RAX] = 0;
    EXPECT_TRUE(m.run(hex("31 c0 0f a2 ff c2")).halted());  // xor eax, eax; cpuid; inc edx
    EXPECT_EQ(m.s.gpr[RBX], 2u);
    EXPECT_EQ(m.s.gpr[RDX], 5u);
    m.store<u8>(TestMachine::kCode + 2, 0xb3);  // mov bl, 7
    m.store<u8>(TestMachine::kCode + 3, 0x07);
    m.mmu().expire_fetches();
    m.s.rip = TestMachine::kCode;
    m.s.gpr[RDX] = 0;
    EXPECT_TRUE(m.resume().halted());
    EXPECT_EQ(m.s.gpr[RBX], 7u) << run;
    EXPECT_EQ(m.s.gpr[RDX], 1u);
  }
}

}  // namespace
}  // namespace ring3::engine
