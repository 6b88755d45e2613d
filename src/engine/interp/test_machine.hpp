#pragma once
#include <sys/mman.h>

#include <cstring>
#include <deque>
#include <initializer_list>
#include <map>
#include <memory>
#include <string_view>
#include <vector>

#include "base/check.hpp"
#include "engine/decode/decoder.hpp"
#include "engine/interp/families.hpp"
#include "engine/interp/interpreter.hpp"
#include "memory/guest_memory.hpp"
#ifdef RING3_TEST_TRANSLATED  // tests/translated builds the same tests with it
#include "engine/translate/translator_vcpu.hpp"
#endif

/// The machine that the interpreter's unit tests run on: 16 MiB of RAM, one vCPU, an environment
/// that records what it is asked, and descriptor and page tables for every mode.
///
/// Guest-physical layout (paging, where it is on, maps the 16 MiB one to one, user and writable):
///   0x00000 IVT   0x01000 GDT   0x02000 IDT   0x03000 TSS   0x04000 page directory root
///   0x10000.. page tables       0x30000 + 16*v: HLT, the handler of vector v
///   0x40000 code  0x50000 data  0x60000..0x6ffff stack (rSP starts at 0x6ff00)
/// In the 16-bit modes CS, DS/ES/FS/GS and SS have bases 0x40000, 0x50000, 0x60000; else all are flat.
///
/// Usage:
///   TestMachine m(TestMode::Long64);
///   m.s.gpr[RAX] = 1;
///   auto out = m.run(hex("48 83 c0 02"));      // HLT is appended; runs to it, or to the first event
///   EXPECT_TRUE(out.halted()); EXPECT_EQ(m.s.gpr[RAX], 3u);
/// Events (faults, traps, software interrupts) end the run and stand in the outcome, undelivered,
/// unless deliver_events is set: then they go to deliver_event() and end at the handler's HLT.
namespace ring3::engine::test {

using Bytes = std::vector<u8>;

/// "48 89 c3" to bytes. Anything that is not a hex digit separates.
inline Bytes hex(std::string_view text) {
  Bytes out;
  int high = -1;
  for (char c : text) {
    int v = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
    if (v < 0) continue;
    if (high < 0) {
      high = v;
    } else {
      out.push_back(static_cast<u8>(high << 4 | v));
      high = -1;
    }
  }
  return out;
}

enum class TestMode : u8 { Real16, V8086, Prot16, Prot32, Compat32, Long64 };
inline constexpr TestMode kAllModes[] = {TestMode::Real16, TestMode::V8086,    TestMode::Prot16,
                                         TestMode::Prot32, TestMode::Compat32, TestMode::Long64};

/// Selectors of the GDT (DPL 0; the *3 ones DPL 3, RPL 3 included).
namespace sel {
inline constexpr u16 Code32 = 0x08, Code64 = 0x10, Data = 0x18, Code32User = 0x23, DataUser = 0x2b, Code64User = 0x33,
                     Code16 = 0x38, Data16 = 0x40, Stack16 = 0x48, Tss = 0x50 /* 16 bytes */, Code16User = 0x63,
                     Data16User = 0x6b, Stack16User = 0x73, Ldt = 0x80 /* 16 bytes */, Free = 0x90 /* .. 0xff8: zero */;
}

class TestEnvironment final : public Environment {
 public:
  struct Port { u16 port; unsigned size; u32 value; bool out; };
  struct Mmio { u64 gpa; unsigned size; u64 value; bool write; };

  std::vector<Port> ports;         ///< every access that was answered Done
  std::vector<Mmio> mmio;
  std::deque<u32> port_values;     ///< answers of port_in, then port_default
  u32 port_default = 0xffffffff;
  u64 mmio_value = 0x1122334455667788;
  unsigned exits_to_give = 0;      ///< the next n accesses are answered Exit
  std::map<u32, u64> msrs;         ///< others fault
  std::map<u32, std::array<u32, 4>> leaves;  ///< CPUID by leaf
  u64 tsc = 1000;
  u64 cr8 = 0;
  unsigned nmi_unblocks = 0;
  unsigned retirements = 0;
  std::vector<std::array<u64, 5>> hypercalls;
  u64 hypercall_result = 0;

  Answer port_in(u16 port, unsigned size, u32* value) override {
    if (take_exit()) return Answer::Exit;
    *value = port_default;
    if (!port_values.empty()) {
      *value = port_values.front();
      port_values.pop_front();
    }
    ports.push_back({port, size, *value, false});
    return Answer::Done;
  }
  Answer port_out(u16 port, unsigned size, u32 value) override {
    if (take_exit()) return Answer::Exit;
    ports.push_back({port, size, value, true});
    return Answer::Done;
  }
  Answer rdmsr(u32 index, u64* value) override {
    if (take_exit()) return Answer::Exit;
    auto it = msrs.find(index);
    if (it == msrs.end()) return Answer::Fault;
    *value = it->second;
    return Answer::Done;
  }
  Answer wrmsr(u32 index, u64 value) override {
    if (take_exit()) return Answer::Exit;
    auto it = msrs.find(index);
    if (it == msrs.end()) return Answer::Fault;
    it->second = value;
    return Answer::Done;
  }
  void cpuid(u32 leaf, u32, u32 out[4]) override {
    auto it = leaves.find(leaf);
    for (int i = 0; i < 4; i++) out[i] = it == leaves.end() ? 0 : it->second[static_cast<unsigned>(i)];
  }
  u64 rdtsc() override { return tsc += 10; }
  u64 get_cr8() override { return cr8; }
  void set_cr8(u64 value) override { cr8 = value; }
  Answer hypercall(u64 nr, const u64 args[4], u64* result) override {
    hypercalls.push_back({nr, args[0], args[1], args[2], args[3]});
    *result = hypercall_result;
    return Answer::Done;
  }
  void nmi_unblocked() override { nmi_unblocks++; }
  void retired() override {
    retirements++;
    replaying = false;
  }
  bool mmio_read(Gpa gpa, void* data, unsigned size) override {
    if (take_exit()) return false;
    u64 value = mmio_value;
    for (unsigned i = 0; i < size; i++) static_cast<u8*>(data)[i] = static_cast<u8>(value >> (8 * (i % 8)));
    mmio.push_back({gpa.value, size, value, false});
    return true;
  }
  bool mmio_write(Gpa gpa, const void* data, unsigned size) override {
    if (take_exit()) return false;
    u64 value = 0;
    std::memcpy(&value, data, size < 8 ? size : 8);
    mmio.push_back({gpa.value, size, value, true});
    return true;
  }

 private:
  bool take_exit() {
    if (exits_to_give == 0) return false;
    exits_to_give--;
    replaying = true;
    return true;
  }
};

/// How run() ended.
struct Outcome {
  Interpreter::Result result = Interpreter::Result::Budget;
  bool has_event = false;  ///< an event was raised and not delivered
  Event event;             ///< valid when has_event; s.rip is the return address
  bool halted() const { return !has_event && result == Interpreter::Result::Halted; }
  /// The run ended by this exception.
  bool raised(u8 vector) const { return has_event && event.vector == vector && !event.has_error; }
  bool raised(u8 vector, u32 error) const {
    return has_event && event.vector == vector && event.has_error && event.error == error;
  }
};

class TestMachine {
 public:
  static constexpr u64 kRamSize = 16u << 20;
  static constexpr u64 kGdt = 0x1000, kIdt = 0x2000, kTss = 0x3000, kRoot = 0x4000, kTables = 0x10000,
                       kTablesEnd = 0x30000, kHandlers = 0x30000, kCode = 0x40000, kData = 0x50000,
                       kStackBase = 0x60000, kStackTop = 0x6ff00, kIst1 = 0x71000, kStack0 = 0x72000;
  /// Page-table bits for map().
  static constexpr u64 kPresent = 1, kWritable = 2, kUser = 4, kNx = 1ull << 63;

  explicit TestMachine(TestMode mode, bool user = false)
      : mode_(mode), user_(user), ram_(map_ram()), tracker_(guest_memory_), mmu_(prepare(), guest_memory_, tracker_, 0) {
    guest_memory_.set_region(0, 0, Gpa(0), kRamSize, Hva(reinterpret_cast<u64>(ram_)));
    mmu_.set_port(&env);
    interp_ = Interpreter::create(s, mmu_, env, 1u << 20);
#ifdef RING3_TEST_TRANSLATED
    TranslatorVcpu::Options options;
    options.arena_bytes = 1u << 20;
    auto made = TranslatorVcpu::create(s, mmu_, *interp_, create_block_translator(), options);
    CHECK(made.ok());
    translator_ = std::move(*made);
    runner = [this](u64 budget) { return translator_->run(budget); };
#endif
    tracker_.register_vcpu(0, &mmu_, &c().attention(), 1);
    tracker_.enter_guest(0);
    write_tables();
    set_features();
    c().event_filter = [this](const Event& event) {
      if (deliver_events) return false;
      outcome_.has_event = true;
      outcome_.event = event;
      return true;
    };
    c().mode_changed();
  }
  ~TestMachine() {
    tracker_.leave_guest(0);
    tracker_.unregister_vcpu(0);
#ifdef RING3_TEST_TRANSLATED
    translator_.reset();
#endif
    interp_.reset();
    munmap(ram_, kRamSize);
  }
  TestMachine(const TestMachine&) = delete;
  TestMachine& operator=(const TestMachine&) = delete;

  VcpuState s;
  TestEnvironment env;
  bool deliver_events = false;

  Context& c() { return interp_->context(); }
  Mmu& mmu() { return mmu_; }
  Interpreter& interpreter() { return *interp_; }
  memory::GuestMemory& guest_memory() { return guest_memory_; }
  TestMode mode() const { return mode_; }
  bool is16() const { return mode_ == TestMode::Real16 || mode_ == TestMode::V8086 || mode_ == TestMode::Prot16; }
  CodeMode code_mode() const {
    return is16() ? CodeMode::Bits16 : mode_ == TestMode::Long64 ? CodeMode::Bits64 : CodeMode::Bits32;
  }
  u64 code_base() const { return is16() ? kCode : 0; }
  /// Offset in DS of the data page, in CS of the code page, in SS of the initial stack pointer.
  u64 data_offset() const { return is16() ? 0 : kData; }
  u64 code_offset() const { return is16() ? 0 : kCode; }
  u64 stack_offset() const { return is16() ? kStackTop - kStackBase : kStackTop; }

  /// RAM by guest-physical address.
  u8* ram(u64 gpa) { return ram_ + gpa; }
  template <class T>
  T load(u64 gpa) {
    T v;
    std::memcpy(&v, ram_ + gpa, sizeof(T));
    return v;
  }
  template <class T>
  void store(u64 gpa, T v) { std::memcpy(ram_ + gpa, &v, sizeof(T)); }

  /// Puts code at the start of the code page (or at gpa) and drops what was decoded from there.
  void load_code(const Bytes& code, u64 gpa = kCode) {
    std::memcpy(ram_ + gpa, code.data(), code.size());
    interp_->code_flush();
  }
  /// Loads code with a HLT behind it, sets rIP to it and runs until it ends.
  /// At CPL 3 the HLT itself raises #GP(0): see ended_at_hlt().
  Outcome run(Bytes code, u64 budget = 100000) {
    hlt_offset_ = code_offset() + code.size();
    code.push_back(0xf4);
    load_code(code);
    s.rip = code_offset();
    return resume(budget);
  }
  /// Runs on from s.rip. Recomputes the mode first, so tests may change s at will.
  Outcome resume(u64 budget = 100000) {
    outcome_ = Outcome{};
    c().mode_changed();
    outcome_.result = runner ? runner(budget) : interp_->run(budget);
    return outcome_;
  }
  /// The appended HLT was reached: retired at CPL 0, #GP(0) at CPL 3.
  bool ended_at_hlt(const Outcome& out) const {
    return out.halted() || (out.raised(vec::GP, 0) && s.rip == hlt_offset_);
  }
  /// Runs guest code in place of the interpreter's own run loop, when set.
  std::function<Interpreter::Result(u64 budget)> runner;

  /// One-instruction blocks instead of basic blocks.
  void one_at_a_time(bool on) { interp_->set_max_block_insns(on ? 1 : 0); }

  /// Executes the one instruction in code through its handler alone: no block cache, no delivery. On
  /// Exec::Stop with a fault or exit, rIP is back at the instruction and c().stop() tells.
  Exec step(const Bytes& code) {
    load_code(code);
    s.rip = code_offset();
    c().mode_changed();
    insn = DecodedInsn{};
    if (decode(code.data(), static_cast<unsigned>(code.size()), c().code_mode, !c().protected_mode, c().features.amd, &insn) !=
        DecodeResult::Ok) {
      c().stop() = Stop::fault(vec::UD);
      return Exec::Stop;
    }
    const u64 start = s.rip;
    c().stop() = Stop{};
    s.rip += insn.length;
    const Exec e = select_handler(c().features, insn)(c(), insn);
    if (e == Exec::Stop && c().stop().kind != Stop::Kind::Trap) s.rip = start;
    return e;
  }
  DecodedInsn insn;  ///< what step() decoded

  /// Maps one 4 KiB page; flags are kPresent | … (0 unmaps). Modes with paging only. Flushes the TLB.
  void map(u64 linear, u64 gpa, u64 flags) {
    const bool legacy = mode_ != TestMode::Long64 && mode_ != TestMode::Compat32;
    if (legacy) {
      u32* pde = reinterpret_cast<u32*>(ram_ + kRoot) + (linear >> 22 & 0x3ff);
      if (!(*pde & 1)) *pde = static_cast<u32>(new_table() | 7);
      u32* pte = reinterpret_cast<u32*>(ram_ + (*pde & 0xfffff000u)) + (linear >> 12 & 0x3ff);
      *pte = static_cast<u32>(flags & kPresent ? gpa | (flags & 0xfff) : 0);
    } else {
      u64 table = kRoot;
      for (unsigned shift = 39; shift > 12; shift -= 9) {
        u64* e = reinterpret_cast<u64*>(ram_ + table) + (linear >> shift & 0x1ff);
        if (!(*e & 1)) *e = new_table() | 7;
        table = *e & 0xffffffffff000ull;
      }
      reinterpret_cast<u64*>(ram_ + table)[linear >> 12 & 0x1ff] = flags & kPresent ? gpa | flags : 0;
    }
    mmu_.flush_all();
  }
  void unmap(u64 linear) { map(linear, 0, 0); }

  /// Writes one 8-byte GDT descriptor. access: the byte with P, DPL, S, type; flags: G, D, L, AVL.
  void set_gdt(u16 selector, u32 base, u32 limit, u8 access, u8 flags) {
    store<u64>(kGdt + (selector & ~7u), descriptor(base, limit, access, flags));
  }
  static u64 descriptor(u32 base, u32 limit, u8 access, u8 flags) {
    return (limit & 0xffffu) | (static_cast<u64>(base & 0xffffff) << 16) | (static_cast<u64>(access) << 40) |
           (static_cast<u64>(limit >> 16 & 0xf) << 48) | (static_cast<u64>(flags & 0xf) << 52) |
           (static_cast<u64>(base >> 24) << 56);
  }
  static Segment segment(u16 selector, u64 base, u32 limit, u8 type, u8 dpl, bool db, bool l, bool g) {
    Segment seg;
    seg.selector = selector;
    seg.base = base;
    seg.limit = limit;
    seg.type = type;
    seg.s = 1;
    seg.dpl = dpl;
    seg.present = 1;
    seg.db = db;
    seg.l = l;
    seg.g = g;
    return seg;
  }

 private:
  static u8* map_ram() {
    void* p = mmap(nullptr, kRamSize, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return static_cast<u8*>(p == MAP_FAILED ? nullptr : p);
  }

  /// The registers; before the Mmu sees them.
  VcpuState& prepare() {
    s.reset();
    s.gpr[RDX] = 0;
    s.cr0 = cr0::ET | cr0::NE;
    s.gpr[RSP] = stack_offset();
    s.rip = code_offset();
    const u8 dpl = user_ || mode_ == TestMode::V8086 ? 3 : 0;
    const auto data16 = [&](u16 selector, u64 base) { return segment(selector, base, 0xffff, 3, dpl, false, false, false); };
    switch (mode_) {
      case TestMode::Real16:
      case TestMode::V8086:
        s.seg[CS] = segment(0x4000, kCode, 0xffff, mode_ == TestMode::Real16 ? 11 : 3, dpl, false, false, false);
        s.seg[SS] = data16(0x6000, kStackBase);
        for (Seg r : {DS, ES, FS, GS}) s.seg[r] = data16(0x5000, kData);
        break;
      case TestMode::Prot16:
        s.seg[CS] = segment(user_ ? sel::Code16User : sel::Code16, kCode, 0xffff, 11, dpl, false, false, false);
        s.seg[SS] = data16(user_ ? sel::Stack16User : sel::Stack16, kStackBase);
        for (Seg r : {DS, ES, FS, GS}) s.seg[r] = data16(user_ ? sel::Data16User : sel::Data16, kData);
        break;
      default: {
        const bool code64 = mode_ == TestMode::Long64;
        const u16 cs = code64 ? (user_ ? sel::Code64User : sel::Code64) : (user_ ? sel::Code32User : sel::Code32);
        s.seg[CS] = segment(cs, 0, 0xffffffff, 11, dpl, !code64, code64, true);
        for (Seg r : {DS, ES, FS, GS, SS})
          s.seg[r] = segment(user_ ? sel::DataUser : sel::Data, 0, 0xffffffff, 3, dpl, true, false, true);
        break;
      }
    }
    s.idtr = {0, 0x3ff};
    if (mode_ != TestMode::Real16) {
      s.cr0 |= cr0::PE | cr0::PG | cr0::WP;
      s.cr3 = kRoot;
      s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
      s.gdtr = {kGdt, 0xfff};
      s.idtr = {kIdt, 0xfff};
      s.tr = segment(sel::Tss, kTss, 0x1fff, 11, 0, false, false, false);
      s.tr.s = 0;
      s.ldtr = segment(sel::Ldt, 0, 0, 2, 0, false, false, false);
      s.ldtr.s = 0;
      if (mode_ == TestMode::Long64 || mode_ == TestMode::Compat32) {
        s.cr4 |= cr4::PAE;
        s.efer = efer::LME | efer::LMA | efer::NX | efer::SCE;
      }
      if (mode_ == TestMode::V8086) s.rflags |= rflags::VM | rflags::IOPL;
    } else {
      s.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    }
    s.xcr0 = 7;
    s.xsave.mxcsr() = 0x1f80;
    return s;
  }

  void write_tables() {
    std::memset(ram_ + kHandlers, 0xf4, 0x1000);
    if (mode_ == TestMode::Real16) {
      for (u32 v = 0; v < 256; v++) store<u32>(v * 4, (kHandlers >> 4) << 16 | v * 16);
      return;
    }
    const bool lm = mode_ == TestMode::Long64 || mode_ == TestMode::Compat32;
    set_gdt(sel::Code32, 0, 0xfffff, 0x9b, 0xc);
    set_gdt(sel::Code64, 0, 0xfffff, 0x9b, 0xa);
    set_gdt(sel::Data, 0, 0xfffff, 0x93, 0xc);
    set_gdt(sel::Code32User, 0, 0xfffff, 0xfb, 0xc);
    set_gdt(sel::DataUser, 0, 0xfffff, 0xf3, 0xc);
    set_gdt(sel::Code64User, 0, 0xfffff, 0xfb, 0xa);
    set_gdt(sel::Code16, kCode, 0xffff, 0x9b, 0);
    set_gdt(sel::Data16, kData, 0xffff, 0x93, 0);
    set_gdt(sel::Stack16, kStackBase, 0xffff, 0x93, 0);
    set_gdt(sel::Code16User, kCode, 0xffff, 0xfb, 0);
    set_gdt(sel::Data16User, kData, 0xffff, 0xf3, 0);
    set_gdt(sel::Stack16User, kStackBase, 0xffff, 0xf3, 0);
    set_gdt(sel::Tss, kTss, 0x1fff, 0x8b, 0);
    store<u64>(kGdt + sel::Tss + 8, 0);
    for (u32 v = 0; v < 256; v++) {
      // DPL 3 for INT3, INTO and vectors from 0x80, 0 for the others; interrupt gates.
      const u64 access = v == 3 || v == 4 || v >= 0x80 ? 0xee : 0x8e;
      const u64 offset = kHandlers + v * 16;
      const u64 low = (offset & 0xffff) | static_cast<u64>(lm ? sel::Code64 : sel::Code32) << 16 | access << 40 |
                      (offset >> 16 & 0xffff) << 48;
      if (lm) {
        store<u64>(kIdt + v * 16, low);
        store<u64>(kIdt + v * 16 + 8, 0);
      } else {
        store<u64>(kIdt + v * 8, low);
      }
    }
    // TSS: ring-0 stack, IST1; I/O bitmap at 0x68: every port allowed but for odd thousands, set by tests.
    if (lm) {
      store<u64>(kTss + 4, kStack0);
      store<u64>(kTss + 0x24, kIst1);
    } else {
      store<u32>(kTss + 4, kStack0);
      store<u32>(kTss + 8, sel::Data);
    }
    store<u16>(kTss + 0x66, 0x68);
    for (u64 a = 0; a < kRamSize; a += kPageSize) map(a, a, kPresent | kWritable | kUser);
  }

  u64 new_table() {
    const u64 t = next_table_;
    next_table_ += kPageSize;
    CHECK(next_table_ <= kTablesEnd);
    return t;
  }

  void set_features() {
    GuestFeatures& f = c().features;
    f.has.set();
    for (Feature off : {Feature::Unsupported, Feature::Pku, Feature::Gfni, Feature::Serialize})
      f.has.reset(static_cast<unsigned>(off));
    for (unsigned off = static_cast<unsigned>(Feature::Avx512f); off <= static_cast<unsigned>(Feature::Avx512bf16); off++) f.has.reset(off);
    f.cr4_reserved = ~(cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR |
                       cr4::OSXMMEXCPT | cr4::UMIP | cr4::FSGSBASE | cr4::PCIDE | cr4::OSXSAVE | cr4::SMEP | cr4::SMAP);
    f.efer_reserved = ~(efer::SCE | efer::LME | efer::LMA | efer::NX);
    f.xcr0_supported = 7;
    f.pcid = true;
  }

  TestMode mode_;
  bool user_;
  u8* ram_;
  u64 next_table_ = kTables;
  u64 hlt_offset_ = 0;
  memory::GuestMemory guest_memory_;
  PhysicalTracker tracker_;
  Mmu mmu_;
  std::unique_ptr<Interpreter> interp_;
#ifdef RING3_TEST_TRANSLATED
  std::unique_ptr<TranslatorVcpu> translator_;
#endif
  Outcome outcome_;
};

/// Runs f(machine) in fresh machines, with basic blocks and with one-instruction blocks: block
/// boundaries hide bugs. TF stepping is a third way, for tests of the run loop.
template <class F>
void both_ways(TestMode mode, bool user, F&& f) {
  for (const bool single : {false, true}) {
    TestMachine m(mode, user);
    m.one_at_a_time(single);
    f(m);
  }
}
template <class F>
void both_ways(TestMode mode, F&& f) { both_ways(mode, false, f); }

}  // namespace ring3::engine::test
