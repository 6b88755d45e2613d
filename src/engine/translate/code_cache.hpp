#pragma once
#include <cstdlib>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/result.hpp"
#include "engine/codecache/code_arena.hpp"
#include "engine/translate/block_index.hpp"
#include "engine/translate/block_translator.hpp"

/// The translated blocks of one vCPU: lookup, linking, invalidation.
///
/// A block is found by guest-physical address and mode, and by linear address unless its code is position-
/// independent. In front of that stand the jump tables, one for each of a few address spaces and modes, which translated
/// code searches by itself. What they stand for is the state of the fetch translations; where that is another, so is the table,
/// and a number, the bias, under which links to other pages hold.
///
/// Blocks of user code are found by physical address in one more table, which all address spaces have in common: there translated
/// code finds what its own table misses, of the first process of a program in the second one.
///
/// Links: a direct exit jumps to its successor's code once that is known. Inside a guest page the link holds as
///        long as both blocks live: whoever runs in the page has fetched from it, and a change of mode or
///        translation is never made by translated code. To another page it holds under one bias (of
///        position-independent code: and for one linear address), which the exit compares, and is made anew when
///        it is reached under another; a few times, then the exit searches the jump table first.
///        Windowed code at fixed addresses compares nothing (DirectExit::unguarded): its links to other pages are all
///        good under one bias, hold()'s, and those to pages that are not known to be the same under the next are taken out
///        until they are fetched again.
/// Killed blocks are unlinked at once, and entered nowhere any more, but their code stays until the whole cache
///        is emptied, so that a block may be killed by an access of its own.
/// Bounded: by the arena; when it is full, everything goes.
/// Threading: the vCPU's thread.
namespace ring3::engine {

struct CodeBlock {
  u64 rip = 0;            ///< 0 for position-independent code
  Gpa gpa;
  const u8* code = nullptr;
  const u8* cold = nullptr;  ///< the second part of its code
  u32 code_size = 0, cold_size = 0;
  u32 entry = 0, frame_entry = 0;  ///< offsets in code: entered with the status flags in RFLAGS; in the frame
  /// The same by a jump table (JumpEntry::code).
  const u8* table_entry() const { return pic ? code : code + frame_entry; }
  const u8* dead_stub = nullptr;  ///< where frame_entry leads when it was killed
  u32 first_exit = 0;     ///< its exits' tags begin here
  u32 number = 0;
  u32 guest_bytes = 0;    ///< index of its bytes' copy
  u32 incoming = ~0u;     ///< list of the exits linked to it
  u32 faults = 0;         ///< index of its first fault point
  u16 fault_count = 0;
  u16 exit_count = 0;
  u16 bytes = 0;          ///< of guest code
  u16 count = 0;          ///< instructions
  u8 mode = 0;            ///< TranslateMode::bits(), and kUngrouped
  bool dead = false;
  bool pic = false, user = false;
};

/// A list that grows without moving what is in it.
template <class T>
class Chunks {
 public:
  std::size_t size() const { return size_; }
  T& operator[](std::size_t n) { return chunks_[n / kChunk][n % kChunk]; }
  const T& operator[](std::size_t n) const { return chunks_[n / kChunk][n % kChunk]; }
  T& emplace_back() {
    if (size_ == chunks_.size() * kChunk) chunks_.emplace_back(new T[kChunk]);
    return (*this)[size_++];
  }
  void clear() {
    chunks_.clear();
    size_ = 0;
  }

 private:
  static constexpr std::size_t kChunk = 1u << 10;
  std::vector<std::unique_ptr<T[]>> chunks_;
  std::size_t size_ = 0;
};

class CodeCache {
 public:
  static constexpr u8 kUngrouped = 0x80;  ///< in CodeBlock::mode: made from a BlockRequest::ungrouped
  struct Stats {
    u64 built = 0, killed = 0, flushes = 0, linked = 0;
  };

  static Result<std::unique_ptr<CodeCache>> create(std::size_t arena_bytes);

  /// Of what bias() was asked for last.
  JumpTable* jump_table() { return table_->jumps.get(); }
  const JumpTable& jumps() const { return *table_->jumps; }
  const CodeArena& arena() const { return *arena_; }
  const Stats& stats() const { return stats_; }

  /// The number of this mode and the fetch translations in force; their jump table is jump_table() from here on.
  u64 bias(u8 mode, const Mmu& mmu);
  /// The same without making one: 0. Uses no vector registers.
  u64 known_bias(u8 mode, u64 fetch_generation) {
    if (!table_->is(fetch_generation, mode)) {
      Table* found = other_;
      if (!found->is(fetch_generation, mode)) {
        found = tables_;
        while (found != tables_ + kTables && !found->is(fetch_generation, mode)) ++found;
        if (found == tables_ + kTables) return 0;
      }
      other_ = table_;
      table_ = found;
      table_->used = ++uses_;
    }
    return table_->bias;
  }
  /// By the jump table.
  const u8* recall(u64 rip) const { return table_->jumps->get(rip); }
  void remember(const CodeBlock& block, u64 rip);
  void remember(const u8* code, u64 rip) { table_->jumps->put(rip, code); }
  CommonEntry* common_table() { return common_.get(); }
  static u64 common_key(Gpa gpa, u8 mode) { return gpa.value | u64{mode} << 56; }
  /// Uses no vector registers, as remember().
  const u8* recall_common(Gpa gpa, u64 rip, u8 mode) const {
    const CommonEntry& e = common_[common_index(common_key(gpa, mode))];
    return e.key == common_key(gpa, mode) && e.rip == rip ? reinterpret_cast<const u8*>(e.code) : nullptr;
  }
  void forget(u64 rip) { table_->jumps->forget(rip); }

  /// rip: 0 for position-independent code.
  /// guess: looked at first; null: none.
  CodeBlock* find(Gpa gpa, u64 rip, u8 mode, CodeBlock* guess = nullptr) const;
  /// Where the exit that left with this tag led when it was linked last, or null: as a guess.
  CodeBlock* led_to(u32 tag) { return tag < exits_.size() ? block(exits_[tag].to) : nullptr; }
  u32 next_tag() const { return static_cast<u32>(exits_.size()); }
  /// Null when it does not fit: flush() first. guest: the bytes that it was made from.
  CodeBlock* add(Gpa gpa, u64 rip, u8 mode, bool pic, const TranslatedBlock& block, const u8* guest);
  /// The exit that left with this tag goes to `to` from now on, if that may be.
  /// rip: where it led; bias: the one in force.
  void link(u32 tag, CodeBlock* to, u64 rip, u64 bias);
  /// Windowed code is about to be entered under this bias. fetched(u64 linear, Gpa page): what is known of the fetch
  /// translations in force.
  template <class F>
  void hold(u64 bias, F&& fetched) {
    if (bias == far_bias_) return;
    for (auto& [linear, far] : far_) turn(linear, far, fetched(linear, far.page));
    far_bias_ = bias;
  }
  bool holds(u64 bias) const { return bias == far_bias_; }
  /// This was fetched, under hold()'s bias.
  void arrive(u64 rip, Gpa page);
  /// Instructions of its block that are done when it leaves with this tag; 0: all.
  unsigned exit_insns(u32 tag) const { return tag < exits_.size() ? exits_[tag].insns : 0; }
  /// RIP of the guest instruction whose host instruction faults at pc. page: JitFrame::page.
  bool fault_rip(u64 pc, u64 page, u64* rip) const;
  /// The access through a window that host instruction pc belongs to; its rip is the guest instruction's. False: none.
  bool window_point(u64 pc, u64 page, HostFaultPoint* point) const;
  /// RIP of the block that pc stands in; 0 when it is none's.
  u64 block_rip(u64 pc, u64 page) const;

  /// True: the page was stored to so often since its last block was made that it is better given up.
  bool written(Gpa gpa, unsigned size);
  void validate(Gpa page, const u8* host);
  bool holds_page(Gpa page) const { return pages_.count(page.frame()) != 0; }
  /// Drops everything. No block may be running.
  void flush();
  /// Rises with every flush: pointers and tags from before are void.
  u64 epoch() const { return stats_.flushes; }

 private:
  static constexpr u32 kNone = ~0u;
  /// A store to a page with code costs near 1 us, a block made anew some four times that, and not all are wanted again.
  static constexpr u32 kFewStores = 8, kStoresPerBlock = 2;

  /// There are three a block: places in the arena are distances from its beginning, blocks their numbers.
  struct Exit {
    u64 target = 0;
    u32 field = 0;         ///< the rel32 of its jump
    u32 stub = 0;
    u32 slot = 0;          ///< the frame slot that the stub jumps through
    u32 bias = kNone;      ///< of a link to another page: what it compares with
    u32 from = kNone, to = kNone;
    u32 next_incoming = kNone, previous_incoming = kNone;
    bool frame_flags : 1 = false, wide : 1 = false, ungrouped : 1 = false, unguarded : 1 = false;
    u8 changes = 0;        ///< how often a link to another page was made
    u16 insns = 0;
  };
  static_assert(sizeof(Exit) == 48);
  static constexpr u8 kChanges = 4;

  explicit CodeCache(std::unique_ptr<CodeArena> arena);
  const CodeBlock* block_at(u64 pc) const;
  CodeBlock* block(u32 number) { return number == kNone ? nullptr : &blocks_[number]; }
  const u8* place(u32 in_arena) const { return arena_->begin() + in_arena; }
  static u64 hash(Gpa gpa, u64 rip, u8 mode);
  void kill(CodeBlock* block);
  void unlink(u32 tag);
  /// guard: what a link to another page holds under; 0: never.
  void point(const Exit& exit, const u8* to, u64 guard);
  void forget_tables();
  void restart_biases();
  /// Where unguarded links lead.
  struct Far {
    Gpa page;
    bool on = false;  ///< they are in
  };
  void turn(u64 linear, Far& far, bool on);
  struct CodePage;
  /// Kills the page's blocks that doomed says. Null: none are left, or there were none.
  template <class F>
  CodePage* sweep(u64 frame, F&& doomed);

  std::unique_ptr<CodeArena> arena_;
  static constexpr unsigned kTables = 14;
  /// Of a fetch generation and a mode; with PCID, generations come back.
  struct Table {
    u64 generation = 0;
    u64 used = 0;
    u64 bias = 0;
    u8 mode = 0;
    bool is(u64 of_generation, u8 of_mode) const { return generation == of_generation && mode == of_mode; }
    std::unique_ptr<JumpTable, decltype(&std::free)> jumps{nullptr, &std::free};  ///< zero pages until used
  };
  Table tables_[kTables];
  Table* table_ = tables_;
  Table* other_ = tables_;  ///< that known_bias() came from last
  u64 uses_ = 0;
  u64 next_bias_ = 0;
  std::unique_ptr<CommonEntry[], decltype(&std::free)> common_{nullptr, &std::free};  ///< zero pages until used
  u64 far_bias_ = 0;
  std::unordered_map<u64, Far> far_;  ///< by linear page
  BlockIndex index_;
  Chunks<CodeBlock> blocks_;      ///< in the order of their code
  Chunks<Exit> exits_;            ///< by tag
  std::vector<HostFaultPoint> faults_;
  std::vector<u8> guest_;
  struct CodePage {
    std::vector<CodeBlock*> blocks;
    /// The whole page as it was last looked at, or null; each of the blocks was made from these bytes.
    std::unique_ptr<u8[]> image;
    u32 stores = 0;  ///< since its last block was made
  };
  std::unordered_map<u64, CodePage> pages_;
  std::unique_ptr<u8[]> spare_;  ///< of the page that is being looked at: what is cut off runs no destructors
  Stats stats_;
};

}  // namespace ring3::engine
