#pragma once
#include <array>
#include <memory>

#include "engine/interp/context.hpp"

/// Decoded instructions in basic blocks.
///
/// A block is found by the guest-physical address of its first byte and the mode bits that decoding
/// depends on (Context::fetch_key), so that every address space shares it. In front of that stands a
/// direct-mapped table by linear address, whose entries hold as long as Mmu::fetch_generation().
/// A block stays within a page, but for one that is a single instruction across a page end.
///
/// Invalidation: a killed block's handlers become stale(), so the run loop notices after the
///               instruction it is in, without a check per instruction. Memory of killed blocks is not
///               reused before the whole cache is emptied, which happens between blocks only.
/// Bounded:      one arena; when it is full, everything goes.
/// Threading:    the vCPU's thread.
namespace ring3::engine {

struct CachedInsn {
  Handler handler = nullptr;
  DecodedInsn insn;
};

struct Block {
  struct Link {
    u64 key = 0;  ///< 0: none
    u64 generation = 0;
    Block* to = nullptr;
  };
  Gpa gpa;
  u32 mode = 0;       ///< fetch_key and kSingle
  u16 count = 0;      ///< instructions; one entry more ends the block
  u16 bytes = 0;
  bool dead = false;
  bool crosses = false;   ///< the one instruction ends in second_page
  bool plain_end = false; ///< ends by a near branch or by size: neither mode nor shadows can have changed
  Gpa second_page;
  Block* hash_next = nullptr;
  Block* all_next = nullptr;
  Block* page_next[2] = {};  ///< per page it touches
  Link links[2];

  // SAFETY: the arena lays out count + 1 CachedInsn behind each Block.
  CachedInsn* insns() { return reinterpret_cast<CachedInsn*>(this + 1); }
};

/// Another cache of the same vCPU that holds code of guest pages.
class CodePageSharer {
 public:
  virtual ~CodePageSharer() = default;
  /// True: the page is not released when this cache needs it no more.
  virtual bool holds_page(Gpa page) = 0;
  /// All pages of the vCPU were released: everything is to be dropped.
  virtual void pages_released() = 0;
};

class BlockCache {
 public:
  static constexpr unsigned kMaxInsns = 64;
  static constexpr u32 kSingle = 1u << 4;  ///< in Block::mode: a block of one instruction, for stepping
  static constexpr u32 kUserBit = 8;       ///< of fetch_key; decoding does not depend on it

  BlockCache(std::size_t bytes, Mmu& mmu);

  /// By linear address and mode; null when not known under this generation.
  Block* recall(u64 key, u64 generation) const {
    const Jump& j = jumps_[slot(key)];
    return j.key == key && j.generation == generation && !j.block->dead ? j.block : nullptr;
  }
  void remember(u64 key, u64 generation, Block* block) { jumps_[slot(key)] = {key, generation, block}; }

  /// What decoding a block at linear needs; filled by the caller's fetches.
  struct Source {
    u64 linear = 0;
    Gpa gpa;
    const u8* host = nullptr;  ///< valid to the end of the page
    u32 mode = 0;
  };
  /// The block at source: an older one, or decoded now. null: c.stop() says why (the fetch of a second page).
  Block* get(Context& c, const Source& source, unsigned max_insns);

  void written(Gpa gpa, unsigned size);
  void validate(Gpa page, const u8* host);
  /// Forgets everything; memory is reclaimed when the next block is built.
  void flush(bool release_pages);

  /// Changes when blocks' memory may have been reused: links to or from older blocks are void.
  u64 epoch() const { return epoch_; }

  /// May be null. It outlives the cache or is taken away before.
  void set_sharer(CodePageSharer* sharer) { sharer_ = sharer; }

  struct Stats { u64 built = 0, killed = 0, flushes = 0; };
  const Stats& stats() const { return stats_; }

 private:
  static constexpr unsigned kJumpBits = 12, kHashBits = 14, kPageBits = 12;
  static constexpr unsigned kChunk = 64;  ///< bytes per bit of Page::mask

  struct Jump {
    u64 key = 0;
    u64 generation = 0;
    Block* block = nullptr;
  };
  /// A guest page with blocks.
  struct Page {
    u64 frame = 0;
    Page* next = nullptr;
    Block* blocks = nullptr;  ///< through Block::page_next; dead ones are dropped on the way
    u64 mask = 0;             ///< chunks that hold code
    u64 hash[kPageSize / kChunk] = {};  ///< of the chunks in mask, when decoded
  };

  static unsigned slot(u64 key) { return static_cast<unsigned>((key ^ key >> 12) & ((1u << kJumpBits) - 1)); }
  static unsigned bucket(Gpa gpa, u32 mode) {
    return static_cast<unsigned>(((gpa.value << 5 | mode) * 0x9e3779b97f4a7c15ull) >> (64 - kHashBits));
  }
  static unsigned page_bucket(u64 frame) { return static_cast<unsigned>(frame & ((1u << kPageBits) - 1)); }
  static u64 chunk_hash(const u8* chunk);
  static u64 chunk_mask(u64 offset, u64 size);

  Block* build(Context& c, const Source& source, unsigned max_insns);
  /// Decodes at source into building_; how many instructions, 0 when the first one crosses the page end.
  /// image holds the page's bytes at their offsets. *bytes: how many the decoding depends on.
  unsigned decode_run(Context& c, const Source& source, const u8* image, unsigned max_insns, unsigned* bytes);
  Page* find_page(u64 frame) const;
  Page* page_for(u64 frame);
  void* allocate(std::size_t bytes);
  void release(Gpa page);
  void kill(Block* block);
  /// Kills the blocks of page that doomed() names, and forgets the page when none is left.
  template <class F>
  void sweep(Page* page, F&& doomed);
  /// Enters block into the list of the page that image and host show.
  void track(Block* block, unsigned which, Gpa page, const u8* image, const u8* host);

  Mmu& mmu_;
  CodePageSharer* sharer_ = nullptr;
  std::size_t arena_size_;
  std::unique_ptr<u8[]> arena_;
  std::size_t used_ = 0;
  bool reset_pending_ = false;
  u64 epoch_ = 1;
  Stats stats_;
  Block* all_ = nullptr;
  Page* free_pages_ = nullptr;
  std::array<Jump, 1u << kJumpBits> jumps_{};
  std::array<Block*, 1u << kHashBits> hash_{};
  std::array<Page*, 1u << kPageBits> pages_{};
  std::array<CachedInsn, kMaxInsns> building_;
};

/// A fetch from where no memory is. As KVM, which cannot emulate an instruction that it cannot read: #UD at CPL 3, else an
/// exit for which the environment has no access to show.
void no_code(Context& c);

}  // namespace ring3::engine
