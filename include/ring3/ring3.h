/* libring3: the KVM ABI as a library.
 *
 * Virtual machines without /dev/kvm, kernel module or root: the ioctls of <linux/kvm.h> on objects of this
 * process instead of file descriptors. The numbers, the structs and what they mean are those of the kernel's
 * virt/kvm/api documentation; this header says only what is different.
 *
 *   Objects    a system makes VMs, a VM makes vCPUs, as file descriptors do. Each is a ring3_kvm.
 *   Errors     functions that can fail return a negative errno value; errno itself is not touched.
 *              ring3_error() has the last message for people of the calling thread.
 *   Threads    any thread may call anything on any object; a vCPU serves one call at a time (a second waits until
 *              KVM_RUN returns), but for ring3_kick() and ring3_signal(), which never wait. ring3_close() must be
 *              the last call on its object.
 *   Lifetime   an object may be closed before those made from it. Memory given to a VM stays the caller's: it has to be
 *              mapped until its slot is deleted or the VM and all its vCPUs are closed.
 *   Signals    the engine handles SIGSEGV, SIGBUS, SIGFPE and SIGILL of its own code and calls the handlers that stood
 *              there before for all others. KVM_RUN holds other signals of its thread back while guest code runs,
 *              and returns -EINTR when one ends a wait; to end KVM_RUN from elsewhere use ring3_kick().
 *   fork       objects belong to the process that made them; in a child they must not be used.
 *   Trust      guest code and memory are hostile and cannot reach beyond the memory slots; the arguments of these
 *              functions are trusted, as a program's own pointers are.
 *
 * C99 and C++. The ABI of this file is stable within a version of the library's soname.
 */
#ifndef RING3_RING3_H
#define RING3_RING3_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
/* In headers of Linux 6.x, __DECLARE_FLEX_ARRAY puts an empty struct, of size 1 in C++, before the array: kvm_cpuid2, kvm_msrs
 * and the ioctl numbers made of their sizes would be wrong. Include this file before anything that takes <linux/kvm.h>. */
#include <linux/stddef.h>
#undef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(T, member) T member[0]
#endif
#include <linux/kvm.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RING3_API __attribute__((visibility("default")))

/* What KVM has a file descriptor for: the system, a VM or a vCPU. */
typedef struct ring3_kvm ring3_kvm;

/* Flags of ring3_open(). */
enum {
  /* The program calls ring3_signal() in the handler of every signal that comes to a thread in KVM_RUN. KVM_RUN then leaves
   * the thread's signal mask alone, and KVM_SET_SIGNAL_MASK has no effect. */
  RING3_SIGNALS_ANNOUNCED = 1,
  /* The program says by ring3_window_memory() which guest memory may be mapped a second time. Guest programs that run for a while are
   * then faster, without the option windows=; with it all shared memory is used so. */
  RING3_WINDOW_MEMORY_ANNOUNCED = 2
};

/* "0.1.0" */
RING3_API const char *ring3_version(void);

/* Why the last call of this thread failed that makes an object: one line. Valid until the thread's next call. */
RING3_API const char *ring3_error(void);

/* What open("/dev/kvm") is to the kernel's KVM. options: "key=value,key=value" of the engine's switches (docs/shim.md), or
 * NULL; without engine= the translator runs where the host can, else the interpreter.
 * -EINVAL for an unknown option or flag. */
RING3_API int ring3_open(const char *options, unsigned flags, ring3_kvm **system);

/* KVM_CREATE_VM on a system, KVM_CREATE_VCPU on a VM; arg as for the ioctl (0, the vCPU's id). */
RING3_API int ring3_create(ring3_kvm *parent, unsigned long request, unsigned long arg, ring3_kvm **object);

/* Every other ioctl: request and argument (a pointer, or an integer cast to one) as for ioctl(2).
 * Returns what the kernel's would, or a negative errno value. */
RING3_API long ring3_ioctl(ring3_kvm *object, unsigned long request, void *arg);

/* vCPU: what mmap(2) of its file descriptor would show at this offset (bytes): the run page at 0, the PIO data and the coalesced
 * ring behind it. *size: bytes from there on. NULL where nothing is. Owned by the vCPU. */
RING3_API void *ring3_mapping(ring3_kvm *vcpu, uint64_t offset, size_t *size);

/* vCPU: its run page. */
RING3_API struct kvm_run *ring3_run_page(ring3_kvm *vcpu);

/* vCPU: sets immediate_exit and makes the KVM_RUN in progress, or the next, return -EINTR. The caller of KVM_RUN clears
 * immediate_exit. Any thread; async-signal-safe. */
RING3_API void ring3_kick(ring3_kvm *vcpu);

/* vCPU, under RING3_SIGNALS_ANNOUNCED: the KVM_RUN in progress, or the next one, returns -EINTR once, as after a signal.
 * Async-signal-safe. */
RING3_API void ring3_signal(ring3_kvm *vcpu);

/* Gives the object up, as close(2). NULL is allowed. */
RING3_API void ring3_close(ring3_kvm *object);

/* KVM_SET_USER_MEMORY_REGION: guest memory at guest_physical is the caller's at host. All page aligned; size 0 deletes the slot.
 * flags: KVM_MEM_READONLY, KVM_MEM_LOG_DIRTY_PAGES. */
RING3_API int ring3_set_memory(ring3_kvm *vm, uint32_t slot, uint64_t guest_physical, void *host, uint64_t size,
                               uint32_t flags);

/* VM: host memory, page aligned, may (or may not any more) be mapped a second time by mremap(2) of old size 0, as shared memory can be,
 * and stays mapped as it is until it is said that it may not. That returns when no second mapping is used; it waits for vCPUs to leave
 * guest code for a moment. -EOPNOTSUPP: the engine has no use for it (size 0 asks that). */
RING3_API int ring3_window_memory(ring3_kvm *vm, void *begin, size_t size, int may);

/* KVM_RUN. 0: the exit stands in the run page. -EINTR, -EAGAIN: call it again. */
RING3_API int ring3_run(ring3_kvm *vcpu);

#ifdef __cplusplus
}
#endif

#endif
