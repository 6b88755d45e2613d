#include "engine/mmu/impl.hpp"

/// The bank of the current privilege. Made without vector registers (src/CMakeLists.txt): it calls nothing but
/// what is inlined or trivial.
namespace ring3::engine {

void Mmu::Impl::select_bank() {
  user_mode = s.cpl() == 3;
  smap = paging != Paging::None && (s.cr4 & cr4::SMAP);
  const unsigned which = user_mode                          ? kUser
                         : smap && !(s.rflags & rflags::AC) ? kSupervisorNoUser
                                                            : kSupervisor;
  current = &space->bank[which];
  name_fetches();
  check_alignment = user_mode && (s.cr0 & cr0::AM) && (s.rflags & rflags::AC);
  mmu.bank_ = check_alignment ? &empty[0] : current;
}

Mmu::WindowState Mmu::window() const {
  const Impl& i = *impl_;
  if (i.window_space != i.space || bank_ != &i.space->bank[kUser] || i.breakpoint_count != 0) return WindowState::None;
  return i.window_stale ? WindowState::Stale : WindowState::Ready;
}

void Mmu::privilege_changed() { impl_->select_bank(); }

}  // namespace ring3::engine
