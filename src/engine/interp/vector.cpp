#include "engine/interp/vector.hpp"

#include <array>
#include <cstring>

#include "base/log.hpp"
#include "engine/interp/families.hpp"
#include "engine/interp/features.hpp"
#include "engine/interp/operand.hpp"

namespace ring3::engine {

// ---- stubs ----

VectorUnit::VectorUnit(std::unique_ptr<CodeArena> arena)
    : arena_(std::move(arena)), host_(host_features()), slots_(new Slot[1u << kSlotBits]) {
  avx_ = host_[Feature::Avx];
  unsigned other = 0;
  const StubCode exits = make_fault_exit(avx_, &other);
  const u8* at = arena_->append(exits.code());
  exits_size_ = arena_->used();
  faults_ = std::make_unique<HostFaultRange>(arena_->begin(), arena_->end(), at, at + other);
}

Result<std::shared_ptr<VectorUnit>> VectorUnit::create() {
  auto arena = CodeArena::create(kArenaSize);
  if (!arena) return arena.error();
  return std::shared_ptr<VectorUnit>(new VectorUnit(std::move(*arena)));
}

VectorUnit::Key VectorUnit::key_of(const DecodedInsn& insn, CodeMode mode) {
  Key key;
  u64 low, high;
  std::memcpy(&low, insn.raw, 8);
  std::memcpy(&high, insn.raw + 7, 8);
  high >>= 8;
  const unsigned n = insn.length;
  if (n < 8) {
    low &= ~0ull >> (64 - 8 * n);
    high = 0;
  } else {
    high &= n > 8 ? ~0ull >> (64 - 8 * (n - 8)) : 0;
  }
  key.low = low;
  key.high = high | (static_cast<u64>(mode) + 1) << 56;
  return key;
}

void VectorUnit::flush() {
  stubs_.clear();
  for (unsigned i = 0; i < 1u << kSlotBits; ++i) slots_[i] = Slot{};
  arena_->clear(exits_size_);
}

const Stub* VectorUnit::find_slow(const DecodedInsn& insn, CodeMode mode, const Key& key) {
  if (!host_.allows(insn)) return nullptr;
  const std::optional<StubCode> code = make_stub(insn, mode, avx_);
  if (!code) return nullptr;
  // The code holds all of the instruction but how the caller treats its memory operand.
  std::string name(reinterpret_cast<const char*>(code->bytes.data()), code->size);
  for (const u16 v : {code->flags, code->mem_size, code->fop, code->stores}) {
    name.push_back(static_cast<char>(v));
    name.push_back(static_cast<char>(v >> 8));
  }
  auto it = stubs_.find(name);
  if (it == stubs_.end()) {
    const u8* at = arena_->append(code->code());
    if (at == nullptr) {
      flush();
      at = arena_->append(code->code());
      if (at == nullptr) return nullptr;
    }
    Stub stub;
    std::memcpy(&stub.run, &at, sizeof at);
    stub.flags = code->flags;
    stub.mem_size = code->mem_size;
    stub.fop = code->fop;
    stub.stores = code->stores;
    it = stubs_.emplace(std::move(name), stub).first;
  }
  Slot& slot = slots_[slot_of(key)];
  slot.key = key;
  slot.stub = &it->second;
  return slot.stub;
}

Status attach_vector_unit(Context& c) {
  if (c.vector_unit) return Ok{};
  auto unit = VectorUnit::create();
  if (!unit) return unit.error();
  c.vector_unit = std::move(*unit);
  return Ok{};
}

// ---- availability ----

bool sse_available(Context& c) {
  if (c.fpu_ok && (c.s.cr4 & cr4::OSFXSR)) [[likely]] return true;
  if ((c.s.cr0 & cr0::EM) || !(c.s.cr4 & cr4::OSFXSR)) {
    c.ud();
  } else {
    c.fault(vec::NM);
  }
  return false;
}

bool xstate_available(Context& c, u64 components) {
  if (!(c.s.cr4 & cr4::OSXSAVE) || (c.s.xcr0 & components) != components) {
    c.ud();
    return false;
  }
  if (c.s.cr0 & cr0::TS) {
    c.fault(vec::NM);
    return false;
  }
  return true;
}

bool mmx_available(Context& c) {
  if (!c.fpu_ok) {
    c.fault(c.s.cr0 & cr0::EM ? vec::UD : vec::NM);
    return false;
  }
  if (x87_pending(c.s)) {
    c.fault(vec::MF);
    return false;
  }
  return true;
}

/// MXCSR may hold anything the VMM set; the host must be able to load it.
static constexpr u32 kMxcsrBits = 0xffff, kMxcsrMasks = 0x1f80;

void prepare_mxcsr(VcpuState& s) {
  u32& mxcsr = s.xsave.mxcsr();
  mxcsr &= kMxcsrBits;
  if ((mxcsr & kMxcsrMasks) != kMxcsrMasks) [[unlikely]] arm_host_faults();
}

void put_flags(Context& c, const StubFrame& frame) {
  const u64 low = frame.flags >> 8 & (rflags::CF | rflags::PF | rflags::AF | rflags::ZF | rflags::SF);
  c.s.rflags = (c.s.rflags & ~rflags::STATUS) | low | (frame.flags & 1 ? rflags::OF : 0);
}

/// A stub came back through the fault exit.
Exec stub_fault(Context& c, u32 code) {
  if (code != static_cast<u32>(HostFault::FloatingPoint)) return c.ud();  // the host lacks it after all
  return c.fault(c.s.cr4 & cr4::OSXMMEXCPT ? vec::XM : vec::UD);
}

VectorUnit* unit_of(Context& c) {
  if (!c.vector_unit) [[unlikely]] {
    if (!attach_vector_unit(c)) return nullptr;
  }
  return c.vector_unit.get();
}

namespace {

template <unsigned N>
bool read_n(Context& c, u64 linear, Seg seg, u8* buffer) {
  return c.mmu.read(linear, reinterpret_cast<std::array<u8, N>*>(buffer), seg);
}
template <unsigned N>
bool write_n(Context& c, u64 linear, Seg seg, const u8* buffer) {
  std::array<u8, N> v;
  std::memcpy(v.data(), buffer, N);
  return c.mmu.write(linear, v, seg);
}

bool read_memory(Context& c, u64 linear, unsigned size, Seg seg, u8* buffer) {
  switch (size) {
    case 4: return read_n<4>(c, linear, seg, buffer);
    case 8: return read_n<8>(c, linear, seg, buffer);
    case 16: return read_n<16>(c, linear, seg, buffer);
    case 32: return read_n<32>(c, linear, seg, buffer);
    default: return c.mmu.read_bytes(linear, buffer, size, seg);
  }
}

bool write_memory(Context& c, u64 linear, unsigned size, Seg seg, const u8* buffer) {
  switch (size) {
    case 4: return write_n<4>(c, linear, seg, buffer);
    case 8: return write_n<8>(c, linear, seg, buffer);
    case 16: return write_n<16>(c, linear, seg, buffer);
    case 32: return write_n<32>(c, linear, seg, buffer);
    default: return c.mmu.write_bytes(linear, buffer, size, seg);
  }
}

Seg segment_of(const DecodedInsn& insn) { return static_cast<Seg>(insn.mem.seg); }

/// The memory operand of an SSE or AVX instruction.
bool read_operand(Context& c, const DecodedInsn& insn, u64 linear, unsigned size, u8* buffer) {
  const Seg seg = segment_of(insn);
  if (insn.feature == Feature::F16c && alignment_spared(c)) [[unlikely]] return read_unaligned(c, linear, buffer, size, seg);
  return read_memory(c, linear, size, seg, buffer);
}
bool write_operand(Context& c, const DecodedInsn& insn, u64 linear, unsigned size, const u8* buffer) {
  const Seg seg = segment_of(insn);
  if (insn.feature == Feature::F16c && alignment_spared(c)) [[unlikely]] return write_unaligned(c, linear, buffer, size, seg);
  return write_memory(c, linear, size, seg, buffer);
}

/// Address and alignment of the memory operand.
bool locate(Context& c, const DecodedInsn& insn, const Stub& stub, u64* linear) {
  if (!c.linear(segment_of(insn), c.effective_address(insn), stub.mem_size, stub.flags & kStubMemWrite, linear)) return false;
  if ((stub.flags & kStubAligned) && (*linear & (stub.mem_size - 1u))) [[unlikely]] {
    c.gp0();
    return false;
  }
  return true;
}

void take_flags(Context& c, StubFrame& frame) {
  frame.flags = static_cast<u32>((c.s.rflags & 0xff) << 8 | (c.s.rflags & rflags::OF ? 1 : 0));
}

/// VEX instructions clear what is above bit 255 of a ZMM register that they write.
void clear_above_ymm(VcpuState& s, u32 stores) {
  for (; stores != 0; stores &= stores - 1) std::memset(s.xsave.zmm_high(static_cast<unsigned>(__builtin_ctz(stores))), 0, 32);
}

// ---- SSE and AVX ----

template <bool Vex>
Exec run_vector(Context& c, const DecodedInsn& insn) {
  if (!(Vex ? avx_available(c) : sse_available(c))) return Exec::Stop;
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) [[unlikely]] return c.ud();
  StubFrame& frame = unit->frame;
  u64 linear = 0;
  u32 mxcsr = 0;
  // A store that converts: its memory faults, of segments and of pages, come before its SIMD exception on AMD's processors
  // (Zen 3), and behind it, with MXCSR's flags set, on Intel's (Sapphire Rapids).
  const bool converts = (stub->flags & kStubMemWrite) && (stub->flags & kStubMxcsr), late = converts && !c.features.amd;
  if (insn.has(kHasMem)) {
    if (!late && !locate(c, insn, *stub, &linear)) return Exec::Stop;
    if ((stub->flags & kStubMemRead) && !read_operand(c, insn, linear, stub->mem_size, frame.buffer)) return Exec::Stop;
  }
  if (stub->flags & kStubMxcsr) {
    prepare_mxcsr(c.s);
    mxcsr = c.s.xsave.mxcsr();
    if (converts && !late && !c.mmu.check_write(linear, stub->mem_size, segment_of(insn))) return Exec::Stop;
  }
  if (const u32 code = stub->run(&c.s.xsave, &frame, c.s.gpr)) [[unlikely]] return stub_fault(c, code);
  if (Vex && (c.s.xcr0 & 0xe0) != 0) [[unlikely]] clear_above_ymm(c.s, stub->stores);
  if (stub->flags & kStubMemWrite) {
    if (late && !locate(c, insn, *stub, &linear)) return Exec::Stop;
    // Stores write no register; what remains to take back is MXCSR.
    if (!write_operand(c, insn, linear, stub->mem_size, frame.buffer)) {
      const bool keeps = !c.features.amd && c.stop().kind == Stop::Kind::Fault;
      if ((stub->flags & kStubMxcsr) && !keeps) c.s.xsave.mxcsr() = mxcsr;
      return Exec::Stop;
    }
  }
  if (stub->flags & kStubWritesFlags) put_flags(c, frame);
  return Exec::Next;
}

// ---- MMX and x87: the FXSAVE image as a whole ----

/// What of the image never passes through the host: the guest's x87 pointers.
struct Pointers {
  u8 bytes[18];
  void save(const XsaveArea& area) { std::memcpy(bytes, area.bytes + 6, sizeof bytes); }
  void restore(XsaveArea& area) const { std::memcpy(area.bytes + 6, bytes, sizeof bytes); }
};

void set_pointer(XsaveArea& area, unsigned offset, u64 value) { std::memcpy(area.bytes + offset, &value, 8); }
u64 get_pointer(const XsaveArea& area, unsigned offset) {
  u64 v;
  std::memcpy(&v, area.bytes + offset, 8);
  return v;
}
constexpr unsigned kFop = 6, kFip = 8, kFdp = 16;

/// How a pointer is kept: 64 bits in IA-32e mode; offset in 31:0 and selector in 47:32 elsewhere, where
/// FXSAVE has them.
u64 make_pointer(const Context& c, u64 offset, u16 selector) {
  if (c.code64) return offset;
  if (c.long_mode) return offset & 0xffffffff;
  return (offset & 0xffffffff) | static_cast<u64>(selector) << 32;
}

void record_pointers(Context& c, const DecodedInsn& insn, const Stub& stub) {
  XsaveArea& area = c.s.xsave;
  set_pointer(area, kFip, make_pointer(c, c.s.rip - insn.length, c.s.seg[CS].selector));
  if (!x87_pending(c.s)) return;
  std::memcpy(area.bytes + kFop, &stub.fop, 2);
  if (insn.has(kHasMem)) set_pointer(area, kFdp, make_pointer(c, c.effective_address(insn), c.s.seg[insn.mem.seg].selector));
}

/// Runs an FXSAVE-image stub; the x87 pointers survive. 0 or a HostFault.
u32 run_image(Context& c, VectorUnit* unit, const Stub& stub) {
  prepare_mxcsr(c.s);
  Pointers pointers;
  pointers.save(c.s.xsave);
  u32 mask;  // MXCSR_MASK, which FXSAVE writes
  std::memcpy(&mask, c.s.xsave.bytes + 28, sizeof mask);
  if (stub.flags & kStubReadsFlags) take_flags(c, unit->frame);
  const u32 code = stub.run(&c.s.xsave, &unit->frame, c.s.gpr);
  if (code == 0) {
    pointers.restore(c.s.xsave);
    std::memcpy(c.s.xsave.bytes + 28, &mask, sizeof mask);
    if (stub.flags & kStubWritesFlags) put_flags(c, unit->frame);
  }
  return code;
}

Exec run_mmx(Context& c, const DecodedInsn& insn) {
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (!c.fpu_ok) return c.fault(c.s.cr0 & cr0::EM ? vec::UD : vec::NM);
  if (stub == nullptr || ((stub->flags & kStubTouchesXmm) && !(c.s.cr4 & cr4::OSFXSR))) return c.ud();
  // CVTPI2PD from memory does not enter the MMX state and does not wait.
  const bool waits = !((stub->flags & kStubTouchesXmm) && insn.opcode == 0x2a && insn.has(kHasMem));
  if (x87_pending(c.s)) {
    if (waits) return c.fault(vec::MF);
    arm_host_faults();  // should this host wait after all
  }
  u64 linear = 0;
  u8 saved[160];
  if (insn.has(kHasMem)) {
    if (!locate(c, insn, *stub, &linear)) return Exec::Stop;
    if ((stub->flags & kStubMemRead) && !read_memory(c, linear, stub->mem_size, segment_of(insn), unit->frame.buffer)) return Exec::Stop;
    if (stub->flags & kStubMemWrite) {
      if (!c.mmu.check_write(linear, stub->mem_size, segment_of(insn))) return Exec::Stop;
      std::memcpy(saved, c.s.xsave.bytes, sizeof saved);
    }
  }
  if (!(stub->flags & kStubX87)) {
    enter_mmx(c.s.xsave);
    if (const u32 code = stub->run(&c.s.xsave, &unit->frame, c.s.gpr)) return stub_fault(c, code);
  } else if (const u32 code = run_image(c, unit, *stub)) {
    if (code == static_cast<u32>(HostFault::FloatingPoint) && x87_pending(c.s)) return c.fault(vec::MF);
    return stub_fault(c, code);
  }
  if ((stub->flags & kStubMemWrite) && !write_memory(c, linear, stub->mem_size, segment_of(insn), unit->frame.buffer)) {
    std::memcpy(c.s.xsave.bytes, saved, sizeof saved);
    return Exec::Stop;
  }
  return Exec::Next;
}

bool x87_available(Context& c, bool waits) {
  if (!c.fpu_ok) {
    c.fault(vec::NM);
    return false;
  }
  if (waits && x87_pending(c.s)) {
    c.fault(vec::MF);
    return false;
  }
  return true;
}

/// Unmasked faults other than precision keep a store from happening.
bool x87_store_suppressed(VcpuState& s) { return s.xsave.fsw() & ~s.xsave.fcw() & 0x1f; }

Exec run_x87(Context& c, const DecodedInsn& insn) {
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) return c.ud();
  if (!x87_available(c, !(stub->flags & kStubX87NoWait))) return Exec::Stop;
  u64 linear = 0;
  u8 saved[160];
  const bool store = stub->flags & kStubMemWrite;
  // Where an unmasked exception keeps the store from happening, AMD's memory faults come first, and Intel's never.
  const bool late = store && !c.features.amd;
  if (insn.has(kHasMem)) {
    if (!late && !locate(c, insn, *stub, &linear)) return Exec::Stop;
    if ((stub->flags & kStubMemRead) && !read_memory(c, linear, stub->mem_size, segment_of(insn), unit->frame.buffer)) return Exec::Stop;
    if (store) {
      if (!late && !c.mmu.check_write(linear, stub->mem_size, segment_of(insn))) return Exec::Stop;
      std::memcpy(saved, c.s.xsave.bytes, sizeof saved);
    }
  }
  if (const u32 code = run_image(c, unit, *stub)) return stub_fault(c, code);
  if (store && !x87_store_suppressed(c.s) &&
      ((late && !locate(c, insn, *stub, &linear)) ||
       !write_memory(c, linear, stub->mem_size, segment_of(insn), unit->frame.buffer))) {
    std::memcpy(c.s.xsave.bytes, saved, sizeof saved);
    return Exec::Stop;
  }
  if (!(stub->flags & kStubX87Control)) {
    record_pointers(c, insn, *stub);
  } else if (insn.raw[insn.length - 1] == 0xe3 && !insn.has(kHasMem)) {  // FNINIT
    std::memset(c.s.xsave.bytes + kFop, 0, 18);
  }
  return Exec::Next;
}

/// FNSTCW m16   D9 /7;   FNSTSW m16   DD /7;   FNSTSW AX   DF E0. They do not wait.
template <bool Status>
Exec store_word(Context& c, const DecodedInsn& insn) {
  if (!x87_available(c, false)) return Exec::Stop;
  const u16 value = Status ? c.s.xsave.fsw() : c.s.xsave.fcw();
  if (!insn.has(kHasMem)) {
    c.s.gpr[RAX] = (c.s.gpr[RAX] & ~0xffffull) | value;
    return Exec::Next;
  }
  u64 linear;
  if (!c.linear(segment_of(insn), c.effective_address(insn), 2, true, &linear)) return Exec::Stop;
  return c.mmu.write(linear, value, segment_of(insn)) ? Exec::Next : Exec::Stop;
}

// ---- FNSTENV, FNSAVE, FLDENV, FRSTOR ----
// The host works on its 28-byte protected-mode format; the guest's is one of four (SDM vol. 1 fig. 8-9 to 8-12).

void put16(u8* p, u64 v) {
  const u16 x = static_cast<u16>(v);
  std::memcpy(p, &x, 2);
}
void put32(u8* p, u64 v) {
  const u32 x = static_cast<u32>(v);
  std::memcpy(p, &x, 4);
}
u32 get16(const u8* p) {
  u16 v;
  std::memcpy(&v, p, 2);
  return v;
}
u32 get32(const u8* p) {
  u32 v;
  std::memcpy(&v, p, 4);
  return v;
}

struct X87Pointer {
  u32 offset = 0;
  u16 selector = 0;
};
X87Pointer split(const Context& c, u64 pointer) {
  return {static_cast<u32>(pointer), static_cast<u16>(c.long_mode ? 0 : pointer >> 32)};
}

/// host: 28 bytes from FNSTENV. Writes 14 or 28 bytes.
void to_guest_environment(Context& c, bool wide, const u8* host, u8* guest) {
  const X87Pointer fip = split(c, get_pointer(c.s.xsave, kFip)), fdp = split(c, get_pointer(c.s.xsave, kFdp));
  const u32 fop = get16(c.s.xsave.bytes + kFop) & 0x7ff;
  const u32 lip = fip.selector * 16u + fip.offset, ldp = fdp.selector * 16u + fdp.offset;
  if (wide) {
    std::memcpy(guest, host, 28);
    if (c.protected_mode) {
      put32(guest + 12, fip.offset);
      put32(guest + 16, fip.selector | fop << 16);
      put32(guest + 20, fdp.offset);
      put16(guest + 24, fdp.selector);
    } else {
      put32(guest + 12, lip & 0xffff);
      put32(guest + 16, (lip >> 16) << 12 | fop);
      put32(guest + 20, ldp & 0xffff);
      put32(guest + 24, (ldp >> 16) << 12);
    }
    return;
  }
  for (unsigned i = 0; i < 3; ++i) put16(guest + 2 * i, get16(host + 4 * i));
  if (c.protected_mode) {
    put16(guest + 6, fip.offset);
    put16(guest + 8, fip.selector);
    put16(guest + 10, fdp.offset);
    put16(guest + 12, fdp.selector);
  } else {
    put16(guest + 6, lip);
    put16(guest + 8, (lip >> 16 & 15) << 12 | fop);
    put16(guest + 10, ldp);
    put16(guest + 12, (ldp >> 16 & 15) << 12);
  }
}

/// Sets the pointers from the guest's image and gives the host one without any.
void from_guest_environment(Context& c, bool wide, const u8* guest, u8* host, Pointers* pointers) {
  std::memset(host, 0, 28);
  for (unsigned i = 0; i < 3; ++i) put16(host + 4 * i, get16(guest + (wide ? 4 : 2) * i));
  u64 fip, fdp;
  u32 fop = 0;
  if (c.protected_mode) {
    if (wide) {
      fip = make_pointer(c, get32(guest + 12), static_cast<u16>(get16(guest + 16)));
      fdp = make_pointer(c, get32(guest + 20), static_cast<u16>(get16(guest + 24)));
      fop = get16(guest + 18) & 0x7ff;
    } else {
      fip = make_pointer(c, get16(guest + 6), static_cast<u16>(get16(guest + 8)));
      fdp = make_pointer(c, get16(guest + 10), static_cast<u16>(get16(guest + 12)));
    }
  } else if (wide) {
    fip = (get32(guest + 16) >> 12 & 0xffff) << 16 | get16(guest + 12);
    fdp = (get32(guest + 24) >> 12 & 0xffff) << 16 | get16(guest + 20);
    fop = get32(guest + 16) & 0x7ff;
  } else {
    fip = (get16(guest + 8) >> 12) << 16 | get16(guest + 6);
    fdp = (get16(guest + 12) >> 12) << 16 | get16(guest + 10);
    fop = get16(guest + 8) & 0x7ff;
  }
  put16(pointers->bytes, fop);
  std::memcpy(pointers->bytes + 2, &fip, 8);
  std::memcpy(pointers->bytes + 10, &fdp, 8);
}

/// FNSTENV m   D9 /6: masks all exceptions afterwards.   FNSAVE m   DD /6: initialises afterwards.
template <bool Registers>
Exec store_environment(Context& c, const DecodedInsn& insn) {
  if (!x87_available(c, false)) return Exec::Stop;
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) return c.ud();
  u64 linear;
  if (!locate(c, insn, *stub, &linear) || !c.mmu.check_write(linear, stub->mem_size, segment_of(insn))) return Exec::Stop;
  const bool wide = insn.opsize != 2;
  u8 saved[160], image[108];
  std::memcpy(saved, c.s.xsave.bytes, sizeof saved);
  if (const u32 code = run_image(c, unit, *stub)) return stub_fault(c, code);
  to_guest_environment(c, wide, unit->frame.buffer, image);
  if (Registers) {
    std::memcpy(image + (wide ? 28 : 14), unit->frame.buffer + 28, 80);
    std::memset(c.s.xsave.bytes + kFop, 0, 18);
  }
  if (!c.mmu.write_bytes(linear, image, stub->mem_size, segment_of(insn))) {
    std::memcpy(c.s.xsave.bytes, saved, sizeof saved);
    return Exec::Stop;
  }
  return Exec::Next;
}

/// FLDENV m   D9 /4;   FRSTOR m   DD /4.
template <bool Registers>
Exec load_environment(Context& c, const DecodedInsn& insn) {
  if (!x87_available(c, true)) return Exec::Stop;
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) return c.ud();
  u64 linear;
  u8 image[108];
  if (!locate(c, insn, *stub, &linear) || !c.mmu.read_bytes(linear, image, stub->mem_size, segment_of(insn))) return Exec::Stop;
  const bool wide = insn.opsize != 2;
  Pointers pointers;
  from_guest_environment(c, wide, image, unit->frame.buffer, &pointers);
  if (Registers) std::memcpy(unit->frame.buffer + 28, image + (wide ? 28 : 14), 80);
  if (const u32 code = run_image(c, unit, *stub)) return stub_fault(c, code);
  pointers.restore(c.s.xsave);
  return Exec::Next;
}

/// FWAIT   9B: #NM by MP and TS (not EM), then #MF.
Exec fwait(Context& c, const DecodedInsn&) {
  if ((c.s.cr0 & (cr0::MP | cr0::TS)) == (cr0::MP | cr0::TS)) return c.fault(vec::NM);
  if (x87_pending(c.s)) return c.fault(vec::MF);
  return Exec::Next;
}

/// EMMS   0F 77.
Exec emms(Context& c, const DecodedInsn& insn) {
  if (!mmx_available(c)) return Exec::Stop;
  VectorUnit* unit = unit_of(c);
  const Stub* stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) return c.ud();
  if (const u32 code = run_image(c, unit, *stub)) return stub_fault(c, code);
  return Exec::Next;
}

/// VZEROUPPER   VEX.128.0F 77;   VZEROALL   VEX.256.0F 77. Registers 8..15 only in 64-bit mode.
template <bool All>
Exec vzero(Context& c, const DecodedInsn&) {
  if (!avx_available(c)) return Exec::Stop;
  const unsigned bytes = c.code64 ? 256 : 128;
  std::memset(c.s.xsave.ymm_high(0), 0, bytes);
  std::memset(c.s.xsave.zmm_high(0), 0, 2 * bytes);
  if (All) std::memset(c.s.xsave.xmm(0), 0, bytes);
  return Exec::Next;
}

Handler select_x87(const DecodedInsn& insn) {
  unsigned i = 0;
  while (i < 14 && (insn.raw[i] & 0xf8) != 0xd8) ++i;
  const u8 opcode = insn.raw[i], modrm = insn.raw[i + 1 < 15 ? i + 1 : 14], reg = modrm >> 3 & 7;
  if (!insn.has(kHasMem)) return opcode == 0xdf && modrm == 0xe0 ? store_word<true> : run_x87;
  if (opcode == 0xd9) {
    if (reg == 4) return load_environment<false>;
    if (reg == 6) return store_environment<false>;
    if (reg == 7) return store_word<false>;
  }
  if (opcode == 0xdd) {
    if (reg == 4) return load_environment<true>;
    if (reg == 6) return store_environment<true>;
    if (reg == 7) return store_word<true>;
  }
  return run_x87;
}

}  // namespace

Handler select_vector(const DecodedInsn& insn) {
  switch (insn.op) {
    case Op::HostVec:
      if (insn.has(kEvex | kOpmask)) return select_evex(insn);
      return insn.has(kVex) ? run_vector<true> : run_vector<false>;
    case Op::HostMmx: return run_mmx;
    case Op::HostX87: return select_x87(insn);
    case Op::Emms: return emms;
    case Op::Fwait: return fwait;
    case Op::Vzeroupper: return vzero<false>;
    case Op::Vzeroall: return vzero<true>;
    case Op::Maskmov: case Op::Vmaskmov: case Op::Vgather: case Op::Vscatter: return select_vector_memory(insn);
    default: return nullptr;
  }
}

}  // namespace ring3::engine
