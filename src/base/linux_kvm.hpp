#pragma once
/// <linux/kvm.h>, with the kernel's layout in C++ too. Include this, never <linux/kvm.h> itself.
///
/// In the headers of Linux 6.1, __DECLARE_FLEX_ARRAY puts an empty struct before the array; that has
/// size 0 in C and 1 in C++, so that kvm_cpuid2, kvm_msrs and their kin, and the ioctl numbers made
/// from their sizes, would be wrong.
#include <linux/stddef.h>

#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(T, member) T member[0]

#include <linux/kvm.h>

static_assert(sizeof(kvm_cpuid2) == 8, "include base/linux_kvm.hpp before anything that takes <linux/kvm.h>");
static_assert(sizeof(kvm_msrs) == 8);
static_assert(sizeof(kvm_msr_list) == 4);
static_assert(sizeof(kvm_irq_routing) == 8);
static_assert(sizeof(kvm_signal_mask) == 4);
