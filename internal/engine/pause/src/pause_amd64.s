#include "textflag.h"

// func start()
// The entry point of the process. There is no Go runtime, and the stack is the kernel's: argc, argv[0], …
// R12 is that stack, R13 the namespace, then the numbers of the arguments.
TEXT ·start(SB),NOSPLIT|NOFRAME,$0
	MOVQ SP, R12
	SUBQ $64, SP

	MOVQ $0x14002, AX       // SIGINT (2), SIGTERM (15) and SIGCHLD (17) as a set
	MOVQ AX, 0(SP)
	MOVQ $14, AX            // rt_sigprocmask(SIG_BLOCK, set, NULL, 8)
	XORQ DI, DI
	MOVQ SP, SI
	XORQ DX, DX
	MOVQ $8, R10
	SYSCALL

	MOVQ $0x736e74656e2f, AX // "/netns"
	MOVQ AX, 8(SP)
	MOVQ $2, AX             // open("/netns", O_RDONLY|O_CLOEXEC)
	LEAQ 8(SP), DI
	MOVQ $0x80000, SI
	XORQ DX, DX
	SYSCALL
	CMPQ AX, $-2            // ENOENT: the engine created the pod's network namespace
	JEQ  reap
	CMPQ AX, $0
	JLT  cannotopen
	MOVQ AX, R13

	MOVQ $308, AX           // setns(namespace, CLONE_NEWNET)
	MOVQ R13, DI
	MOVQ $0x40000000, SI
	SYSCALL
	CMPQ AX, $0
	JNE  cannotjoin
	MOVQ $3, AX             // close(namespace)
	MOVQ R13, DI
	SYSCALL

	XORQ R14, R14
bound:
	MOVQ $157, AX           // prctl(PR_CAPBSET_DROP, capability), until the number is unknown
	MOVQ $24, DI
	MOVQ R14, SI
	XORQ DX, DX
	XORQ R10, R10
	XORQ R8, R8
	SYSCALL
	INCQ R14
	CMPQ AX, $0
	JEQ  bound
	CMPQ AX, $-22           // EINVAL
	JNE  cannotdrop

	// The arguments are numbers: user, group, supplementary groups. They go below the frame, four bytes each.
	MOVQ 0(R12), R14        // argc
	CMPQ R14, $3
	JLT  drop
	MOVQ R14, AX
	SHLQ $2, AX
	MOVQ SP, R13
	SUBQ AX, R13            // R13: the numbers
	XORQ R9, R9             // of the argument, without the program's name
number:
	MOVQ 16(R12)(R9*8), SI  // argv[R9+1]
	XORQ AX, AX
digit:
	MOVBLZX 0(SI), DX
	CMPQ DX, $0
	JEQ  next
	IMULQ $10, AX
	ADDQ DX, AX
	SUBQ $48, AX
	INCQ SI
	JMP  digit
next:
	MOVL AX, 0(R13)(R9*4)
	INCQ R9
	LEAQ 1(R9), AX
	CMPQ AX, R14
	JLT  number

	MOVQ $116, AX           // setgroups(argc-3, groups)
	LEAQ -3(R14), DI
	LEAQ 8(R13), SI
	SYSCALL
	CMPQ AX, $0
	JNE  cannotdrop
	MOVQ $106, AX           // setgid(group)
	MOVL 4(R13), DI
	SYSCALL
	CMPQ AX, $0
	JNE  cannotdrop
	MOVQ $105, AX           // setuid(user)
	MOVL 0(R13), DI
	SYSCALL
	CMPQ AX, $0
	JNE  cannotdrop

drop:
	MOVQ $0x20080522, AX    // capset({_LINUX_CAPABILITY_VERSION_3, 0}, none)
	MOVQ AX, 8(SP)
	MOVQ $0, 16(SP)
	MOVQ $0, 24(SP)
	MOVQ $0, 32(SP)
	MOVQ $126, AX
	LEAQ 8(SP), DI
	LEAQ 16(SP), SI
	SYSCALL
	CMPQ AX, $0
	JNE  cannotdrop

reap:                           // first for children that exited before SIGCHLD was blocked
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
	JEQ  done
	CMPQ AX, $15
	JEQ  done
	JMP  wait               // interrupted

done:
	XORQ DI, DI
	JMP  exit
cannotjoin:                     // errno
	NEGQ AX
	MOVQ AX, DI
	JMP  exit
cannotopen:                     // 100 + errno
	NEGQ AX
	LEAQ 100(AX), DI
	JMP  exit
cannotdrop:
	MOVQ $200, DI
exit:
	MOVQ $231, AX           // exit_group
	SYSCALL
	RET
