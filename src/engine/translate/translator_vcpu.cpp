#include "engine/translate/translator_vcpu.hpp"

#include <algorithm>
#include <cstring>
#include <random>

#include "base/split_mix.hpp"
#include "engine/decode/decoder.hpp"
#include "engine/interp/families.hpp"
#include "engine/interp/operand.hpp"
#include "engine/interp/segment_load.hpp"
#include "engine/translate/thunks.hpp"

namespace ring3::engine {
namespace {

constexpr unsigned kMaxBlockBytes = 1536;
constexpr unsigned kMaxBranches = 4;  ///< of a block, its last one among them
/// How often supervisor code is entered with vectors loaded after it wanted them: at first, and when it wants them again and again.
/// Such code is another mode's, with blocks and jumps of its own.
constexpr unsigned kVectorsHeld = 4, kVectorsHeldMost = 64;
/// Instructions that the interpreter runs at once in a mode that is not translated.
constexpr u64 kOtherMode = 4096;

/// Leaves at rip, with the status flags in RFLAGS: r14 = rip; jmp [thunk].
/// With exit_left and exit_transit, r15d is yet to be filled in.
void leave_stub(u64 rip, bool pic, u32 thunk, TranslatedBlock* out) {
  std::vector<u8>& code = out->code;
  code.clear();
  const auto value = [&](u64 v, unsigned size) {
    for (unsigned i = 0; i < size; i++) code.push_back(static_cast<u8>(v >> (8 * i)));
  };
  const auto leave = [&](u32 through) {
    if (pic) {  // mov r14, [page]; lea r14, [r14 + offset]
      code.insert(code.end(), {0x4d, 0x8b, 0xb1});
      value(frame::kPage - RING3_FRAME_CENTRE, 4);
      code.insert(code.end(), {0x4d, 0x8d, 0xb6});
      value(rip & (kPageSize - 1), 4);
    } else {
      code.insert(code.end(), {0x49, 0xbe});
      value(rip, 8);
    }
    if (through == frame::kExitLeft || through == frame::kExitTransit) {
      code.insert(code.end(), {0x41, 0xbf});
      out->left_at.push_back(static_cast<u32>(code.size()));
      value(0, 4);
    }
    code.insert(code.end(), {0x41, 0xff, 0xa1});
    value(through - RING3_FRAME_CENTRE, 4);
  };
  if (pic) {  // BlockBuilder::emit_table_entry()
    code.insert(code.end(), {0x4d, 0x8d, 0xb6});  // lea r14, [r14 - offset]
    value(0 - (rip & (kPageSize - 1)), 4);
    code.insert(code.end(), {0x4d, 0x89, 0xb1});  // mov [page], r14
    value(frame::kPage - RING3_FRAME_CENTRE, 4);
  }
  out->frame_entry = static_cast<u32>(code.size());
  code.insert(code.end(), {0x49, 0x89, 0xc6, 0x41, 0x8b, 0x81});  // mov r14, rax; mov eax, [flags]
  value(frame::kFlags - RING3_FRAME_CENTRE, 4);
  code.insert(code.end(), {0x04, 0x7f, 0x9e, 0x4c, 0x89, 0xf0});  // add al, 7fh; sahf; mov rax, r14
  out->entry = static_cast<u32>(code.size());
  leave(thunk);
  out->cold = out->dead_stub = static_cast<u32>(code.size());
  leave(frame::kExitDeadFrame);
}

}  // namespace

ring3::Result<std::unique_ptr<TranslatorVcpu>> TranslatorVcpu::create(VcpuState& state, Mmu& mmu,
                                                                      Interpreter& interpreter,
                                                                      std::unique_ptr<BlockTranslator> translator,
                                                                      const Options& options) {
  if (!host_can_translate()) return Error::of(ENOTSUP, "translated code needs a host with AVX");
  auto cache = CodeCache::create(options.arena_bytes);
  if (!cache) return cache.error();
  std::unique_ptr<TranslatorVcpu> v(
      new TranslatorVcpu(state, mmu, interpreter, std::move(translator), std::move(*cache), options));
  if (options.lockstep_every != 0) {
    TranslatorVcpu* t = v.get();
    Lockstep::Options checks;
    checks.every = options.lockstep_every;
    checks.sink = options.lockstep_sink;
    auto made = Lockstep::create(state, mmu, interpreter, t->frame_, *t->translator_,
                                 {[t](const u8* code) { t->enter(code); },
                                  [t](u64 pc, u64* rip) { return t->cache_->fault_rip(pc, t->frame_.page, rip); },
                                  [t](u64 linear, u64 size, bool write) {
                                    return t->mmu_.warm(linear, static_cast<unsigned>(size), write);
                                  },
                                  [t](u32 tag) { return t->cache_->exit_insns(tag); }},
                                 checks);
    if (!made) return made.error();
    v->lockstep_ = std::move(*made);
  }
  return v;
}

TranslatorVcpu::TranslatorVcpu(VcpuState& state, Mmu& mmu, Interpreter& interpreter,
                               std::unique_ptr<BlockTranslator> translator, std::unique_ptr<CodeCache> cache,
                               const Options& options)
    : s_(state),
      mmu_(mmu),
      interpreter_(interpreter),
      c_(interpreter.context()),
      translator_(std::move(translator)),
      cache_(std::move(cache)),
      options_(options),
      host_tsc_(c_.env.host_tsc()),
      fault_range_(cache_->arena().begin(), cache_->arena().end(), fault_thunk(),
                   {window_thunk(), &frame_.fault_address, &frame_.fault_error}),
      insns_(kMaxBlockInsns),
      has_feature_(new bool[kMaxBlockInsns]) {
  fill_thunks(&frame_);
  // Not canonical, and nothing that a guest could guess.
  frame_.pointer = reinterpret_cast<u64>(&frame_) + RING3_FRAME_CENTRE;
  frame_.sentinel = (std::random_device{}() | static_cast<u64>(std::random_device{}()) << 32) >> 17 | 1ull << 63;
  c_.place_attention(&frame_.attention);
  frame_.state_gpr = reinterpret_cast<u64>(s_.gpr);
  frame_.state_rflags = reinterpret_cast<u64>(&s_.rflags);
  frame_.state_xsave = reinterpret_cast<u64>(s_.xsave.bytes);
  frame_.fill_function = reinterpret_cast<u64>(&TranslatorVcpu::fill);
  for (u64 n = 0; n < std::size(frame_.window_deltas); n++) frame_.window_deltas[n] = Window::no_delta(n);
  frame_.window_function = reinterpret_cast<u64>(&TranslatorVcpu::window_function);
  frame_.transit_function = reinterpret_cast<u64>(&TranslatorVcpu::transit_function);
  frame_.system_function = reinterpret_cast<u64>(&TranslatorVcpu::system_function);
  frame_.fill_context = reinterpret_cast<u64>(this);
  interpreter_.set_page_sharer(this);
  mmu_.set_code_observer(this);
}

TranslatorVcpu::~TranslatorVcpu() {
  c_.place_attention_here();
  interpreter_.set_page_sharer(nullptr);
  mmu_.set_code_observer(&interpreter_);
}

u64 TranslatorVcpu::fill(void* self, u64 linear, u64 size, u64 write) {
  TranslatorVcpu& v = *static_cast<TranslatorVcpu*>(self);
  v.stats_.fills++;
  // The guest's registers are in the host's: a page table that has vanished must not end this by a jump past them.
  struct Call {
    TranslatorVcpu& v;
    u64 linear, size, write, addend;
  } call{v, linear, size, write, 0};
  const bool whole = run_in_nested_trap(
      [](void* at) {
        Call& c = *static_cast<Call*>(at);
        c.addend = c.v.addend(c.linear, static_cast<unsigned>(c.size), c.write != 0);
      },
      &call);
  return whole ? call.addend : 0;
}

/// The stack's and the table's part of an IRET, at CPL 0. 0: not read, and nothing is raised.
u64 TranslatorVcpu::read_return(void* frame) {
  return run_in_nested_trap(
      [](void* at) {
        ReturnFrame& f = *static_cast<ReturnFrame*>(at);
        TranslatorVcpu& v = f.v;
        const Stop kept = v.mmu_.stop();
        const auto descriptor = [&](u64 selector, u64* to) {
          const DescriptorTable& gdt = v.s_.gdtr;
          return (selector & 4) == 0 && (selector & 0xfff8) != 0 && (selector & 0xfff8) + 7 <= gdt.limit &&
                 v.mmu_.read(gdt.base + (selector & 0xfff8), to);
        };
        f.read = v.mmu_.read(f.sp, &f.rip, SS) && v.mmu_.read(f.sp + 8, &f.cs, SS) && v.mmu_.read(f.sp + 16, &f.rflags, SS) &&
                 v.mmu_.read(f.sp + 24, &f.rsp, SS) && v.mmu_.read(f.sp + 32, &f.ss, SS) && descriptor(f.cs, &f.code) &&
                 (is_null(static_cast<u16>(f.ss)) || descriptor(f.ss, &f.stack));
        if (!f.read) v.mmu_.stop() = kept;
      },
      frame);
}

void TranslatorVcpu::rewind() {
  if (in_run_) JitGsBase::put_back(gs_before_);
  in_run_ = false;
  interpreter_.rewind();
}

u64 TranslatorVcpu::addend(u64 linear, unsigned size, bool write) {
  const bool active = lockstep_ != nullptr && lockstep_->active();
  const auto entry = [&](u64 at) -> const Mmu::TlbEntry& {
    return reinterpret_cast<const Mmu::TlbEntry*>(frame_.tlb)[(at >> kPageShift) & (Mmu::kTlbSize - 1)];
  };
  const u64 here = kPageSize - (linear & ~kPageMask);
  if (size <= here) {
    const bool ok = active ? lockstep_->fill(linear, size, write) : mmu_.warm(linear, size, write);
    return ok ? entry(linear).addend : 0;
  }
  if (active || size > sizeof frame_.bounce || !mmu_.warm_across(linear, size, write)) return 0;
  const u64 first = entry(linear).addend, second = entry(linear + here).addend;
  if (first == second) return first;
  if (write) return 0;
  // SAFETY: the TLB hits for both pages: RAM up to the one's end and from the other's start.
  guest_copy(frame_.bounce, reinterpret_cast<const u8*>(linear + first), here);
  guest_copy(frame_.bounce + here, reinterpret_cast<const u8*>(linear + here + second), size - here);
  return reinterpret_cast<u64>(frame_.bounce) - linear;
}

bool TranslatorVcpu::translatable() const {
  if (c_.code64) return true;
  constexpr unsigned kFlat = 1u << SS | 1u << DS | 1u << ES;
  const Segment& cs = s_.seg[CS];
  return c_.code_mode == CodeMode::Bits32 && c_.protected_mode && c_.stack_size == 4 &&
         (c_.flat_segments & kFlat) == kFlat && cs.base == 0 && cs.limit == 0xffffffff && (cs.type & 8) &&
         !cs.unusable && cs.present;
}

bool TranslatorVcpu::can_enter() const {
  return translatable() && !c_.slow_step && !s_.sti_shadow && !s_.mov_ss_shadow && !c_.env.replaying && !s_.exception.pending;
}

bool TranslatorVcpu::position_independent(u64 rip, TranslateMode mode) const {
  // No direct branch leads out of the lower half from there.
  return mode.user && !mode.code32 && rip >= options_.fixed_below && rip < (1ull << 47) - (1ull << 32);
}

TranslateMode TranslatorVcpu::mode() {
  TranslateMode m;
  m.user = c_.cpl == 3;
  // The kernel hardly ever uses vectors: it runs without them loaded until it does, from before it has switched them on.
  if (!m.user && vectors_held_ == 0) {
    m.lazy = true;
  } else {
    vectors_from_state(&m);
  }
  if (!c_.code64) {
    const auto flat = [&](Seg seg) {
      const Segment& g = s_.seg[seg];
      return !g.unusable && g.present && g.limit == 0xffffffff && (g.type & 0xe) == 2;
    };
    m.code32 = true;
    m.fs_flat = flat(FS);
    m.gs_flat = flat(GS);
  } else if (m.user) {
    if (options_.window_samples == 1 && window_.patience == 0 && mmu_.window() == Mmu::WindowState::None && lockstep_ == nullptr) open_window();
    m.windowed = window_.open != 0 && use_window();
    look_at_stack(s_.gpr[RSP], &m);
  }
  return m;
}

/// Instructions are told apart by their bytes: what they mean depends on nothing else here.
u32 TranslatorVcpu::number_left(const DecodedInsn& insn) {
  const std::string bytes(reinterpret_cast<const char*>(insn.raw), insn.length);
  const auto [at, fresh] = left_numbers_.try_emplace(bytes, static_cast<u32>(left_.size()));
  if (fresh) left_.push_back({insn, select_handler(c_.features, insn)});
  return at->second;
}

CodeBlock* TranslatorVcpu::translate(Gpa gpa, u64 rip, const u8* host, TranslateMode mode, bool ungrouped) {
  if (left_.size() >= kMaxLeft) interpreter_.code_flush();
  mmu_.add_code_page(gpa.page());
  // An image: what is decoded and what is kept are the same bytes, whoever writes meanwhile.
  const unsigned room = static_cast<unsigned>(kPageSize - gpa.page_offset());
  const unsigned max = std::clamp(options_.max_insns, 1u, kMaxBlockInsns);
  u8 image[kMaxBlockBytes];
  const unsigned size = std::min({room, max * 15, kMaxBlockBytes});
  // SAFETY: host is readable to the end of its page.
  std::memcpy(image, host, size);

  BlockRequest request;
  request.rip = rip;
  request.mode = mode;
  request.position_independent = position_independent(rip, mode);
  request.loops = lockstep_ == nullptr && !ungrouped;
  if (mode.windowed) {
    request.registers = s_.gpr;
    request.fs_base = s_.seg[FS].base;
    request.gs_base = s_.seg[GS].base;
    request.peek = [](void* mmu, u64 linear, u64* to, unsigned bytes) { return static_cast<const Mmu*>(mmu)->peek(linear, to, bytes); };
    request.peek_context = &mmu_;
  }
  request.ungrouped = ungrouped;
  const u8 mode_key = key(mode, ungrouped);
  const KeptCode::Source source{kept_context(), rip, mode_key, request.position_independent, {image, size}};
  KeptCode* const keeper = lockstep_ == nullptr ? options_.kept : nullptr;
  for (unsigned attempt = 0; attempt < 2; attempt++) {
    request.first_tag = cache_->next_tag();
    KeptCode::Block block{&out_, 0};
    const DecodedInsn* left = &insns_[0];
    const bool found = keeper != nullptr && keeper->find(source, request.first_tag, &block) &&
                       (out_.left_at.empty() || decode_kept(image + block.left_at, size - block.left_at, mode));
    if (!found) {
      unsigned read = decode_block(image, size, max, gpa, rip, &request);
      // The next page is absent until the guest's system has brought it: nothing is made that would stay as it is then.
      if (cut_off_) return nullptr;
      const bool keep = keeper != nullptr && read != 0 && insns_[0].op != Op::Invalid;
      const bool may_move = keep && KeptCode::may_move(source);
      if (may_move) {
        make_moved(image, size, gpa, &request);
        read = decode_block(image, size, max, gpa, rip, &request);
      }
      if (make(request, &out_)) stats_.translated++;
      left = &insns_[out_.left];
      block.left_at = finish_bytes(size, &out_);
      if (keep) {
        const KeptCode::Moved moved{addresses_, &moved_};
        keeper->add(source, read, block, may_move ? &moved : nullptr);
      }
    }
    if (left_stale_) {
      left_.clear();
      left_numbers_.clear();
      left_stale_ = false;
    }
    for (u32 slot : out_.left_at) {
      const u32 number = number_left(*left);
      std::memcpy(out_.code.data() + slot, &number, 4);
    }
    if (CodeBlock* b = cache_->add(gpa, request.position_independent ? 0 : rip, mode_key, request.position_independent, out_, image)) {
      if (options_.perf_map != nullptr) {
        options_.perf_map->add(b->code, b->code_size, rip, mode.user);
        options_.perf_map->add(b->cold, b->cold_size, rip, mode.user);
      }
      return b;
    }
    interpreter_.code_flush();  // both caches: they share the hold on the pages
    mmu_.add_code_page(gpa.page());
  }
  return nullptr;
}

/// What is left to the interpreter was decoded with the block: it is a part of it. Returns where it begins, if it is there.
u32 TranslatorVcpu::finish_bytes(unsigned size, TranslatedBlock* out) const {
  u32 at = 0;
  if (!out->left_at.empty()) {
    for (u32 n = 0; n < out->left; n++) at += insns_[n].length;
    out->bytes = std::max<u32>(out->bytes, at + bytes_that_say(insns_[out->left]));
  }
  out->bytes = std::min<u32>(size, out->bytes);
  return at;
}

/// The request's instructions, decoded from the image, as they are when it has moved: to moved_, and the places in the
/// image that move with it to addresses_.
void TranslatorVcpu::make_moved(const u8* image, unsigned size, Gpa gpa, BlockRequest* request) {
  u8 there[kMaxBlockBytes];
  std::memcpy(there, image, size);
  addresses_.clear();
  const u64 rip = request->rip;
  unsigned at = 0;
  unsigned done = 0;
  const auto move = [&](unsigned offset, u64 number, u16 against) {
    u32 v;
    std::memcpy(&v, image + offset, 4);
    if (v != static_cast<u32>(number) || offset < done) return false;
    v += against != 0 ? 0 - static_cast<u32>(KeptCode::kMove) : static_cast<u32>(KeptCode::kMove);
    std::memcpy(there + offset, &v, 4);
    addresses_.push_back(static_cast<u16>(offset | against));
    done = offset + 4;
    return true;
  };
  for (const DecodedInsn& i : request->insns) {
    const bool immediate = std::any_of(std::begin(i.operands), std::end(i.operands), [](const Operand& o) { return o.kind == OperandKind::Imm; });
    const u64 disp = static_cast<u64>(i.disp);
    const bool relative = i.mem.base == kRipBase;
    // What is near to 0 stays there: the variables of a CPU, off GS.
    if (i.has(kHasMem) && (relative ? rip + at + i.length + disp < (1u << 21) : KeptCode::near(disp, rip))) {
      for (const unsigned behind : {0u, 1u, 2u, 4u})
        if (i.length > 5 + behind && move(at + i.length - 4 - behind, disp, relative ? KeptCode::kAgainst : u16{0})) break;
    }
    if (immediate && KeptCode::near(static_cast<u64>(i.imm), rip)) {
      for (const unsigned bytes : {4u, 8u})
        if (i.length > bytes && move(at + i.length - bytes, static_cast<u64>(i.imm), 0)) break;
    }
    at += i.length;
  }
  decode_block(there, size, static_cast<unsigned>(request->insns.size()), gpa, rip, request);
  request->rip = rip + KeptCode::kMove;
  make(*request, &moved_);
  finish_bytes(size, &moved_);
  request->rip = rip;
}

/// What is the same for all translations of this vCPU, beside their bytes and mode.
u64 TranslatorVcpu::kept_context() const {
  static_assert(static_cast<unsigned>(Feature::Count) <= 128);
  const auto& has = c_.features.has;
  const u64 low = (has << (has.size() - 64) >> (has.size() - 64)).to_ullong(), high = (has >> 64).to_ullong();
  return SplitMix64::mix(SplitMix64::mix(low) ^ high ^ u64{options_.max_insns} << 56) ^ u64{c_.features.amd};
}

/// Bytes that made the instruction what it is: of an undefined one, whose length is not known, as many as there may be.
unsigned TranslatorVcpu::bytes_that_say(const DecodedInsn& insn) { return insn.op == Op::Invalid ? 15 : insn.length; }

DecodeResult TranslatorVcpu::decode_one(const u8* bytes, unsigned size, TranslateMode mode, DecodedInsn* insn) {
  size = std::min(size, 15u);
  return mode.code32 ? decode(bytes, size, CodeMode::Bits32, false, c_.features.amd, insn)
                     : decoder_.decode64(bytes, size, c_.features.amd, insn);
}

bool TranslatorVcpu::decode_kept(const u8* bytes, unsigned size, TranslateMode mode) {
  return decode_one(bytes, size, mode, &insns_[0]) == DecodeResult::Ok;
}

/// The request's instructions. How many bytes of the image say what they are; 0: more than the image.
unsigned TranslatorVcpu::decode_block(const u8* image, unsigned size, unsigned max, Gpa gpa, u64 rip, BlockRequest* request) {
  const TranslateMode mode = request->mode;
  unsigned count = 0, at = 0, branches = 0;
  bool whole = true;
  cut_off_ = false;
  while (count < max && at < size) {
    DecodedInsn& insn = insns_[count];
    if (decode_one(image + at, size - at, mode, &insn) != DecodeResult::Ok) {
      whole = false;
      break;
    }
    has_feature_[count] = insn.op != Op::Invalid && c_.features.allows(insn);
    const bool ends = insn.has(kEndsBlock) && insn.op != Op::Sti;
    const bool on = ends && !request->ungrouped && may_go_on(insn) && ++branches < kMaxBranches;
    at = std::min(size, at + bytes_that_say(insn));
    count++;
    if (ends && !on) break;
    // What stands there already is not made a second time.
    if (on && cache_->find(gpa + at, request->position_independent ? 0 : rip + at, key(mode, false)) != nullptr) break;
  }
  request->edge = 0;
  u8 guest_bytes[15];
  if (count == 0 && size < sizeof guest_bytes && lockstep_ == nullptr) {
    // An instruction that goes on in the next page.
    const Stop kept = mmu_.stop();
    const unsigned got = mmu_.fetch_bytes(rip, guest_bytes, sizeof guest_bytes);
    mmu_.stop() = kept;
    std::memcpy(guest_bytes, image, size);
    if (got > size && decode_one(guest_bytes, got, mode, &insns_[0]) == DecodeResult::Ok && insns_[0].length > size) {
      has_feature_[0] = insns_[0].op != Op::Invalid && c_.features.allows(insns_[0]);
      count = 1;
      request->edge = insns_[0].length - size;
    }
    cut_off_ = got <= size;
  }
  request->insns = std::span<const DecodedInsn>(insns_.data(), count);
  request->has_feature = std::span<const bool>(has_feature_.get(), count);
  return count == 0 || request->edge != 0 ? 0 : whole ? at : size;
}

/// False: a stub that leaves the first instruction to the interpreter.
bool TranslatorVcpu::make(const BlockRequest& request, TranslatedBlock* out) {
  out->clear();
  const std::size_t count = request.insns.size();
  if (count != 0 && translator_->translate(request, out)) return true;
  out->clear();
  const Op op = count == 0 ? Op::Invalid : insns_[0].op;
  leave_stub(request.rip, request.position_independent,
             request.mode.lazy && needs_vectors(op) && has_feature_[0]        ? frame::kExitVectors
             : count == 0 || request.mode.code32 || request.edge != 0 ? frame::kExitInterpret
                                                                       : exit_of_left(insns_[0]),
             out);
  // What is undefined may depend on bytes past its length.
  out->bytes = op == Op::Invalid ? 15 : insns_[0].length;
  return false;
}

CodeBlock* TranslatorVcpu::lookup(u64 rip, TranslateMode mode, bool ungrouped, CodeBlock* guess) {
  if (!canonical(rip)) return nullptr;
  Gpa gpa;
  const u8* host;
  const Stop kept = mmu_.stop();
  if (!mmu_.fetch(rip, &gpa, &host) || host == nullptr) {
    mmu_.stop() = kept;
    return nullptr;  // the interpreter finds the same, and delivers it
  }
  CodeBlock* b = cache_->find(gpa, position_independent(rip, mode) ? 0 : rip, key(mode, ungrouped), guess);
  if (b == nullptr) b = translate(gpa, rip, host, mode, ungrouped);
  return b;
}

void TranslatorVcpu::enter(const u8* code) {
  frame_.r9 = s_.gpr[R9];
  frame_.r10 = s_.gpr[R10];
  frame_.r11 = s_.gpr[R11];
  frame_.r15 = s_.gpr[R15];
  frame_.fs_base = s_.seg[FS].base;
  frame_.gs_base = s_.seg[GS].base;
  frame_.kernel_gs_base = s_.msr.kernel_gs_base;
  frame_.page = s_.rip & kPageMask;
  frame_.exit_rip = s_.rip;
  const Mmu::TlbEntry* shadow = lockstep_ != nullptr ? lockstep_->tlb() : nullptr;
  frame_.stack_limit = 0;
  JitGsBase::use(&frame_, shadow != nullptr ? shadow : mmu_.tlb(), gs_constant_);
  enter_translated(code, frame_);
  s_.gpr[R9] = frame_.r9;
  s_.gpr[R10] = frame_.r10;
  s_.gpr[R11] = frame_.r11;
  s_.gpr[R15] = frame_.r15;
  s_.seg[GS].base = frame_.gs_base;
  s_.msr.kernel_gs_base = frame_.kernel_gs_base;
  s_.rflags = (s_.rflags & ~rflags::STATUS) | (frame_.saved_flags & rflags::STATUS);
  s_.rip = frame_.exit_rip;
  stats_.entries++;
}

Interpreter::Result TranslatorVcpu::run(u64 budget) {
  const u64 limit = c_.retired + budget < c_.retired ? ~0ull : c_.retired + budget;
  limit_ = limit;
  arm_host_faults(false);  // vector code runs translated with masked exceptions alone
  const JitGsBase gs;
  frame_.host_gs = 0;
  gs_before_ = gs.previous();
  in_run_ = true;
  const struct Leave {
    bool& in_run;
    ~Leave() { in_run = false; }
  } leave{in_run_};
  u32 tag = frame::kNoTag;
  bool ungrouped = false;  // the block to go on in
  u64 tag_epoch = 0;
  for (;;) {
    if (c_.retired >= limit && !ungrouped) return Interpreter::Result::Budget;  // an instruction goes on without groups
    bool interpret = !can_enter(), begun = false;
    if (!interpret) {
      if (!c_.attention().arm()) {
        if (options_.window_samples != 0 && c_.cpl == 3) sample_window();
        return Interpreter::Result::Attention;
      }
      if (c_.interrupt_window && (s_.rflags & rflags::IF)) return Interpreter::Result::Attention;
      const TranslateMode m = mode();
      u64 bias = cache_->bias(m.bits(), mmu_);
      if (m.windowed) hold(bias);
      unsigned count = 0;  // of the block, for the divergence checker
      const u8* code = tag == frame::kNoTag ? cache_->recall(s_.rip) : nullptr;
      if (code == nullptr) {
        CodeBlock* const guess = tag != frame::kNoTag && tag_epoch == cache_->epoch() ? cache_->led_to(tag) : nullptr;
        CodeBlock* b = lookup(s_.rip, m, ungrouped, guess);
        if (b != nullptr) {
          bias = cache_->bias(m.bits(), mmu_);
          if (m.windowed) {
            hold(bias);
            if (!b->pic) cache_->arrive(s_.rip, b->gpa.page());
          }
          if (lockstep_ == nullptr && !ungrouped) cache_->remember(*b, s_.rip);
          if (lockstep_ != nullptr) count = b->count;
          else if (tag != frame::kNoTag && tag_epoch == cache_->epoch()) cache_->link(tag, b, s_.rip, bias);
          code = b->code + b->entry;
          c_.retired += b->count;
        }
      } else {
        c_.retired++;
      }
      tag = frame::kNoTag;
      ungrouped = false;
      if (code != nullptr) {
        // It guards from breakpoints, of which there are none, until the instruction is done; what faults sets it anew.
        s_.rflags &= ~rflags::RF;
        set_jumps(bias, m);
        frame_.vectors = m.sse ? RING3_VECTORS_IN : RING3_VECTORS_AWAY;
        frame_.avx512 = (s_.cr4 & cr4::OSXSAVE) && (s_.xcr0 & 0xe6) == 0xe6;
        loaded_avx_ = m.avx;
        if (!m.user && vectors_held_ != 0) vectors_held_--;
        if (count != 0 && lockstep_->wants()) {
          Interpreter::Result r;
          const Lockstep::End end = lockstep_->run(code, count, m, &r);
          if (end == Lockstep::End::Stopped) return r;
          if (end == Lockstep::End::Other) continue;
        } else {
          enter(code);
        }
        switch (frame_.exit_reason) {
          case RING3_REASON_NEXT:
            tag = frame_.exit_tag;
            if (tag != frame::kNoTag && (tag & DirectExit::kUngrouped) != 0) {
              ungrouped = true;
              tag &= ~DirectExit::kUngrouped;
            }
            tag_epoch = cache_->epoch();
            continue;
          case RING3_REASON_VECTORS:
            if (!vectors_run()) break;  // as in user mode: it faults, or an exception may be unmasked
            vectors_hold_ = stats_.entries - vectors_wanted_ <= 2 * vectors_hold_ ? std::min(2 * vectors_hold_, kVectorsHeldMost) : kVectorsHeld;
            vectors_held_ = vectors_hold_;
            vectors_wanted_ = stats_.entries;
            continue;
          case RING3_REASON_LEFT: {
            if (c_.slow_step || s_.sti_shadow || s_.mov_ss_shadow || lockstep_ != nullptr) break;
            stats_.interpreted++;
            if (options_.interpreted_ops != nullptr) note_interpreted();
            const Left& left = left_[frame_.exit_tag];
            const Interpreter::Result r = interpreter_.execute(left.insn, left.handler);
            if (r != Interpreter::Result::Budget) return r;
            continue;
          }
          case RING3_REASON_DEAD:
            cache_->forget(s_.rip);
            if (!at_page_end()) continue;
            edge_left(true);
            begun = true;
            break;
          case RING3_REASON_ATTENTION:
          case RING3_REASON_INDIRECT:
            continue;
          case RING3_REASON_FAULT:
            stats_.faults++;
            // An address that was not announced: guest memory that vanished, or the engine's own error. The state is
            // not exact any more; RIP is the beginning of the block.
            if (!cache_->fault_rip(frame_.exit_rip, frame_.page, &s_.rip)) {
              s_.rip = cache_->block_rip(frame_.exit_rip, frame_.page);
              return Interpreter::Result::Exit;
            }
            begun = true;
            break;
          default:
            begun = true;
            if (at_page_end()) edge_left(false);
            break;
        }
      }
      interpret = true;
    }
    tag = frame::kNoTag;
    ungrouped = false;
    stats_.interpreted++;
    if (options_.interpreted_ops != nullptr) note_interpreted();
    const u64 n = translatable() ? 1 : std::min(kOtherMode, limit - c_.retired);
    // What translated code has begun (a dirty bit may be set) is not stopped before it is done.
    const Interpreter::Result r = begun ? interpreter_.run_one() : interpreter_.run(n);
    if (r != Interpreter::Result::Budget) return r;
  }
}

bool TranslatorVcpu::at_page_end() const { return (s_.rip & (kPageSize - 1)) > kPageSize - 15; }

/// The instruction at RIP goes on in the next page, maybe, and its translation did not run. Either it is another one there than it was:
/// another translation is made next time. Or the TLB did not know that page as code, and does then.
void TranslatorVcpu::edge_left(bool other) {
  Gpa gpa;
  const u8* host;
  const Stop kept = mmu_.stop();
  if (mmu_.fetch(s_.rip, &gpa, &host) && host != nullptr) {
    const TranslateMode m = mode();
    const CodeBlock* const b = cache_->find(gpa, position_independent(s_.rip, m) ? 0 : s_.rip, key(m, false));
    if (b != nullptr && b->count <= 1 && gpa.page_offset() + b->bytes == kPageSize) {
      const u64 next = (s_.rip & kPageMask) + kPageSize;
      if (other) {
        cache_->written(gpa, 1);
      } else {
        (void)mmu_.fetch(m.code32 ? static_cast<u32>(next) : next, &gpa, &host);
      }
    }
  }
  mmu_.stop() = kept;
}

void TranslatorVcpu::code_written(Gpa gpa, unsigned size) {
  if (cache_->written(gpa, size)) cache_->written(gpa = gpa.page(), size = kPageSize);
  interpreter_.code_written(gpa, size);
}

void TranslatorVcpu::validate_page(Gpa page, const u8* host) {
  cache_->validate(page, host);
  interpreter_.validate_page(page, host);
}

void TranslatorVcpu::code_flush() { interpreter_.code_flush(); }  // pages_released() empties the code cache

}  // namespace ring3::engine
