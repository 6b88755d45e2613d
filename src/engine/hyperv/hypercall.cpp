// Hypercalls (TLFS "Hypercall interface"). All of their input is the guest's: registers, and memory that may not be there.
#include <sched.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "engine/hyperv/tlfs.hpp"
#include "engine/hyperv/vp.hpp"

namespace ring3::engine::hv {
namespace {

// The control word.
constexpr u64 kFast = 1u << 16, kReserved = 0xf000f000f8000000;
unsigned variable_words(u64 control) { return static_cast<unsigned>(control >> 17 & 0x3ff); }
unsigned rep_count(u64 control) { return static_cast<unsigned>(control >> 32 & 0xfff); }
unsigned rep_start(u64 control) { return static_cast<unsigned>(control >> 48 & 0xfff); }

constexpr unsigned kXmmHalves = 12;
constexpr unsigned kBanks = ApicBus::kMaxVcpus / 64;  // of a sparse set, with VPs that can exist
constexpr u64 kAllProcessors = 1;                     // flags of a flush
constexpr u64 kSparseSet = 0, kSetOfAll = 1;          // formats of a set

u64 xmm_half(const Hypercall& in, unsigned n) {
  u64 v;
  std::memcpy(&v, in.xmm + 8 * n, sizeof v);
  return v;
}

HypercallResult done(u64 status) { return {HypercallResult::Kind::kDone, status}; }

}  // namespace

HypercallResult Vp::hypercall(const Hypercall& in) {
  const u16 code = static_cast<u16>(in.control);
  const bool fast = in.control & kFast;
  const bool rep = rep_count(in.control) != 0 || rep_start(in.control) != 0;
  const bool plain = !rep && variable_words(in.control) == 0;
  if (enforce_ && !cpuid_.allows_call(code)) return done(status::kAccessDenied);
  if (in.control & kReserved) return done(status::kInvalidInput);
  const bool flush = code == call::kFlushSpace || code == call::kFlushList || code == call::kFlushSpaceEx || code == call::kFlushListEx;
  if (fast && (flush || code == call::kSendIpiEx) && enforce_ && !(cpuid_.features_edx & feature::kXmmInput)) {
    return {HypercallResult::Kind::kUndefined};
  }
  switch (code) {
    case call::kLongSpinWait:
      if (!plain) break;
      ::sched_yield();
      return done(status::kSuccess);
    case call::kSignalEvent:
      if (!plain) break;
      return signal_event(in, fast);
    case call::kPostMessage:
      if (!plain || !synic_.active()) break;
      return {HypercallResult::Kind::kToVmm};
    case call::kFlushList:
    case call::kFlushListEx:
      if ((code == call::kFlushList && variable_words(in.control) != 0) || rep_count(in.control) == 0 || rep_start(in.control) != 0) break;
      return done(flush_tlb(in, code));
    case call::kFlushSpace:
    case call::kFlushSpaceEx:
      if ((code == call::kFlushSpace && variable_words(in.control) != 0) || rep) break;
      return done(flush_tlb(in, code));
    case call::kSendIpi:
    case call::kSendIpiEx:
      if ((code == call::kSendIpi && variable_words(in.control) != 0) || rep) break;
      return done(send_ipi(in, code));
    case call::kPostDebugData:
    case call::kRetrieveDebugData:
      if (fast) return done(status::kInvalidParameter);
      [[fallthrough]];
    case call::kResetDebugSession:
      if (!cpuid_.syndbg()) return done(status::kInvalidCode);
      if (!(partition_.syndbg_options() & kSyndbgUseHypercalls)) return done(status::kOperationDenied);
      return {HypercallResult::Kind::kToVmm};
    default: return done(status::kInvalidCode);
  }
  return done(status::kInvalidInput);
}

HypercallResult Vp::signal_event(const Hypercall& in, bool fast) {
  u64 what = in.input;  // connection id, 16 bits of a flag's number, the rest zero
  if (!fast) {
    if ((in.input & 7) != 0 || !processor_.read(Gpa(in.input), &what, sizeof what)) return done(status::kInvalidAlignment);
  }
  constexpr u64 kFlagNumber = 0xffff00000000;
  if (!(what & kFlagNumber)) {
    if (what & ~u64{KVM_HYPERV_CONN_ID_MASK}) return done(status::kInvalidInput);
    if (partition_.signal(static_cast<u32>(what))) return done(status::kSuccess);
  }
  // Perhaps the VMM knows it.
  return synic_.active() ? HypercallResult{HypercallResult::Kind::kToVmm} : done(status::kInvalidInput);
}

bool Vp::sparse_set(const Hypercall& in, u64 valid_banks, unsigned used, u64 offset, std::vector<Vp*>* out) {
  const unsigned words = variable_words(in.control);
  if (words > 64) return false;
  u64 banks[kBanks] = {};
  const unsigned n = std::min(words, kBanks);  // what comes after these cannot name a VP
  if (in.control & kFast) {
    if (words > kXmmHalves - used) return false;
    for (unsigned i = 0; i < n; i++) banks[i] = xmm_half(in, used + i);
  } else if (!processor_.read(Gpa(in.input) + offset, banks, n * sizeof(u64))) {
    return false;
  }
  u64 by_number[kBanks] = {};
  unsigned next = 0;
  for (unsigned bank = 0; bank < kBanks; bank++) {
    if (valid_banks >> bank & 1) by_number[bank] = banks[next++];
  }
  host_.each_vp([&](Vp& vp) {
    const u32 i = vp.index();
    if (i < kBanks * 64 && (by_number[i / 64] >> (i % 64) & 1)) out->push_back(&vp);
  });
  return true;
}

u64 Vp::flush_tlb(const Hypercall& in, u16 code) {
  std::vector<Vp*> targets;
  const auto everybody = [&] { host_.each_vp([&](Vp& vp) { targets.push_back(&vp); }); };
  const bool fast = in.control & kFast;
  if (code == call::kFlushSpace || code == call::kFlushList) {
    u64 p[3] = {in.input, in.output, xmm_half(in, 0)};  // address space, flags, processors
    if (!fast && !processor_.read(Gpa(in.input), p, sizeof p)) return status::kInvalidInput;
    if ((p[1] & kAllProcessors) || p[2] == 0) {  // none named: all are meant (Windows Server 2012 does it)
      everybody();
    } else {
      host_.each_vp([&](Vp& vp) {
        if (vp.index() < 64 && (p[2] >> vp.index() & 1)) targets.push_back(&vp);
      });
    }
  } else {
    u64 p[4] = {in.input, in.output, xmm_half(in, 0), xmm_half(in, 1)};  // address space, flags, format, banks
    if (!fast && !processor_.read(Gpa(in.input), p, sizeof p)) return status::kInvalidInput;
    if (variable_words(in.control) != static_cast<unsigned>(std::popcount(p[3]))) return status::kInvalidInput;
    if (p[2] != kSparseSet) {
      everybody();
    } else if (p[3] != 0 && !sparse_set(in, p[3], 2, sizeof p, &targets)) {
      return status::kInvalidInput;
    }
  }
  // Whole TLBs: which address space a vCPU is in is its own thread's to know.
  std::vector<unsigned> ids;
  for (const Vp* vp : targets) ids.push_back(vp->id());
  if (!ids.empty()) processor_.flush_tlbs(ids);
  return status::kSuccess | u64{rep_count(in.control)} << 32;
}

u64 Vp::send_ipi(const Hypercall& in, u16 code) {
  if (lapic_ == nullptr) return status::kInvalidInput;
  std::vector<Vp*> targets;
  const bool fast = in.control & kFast;
  u32 vector;
  if (code == call::kSendIpi) {
    u64 p[2] = {in.input, in.output};  // vector, processors
    if (fast && p[0] >> 32) return status::kInvalidInput;
    if (!fast && !processor_.read(Gpa(in.input), p, sizeof p)) return status::kInvalidInput;
    vector = static_cast<u32>(p[0]);
    host_.each_vp([&](Vp& vp) {
      if (vp.index() < 64 && (p[1] >> vp.index() & 1)) targets.push_back(&vp);
    });
  } else {
    u64 p[3] = {in.input, in.output, xmm_half(in, 0)};  // vector, format, banks
    if (!fast && !processor_.read(Gpa(in.input), p, sizeof p)) return status::kInvalidInput;
    vector = static_cast<u32>(p[0]);
    if (variable_words(in.control) != static_cast<unsigned>(std::popcount(p[2]))) return status::kInvalidInput;
    if (p[1] == kSetOfAll) {
      host_.each_vp([&](Vp& vp) { targets.push_back(&vp); });
    } else if (p[2] == 0) {
      return status::kSuccess;  // nobody
    } else if (!sparse_set(in, p[2], 1, sizeof p, &targets)) {
      return status::kInvalidInput;
    }
  }
  if (vector < 0x10 || vector > 0xff) return status::kInvalidInput;
  InterruptMessage m;
  m.vector = static_cast<u8>(vector);
  for (Vp* vp : targets) {
    if (vp->lapic() != nullptr) static_cast<void>(vp->lapic()->accept(m));
  }
  return status::kSuccess;
}

}  // namespace ring3::engine::hv
