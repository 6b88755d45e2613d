#include "guest.hpp"

#include <cpuid.h>
#include <sys/mman.h>

#include <cstring>

#include "engine/interp/features.hpp"
#include "guest_parts.hpp"

namespace ring3::diff {

using namespace engine;  // NOLINT: a test of that room

/// Nothing an unprivileged instruction does reaches the environment.
class GuestRunner::NoEnvironment final : public Environment {
 public:
  bool mmio_read(Gpa, void*, unsigned) override { return false; }
  bool mmio_write(Gpa, const void*, unsigned) override { return false; }
  Answer port_in(u16, unsigned, u32*) override { return Answer::Exit; }
  Answer port_out(u16, unsigned, u32) override { return Answer::Exit; }
  Answer rdmsr(u32, u64*) override { return Answer::Fault; }
  Answer wrmsr(u32, u64) override { return Answer::Fault; }
  void cpuid(u32 leaf, u32 subleaf, u32 out[4]) override {
    __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
  }
  u64 rdtsc() override { return 0; }
  u64 get_cr8() override { return 0; }
  void set_cr8(u64) override {}
  Answer hypercall(u64, const u64*, u64*) override { return Answer::Done; }
  void nmi_unblocked() override {}
  void retired() override {}
};

VcpuState& GuestRunner::prepare() {
  s_.reset();
  s_.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
  s_.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::UMIP;
  s_.cr3 = kTables;
  s_.efer = efer::SCE | efer::LME | efer::LMA | efer::NX;
  s_.xcr0 = host_has_avx512() ? 0xe7 : 7;
  s_.seg[CS] = flat_segment(compat32_ ? 0x23 : 0x33, 11, 3, !compat32_);
  s_.seg[SS] = flat_segment(0x2b, 3, 3, false);
  for (Seg r : {DS, ES}) s_.seg[r] = compat32_ ? flat_segment(0x2b, 3, 3, false) : null_segment();
  for (Seg r : {FS, GS}) s_.seg[r] = null_segment();
  s_.tr.limit = 0x20;  // no I/O permission bitmap
  s_.gdtr = {0xffff800000000000, 0x7f};  // not mapped: no instruction under test gets that far
  s_.idtr = {0xffff800000001000, 0xfff};
  return s_;
}

void GuestRunner::map(u64 linear, u64 gpa, bool writable) {
  map_page(ram_, kTables, &next_table_, linear, gpa | 5 | (writable ? 2 : 0));
}

GuestRunner::GuestRunner(bool compat32, bool translated)
    : compat32_(compat32), ram_(map_guest_ram(kRamSize)), tracker_(memory_), mmu_(prepare(), memory_, tracker_, 0),
      env_(std::make_unique<NoEnvironment>()) {
  CHECK(memory_.set_region(0, 0, Gpa(0), kRamSize, Hva(reinterpret_cast<u64>(ram_))) == 0);
  mmu_.set_port(env_.get());
  interpreter_ = Interpreter::create(s_, mmu_, *env_, 1u << 20);
  if (translated) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    auto made = TranslatorVcpu::create(s_, mmu_, *interpreter_, create_block_translator(), options);
    CHECK(made.ok());
    translator_ = std::move(*made);
  }
  tracker_.register_vcpu(0, &mmu_, &context().attention(), 1);
  tracker_.enter_guest(0);
  map(kCode, kCodeGpa, false);
  for (u64 i = 0; i < kDataPages; ++i) map(kData + i * kPageSize, kDataGpa + i * kPageSize, true);
  map(kReadOnly, kReadOnlyGpa, false);
  const GuestFeatures& f = context().features = host_features();
  mmu_.set_features(f.maxphyaddr, f.nx, f.page1g, f.pcid, f.amd);
  context().event_filter = [this](const Event& event) {
    has_event_ = true;
    event_ = event;
    return true;
  };
  context().mode_changed();
}

GuestRunner::~GuestRunner() {
  tracker_.leave_guest(0);
  tracker_.unregister_vcpu(0);
  translator_.reset();
  interpreter_.reset();
  ::munmap(ram_, kRamSize);
}

void GuestRunner::set_code(const u8* page, unsigned offset, unsigned size, bool single) {
  u8* at = ram_ + kCodeGpa;
  std::memcpy(at, page, kCodeSize);
  at[offset + size] = at[offset + kFarPad] = 0xf4;  // HLT: #GP(0) at CPL 3, where the run ends
  interpreter_->code_flush();
  interpreter_->set_max_block_insns(single ? 1 : 0);
}

std::optional<Outcome> GuestRunner::run(Registers* regs, u64 fall_through) {
  std::memcpy(s_.gpr, regs->gpr, sizeof(s_.gpr));
  s_.rip = regs->rip;
  s_.rflags = regs->rflags | rflags::FIXED1 | rflags::IF;
  std::memcpy(s_.xsave.bytes, regs->xsave, sizeof(regs->xsave));
  context().mode_changed();
  has_event_ = false;
  const Interpreter::Result result = translator_ ? translator_->run(100000) : interpreter_->run(100000);

  std::memcpy(regs->gpr, s_.gpr, sizeof(s_.gpr));
  regs->rflags = s_.rflags;
  std::memcpy(regs->xsave, s_.xsave.bytes, sizeof(regs->xsave));
  Outcome out;
  if (!has_event_) {
    CHECK(result != Interpreter::Result::Debug);
    return std::nullopt;
  }
  const bool at_pad = event_.vector == vec::GP && event_.error == 0;
  if (at_pad && s_.rip == fall_through) {
    out.kind = Outcome::Kind::FellThrough;
  } else if (at_pad && s_.rip == regs->rip + kFarPad) {
    out.kind = Outcome::Kind::Branched;
  } else {
    out.kind = Outcome::Kind::Fault;
    out.vector = event_.vector;
    if (event_.vector == vec::GP || event_.vector == vec::PF) out.error = event_.error;
    if (event_.vector == vec::PF) out.cr2 = event_.payload;
    regs->rip = s_.rip;
  }
  return out;
}

}  // namespace ring3::diff
