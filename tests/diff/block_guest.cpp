#include "block_guest.hpp"

#include <cpuid.h>
#include <sys/mman.h>

#include <cstring>

#include "engine/interp/features.hpp"
#include "guest_parts.hpp"

namespace ring3::diff {

using namespace engine;  // NOLINT: a test of that room

const char* name(BlockMode mode) {
  static constexpr const char* kNames[] = {"user64", "kernel64", "window64", "user32"};
  return kNames[static_cast<unsigned>(mode)];
}

/// A device that answers by address, and remembers what was done with it, in order.
class BlockGuest::Device final : public Environment {
 public:
  bool mmio_read(Gpa gpa, void* data, unsigned size) override {
    for (unsigned n = 0; n < size; n++) static_cast<u8*>(data)[n] = static_cast<u8>(37 * (gpa.value + n) + log % 251);
    note(gpa.value);
    return true;
  }
  bool mmio_write(Gpa gpa, const void* data, unsigned size) override {
    for (unsigned n = 0; n < size; n++) note(static_cast<const u8*>(data)[n]);
    note(gpa.value + 1);
    return true;
  }
  // A program of the kernel's that returned into its data executes what it finds, IN and OUT among it.
  Answer port_in(u16 port, unsigned size, u32* value) override {
    *value = static_cast<u32>((port * 0x9e3779b1u + log) & ((u64{1} << 8 * size) - 1));
    note(port);
    return Answer::Done;
  }
  Answer port_out(u16 port, unsigned size, u32 value) override {
    note(port + (u64{value} << 16) + size);
    return Answer::Done;
  }
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
  void note(u64 value) { log = (log ^ value) * 0x100000001b3; }

  u64 log = 0;
};

VcpuState& BlockGuest::prepare() {
  const bool long64 = mode_ != BlockMode::User32, user = mode_ != BlockMode::Kernel64;
  const u8 dpl = user ? 3 : 0;
  s_.reset();
  s_.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
  s_.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::UMIP;
  s_.cr3 = kTables;
  s_.efer = efer::SCE | efer::LME | efer::LMA | efer::NX;
  s_.xcr0 = host_has_avx512() ? 0xe7 : 7;
  s_.seg[CS] = flat_segment(static_cast<u16>((long64 ? 0x30 : 0x20) | dpl), 11, dpl, long64);
  s_.seg[SS] = flat_segment(static_cast<u16>(0x28 | dpl), 3, dpl, false);
  for (Seg r : {DS, ES}) s_.seg[r] = long64 ? null_segment() : flat_segment(0x2b, 3, 3, false);
  for (Seg r : {FS, GS}) s_.seg[r] = null_segment();
  s_.seg[FS].base = long64 ? kData + 0x2000 : 0;
  s_.seg[GS].base = long64 ? kData + 0x4000 : 0;
  s_.tr.limit = 0x20;
  s_.gdtr = {0xffff800000000000, 0x7f};
  s_.idtr = {0xffff800000001000, 0xfff};
  return s_;
}

void BlockGuest::map(u64 linear, u64 gpa, bool present, bool writable) {
  map_page(ram_, kTables, &next_table_, linear, present ? gpa | 5 | (writable ? 2 : 0) : 0);
}

BlockGuest::BlockGuest(BlockMode mode, Translation translation)
    : mode_(mode), ram_(map_guest_ram(kRamSize)), tracker_(memory_), mmu_(prepare(), memory_, tracker_, 0),
      device_(std::make_unique<Device>()) {
  CHECK(memory_.set_region(0, 0, Gpa(0), kRamSize, Hva(reinterpret_cast<u64>(ram_))) == 0);
  mmu_.set_port(device_.get());
  interpreter_ = Interpreter::create(s_, mmu_, *device_, 1u << 20);
  if (translation.on) {
    TranslatorVcpu::Options options;
    options.arena_bytes = 2u << 20;
    options.max_insns = translation.max_insns;
    if (!translation.fixed) options.fixed_below = 0;
    options.window_samples = mode_ == BlockMode::Window64 ? 1 : 0;
    auto made = TranslatorVcpu::create(s_, mmu_, *interpreter_, create_block_translator(), options);
    CHECK(made.ok());
    translator_ = std::move(*made);
  }
  tracker_.register_vcpu(0, &mmu_, &context().attention(), 1);
  tracker_.enter_guest(0);
  for (u64 i = 0; i < kBlockCodePages; i++) map(kCode + i * kPageSize, kCodeGpa + i * kPageSize, true, true);
  for (u64 i = 0; i < kBlockDataPages; i++) map(kData + i * kPageSize, kDataGpa + i * kPageSize, true, true);
  for (u64 i = 0; i < kBlockStackPages; i++) map(kBlockStack + i * kPageSize, kStackGpa + i * kPageSize, true, true);
  if (mode_ != BlockMode::User32)
    for (u64 i = 0; i < kBlockStackPages; i++) map(kBlockFarStack + i * kPageSize, kStackGpa + i * kPageSize, true, true);
  map(kBlockReadOnly, kReadOnlyGpa, true, false);
  map(kBlockDevice, 0x10000000, true, true);
  const GuestFeatures& f = context().features = host_features();
  mmu_.set_features(f.maxphyaddr, f.nx, f.page1g, f.pcid, f.amd);
  context().event_filter = [this](const Event& event) {
    has_event_ = true;
    event_ = event;
    return true;
  };
  changed();
}

BlockGuest::~BlockGuest() {
  tracker_.leave_guest(0);
  tracker_.unregister_vcpu(0);
  translator_.reset();
  interpreter_.reset();
  ::munmap(ram_, kRamSize);
}

void BlockGuest::changed() {
  interpreter_->code_flush();
  mmu_.set_cr3(s_.cr3, false);
  context().mode_changed();
  device_->log = 0;
}

void BlockGuest::protect(unsigned page, bool present, bool writable) {
  map(kData + page * kPageSize, kDataGpa + page * kPageSize, present, writable);
  absent_ = (absent_ & ~(1u << page)) | (present ? 0 : 1u << page);
  mmu_.set_cr3(s_.cr3, false);
}

std::span<const u8> BlockGuest::fetched(u64 linear) const {
  struct Region {
    u64 linear, gpa, pages;
  };
  constexpr Region kRegions[] = {{kCode, kCodeGpa, kBlockCodePages},
                                 {kData, kDataGpa, kBlockDataPages},
                                 {kBlockReadOnly, kReadOnlyGpa, 1},
                                 {kBlockStack, kStackGpa, kBlockStackPages},
                                 {kBlockFarStack, kStackGpa, kBlockStackPages}};
  for (const Region& r : kRegions) {
    const u64 offset = linear - r.linear;
    if (offset >= r.pages * kPageSize) continue;
    if (r.gpa == kDataGpa && (absent_ >> (offset / kPageSize) & 1) != 0) return {};
    return {ram_ + r.gpa + offset, static_cast<std::size_t>(kPageSize - offset % kPageSize)};
  }
  return {};
}

u64 BlockGuest::device_log() const { return device_->log; }

BlockGuest::End BlockGuest::ended(Interpreter::Result result) {
  if (has_event_) return End::Event;
  if (result == Interpreter::Result::Attention) return End::Attention;
  if (result == Interpreter::Result::Halted) return End::Halted;
  return result == Interpreter::Result::Budget ? End::Budget : End::Other;
}

BlockGuest::End BlockGuest::run(u64 budget) {
  has_event_ = false;
  return ended(translator_ ? translator_->run(budget) : interpreter_->run(budget));
}

BlockGuest::End BlockGuest::step() {
  has_event_ = false;
  return ended(interpreter_->run(1));
}

}  // namespace ring3::diff
