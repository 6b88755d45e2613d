#pragma once
#include <vector>

#include "engine/mmu/mmu.hpp"
#include "engine/mmu/tlb.hpp"
#include "engine/mmu/tracker_impl.hpp"
#include "engine/mmu/window.hpp"

namespace ring3::engine {

/// What stands behind Mmu. Owned by the vCPU's thread.
struct Mmu::Impl {
  using Bank = TlbBankWithSets<TlbBank>;
  enum class Access : u8 { Read, Write, Exec };

  /// Why a walk is made.
  struct WalkFor {
    bool write = false;
    bool fetch = false;
    bool user = false;     ///< a user-mode access
    bool no_user = false;  ///< SMAP forbids this supervisor access pages of the user
  };
  struct Walk {
    bool ok = false;
    u32 error = 0;  ///< #PF error code
    Gpa gpa;
    u8 shift = 12;
    bool writable = false, user = false, no_execute = false, global = false;  ///< all levels combined
    bool dirty = false;    ///< the page's dirty flag stands, so that a write would change no table
    bool settled = false;  ///< the accessed and dirty flags that this walk asks for stand already
  };

  /// One page's part of an access.
  struct Part {
    u8* host = nullptr;  ///< null: MMIO
    Gpa gpa;
    unsigned size = 0;
    bool tracked = false;  ///< a write to a page that holds code
  };
  struct Parts {
    Part part[2];
    unsigned count = 0;
  };

  /// A page that was translated for execution.
  struct Fetched {
    u64 linear;
    Gpa gpa;
    u8 shift;  ///< of the guest's mapping
  };

  /// The TLB of one address space.
  struct Space {
    Banks<Bank, kBanks> bank;
    i32 pcid = -1;       ///< -1: holds nothing that counts
    bool stale = false;  ///< flush before use
    u64 used = 0;
    u64 exec_epoch = 0;
    bool low_global = false;  ///< a global page of the lower half was filled
    u64 generation = 0;  ///< Mmu::fetch_generation() of user mode while this space is the current one
    PageFilter executed;  ///< pages that generation may stand for
    std::vector<Fetched> fetched;  ///< those of user mode themselves, some more than once; up to kMostFetched
    u64 checks = 0;  ///< how many of them may be looked at again: flushes that come all the time cost what is in use then
  };
  static constexpr unsigned kSpaces = 8;
  static constexpr std::size_t kMostFetched = 4096;  ///< so many are not looked at again
  static constexpr u64 kChecks = 16;  ///< that each page brings when it is fetched

  enum class Paging : u8 { None, Legacy, Pae, Long };

  Impl(Mmu& m, memory::GuestMemory& mem, PhysicalTracker::Impl& t, unsigned index)
      : mmu(m),
        s(m.state_),
        memory(mem),
        shared(t),
        tracker(t.core),
        vcpu(index),
        box(t.core.mailbox(index)) {}

  // walk.cpp
  void configure();  ///< paging mode and permissions from the control registers
  bool walk(u64 linear, const WalkFor& why, bool set_flags, Walk* out);
  bool is_canonical(u64 linear) const;

  // impl.cpp
  const memory::Slot* find(Gpa gpa);
  void refresh_table();
  bool linear_ok(u64 linear, unsigned size, Seg seg);
  u64 wrap(u64 linear, Privilege p) const;
  Bank& bank_for(Privilege p);
  /// One page: from the TLB, or by walking and filling.
  bool page(u64 linear, Access access, Bank& bank, Part* out);
  bool fill(u64 linear, Access access, Bank& bank, Part* out);
  /// Whether a page that was walked to for a read takes writes too, without a trace in the page tables or in a dirty log.
  bool takes_writes(const Walk& w, const memory::Slot& slot, const Bank& bank);
  /// Sets the exec tag of linear's entry, which is filled.
  void executable(u64 linear, Bank& bank, unsigned page_shift, bool global);
  /// Walks without setting flags or filling: whether page() would succeed; sets stop() if not.
  bool probe(u64 linear, Access access, const Bank& bank);
  WalkFor walk_for(Access access, const Bank& bank) const;
  /// Dirty log and code tracking before a store. True: the page holds code.
  bool prepare_store(const memory::Slot& slot, Gpa gpa);
  bool resolve(u64 linear, unsigned size, Access access, Privilege p, Seg seg, Parts* out);
  bool misaligned(u64 linear, unsigned size) const;
  void stored(const Part& part);  ///< after a store to a tracked page
  void note_breakpoints(u64 linear, unsigned size, bool read, bool write);
  bool read_parts(const Parts& parts, u8* out);
  bool write_parts(const Parts& parts, const u8* data);

  // spaces.cpp
  void activate(u16 pcid);
  void select_bank();
  void update_breakpoints();
  void flush_everything();
  /// An execute translation of sp was dropped: what was looked up through it is looked up again.
  void renew(Space& sp);
  void note_fetched(Space& sp, u64 linear, Gpa gpa, u8 shift) {
    if (sp.fetched.size() == kMostFetched) return;
    sp.fetched.push_back({linear & kPageMask, gpa, shift});
    sp.checks += kChecks;
  }
  /// The same for the current space after a flush; but its generation holds on when the page tables have all that was fetched
  /// under it as it was, as if it had been fetched again at once. Most flushes are for other pages.
  void renew_unless_same(const u64* of_page = nullptr);  ///< of_page: only the page of this address was flushed
  bool fetched_are_same(const u64* of_page);
  void renew_supervisor();
  /// Supervisor code of global pages has a generation of its own, which no CR3 changes.
  void name_fetches() {
    mmu.fetch_generation_ = user_mode || supervisor_local ? space->generation : supervisor_generation;
  }
  static void note_executable(const Bank& b, PageFilter* to) {
    b.executable.for_each([&](unsigned i) { to->add(b.entries[i].exec_tag, b.shift[i]); });
  }
  void flush_page_of(Space& sp, u64 linear);
  template <class F>
  void for_each_bank(F f) {
    for (auto& sp : spaces) {
      if (sp->pcid < 0) continue;
      for (Bank& b : sp->bank) f(b);
    }
  }
  // windows.cpp
  bool has_window(const Space& sp) const { return &sp == window_space; }
  void close_window();
  void map_large(u64 linear, u64 host, bool write);
  /// Window::map(), where that memory may be in windows.
  bool map_window(u64 page, u64 host, unsigned count, bool write, u8 shift);
  void stale_window(const Space& sp) { window_stale |= &sp == window_space; }
  void show_deltas() const {
    std::copy(window.deltas().begin(), window.deltas().end(), window_deltas);
    if (window_first != nullptr) *window_first = window.deltas()[0];
  }

  void serve_tlb();
  void serve_all();
  void drop_own_writes(u64 host);

  Mmu& mmu;
  VcpuState& s;
  memory::GuestMemory& memory;
  PhysicalTracker::Impl& shared;
  TrackerCore& tracker;
  const unsigned vcpu;
  Mailbox& box;

  std::shared_ptr<const memory::SlotTable> table;
  const memory::Slot* last_slot = nullptr;

  // Features.
  unsigned maxphyaddr = 40;
  bool has_nx = true, has_1g = true, has_pcid = true, amd = false;

  // From the control registers, by configure().
  Paging paging = Paging::None;
  bool wp = false, nxe = false, smep = false, pse = false, pge = false;
  u64 reserved_high = 0;  ///< bits of a 64-bit entry above MAXPHYADDR (and NX when off)
  u64 seen_cr0 = ~0ull, seen_cr4 = ~0ull, seen_efer = ~0ull, seen_cr3 = 0;

  // From the mode, by mode_changed().
  bool user_mode = false;
  bool smap = false;  ///< CR4.SMAP with paging on
  bool check_alignment = false;
  Bank* current =
      nullptr;  ///< the bank of Privilege::Current (bank_ is the empty one under alignment checks)

  std::vector<std::unique_ptr<Space>> spaces;
  Space* space = nullptr;
  u64 use_clock = 0;
  u64 exec_epoch = 0;
  u64 last_generation = 1;
  u64 supervisor_generation = 1;
  PageFilter supervisor_executed;  ///< pages that supervisor_generation may stand for
  bool supervisor_local = false;   ///< supervisor code of a page that is not global was fetched
  Banks<TlbBank, 1> empty;  ///< never filled

  struct Breakpoint {
    u64 start = 0, size = 0;
    bool on_read = false, on_write = false;
    u8 bit = 0;
  };
  std::array<Breakpoint, 4> breakpoints{};
  unsigned breakpoint_count = 0;
  bool override_on = false;
  u64 override_dr[4] = {}, override_dr7 = 0;
  u64 seen_dr[4] = {}, seen_dr7 = 0;
  u64 hits = 0;

  ring3::engine::Window window;
  Space* window_space = nullptr;  ///< whose user mode it belongs to; null: it holds nothing
  bool window_stale = false;
  u64 *window_deltas = nullptr, *window_first = nullptr;

  Parts open_rmw;  ///< of the Rmw that has no host pointer
};

}  // namespace ring3::engine
