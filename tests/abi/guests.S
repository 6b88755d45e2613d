# Guests of the ABI tests. Real-mode ones run at 0:0x1000 (CS, DS, ES, SS base 0), stack below 0x8000.
# Results go to 0x500 and on; port 0xf4 ends a guest.
    .section .rodata
    .macro guest name
    .balign 16
    .global guest_\name, guest_\name\()_end
guest_\name:
    .set base_\name, guest_\name
    .endm
    .macro end_guest name
guest_\name\()_end:
    .endm
    # x2APIC on, software enable. Clobbers eax, ecx, edx.
    .macro x2apic_on
    movl $0x1b, %ecx
    rdmsr
    orl $0xc00, %eax
    wrmsr
    movl $0x80f, %ecx
    xorl %edx, %edx
    movl $0x1ff, %eax
    wrmsr
    .endm
    # Address of a label of guest \g, loaded at 0x1000.
    .set LOAD, 0x1000

# ---- ports and device memory ----
    .code16
guest pio
    movb $0x42, %al
    outb %al, $0x80
    inb $0x81, %al
    movb %al, 0x500
    movw $0x1234, %dx
    inw %dx, %ax
    movw %ax, 0x502
    inl %dx, %eax
    movl %eax, 0x504
    movl $0x89abcdef, %eax
    outl %eax, %dx
    movw $0x600, %si          # the test's bytes
    movw $5, %cx
    movw $0x3f8, %dx
    cld
    rep outsb
    movw $0x700, %di
    movw $3, %cx
    rep insw
    outb %al, $0xf4
    hlt
end_guest pio

guest mmio                    # ES = 0xa000: nothing but devices; DS = 0x7f00: RAM that ends at 0x80000
    movl $0x11223344, %eax
    movl %eax, %es:0x10
    movl %es:0x20, %ebx
    movl %ebx, 0x500
    addl %eax, %es:0x30       # read, modify, write
    movl %es:0xffe, %ecx      # across two device pages
    movl %ecx, 0x504
    movl %eax, %es:0xffe
    movb %es:0x40, %dl
    movb %dl, 0x508
    pushw %ds
    movw $0x7f00, %bx
    movw %bx, %ds
    movl 0xffe, %ecx         # two bytes of RAM, two of a device
    popw %ds
    movl %ecx, 0x50c
    cld
    pushw %ds
    pushw %es
    movw $0xa000, %bx         # string move out of device memory
    movw %bx, %ds
    xorw %bx, %bx
    movw %bx, %es
    movw $0x50, %si
    movw $0x510, %di
    movw $3, %cx
    rep movsw
    popw %es
    popw %ds
    movw %ss, %bx             # push to and pop from device memory
    movw %sp, %bp
    movw $0xa000, %cx
    movw %cx, %ss
    movw $0x100, %sp
    pushw %ax
    popw %cx
    movw %bx, %ss
    movw %bp, %sp
    movw %cx, 0x520
    outb %al, $0xf4
    hlt
end_guest mmio

guest hlt
    hlt
    movb $0x55, 0x500
    outb %al, $0xf4
    hlt
end_guest hlt

guest spin
    incl 0x500
    jmp guest_spin
end_guest spin

guest idle                    # IF clear: nothing but the VMM ends it
1:  incl 0x500
    hlt
    jmp 1b
end_guest idle

guest triple
    lidtw 0x600               # zeros: a limit of 0
    int $0x20
end_guest triple

guest step
    nop
    incw %ax
    movw $0x1234, %bx
    jmp 1f
    nop
1:  pushw %bx
    popw %cx
    int3
    hlt
end_guest step

guest window                  # interrupts come from KVM_INTERRUPT, vector 0x21
    movw $1f - guest_window + LOAD, 0x21 * 4
    movw $0, 0x21 * 4 + 2
    movw $1000, %cx
2:  loop 2b                   # the window is closed for a while
    sti
    nop
    cli
    movb $1, 0x501
    movw $1000, %cx
3:  loop 3b
    sti
4:  cmpb $2, 0x500
    jne 4b
    outb %al, $0xf4
1:  incb 0x500
    iretw
end_guest window

# ---- interrupts ----
# The vectors 0x20 (count at 0x500), 0x30 (0x504) and NMI (0x508); the 8259s at 0x20 and 0x28.
guest irq
    xorw %ax, %ax
    movw $irq20 - guest_irq + LOAD, 0x20 * 4
    movw %ax, 0x20 * 4 + 2
    movw $irq24 - guest_irq + LOAD, 0x24 * 4
    movw %ax, 0x24 * 4 + 2
    movw $irq30 - guest_irq + LOAD, 0x30 * 4
    movw %ax, 0x30 * 4 + 2
    movw $nmi - guest_irq + LOAD, 2 * 4
    movw %ax, 2 * 4 + 2
    movb $0x11, %al
    outb %al, $0x20
    outb %al, $0xa0
    movb $0x20, %al
    outb %al, $0x21
    movb $0x28, %al
    outb %al, $0xa1
    movb $4, %al
    outb %al, $0x21
    movb $2, %al
    outb %al, $0xa1
    movb $1, %al
    outb %al, $0x21
    outb %al, $0xa1
    movb 0x600, %al           # the test's mask
    outb %al, $0x21
    movb $0xff, %al
    outb %al, $0xa1
    # x2APIC on, software enable, LINT0 = ExtINT
    x2apic_on
    movl $0x835, %ecx
    movl $0x700, %eax
    wrmsr
    cmpb $1, 0x601            # 1: PIT at about 1 kHz
    jne 1f
    movb $0x34, %al
    outb %al, $0x43
    movb $0xa9, %al
    outb %al, $0x40
    movb $4, %al
    outb %al, $0x40
1:  cmpb $2, 0x601            # 2: LAPIC timer, periodic, 1 ms
    jne 1f
    movl $0x83e, %ecx
    movl $0xb, %eax
    wrmsr
    movl $0x832, %ecx
    movl $0x20030, %eax
    wrmsr
    movl $0x838, %ecx
    movl $1000000, %eax
    wrmsr
1:  cmpb $3, 0x601            # 3: TSC deadline, one shot
    jne 1f
    movl $0x832, %ecx
    xorl %edx, %edx
    movl $0x40030, %eax
    wrmsr
    rdtsc
    addl $3000000, %eax
    adcl $0, %edx
    movl $0x6e0, %ecx
    wrmsr
1:  outb %al, $0x90           # ready
    jmp 3f                    # an NMI that came meanwhile is here already, and wakes no HLT
2:  sti
    hlt
    cli
3:  movl 0x500, %eax
    addl 0x504, %eax
    addl 0x508, %eax
    cmpl 0x604, %eax          # how many events end it
    jb 2b
    outb %al, $0xf4
    hlt
irq20:
    incl 0x500
    pushw %ax
    movb $0x20, %al
    outb %al, $0x20
    popw %ax
    iretw
irq24:
    incl 0x500
    pushw %ax
    outb %al, $0x91           # the VMM lowers the line
    movb $0x20, %al
    outb %al, $0x20
    popw %ax
    iretw
irq30:
    incl 0x504
    pushal
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popal
    iretw
nmi:
    incl 0x508
    outb %al, $0x92           # a second NMI arrives here and must wait
    incl 0x50c
    iretw
end_guest irq

# Two vCPUs: the first starts the second (code at 0x9000 is `ap`) and they send each other 0x604 interrupts.
guest bsp
    xorw %ax, %ax
    movw $1f - guest_bsp + LOAD, 0x30 * 4
    movw %ax, 0x30 * 4 + 2
    x2apic_on
    movl $0x830, %ecx
    movl $1, %edx
    movl $0x4500, %eax        # INIT
    wrmsr
    movl $0x4609, %eax        # start-up at 0x9000, twice
    wrmsr
    wrmsr
2:  sti
    hlt
    cli
    movl 0x504, %eax
    cmpl 0x604, %eax
    jb 2b
    outb %al, $0xf4
    hlt
1:  incl 0x504
    pushal
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x830, %ecx
    movl $1, %edx
    movl $0x4031, %eax
    wrmsr
    popal
    iretw
end_guest bsp

guest ap
    movw %cs, %ax
    movw %ax, 0x510
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %ss
    movw $0x7000, %sp
    movw %cs, 0x510
    movw $1f - guest_ap, 0x31 * 4
    movw %cs, 0x31 * 4 + 2
    x2apic_on
    movl $0x830, %ecx
    xorl %edx, %edx
    movl $0x4030, %eax        # the first ball
    wrmsr
2:  sti
    hlt
    jmp 2b
1:  incl 0x508
    pushal
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    movl $0x830, %ecx
    xorl %edx, %edx
    movl $0x4030, %eax
    wrmsr
    popal
    iretw
end_guest ap

# ---- memory ----
guest dirty                   # writes a byte to every page listed at 0x600 (words, frame numbers), then to port 0xf4
    cld
    movw $0x600, %si
1:  lodsw
    testw %ax, %ax
    jz 2f
    shlw $8, %ax
    movw %ax, %es
    movb $0x5a, %es:0x123
    jmp 1b
2:  outb %al, $0xf4
    movw $0x600, %si
    jmp 1b
end_guest dirty

guest watch                   # copies what stands at 0x20000 to 0x500, for ever
    movw $0x2000, %ax
    movw %ax, %es
1:  movl %es:0, %eax
    movl %eax, 0x500
    incl 0x504
    jmp 1b
end_guest watch

guest doorbell
    movw $0xa000, %ax
    movw %ax, %es
    movw $100, %cx
1:  movw %cx, %es:0x50        # any value
    movl $7, %es:0x54         # datamatch 7
    movw $0x5000, %dx
    movl $3, %eax
    outl %eax, %dx
    movb %cl, %es:0x800       # a coalesced zone
    loop 1b
    movl $8, %es:0x54         # no match: an exit
    outb %al, $0xf4
    hlt
end_guest doorbell

# ---- protected and long mode ----
# Integer, x87 and SSE state in motion, in ring 0; EBX rounds. The result goes out at port 0xf5.
    .code32
guest work32
    movl $0x12345678, %eax
    fninit
    fld1
    cvtsi2sd %eax, %xmm1
    pxor %xmm2, %xmm2
    xorl %edx, %edx
1:  movl %eax, %ecx
    shll $13, %ecx
    xorl %ecx, %eax
    movl %eax, %ecx
    shrl $17, %ecx
    xorl %ecx, %eax
    movl %eax, %ecx
    shll $5, %ecx
    xorl %ecx, %eax
    movl %eax, %ecx
    andl $0xffc, %ecx
    addl %eax, 0x20000(%ecx)
    adcl 0x20000(%ecx), %edx
    pushl %edx
    fiaddl (%esp)
    addl $4, %esp
    fld1
    faddp
    cvtsi2sd %edx, %xmm3
    addsd %xmm3, %xmm1
    movd %eax, %xmm4
    paddd %xmm4, %xmm2
    rdtsc
    movl 0x20000(%ecx), %edx
    movl %edx, %eax
    xorl %ebx, %eax
    decl %ebx
    jnz 1b
    fistpl 0x21000
    movsd %xmm1, 0x21008
    movdqa %xmm2, 0x21010
    outb %al, $0xf4
    hlt
end_guest work32

    .code64
guest work64
    movabsq $0x123456789abcdef1, %rax
    movq %rax, %r15
    xorq %r14, %r14
    pxor %xmm9, %xmm9
1:  movq %r15, %rcx
    shlq $13, %rcx
    xorq %rcx, %r15
    movq %r15, %rcx
    shrq $7, %rcx
    xorq %rcx, %r15
    movq %r15, %rcx
    shlq $17, %rcx
    xorq %rcx, %r15
    movq %r15, %rcx
    andl $0xff8, %ecx
    leaq 0x20000(%rcx), %rdi
    addq %r15, (%rdi)
    adcq (%rdi), %r14
    pushq %r14
    popq %rdx
    movq %rdx, %xmm8
    paddq %xmm8, %xmm9
    decl %ebx
    jnz 1b
    movq %r14, 0x21000
    movdqu %xmm9, 0x21008
    movq %r15, 0x21018
    outb %al, $0xf4
    hlt
end_guest work64

# Interrupts on, port 0x90, then a loop that nothing but an interrupt ends: its handler stands 64 bytes in.
guest spin64
    x2apic_on
    sti
    nop
    outb %al, $0x90
1:  jmp 1b
    .org guest_spin64 + 64
    outb %al, $0xf4
    hlt
end_guest spin64

# Interrupts on, port 0x90, then waiting. The handler 64 bytes in counts at 0x504 and ends its interrupt; that 128 bytes in
# counts at 0x508 and tells by port 0x91.
guest lapic64
    x2apic_on
    sti
    nop
    outb %al, $0x90
1:  hlt
    jmp 1b
    .macro end_of_interrupt
    pushq %rax
    pushq %rcx
    pushq %rdx
    movl $0x80b, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr
    popq %rdx
    popq %rcx
    popq %rax
    .endm
    .org guest_lapic64 + 64
    incl 0x504
    end_of_interrupt
    iretq
    .org guest_lapic64 + 128
    incl 0x508
    end_of_interrupt
    outb %al, $0x91
    iretq
end_guest lapic64

# Interrupts of its own, vector 0x30 by the SELF IPI register, as many as 0x600 says; then port 0x91, one more of vector 0x31,
# and the LAPIC's ISR to 0x21000. The handlers stand 256 and 384 bytes in. Each counts at 0x504; where the bit at 0x22000
# was set it clears it, and counts at 0x508, else it writes EOI. The second tells by port 0x92 first.
guest pv_eoi
    x2apic_on
    movl $0x4b564d04, %ecx
    xorl %edx, %edx
    movl $0x22001, %eax
    wrmsr
    sti
    movl 0x600, %ebx
    movl $0x83f, %ecx
1:  movl $0x30, %eax
    xorl %edx, %edx
    wrmsr
    nop
    decl %ebx
    jnz 1b
    outb %al, $0x91
    movl $0x31, %eax
    wrmsr
    nop
    movl $0x811, %ecx
    rdmsr
    movl %eax, 0x21000
    outb %al, $0xf4
    hlt
    .macro pv_end_of_interrupt
    incl 0x504
    lock btrl $0, 0x22000
    jc 1f
    end_of_interrupt
    iretq
1:  incl 0x508
    iretq
    .endm
    .org guest_pv_eoi + 256
    pv_end_of_interrupt
    .org guest_pv_eoi + 384
    outb %al, $0x92
    pv_end_of_interrupt
end_guest pv_eoi

# KVM_HC_MAP_GPA_RANGE of two pages; of none; from the middle of one.
guest map_gpa_range
    .macro map_range from, pages, answer
    movl $12, %eax
    movl $\from, %ebx
    movl $\pages, %ecx
    movl $0x10, %edx
    vmcall
    movq %rax, \answer
    .endm
    map_range 0x5000, 2, 0x21000
    map_range 0x5000, 0, 0x21008
    map_range 0x5001, 1, 0x21010
    outb %al, $0xf4
    hlt
end_guest map_gpa_range

# IPIs by hypercall: to APICs 0 and 64 (where none is), to nobody, in a form that is refused. The handler 256 bytes in
# counts at 0x504.
guest ipi_hypercall
    x2apic_on
    sti
    .macro send_ipis low, high, lowest, icr, answer
    movl $10, %eax
    movq $\low, %rbx
    movq $\high, %rcx
    movl $\lowest, %edx
    movl $\icr, %esi
    vmcall
    movq %rax, \answer
    .endm
    send_ipis 1, 1, 0, 0x30, 0x21000
    send_ipis 4, 0, 0xfffffffe, 0x30, 0x21008
    send_ipis -1, 0, 0xffffffff, 0, 0x21010
    send_ipis 1, 0, 0, 0x40030, 0x21018
    nop
    outb %al, $0xf4
    hlt
    .org guest_ipi_hypercall + 256
    incl 0x504
    end_of_interrupt
    iretq
end_guest ipi_hypercall

    .macro write_msr index, value
    movl $\index, %ecx
    movl $\value, %eax
    xorl %edx, %edx
    wrmsr
    .endm

# Xen's hypercall 17 by instruction and 20 by the page at 0x36000, then Hyper-V's SignalEvent, badly aligned, by the page at 0x37000.
guest xen_hypercalls
    movl $17, %eax
    movl $0x101, %edi
    movl $0x102, %esi
    movl $0x103, %edx
    movl $0x104, %r10d
    movl $0x105, %r8d
    movl $0x106, %r9d
    vmcall
    movq %rax, 0x21000
    write_msr 0x40000200, 0x36000
    write_msr 0x40000000, 0x5a
    write_msr 0x40000001, 0x37001
    movl $0x36000 + 20 * 32, %ebx
    call *%rbx
    movq %rax, 0x21008
    xorl %eax, %eax
    movl $0x5d, %ecx
    movl $0x5a5a5a5a, %edx
    movl $0x37000, %ebx
    call *%rbx
    movq %rax, 0x21010
    outb %al, $0xf4
    hlt
end_guest xen_hypercalls

# The LAPIC on, port 0x90; then ports 0x92 and 0x93 with the count, on and on. The handler 256 bytes in counts at 0x504, port 0x91.
guest async_pf
    x2apic_on
    sti
    xorl %eax, %eax
    outb %al, $0x90
1:  nop
    movb 0x504, %al
    outb %al, $0x92
    movb 0x504, %al
    outb %al, $0x93
    jmp 1b
    .org guest_async_pf + 256
    incl 0x504
    end_of_interrupt
    movb 0x504, %al
    outb %al, $0x91
    iretq
end_guest async_pf

# Ready, port 0x90; then waiting. The handler 256 bytes in takes note of Xen's events (vcpu_info at 0x22000), counts at 0x504, port 0x91.
    .macro xen_handler name
    .org guest_\name + 256
    movb $0, 0x22000
    movq $0, 0x22008
    incl 0x504
    .endm
guest xen_upcalls
    sti
    nop
    xorl %eax, %eax
    outb %al, $0x90
1:  hlt
    jmp 1b
    xen_handler xen_upcalls
    outb %al, $0x91
    iretq
end_guest xen_upcalls

# Says itself that it has an event, then asks for Xen's version; how many upcalls came by the next instruction goes to 0x508.
guest xen_forced_upcall
    sti
    movb $1, 0x22000
    movl $17, %eax
    xorl %edi, %edi
    vmcall
    movl 0x504, %ebx
    movl %ebx, 0x508
    movq %rax, 0x21000
    outb %al, $0xf4
    hlt
    xen_handler xen_forced_upcall
    iretq
end_guest xen_forced_upcall

# EVTCHNOP_send of what stands at 0x24000, port 0x90, SCHEDOP_poll of what stands at 0x24010.
guest xen_send_and_poll
    movl $32, %eax
    movl $4, %edi
    movl $0x24000, %esi
    vmcall
    movq %rax, 0x21000
    xorl %eax, %eax
    outb %al, $0x90
    movl $29, %eax
    movl $3, %edi
    movl $0x24010, %esi
    vmcall
    movq %rax, 0x21008
    outb %al, $0xf4
    hlt
    xen_handler xen_send_and_poll
    iretq
end_guest xen_send_and_poll

    .code32
guest xen_send32
    movl $32, %eax
    movl $4, %ebx
    movl $0x24000, %ecx
    vmcall
    movl %eax, 0x21000
    outb %al, $0xf4
    hlt
end_guest xen_send32
    .code64

# PostMessage by the page at 0x36000; the SynIC on, its source 2 unmasked with vector 0x30, port 0x90; then waiting. The handler 256 bytes in
# counts at 0x504 and tells by port 0x91.
guest hyperv_sint
    x2apic_on
    write_msr 0x40000000, 0x5a
    write_msr 0x40000001, 0x36001
    movl $0x5c, %ecx
    movl $0x22000, %edx
    movl $0x23000, %r8d
    movl $0x36000, %ebx
    call *%rbx
    movq %rax, 0x21000
    write_msr 0x40000080, 1
    write_msr 0x40000092, 0x30
    sti
    nop
    outb %al, $0x90
1:  hlt
    jmp 1b
    .org guest_hyperv_sint + 256
    incl 0x504
    end_of_interrupt
    outb %al, $0x91
    iretq
end_guest hyperv_sint

# KVM_HC_CLOCK_PAIRING to 0x22000 between two readings of the TSC; of another clock; to where no memory is.
guest pair_clocks
    .macro pair to, clock, answer
    movl $9, %eax
    movl $\to, %ebx
    movl $\clock, %ecx
    vmcall
    movq %rax, \answer
    .endm
    .macro read_tsc to
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, \to
    .endm
    read_tsc 0x21000
    pair 0x22000, 0, 0x21008
    read_tsc 0x21010
    pair 0x22000, 1, 0x21018
    pair 0x10000000, 0, 0x21020
    outb %al, $0xf4
    hlt
end_guest pair_clocks

guest hypercall
    movl $0x4b564d01, %ecx    # kvmclock page at 0x22000
    xorl %edx, %edx
    movl $0x22001, %eax
    wrmsr
    movl $1, %eax             # VAPIC_POLL_IRQ: 0
    vmcall
    movq %rax, 0x21000
    movl $999, %eax           # unknown: -1000
    vmmcall
    movq %rax, 0x21008
    rdtsc
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, 0x21010
    movl $0x10, %ecx
    rdmsr
    shlq $32, %rdx
    orq %rdx, %rax
    movq %rax, 0x21018
    movl $0x40000000, %eax
    cpuid
    movl %ebx, 0x21020
    outb %al, $0xf4
    hlt
end_guest hypercall

# A loop of which another vCPU changes the immediate, aligned, at LOAD + 4: what it reads goes to 0x20000, anything but
# the two values that are written to 0x20010. 0x20008 ends it.
guest patched
    nop
    nop
    nop
1:  movl $0x11111111, %eax
    movl %eax, 0x20000
    cmpl $0x11111111, %eax
    je 2f
    cmpl $0x22222222, %eax
    je 2f
    movl %eax, 0x20010
2:  cmpl $0, 0x20008
    je 1b
    outb %al, $0xf4
    hlt
end_guest patched

# Writes one value and the other in turn into the loop above, R8D times, and waits each time until it is seen.
guest patcher
    movl $0x22222222, %ebx
1:  movl %ebx, LOAD + 4
2:  cmpl %ebx, 0x20000
    je 3f
    pause
    cmpl $0, 0x20008          # the test gave up
    je 2b
    hlt
3:  xorl $0x33333333, %ebx
    incl 0x20004
    decl %r8d
    jnz 1b
    movl $1, 0x20008
    outb %al, $0xf4
    hlt
end_guest patcher

# The VMM changes the immediate at LOAD + 4 while it has the vCPU.
guest dma
    nop
    nop
    nop
1:  movl $0x11111111, %eax
    outb %al, $0x90
    jmp 1b
end_guest dma

# The VMM changes the immediate at LOAD + 4 while this runs; a word at 0x20004 ends it.
guest dma_running
    nop
    nop
    nop
1:  movl $0x11111111, %eax
    movl %eax, 0x20000
    cmpl $0, 0x20004
    je 1b
    outb %al, $0xf4
    hlt
end_guest dma_running

# The LAPIC's id register, from its page.
    .code32
guest lapic_page
    movl 0xfee00020, %eax
    movl %eax, 0x21000
    outb %al, $0xf4
    hlt
end_guest lapic_page

    .section .note.GNU-stack,"",@progbits
