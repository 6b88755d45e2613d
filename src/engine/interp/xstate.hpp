#pragma once
#include "engine/state/vcpu_state.hpp"

/// FXSAVE, FXRSTOR, the XSAVE family, LDMXCSR and STMXCSR; and what the ABI's setters and getters of
/// that state need.
///
/// Spec:      Intel SDM vol. 1 ch. 13, vol. 2; AMD APM vol. 5.
/// Modelled:  x87, SSE and AVX state; standard and compacted formats; the init optimisation.
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

}  // namespace ring3::engine
