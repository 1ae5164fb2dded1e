# From the boot loader (multiboot, 32 bits) to kernel_main in 64 bits: all memory below 4 GB mapped to itself, and what
# the processor has of wide registers and AMX's tiles switched on. Everything runs in ring 0; there are no interrupts.
.set MAGIC, 0x1BADB002
.set FLAGS, 3                       # modules on pages, and a map of memory

.section .multiboot, "a"
.align 4
.long MAGIC, FLAGS, -(MAGIC + FLAGS)

.section .bss
.align 4096
level_4:     .skip 4096
level_3:     .skip 4096
level_2:     .skip 4 * 4096         # 2048 pages of 2 MB
             .skip 65536
stack:                              # of the kernel until the program runs, then of its system calls
saved_stack: .skip 8

.section .rodata
.align 8
descriptors: .quad 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF   # none, code of 64 bits, data
table:       .word 23
             .quad descriptors

.section .text
.code32
.global _start
_start:
    mov %ebx, %esi                  # the loader's information
    movl $level_3 + 3, level_4
    mov $level_2 + 3, %eax
    mov $level_3, %edi
1:  mov %eax, (%edi)
    add $4096, %eax
    add $8, %edi
    cmp $level_3 + 32, %edi
    jne 1b
    xor %ecx, %ecx
2:  mov %ecx, %eax
    shl $21, %eax
    or $0x83, %eax                  # present, writable, 2 MB
    mov %eax, level_2(, %ecx, 8)
    inc %ecx
    cmp $2048, %ecx
    jne 2b
    mov $level_4, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x620, %eax                 # PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $0xC0000080, %ecx
    rdmsr
    or $0x101, %eax                 # EFER: long mode, syscall
    wrmsr
    mov %cr0, %eax
    and $~0xC, %eax                 # no emulation of the floating-point unit
    or $0x80000022, %eax            # paging, its errors as exceptions
    mov %eax, %cr0
    lgdt table
    ljmp $8, $long_mode

.code64
long_mode:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $stack, %rsp
    mov $1, %eax
    cpuid
    bt $26, %ecx                    # XSAVE
    jnc 3f
    mov %cr4, %rax
    or $0x40000, %rax               # OSXSAVE
    mov %rax, %cr4
    mov $0xD, %eax
    xor %ecx, %ecx
    cpuid
    and $0x600E7, %eax              # of x87, SSE, AVX, AVX-512 and AMX, those that are there
    xor %ecx, %ecx
    xor %edx, %edx
    xsetbv
3:  mov %esi, %edi
    call kernel_main

.global enter                       # enter(where, stack): the program begins
enter:
    mov %rsi, %rsp
    xor %edx, %edx
    jmp *%rdi

.global system_call                 # Linux's registers in, C's out; `syscall` left the way back in rcx
system_call:
    mov %rsp, saved_stack           # what lies below it may be in use (the red zone)
    mov $stack, %rsp
    push %rcx
    push %rdi
    push %rsi
    push %rdx
    push %r8
    push %r9
    push %r10
    sub $8, %rsp
    mov %rdx, %rcx
    mov %rsi, %rdx
    mov %rdi, %rsi
    mov %rax, %rdi
    call serve
    add $8, %rsp
    pop %r10
    pop %r9
    pop %r8
    pop %rdx
    pop %rsi
    pop %rdi
    pop %rcx
    mov saved_stack, %rsp
    jmp *%rcx

.global traps                       # 32 entries of 32 bytes: report(number, what the processor pushed)
.align 32
traps:
.set number, 0
.rept 32
.align 32
    mov $number, %edi
    mov %rsp, %rsi
    mov $stack, %rsp
    call report
.set number, number + 1
.endr
.section .note.GNU-stack, "", @progbits
