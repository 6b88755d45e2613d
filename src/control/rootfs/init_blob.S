// The guest's first process, as the build made it from guest/init.c.
    .section .rodata
    .balign 16
    .globl ring3_guest_init_start
    .globl ring3_guest_init_end
ring3_guest_init_start:
    .incbin RING3_GUEST_INIT
ring3_guest_init_end:
    .section .note.GNU-stack, "", @progbits
