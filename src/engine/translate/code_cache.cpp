#include "engine/translate/code_cache.hpp"

#include <algorithm>
#include <cstring>

#include "base/split_mix.hpp"

namespace ring3::engine {

Result<std::unique_ptr<CodeCache>> CodeCache::create(std::size_t arena_bytes) {
  auto arena = CodeArena::create(std::clamp<std::size_t>(arena_bytes, 1u << 20, 1u << 30));
  if (!arena) return arena.error();
  std::unique_ptr<CodeCache> cache(new CodeCache(std::move(*arena)));
  for (const Table& t : cache->tables_)
    if (t.jumps == nullptr || cache->common_ == nullptr) return Error::of(ENOMEM, "jump tables of the code cache");
  return cache;
}

CodeCache::CodeCache(std::unique_ptr<CodeArena> arena)
    : arena_(std::move(arena)) {
  for (Table& t : tables_) {
    t.jumps.reset(static_cast<JumpTable*>(std::calloc(1, sizeof(JumpTable))));
    if (t.jumps != nullptr) t.jumps->empty_first();
  }
  common_.reset(static_cast<CommonEntry*>(std::calloc(kCommonEntries, sizeof(CommonEntry))));
}

void CodeCache::forget_tables() {
  for (Table& t : tables_) {
    t.bias = 0;
    t.jumps->clear();
  }
}

/// All numbers were used: those of old links come again.
void CodeCache::restart_biases() {
  forget_tables();
  for (u32 tag = 0; tag < exits_.size(); tag++)
    if (exits_[tag].bias != kNone) unlink(tag);
  next_bias_ = 1ull << 48;
  far_bias_ = 0;
}

u64 CodeCache::bias(u8 mode, const Mmu& mmu) {
  const u64 fetch_generation = mmu.fetch_generation();
  if (const u64 known = known_bias(mode, fetch_generation); known != 0) return known;
  if (!table_->is(fetch_generation, mode)) {
    // The last one whose generation is gone for good: it is in the host's caches. Else the one that was not used for longest.
    constexpr u64 kGone = 1ull << 63;
    const auto worth = [&](const Table& t) { return mmu.generation_lives(t.generation) ? kGone - 1 - t.used : kGone + t.used; };
    table_ = std::max_element(std::begin(tables_), std::end(tables_), [&](const Table& a, const Table& b) { return worth(a) < worth(b); });
    table_->jumps->clear();
    table_->generation = fetch_generation;
    table_->mode = mode;
    table_->used = ++uses_;
  }
  next_bias_ += 1ull << 48;
  if (next_bias_ == 0) restart_biases();
  return table_->bias = next_bias_;
}

u64 CodeCache::hash(Gpa gpa, u64 rip, u8 mode) {
  return SplitMix64::mix(gpa.value ^ rip << 17 ^ u64{mode} << 56);
}

CodeBlock* CodeCache::find(Gpa gpa, u64 rip, u8 mode, CodeBlock* guess) const {
  const auto is = [&](const CodeBlock& b) { return b.rip == rip && b.gpa == gpa && b.mode == mode; };
  if (guess != nullptr && is(*guess) && !guess->dead) return guess;
  return index_.find(hash(gpa, rip, mode), is);
}

void CodeCache::remember(const CodeBlock& block, u64 rip) {
  const u8* const code = block.table_entry();
  remember(code, rip);
  if (!block.user) return;
  const u64 key = common_key(block.gpa, block.mode);
  common_[common_index(key)] = {key, reinterpret_cast<u64>(code), block.rip};
}

CodeBlock* CodeCache::add(Gpa gpa, u64 rip, u8 mode, bool pic, const TranslatedBlock& block, const u8* guest) {
  const std::span<const u8> all(block.code);
  const u8* code = arena_->append(all.first(block.cold));
  const u8* cold = code == nullptr ? nullptr : arena_->append_cold(all.subspan(block.cold));
  if (cold == nullptr) return nullptr;
  const auto place = [&](u32 offset) { return offset < block.cold ? code + offset : cold + (offset - block.cold); };
  const auto in_arena = [&](u32 offset) { return static_cast<u32>(place(offset) - arena_->begin()); };
  for (const u32 field : block.relatives) {
    i32 distance;
    std::memcpy(&distance, block.code.data() + field, 4);
    const u32 target = field + 4 + static_cast<u32>(distance);
    if ((field < block.cold) == (target < block.cold)) continue;
    distance = static_cast<i32>(place(target) - (place(field) + 4));  // an arena has at most 1 GiB
    u8 bytes[4];
    std::memcpy(bytes, &distance, 4);
    arena_->patch(place(field), bytes);
  }
  CodeBlock& b = blocks_.emplace_back();
  b.number = static_cast<u32>(blocks_.size() - 1);
  b.rip = rip;
  b.gpa = gpa;
  b.mode = mode;
  b.code = code;
  b.pic = pic;
  b.user = (mode & 1) != 0;
  b.cold = cold;
  b.entry = block.entry;
  b.frame_entry = block.frame_entry;
  b.dead_stub = place(block.dead_stub);
  b.code_size = block.cold;
  b.cold_size = static_cast<u32>(block.code.size()) - block.cold;
  b.bytes = static_cast<u16>(block.bytes);
  b.count = static_cast<u16>(block.insns);
  b.guest_bytes = static_cast<u32>(guest_.size());
  guest_.insert(guest_.end(), guest, guest + block.bytes);
  b.first_exit = next_tag();
  b.exit_count = static_cast<u16>(block.exits.size());
  for (const DirectExit& e : block.exits) {
    Exit& x = exits_.emplace_back();
    x.field = in_arena(e.field);
    x.stub = in_arena(e.stub);
    x.target = e.target;
    x.slot = in_arena(e.slot);
    x.frame_flags = e.frame_flags;
    x.wide = e.wide;
    x.ungrouped = e.ungrouped;
    x.unguarded = e.unguarded;
    x.insns = e.insns;
    if (e.bias != DirectExit::kSamePage) x.bias = in_arena(e.bias);
    x.from = b.number;
  }
  b.faults = static_cast<u32>(faults_.size());
  b.fault_count = static_cast<u16>(block.faults.size());
  faults_.insert(faults_.end(), block.faults.begin(), block.faults.end());
  index_.add(hash(gpa, rip, mode), &b);
  CodePage& page = pages_[gpa.frame()];
  page.blocks.push_back(&b);
  page.stores = 0;
  if (page.image != nullptr && std::memcmp(page.image.get() + gpa.page_offset(), guest, block.bytes) != 0) page.image.reset();
  stats_.built++;
  return &b;
}

void CodeCache::point(const Exit& exit, const u8* to, u64 guard) {
  if (exit.bias != kNone) {
    u8 bytes[8];
    std::memcpy(bytes, &guard, 8);
    arena_->patch(place(exit.bias), std::span<const u8>(bytes, exit.wide ? 8 : 4));
  }
  const i64 distance = to - (place(exit.field) + 4);
  const i32 rel = static_cast<i32>(distance);  // an arena has at most 1 GiB
  u8 bytes[4];
  std::memcpy(bytes, &rel, 4);
  arena_->patch(place(exit.field), bytes);
}

void CodeCache::unlink(u32 tag) {
  Exit& x = exits_[tag];
  if (x.to == kNone) return;
  (x.previous_incoming == kNone ? blocks_[x.to].incoming : exits_[x.previous_incoming].next_incoming) = x.next_incoming;
  if (x.next_incoming != kNone) exits_[x.next_incoming].previous_incoming = x.previous_incoming;
  x.to = x.next_incoming = x.previous_incoming = kNone;
  point(x, place(x.stub), 0);
}

void CodeCache::link(u32 tag, CodeBlock* to, u64 rip, u64 bias) {
  if (tag >= exits_.size() || to->dead) return;
  Exit& x = exits_[tag];
  const CodeBlock* const from = &blocks_[x.from];
  if (x.ungrouped != ((to->mode & kUngrouped) != 0)) return;
  if (from->dead || ((from->mode ^ to->mode) & ~kUngrouped) != 0 || from->pic != to->pic) return;
  if (from->pic ? (x.target ^ rip) & (kPageSize - 1) : x.target != rip) return;
  u64 guard = 0;
  if (x.unguarded) {
    if (!holds(bias)) return;
    Far& far = far_.try_emplace(rip & kPageMask, Far{to->gpa.page(), true}).first->second;
    if (!far.on || far.page != to->gpa.page()) return;
    if (x.to != to->number) unlink(tag);
  } else if (x.bias == kNone) {
    if (x.to != kNone || from->gpa.page() != to->gpa.page()) return;
  } else {
    if (x.to != to->number) unlink(tag);
    guard = x.wide ? (rip & kPageMask) + bias : bias >> 48;
    // Several address spaces take turns here: from now on the jump table is asked before.
    if (x.frame_flags && (x.wide || !to->user) && x.changes < kChanges && ++x.changes == kChanges) {
      constexpr u32 kSlot = frame::kExitCrossFrame - RING3_FRAME_CENTRE;
      u8 bytes[4];
      std::memcpy(bytes, &kSlot, 4);
      arena_->patch(place(x.slot), bytes);
    }
  }
  if (x.to != to->number) {
    x.to = to->number;
    x.next_incoming = to->incoming;
    if (to->incoming != kNone) exits_[to->incoming].previous_incoming = tag;
    to->incoming = tag;
  }
  point(x, to->code + (x.frame_flags ? to->frame_entry : to->entry), guard);
  stats_.linked++;
}

void CodeCache::turn(u64 linear, Far& far, bool on) {
  if (far.on == on) return;
  far.on = on;
  const auto page = pages_.find(far.page.frame());
  if (page == pages_.end()) return;
  for (const CodeBlock* b : page->second.blocks) {
    if (b->pic || (b->rip & kPageMask) != linear) continue;
    for (u32 tag = b->incoming; tag != kNone; tag = exits_[tag].next_incoming) {
      const Exit& x = exits_[tag];
      if (x.unguarded) point(x, on ? b->code + (x.frame_flags ? b->frame_entry : b->entry) : place(x.stub), 0);
    }
  }
}

void CodeCache::arrive(u64 rip, Gpa page) {
  const auto found = far_.find(rip & kPageMask);
  if (found == far_.end()) return;
  Far& far = found->second;
  if (far.page != page) {
    turn(found->first, far, false);
    far.page = page;
  }
  turn(found->first, far, true);
}

const CodeBlock* CodeCache::block_at(u64 pc) const {
  const u8* at = reinterpret_cast<const u8*>(pc);
  // The first block whose code begins behind it; the second parts come in the other order.
  const auto behind = [&](auto&& is_before) {
    std::size_t low = 0;
    for (std::size_t high = blocks_.size(); low < high;) {
      const std::size_t middle = low + (high - low) / 2;
      if (is_before(blocks_[middle])) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const std::size_t after = behind([at](const CodeBlock& b) { return b.code <= at; });
  if (after != 0 && at < blocks_[after - 1].code + blocks_[after - 1].code_size) return &blocks_[after - 1];
  const std::size_t cold = behind([at](const CodeBlock& b) { return b.cold > at; });
  return cold != blocks_.size() && at < blocks_[cold].cold + blocks_[cold].cold_size ? &blocks_[cold] : nullptr;
}

bool CodeCache::fault_rip(u64 pc, u64 page, u64* rip) const {
  const u8* at = reinterpret_cast<const u8*>(pc);
  const CodeBlock* b = block_at(pc);
  if (b == nullptr) return false;
  for (unsigned i = 0; i < b->fault_count; i++) {
    const HostFaultPoint& f = faults_[b->faults + i];
    if ((f.offset < b->code_size ? b->code + f.offset : b->cold + (f.offset - b->code_size)) != at) continue;
    *rip = b->pic ? page + f.rip : f.rip;
    return true;
  }
  return false;
}

bool CodeCache::window_point(u64 pc, u64 page, HostFaultPoint* point) const {
  const CodeBlock* b = block_at(pc);
  if (b == nullptr) return false;
  const u64 offset = pc - reinterpret_cast<u64>(b->code);  // accesses stand in the first part
  const HostFaultPoint* const first = faults_.data() + b->faults;
  const HostFaultPoint* const after = std::upper_bound(first, first + b->fault_count, offset, [](u64 at, const HostFaultPoint& f) { return at < f.offset; });
  if (offset >= b->code_size || after == first || !(after - 1)->window) return false;
  *point = *(after - 1);
  if (b->pic) point->rip += page;
  return true;
}

u64 CodeCache::block_rip(u64 pc, u64 page) const {
  const CodeBlock* b = block_at(pc);
  if (b == nullptr) return 0;
  return b->pic ? page + b->gpa.page_offset() : b->rip;
}

void CodeCache::kill(CodeBlock* block) {
  if (block->dead) return;
  block->dead = true;
  index_.remove(hash(block->gpa, block->rip, block->mode), block);
  for (u32 tag = block->incoming; tag != kNone;) {
    Exit& x = exits_[tag];
    tag = x.next_incoming;
    x.to = x.next_incoming = x.previous_incoming = kNone;
    point(x, place(x.stub), 0);
  }
  block->incoming = kNone;
  // Its own exits leave to the run loop: the dead code may be running still.
  for (u32 tag = block->first_exit; tag < block->first_exit + block->exit_count; tag++) {
    unlink(tag);
  }
  // Jump tables may lead to it still.
  const i32 distance = static_cast<i32>(block->dead_stub - (block->code + block->frame_entry + 5));
  u8 jump[5] = {0xe9};
  std::memcpy(jump + 1, &distance, 4);
  arena_->patch(block->code + block->frame_entry, jump);
  stats_.killed++;
}

template <class F>
CodeCache::CodePage* CodeCache::sweep(u64 frame, F&& doomed) {
  const auto page = pages_.find(frame);
  if (page == pages_.end()) return nullptr;
  std::vector<CodeBlock*>& list = page->second.blocks;
  std::erase_if(list, [&](CodeBlock* b) {
    if (!doomed(*b)) return false;
    kill(b);
    return true;
  });
  if (!list.empty()) return &page->second;
  pages_.erase(page);
  return nullptr;
}

bool CodeCache::written(Gpa gpa, unsigned size) {
  const u64 first = gpa.page_offset(), end = first + size;
  CodePage* const page = sweep(gpa.frame(), [&](const CodeBlock& b) {
    const u64 from = b.gpa.page_offset();
    return from < end && first < from + b.bytes;
  });
  return page != nullptr && ++page->stores > kFewStores + kStoresPerBlock * page->blocks.size();
}

void CodeCache::validate(Gpa page, const u8* host) {
  const auto found = pages_.find(page.frame());
  if (found == pages_.end()) return;
  CodePage& p = found->second;
  // SAFETY: host has a page of bytes, and no block reaches past the end of its page. An access to guest memory that has
  // vanished is cut off (GuestMemoryTrap): nothing may be half done then.
  if (p.image != nullptr && std::memcmp(p.image.get(), host, kPageSize) == 0) return;
  spare_ = std::move(p.image);
  if (spare_ == nullptr) spare_.reset(new u8[kPageSize]);
  std::memcpy(spare_.get(), host, kPageSize);
  CodePage* const left = sweep(page.frame(), [&](const CodeBlock& b) {
    return std::memcmp(spare_.get() + b.gpa.page_offset(), guest_.data() + b.guest_bytes, b.bytes) != 0;
  });
  if (left != nullptr) left->image = std::move(spare_);
}

void CodeCache::flush() {
  index_.clear();
  forget_tables();
  blocks_.clear();
  exits_.clear();
  faults_.clear();
  guest_.clear();
  pages_.clear();
  far_.clear();
  far_bias_ = 0;
  std::fill_n(common_.get(), kCommonEntries, CommonEntry{});
  arena_->clear();
  stats_.flushes++;
}

}  // namespace ring3::engine
