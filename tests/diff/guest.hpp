#pragma once
#include <memory>
#include <optional>

#include "engine/interp/interpreter.hpp"
#include "engine/translate/translator_vcpu.hpp"
#include "native.hpp"

/// The software engine's side of the comparison: a vCPU at CPL 3 whose page tables map the oracle's
/// addresses to guest RAM, with the register state of a Linux user process.
namespace ring3::diff {

class GuestRunner {
 public:
  /// translated: by the translator where it can, in place of the interpreter.
  explicit GuestRunner(bool compat32, bool translated = false);
  ~GuestRunner();

  u8* data() { return ram_ + kDataGpa; }
  u8* read_only() { return ram_ + kReadOnlyGpa; }
  /// Copies the code page, puts a HLT at both landing pads and drops what was decoded from it.
  /// single: blocks of one instruction.
  void set_code(const u8* page, unsigned offset, unsigned size, bool single);
  /// Runs one instruction; as NativeRunner::run(). fall_through: the address behind it.
  /// nullopt: it ended in a way the oracle cannot (an exit, a halt, a triple fault).
  std::optional<Outcome> run(Registers* regs, u64 fall_through);
  engine::Context& context() { return interpreter_->context(); }

 private:
  static constexpr u64 kRamSize = 2u << 20;
  static constexpr u64 kCodeGpa = 0x10000, kDataGpa = 0x20000, kReadOnlyGpa = 0x30000, kTables = 0x40000;

  class NoEnvironment;
  engine::VcpuState& prepare();
  void map(u64 linear, u64 gpa, bool writable);

  bool compat32_;
  u8* ram_;
  u64 next_table_ = kTables + 0x1000;
  engine::VcpuState s_;
  memory::GuestMemory memory_;
  engine::PhysicalTracker tracker_;
  engine::Mmu mmu_;
  std::unique_ptr<NoEnvironment> env_;
  std::unique_ptr<engine::Interpreter> interpreter_;
  std::unique_ptr<engine::TranslatorVcpu> translator_;
  bool has_event_ = false;
  engine::Event event_;
};

}  // namespace ring3::diff
