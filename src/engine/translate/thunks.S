/* Entering and leaving translated code; the contracts are in frame.hpp. AT&T syntax. */
#include "engine/translate/frame_layout.h"

/* A slot of the frame; r9 is what it is in translated code. */
#define SLOT(offset) (offset - RING3_FRAME_CENTRE)(%r9)
#define GPR(n) (8 * (n))
#define XMM(n) (160 + 16 * (n))
#define YMMH(n) (576 + 16 * (n))
#define OPMASK(n) (1088 + 8 * (n))
#define ZMMH(n) (1152 + 32 * (n))
#define HI16(n) (1664 + 64 * (n)) /* ZMM16 + n */

    .text

/* From and to XsaveArea at r14. */
.macro load_low n
    vmovdqu XMM(\n)(%r14), %xmm\n
.endm
.macro load_high n
    vinsertf128 $1, YMMH(\n)(%r14), %ymm\n, %ymm\n
.endm
.macro save_vector n
    vmovdqu %xmm\n, XMM(\n)(%r14)
    vextractf128 $1, %ymm\n, YMMH(\n)(%r14)
.endm
.macro push_vector n
    vmovdqu %ymm\n, 32*\n(%rsp)
.endm
.macro pop_low n
    vmovdqu 32*\n(%rsp), %xmm\n
.endm
.macro pop_high n
    vinsertf128 $1, 32*\n+16(%rsp), %ymm\n, %ymm\n
.endm
.macro all op
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    \op \n
    .endr
.endm

/* Upper halves that are all zero are left as VZEROUPPER leaves them: Intel's processors take hundreds of cycles from
   instructions that write them, were it with zeroes, to SSE's and back. */
.macro or_high n
    vorps YMMH(\n)(%r14), %xmm0, %xmm0
.endm
.macro or_pushed n
    vorps 32*\n+16(%rsp), %xmm0, %xmm0
.endm
.macro if_high or, label /* clobbers the flags */
    vxorps %xmm0, %xmm0, %xmm0
    all \or
    vptest %xmm0, %xmm0
    jnz \label
.endm
.macro load_zmmh n
    vinserti64x4 $1, ZMMH(\n)(%r14), %zmm\n, %zmm\n
.endm
.macro save_zmmh n
    vextracti64x4 $1, %zmm\n, ZMMH(\n)(%r14)
.endm
.macro load_vectors /* from r14 */
    cmpl $0, SLOT(RING3_FRAME_AVX512)
    je 90f
    call load_if_zmm
    jnz 92f
90: if_high or_high, 91f
    all load_low
    jmp 92f
91: all load_low
    all load_high
92:
.endm
.macro pop_vectors
    if_high or_pushed, 91f
    all pop_low
    jmp 92f
91: all pop_low
    all pop_high
92:
.endm

.macro put_away /* r14 */
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    stmxcsr 24(%r14)
    all save_vector
    cmpl $RING3_ZMM_IN, SLOT(RING3_FRAME_ZMM)
    jne 81f
    call save_zmm
81: vzeroupper
    ldmxcsr SLOT(RING3_FRAME_HOST_MXCSR)
.endm

/* AVX-512's state, from and to XsaveArea at r14; only called where the guest has switched it on. */
.macro zmm_and_masks op
    .irp n, 0,1,2,3,4,5,6,7
    \op\()_mask \n
    .endr
    \op\()_hi 16, 0
    \op\()_hi 17, 1
    \op\()_hi 18, 2
    \op\()_hi 19, 3
    \op\()_hi 20, 4
    \op\()_hi 21, 5
    \op\()_hi 22, 6
    \op\()_hi 23, 7
    \op\()_hi 24, 8
    \op\()_hi 25, 9
    \op\()_hi 26, 10
    \op\()_hi 27, 11
    \op\()_hi 28, 12
    \op\()_hi 29, 13
    \op\()_hi 30, 14
    \op\()_hi 31, 15
.endm
.macro load_mask n
    kmovq OPMASK(\n)(%r14), %k\n
.endm
.macro save_mask n
    kmovq %k\n, OPMASK(\n)(%r14)
.endm
.macro load_hi reg, n
    vmovdqu64 HI16(\n)(%r14), %zmm\reg
.endm
.macro save_hi reg, n
    vmovdqu64 %zmm\reg, HI16(\n)(%r14)
.endm

/* Where bits 511:256 of ZMM0..15 are not all zero, everything is loaded, and ZF is clear. */
load_if_zmm:
    vpxor %xmm0, %xmm0, %xmm0
    .irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
    vpor ZMMH(\n)(%r14), %ymm0, %ymm0
    .endr
    vptest %ymm0, %ymm0
    jnz load_all
    ret
load_all:
    all load_low
    all load_high
    all load_zmmh
    zmm_and_masks load
    movl $RING3_ZMM_IN, SLOT(RING3_FRAME_ZMM)
    test %rsp, %rsp
    ret
save_zmm:
    all save_zmmh
    zmm_and_masks save
    movl $RING3_ZMM_AWAY, SLOT(RING3_FRAME_ZMM)
    ret

/* void ring3_jit_enter(const u8* code, u64 pointer): the guest's state is in VcpuState, RIP also in the frame; pointer:
   JitFrame::pointer. */
    .globl ring3_jit_enter
    .hidden ring3_jit_enter
    .type ring3_jit_enter, @function
    .balign 64
ring3_jit_enter:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    sub $8, %rsp
    mov %rsi, %r9
    mov %rsp, SLOT(RING3_FRAME_HOST_RSP)
    lea -RING3_SHADOW_BYTES(%rsp), %rax
    mov %rax, SLOT(RING3_FRAME_SHADOW_LIMIT)
    push SLOT(RING3_FRAME_SENTINEL)
    lea ring3_jit_exit_indirect_frame(%rip), %rax
    push %rax
    mov %rsp, SLOT(RING3_FRAME_SHADOW_BASE)
    stmxcsr SLOT(RING3_FRAME_HOST_MXCSR)
    movl $RING3_ZMM_AWAY, SLOT(RING3_FRAME_ZMM)
    mov %rdi, %r15
    cmpl $0, SLOT(RING3_FRAME_VECTORS)
    je 1f
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    ldmxcsr 24(%r14)
    load_vectors
1:
    mov SLOT(RING3_FRAME_STATE_RFLAGS), %r14
    mov (%r14), %rax
    mov %eax, %ecx
    mov %al, %ah
    shr $11, %ecx
    and $1, %ecx
    mov %cl, %al
    mov %eax, SLOT(RING3_FRAME_FLAGS)
    add $0x7f, %al                /* OF */
    sahf                          /* the others */
    mov SLOT(RING3_FRAME_STATE_GPR), %r14
    mov GPR(0)(%r14), %rax
    mov GPR(1)(%r14), %rcx
    mov GPR(2)(%r14), %rdx
    mov GPR(3)(%r14), %rbx
    mov GPR(4)(%r14), %r13
    mov GPR(5)(%r14), %rbp
    mov GPR(6)(%r14), %rsi
    mov GPR(7)(%r14), %rdi
    mov GPR(8)(%r14), %r8
    mov GPR(12)(%r14), %r12
    mov GPR(13)(%r14), %r10
    mov GPR(14)(%r14), %r11
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    jmp *%r15
    .size ring3_jit_enter, . - ring3_jit_enter

.macro thunk name
    .globl \name
    .hidden \name
    .type \name, @function
    .balign 32
\name:
.endm

thunk ring3_jit_exit_interpret
    movl $RING3_REASON_INTERPRET, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

.macro flags_from_frame
    mov %rax, SLOT(RING3_FRAME_SAVED_RAX)
    mov SLOT(RING3_FRAME_FLAGS), %eax
    add $0x7f, %al
    sahf
    mov SLOT(RING3_FRAME_SAVED_RAX), %rax
.endm

thunk ring3_jit_exit_next_frame
    flags_from_frame
    jmp ring3_jit_exit_next

/* An entry of the jump table for r14, the one that exits of blocks look up (jump_index()) or its neighbour; the flags are in the
   frame. Not equal: not there. */
.macro look_up_at neighbour
    rorx $30, %r14d, %r15d
    and $0xffff0, %r15d
    .if \neighbour
    xor $16, %r15d
    .endif
    add SLOT(RING3_FRAME_JUMP_TABLE), %r15
    cmp (%r15), %r14
.endm

/* JumpTable::note(): the place is empty. at: its offset; rcx: the table. */
.macro note_place at, at32, temp, temp32
    cmpq $0, (%rcx, \at)
    jne 77f
    mov RING3_JUMP_FILLED(%rcx), \temp32
    cmp $RING3_JUMP_NOTED, \temp32
    jae 77f
    mov \at32, RING3_JUMP_PLACES(%rcx, \temp, 4)
    inc \temp32
    mov \temp32, RING3_JUMP_FILLED(%rcx)
77:
.endm

/* What the jump table has not, by its physical address (JitFrame::common_table): r15 = its code, r14 = RIP, and the jump table
   has it. The RIP is in the frame; user code's. */
.macro look_up_common miss
    cmpq $0, SLOT(RING3_FRAME_COMMON_TABLE)
    je \miss
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    mov %r14, %r15
    shr $32, %r15
    cmp $0x7ffe, %r15d
    ja \miss
    mov %r14, %r15
    shr $RING3_TLB_SHIFT, %r15
    and $RING3_TLB_MASK, %r15d
    and $-4096, %r14
    mov %rax, SLOT(RING3_FRAME_SAVED_RAX)
    mov SLOT(RING3_FRAME_TLB), %rax
    cmp RING3_TLB_EXEC_TAG(%rax, %r15), %r14
    jne 75f
    shr $2, %r15d
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    and $4095, %r14d
    add RING3_TLB_GPA(%rax, %r15), %r14
    mov SLOT(RING3_FRAME_SAVED_RAX), %rax
    jmp 76f
75: mov SLOT(RING3_FRAME_SAVED_RAX), %rax
    jmp \miss
76: add SLOT(RING3_FRAME_COMMON_MODE), %r14
    xor %r15d, %r15d
    crc32q %r14, %r15
    and $0xffff, %r15d
    shl $5, %r15d
    add SLOT(RING3_FRAME_COMMON_TABLE), %r15
    cmp (%r15), %r14
    jne \miss
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    shr $32, %r14
    jz 72f
    cmpq $0, 16(%r15)
    jne \miss
    jmp 73f
72: mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    cmp 16(%r15), %r14
    jne \miss
73: mov 8(%r15), %r14
    push %rax
    push %rcx
    mov SLOT(RING3_FRAME_JUMP_TABLE), %rcx /* JumpTable::put() */
    rorx $30, SLOT(RING3_FRAME_EXIT_RIP), %eax
    and $0xffff0, %eax
    cmp $16, %eax
    ja 74f
    mov $16, %eax
    jmp 71f
74: mov (%rcx, %rax), %r15
    test %r15, %r15
    jz 71f
    rorx $30, %r15d, %r15d
    and $0xffff0, %r15d
    cmp %eax, %r15d
    jne 71f
    xor $16, %r15d
    push %r14
    note_place %r15, %r15d, %r14, %r14d
    mov (%rcx, %rax), %r14
    mov %r14, (%rcx, %r15)
    mov 8(%rcx, %rax), %r14
    mov %r14, 8(%rcx, %r15)
    pop %r14
71: note_place %rax, %eax, %r15, %r15d
    mov SLOT(RING3_FRAME_EXIT_RIP), %r15
    mov %r15, (%rcx, %rax)
    mov %r14, 8(%rcx, %rax)
    pop %rcx
    pop %rax
    xchg %r14, %r15
.endm

/* Where this comes from the first entry was looked at; while attention is raised, entry 0 in its place. */
thunk ring3_jit_exit_indirect_frame
    cmpl $0, SLOT(RING3_FRAME_JUMP_MASK)
    je ring3_jit_exit_attention_frame
    look_up_at 1
    jne 1f
    jmp *8(%r15)
1:  mov %r14, SLOT(RING3_FRAME_EXIT_RIP)
    look_up_common 2f
    jmp *%r15
2:  mov SLOT(RING3_FRAME_EXIT_RIP), %r14
leave_indirect:
    flags_from_frame
    movl $RING3_REASON_INDIRECT, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

thunk ring3_jit_exit_interpret_frame
    flags_from_frame
    jmp ring3_jit_exit_interpret

thunk ring3_jit_exit_left
    movl $RING3_REASON_LEFT, SLOT(RING3_FRAME_EXIT_REASON)
    mov %r15d, SLOT(RING3_FRAME_EXIT_TAG)
    jmp leave

thunk ring3_jit_exit_dead_frame
    flags_from_frame
    movl $RING3_REASON_DEAD, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

thunk ring3_jit_exit_attention_frame
    flags_from_frame
thunk ring3_jit_exit_attention
    movl $RING3_REASON_ATTENTION, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

/* From the fault handler: r14 = host address of the instruction that faulted. */
thunk ring3_jit_exit_fault
    movl $RING3_REASON_FAULT, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

thunk ring3_jit_exit_vectors
    movl $RING3_REASON_VECTORS, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

thunk ring3_jit_exit_next
    movl $RING3_REASON_NEXT, SLOT(RING3_FRAME_EXIT_REASON)
    mov %r15d, SLOT(RING3_FRAME_EXIT_TAG)
leave:
    mov %r14, SLOT(RING3_FRAME_EXIT_RIP)
    mov SLOT(RING3_FRAME_STATE_GPR), %r14
    mov %rax, GPR(0)(%r14)
    mov %rcx, GPR(1)(%r14)
    mov %rdx, GPR(2)(%r14)
    mov %rbx, GPR(3)(%r14)
    mov %r13, GPR(4)(%r14)
    mov %rbp, GPR(5)(%r14)
    mov %rsi, GPR(6)(%r14)
    mov %rdi, GPR(7)(%r14)
    mov %r8, GPR(8)(%r14)
    mov %r12, GPR(12)(%r14)
    mov %r10, GPR(13)(%r14)
    mov %r11, GPR(14)(%r14)
    lahf
    seto %al
    movzbl %ah, %ecx
    movzbl %al, %eax
    shl $11, %eax
    or %ecx, %eax
    mov %rax, SLOT(RING3_FRAME_SAVED_FLAGS)
    cmpl $0, SLOT(RING3_FRAME_VECTORS)
    je 1f
    put_away
1:
    cmpl $0, SLOT(RING3_FRAME_X87)
    jne put_x87_away
x87_is_away:
    mov SLOT(RING3_FRAME_HOST_RSP), %rsp
    add $8, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret

/* The pointers are not the host's: FOP and FDP stay as they are in the image, FIP is in the frame. */
put_x87_away:
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    movzwl 6(%r14), %ecx
    mov 16(%r14), %r15
    mov $1, %eax
    xor %edx, %edx
    xsave64 (%r14)
    testb $1, 512(%r14)
    jz 2f
1:  mov %cx, 6(%r14)
    mov SLOT(RING3_FRAME_X87_FIP), %rax
    mov %rax, 8(%r14)
    mov %r15, 16(%r14)
    fninit
    fldcw SLOT(RING3_FRAME_X87_HOST_FCW)
    movl $0, SLOT(RING3_FRAME_X87)
    jmp x87_is_away
2:  movq $0x37f, (%r14)           /* a component in its initial state need not be written */
    lea 32(%r14), %rdi
    mov %rcx, %rdx
    mov $16, %ecx
    xor %eax, %eax
    cld
    rep stosq
    mov %rdx, %rcx
    jmp 1b

thunk ring3_jit_exit_cross_frame
    mov %r15d, SLOT(RING3_FRAME_EXIT_TAG)
    decl SLOT(RING3_FRAME_CROSS_LEFT)
    js 2f                         /* now and then the exit is linked anew: those that are taken most stay linked */
    mov %r14, SLOT(RING3_FRAME_EXIT_RIP)
    look_up_at 0
    jne 3f
    jmp *8(%r15)
3:  look_up_at 1
    jne 4f
    jmp *8(%r15)
4:  look_up_common 1f
    jmp *%r15
2:  movl $RING3_CROSS_EXITS, SLOT(RING3_FRAME_CROSS_LEFT)
    mov %r14, SLOT(RING3_FRAME_EXIT_RIP)
1:  mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    flags_from_frame
    movl $RING3_REASON_NEXT, SLOT(RING3_FRAME_EXIT_REASON)
    jmp leave

thunk ring3_jit_exit_return
    mov SLOT(RING3_FRAME_SHADOW_BASE), %rsp
    cmpl $0, SLOT(RING3_FRAME_ATTENTION)
    jne ring3_jit_exit_attention_frame
    look_up_at 0
    jne 1f
    jmp *8(%r15)
1:  jmp ring3_jit_exit_indirect_frame

/* What a C++ function does not keep. */
.macro push_scratch
    push %rax
    push %rcx
    push %rdx
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
.endm
.macro pop_scratch
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rdx
    pop %rcx
    pop %rax
.endm

/* The guest's vectors, to room at rsp, or with AVX-512's state to VcpuState; and back. r14 is lost. */
.macro set_vectors_aside
    cmpl $RING3_ZMM_IN, SLOT(RING3_FRAME_ZMM)
    jne 85f
    put_away
    movl $RING3_ZMM_ASIDE, SLOT(RING3_FRAME_ZMM)
    jmp 87f
85: all push_vector
    vzeroupper
87:
.endm
.macro bring_vectors
    cmpl $RING3_ZMM_ASIDE, SLOT(RING3_FRAME_ZMM)
    jne 86f
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    ldmxcsr 24(%r14)
    call load_all
    jmp 87f
86: pop_vectors
87:
.endm

/* Room for the guest's vectors is at rsp; r14 is lost. Where supervisor code had them kept they go away for good. */
.macro vectors_aside
    cmpl $RING3_VECTORS_IN, SLOT(RING3_FRAME_VECTORS)
    jb 83f
    je 82f
    put_away
    movl $RING3_VECTORS_AWAY, SLOT(RING3_FRAME_VECTORS)
    jmp 83f
82: set_vectors_aside
83:
.endm
.macro vectors_back /* r14 is lost */
    cmpl $RING3_VECTORS_IN, SLOT(RING3_FRAME_VECTORS)
    jne 84f
    bring_vectors
84:
.endm

.macro fill name, write
thunk \name
    push_scratch
    push %r14
    push %rbp
    mov %rsp, %rbp                /* the shadow stack keeps 8-byte alignment only */
    and $-32, %rsp
    sub $512, %rsp
    mov %r14, %rsi
    vectors_aside
    mov SLOT(RING3_FRAME_FILL_CONTEXT), %rdi
    mov %r15d, %edx
    mov $\write, %ecx
    call *SLOT(RING3_FRAME_FILL_FUNCTION)
    mov %rax, %r15
    mov 32(%rbp), %r9             /* as it was pushed */
    vectors_back
    mov %rbp, %rsp
    pop %rbp
    pop %r14
    pop_scratch
    ret
.endm

    fill ring3_jit_fill_read, 0
    fill ring3_jit_fill_write, 1


/* From the fault handler, on whose account the faulting address is on the stack: all registers as they were. */
thunk ring3_jit_window_fault
    pushfq
    push_scratch
    push %r14
    push %r15
    push %rbp
    mov %rsp, %rbp
    and $-32, %rsp
    sub $512, %rsp
    vectors_aside
    mov SLOT(RING3_FRAME_FILL_CONTEXT), %rdi
    mov 104(%rbp), %rsi
    lea 8(%rbp), %rdx
    call *SLOT(RING3_FRAME_WINDOW_FUNCTION)
    mov 40(%rbp), %r9
    mov %rax, SLOT(RING3_FRAME_WINDOW_TARGET)
    vectors_back
    mov %rbp, %rsp
    pop %rbp
    pop %r15
    pop %r14
    pop_scratch
    popfq
    jmp *SLOT(RING3_FRAME_WINDOW_TARGET)

thunk ring3_jit_window_again
    ret

thunk ring3_jit_window_interpret
    lea 8(%rsp), %rsp
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    jmp ring3_jit_exit_interpret

thunk ring3_jit_window_interpret_frame
    lea 8(%rsp), %rsp
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    jmp ring3_jit_exit_interpret_frame

thunk ring3_jit_window_lost
    pop %r14
    jmp ring3_jit_exit_fault

thunk ring3_jit_load_zmm
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    zmm_and_masks load
    movl $RING3_ZMM_IN, SLOT(RING3_FRAME_ZMM)
    ret

/* What it calls leaves the vectors alone. */
thunk ring3_jit_system_op
    push_scratch
    push %rbp
    mov %rsp, %rbp
    and $-16, %rsp
    mov SLOT(RING3_FRAME_FILL_CONTEXT), %rdi
    mov %r14, %rsi
    mov %r15d, %edx
    call *SLOT(RING3_FRAME_SYSTEM_FUNCTION)
    mov %rax, %r15
    mov %rbp, %rsp
    pop %rbp
    pop_scratch
    ret

/* u64 ring3_jit_call_out(u64 (*f)(void*), void* argument, u64 pointer): for what is called from there. f may use vectors. */
    .globl ring3_jit_call_out
    .hidden ring3_jit_call_out
    .type ring3_jit_call_out, @function
    .balign 32
ring3_jit_call_out:
    push %rbp
    mov %rsp, %rbp
    and $-32, %rsp
    sub $544, %rsp
    mov %rdx, 512(%rsp)
    mov %r14, 520(%rsp)
    mov %rdx, %r9
    set_vectors_aside
    mov %rdi, %rax
    mov %rsi, %rdi
    call *%rax
    mov 512(%rsp), %r9
    bring_vectors
    mov 520(%rsp), %r14
    mov %rbp, %rsp
    pop %rbp
    ret

#define KEPT(n) SLOT(RING3_FRAME_KEPT + 8 * (n))

/* rbx, rbp, r12, r14 and r15 are the callee's to keep. */
thunk ring3_jit_exit_transit
    mov %rax, KEPT(0)
    lahf
    seto %al
    mov %eax, SLOT(RING3_FRAME_FLAGS)
    mov %rcx, KEPT(1)
    mov %rdx, KEPT(2)
    mov %rsi, KEPT(3)
    mov %rdi, KEPT(4)
    mov %r8, KEPT(5)
    mov %r10, KEPT(6)
    mov %r11, KEPT(7)
    mov %r13, KEPT(8)
    mov SLOT(RING3_FRAME_SHADOW_BASE), %rsp
    mov SLOT(RING3_FRAME_FILL_CONTEXT), %rdi
    mov %r14, %rsi
    mov %r15d, %edx
    push %r9
    sub $8, %rsp
    call *SLOT(RING3_FRAME_TRANSIT_FUNCTION)
    add $8, %rsp
    pop %r9
    mov KEPT(1), %rcx
    mov KEPT(2), %rdx
    mov KEPT(3), %rsi
    mov KEPT(4), %rdi
    mov KEPT(5), %r8
    mov KEPT(6), %r10
    mov KEPT(7), %r11
    mov KEPT(8), %r13
    cmp $RING3_TRANSIT_DONE, %rax
    jbe 2f
    cmpl $RING3_VECTORS_WANTED, SLOT(RING3_FRAME_VECTORS)
    je 1f
4:  mov %rax, %r15
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    mov KEPT(0), %rax
    jmp *%r15
1:
    movl $RING3_VECTORS_IN, SLOT(RING3_FRAME_VECTORS)
    mov SLOT(RING3_FRAME_STATE_XSAVE), %r14
    ldmxcsr 24(%r14)
    load_vectors
    jmp 4b
2:
    mov KEPT(0), %rax
    je 3f
    flags_from_frame
    jmp ring3_jit_exit_left
3:                                /* the bias in the frame may be another mode's */
    mov SLOT(RING3_FRAME_EXIT_RIP), %r14
    jmp leave_indirect

    .section .note.GNU-stack, "", @progbits
