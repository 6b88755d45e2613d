#pragma once
#include <memory>
#include <span>
#include <string>

#include "engine/interp/interpreter.hpp"
#include "engine/translate/translator_vcpu.hpp"
#include "native.hpp"

/// One side of a comparison of whole programs: a vCPU with RAM, a device and page tables of its own, run by the
/// interpreter or by the translator.
namespace ring3::diff {

/// Window64: user code that reaches its memory through a host window.
enum class BlockMode : u8 { User64, Kernel64, Window64, User32, kCount };
const char* name(BlockMode mode);

// The guest's address space, below 2 GiB but for one mapping. Code is writable.
inline constexpr u64 kBlockCodePages = 4, kBlockDataPages = 16, kBlockStackPages = 4;
inline constexpr u64 kBlockReadOnly = kData + kBlockDataPages * 0x1000;  ///< one page; behind it nothing
inline constexpr u64 kBlockStack = 0x18000000;
inline constexpr u64 kBlockFarStack = 0x7ffd00000000;  ///< the same pages where Linux has stacks
inline constexpr u64 kBlockDevice = 0x1a000000;

class BlockGuest {
 public:
  struct Translation {
    bool on = false;
    unsigned max_insns = engine::kMaxBlockInsns;
    bool fixed = true;  ///< Options::fixed_below; else user code is position-independent
  };
  BlockGuest(BlockMode mode, Translation translation);
  ~BlockGuest();

  enum class End : u8 { Event, Attention, Budget, Halted, Other };
  /// Until an exception (not delivered), HLT, attention, or the budget.
  End run(u64 budget);
  /// One instruction, by the interpreter.
  End step();
  /// After writes to memory or state from outside.
  void changed();

  u8* ram() { return ram_; }
  u8* code() { return ram_ + kCodeGpa; }
  u8* data() { return ram_ + kDataGpa; }
  u8* read_only() { return ram_ + kReadOnlyGpa; }
  u8* stack() { return ram_ + kStackGpa; }
  static constexpr u64 kRamSize = 1u << 20, kTables = 0x40000 /* page tables, from there on */;
  u64 tables_end() const { return next_table_; }
  /// The bytes at a linear address as the guest would fetch them, up to the end of their page; empty: nothing there.
  std::span<const u8> fetched(u64 linear) const;
  /// Sets what a page of the data region may be used for, and flushes.
  void protect(unsigned page, bool present, bool writable);

  engine::VcpuState& state() { return s_; }
  engine::Context& context() { return interpreter_->context(); }
  const engine::Event& event() const { return event_; }
  u64 device_log() const;
  /// Instructions that the translator left to the interpreter.
  u64 interpreted() const { return translator_ ? translator_->stats().interpreted : 0; }
  u64 blocks() const { return translator_ ? translator_->stats().translated : 0; }

 private:
  static constexpr u64 kCodeGpa = 0x10000, kDataGpa = 0x20000, kReadOnlyGpa = 0x30000, kStackGpa = 0x38000;
  class Device;
  engine::VcpuState& prepare();
  void map(u64 linear, u64 gpa, bool present, bool writable);
  End ended(engine::Interpreter::Result result);

  BlockMode mode_;
  u8* ram_;
  u64 next_table_ = kTables + 0x1000;
  engine::VcpuState s_;
  memory::GuestMemory memory_;
  engine::PhysicalTracker tracker_;
  engine::Mmu mmu_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<engine::Interpreter> interpreter_;
  std::unique_ptr<engine::TranslatorVcpu> translator_;
  u32 absent_ = 0;  ///< data pages that are not present
  bool has_event_ = false;
  engine::Event event_;
};

}  // namespace ring3::diff
