#include "textflag.h"

// func start()
// Entered as the process's first instruction: there is no Go runtime, and the stack is the kernel's.
TEXT ·start(SB),NOSPLIT|NOFRAME,$0
	SUBQ $16, SP
	MOVQ $0x14002, AX       // SIGINT (2), SIGTERM (15) and SIGCHLD (17) as a set
	MOVQ AX, 0(SP)

	MOVQ $14, AX            // rt_sigprocmask(SIG_BLOCK, set, NULL, 8)
	XORQ DI, DI
	MOVQ SP, SI
	XORQ DX, DX
	MOVQ $8, R10
	SYSCALL

reap:                           // at first for children that ended before SIGCHLD was blocked
	MOVQ $61, AX            // wait4(-1, NULL, WNOHANG, NULL)
	MOVQ $-1, DI
	XORQ SI, SI
	MOVQ $1, DX
	XORQ R10, R10
	SYSCALL
	CMPQ AX, $0
	JGT  reap

wait:
	MOVQ $128, AX           // rt_sigtimedwait(set, NULL, NULL, 8)
	MOVQ SP, DI
	XORQ SI, SI
	XORQ DX, DX
	MOVQ $8, R10
	SYSCALL
	CMPQ AX, $17
	JEQ  reap
	CMPQ AX, $2
	JEQ  exit
	CMPQ AX, $15
	JEQ  exit
	JMP  wait               // interrupted

exit:
	MOVQ $231, AX           // exit_group(0)
	XORQ DI, DI
	SYSCALL
	RET
