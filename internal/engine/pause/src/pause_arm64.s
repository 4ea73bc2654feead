#include "textflag.h"

// func start()
// The entry point of the process. There is no Go runtime, and the stack is the kernel's: argc, argv[0], …
// R20 is that stack, R21 the namespace, then the numbers of the arguments.
TEXT ·start(SB),NOSPLIT|NOFRAME,$0
	MOVD RSP, R20
	SUB  $64, RSP

	MOVD $0x14002, R0       // SIGINT (2), SIGTERM (15) and SIGCHLD (17) as a set
	MOVD R0, (RSP)
	MOVD $135, R8           // rt_sigprocmask(SIG_BLOCK, set, NULL, 8)
	MOVD ZR, R0
	MOVD RSP, R1
	MOVD ZR, R2
	MOVD $8, R3
	SVC  $0

	MOVD $0x736e74656e2f, R0 // "/netns"
	MOVD R0, 8(RSP)
	MOVD $56, R8            // openat(AT_FDCWD, "/netns", O_RDONLY|O_CLOEXEC)
	MOVD $-100, R0
	ADD  $8, RSP, R1
	MOVD $0x80000, R2
	MOVD ZR, R3
	SVC  $0
	CMN  $2, R0             // ENOENT: the engine created the pod's network namespace
	BEQ  reap
	CMP  $0, R0
	BLT  cannotopen
	MOVD R0, R21

	MOVD $268, R8           // setns(namespace, CLONE_NEWNET)
	MOVD $0x40000000, R1
	SVC  $0
	CBNZ R0, cannotjoin
	MOVD $57, R8            // close(namespace)
	MOVD R21, R0
	SVC  $0

	MOVD ZR, R22
bound:
	MOVD $167, R8           // prctl(PR_CAPBSET_DROP, capability), until the number is unknown
	MOVD $24, R0
	MOVD R22, R1
	MOVD ZR, R2
	MOVD ZR, R3
	MOVD ZR, R4
	SVC  $0
	ADD  $1, R22
	CBZ  R0, bound
	CMN  $22, R0            // EINVAL
	BNE  cannotdrop

	// The arguments are numbers: user, group, supplementary groups. They go below the frame, four bytes each.
	MOVD (R20), R22         // argc
	CMP  $3, R22
	BLT  drop
	MOVD RSP, R21
	SUB  R22<<2, R21        // R21: the numbers
	ADD  $16, R20, R23      // R23: pointer to the next argument
	MOVD R21, R24           // R24: destination of its number
	SUB  $1, R22, R25       // R25: remaining arguments
	MOVD $10, R26
number:
	MOVD.P 8(R23), R1
	MOVD ZR, R0
digit:
	MOVBU.P 1(R1), R2
	CBZ  R2, next
	MUL  R26, R0
	ADD  R2, R0
	SUB  $48, R0
	B    digit
next:
	MOVW.P R0, 4(R24)
	SUB  $1, R25
	CBNZ R25, number

	MOVD $159, R8           // setgroups(argc-3, groups)
	SUB  $3, R22, R0
	ADD  $8, R21, R1
	SVC  $0
	CBNZ R0, cannotdrop
	MOVD $144, R8           // setgid(group)
	MOVWU 4(R21), R0
	SVC  $0
	CBNZ R0, cannotdrop
	MOVD $146, R8           // setuid(user)
	MOVWU (R21), R0
	SVC  $0
	CBNZ R0, cannotdrop

drop:
	MOVD $0x20080522, R0    // capset({_LINUX_CAPABILITY_VERSION_3, 0}, none)
	MOVD R0, 8(RSP)
	MOVD ZR, 16(RSP)
	MOVD ZR, 24(RSP)
	MOVD ZR, 32(RSP)
	MOVD $91, R8
	ADD  $8, RSP, R0
	ADD  $16, RSP, R1
	SVC  $0
	CBNZ R0, cannotdrop

reap:                           // first for children that exited before SIGCHLD was blocked
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
	BEQ  done
	CMP  $15, R0
	BEQ  done
	B    wait               // interrupted

done:
	MOVD ZR, R0
	B    exit
cannotjoin:                     // errno
	NEG  R0, R0
	B    exit
cannotopen:                     // 100 + errno
	NEG  R0, R0
	ADD  $100, R0
	B    exit
cannotdrop:
	MOVD $200, R0
exit:
	MOVD $94, R8            // exit_group
	SVC  $0
	RET
