#pragma once

/// Programs that the preload cannot reach, and that want /dev/kvm.
namespace ring3::shim {

/// Says in one line on standard error that the program at `path`, about to be executed, will not get ring3's KVM: a statically
/// linked x86 program with the path /dev/kvm in it. Says nothing of others, of scripts, and of what cannot be read. Changes no
/// errno. Allocates nothing and takes no lock: the caller may be a child of vfork(2).
void warn_if_out_of_reach(const char* path);

}  // namespace ring3::shim
