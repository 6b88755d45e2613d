#include "engine/translate/block_translator.hpp"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "engine/translate/liveness.hpp"
#include "engine/translate/test_pair.hpp"

/// Translated code against the interpreter: the same random instructions on the same state, once in each
/// engine, alone and in runs of several (where flags are kept, dropped and brought back).
namespace ring3::engine {
namespace {

using namespace test;

void one_by_one(Draw what, unsigned count) {
  Pair pair(1);
  std::map<std::string, unsigned> refused;
  unsigned failures = 0, translated = 0, reached = 0;
  Random memory(7);
  pair.randomise_memory(memory);
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 1000003 + n);
    const DecodedInsn insn = draw(rng, what);
    Bytes code(0x100, 0x90);
    const u64 at = 0x80;
    std::memcpy(code.data() + at, insn.raw, insn.length);
    pair.load(code);
    const auto before = pair.translated().vcpu->stats();
    for (unsigned k = 0; k < 3; k++) {
      pair.randomise(rng, insn, TestMachine::kCode + at);
      pair.run(1);
      // A canonical target in unmapped space: the fault comes with the next fetch.
      const std::string d =
          pair.difference(pair.interpreted().has_event ? 0 : rflags::STATUS & ~undefined_flags(insn));
      if (!d.empty()) {
        ADD_FAILURE() << describe(insn) << " case " << n << ": " << d;
        pair.heal();
        failures++;
        break;
      }
    }
    const auto after = pair.translated().vcpu->stats();
    if (after.translated == before.translated) {
      refused[name(insn.op)]++;
      if (std::getenv("RING3_TRANSLATE_VERBOSE") != nullptr) std::printf("%s\n", describe(insn).c_str());
    } else {
      translated++;
      if (after.interpreted == before.interpreted) reached++;
    }
  }
  if (std::getenv("RING3_TRANSLATE_VERBOSE") != nullptr)
    for (const auto& [op, times] : refused) std::printf("refused %s %u\n", op.c_str(), times);
  // Most are translated, and most of those run to their end without the interpreter.
  EXPECT_GT(translated, count * 8 / 10);
  EXPECT_GT(reached, translated / 2);
}

TEST(TranslatedCode, IntegerInstructionsDoAsInterpreted) { one_by_one(Draw::Any, rounds(6000)); }
TEST(TranslatedCode, VectorInstructionsDoAsInterpreted) { one_by_one(Draw::Vector, rounds(3000)); }
TEST(TranslatedCode, BranchesDoAsInterpreted) { one_by_one(Draw::Branch, rounds(2000)); }

/// Several instructions in a block, to its end or to the first fault.
TEST(TranslatedCode, RunsOfInstructionsDoAsInterpreted) {
  Pair pair(64);
  unsigned failures = 0, halted = 0;
  const unsigned count = rounds(3000);
  Random memory(8);
  pair.randomise_memory(memory);
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 7000003 + n);
    Bytes code;
    std::string text;
    DecodedInsn first;
    u64 undefined = 0;
    const unsigned length = 2 + static_cast<unsigned>(rng.below(8));
    for (unsigned k = 0; k < length; k++) {
      const DecodedInsn insn = draw(rng, rng.one_in(8) ? Draw::Vector : Draw::Any);
      const FlagUse use = flag_use(insn);
      if (insn.has(kEndsBlock) || (use.reads & undefined) != 0 || (undefined != 0 && insn.op == Op::Lahf)) {
        k--;
        continue;
      }
      undefined = (undefined & ~use.writes) | undefined_flags(insn);
      if (k == 0) first = insn;
      // Fresh pointers, so that later accesses find memory too.
      if (insn.has(kHasMem) && insn.mem.base < 16 && insn.mem.index == kNoReg && insn.mem.seg < FS &&
          rng.below(4)) {
        const u64 value = random_address(rng) - static_cast<u64>(insn.disp);
        code.push_back(static_cast<u8>(0x48 | (insn.mem.base >> 3)));
        code.push_back(static_cast<u8>(0xb8 | (insn.mem.base & 7)));
        for (unsigned i = 0; i < 8; i++) code.push_back(static_cast<u8>(value >> (8 * i)));
      }
      code.insert(code.end(), insn.raw, insn.raw + insn.length);
      if (rng.one_in(5)) {  // a prologue's or an epilogue's run
        const u64 opcode = rng.below(2) ? 0x50 : 0x58;
        for (u64 run = 1 + rng.below(10); run > 0; run--) {
          if (rng.below(2)) code.push_back(0x41);
          code.push_back(static_cast<u8>(opcode + rng.below(8)));
        }
        text += opcode == 0x50 ? "pushes\n" : "pops\n";
      }
      text += describe(insn) + "\n";
    }
    code.push_back(0xf4);
    pair.load(code);
    pair.randomise(rng, first, TestMachine::kCode);
    pair.run(1000);
    const bool whole = !pair.interpreted().has_event;
    halted += whole;
    const std::string d = pair.difference(whole ? rflags::STATUS & ~undefined : 0);
    if (!d.empty()) {
      ADD_FAILURE() << "case " << n << ": " << d << "\n" << text;
      pair.heal();
      failures++;
    }
  }
  EXPECT_GT(halted, count / 4);
}

/// String instructions over several pages, onto themselves, to faults, in both directions.
TEST(TranslatedCode, StringsDoAsInterpreted) {
  Pair pair(64);
  Random memory(9);
  pair.randomise_memory(memory);
  constexpr u8 kOpcodes[] = {0xa4, 0xaa, 0xac, 0xae, 0xa6};
  unsigned halted = 0, failures = 0;
  const unsigned count = rounds(2000);
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 5000011 + n);
    Bytes code;
    const auto set = [&](u8 reg, u64 value) {
      code.insert(code.end(), {0x48, static_cast<u8>(0xb8 | reg)});
      for (unsigned i = 0; i < 8; i++) code.push_back(static_cast<u8>(value >> (8 * i)));
    };
    const u64 from = kLow + rng.below(0x8000);
    set(6, from);
    set(7, rng.one_in(3) ? from + rng.below(64) - 32 : kLow + rng.below(kHigh + 0x800 - kLow));
    set(1, rng.one_in(8) ? 0 : rng.one_in(3) ? rng.below(40) : rng.below(0x2800));
    code.push_back(rng.one_in(6) ? 0xfd : 0xfc);
    if (rng.below(2)) code.insert(code.end(), {0x48, 0x39, 0xd8});  // cmp rax, rbx
    if (rng.below(4)) code.push_back(rng.below(4) ? 0xf3 : 0xf2);
    const u64 size = rng.below(4);
    if (size == 1) code.push_back(0x66);
    if (size == 3) code.push_back(0x48);
    code.push_back(static_cast<u8>(kOpcodes[rng.below(5)] | (size != 0 ? 1 : 0)));
    if (rng.below(2)) code.insert(code.end(), {0x0f, 0x92, 0xc2});  // setb dl
    code.push_back(0xf4);
    pair.load(code);
    DecodedInsn none;
    pair.randomise(rng, none, TestMachine::kCode);
    pair.run(100000);
    const bool whole = !pair.interpreted().has_event;
    halted += whole;
    const std::string d = pair.difference(whole ? rflags::STATUS : 0);
    if (!d.empty()) {
      ADD_FAILURE() << "case " << n << ": " << d;
      pair.heal();
      failures++;
    }
  }
  EXPECT_GT(halted, count / 2);
}

/// Loops of one block over several pages, to their end or to a fault: what is checked before them (loops.cpp).
TEST(TranslatedCode, LoopsDoAsInterpreted) {
  Pair pair(64);
  unsigned failures = 0, halted = 0, faulted = 0;
  const unsigned count = rounds(800);
  Random memory(9);
  pair.randomise_memory(memory);
  // Opcode bytes; the memory operand is ModRM.rm, the register operand 0.
  static const Bytes kForms[] = {{0x8b},       {0x48, 0x8b}, {0x89},             {0x48, 0x03},       {0x48, 0x01},
                                 {0xfe},       {0x8a},       {0x88},             {0x0f, 0x10},       {0x0f, 0x11},
                                 {0x0f, 0x28}, {0x0f, 0x29}, {0xc5, 0xfc, 0x58}, {0xc5, 0xfc, 0x11}, {0xc5, 0xfc, 0x28},
                                 {0x0f, 0xb6}, {0xf0, 0x0f, 0xb1}, {0x48, 0x87}};
  static constexpr u8 kBases[] = {3, 5, 6, 7, 11, 13, 14};
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 11000017 + n);
    Bytes code;
    const auto word = [&](u64 value, unsigned size) {
      for (unsigned i = 0; i < size; i++) code.push_back(static_cast<u8>(value >> (8 * i)));
    };
    const auto set = [&](u8 reg, u64 value) {
      code.insert(code.end(), {static_cast<u8>(reg < 8 ? 0x48 : 0x49), static_cast<u8>(0xb8 | (reg & 7))});
      word(value, 8);
    };
    const u64 align = rng.below(2) ? ~0ull << 5 : ~0ull;
    u8 bases[3];
    for (u8& b : bases) {
      b = kBases[rng.below(7)];
      set(b, (kLow + 0x1000 + rng.below(0x6000)) & align);
    }
    set(1, 1 + rng.below(rng.below(2) ? 20 : 900));
    const bool indexed = rng.below(2) != 0;
    if (indexed) set(2, rng.below(64) & align);
    const i64 step = (static_cast<i64>(rng.below(65)) - 32) & static_cast<i64>(align);
    const std::size_t loop = code.size();
    if (rng.below(8)) code.insert(code.end(), {0x85, 0xc9});  // test ecx, ecx
    const unsigned length = 1 + static_cast<unsigned>(rng.below(6));
    bool moved[16] = {};
    for (unsigned k = 0; k < length; k++) {
      const u8 base = bases[rng.below(3)];
      const bool index = indexed && rng.below(2);
      const Bytes& form = kForms[rng.below(std::size(kForms))];
      const bool vex = form[0] == 0xc5;
      std::size_t at = 0;
      if (base >= 8) {
        if (vex) {  // the three-byte form
          code.insert(code.end(), {0xc4, 0xc1, 0x7c, form[2]});
        } else {
          if (form[at] == 0xf0) code.push_back(form[at++]);
          const u8 rex = form[at] == 0x48 ? form[at++] : 0x40;
          code.push_back(rex | 1);
          code.insert(code.end(), form.begin() + static_cast<std::ptrdiff_t>(at), form.end());
        }
      } else {
        code.insert(code.end(), form.begin(), form.end());
      }
      const u64 disp = (rng.below(rng.one_in(4) ? 600 : 96) & align) - (rng.one_in(3) ? 64 : 0);
      if (index) {
        code.insert(code.end(), {0x84, static_cast<u8>(rng.below(4) << 6 | 2 << 3 | (base & 7))});
      } else {
        code.push_back(static_cast<u8>(0x80 | (base & 7)));
      }
      word(disp, 4);
      if (rng.one_in(3) && !moved[base]) {  // add base, imm8
        moved[base] = true;
        code.insert(code.end(), {static_cast<u8>(base < 8 ? 0x48 : 0x49), 0x83, static_cast<u8>(0xc0 | (base & 7)),
                                 static_cast<u8>(rng.one_in(3) ? -step : step)});
      }
      if (rng.one_in(16)) code.insert(code.end(), {0x50, 0x5a});  // push rax; pop rdx
    }
    if (indexed) code.insert(code.end(), {0x48, 0x83, 0xc2, static_cast<u8>(step)});
    if (rng.below(2)) code.insert(code.end(), {0x83, 0xe9, 0x01});  // sub ecx, 1
    else code.insert(code.end(), {0xff, 0xc9});                     // dec ecx
    code.insert(code.end(), {0x0f, 0x85});                          // jnz loop
    word(loop - (code.size() + 4), 4);
    code.push_back(0xf4);
    for (Side* side : {&pair.interpreted(), &pair.translated()}) {
      for (u64 page = kLow; page < kHigh; page += 0x1000) {
        const bool absent = page % 0x5000 == 0 && n % 3 == 0, fixed = page % 0x7000 == 0 && n % 4 == 1;
        side->m.map(page, absent ? 0 : page, absent ? 0 : TestMachine::kPresent | (fixed ? 0 : TestMachine::kWritable));
      }
      side->m.mmu().flush_all();
    }
    pair.load(code);
    DecodedInsn none;
    for (unsigned time = 0; time < 2; time++) {
      pair.randomise(rng, none, TestMachine::kCode);
      pair.run(100000);
      const bool whole = !pair.interpreted().has_event;
      halted += whole;
      faulted += !whole;
      std::string d = pair.difference(whole ? rflags::STATUS : 0);
      for (u64 at = TestMachine::kRoot; d.empty() && at < TestMachine::kTablesEnd; at += 8) {
        u64 x, y;
        std::memcpy(&x, pair.interpreted().m.ram(at), 8);
        std::memcpy(&y, pair.translated().m.ram(at), 8);
        if (((x ^ y) & 0x60) != 0) d = "accessed or dirty flags differ at " + std::to_string(at);
      }
      if (!d.empty()) {
        ADD_FAILURE() << "case " << n << ": " << d;
        pair.heal();
        failures++;
        break;
      }
    }
  }
  EXPECT_GT(halted, count / 4);
  EXPECT_GT(faulted, count / 8);
}

/// docs/confinement.md: every addressing form, led to where nothing of the guest's is, past the ends of what is, and to
/// the host's own memory, with the TLB warm for a page whose address differs in a bit.
void hostile_addresses(bool windowed) {
  std::unique_ptr<Pair> made;
  const auto make = [&] {
    made = std::make_unique<Pair>(64, windowed);
    Random memory(9);
    made->randomise_memory(memory);
  };
  make();
  // Opcode bytes and ModRM.reg; the register operand is rDX or xmm2.
  struct Form {
    Bytes opcode;
    u8 reg;
  };
  static const Form kForms[] = {
      {{0x8a}, 2},       {{0x48, 0x8b}, 2},       {{0x48, 0x89}, 2},       {{0x48, 0x01}, 2},       {{0xf0, 0x48, 0x0f, 0xc1}, 2},
      {{0x0f, 0x10}, 2}, {{0x0f, 0x11}, 2},       {{0x0f, 0x28}, 2},       {{0xc5, 0xfc, 0x11}, 2}, {{0xc5, 0xfc, 0x10}, 2},
      {{0xff}, 6},       {{0x48, 0x0f, 0xa3}, 2}, {{0x48, 0x0f, 0xab}, 2}, {{0x48, 0x0f, 0xc7}, 1}, {{0x66, 0x0f, 0xa3}, 2}};
  static u64 own = 0x1234;
  unsigned failures = 0, halted = 0;
  u64 window_faults = 0;
  const unsigned count = rounds(6000);
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 13000027 + n);
    const u64 warm = kLow + 0x1000 * (1 + rng.below(16)) + rng.below(0x1000);
    const auto hostile = [&]() -> u64 {
      switch (rng.below(8)) {
        case 0:
          return warm ^ 1ull << (12 + rng.below(52));
        case 1:
          return (1ull << (63 - rng.below(17))) - rng.below(96);
        case 2:
          return 0 - (1ull << (47 + rng.below(17))) - rng.below(96);
        case 3:
          return 0 - rng.below(96);
        case 4:
          return (warm | 0xfff) + 1 - rng.below(70);
        case 5:
          return reinterpret_cast<u64>(rng.below(2) ? static_cast<void*>(&own) : static_cast<void*>(made.get()));
        case 6:
          return reinterpret_cast<u64>(made->translated().m.ram(warm));
        default:
          return kHigh - 0x40 + rng.below(0x200);
      }
    };
    Bytes code;
    const auto word = [&](u64 value, unsigned size) {
      for (unsigned i = 0; i < size; i++) code.push_back(static_cast<u8>(value >> (8 * i)));
    };
    const auto set = [&](u8 reg, u64 value) {
      code.insert(code.end(), {0x48, static_cast<u8>(0xb8 | reg)});
      word(value, 8);
    };
    set(3, warm);
    code.insert(code.end(), {0x8a, 0x03, 0x88, 0x03});  // mov al, [rbx]; mov [rbx], al
    u64 target = hostile();
    const u64 kind = rng.below(10);
    if (kind == 0) {  // the stack
      static const Bytes kStack[] = {{0x52}, {0x5a}, {0x52, 0x51, 0x50}, {0x5a, 0x59, 0x58}, {0xe8, 0, 0, 0, 0}, {0x9c}, {0xc3}};
      set(RSP, target);
      const Bytes& bytes = kStack[rng.below(7)];
      code.insert(code.end(), bytes.begin(), bytes.end());
    } else if (kind == 1) {
      set(RBP, target);
      code.push_back(0xc9);  // leave
    } else if (kind == 2) {  // strings
      static constexpr u8 kStrings[] = {0xa4, 0xaa, 0xac, 0xae, 0xa6};
      set(RSI, rng.below(2) ? target : warm);
      set(RDI, rng.below(2) ? hostile() : target);
      set(RCX, rng.below(rng.below(2) ? 20 : 9000));
      code.push_back(0xfc);
      if (rng.below(2)) code.push_back(0xf3);
      if (rng.below(2)) code.push_back(0x48);
      code.push_back(static_cast<u8>(kStrings[rng.below(5)] | rng.below(2)));
    } else {
      const Form& form = kForms[rng.below(std::size(kForms))];
      const u64 index = rng.next(), scale = rng.below(4), disp = static_cast<u64>(static_cast<i64>(static_cast<i32>(rng.next())));
      const bool indexed = rng.below(2) != 0, again = rng.one_in(3);
      set(2, rng.below(3) ? rng.next() : rng.below(4096));
      set(6, index);
      set(3, target - disp - (indexed ? index << scale : 0));
      const u64 prefix = rng.below(6);
      const u64 absolute = kind == 3 ? rng.below(2) : 2;
      for (unsigned time = 0; time < (again ? 2u : 1u); time++) {
        if (form.opcode[0] != 0xc5 && prefix == 0) code.push_back(0x67);
        if (form.opcode[0] != 0xc5 && prefix == 1) code.push_back(rng.below(2) ? 0x64 : 0x65);
        code.insert(code.end(), form.opcode.begin(), form.opcode.end());
        if (absolute == 0) {
          code.push_back(static_cast<u8>(0x05 | form.reg << 3));  // rip
        } else if (absolute == 1) {
          code.insert(code.end(), {static_cast<u8>(0x04 | form.reg << 3), 0x25});
        } else if (indexed) {
          code.insert(code.end(), {static_cast<u8>(0x84 | form.reg << 3), static_cast<u8>(scale << 6 | 6 << 3 | 3)});
        } else {
          code.push_back(static_cast<u8>(0x83 | form.reg << 3));
        }
        word(disp + time * (8 + rng.below(100)), 4);
      }
    }
    code.push_back(0xf4);
    Pair& pair = *made;
    pair.load(code);
    for (unsigned time = 0; time < 2; time++) {
      DecodedInsn none;
      pair.randomise(rng, none, TestMachine::kCode);
      const u64 fs = rng.below(2) ? hostile() : 0 - target + warm;
      pair.interpreted().m.s.seg[FS].base = pair.translated().m.s.seg[FS].base = fs;
      pair.interpreted().m.s.seg[GS].base = pair.translated().m.s.seg[GS].base = 0 - fs;
      pair.run(20000);
      halted += windowed ? pair.interpreted().m.s.rip == TestMachine::kCode + code.size() - 1 : !pair.interpreted().has_event;
      if (pair.interpreted().result == Interpreter::Result::Budget || pair.translated().result == Interpreter::Result::Budget) {  // it ran away through memory: where that ends is open
        if (windowed) window_faults += pair.translated().vcpu->stats().window_faults;
        make();
        break;
      }
      const std::string d = pair.difference(0);
      if (!d.empty() || own != 0x1234) {
        ADD_FAILURE() << "case " << n << ": " << d;
        pair.heal();
        failures++;
        break;
      }
    }
  }
  EXPECT_GT(halted, count / 8);
  if (windowed) {
    EXPECT_GT(window_faults + made->translated().vcpu->stats().window_faults, 0u);
  }
}
TEST(TranslatedCode, AddressesReachGuestMemoryOnly) { hostile_addresses(false); }
TEST(TranslatedCode, AddressesReachGuestMemoryOnlyThroughWindows) { hostile_addresses(true); }

/// Blocks whose accesses go off few registers, near page ends, with pages absent and page tables' dirty flags
/// fresh: what one check stands for (groups.cpp), and its misses.
TEST(TranslatedCode, GroupedAccessesDoAsInterpreted) {
  Pair pair(64);
  unsigned failures = 0, halted = 0, faulted = 0;
  const unsigned count = rounds(500);
  Random memory(9);
  pair.randomise_memory(memory);
  for (unsigned n = 0; n < count && failures < 20; n++) {
    Random rng(first_seed() * 9000011 + n);
    static constexpr u8 kBases[] = {RBX, RBP, RSP, RDI};
    const u8 base = kBases[rng.below(4)];
    Bytes code;
    std::string text;
    DecodedInsn first;
    u64 undefined = 0;
    bool off_base = false;
    const unsigned length = 3 + static_cast<unsigned>(rng.below(8));
    for (unsigned k = 0; k < length;) {
      DecodedInsn insn = draw(rng, rng.one_in(8) ? Draw::Vector : Draw::Any);
      const FlagUse use = flag_use(insn);
      if (insn.has(kEndsBlock) || (use.reads & undefined) != 0 || (undefined != 0 && insn.op == Op::Lahf) ||
          insn.op == Op::Popf)
        continue;
      const bool near = insn.has(kHasMem) && insn.mem.base == base && insn.mem.seg < FS && insn.addrsize == 8 &&
                        insn.disp > -200 && insn.disp < 200;
      const bool plain = !insn.has(kHasMem) && rng.one_in(16);
      if (!near && !plain) continue;
      const bool moves = rng.one_in(4);
      undefined = ((moves ? 0 : undefined) & ~use.writes) | undefined_flags(insn);
      if (near && !off_base) {
        first = insn;
        off_base = true;
      }
      if (moves) {  // add or sub base, imm8
        code.insert(code.end(), {0x48, 0x83, static_cast<u8>((rng.below(2) ? 0xc0 : 0xe8) | base),
                                 static_cast<u8>(rng.below(4) * 8)});
        text += "moves\n";
      }
      if (rng.one_in(6)) code.push_back(static_cast<u8>((rng.below(2) ? 0x50 : 0x58) + rng.below(4)));
      code.insert(code.end(), insn.raw, insn.raw + insn.length);
      text += describe(insn) + "\n";
      k++;
    }
    code.push_back(0xf4);
    for (Side* side : {&pair.interpreted(), &pair.translated()}) {
      for (u64 page = kLow; page < kHigh; page += 0x1000) {
        const bool absent = page % 0x5000 == 0 && n % 3 == 0;
        side->m.map(page, absent ? 0 : page, absent ? 0 : TestMachine::kPresent | TestMachine::kWritable);
      }
      side->m.mmu().flush_all();
    }
    pair.load(code);
    // More than once: the misses of the first time have filled the TLB.
    for (unsigned time = 0; time < 3; time++) {
      pair.randomise(rng, first, TestMachine::kCode);
      const u64 edge = kLow + 0x1000 * (1 + rng.below(16)) + rng.below(160) - 80;
      for (Side* side : {&pair.interpreted(), &pair.translated()})
        if (n % 2 == 0) side->m.s.gpr[base] = edge;
      pair.run(1000);
      const bool whole = !pair.interpreted().has_event;
      halted += whole;
      faulted += !whole;
      std::string d = pair.difference(whole ? rflags::STATUS & ~undefined : 0);
      for (u64 at = TestMachine::kRoot; d.empty() && at < TestMachine::kTablesEnd; at += 8) {
        u64 x, y;
        std::memcpy(&x, pair.interpreted().m.ram(at), 8);
        std::memcpy(&y, pair.translated().m.ram(at), 8);
        if (((x ^ y) & 0x40) != 0) d = "dirty flags differ at " + std::to_string(at);
      }
      if (!d.empty()) {
        ADD_FAILURE() << "case " << n << ": " << d << "\n" << text;
        pair.heal();
        failures++;
        break;
      }
    }
  }
  EXPECT_GT(halted, count / 2);
  EXPECT_GT(faulted, count / 20);
}

}  // namespace
}  // namespace ring3::engine
