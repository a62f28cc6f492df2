/*
 * A kernel that runs VMRUN on one control block after another and says how each ended.
 *
 * Loaded by multiboot with one module:
 *   u64 address, u64 size      where the image goes, its length (pages)
 *   size bytes                 the image: the VMCB in its first page, then maps, page tables and guest code
 *   cases: u64 count, count * { u32 offset, u32 width, u64 value }   count = -1 ends them
 * For each case the image is copied afresh, the patches are written into it, and VMRUN runs on its first page.
 * Out on port 0xe9: CPUID leaves as { u32 leaf, u32 subleaf, eax, ebx, ecx, edx }, a leaf of -1, then a u64 EXITCODE a case, then "END!".
 */
        .set    MAGIC, 0x1BADB002
        .set    FLAGS, 3
        .set    HSAVE, 0x800000
        .set    EFER, 0xC0000080
        .set    VM_HSAVE_PA, 0xC0010117

        .section .text
        .code32
        .align  4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)

        .globl  _start
_start:
        movl    $stack, %esp
        movl    24(%ebx), %esi          /* mods_addr */
        movl    (%esi), %esi            /* mod_start */
        movl    %esi, module

        movl    $pdpt + 3, pml4         /* 1 GiB, 1:1, in pages of 2 MiB */
        movl    $pd + 3, pdpt
        movl    $pd, %edi
        movl    $0x83, %eax
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        cmpl    $0x40000083, %eax
        jne     1b

        movl    %cr4, %eax
        orl     $0x620, %eax
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $EFER, %ecx
        rdmsr
        orl     $0x1900, %eax           /* SVME NXE LME */
        wrmsr
        movl    %cr0, %eax
        orl     $0x80010001, %eax
        movl    %eax, %cr0
        lgdt    gdtr
        ljmp    $8, $long_mode

        .code64
long_mode:
        movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movb    $0xff, %al              /* no interrupts from the PICs */
        outb    %al, $0x21
        outb    %al, $0xa1
        movl    $VM_HSAVE_PA, %ecx
        movl    $HSAVE, %eax
        xorl    %edx, %edx
        wrmsr

        leaq    leaves(%rip), %rsi
next_leaf:
        movl    (%rsi), %eax
        movl    4(%rsi), %ecx
        movl    %eax, registers(%rip)
        movl    %ecx, registers+4(%rip)
        cmpl    $-1, %eax
        je      1f
        cpuid
        movl    %eax, registers+8(%rip)
        movl    %ebx, registers+12(%rip)
        movl    %ecx, registers+16(%rip)
        movl    %edx, registers+20(%rip)
1:      pushq   %rsi
        leaq    registers(%rip), %rsi
        movl    $24, %ecx
        call    emit
        popq    %rsi
        addq    $8, %rsi
        cmpl    $-1, -8(%rsi)
        jne     next_leaf

        movl    module(%rip), %esi
        movq    8(%rsi), %rcx
        leaq    16(%rsi,%rcx), %rax
        movq    %rax, cursor(%rip)

next_case:
        movl    module(%rip), %esi
        movq    (%rsi), %rdi
        movq    8(%rsi), %rcx
        movq    %rdi, %rbx
        addq    $16, %rsi
        shrq    $3, %rcx
        cld
        rep movsq

        movq    cursor(%rip), %rsi
        movq    (%rsi), %rcx
        addq    $8, %rsi
        cmpq    $-1, %rcx
        je      done
patch:  testq   %rcx, %rcx
        jz      run
        pushq   %rcx
        movl    (%rsi), %edi
        movl    4(%rsi), %ecx
        addq    %rbx, %rdi
        addq    $8, %rsi
        movq    %rsi, %rdx
        rep movsb
        leaq    8(%rdx), %rsi
        popq    %rcx
        decq    %rcx
        jmp     patch

run:    movq    %rsi, cursor(%rip)
        movq    %rbx, vmcb(%rip)
        movq    %rbx, %rax
        vmrun
        movq    vmcb(%rip), %rsi
        addq    $0x70, %rsi
        movl    $8, %ecx
        call    emit
        jmp     next_case

done:   leaq    end(%rip), %rsi
        movl    $4, %ecx
        call    emit
        movl    $0xf4, %edx
        outb    %al, %dx
1:      hlt
        jmp     1b

emit:   movl    $0xe9, %edx
1:      lodsb
        outb    %al, %dx
        decl    %ecx
        jnz     1b
        ret

        .align  8
gdt:    .quad   0, 0x00af9a000000ffff, 0x00cf92000000ffff
gdtr:   .word   gdtr - gdt - 1
        .long   gdt
leaves: .long   0,0, 1,0, 7,0, 7,1, 0x80000000,0, 0x80000001,0, 0x80000008,0, 0x8000000a,0, 0x8000001f,0, 0x80000021,0, -1,-1
end:    .ascii  "END!"

        .section .bss
        .align  4096
pml4:   .skip   4096
pdpt:   .skip   4096
pd:     .skip   4096
module: .skip   8
cursor: .skip   8
vmcb:   .skip   8
registers: .skip 24
        .skip   4096
stack:
