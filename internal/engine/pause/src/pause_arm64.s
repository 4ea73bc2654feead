#include "textflag.h"

// func start()
// Entered as the process's first instruction: there is no Go runtime, and the stack is the kernel's.
TEXT ·start(SB),NOSPLIT|NOFRAME,$0
	SUB  $16, RSP
	MOVD $0x14002, R0       // SIGINT (2), SIGTERM (15) and SIGCHLD (17) as a set
	MOVD R0, (RSP)

	MOVD $135, R8           // rt_sigprocmask(SIG_BLOCK, set, NULL, 8)
	MOVD ZR, R0
	MOVD RSP, R1
	MOVD ZR, R2
	MOVD $8, R3
	SVC  $0

reap:                           // at first for children that ended before SIGCHLD was blocked
	MOVD $260, R8           // wait4(-1, NULL, WNOHANG, NULL)
	MOVD $-1, R0
	MOVD ZR, R1
	MOVD $1, R2
	MOVD ZR, R3
	SVC  $0
	CMP  $0, R0
	BGT  reap

wait:
	MOVD $137, R8           // rt_sigtimedwait(set, NULL, NULL, 8)
	MOVD RSP, R0
	MOVD ZR, R1
	MOVD ZR, R2
	MOVD $8, R3
	SVC  $0
	CMP  $17, R0
	BEQ  reap
	CMP  $2, R0
	BEQ  exit
	CMP  $15, R0
	BEQ  exit
	B    wait               // interrupted

exit:
	MOVD $94, R8            // exit_group(0)
	MOVD ZR, R0
	SVC  $0
	RET
