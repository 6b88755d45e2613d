#include "engine/interp/block_cache.hpp"

#include <algorithm>
#include <new>

#include "engine/decode/decoder.hpp"
#include "engine/interp/families.hpp"

namespace ring3::engine {
namespace {

/// Stands behind the last instruction, and in every place of a killed block: undoes the step of RIP.
Exec block_end(Context& c, const DecodedInsn& insn) {
  c.s.rip -= insn.length;
  return Exec::BlockEnd;
}
/// More than 15 bytes.
Exec too_long(Context& c, const DecodedInsn&) { return c.gp0(); }

bool near_branch(Op op) {
  switch (op) {
    case Op::Jmp: case Op::Jcc: case Op::Jcxz: case Op::Loop: case Op::Loope: case Op::Loopne: case Op::Call: case Op::Ret:
      return true;
    default: return false;
  }
}

constexpr unsigned kLongest = 15;  ///< bytes of an instruction

constexpr std::size_t round_up(std::size_t n) { return (n + 15) & ~std::size_t{15}; }

}  // namespace

BlockCache::BlockCache(std::size_t bytes, Mmu& mmu)
    : mmu_(mmu),
      arena_size_(std::max<std::size_t>(bytes, 256 * 1024)),
      arena_(new u8[arena_size_]) {}  // untouched memory costs nothing

u64 BlockCache::chunk_hash(const u8* chunk) {
  u64 h = 0;
  for (unsigned i = 0; i < kChunk; i += 8) {
    u64 w;
    std::memcpy(&w, chunk + i, 8);
    h = (h ^ w) * 0x9fb21c651e98df25ull;
    h ^= h >> 29;
  }
  return h;
}

u64 BlockCache::chunk_mask(u64 offset, u64 size) {
  if (size == 0 || offset >= kPageSize) return 0;
  const u64 first = offset / kChunk, last = std::min<u64>(offset + size - 1, kPageSize - 1) / kChunk;
  const u64 up_to_last = last == 63 ? ~0ull : (1ull << (last + 1)) - 1;
  return up_to_last & ~((1ull << first) - 1);
}

BlockCache::Page* BlockCache::find_page(u64 frame) const {
  for (Page* p = pages_[page_bucket(frame)]; p != nullptr; p = p->next)
    if (p->frame == frame) return p;
  return nullptr;
}

BlockCache::Page* BlockCache::page_for(u64 frame) {
  if (Page* p = find_page(frame)) return p;
  Page* p = free_pages_;
  if (p != nullptr) {
    free_pages_ = p->next;
    *p = Page{};
  } else {
    void* memory = allocate(sizeof(Page));
    if (memory == nullptr) return nullptr;
    p = new (memory) Page{};
  }
  p->frame = frame;
  Page*& head = pages_[page_bucket(frame)];
  p->next = head;
  head = p;
  return p;
}

void* BlockCache::allocate(std::size_t bytes) {
  bytes = round_up(bytes);
  if (arena_size_ - used_ < bytes) return nullptr;
  void* p = arena_.get() + used_;
  used_ += bytes;
  return p;
}

void BlockCache::flush(bool release_pages) {
  for (Block* b = all_; b != nullptr; b = b->all_next) {
    b->dead = true;
    for (unsigned i = 0; i < b->count; i++) b->insns()[i].handler = block_end;
  }
  all_ = nullptr;
  free_pages_ = nullptr;
  jumps_.fill(Jump{});
  hash_.fill(nullptr);
  pages_.fill(nullptr);
  reset_pending_ = true;
  stats_.flushes++;
  if (!release_pages) return;
  mmu_.release_code_pages();
  if (sharer_ != nullptr) sharer_->pages_released();
}

void BlockCache::release(Gpa page) {
  if (sharer_ == nullptr || !sharer_->holds_page(page)) mmu_.release_code_page(page);
}

void BlockCache::kill(Block* block) {
  if (block->dead) return;
  block->dead = true;
  for (unsigned i = 0; i < block->count; i++) block->insns()[i].handler = block_end;
  Block** at = &hash_[bucket(block->gpa, block->mode)];
  while (*at != nullptr && *at != block) at = &(*at)->hash_next;
  if (*at == block) *at = block->hash_next;
  stats_.killed++;
}

template <class F>
void BlockCache::sweep(Page* page, F&& doomed) {
  Block** at = &page->blocks;
  while (*at != nullptr) {
    Block* b = *at;
    const unsigned which = b->gpa.frame() == page->frame ? 0 : 1;
    if (!b->dead && doomed(*b)) kill(b);
    if (b->dead) {
      *at = b->page_next[which];
    } else {
      at = &b->page_next[which];
    }
  }
  if (page->blocks != nullptr) return;
  Page** link = &pages_[page_bucket(page->frame)];
  while (*link != page) link = &(*link)->next;
  *link = page->next;
  page->next = free_pages_;
  free_pages_ = page;
  release(Gpa(page->frame << kPageShift));
}

void BlockCache::written(Gpa gpa, unsigned size) {
  Page* page = find_page(gpa.frame());
  if (page == nullptr) {
    release(gpa.page());
    return;
  }
  const u64 first = gpa.page_offset(), end = first + size;
  if (!(page->mask & chunk_mask(first, size))) return;
  sweep(page, [&](const Block& b) {
    u64 from = b.gpa.page_offset(), to = from + b.bytes;
    if (b.gpa.frame() != page->frame) {
      to -= kPageSize;
      from = 0;
    }
    return from < end && first < to;
  });
}

void BlockCache::validate(Gpa gpa, const u8* host) {
  Page* page = find_page(gpa.frame());
  if (page == nullptr) return;
  u64 changed = 0;
  for (u64 left = page->mask; left != 0; left &= left - 1) {
    const unsigned n = static_cast<unsigned>(std::countr_zero(left));
    const u64 h = chunk_hash(host + n * kChunk);
    if (h == page->hash[n]) continue;
    page->hash[n] = h;
    changed |= 1ull << n;
  }
  if (changed == 0) return;
  sweep(page, [&](Block& b) {
    const bool second = b.gpa.frame() != page->frame;
    u64 at = second ? 0 : b.gpa.page_offset();
    const u64 span = second ? b.gpa.page_offset() + b.bytes - kPageSize : b.bytes;
    if (!(changed & chunk_mask(at, span))) return false;
    if (second || b.crosses) return true;
    for (unsigned i = 0; i < b.count; i++) {
      const DecodedInsn& insn = b.insns()[i].insn;
      // What is undefined keeps no bytes to compare.
      if (insn.op == Op::Invalid || std::memcmp(host + at, insn.raw, insn.length) != 0) return true;
      at += insn.length;
    }
    return false;
  });
}

unsigned BlockCache::decode_run(Context& c, const Source& source, const u8* image, unsigned max_insns, unsigned* bytes) {
  const unsigned start = static_cast<unsigned>(source.gpa.page_offset());
  unsigned at = start, n = 0, depends = 0;
  while (n < max_insns && at < kPageSize) {
    CachedInsn& cached = building_[n];
    const unsigned left = static_cast<unsigned>(kPageSize) - at;
    const DecodeResult r =
        decode(image + at, std::min(left, kLongest), c.code_mode, !c.protected_mode, c.features.amd, &cached.insn);
    if (r == DecodeResult::Short) break;
    if (r == DecodeResult::TooLong) {
      if (n != 0) break;
      cached.insn = DecodedInsn{};
      cached.insn.length = kLongest;
      cached.handler = too_long;
      cached.insn.flags = kEndsBlock;
    } else {
      cached.handler = select_handler(c.features, cached.insn);
    }
    n++;
    at += cached.insn.length;
    depends = at - start;
    if (cached.insn.op == Op::Invalid) depends = std::max(depends, at - cached.insn.length - start + std::min(left, kLongest));
    if (cached.insn.has(kEndsBlock)) break;
  }
  *bytes = depends;
  return n;
}

Block* BlockCache::get(Context& c, const Source& source, unsigned max_insns) {
  Block* crossing = nullptr;
  for (Block* b = hash_[bucket(source.gpa, source.mode)]; b != nullptr; b = b->hash_next) {
    if (b->gpa != source.gpa || b->mode != source.mode) continue;
    if (!b->crosses) return b;
    crossing = b;
    break;
  }
  if (crossing != nullptr) {
    // The second page may be another one in this address space. Its fetch may kill blocks: search anew.
    const u64 linear = source.linear + kPageSize - source.gpa.page_offset();
    Gpa second;
    const u8* host;
    if (!c.mmu.fetch(c.code64 ? linear : static_cast<u32>(linear), &second, &host)) return nullptr;
    for (Block* b = hash_[bucket(source.gpa, source.mode)]; b != nullptr; b = b->hash_next)
      if (b->gpa == source.gpa && b->mode == source.mode && b->crosses && b->second_page == second) return b;
  }
  return build(c, source, max_insns);
}

Block* BlockCache::build(Context& c, const Source& source, unsigned max_insns) {
  if (reset_pending_) {
    reset_pending_ = false;
    used_ = 0;
    epoch_++;
  }
  const unsigned offset = static_cast<unsigned>(source.gpa.page_offset());
  const unsigned room = static_cast<unsigned>(kPageSize) - offset;
  // Two pages' images: what is decoded and what is hashed are the same bytes, whoever writes meanwhile.
  u8 image[kPageSize + kChunk];
  const u8* page_host = source.host - offset;
  const unsigned from = offset & ~(kChunk - 1);
  const unsigned to = std::min<unsigned>((offset + max_insns * kLongest + kChunk - 1) & ~(kChunk - 1), kPageSize);
  mmu_.add_code_page(source.gpa.page());
  // SAFETY: host is readable to the end of its page.
  std::memcpy(image + from, page_host + from, to - from);

  unsigned bytes = 0;
  unsigned n = decode_run(c, source, image, max_insns, &bytes);
  Gpa second;
  const u8* second_host = nullptr;
  const bool crosses = n == 0;
  if (crosses) {
    const u64 next = source.linear + room;
    if (!c.code64 && static_cast<u32>(c.s.rip + room) > c.s.seg[CS].limit) {
      c.gp0();
      return nullptr;
    }
    if (!c.mmu.fetch(c.code64 ? next : static_cast<u32>(next), &second, &second_host)) return nullptr;
    if (second_host == nullptr) {
      no_code(c);
      return nullptr;
    }
    mmu_.add_code_page(second);
    std::memcpy(image + from, page_host + from, kPageSize - from);  // the fetch may have set accessed flags here
    std::memcpy(image + kPageSize, second_host, kChunk);
    CachedInsn& cached = building_[0];
    const DecodeResult r =
        decode(image + offset, kLongest, c.code_mode, !c.protected_mode, c.features.amd, &cached.insn);
    cached.handler = r == DecodeResult::Ok ? select_handler(c.features, cached.insn) : too_long;
    if (r != DecodeResult::Ok) {
      cached.insn = DecodedInsn{};
      cached.insn.length = kLongest;
    }
    n = 1;
    bytes = cached.insn.op == Op::Invalid ? kLongest : std::max<unsigned>(cached.insn.length, room + 1);
  }

  const std::size_t size = sizeof(Block) + (n + 1) * sizeof(CachedInsn);
  if (arena_size_ - used_ < round_up(size) + 2 * round_up(sizeof(Page))) {
    flush(true);
    reset_pending_ = false;
    used_ = 0;
    epoch_++;
    mmu_.add_code_page(source.gpa.page());
    if (crosses) mmu_.add_code_page(second);
  }
  Block* block = new (allocate(size)) Block{};
  block->gpa = source.gpa;
  block->mode = source.mode;
  block->count = static_cast<u16>(n);
  block->bytes = static_cast<u16>(bytes);
  block->crosses = crosses;
  block->second_page = second;
  const DecodedInsn& last = building_[n - 1].insn;
  block->plain_end = near_branch(last.op) || !last.has(kEndsBlock);
  for (unsigned i = 0; i < n; i++) new (block->insns() + i) CachedInsn(building_[i]);
  new (block->insns() + n) CachedInsn{block_end, DecodedInsn{}};

  track(block, 0, source.gpa.page(), image, page_host);
  if (crosses) track(block, 1, second.page(), image + kPageSize, second_host);
  Block*& head = hash_[bucket(block->gpa, block->mode)];
  block->hash_next = head;
  head = block;
  block->all_next = all_;
  all_ = block;
  stats_.built++;
  return block;
}

void BlockCache::track(Block* block, unsigned which, Gpa gpa, const u8* image, const u8* host) {
  Page* page = page_for(gpa.frame());
  const u64 begin = which == 0 ? block->gpa.page_offset() : 0;
  const u64 end = std::min<u64>(which == 0 ? begin + block->bytes : block->gpa.page_offset() + block->bytes - kPageSize, kPageSize);
  const u64 mask = chunk_mask(begin, end - begin);
  for (u64 left = mask & page->mask; left != 0; left &= left - 1) {
    const unsigned n = static_cast<unsigned>(std::countr_zero(left));
    if (chunk_hash(image + n * kChunk) == page->hash[n]) continue;
    validate(gpa, host);  // older blocks of these bytes: those that differ go
    page = page_for(gpa.frame());
    mmu_.add_code_page(gpa);
    break;
  }
  for (u64 left = mask; left != 0; left &= left - 1) {
    const unsigned n = static_cast<unsigned>(std::countr_zero(left));
    page->hash[n] = chunk_hash(image + n * kChunk);
  }
  page->mask |= mask;
  block->page_next[which] = page->blocks;
  page->blocks = block;
}

void no_code(Context& c) {
  if (c.cpl == 0 || c.env.exits_without_code) {
    c.exit();
  } else {
    c.ud();
  }
}

}  // namespace ring3::engine
