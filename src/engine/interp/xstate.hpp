#pragma once
#include <span>

#include "engine/state/vcpu_state.hpp"

/// FXSAVE, FXRSTOR, the XSAVE family, LDMXCSR and STMXCSR; and what the ABI's setters and getters of
/// that state need.
///
/// Spec:      Intel SDM vol. 1 ch. 13, vol. 2; AMD APM vol. 5.
/// Modelled:  x87, SSE, AVX and AVX-512 state; standard and compacted formats; the init optimisation.
/// Deviation: x87 pointers are saved always, not only with an exception pending as some AMD parts do.
///            In IA-32e mode FCS and FDS are saved as zero.
namespace ring3::engine {

/// Makes FCW and FSW what the hardware would hold after loading them: reserved bits, ES and B.
void normalise_x87(XsaveArea& area);
/// For KVM_SET_FPU and KVM_SET_XSAVE: nothing in the area can fault the host when a stub loads it.
void sanitise_xsave(XsaveArea& area, u32 mxcsr_mask);
/// XINUSE: the components that are not in their initial configuration (XSTATE_BV of what is saved now).
/// MXCSR counts as part of SSE.
u64 xstate_in_use(const XsaveArea& area);

/// A state component behind the legacy region: AVX (2) and AVX-512's (5 to 7).
struct XstateComponent {
  u8 number;      ///< bit in XCR0
  u16 size;       ///< bytes
  u16 in_area;    ///< its place in XsaveArea
  u16 standard;   ///< its place in the standard format: the host's, which VMMs take for the guest's
};
std::span<const XstateComponent> xstate_components();
/// Bytes of an area with these components; compact: the compacted format.
u32 xstate_size(u64 components, bool compact);

}  // namespace ring3::engine
