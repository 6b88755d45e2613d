#include <algorithm>
#include <utility>

#include "engine/decode/decoder.hpp"
#include "engine/translate/emitter.hpp"
#include "engine/translate/thunks.hpp"
#include "engine/translate/translator_vcpu.hpp"

/// When an address space gets the host window, and when it loses it (docs/adr/0016).
///
/// A page costs some microseconds to get into the window, which its accesses must earn. So only address spaces get one whose
/// user code was found running again and again, or twice at the same place: in a loop, most likely. One that spends more than an
/// eighth of its time on the window loses it, and waits longer for the next.
namespace ring3::engine {
namespace {

constexpr u64 kApart = 1u << 21;    ///< TSC ticks between two samples that count
constexpr u64 kPlace = 4096;        ///< bytes between two places that are taken for one
constexpr u64 kFillsApart = 1u << 14;  ///< TSC ticks between two TLB fills, at least, of a loop that stays in its pages
constexpr u64 kPeriod = 1u << 28;   ///< over which the cost is looked at
constexpr u64 kFault = 12'000;      ///< a signal, and what it takes to map a page
constexpr u64 kCall = 4'000;        ///< a system call that changes mappings
constexpr u64 kPage = 150;          ///< to compare a page with the page tables
constexpr u64 kSpace = 0x000f'ffff'ffff'f000;  ///< of CR3
constexpr unsigned kMostPatience = 10;

}  // namespace

u64 TranslatorVcpu::window_function(void* self, u64 pc, u64* r15) {
  return static_cast<TranslatorVcpu*>(self)->window_fault(pc, r15);
}

/// Where the register that the instruction at pc addresses memory by holds the constant of a region without host addresses,
/// or that and an address: gets it some. What was kept of it in the frame is set right too. r15[1] is r14.
bool TranslatorVcpu::open_region(u64 pc, u64* r15) {
  DecodedInsn insn;
  // SAFETY: the arena has more than one instruction's bytes behind every instruction of a block.
  if (decode(reinterpret_cast<const u8*>(pc), 15, CodeMode::Bits64, false, false, &insn) != DecodeResult::Ok) return false;
  if (insn.mem.seg == GS) return false;  // what stands there is the guest's address
  const auto named = [&](u8 reg) { return insn.mem.base == reg || insn.mem.index == reg; };
  if (!named(kHostR15) && !named(kHostR14)) return false;
  u64& constant = named(kHostR15) ? r15[0] : r15[1];
  if (!Window::is_no_delta(constant)) return false;
  const u64 region = Window::region_of(constant), none = Window::no_delta(region);
  if (frame_.window_deltas[region] == none && !mmu_.open_window_region(region << frame::kRegionShift)) return false;
  const u64 delta = frame_.window_deltas[region];
  constant = constant - none + delta;
  for (u64& slot : frame_.groups)
    if (Window::is_no_delta(slot) && Window::region_of(slot) == region) slot = slot - none + delta;
  return true;
}

u64 TranslatorVcpu::window_fault(u64 pc, u64* r15) {
  static const WindowTargets targets = window_targets();
  HostFaultPoint point;
  if (!cache_->window_point(pc, frame_.page, &point)) return targets.lost;
  stats_.window_faults++;
  window_.cost += kFault;
  if (~frame_.fault_address == 0 && open_region(pc, r15)) return targets.again;
  struct Call {
    Mmu& mmu;
    u64 address;
    bool write, done;
  } call{mmu_, frame_.fault_address, (frame_.fault_error & pferr::W) != 0, false};
  const bool whole = run_in_nested_trap(
      [](void* at) {
        Call& c = *static_cast<Call*>(at);
        c.done = c.mmu.warm_window(c.address, c.write);
      },
      &call);
  if (whole && call.done) return targets.again;
  // Most often the guest's system is told of a page fault, and comes back when it has done something about it.
  window_.fault = call.address | u64{call.write};
  window_.fault_rip = point.rip;
  frame_.exit_rip = point.rip;
  return point.frame_flags ? targets.interpret_frame : targets.interpret;
}

bool TranslatorVcpu::use_window() {
  const u64 fault = std::exchange(window_.fault, 0);
  if (mmu_.window() == Mmu::WindowState::Stale) {
    const std::size_t before = mmu_.window_pages();
    mmu_.refresh_window();
    window_.cost += before * kPage;
    // Another program under the same CR3, most likely.
    if (before >= 16 && mmu_.window_pages() * 4 < before) close_window();
  }
  if (mmu_.window() != Mmu::WindowState::Ready) return false;
  if (fault != 0 && ~fault != 0 && window_.fault_rip == s_.rip) {
    window_.cost += kFault / 2;
    (void)mmu_.foresee_window(fault & ~u64{1}, (fault & 1) != 0);  // attention may come before the instruction
  }
  if (!mmu_.window_full()) return true;
  refuse_window(kMostPatience);
  return false;
}

/// The window did not pay, or there is no room for it.
void TranslatorVcpu::refuse_window(unsigned patience) {
  window_.patience = patience;
  window_.refused = window_.open;
  close_window();
}

void TranslatorVcpu::close_window() {
  if (window_.open == 0) return;
  mmu_.close_window();
  window_.open = 0;
  window_.samples = 0;
}

void TranslatorVcpu::sample_window() {
  const u64 now = __builtin_ia32_rdtsc();
  const u64 apart = now - window_.sampled;
  if (apart < kApart) return;
  window_.sampled = now;
  const u64 space = s_.cr3 & kSpace;
  // A loop that goes to new pages all the time would pay for each of them a second time.
  const u64 fills = stats_.fills - std::exchange(window_.fills, stats_.fills);
  const bool again = window_.seen == space && s_.rip - window_.place + kPlace < 2 * kPlace && fills < apart / kFillsApart;
  window_.seen = space;
  window_.place = s_.rip;
  // Its place in the TLB may have gone to another; breakpoints were set; memory was full.
  if (window_.open == space && mmu_.window() == Mmu::WindowState::None) close_window();
  if (window_.open != 0 && now - window_.since > kPeriod) {
    if (options_.window_samples != 1 && window_.cost + mmu_.take_window_calls() * kCall > (now - window_.since) / 8) {
      refuse_window(window_.refused == window_.open ? std::min(window_.patience + 1, kMostPatience) : 1);
    }
    window_.since = now;
    window_.cost = 0;
  }
  if (space != window_.space) {
    window_.samples /= 2;
    if (window_.samples == 0) window_.space = space;
    return;
  }
  const u64 wanted = u64{options_.window_samples} << (space == window_.refused ? window_.patience : 0);
  window_.samples = static_cast<unsigned>(std::min(wanted, u64{window_.samples} + (again ? options_.window_samples : 1)));
  if (window_.open == space || window_.samples < wanted || lockstep_ != nullptr || !c_.code64) return;
  open_window();
}

void TranslatorVcpu::open_window() {
  window_.samples = 0;
  if (!mmu_.open_window(frame_.window_deltas, &frame_.window_first)) return;
  (void)mmu_.open_window_region(Window::kStacks << frame::kRegionShift);
  window_.open = s_.cr3 & kSpace;
  window_.since = __builtin_ia32_rdtsc();
  window_.cost = 0;
  (void)mmu_.take_window_calls();
}

}  // namespace ring3::engine
