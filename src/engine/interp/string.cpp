#include <algorithm>

#include "engine/interp/alu.hpp"
#include "engine/interp/families.hpp"
#include "engine/interp/system.hpp"

/// MOVS CMPS SCAS LODS STOS INS OUTS with REP, REPE, REPNE.
///
/// Progress: each iteration is committed: a fault in the middle leaves rCX, rSI and rDI at the element that
///           faulted, with RIP at the instruction. A repeated instruction that is not over returns
///           Exec::Branch with RIP at itself when attention is raised (checked between iterations) and,
///           under slow_step, after every iteration.
/// Flags:    CMPS and SCAS set them when they end or are interrupted; a fault leaves those from before.
/// Bulk:     MOVS, and STOS with DF clear, go a page at a time where all sides are plain RAM.
namespace ring3::engine {
namespace {

/// The address registers in the instruction's address size.
class Regs {
 public:
  Regs(Context& c, const DecodedInsn& i) : s_(c.s), size_(i.addrsize), backwards_(c.s.rflags & rflags::DF) {}
  u64 get(Gpr r) const { return truncate(s_.gpr[r], size_); }
  void put(Gpr r, u64 v) { s_.gpr[r] = size_ == 2 ? (s_.gpr[r] & ~0xffffull) | (v & 0xffff) : truncate(v, size_); }
  void step(Gpr r, u64 bytes) { put(r, get(r) + (backwards_ ? 0 - bytes : bytes)); }
  bool backwards() const { return backwards_; }
  /// Bytes from r's offset up to where the address size wraps.
  u64 room(Gpr r) const { return size_ == 8 ? ~0ull : (size_ == 4 ? 0x1'0000'0000ull : 0x1'0000ull) - get(r); }

 private:
  VcpuState& s_;
  unsigned size_;
  bool backwards_;
};

constexpr Seg kEs = ES;

template <class T>
RING3_INLINE bool read_at(Context& c, Seg seg, u64 offset, T* out) {
  u64 lin;
  return c.linear(seg, offset, sizeof(T), false, &lin) && c.mmu.read(lin, out, seg);
}
template <class T>
RING3_INLINE bool write_at(Context& c, Seg seg, u64 offset, T v) {
  u64 lin;
  return c.linear(seg, offset, sizeof(T), true, &lin) && c.mmu.write(lin, v, seg);
}

/// Runs iterations. one() executes one element without the registers' steps: false is a stop. more(): go
/// on (the condition of REPE/REPNE). bulk(n): tries up to n elements at once, returns how many it did.
template <class One, class More, class Bulk>
RING3_INLINE Exec repeat(Context& c, const DecodedInsn& i, Regs& r, u64 bytes, bool si, bool di, One&& one, More&& more,
                         Bulk&& bulk) {
  const auto advance = [&](u64 n) {
    if (si) r.step(RSI, n * bytes);
    if (di) r.step(RDI, n * bytes);
  };
  if (!i.has(kRep | kRepne)) {
    if (!one()) return Exec::Stop;
    advance(1);
    return Exec::Next;
  }
  // A data breakpoint in a bulk copy would be seen late, so stepping goes element by element.
  u64 count = r.get(RCX);
  while (count != 0) {
    u64 done = c.slow_step ? 0 : bulk(count);
    if (done == 0) {
      if (!one()) return Exec::Stop;
      done = 1;
      if (c.env.replaying) c.env.retired();
    }
    advance(done);
    count -= done;
    r.put(RCX, count);
    if (!more()) break;
    if (count != 0 && c.env.string_ready == 0 && (c.slow_step || c.attention().raised())) {
      c.s.rip -= i.length;
      return Exec::Branch;
    }
  }
  return Exec::Next;
}
constexpr auto kAlways = [] { return true; };
constexpr auto kNoBulk = [](u64) { return u64{0}; };

/// Up to max elements from reg's offset on within one page: their count, and the lowest one's linear address.
template <class T>
RING3_INLINE u64 span(Context& c, const Regs& r, Gpr reg, Seg seg, bool write, u64 max, u64* lin) {
  const u64 offset = r.get(reg);
  // The segment is checked for the whole span; when that fails the elements find the fault themselves.
  u64 base;
  if (!c.linear(seg, offset, sizeof(T), write, &base)) return 0;
  if (r.backwards()) {
    const u64 in_page = base & ~kPageMask;
    if (in_page + sizeof(T) > kPageSize) return 0;
    const u64 n = std::min({max, in_page / sizeof(T) + 1, offset / sizeof(T) + 1});
    return c.linear(seg, offset - (n - 1) * sizeof(T), static_cast<unsigned>(n * sizeof(T)), write, lin) ? n : 0;
  }
  u64 n = std::min({max, (kPageSize - (base & ~kPageMask)) / sizeof(T), r.room(reg) / sizeof(T)});
  if (n == 0 || !c.linear(seg, offset, static_cast<unsigned>(n * sizeof(T)), write, lin)) return 0;
  return n;
}

template <class T>
Exec movs(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  const auto one = [&] {
    T v;
    return read_at<T>(c, seg, r.get(RSI), &v) && write_at<T>(c, kEs, r.get(RDI), v);
  };
  const auto bulk = [&](u64 count) -> u64 {
    if (count < 4) return 0;
    u64 from, to;
    const u64 most = span<T>(c, r, RSI, seg, false, count, &from);
    const u64 n = most != 0 ? span<T>(c, r, RDI, kEs, true, most, &to) : 0;
    if (n < 2) return 0;
    if (r.backwards()) from += (most - n) * sizeof(T);
    const unsigned bytes = static_cast<unsigned>(n * sizeof(T));
    const u8* source = c.mmu.bulk_pointer(from, false, bytes);
    if (source == nullptr) return 0;
    u8* target = c.mmu.bulk_pointer(to, true, bytes);
    if (target == nullptr) return 0;
    const u64 up = reinterpret_cast<u64>(target) - reinterpret_cast<u64>(source);
    const u64 distance = r.backwards() ? 0 - up : up;
    // SAFETY: both ranges were given by the Mmu for these bytes.
    if (distance == 0) return n;
    if (distance < bytes) {  // the copy feeds on itself: a pattern
      for (u64 done = 0; done < n; done++) {
        const u64 k = r.backwards() ? n - 1 - done : done;
        T v;
        std::memcpy(&v, source + k * sizeof(T), sizeof(T));
        std::memcpy(target + k * sizeof(T), &v, sizeof(T));
      }
    } else {
      std::memmove(target, source, bytes);
    }
    return n;
  };
  return repeat(c, i, r, sizeof(T), true, true, one, kAlways, bulk);
}

template <class T>
Exec stos(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const T v = static_cast<T>(c.s.gpr[RAX]);
  const auto one = [&] { return write_at<T>(c, kEs, r.get(RDI), v); };
  const auto bulk = [&](u64 count) -> u64 {
    if (r.backwards() || count < 4) return 0;
    u64 to;
    const u64 n = span<T>(c, r, RDI, kEs, true, count, &to);
    if (n < 2) return 0;
    u8* target = c.mmu.bulk_pointer(to, true, static_cast<unsigned>(n * sizeof(T)));
    if (target == nullptr) return 0;
    // SAFETY: n * sizeof(T) bytes were given by the Mmu.
    for (u64 k = 0; k < n; k++) std::memcpy(target + k * sizeof(T), &v, sizeof(T));
    return n;
  };
  return repeat(c, i, r, sizeof(T), false, true, one, kAlways, bulk);
}

template <class T>
Exec lods(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  const auto one = [&] {
    T v;
    if (!read_at<T>(c, seg, r.get(RSI), &v)) return false;
    put_gpr_as<T>(c.s, RAX, v);
    return true;
  };
  return repeat(c, i, r, sizeof(T), true, false, one, kAlways, kNoBulk);
}

/// CMPS: [rSI] - ES:[rDI]; SCAS: rAX - ES:[rDI]. ES:[rDI] is accessed first, as the oracle does. After a fault
/// the flags are those from before the instruction (SDM vol. 2, REP), or on AMD those of the last comparison.
template <class T, bool kScan>
Exec compare(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  const bool want_equal = !i.has(kRepne);
  u32 ax = 0;
  bool equal = false, compared = false;
  const auto one = [&] {
    T left = static_cast<T>(c.s.gpr[RAX]), right;
    if (!read_at<T>(c, kEs, r.get(RDI), &right)) return false;
    if (!kScan && !read_at<T>(c, seg, r.get(RSI), &left)) return false;
    equal = left == right;
    ax = alu<Alu::Cmp, T>(left, right, 0);
    compared = true;
    return true;
  };
  const Exec e = repeat(c, i, r, sizeof(T), !kScan, true, one, [&] { return equal == want_equal; }, kNoBulk);
  if (compared && (e != Exec::Stop || c.features.amd)) put_status(c.s, ax);
  return e;
}

Exec after(Context& c, Environment::Answer a) { return a == Environment::Answer::Exit ? c.exit() : c.gp0(); }

/// INS               the destination is checked before the port is read: the read has effects.
template <class T>
Exec ins(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const u16 port = static_cast<u16>(c.s.gpr[RDX]);
  if (!io_allowed(c, port, sizeof(T))) return Exec::Stop;  // also for a count of zero
  const auto one = [&] {
    u64 lin;
    if (!c.linear(kEs, r.get(RDI), sizeof(T), true, &lin) || !c.mmu.check_write(lin, sizeof(T), kEs)) return false;
    u32 v = 0;
    if (i.has(kRep | kRepne) && !c.slow_step) {
      // As KVM: to the page's end, 1024 bytes at most; with DF set it counts from the offset down, too.
      const u64 in_page = r.backwards() ? lin & ~kPageMask : kPageSize - (lin & ~kPageMask);
      const u64 n = std::min<u64>({in_page / sizeof(T), 1024 / sizeof(T), r.get(RCX)});
      c.env.string_elements = static_cast<unsigned>(std::max<u64>(n, 1));
    }
    const auto answer = c.env.port_in(port, sizeof(T), &v);
    c.env.string_elements = 1;
    if (answer != Environment::Answer::Done) return after(c, answer) != Exec::Stop;
    return c.mmu.write(lin, static_cast<T>(v), kEs);
  };
  const Exec e = repeat(c, i, r, sizeof(T), false, true, one, kAlways, kNoBulk);
  c.env.string_ready = 0;  // the VMM may have made rCX smaller meanwhile
  return e;
}
template <class T>
Exec outs(Context& c, const DecodedInsn& i) {
  Regs r(c, i);
  const Seg seg = static_cast<Seg>(i.mem.seg);
  const u16 port = static_cast<u16>(c.s.gpr[RDX]);
  if (!io_allowed(c, port, sizeof(T))) return Exec::Stop;
  const auto one = [&] {
    T v;
    if (!read_at<T>(c, seg, r.get(RSI), &v)) return false;
    const auto answer = c.env.port_out(port, sizeof(T), v);
    return answer == Environment::Answer::Done || after(c, answer) != Exec::Stop;
  };
  return repeat(c, i, r, sizeof(T), true, false, one, kAlways, kNoBulk);
}

}  // namespace

Handler select_string(const DecodedInsn& i) {
  switch (i.op) {
    case Op::Movs: return by_size(i.opsize, [&]<class T>() -> Handler { return movs<T>; });
    case Op::Stos: return by_size(i.opsize, [&]<class T>() -> Handler { return stos<T>; });
    case Op::Lods: return by_size(i.opsize, [&]<class T>() -> Handler { return lods<T>; });
    case Op::Cmps: return by_size(i.opsize, [&]<class T>() -> Handler { return compare<T, false>; });
    case Op::Scas: return by_size(i.opsize, [&]<class T>() -> Handler { return compare<T, true>; });
    case Op::Ins:
    case Op::Outs: {
      const bool in = i.op == Op::Ins;
      if (i.opsize == 1) return in ? ins<u8> : outs<u8>;
      if (i.opsize == 2) return in ? ins<u16> : outs<u16>;
      return in ? ins<u32> : outs<u32>;
    }
    default: return nullptr;
  }
}

}  // namespace ring3::engine
