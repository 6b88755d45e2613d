#pragma once
#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/backoff.hpp"
#include "base/mapping.hpp"
#include "base/types.hpp"
#include "engine/mmu/attention_word.hpp"
#include "engine/mmu/host_range.hpp"
#include "memory/guest_memory.hpp"

/// What PhysicalTracker and Mmu share: a word of tracking state per guest page, who holds decoded code
/// of a page, and the vCPUs' mailboxes. Private to this room.
///
/// The protocol between a store (vCPU B) and decoding (vCPU A), per page:
///   B, before it gives a TLB entry a write tag, and before any store on the slow path: makes sure its bit
///      stands in the page's word, and looks at the code bit in the same atomic operation (or, when its bit
///      was seen standing, in that load). Without code bit it may store freely until it serves a request.
///      With it, it stores and then posts the write to all holders.
///   A: becomes a holder, sets the code bit (one atomic operation that also reads the writers' bits), asks
///      every writer to drop its entries and waits until each has done so or is outside guest code; then
///      reads the bytes.
/// All operations on the word are sequentially consistent. Either B's operation comes first, then A sees
/// B's bit and B's store is finished before B serves A's request; or A's comes first and B sees the code bit.
/// Writers' bits are cleared only by a holder after such a wait (the code bit cannot vanish under it, and
/// while it stands no write tag is made), or with the code bit when the last holder leaves.
namespace ring3::engine {

class Mmu;

struct CodeWrite {
  Gpa gpa;
  unsigned size = 0;
};

/// Requests to one vCPU. Lives as long as the tracker.
struct alignas(64) Mailbox {
  enum Pending : u32 { kTlb = 1, kCode = 2, kSlots = 4 };
  static constexpr std::size_t kMaxWrites = 256, kMaxDrops = 64;

  std::atomic<u32> pending{0};
  std::atomic<bool> in_guest{false};
  std::atomic<bool> live{false};
  std::atomic<u64> tlb_served{0}, slots_served{0};
  std::atomic<Mmu*> mmu{nullptr};

  std::mutex mutex;             // guards what follows
  std::vector<u64> drop_pages;  ///< host addresses of pages whose write tags go
  bool drop_all_writes = false;
  std::vector<CodeWrite> writes;
  bool code_flush = false;
  bool slots_changed = false;
  u64 tlb_posted = 0, slots_posted = 0;
  AttentionWord* attention = nullptr;
  u32 attention_bit = 0;

  void raise(u32 what) {  // mutex held
    pending.fetch_or(what, std::memory_order_seq_cst);
    if (attention != nullptr) attention->raise(attention_bit);
  }
};

class TrackerCore {
 public:
  static constexpr u16 kCode = 0x8000, kWriters = 0x7fff;
  static constexpr unsigned kMaxVcpus = 4096;
  static u16 writer_bit(unsigned vcpu) { return static_cast<u16>(1u << (vcpu % 15)); }

  explicit TrackerCore(memory::GuestMemory& memory);
  ~TrackerCore();

  /// Created on first use. index < kMaxVcpus.
  Mailbox& mailbox(unsigned index);

  /// The word of a page. Never fails: when host memory is short, a shared word that always says code.
  std::atomic<u16>& word(Gpa page);
  bool is_shared_word(const std::atomic<u16>& w) const { return &w == &fallback_; }
  /// The one name of a page that several slots may show: that of the slot with the lowest gpa.
  static Gpa key(const memory::SlotTable& table, const memory::Slot& slot, Gpa page);

  /// Registers a store. True: the page holds code, and the store is followed by code_stored().
  bool note_writer(Gpa key_page, u16 bit) {
    std::atomic<u16>& w = word(key_page);
    u16 v = w.load(std::memory_order_seq_cst);
    if ((v & bit) == 0) v = w.fetch_or(bit, std::memory_order_seq_cst);
    return (v & kCode) != 0;
  }

  /// Adds vcpu, which knows the page as `page`, to the holders. True when the page was not held by it yet.
  bool add_holder(Gpa key_page, Gpa page, unsigned vcpu);
  void remove_holder(Gpa page, unsigned vcpu);
  void remove_holders(unsigned vcpu);

  /// Bytes of a code page changed: tells all holders. Calls own(gpa, size) for those of `vcpu`, after all
  /// others were posted to. vcpu ~0u: nobody's own.
  template <class Own>
  void code_stored(Gpa key_page, u64 offset, unsigned size, unsigned vcpu, Own own) {
    std::vector<Gpa> mine;
    post_code_write(key_page, offset, size, vcpu, &mine);
    for (Gpa page : mine) own(page + offset, size);
  }

  /// Asks all vCPUs with a bit in mask, but not `self`, to drop write tags of the page at host, or all
  /// when host is 0; returns when they have. serve_own is called while waiting.
  template <class ServeOwn>
  void shoot_writers(u16 mask, u64 host, unsigned self, ServeOwn serve_own) {
    std::vector<std::pair<Mailbox*, u64>> tickets;
    post_drop(mask, host, self, &tickets);
    for (auto& [box, ticket] : tickets) {
      for (unsigned spins = 0; box->in_guest.load(std::memory_order_seq_cst) &&
                               box->tlb_served.load(std::memory_order_acquire) < ticket;
           spins++) {
        serve_own();
        back_off(spins);
      }
    }
  }

  void slots_changed();
  void restrict_windows(std::vector<HostRange> to) {
    std::atomic_store(&window_memory_, std::make_shared<const std::vector<HostRange>>(std::move(to)));
  }
  /// Whether [host, host + size) may be mapped in windows.
  bool windows_may_map(u64 host, u64 size) const {
    const auto allowed = std::atomic_load(&window_memory_);
    if (allowed == nullptr) return true;
    for (const HostRange& r : *allowed) {
      if (host >= r.begin && host < r.end && size <= r.end - host) return true;
    }
    return false;
  }
  void host_wrote(Gpa gpa, u64 size);
  void host_wrote(const memory::SlotTable& table, const memory::Slot& slot, Gpa at, unsigned size);

 private:
  struct Holder {
    u32 vcpu;
    Gpa page;
  };
  static constexpr unsigned kChunkShift = 18;  // pages a chunk: 1 GiB of guest memory, 512 KiB of words
  static constexpr u64 kMaxFrame = 1ull << (52 - kPageShift);

  void post_code_write(Gpa key_page, u64 offset, unsigned size, unsigned vcpu, std::vector<Gpa>* mine);
  void post_drop(u16 mask, u64 host, unsigned self, std::vector<std::pair<Mailbox*, u64>>* tickets);
  void drop_holder_entry(u64 key_frame, const std::vector<Holder>& left);

  memory::GuestMemory& memory_;
  std::shared_ptr<const std::vector<HostRange>> window_memory_;  ///< by atomic_load(); null: all
  std::array<std::atomic<Mailbox*>, kMaxVcpus> mailboxes_{};
  std::atomic<unsigned> mailbox_end_{0};
  Mapping directory_;  ///< lazily resident array of std::atomic<std::atomic<u16>*>, one a chunk
  std::atomic<u16> fallback_{kCode | kWriters};
  std::mutex chunk_mutex_;
  std::vector<Mapping> chunks_;  // guarded by chunk_mutex_
  std::mutex holders_mutex_;     // never held while waiting or while an observer runs
  std::unordered_map<u64, std::vector<Holder>> holders_;  // by key frame; guarded by holders_mutex_
};

}  // namespace ring3::engine
