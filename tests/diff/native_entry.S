// Entry to and exit from the instruction under test. The frame lies at a fixed low address, so
// that no register is needed to find it. Offsets are those of struct Frame in native.cpp.
#define FRAME 0x2a5c7000
#define GPR(n) (FRAME + 8 * (n))
#define RIP_ (FRAME + 0x80)
#define RFLAGS (FRAME + 0x88)
#define XSAVE (FRAME + 0xc0)
#define HOST_RSP (FRAME + 0xb40)
#define TARGET (FRAME + 0xb48)
#define FAR_TARGET (FRAME + 0xb50)
#define EXIT_KIND (FRAME + 0xb58)
#define COMPAT (FRAME + 0xb5c)
#define HOST_MXCSR (FRAME + 0xb60)
#define HOST_FCW (FRAME + 0xb64)
#define DATA_SEL (FRAME + 0xb68)
#define ZERO_SEL (FRAME + 0xb6c)
#define COMPONENTS (FRAME + 0xb70)

    .text
    .globl ring3_diff_enter
    .type ring3_diff_enter, @function
ring3_diff_enter:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, HOST_RSP
    stmxcsr HOST_MXCSR
    fnstcw HOST_FCW
    movl COMPONENTS, %eax
    xorl %edx, %edx
    xrstor64 XSAVE
    cmpl $0, COMPAT
    je 1f
    movw DATA_SEL, %ds
    movw DATA_SEL, %es
1:  pushq RFLAGS
    popfq
    movq GPR(0), %rax
    movq GPR(1), %rcx
    movq GPR(2), %rdx
    movq GPR(3), %rbx
    movq GPR(5), %rbp
    movq GPR(6), %rsi
    movq GPR(7), %rdi
    movq GPR(8), %r8
    movq GPR(9), %r9
    movq GPR(10), %r10
    movq GPR(11), %r11
    movq GPR(12), %r12
    movq GPR(13), %r13
    movq GPR(14), %r14
    movq GPR(15), %r15
    movq GPR(4), %rsp
    ljmpl *FAR_TARGET        // m16:32, either code selector

    .globl ring3_diff_exit_a
ring3_diff_exit_a:
    movl $0, EXIT_KIND
    jmp 2f
    .globl ring3_diff_exit_b
ring3_diff_exit_b:
    movl $1, EXIT_KIND
2:  movq %rax, GPR(0)
    movq %rcx, GPR(1)
    movq %rdx, GPR(2)
    movq %rbx, GPR(3)
    movq %rsp, GPR(4)
    movq %rbp, GPR(5)
    movq %rsi, GPR(6)
    movq %rdi, GPR(7)
    movq %r8, GPR(8)
    movq %r9, GPR(9)
    movq %r10, GPR(10)
    movq %r11, GPR(11)
    movq %r12, GPR(12)
    movq %r13, GPR(13)
    movq %r14, GPR(14)
    movq %r15, GPR(15)
    movq HOST_RSP, %rsp
    pushfq
    popq RFLAGS
    pushq $2
    popfq
    movl COMPONENTS, %eax
    xorl %edx, %edx
    xsave64 XSAVE
    // Also entered from the signal handler, with the state already taken from the signal frame.
    .globl ring3_diff_leave
ring3_diff_leave:
    pushq $2
    popfq
    cmpl $0, COMPAT
    je 3f
    movw ZERO_SEL, %ds
    movw ZERO_SEL, %es
3:  fninit
    fldcw HOST_FCW
    ldmxcsr HOST_MXCSR
    vzeroupper
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
    .section .note.GNU-stack, "", @progbits
