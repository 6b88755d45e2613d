#include <gtest/gtest.h>

#include <optional>
#include <random>

#include "engine/mmu/mmu.hpp"
#include "engine/mmu/test_support.hpp"

/// Page walks against a plain model of SDM vol. 3A chapter 4: every permission combination of every paging
/// mode, and random tables that alias, point at devices and hold garbage.
namespace ring3::engine {
namespace {

using namespace test;
using Mode = PageTables::Mode;

struct Request {
  bool write = false, fetch = false, user = false, implicit = false;
};

/// What the SDM says happens. Reads and changes the guest's tables through Machine.
struct Model {
  Machine& m;
  unsigned maxphyaddr = 40;
  bool page1g = true;
  bool amd = false;

  struct Answer {
    bool ok = false;
    u32 error = 0;
    u64 gpa = 0;
  };

  u64 entry(u64 gpa, unsigned size) {
    if (gpa + size > m.ram.size()) return size == 8 ? ~0ull : 0xffffffffull;
    return size == 8 ? m.peek<u64>(gpa) : m.peek<u32>(gpa);
  }
  void or_entry(u64 gpa, unsigned size, u64 bits) {
    if (gpa + size > m.ram.size()) return;
    if (size == 8) {
      m.poke<u64>(gpa, m.peek<u64>(gpa) | bits);
    } else {
      m.poke<u32>(gpa, static_cast<u32>(m.peek<u32>(gpa) | bits));
    }
  }

  Answer walk(u64 linear, Request r) {
    const VcpuState& s = m.state;
    Answer a;
    if (!(s.cr0 & cr0::PG)) return {true, 0, linear & 0xffffffff};
    const bool lng = s.efer & efer::LMA, pae = s.cr4 & cr4::PAE;
    const bool nxe = pae && (s.efer & efer::NX);
    u32 code = 0;
    if (r.write) code |= 2;
    if (r.user) code |= 4;
    if (r.fetch && (nxe || (s.cr4 & cr4::SMEP))) code |= 16;

    struct Step {
      u64 gpa;
      unsigned size;
    };
    std::vector<Step> steps;
    u64 r_w = 1, u_s = 1, xd = 0, frame = 0, page = 4096;
    const u64 phys_reserved = (~0ull << maxphyaddr) & ((1ull << 52) - 1);

    if (!pae) {
      const u64 pde_at = (s.cr3 & 0xfffff000) + 4 * (linear >> 22 & 0x3ff);
      const u64 pde = entry(pde_at, 4);
      steps.push_back({pde_at, 4});
      if (!(pde & 1)) return {false, code, 0};
      r_w &= pde >> 1, u_s &= pde >> 2;
      if ((pde & 0x80) && (s.cr4 & cr4::PSE)) {
        u64 reserved = 1u << 21;
        for (unsigned bit = 32; bit < 40; bit++) {
          if (bit >= maxphyaddr) reserved |= 1ull << (bit - 32 + 13);
        }
        if (pde & reserved) return {false, code | 9, 0};
        frame = (pde & 0xffc00000) | (pde >> 13 & 0xff) << 32;
        page = 4 << 20;
      } else {
        const u64 pte_at = (pde & 0xfffff000) + 4 * (linear >> 12 & 0x3ff);
        const u64 pt = entry(pte_at, 4);
        steps.push_back({pte_at, 4});
        if (!(pt & 1)) return {false, code, 0};
        r_w &= pt >> 1, u_s &= pt >> 2;
        frame = pt & 0xfffff000;
      }
    } else {
      u64 at;
      unsigned level;
      u64 reserved = phys_reserved | (nxe ? 0 : 1ull << 63);
      if (lng) {
        level = 4;
        at = s.cr3 & 0x000ffffffffff000;
      } else {
        const u64 pdpte = s.pdptr[linear >> 30 & 3];
        if (!(pdpte & 1)) return {false, code, 0};
        level = 2;
        at = pdpte & 0x000ffffffffff000;
        reserved |= 0x7ffull << 52;
      }
      for (;; level--) {
        const unsigned shift = 12 + 9 * (level - 1);
        at += 8 * (linear >> shift & 0x1ff);
        const u64 e = entry(at, 8);
        steps.push_back({at, 8});
        if (!(e & 1)) return {false, code, 0};
        const bool ps = e & 0x80;
        if (e & reserved) return {false, code | 9, 0};
        if (level == 4 && ps) return {false, code | 9, 0};
        if (amd && level >= 3 && !(level == 3 && ps) && (e & 0x100)) return {false, code | 9, 0};
        if (level == 3 && ps && (!page1g || (e & 0x3fffe000))) return {false, code | 9, 0};
        if (level == 2 && ps && (e & 0x1fe000)) return {false, code | 9, 0};
        r_w &= e >> 1, u_s &= e >> 2, xd |= e >> 63;
        at = e & 0x000ffffffffff000;
        if (level == 1 || (ps && level <= 3)) {
          page = 1ull << shift;
          frame = at & ~(page - 1);
          break;
        }
      }
    }

    bool allowed;
    if (r.user) {
      allowed = u_s && (!r.write || r_w) && !(r.fetch && xd);
    } else if (r.fetch) {
      allowed = !xd && !((s.cr4 & cr4::SMEP) && u_s);
    } else {
      allowed = !r.write || r_w || !(s.cr0 & cr0::WP);
      if ((s.cr4 & cr4::SMAP) && u_s && (r.implicit || !(s.rflags & rflags::AC))) allowed = false;
    }
    if (!allowed) return {false, code | 1, 0};
    for (std::size_t i = 0; i < steps.size(); i++) {
      or_entry(steps[i].gpa, steps[i].size, 0x20 | (r.write && i + 1 == steps.size() ? 0x40 : 0));
    }
    a.ok = true;
    a.gpa = frame | (linear & (page - 1));
    return a;
  }
};

/// The same through the Mmu, with an empty TLB. CPL is set from the request.
struct Outcome {
  bool ok = false;
  u32 error = 0;
  u64 cr2 = 0;
  std::optional<u64> gpa;
};

Outcome access(Machine& m, u64 linear, Request r) {
  m.state.seg[SS].dpl = r.user ? 3 : 0;
  m.mmu->mode_changed();
  m.mmu->flush_all();
  m.mmu->stop() = Stop{};
  Outcome o;
  u8 byte = 0;
  FakePort port;
  m.mmu->set_port(&port);
  if (r.fetch) {
    Gpa gpa;
    const u8* host = nullptr;
    o.ok = m.mmu->fetch(linear, &gpa, &host);
    if (o.ok) o.gpa = gpa.value;
  } else if (r.implicit) {
    o.ok = r.write ? m.mmu->check_write(linear, 1, DS, Privilege::System) : m.mmu->read_system(linear, &byte);
  } else if (r.write) {
    Mmu::Rmw rmw;
    o.ok = m.mmu->rmw_begin(linear, 1, DS, &rmw);
    if (o.ok && rmw.host != nullptr) o.gpa = static_cast<u64>(static_cast<u8*>(rmw.host) - m.ram.data());
    if (o.ok && rmw.host == nullptr) o.gpa = rmw.gpa.value;
  } else {
    o.ok = m.mmu->read(linear, &byte);
    if (o.ok) {
      const u8* host = m.mmu->bulk_pointer(linear, false, 1);
      o.gpa = host != nullptr ? static_cast<u64>(host - m.ram.data())
                              : (port.log.empty() ? ~0ull : port.log[0].gpa);
    }
  }
  if (!o.ok) {
    EXPECT_EQ(m.mmu->stop().kind, Stop::Kind::Fault);
    EXPECT_EQ(m.mmu->stop().vector, vec::PF);
    o.error = m.mmu->stop().error;
    o.cr2 = m.mmu->stop().payload;
  }
  m.mmu->set_port(nullptr);
  return o;
}

std::string describe(const Machine& m, u64 linear, Request r) {
  char text[256];
  std::snprintf(text, sizeof text, "linear %#llx %s%s%s%s cr0 %#llx cr3 %#llx cr4 %#llx efer %#llx ac %d",
                static_cast<unsigned long long>(linear), r.user ? "user " : "supervisor ",
                r.implicit ? "implicit " : "", r.write ? "write" : "", r.fetch ? "fetch" : "",
                static_cast<unsigned long long>(m.state.cr0), static_cast<unsigned long long>(m.state.cr3),
                static_cast<unsigned long long>(m.state.cr4), static_cast<unsigned long long>(m.state.efer),
                (m.state.rflags & rflags::AC) != 0);
  return text;
}

/// Runs the access in the model and in the Mmu from the same memory; compares outcome and memory.
void compare(Machine& m, Model& model, u64 linear, Request r, u64 memory_size, std::vector<u8>* scratch) {
  m.state.seg[SS].dpl = r.user ? 3 : 0;
  scratch->assign(m.at(0), m.at(0) + memory_size);
  const Model::Answer want = model.walk(linear, r);
  std::vector<u8> expected(m.at(0), m.at(0) + memory_size);
  std::memcpy(m.at(0), scratch->data(), memory_size);
  const Outcome got = access(m, linear, r);
  ASSERT_EQ(got.ok, want.ok) << describe(m, linear, r) << " model error " << want.error << " error "
                             << got.error;
  if (want.ok) {
    if (got.gpa) {
      ASSERT_EQ(*got.gpa, want.gpa) << describe(m, linear, r);
    }
  } else {
    ASSERT_EQ(got.error, want.error) << describe(m, linear, r);
    ASSERT_EQ(got.cr2, linear);
  }
  ASSERT_EQ(std::memcmp(m.at(0), expected.data(), memory_size), 0) << describe(m, linear, r);
}

void set_controls(Machine& m, Mode mode, unsigned bits) {
  VcpuState& s = m.state;
  s.cr0 = cr0::PE | cr0::PG | (bits & 1 ? cr0::WP : 0);
  s.cr4 = (mode == Mode::Legacy ? (bits & 32 ? 0 : cr4::PSE) : cr4::PAE) | (bits & 2 ? cr4::SMEP : 0) |
          (bits & 4 ? cr4::SMAP : 0);
  s.efer = (mode == Mode::Long ? efer::LME | efer::LMA : 0) | (bits & 8 ? efer::NX : 0);
  s.rflags = rflags::FIXED1 | (bits & 16 ? rflags::AC : 0);
  s.seg[CS].l = mode == Mode::Long;
}

struct WalkMatrix : testing::TestWithParam<std::tuple<Mode, u64>> {};

TEST_P(WalkMatrix, EveryPermissionCombination) {
  const auto [mode, size] = GetParam();
  Machine m(16 << 20);
  PageTables t(m, mode, 0x1000);
  Model model{m};
  const u64 linear = size == 1ull << 30 ? 0x40000000 + 0x5678 : 0x00c00000 + 0x678;
  const u64 gpa = size == 1ull << 30 ? 0 : size == kPageSize ? 0x200000 : 0x800000;
  t.map(linear & ~(size - 1), gpa, 0, size);
  t.activate();
  const unsigned leaf = size == kPageSize ? 1 : size == 1ull << 30 ? 3 : 2;
  const unsigned top = mode == Mode::Long ? 4 : 2;
  const u64 tables = t.end_of_tables();
  std::vector<u8> scratch;
  const u64 leaf_at = t.entry(linear, leaf);
  const u64 leaf_base = t.load(leaf_at);
  const u64 top_at = t.entry(linear, top);
  const u64 top_base = t.load(top_at) & ~7ull;
  const unsigned flag_count = mode == Mode::Legacy ? 8 : 16;
  unsigned ran = 0;
  for (unsigned controls = 0; controls < 32; controls++) {
    set_controls(m, mode, controls);
    for (unsigned lf = 0; lf < flag_count; lf++) {
      for (unsigned uf = 0; uf < flag_count; uf++) {
        if (leaf == top && uf != lf) continue;
        for (unsigned a = 0; a < 8; a++) {
          Request r;
          r.user = a & 1;
          r.write = (a >> 1) == 1;
          r.fetch = (a >> 1) == 2;
          r.implicit = (a >> 1) == 3;
          if (r.implicit && r.user) r.user = false, r.write = true;
          const auto bits = [](unsigned f) { return (f & 7) | (f & 8 ? pte::NX : 0); };
          if (top != leaf) t.store(top_at, top_base | bits(uf));
          t.store(leaf_at, leaf_base | bits(lf));
          compare(m, model, linear, r, tables, &scratch);
          if (testing::Test::HasFatalFailure()) return;
          ran++;
        }
      }
    }
  }
  EXPECT_GE(ran, 2048u);
}

INSTANTIATE_TEST_SUITE_P(Modes, WalkMatrix,
                         testing::Values(std::tuple{Mode::Legacy, 4096ull},
                                         std::tuple{Mode::Legacy, 4ull << 20}, std::tuple{Mode::Pae, 4096ull},
                                         std::tuple{Mode::Pae, 2ull << 20}, std::tuple{Mode::Long, 4096ull},
                                         std::tuple{Mode::Long, 2ull << 20},
                                         std::tuple{Mode::Long, 1ull << 30}));

/// Each reserved bit of each level, for several physical-address widths.
TEST(Walk, ReservedBits) {
  struct Case {
    Mode mode;
    u64 size;
  };
  for (const Case c : {Case{Mode::Legacy, 4096}, Case{Mode::Legacy, 4 << 20}, Case{Mode::Pae, 4096},
                       Case{Mode::Pae, 2 << 20}, Case{Mode::Long, 4096}, Case{Mode::Long, 2 << 20},
                       Case{Mode::Long, 1 << 30}}) {
    for (unsigned width : {36u, 40u, 46u, 52u}) {
      for (unsigned variant = 0; variant < 8; variant++) {
        Machine m(16 << 20);
        PageTables t(m, c.mode, 0x1000);
        Model model{m};
        model.maxphyaddr = width;
        model.page1g = variant & 2;
        model.amd = variant & 4;
        m.mmu->set_features(width, true, variant & 2, true, variant & 4);
        const u64 linear = c.size == 1 << 30 ? 0x40005678 : 0x00c00678;
        t.map(linear & ~(c.size - 1), 0, pte::P | pte::W | pte::U, c.size);
        t.activate();
        set_controls(m, c.mode, variant & 1 ? 8 : 0);
        const unsigned leaf = c.size == kPageSize ? 1 : c.size == 1 << 30 ? 3 : 2;
        std::vector<u8> scratch;
        for (unsigned level = leaf; level <= (c.mode == Mode::Long ? 4u : 2u); level++) {
          const u64 at = t.entry(linear, level);
          const u64 base = t.load(at);
          for (unsigned bit = 1; bit < (c.mode == Mode::Legacy ? 32u : 64u); bit++) {
            t.store(at, base ^ (1ull << bit));
            compare(m, model, linear, Request{}, t.end_of_tables(), &scratch);
            if (testing::Test::HasFatalFailure()) return;
          }
          t.store(at, base);
        }
      }
    }
  }
}

TEST(Walk, Pse36ReachesBeyondFourGiB) {
  Machine m(16 << 20);
  PageTables t(m, Mode::Legacy, 0x1000);
  ASSERT_EQ(
      m.memory.set_region(1, 0, Gpa(0x1234000000), 0x400000, Hva(reinterpret_cast<u64>(m.at(0x800000)))), 0);
  t.map(0x00400000, 0x1234000000, pte::P | pte::W, 4 << 20);
  t.activate();
  ASSERT_TRUE(m.mmu->write<u32>(0x00412344, 0xabcd));
  EXPECT_EQ(m.peek<u32>(0x812344), 0xabcdu);
  EXPECT_EQ(m.mmu->translate(0x00412344).gpa.value, 0x1234012344u);
  EXPECT_EQ(m.mmu->translate(0x00412344).page_size, 4u << 20);
}

TEST(Walk, PdpteLoads) {
  Machine m(16 << 20);
  m.poke<u64>(0x2020, 0x5001);
  m.poke<u64>(0x2028, 0x6019);
  EXPECT_TRUE(m.mmu->load_pdptrs(0x2020));
  EXPECT_EQ(m.state.pdptr[1], 0x6019u);
  for (u64 bad : {2ull, 4ull, 0x20ull, 0x40ull, 0x80ull, 0x100ull, 1ull << 40, 1ull << 63}) {
    m.poke<u64>(0x2030, bad | 1);
    EXPECT_FALSE(m.mmu->load_pdptrs(0x2020)) << bad;
    EXPECT_EQ(m.state.pdptr[2], 0u);
    m.poke<u64>(0x2030, bad & ~1ull);  // not present: ignored
    EXPECT_TRUE(m.mmu->load_pdptrs(0x2020)) << bad;
    m.state.pdptr[2] = 0;
  }
  EXPECT_FALSE(m.mmu->load_pdptrs(0xf0000000));  // no memory: all ones
}

TEST(Walk, TranslateHasNoSideEffects) {
  Machine m(16 << 20);
  PageTables t(m, Mode::Long, 0x1000);
  t.map(0x400000, 0x9000, pte::P | pte::U);
  t.activate();
  const Mmu::Translation x = m.mmu->translate(0x400123);
  EXPECT_TRUE(x.valid);
  EXPECT_EQ(x.gpa.value, 0x9123u);
  EXPECT_FALSE(x.writable);
  EXPECT_TRUE(x.user);
  EXPECT_TRUE(x.executable);
  EXPECT_EQ(t.load(t.entry(0x400000, 1)), 0x9000 | pte::P | pte::U);
  EXPECT_FALSE(m.mmu->translate(0x401000).valid);
  EXPECT_FALSE(m.mmu->translate(0x0000800000000000).valid);
  m.state.cr3 = 0xff000000;  // nothing there
  EXPECT_FALSE(m.mmu->translate(0x400000).valid);
}

TEST(Walk, FlagsOfReadOnlyTablesStay) {
  Machine m(16 << 20);
  PageTables t(m, Mode::Long, 0x1000);
  t.map(0x400000, 0x100000, pte::P | pte::W);
  ASSERT_EQ(m.memory.set_region(0, 0, Gpa(0), 0, Hva(0)), 0);
  ASSERT_EQ(
      m.memory.set_region(0, 2 /* KVM_MEM_READONLY */, Gpa(0), 0x10000, Hva(reinterpret_cast<u64>(m.at(0)))),
      0);
  ASSERT_EQ(m.memory.set_region(1, 0, Gpa(0x100000), 0x10000, Hva(reinterpret_cast<u64>(m.at(0x100000)))), 0);
  t.activate();
  EXPECT_TRUE(m.mmu->write<u8>(0x400000, 1));
  EXPECT_EQ(t.load(t.entry(0x400000, 1)), 0x100000 | pte::P | pte::W);
  EXPECT_EQ(m.peek<u8>(0x100000), 1);
}

/// No flag is set for an access that faults; a store that crosses into a faulting page sets none either.
TEST(Walk, FaultsSetNoFlags) {
  Machine m(16 << 20);
  PageTables t(m, Mode::Long, 0x1000);
  t.map(0x400000, 0x100000, pte::P | pte::W);
  t.activate();
  const std::vector<u8> before(m.at(0), m.at(t.end_of_tables()));
  EXPECT_FALSE(m.mmu->write<u64>(0x400ffc, 0));
  EXPECT_FALSE(m.mmu->read(0x401000, std::make_unique<u64>().get()));
  m.set_cpl(3);
  EXPECT_FALSE(m.mmu->write<u64>(0x400000, 0));
  EXPECT_EQ(std::memcmp(before.data(), m.at(0), before.size()), 0);
}

/// Random entries in a few tables that refer to one another, to RAM, to nothing, and to garbage.
TEST(Walk, RandomTablesAgreeWithTheModel) {
  std::mt19937_64 rng(0x5eed);
  constexpr u64 kTables = 6;
  constexpr u64 kBytes = (kTables + 1) * kPageSize;
  Machine m(1 << 20);
  std::vector<u8> scratch;
  unsigned translated = 0, protection = 0, reserved = 0, missing = 0;
  for (unsigned round = 0; round < 120; round++) {
    const Mode mode = static_cast<Mode>(rng() % 3);
    const unsigned size = mode == Mode::Legacy ? 4 : 8;
    Model model{m};
    model.maxphyaddr = 36 + rng() % 17;
    model.page1g = rng() & 1;
    model.amd = rng() & 1;
    m.mmu->set_features(model.maxphyaddr, true, model.page1g, true, model.amd);
    for (u64 at = kPageSize; at < kBytes; at += size) {
      u64 e = (1 + rng() % kTables) * kPageSize;
      if (rng() % 4 == 0) e = (rng() % 256) * kPageSize;
      if (rng() % 64 == 0) e = rng() & 0x000ffffffffff000;
      e |= rng() & 0x67;  // P W U A D
      if (rng() % 8 != 0) e |= 7;
      if (rng() % 6 == 0) e = (e & ~0x3fffe000ull) | 0x80;
      if (rng() % 16 == 0) e |= 1ull << (rng() % 64);
      if (rng() % 16 == 0) e |= pte::NX;
      if (rng() % 64 == 0) e = ~0ull;
      if (size == 8) {
        m.poke<u64>(at, e);
      } else {
        m.poke<u32>(at, static_cast<u32>(e));
      }
    }
    m.state.cr3 = (1 + rng() % kTables) * kPageSize;
    for (u64& p : m.state.pdptr) p = (1 + rng() % kTables) * kPageSize | (rng() % 8 != 0);
    for (unsigned i = 0; i < 150; i++) {
      if (i % 10 == 0) set_controls(m, mode, static_cast<unsigned>(rng() % 64));
      u64 linear = rng();
      linear =
          mode == Mode::Long ? static_cast<u64>(static_cast<i64>(linear << 16) >> 16) : linear & 0xffffffff;
      Request r;
      r.user = rng() & 1;
      r.write = rng() % 3 == 0;
      r.fetch = !r.write && rng() % 3 == 0;
      if (!r.fetch && rng() % 8 == 0) r.implicit = true, r.user = false;
      // The page that holds the accessed byte itself must not be a table: reading is harmless anyway.
      compare(m, model, linear, r, kBytes, &scratch);
      if (HasFatalFailure()) return;
      const u32 error = m.mmu->stop().error;
      const bool fault = m.mmu->stop().kind == Stop::Kind::Fault;
      (!fault ? translated : error & pferr::RSVD ? reserved : error & pferr::P ? protection : missing)++;
    }
  }
  EXPECT_GT(translated, 500u);
  EXPECT_GT(protection, 500u);
  EXPECT_GT(reserved, 500u);
  EXPECT_GT(missing, 500u);
}

}  // namespace
}  // namespace ring3::engine
