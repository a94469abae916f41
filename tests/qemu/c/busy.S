/*
 * A firmware that is all there is of a guest: it fills the memory from 1 MiB to END, so that there
 * is something to send, and then counts in EBX, and writes the count to the last page before END.
 * It touches nothing else, and nothing makes the processor forget where its pages are.
 */
	.set HERE, 0xf0000

	.code16
	cli
	lgdtl %cs:table
	mov %cr0, %eax
	or $1, %eax
	mov %eax, %cr0
	ljmpl $8, $(HERE + flat)

	.code32
flat:
	mov $16, %ax
	mov %ax, %ds
	mov %ax, %es
	cld
	mov $0x100000, %edi
	mov $(END - 0x100000) / 4, %ecx
	mov $0x12345678, %eax
	rep stosl
	xor %ebx, %ebx
count:
	inc %ebx
	mov %ebx, END - 4096
	mov $200, %ecx
wait:
	dec %ecx
	jnz wait
	jmp count

	.balign 8
segments:
	.quad 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
table:
	.word table - segments - 1
	.long HERE + segments

	.org 0xfff0	/* where a processor begins */
	.code16
	.byte 0xe9
	.word -0xfff3
	.org 0x10000
