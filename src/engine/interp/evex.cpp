#include <cstring>

#include "engine/interp/operand.hpp"
#include "engine/interp/vector.hpp"

/// AVX-512: EVEX instructions and opmask instructions run on the host by their stubs (evex_stub.cpp); what a write mask spares of
/// a memory operand is not touched here. Gathers and scatters go element by element.
///
/// Spec: Intel SDM vol. 2, 2.7 and 2.8 (exception classes E1 to E12, K20, K21), 2.7.5 (masked memory).
namespace ring3::engine {
namespace {

Seg segment_of(const DecodedInsn& insn) { return static_cast<Seg>(insn.mem.seg); }
u64 address_mask(const DecodedInsn& insn) {
  return insn.addrsize == 2 ? 0xffff : insn.addrsize == 4 ? 0xffffffff : ~0ull;
}

/// Runs of bytes of a memory operand: those that a mask lets be accessed.
struct Runs {
  struct Run {
    u8 start, size;
    u64 linear;
  };
  Run run[32];
  unsigned count = 0;

  void add(unsigned at, unsigned size) {
    if (count != 0 && run[count - 1].start + run[count - 1].size == at) {
      run[count - 1].size = static_cast<u8>(run[count - 1].size + size);
    } else {
      run[count++] = {static_cast<u8>(at), static_cast<u8>(size), 0};
    }
  }
};

Runs accessed(const Context& c, const DecodedInsn& insn, unsigned size) {
  Runs runs;
  const unsigned bits = insn.mask_bits, element = insn.mem_element != 0 ? insn.mem_element : size;
  const u64 active = c.s.xsave.opmask(insn.mask & 7) & (bits >= 64 ? ~0ull : (1ull << bits) - 1);
  const unsigned count = size / element;
  u64 wanted = active;
  if (insn.masked == MaskedMemory::Packed) {
    const unsigned n = static_cast<unsigned>(__builtin_popcountll(active));
    wanted = n >= 64 ? ~0ull : (1ull << n) - 1;
  } else if (insn.masked == MaskedMemory::Modulo) {
    wanted = 0;
    for (unsigned i = 0; i < bits; ++i) wanted |= (active >> i & 1) << i % count;
  }
  for (unsigned i = 0; i < count; ++i)
    if (wanted >> i & 1) runs.add(i * element, element);
  return runs;
}

/// Addresses, and what an instruction that wants its operand aligned says to them.
bool locate(Context& c, const DecodedInsn& insn, const Stub& stub, Runs* runs) {
  const u64 base = c.effective_address(insn);
  const bool write = stub.flags & kStubMemWrite;
  for (unsigned i = 0; i < runs->count; ++i) {
    Runs::Run& r = runs->run[i];
    // One operand: it does not wrap with the address size in its middle.
    if (!c.linear(segment_of(insn), base + r.start, r.size, write, &r.linear)) return false;
  }
  if ((stub.flags & kStubAligned) && runs->count != 0) {
    // Of the whole operand, unless the mask spares all of it.
    u64 linear;
    if (!c.linear(segment_of(insn), base, stub.mem_size, write, &linear)) return false;
    if (linear & (stub.mem_size - 1u)) {
      c.gp0();
      return false;
    }
  }
  return true;
}

Exec run(Context& c, const DecodedInsn& insn) {
  if (!avx512_available(c)) return Exec::Stop;
  VectorUnit* const unit = unit_of(c);
  const Stub* const stub = unit == nullptr ? nullptr : unit->find(insn, c.code_mode);
  if (stub == nullptr) return c.ud();
  StubFrame& frame = unit->frame;
  const Seg seg = segment_of(insn);
  Runs runs, checked;
  if (insn.has(kHasMem)) {
    if (insn.masked != MaskedMemory::Whole) runs = accessed(c, insn, stub->mem_size);
    if (insn.masked == MaskedMemory::Whole) runs.add(0, stub->mem_size);
    if (insn.masked == MaskedMemory::Checked) checked.add(0, stub->mem_size);
  }
  // #AC is for 8 bytes or less on Intel's processors; what a mask leaves of more is no different.
  const bool spared = alignment_spared(c) && ((stub->flags & kStubUnaligned) || (stub->mem_size >= 16 && insn.masked != MaskedMemory::Whole));
  const auto check_write = [&](const Runs& r) {
    for (unsigned i = 0; i < r.count; ++i)
      if (!(spared ? check_write_unaligned(c, r.run[i].linear, r.run[i].size, seg) : c.mmu.check_write(r.run[i].linear, r.run[i].size, seg)))
        return false;
    return true;
  };
  // As VEX's VCVTPS2PH (vector.cpp): memory faults of a store that converts come before its SIMD exception or behind it.
  const bool late = (stub->flags & kStubMemWrite) && !c.features.amd;
  if (insn.has(kHasMem) && !late && !(locate(c, insn, *stub, &checked) && locate(c, insn, *stub, &runs))) return Exec::Stop;
  if (stub->flags & kStubMemRead) {
    if (insn.masked != MaskedMemory::Whole) std::memset(frame.buffer, 0, 64);
    for (unsigned i = 0; i < runs.count; ++i) {
      const Runs::Run& r = runs.run[i];
      u8* const to = frame.buffer + r.start;
      if (!(spared ? read_unaligned(c, r.linear, to, r.size, seg) : c.mmu.read_bytes(r.linear, to, r.size, seg))) return Exec::Stop;
    }
  }
  u32 mxcsr = 0;
  if (stub->flags & kStubMxcsr) {
    prepare_mxcsr(c.s);
    mxcsr = c.s.xsave.mxcsr();
  }
  if ((stub->flags & kStubMemWrite) && !late && !(check_write(checked) && check_write(runs))) return Exec::Stop;
  if (const u32 code = stub->run(&c.s.xsave, &frame, c.s.gpr)) return stub_fault(c, code);
  if (stub->flags & kStubMemWrite) {
    bool ok = !late || (locate(c, insn, *stub, &checked) && locate(c, insn, *stub, &runs));
    ok = ok && check_write(checked) && check_write(runs);
    for (unsigned i = 0; i < runs.count && ok; ++i) {
      const Runs::Run& r = runs.run[i];
      const u8* const from = frame.buffer + r.start;
      ok = spared ? write_unaligned(c, r.linear, from, r.size, seg) : c.mmu.write_bytes(r.linear, from, r.size, seg);
    }
    if (!ok) {
      if (c.features.amd || c.stop().kind != Stop::Kind::Fault) c.s.xsave.mxcsr() = mxcsr;
      return Exec::Stop;
    }
  }
  if (stub->flags & kStubWritesFlags) put_flags(c, frame);
  return Exec::Next;
}

/// A vector register's 64 bytes.
struct Vector {
  u8 bytes[64];
  void load(VcpuState& s, unsigned n) {
    if (n >= 16) {
      std::memcpy(bytes, s.xsave.hi16(n), 64);
      return;
    }
    std::memcpy(bytes, s.xsave.xmm(n), 16);
    std::memcpy(bytes + 16, s.xsave.ymm_high(n), 16);
    std::memcpy(bytes + 32, s.xsave.zmm_high(n), 32);
  }
  void store(VcpuState& s, unsigned n) const {
    if (n >= 16) {
      std::memcpy(s.xsave.hi16(n), bytes, 64);
      return;
    }
    std::memcpy(s.xsave.xmm(n), bytes, 16);
    std::memcpy(s.xsave.ymm_high(n), bytes + 16, 16);
    std::memcpy(s.xsave.zmm_high(n), bytes + 32, 32);
  }
};

/// VGATHERDPS/DPD/QPS/QPD   EVEX.66.0F38 92 93;   VPGATHERDD/DQ/QD/QQ   90 91;   VSCATTER, VPSCATTER   A0 to A3
/// Operands: vector, memory with vector index, write mask, which must not be k0. #UD when a gather's destination is its index.
/// Faults:   at a fault the elements before it are complete and their mask bits clear, so that the restarted instruction goes on
///           from there.
template <bool Scatter>
Exec by_element(Context& c, const DecodedInsn& insn) {
  if (!avx512_available(c)) return Exec::Stop;
  EvexParts p;
  if (!parse_evex(insn, c.code_mode, &p) || insn.mask == 0) return c.ud();
  const unsigned value = insn.operands[Scatter ? 1 : 0].reg & 31, index = insn.mem.index & 31;
  if (!Scatter && value == index) return c.ud();
  const unsigned element = p.w ? 8 : 4, index_size = insn.opcode & 1 ? 8 : 4;
  const unsigned total = 16u << (p.p2 >> 5 & 3);
  const unsigned count = total / (element > index_size ? element : index_size);
  Vector data, indices;
  data.load(c.s, value);
  indices.load(c.s, index);
  u64 mask = c.s.xsave.opmask(insn.mask & 7);
  const Seg seg = segment_of(insn);
  u64 base = static_cast<u64>(insn.disp);
  if (insn.mem.base < 16) base += c.s.gpr[insn.mem.base];
  bool done = false;
  for (unsigned i = 0; i < count; ++i) {
    if (!(mask >> i & 1)) continue;
    const u64 offset = vsib_index(indices.bytes, i, index_size);
    u64 linear;
    u8* const at = data.bytes + element * i;
    if (!c.linear(seg, (base + (offset << insn.mem.scale_log2)) & address_mask(insn), element, Scatter, &linear) ||
        !(Scatter ? c.mmu.write_bytes(linear, at, element, seg) : c.mmu.read_bytes(linear, at, element, seg))) {
      if (c.stop().kind == Stop::Kind::Fault) {  // an exit to the VMM is replayed from the first element instead
        c.s.xsave.opmask(insn.mask & 7) = mask;
        if (!Scatter && done) {
          // Cleared is what is above the vector length; between that and the elements, at the end only (Sapphire Rapids).
          std::memset(data.bytes + total, 0, sizeof data.bytes - total);
          data.store(c.s, value);
        }
      }
      return Exec::Stop;
    }
    mask &= ~(1ull << i);
    done = true;
  }
  c.s.xsave.opmask(insn.mask & 7) = 0;
  if (!Scatter) {
    std::memset(data.bytes + count * element, 0, sizeof data.bytes - count * element);
    data.store(c.s, value);
  }
  return Exec::Next;
}

}  // namespace

Handler select_evex(const DecodedInsn&) { return run; }

Handler select_evex_memory(const DecodedInsn& insn) { return insn.op == Op::Vscatter ? by_element<true> : by_element<false>; }

}  // namespace ring3::engine
