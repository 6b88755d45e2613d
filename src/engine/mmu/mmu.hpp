#pragma once
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "base/types.hpp"
#include "engine/mmu/attention_word.hpp"
#include "engine/mmu/guest_access.hpp"
#include "engine/mmu/host_range.hpp"
#include "engine/mmu/stop.hpp"
#include "engine/state/vcpu_state.hpp"
#include "memory/guest_memory.hpp"

/// The virtual MMU of one vCPU: page walks, software TLB, access checks, and the tracking of
/// writes to pages that hold decoded or translated code.
///
/// Spec:      Intel SDM vol. 3A ch. 4 (all paging modes; accessed/dirty; error codes 4.7; PCID 4.10).
/// Threading: an Mmu belongs to its vCPU's thread. PhysicalTracker is shared by all vCPUs.
/// Trust:     every address and every page-table entry comes from the guest.
namespace ring3::engine {

/// Where a data access goes when no memslot backs it, or the LAPIC page. Implemented by abi/.
/// A false return means the VMM is needed: the access raises Stop::Exit, and the instruction is
/// re-executed when the answer is there (the implementation replays answers in order).
class MmioPort {
 public:
  virtual ~MmioPort() = default;
  virtual bool mmio_read(Gpa gpa, void* data, unsigned size) = 0;
  virtual bool mmio_write(Gpa gpa, const void* data, unsigned size) = 0;
};

/// Guest pages that hold decoded code, shared by the vCPUs of a VM.
///
/// A vCPU that decodes from a page calls add_code_page() before it reads the bytes; from then on no
/// vCPU has a TLB entry that lets a store reach the page without code_written(), until every vCPU that
/// added the page has released it. Only vCPUs that added a page are told of writes to it. Pages that
/// several memslots show at different guest-physical addresses are one page here.
class PhysicalTracker;

/// What the owner of decoded code is told.
class CodeObserver {
 public:
  virtual ~CodeObserver() = default;
  /// Bytes [gpa, gpa+size) were changed by a vCPU or by the host on the VMM's behalf; never crosses a
  /// page. Called on the observing vCPU's thread: right after the store when it stored itself, else from
  /// serve_requests(), before it runs another block. An accessed flag set by a walk is such a store too, so
  /// any access or fetch may lead here; add_code_page() does not. May call release_code_page().
  virtual void code_written(Gpa gpa, unsigned size) = 0;
  /// An execute translation for this page was just made (TLB fill). The VMM stores to guest memory
  /// unseen by the engine (device DMA), so what was decoded from the page is compared with its
  /// content now, and dropped when it differs. host: 4096 readable bytes.
  virtual void validate_page(Gpa page, const u8* host) = 0;
  /// Drop everything (memslots changed, too many writes to describe). All pages that this vCPU had
  /// added count as released when this returns. Called from serve_requests() only.
  virtual void code_flush() = 0;
};

/// Who is told when this vCPU makes a page dirty that was clean, in a slot that logs. On the vCPU's thread, before the store.
class DirtySink {
 public:
  virtual ~DirtySink() = default;
  /// offset: pages from the slot's beginning.
  virtual void page_dirtied(u32 slot, u64 offset) = 0;
};

/// Who is accessing.
enum class Privilege : u8 {
  Current,  ///< CPL, with SMAP/SMEP and EFLAGS.AC applied
  System,   ///< implicit supervisor access (descriptor tables, TSS): CPL 0, EFLAGS.AC ignored under SMAP
};

class Mmu {
 public:
  struct TlbEntry {
    // Tags: the page's linear address, or kNoTag. An access hits when tag == page and it does not
    // cross the page; slow-path pages (MMIO, code, breakpoints, dirty logging) never get a tag.
    u64 read_tag;
    u64 write_tag;
    u64 exec_tag;
    u64 addend;  ///< host address = linear + addend
  };
  /// No page address, also after its low bits up to any access size were kept.
  static constexpr u64 kNoTag = 1u << 11;
  static constexpr unsigned kTlbBits = 15, kTlbSize = 1u << kTlbBits;
  /// What stands in the empty tags of entry i: differs from every address that selects the entry in more
  /// than the page offset, and has the bit of kNoTag.
  static constexpr u64 no_tag(unsigned i) { return i == 0 ? kNoTag | kPageSize : kNoTag; }
  /// Zeroes hit as little, in all entries but the first, which alone is that of page 0: until an entry is filled the first time it
  /// may be memory that nobody has touched.
  static constexpr TlbEntry no_entry(unsigned i) { return {no_tag(i), no_tag(i), no_tag(i), 0}; }
  enum Bank : u8 { kUser, kSupervisor, kSupervisorNoUser /* SMAP in force */, kBanks };

  Mmu(VcpuState& state, memory::GuestMemory& memory, PhysicalTracker& tracker, unsigned vcpu_index);
  ~Mmu();
  Mmu(const Mmu&) = delete;
  Mmu& operator=(const Mmu&) = delete;

  void set_port(MmioPort* port) { port_ = port; }
  void set_code_observer(CodeObserver* observer) { observer_ = observer; }
  /// May be null, as it is at first.
  void set_dirty_sink(DirtySink* sink) { dirty_sink_ = sink; }
  /// What CPUID offers: physical-address width in bits (32..52), no-execute, 1 GiB pages, PCID. amd: bit 8
  /// of a PML4E or PDPTE that refers to a table is reserved; operands of 16 and 32 bytes are checked for alignment.
  /// Before this: 40 bits, all of them, not amd.
  void set_features(unsigned maxphyaddr, bool nx, bool page1g, bool pcid, bool amd = false);
  /// Breakpoints of the VMM's debugger replace the guest's DR0-3 and DR7; dr null: the guest's again.
  void override_breakpoints(const u64 dr[4], u64 dr7);

  // ---- data accesses: false means stop() says why; nothing was changed ----

  /// linear: after segmentation and truncation. seg: only to choose #SS or #GP for a non-canonical address.
  template <class T>
  bool read(u64 linear, T* out, Seg seg = DS) {
    const TlbEntry& e = bank_->entries[index(linear)];
    // SAFETY: a tag is only set for a page whose memslot backs all of it at linear + addend.
    if (e.read_tag == (linear & kAligned<T>)) [[likely]] {
      guest_load(linear + e.addend, out);
      return true;
    }
    if (e.read_tag == (linear & kPageMask) && (linear & ~kPageMask) <= kPageSize - sizeof(T)) {
      guest_load(linear + e.addend, out);
      return true;
    }
    T value;  // so that out does not escape from callers' registers
    if (!read_slow(linear, &value, sizeof(T), seg, Privilege::Current)) return false;
    *out = value;
    return true;
  }
  template <class T>
  bool write(u64 linear, T value, Seg seg = DS) {
    const TlbEntry& e = bank_->entries[index(linear)];
    // SAFETY: as in read().
    if (e.write_tag == (linear & kAligned<T>)) [[likely]] {
      guest_store(linear + e.addend, value);
      return true;
    }
    if (e.write_tag == (linear & kPageMask) && (linear & ~kPageMask) <= kPageSize - sizeof(T)) {
      guest_store(linear + e.addend, value);
      return true;
    }
    if constexpr (std::is_integral_v<T> && sizeof(T) <= 8) {
      return write_slow_value(linear, value, sizeof(T), seg);  // by value: nothing goes to the stack on a hit
    } else {
      return write_slow(linear, &value, sizeof(T), seg, Privilege::Current);
    }
  }
  /// Any size up to 4096 bytes (vector operands, FXSAVE…): all bytes are checked before any is changed.
  bool read_bytes(u64 linear, void* out, unsigned size, Seg seg = DS, Privilege p = Privilege::Current);
  bool write_bytes(u64 linear, const void* data, unsigned size, Seg seg = DS,
                   Privilege p = Privilege::Current);
  template <class T>
  bool read_system(u64 linear, T* out) {
    return read_bytes(linear, out, sizeof(T), DS, Privilege::System);
  }
  template <class T>
  bool write_system(u64 linear, T v) {
    return write_bytes(linear, &v, sizeof(T), DS, Privilege::System);
  }

  /// Checks that a write of size bytes would succeed (write permission, dirty bit set, no MMIO
  /// side effect), without writing.
  bool check_write(u64 linear, unsigned size, Seg seg = DS, Privilege p = Privilege::Current);
  bool check_read(u64 linear, unsigned size, Seg seg = DS, Privilege p = Privilege::Current);

  /// A location opened for read-modify-write: write permission is checked before the read (a
  /// read-only page faults as a write).
  struct Rmw {
    void* host = nullptr;  ///< RAM inside one page (or host-contiguous): operate on it atomically when LOCKed
    u64 linear = 0;
    Gpa gpa;
    u8 buffer[16] = {};  ///< when host is null (MMIO, split page): the value read
    Seg seg = DS;
    bool tracked = false;  ///< the page holds code: rmw_end() reports the write
  };
  /// size 1..16. false: stop() says why.
  bool rmw_begin(u64 linear, unsigned size, Seg seg, Rmw* rmw) {
    const TlbEntry& e = bank_->entries[index(linear)];
    if (e.write_tag == (linear & kPageMask) && (linear & ~kPageMask) <= kPageSize - size) [[likely]] {
      rmw->host = reinterpret_cast<void*>(linear + e.addend);
      return true;
    }
    return rmw_begin_slow(linear, size, seg, rmw);
  }
  /// After the operation. With host set: the caller has stored through host; reports code writes.
  /// With host null: writes value (may raise Stop::Exit for MMIO, to be replayed). Never faults otherwise.
  bool rmw_end(Rmw& rmw, const void* value, unsigned size) {
    if (rmw.host != nullptr && !rmw.tracked) [[likely]]
      return true;
    return rmw_end_slow(rmw, value, size);
  }
  /// Split (page-crossing) LOCKed accesses serialise on a VM-wide lock, held between begin and end by the
  /// caller.
  std::atomic_flag& split_lock();

  /// A host pointer to [linear, linear+size) inside one page for bulk string work: null when the page
  /// is not plain RAM for that access (then go element by element). Never raises a stop.
  u8* bulk_pointer(u64 linear, bool for_write, unsigned size);

  // ---- for translated code ----

  /// kTlbSize entries that answer Privilege::Current's data accesses; until mode_changed(), a flush_*,
  /// set_cr3() or serve_requests() the address stays the same.
  const TlbEntry* tlb() const { return bank_->entries; }
  static constexpr u64 kTlbGpa = kTlbSize * sizeof(TlbEntry);  ///< of the page addresses, a u64 each, from tlb() on
  /// Fills the TLB so that an access inside one page hits. False when it cannot, or the access would fault.
  /// Never raises a stop; what a walk sets in page tables may reach CodeObserver::code_written().
  bool warm(u64 linear, unsigned size, bool write) { return bulk_pointer(linear, write, size) != nullptr; }
  /// The same for an access in two pages: both are in the TLB then. size at most a page.
  bool warm_across(u64 linear, unsigned size, bool write);

  /// Up to 8 bytes in one page, if the TLB or the window has the page. No flag, no stop: for guesses.
  bool peek(u64 linear, u64* to, unsigned size) const;

  // ---- host windows (window.hpp), for translated code of 64-bit user mode ----

  enum class WindowState : u8 {
    None,   ///< the current address space has none, or it may not be used
    Stale,  ///< refresh_window() first
    Ready,
  };
  /// In user mode. Uses no vector registers.
  WindowState window() const;
  /// For the current address space, in user mode; another one's goes. False: not here. deltas: host - linear by region,
  /// 32 of them, written now and whenever they change, and the first one to `first` too; until the window is closed by whomever.
  bool open_window(u64* deltas, u64* first = nullptr);
  void close_window();
  /// Compares what is mapped with the page tables: the flushes since are done then.
  void refresh_window();
  bool window_full() const;          ///< a page found no room since it was opened
  std::size_t window_pages() const;  ///< that are mapped
  u64 take_window_calls();           ///< system calls made for it since the last time
  /// Addresses for linear's region; false: none, or no window is ready.
  bool open_window_region(u64 linear);
  /// The page of a host address in the window is mapped for a read or a write, as warm() would have it in the TLB, and those
  /// near it that are in the TLB. False: the access faults, or is not one of RAM, or room is short.
  bool warm_window(u64 host, bool write);
  /// The same for an access that may yet not happen: false as well where an accessed or dirty flag would have to be set for it.
  bool foresee_window(u64 host, bool write);

  // ---- instruction fetch ----

  /// Translates linear for execution at the current privilege. On success *gpa is its physical address
  /// and *host a readable pointer valid to the end of the page (null when it is not RAM).
  bool fetch(u64 linear, Gpa* gpa, const u8** host);
  /// Reads up to size bytes for decoding, across a page end when needed; returns how many bytes before
  /// a fault (the fault, if reached, stands in stop()).
  unsigned fetch_bytes(u64 linear, u8* out, unsigned size);
  /// What fetch() would find in the TLB, without any effect. False: nothing. Uses no vector registers.
  bool fetched(u64 linear, Gpa* gpa) const {
    const unsigned i = index(linear);
    *gpa = Gpa(bank_->gpa[i] | (linear & ~kPageMask));
    return bank_->entries[i].exec_tag == (linear & kPageMask);
  }
  /// The page is about to be decoded from. Any thread's later stores to it reach CodeObserver. When it
  /// returns, no vCPU has an older writable TLB entry for the page. Cheap when this vCPU has it already.
  /// It may wait for other vCPUs; the observer is not called meanwhile. Pages without RAM are ignored.
  void add_code_page(Gpa page);
  /// This vCPU holds nothing decoded from the page any more: once no vCPU does, stores to it are fast again.
  void release_code_page(Gpa page);
  /// The same for all pages that this vCPU added.
  void release_code_pages();

  // ---- translations ----

  /// Drops all execute tags, so that pages are validated again on their next fetch. Called at every
  /// KVM_RUN entry and after HLT unless the VMM announces its stores, and at interrupt delivery while paging is
  /// off: the points at which a guest can learn that a device has written code without a TLB fill of its own.
  void expire_fetches();
  /// Names the execute translations in force: another value when one that fetch() gave may have become
  /// wrong (every flush_*, expire_fetches), and per address space, so that a return to a space whose
  /// translations were kept (PCID) brings its value back. What was looked up by linear address under
  /// another value is looked up again.
  u64 fetch_generation() const { return fetch_generation_; }
  /// Whether fetch_generation() is, or may be again, this value that it had.
  bool generation_lives(u64 generation) const;

  /// For KVM_TRANSLATE, INVLPG checks, tests: a walk without side effects.
  struct Translation {
    bool valid = false;
    Gpa gpa;
    bool writable = false, user = false, executable = false;
    u64 page_size = 0;
  };
  Translation translate(u64 linear);

  void flush_all();                       ///< also global entries (CR0/CR4/EFER changes, memslots)
  void flush_non_global();                ///< MOV CR3 without PCID
  void flush_page(u64 linear);            ///< INVLPG: also global; the whole of a large page
  void flush_page(u64 linear, u16 pcid);  ///< INVPCID of one address
  void flush_pcid(u16 pcid);
  void set_cr3(u64 value,
               bool no_flush);  ///< value was already checked; sets state.cr3, flushes what PCID rules say
  /// CPL, EFLAGS.AC, CR0, CR4, EFER or DR0-3/DR7 changed: selects bank and slow-path conditions. Flushes
  /// by itself when CR0, CR4, EFER or (other than by set_cr3()) CR3 changed in a way that calls for it.
  void mode_changed();
  /// The same where only CPL and EFLAGS.AC changed. Uses no vector registers (privilege.cpp): translated code calls it
  /// with the guest's in the host's.
  void privilege_changed();
  /// Loads and checks the four PAE PDPTEs for cr3 (SDM 4.4.1); false: reserved bits set, nothing changed.
  /// The caller flushes (set_cr3() or mode_changed() with it).
  bool load_pdptrs(u64 cr3);

  /// Data-breakpoint matches since the last call, as DR6 bits.
  u64 take_breakpoint_hits();

  /// Requests of other threads (shootdowns, memslot changes, code writes): served here, on the vCPU's
  /// thread, before it runs another block. Cheap when there are none. Clears the registered attention bit.
  void serve_requests();

  const Stop& stop() const { return stop_; }
  Stop& stop() { return stop_; }

 private:
  struct TlbBank {
    TlbEntry entries[kTlbSize];
    u64 gpa[kTlbSize];  ///< page address of the entry; meaningful where one of its tags is set
  };
  template <class T>
  static constexpr u64 kAligned = (sizeof(T) & (sizeof(T) - 1)) == 0 && sizeof(T) <= 64
                                      ? kPageMask | (sizeof(T) - 1)
                                      : kPageMask | (kPageSize - 1);  // odd sizes: only the second check hits
  static unsigned index(u64 linear) { return (linear >> kPageShift) & (kTlbSize - 1); }

  bool read_slow(u64 linear, void* out, unsigned size, Seg seg, Privilege p);
  bool write_slow(u64 linear, const void* data, unsigned size, Seg seg, Privilege p);
  bool write_slow_value(u64 linear, u64 value, unsigned size, Seg seg);
  bool rmw_begin_slow(u64 linear, unsigned size, Seg seg, Rmw* rmw);
  bool rmw_end_slow(Rmw& rmw, const void* value, unsigned size);

  u64 fetch_generation_ = 1;
  TlbBank* bank_ = nullptr;  ///< for Privilege::Current, data and fetch
  Stop stop_;
  VcpuState& state_;
  MmioPort* port_ = nullptr;
  CodeObserver* observer_ = nullptr;
  DirtySink* dirty_sink_ = nullptr;
  friend class PhysicalTracker;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Shared by the vCPUs of a VM; created before them, destroyed after them.
///
/// Shootdown: a request is posted to every other vCPU's mailbox with its attention flag raised;
/// the caller waits until each has served it or is outside guest code (a vCPU that enters guest code
/// serves its mailbox first). While waiting, the caller serves its own mailbox, so two callers do not
/// deadlock. A vCPU that never had a writable entry for the page is not asked.
class PhysicalTracker {
 public:
  explicit PhysicalTracker(memory::GuestMemory& memory);
  ~PhysicalTracker();

  /// The flag polled by vCPU index's run loop; registered by abi/ before the vCPU runs. The bit is set by
  /// any thread after a request was posted and cleared by Mmu::serve_requests(). A vCPU that waits (HLT)
  /// is outside guest code and need not be woken: it serves when it enters again. At most 4096 vCPUs.
  void register_vcpu(unsigned index, Mmu* mmu, AttentionWord* attention, u32 attention_bit);
  void unregister_vcpu(unsigned index);

  /// Bracket guest execution (every use of the vCPU's Mmu while other vCPUs run). enter() serves pending
  /// requests. Inside, the vCPU reaches serve_requests() soon after its attention bit was raised. No nesting.
  ///
  /// Memory ordering: enter stores `in guest`, then loads `pending`; a poster stores `pending`, then loads
  /// `in guest`; all four sequentially consistent, so that at least one of them sees the other: either the
  /// poster waits for the request to be served, or the vCPU serves it before it runs. leave is a release
  /// and the poster's load an acquire: what the vCPU stored before it left is visible to the poster.
  void enter_guest(unsigned index);
  void leave_guest(unsigned index);
  /// Whether the vCPU is between the two. A load of the same order as theirs.
  bool in_guest(unsigned index) const;

  /// Memslots changed: every vCPU drops its TLB and decoded code before this returns. Any thread that is
  /// not inside guest code and holds no lock that a vCPU takes inside guest code.
  void memslots_changed();
  /// Host windows map nothing but guest memory in these ranges from now on (before the first call: all guest memory). What they had
  /// mapped goes with the next memslots_changed(). Any thread.
  void restrict_windows(std::vector<HostRange> to);
  /// Dirty logging was switched on or its bitmap cleared: every vCPU drops writable entries before this
  /// returns. Threads as for memslots_changed().
  void dirty_log_changed();
  /// The engine itself wrote guest memory outside a vCPU's Mmu (pvclock pages, KVM_* ioctls). Other
  /// host stores are found by CodeObserver::validate_page(). Any thread; after the bytes were stored.
  void host_wrote(Gpa gpa, u64 size);
  /// The same for bytes of one page whose slot is known, by the table that is the current one.
  void host_wrote(const memory::SlotTable& table, const memory::Slot& slot, Gpa gpa, unsigned size);

 private:
  friend class Mmu;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace ring3::engine
