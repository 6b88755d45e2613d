/* The probe's guest: real mode at 0x1000, then protected, then long mode, then a ring-0 loop that
   counts its rounds at 0x3000. Page tables stand ready at 0x4000 (PML4), 0x5000, 0x6000. */
        .section .rodata
        .globl  ring3_probe_guest, ring3_probe_guest_end
        .balign 16
#define AT(sym) (sym - ring3_probe_guest + 0x1000)
ring3_probe_guest:
        .code16
        cli
        lgdtl   AT(gdt_pointer)
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $0x08, $AT(protected)
        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    %cr4, %eax
        orl     $0x20, %eax             /* PAE */
        movl    %eax, %cr4
        movl    $0x4000, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       /* EFER.LME */
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        ljmpl   $0x18, $AT(long_mode)
        .code64
long_mode:
        movl    $0x3000, %edi
        movl    $1, %ebx
1:      addq    %rbx, %rax
        xorq    %rax, %rdx
        leaq    (%rax,%rdx,2), %rsi
        shrq    $3, %rsi
        movq    %rsi, 64(%rdi)
        addq    64(%rdi), %rcx
        incq    (%rdi)
        jmp     1b
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      /* 08: 32-bit code */
        .quad   0x00cf93000000ffff      /* 10: data */
        .quad   0x00af9b000000ffff      /* 18: 64-bit code */
gdt_pointer:
        .word   31
        .long   AT(gdt)
ring3_probe_guest_end:
        .section .note.GNU-stack, "", @progbits
