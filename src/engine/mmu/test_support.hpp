#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "base/mapping.hpp"
#include "engine/mmu/mmu.hpp"

/// For tests of the engine: guest RAM with an Mmu on it, and a builder of guest page tables.
namespace ring3::engine::test {

namespace pte {
inline constexpr u64 P = 1, W = 2, U = 4, A = 0x20, D = 0x40, PS = 0x80, G = 0x100, NX = 1ull << 63;
}

/// RAM at guest-physical 0, one vCPU's state and Mmu (vCPU 0), not yet registered.
struct Machine {
  explicit Machine(u64 ram_size = 64 << 20)
      : ram(std::move(Mapping::anonymous(ram_size)).value()), tracker(memory) {
    memory.set_region(0, 0, Gpa(0), ram_size, Hva(reinterpret_cast<u64>(ram.data())));
    state.reset();
    mmu = std::make_unique<Mmu>(state, memory, tracker, 0);
  }

  u8* at(u64 gpa) { return ram.data() + gpa; }
  template <class T>
  T peek(u64 gpa) {
    T v;
    std::memcpy(&v, at(gpa), sizeof v);
    return v;
  }
  template <class T>
  void poke(u64 gpa, T v) {
    std::memcpy(at(gpa), &v, sizeof v);
  }

  /// Sets CPL with flat segments of the mode (code64: 64-bit code), and tells the Mmu.
  void set_cpl(u8 cpl) {
    state.seg[SS].dpl = state.seg[CS].dpl = cpl;
    mmu->mode_changed();
  }
  void set_ac(bool on) {
    state.rflags = on ? state.rflags | rflags::AC : state.rflags & ~rflags::AC;
    mmu->mode_changed();
  }

  Mapping ram;
  memory::GuestMemory memory;
  PhysicalTracker tracker;
  VcpuState state;
  std::unique_ptr<Mmu> mmu;
};

/// Builds guest page tables in a Machine's RAM. Upper levels are made as permissive as can be (W, U), so
/// that the flags of map() decide; entry() finds any level for a test to change.
class PageTables {
 public:
  enum class Mode { Legacy, Pae, Long };

  /// Tables are taken from [first_table, …), upwards.
  PageTables(Machine& m, Mode mode, u64 first_table = 0x100000) : m_(m), mode_(mode), next_(first_table) {
    root_ = allocate();
    if (mode_ == Mode::Pae) {
      for (unsigned i = 0; i < 4; i++) m_.poke<u64>(root_ + 8 * i, allocate() | pte::P);
    }
  }

  u64 root() const { return root_; }
  u64 end_of_tables() const { return next_; }

  /// Leaf with the given flags (pte::…); size 4 KiB, 2 MiB / 4 MiB, or 1 GiB.
  void map(u64 linear, u64 gpa, u64 flags, u64 size = kPageSize) {
    const unsigned leaf = level_of(size);
    for (unsigned level = top(); level > leaf; level--) {
      const u64 at = entry(linear, level);
      if (!(load(at) & pte::P)) store(at, allocate() | pte::P | pte::W | pte::U);
    }
    if (size != kPageSize && mode_ == Mode::Legacy) gpa = (gpa & 0xffffffff) | ((gpa >> 32) & 0xff) << 13;
    store(entry(linear, leaf), gpa | flags | (size == kPageSize ? 0 : pte::PS));
  }
  void unmap(u64 linear, u64 size = kPageSize) { store(entry(linear, level_of(size)), 0); }

  /// Guest-physical address of the entry of a level for linear: 1 PTE, 2 PDE, 3 PDPTE, 4 PML4E. The
  /// tables above must exist.
  u64 entry(u64 linear, unsigned level) {
    u64 table = root_;
    for (unsigned l = top_including_pdpt();; l--) {
      const u64 at = table + index(linear, l) * entry_size();
      if (l == level) return at;
      table = load(at) & 0x000ffffffffff000;
    }
  }
  u64 load(u64 gpa) { return entry_size() == 8 ? m_.peek<u64>(gpa) : m_.peek<u32>(gpa); }
  void store(u64 gpa, u64 value) {
    if (entry_size() == 8) {
      m_.poke<u64>(gpa, value);
    } else {
      m_.poke<u32>(gpa, static_cast<u32>(value));
    }
  }

  /// Turns paging on in the Machine's state with these tables; code64 for Long.
  void activate(u64 cr0_extra = cr0::WP, u64 cr4_extra = 0, bool nx = true) {
    VcpuState& s = m_.state;
    s.cr0 |= cr0::PE | cr0::PG | cr0_extra;
    s.cr4 = cr4_extra | (mode_ == Mode::Legacy ? cr4::PSE : cr4::PAE);
    s.efer = (mode_ == Mode::Long ? efer::LME | efer::LMA : 0) | (nx && mode_ != Mode::Legacy ? efer::NX : 0);
    s.seg[CS].l = mode_ == Mode::Long;
    s.seg[CS].db = mode_ != Mode::Long;
    s.cr3 = root_;
    if (mode_ == Mode::Pae) m_.mmu->load_pdptrs(root_);
    m_.mmu->mode_changed();
    m_.mmu->flush_all();
  }

 private:
  unsigned entry_size() const { return mode_ == Mode::Legacy ? 4 : 8; }
  unsigned top() const { return mode_ == Mode::Long ? 4 : 2; }
  unsigned top_including_pdpt() const { return mode_ == Mode::Long ? 4 : mode_ == Mode::Pae ? 3 : 2; }
  unsigned level_of(u64 size) const { return size == kPageSize ? 1 : size == (1ull << 30) ? 3 : 2; }
  u64 index(u64 linear, unsigned level) const {
    if (mode_ == Mode::Legacy) return (linear >> (2 + 10 * level)) & 1023;
    if (mode_ == Mode::Pae && level == 3) return (linear >> 30) & 3;
    return (linear >> (3 + 9 * level)) & 511;
  }
  u64 allocate() {
    const u64 at = next_;
    next_ += kPageSize;
    std::memset(m_.at(at), 0, kPageSize);
    return at;
  }

  Machine& m_;
  Mode mode_;
  u64 next_;
  u64 root_ = 0;
};

/// A device that remembers what it was asked; answers reads with the low byte of each address.
struct FakePort final : MmioPort {
  struct Access {
    bool write;
    u64 gpa;
    unsigned size;
    u64 data;
  };
  std::vector<Access> log;
  unsigned refuse_after = ~0u;  ///< accesses answered before one is refused

  bool mmio_read(Gpa gpa, void* data, unsigned size) override {
    if (log.size() >= refuse_after) return false;
    for (unsigned i = 0; i < size; i++) static_cast<u8*>(data)[i] = static_cast<u8>(gpa.value + i);
    log.push_back({false, gpa.value, size, 0});
    return true;
  }
  bool mmio_write(Gpa gpa, const void* data, unsigned size) override {
    if (log.size() >= refuse_after) return false;
    u64 v = 0;
    std::memcpy(&v, data, size);
    log.push_back({true, gpa.value, size, v});
    return true;
  }
};

/// An observer that remembers what it was told.
struct FakeObserver final : CodeObserver {
  struct Write {
    u64 gpa;
    unsigned size;
  };
  std::vector<Write> writes;
  std::vector<u64> validated;
  unsigned flushes = 0;
  void code_written(Gpa gpa, unsigned size) override { writes.push_back({gpa.value, size}); }
  void validate_page(Gpa page, const u8*) override { validated.push_back(page.value); }
  void code_flush() override { flushes++; }
};

}  // namespace ring3::engine::test
