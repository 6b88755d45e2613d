#include "engine/translate/block_translator.hpp"

#include <algorithm>

#include "engine/translate/builder.hpp"

namespace ring3::engine {

namespace {

enum class Family : u8 {
  None,
  Plain,
  Mov,
  Lea,
  Verbatim,
  Push,
  Pop,
  Leave,
  Pushf,
  Cli,
  System,
  Rare,
  X87,
  Mmx,
  String,
  Direction,
  Jmp,
  Jcc,
  Count,
  Call,
  Ret,
  Gather
};

constexpr Family family_of(Op op) {
  switch (op) {
    case Op::Add:
    case Op::Or:
    case Op::Adc:
    case Op::Sbb:
    case Op::And:
    case Op::Sub:
    case Op::Xor:
    case Op::Cmp:
    case Op::Test:
    case Op::Inc:
    case Op::Dec:
    case Op::Neg:
    case Op::Not:
    case Op::Xadd:
    case Op::Cmpxchg:
    case Op::Cmpxchg8b:
    case Op::Cmpxchg16b:
    case Op::Adcx:
    case Op::Adox:
    case Op::Andn:
    case Op::Bextr:
    case Op::Blsi:
    case Op::Blsmsk:
    case Op::Blsr:
    case Op::Bzhi:
    case Op::Mulx:
    case Op::Pdep:
    case Op::Pext:
    case Op::Rorx:
    case Op::Sarx:
    case Op::Shlx:
    case Op::Shrx:
    case Op::Mul:
    case Op::Imul1:
    case Op::Imul2:
    case Op::Imul3:
    case Op::Div:
    case Op::Idiv:
    case Op::Rol:
    case Op::Ror:
    case Op::Rcl:
    case Op::Rcr:
    case Op::Shl:
    case Op::Shr:
    case Op::Sar:
    case Op::Shld:
    case Op::Shrd:
    case Op::Bt:
    case Op::Bts:
    case Op::Btr:
    case Op::Btc:
    case Op::Bsf:
    case Op::Bsr:
    case Op::Tzcnt:
    case Op::Lzcnt:
    case Op::Popcnt:
    case Op::Crc32:
    case Op::Bswap:
    case Op::Movbe:
    case Op::Movnti:
    case Op::Movzx:
    case Op::Movsx:
    case Op::Movsxd:
    case Op::Xchg:
    case Op::Cmovcc:
    case Op::Setcc:
    case Op::HostVec:
    case Op::Vmaskmov:
      return Family::Plain;
    case Op::Mov:
      return Family::Mov;
    case Op::Lea:
      return Family::Lea;
    case Op::Cbw:
    case Op::Cwd:
    case Op::Lahf:
    case Op::Sahf:
    case Op::Clc:
    case Op::Stc:
    case Op::Cmc:
    case Op::Nop:
    case Op::Prefetch:
    case Op::Endbr:
    case Op::Pause:
    case Op::Lfence:
    case Op::Mfence:
    case Op::Sfence:
    case Op::Vzeroupper:
    case Op::Vzeroall:
      return Family::Verbatim;
    case Op::Push:
      return Family::Push;
    case Op::Pop:
      return Family::Pop;
    case Op::Leave:
      return Family::Leave;
    case Op::Pushf:
      return Family::Pushf;
    case Op::Cli:
      return Family::Cli;
    case Op::Sti:
    case Op::Swapgs:
    case Op::Stac:
    case Op::Clac:
    case Op::Popf:
    case Op::MovCr:
    case Op::Rdtsc:
    case Op::Rdtscp:
      return Family::System;
    case Op::Ldmxcsr:
    case Op::Stmxcsr:
    case Op::MovSeg:
    case Op::Rdfsbase:
    case Op::Rdgsbase:
    case Op::Wrfsbase:
    case Op::Wrgsbase:
      return Family::Rare;
    case Op::Vgather:
      return Family::Gather;
    case Op::HostX87:
    case Op::Fwait:
    case Op::Emms:
      return Family::X87;
    case Op::HostMmx:
      return Family::Mmx;
    case Op::Movs:
    case Op::Stos:
    case Op::Lods:
    case Op::Scas:
    case Op::Cmps:
      return Family::String;
    case Op::Cld:
    case Op::Std:
      return Family::Direction;
    case Op::Jmp:
      return Family::Jmp;
    case Op::Jcc:
      return Family::Jcc;
    case Op::Jcxz:
    case Op::Loop:
    case Op::Loope:
    case Op::Loopne:
      return Family::Count;
    case Op::Call:
      return Family::Call;
    case Op::Ret:
      return Family::Ret;
    default:
      return Family::None;
  }
}

}  // namespace

bool BlockBuilder::supported(std::size_t n) const {
  const BlockRequest& r = *request_;
  if (n >= r.insns.size() || n >= r.has_feature.size() || !r.has_feature[n]) return false;
  const DecodedInsn& i = r.insns[n];
  switch (i.op) {
    case Op::HostVec:
      return i.has(kVex | kEvex) ? r.mode.avx : r.mode.sse;
    case Op::Vzeroupper:
    case Op::Vzeroall:
    case Op::Vgather:
    case Op::Vmaskmov:
      return r.mode.avx;
    case Op::Ldmxcsr:
    case Op::Stmxcsr:
      return i.has(kVex) ? r.mode.avx : r.mode.sse;
    case Op::HostMmx:
      return mmx_runs(i, r.mode.sse);
    case Op::Cli:
    case Op::Sti:
    case Op::Swapgs:
    case Op::Stac:
    case Op::Clac:
    case Op::MovCr:
      return !r.mode.user;  // at CPL 0 whatever IOPL says
    default:
      return family_of(i.op) != Family::None;
  }
}

bool BlockBuilder::one(const DecodedInsn& i) {
  switch (family_of(i.op)) {
    case Family::Plain:
      return plain(i);
    case Family::Mov:
      return mov_register(i) || plain(i);
    case Family::Lea:
      return lea(i);
    case Family::Verbatim:
      return verbatim(i);
    case Family::Push:
      return push(i);
    case Family::Pop:
      return pop(i);
    case Family::Leave:
      return leave(i);
    case Family::Pushf:
      return pushf(i);
    case Family::Cli:
      return cli();
    case Family::System:
      return system(i);
    case Family::Rare:
      return rare(i);
    case Family::Gather:
      return gather(i);
    case Family::X87:
      return x87(i);
    case Family::Mmx:
      return mmx(i);
    case Family::String:
      return string(i);
    case Family::Direction:
      return direction(i.op == Op::Std);
    case Family::Jmp:
      return jmp(i);
    case Family::Jcc:
      return jcc(i);
    case Family::Count:
      return count_branch(i);
    case Family::Call:
      return call(i);
    case Family::Ret:
      return ret(i);
    case Family::None:
      break;
  }
  return false;
}

/// What lies behind the block: slow paths, interpretation, polls, exit stubs.
void BlockBuilder::finish() {
  out_->cold = e_.size();
  finish_groups();
  finish_window_misses();
  finish_slow_paths();
  finish_x87();
  finish_zmm();
  finish_stack_checks();
  for (Interpret& i : interpret_) {
    if (!i.used) continue;
    e_.bind(i.entry);
    if (i.fip) emit_fip(i.fip_offset);
    if (i.sti_shadow) {
      constexpr i32 kShadow = static_cast<i32>(offsetof(VcpuState, sti_shadow)) - static_cast<i32>(offsetof(VcpuState, rflags));
      e_.load(kScratch0, HostMem::frame(kRflags));
      e_.encode({.opcode = 0xc6, .memory = true, .mem = HostMem::at(kScratch0, kShadow), .imm_size = 1, .imm = {1}});
    }
    emit_rip(kScratch0, page_offset(i.rip));
    e_.encode({.opcode = 0xff, .reg = 4, .memory = true,
               .mem = HostMem::frame(i.flags_in_frame ? frame::kExitInterpretFrame : frame::kExitInterpret)});
  }
  for (FarExit& f : far_exits_) {
    e_.bind(f.entry);
    flags_ = Flags::Host;
    exit_to(f.target, false);
    out_->exits.back().insns = static_cast<u16>(f.index + 1);
  }
  for (Poll& p : polls_) {
    e_.bind(p.entry);
    if (p.rcx) e_.mov(kHostRcx, kScratch0);
    emit_rip(kScratch0, page_offset(p.target));
    e_.encode({.opcode = 0xff, .reg = 4, .memory = true,
               .mem = HostMem::frame(p.in_frame ? frame::kExitAttentionFrame : frame::kExitAttention)});
  }
  for (std::size_t n = 0; n < stubs_.size(); n++) {
    out_->exits[n].stub = e_.size();
    e_.bind(stubs_[n].entry);
    emit_rip(kScratch0, stubs_[n].offset);
    e_.mov_imm(kScratch1, (request_->first_tag + static_cast<u32>(n)) | (stubs_[n].ungrouped ? DirectExit::kUngrouped : 0));
    out_->exits[n].tag = e_.size() - 4;
    e_.encode({.opcode = 0xff, .reg = 4, .memory = true,
               .mem = HostMem::frame(stubs_[n].in_frame ? frame::kExitNextFrame : frame::kExitNext)});
    out_->exits[n].slot = e_.size() - 4;
  }
  for (Miss& m : misses_) {
    e_.bind(m.entry);
    if (!m.checked) emit_canonical_test(kScratch0, kScratch1, interpret_[m.insn].entry);
    e_.encode({.opcode = 0xff, .reg = 4, .memory = true, .mem = HostMem::frame(frame::kExitIndirectFrame)});
  }
  out_->dead_stub = e_.size();
  e_.bind(dead_);
  emit_rip(kScratch0, page_offset(request_->rip));
  e_.encode({.opcode = 0xff, .reg = 4, .memory = true, .mem = HostMem::frame(frame::kExitDeadFrame)});
}

void BlockBuilder::emit_rip(u8 to, i64 offset) {
  if (!pic()) {
    e_.mov_imm(to, (request_->rip & kPageMask) + static_cast<u64>(offset));
    return;
  }
  e_.load(to, HostMem::frame(frame::kPage));
  if (offset != 0) e_.lea(to, HostMem::at(to, static_cast<i32>(offset)));
}

void BlockBuilder::start_over() {
  out_->clear();
  e_.clear();
  slow_.clear();
  interpret_.clear();
  polls_.clear();
  far_exits_.clear();
  stubs_.clear();
  misses_.clear();
  stack_misses_.clear();
  stack_known_ = false;
  group_misses_.clear();
  x87_loads_.clear();
  zmm_loads_.clear();
  window_misses_.clear();
  region_misses_.clear();
  start_groups(!request_->ungrouped && (!request_->mode.windowed || loop_.on));
  rip_ = request_->rip;
  flags_ = Flags::Host;
  ended_ = false;
}

std::size_t BlockBuilder::body(std::size_t first, std::size_t count) {
  count_ = count;
  live_[count] = rflags::STATUS;  // where the block ends, every flag may be read
  for (std::size_t n = count; n-- > 0;) live_[n] = live_before(request_->insns[n], use_[n], live_[n + 1]);
  if (!in_second_body_) prologue(count);
  x87_ = X87{};
  zmm_in_ = false;
  for (std::size_t n = first; n < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    insn_ = &i;
    index_ = n;
    const u32 size = e_.size();
    const std::size_t slow = slow_.size(), faults = out_->faults.size();
    const Flags flags = flags_;
    const std::size_t misses = group_misses_.size(), window_misses = window_misses_.size(), region_misses = region_misses_.size(), x87_loads = x87_loads_.size(), zmm_loads = zmm_loads_.size();
    const X87 x87 = x87_;
    const bool zmm_in = zmm_in_;
    const Family family = family_of(i.op);
    // An access through a window may end in the interpreter without more ado.
    if (x87_.fip && (!keeps_fip(i) || (request_->mode.windowed && family != Family::X87))) store_fip();
    interpret_.emplace_back();
    interpret_.back().rip = rip_;
    interpret_.back().fip = x87_.fip;
    interpret_.back().fip_offset = x87_.fip_offset;
    interpret_.back().sti_shadow = n != 0 && request_->insns[n - 1].op == Op::Sti;
    consumed_ = 1;
    // These change something before their last access, or are in no hurry.
    by_tlb_ = family == Family::String || family == Family::Rare || family == Family::System || family == Family::X87 ||
              family == Family::Mmx ||  // the host's x87 tags and TOP may be set before its store faults
              (i.op == Op::HostVec && i.has(kVex | kEvex) && i.opcode == 0x1d);  // VCVTPS2PH: its flags may be set before its store faults
    before(i);
    if (request_->edge != 0) check_edge();
    regions_ahead();
    if (!one(i)) {
      e_.truncate(size);
      slow_.resize(slow);
      group_misses_.resize(misses);
      x87_loads_.resize(x87_loads);
      x87_ = x87;
      zmm_loads_.resize(zmm_loads);
      zmm_in_ = zmm_in;
      window_misses_.resize(window_misses);
      region_misses_.resize(region_misses);
      out_->faults.resize(faults);
      interpret_.pop_back();
      flags_ = flags;
      return n;
    }
    if (!ended_) after(i);
    for (unsigned k = 0; k < consumed_; k++) {
      rip_ += request_->insns[n + k].length;
      for (Group& g : groups_) follow(request_->insns[n + k], &g);
    }
    n += consumed_ - 1;
    if (ended_ || (i.has(kEndsBlock) && i.op != Op::Sti && i.op != Op::Jcc)) return n + 1;
  }
  return count;
}

void BlockBuilder::tail(std::size_t done) {
  if (ended_) return;
  index_ = done;
  store_fip();
  if (done < request_->insns.size()) {
    exit_interpret_now();
  } else {
    exit_to(wrapped(rip_), false);
  }
}

/// Whether the first thing that happens to the flags is a check that would move them to the frame.
bool BlockBuilder::enters_in_frame(std::size_t count) const {
  const bool stacked = request_->mode.stacked && !loop_.on;
  for (std::size_t n = 0; n < count; n++) {
    const DecodedInsn& i = request_->insns[n];
    switch (family_of(i.op)) {
      case Family::Push:
      case Family::Pop:
        if (stacked) break;
        return true;
      case Family::Leave:
      case Family::Call:
      case Family::Ret:
      case Family::Mmx:
        return true;
      case Family::X87:
        return !use_[n].touches;
      default:
        break;
    }
    const bool on_stack = stacked && i.mem.base == RSP && i.mem.index == kNoReg && i.mem.seg != FS && i.mem.seg != GS;
    for (const Operand& o : i.operands)
      if (o.kind == OperandKind::Mem && (o.access & kReadWrite) != 0 && !on_stack) return true;
    if (use_[n].touches) return false;
  }
  return false;
}

/// 16 bytes: what comes behind is as aligned as the block.
void BlockBuilder::emit_table_entry() {
  e_.bytes({0x0f, 0x1f, 0x44, 0x00, 0x00, 0x4d, 0x8d, 0xb6});  // nop; lea r14, [r14 - its offset in the page]
  e_.imm32(static_cast<u32>(-page_offset(request_->rip)));
  e_.store(HostMem::frame(frame::kPage), kScratch0);
}

/// The entry that the block is not made for comes first, and falls into the other. Before them the jump tables', of
/// position-independent code.
void BlockBuilder::prologue(std::size_t count) {
  if (pic()) emit_table_entry();
  frame_entry_ = e_.size();
  e_.watch();
  flags_ = Flags::Host;
  const auto pad = [&] { e_.bytes({0x0f, 0x1f, 0x44, 0x00, 0x00}); };  // nop
  begin_ = Label{};
  dead_ = Label{};
  if (live_[0] == 0) {
    if (loop_.on || padded_) pad();  // the block jumps to its own start, or just behind
    e_.bind(begin_);
    return;
  }
  if (!enters_in_frame(count)) {
    emit_flags_restore(kScratch0);
    e_.bind(begin_);
    return;
  }
  const u32 over = pic() ? e_.jmp_short() : 0;
  e_.bind(begin_);
  emit_flags_save(kScratch0);
  if (pic()) e_.bind_short(over);
  frame_entry_ = e_.size();
  e_.watch();
  if (padded_) pad();
  flags_ = Flags::Frame;
}

std::size_t BlockBuilder::attempt(std::size_t count) {
  start_over();
  return body(0, count);
}

bool BlockBuilder::run(const BlockRequest& request, TranslatedBlock* out) {
  request_ = &request;
  out_ = out;
  std::size_t count = 0;
  while (count < request.insns.size() && supported(count)) count++;
  use_.resize(count);
  live_.resize(count + 1);
  for (std::size_t n = 0; n < count; n++) use_[n] = flag_use(request.insns[n]);
  if (request.mode.windowed) foresight_.look(request, count);

  by_tlb_ = false;
  plan_loop(count);
  // Of windowed code, only those that are better off so: all checks are before the loop.
  if (request.mode.windowed && loop_.on && !all_hoisted(count)) loop_.on = false;
  plan_regions(count);
  padded_ = false;
  std::size_t done = attempt(count);
  if (done < count && !ended_) {
    // An instruction was refused after flags before it had been found dead on its account.
    count = done;
    loop_.on = false;
    done = attempt(count);
  }
  if (done != 0 && e_.early_label()) {
    padded_ = true;
    done = attempt(done);
  }
  if (done == 0) return false;
  out->insns = static_cast<u32>(done);
  out->bytes = static_cast<u32>(rip_ - request.rip);
  tail(done);
  if (!second_body(done)) return false;
  finish();
  out->entry = begin_.at;
  out->frame_entry = frame_entry_;
  out->relatives = e_.relatives();
  out->flags_in = live_[0];
  out->code.assign(e_.data(), e_.data() + e_.size());
  return true;
}

namespace {

class Translator final : public BlockTranslator {
 public:
  bool translate(const BlockRequest& request, TranslatedBlock* out) override {
    return builder_.run(request, out);
  }

 private:
  BlockBuilder builder_;
};

}  // namespace

std::unique_ptr<BlockTranslator> create_block_translator() { return std::make_unique<Translator>(); }

}  // namespace ring3::engine
