package sandbox

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// This file compiles seccomp profiles for the pause to BPF (seccomp(2)), without libseccomp. It
// knows the system calls in the profile of the pause image. It leaves out every other rule that
// allows something, so a filter can be stricter than its profile, and never weaker.

// Offsets in struct seccomp_data (linux/seccomp.h).
const (
	offsetNumber = 0
	offsetArch   = 4
	offsetArgs   = 16
)

// maxFilter is BPF_MAXINSNS, the maximum number of instructions.
const maxFilter = 4096

// defaultErrno is the error of denied calls if the profile has none (OCI runtime specification).
const defaultErrno = uint(unix.EPERM)

// required are the calls of a thread of the Go runtime that forks a process. A profile that denies
// one of them would break the server before the pause runs.
var required = []string{
	"close", "dup3", "execve", "exit", "exit_group", "fcntl", "futex", "getpid", "gettid", "madvise", "mmap",
	"mprotect", "munmap", "nanosleep", "prctl", "read", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_yield",
	"sigaltstack", "tgkill", "wait4", "write",
}

// rule is the part of a profile for one system call.
type rule struct {
	allow      bool                      // without a condition
	conditions [][]specs.LinuxSeccompArg // each of them allows the call
	errno      *uint                     // of a rule that denies the call with its own error
}

// compile returns the filter of a profile. It returns an error for a profile that does not deny by
// default, and for one that denies a required call.
func compile(p *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	switch {
	case p.DefaultAction != specs.ActErrno:
		return nil, fmt.Errorf("the default action is %s", p.DefaultAction)
	case len(p.Flags) > 0 || p.ListenerPath != "":
		return nil, errors.New("the profile has flags or a listener")
	}

	rules, err := collect(p.Syscalls)
	if err != nil {
		return nil, err
	}

	for _, name := range required {
		if r := rules[numbers[name]]; r == nil || !r.allow {
			return nil, fmt.Errorf("the profile denies %s", name)
		}
	}

	if !rules[numbers["clone"]].isAllowed() { // Docker's profiles have a condition on the namespaces
		return nil, errors.New("the profile denies clone")
	}

	deny := errnoAction(p.DefaultErrnoRet)
	filter := header(deny)
	for _, number := range slices.Sorted(maps.Keys(rules)) {
		filter = append(filter, rules[number].compile(number)...)
	}

	if filter = append(filter, ret(deny)); len(filter) > maxFilter {
		return nil, fmt.Errorf("the filter has %d instructions", len(filter))
	}

	return filter, nil
}

// collect returns the rules by the number of the system call.
func collect(list []specs.LinuxSyscall) (map[uint32]*rule, error) {
	rules := map[uint32]*rule{}
	for _, s := range list {
		for _, name := range s.Names {
			number, known := numbers[name]
			if !known {
				continue
			}

			if rules[number] == nil {
				rules[number] = &rule{}
			}
			if err := rules[number].add(s); err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
		}
	}

	for number, r := range rules {
		if r.errno != nil && r.isAllowed() {
			return nil, fmt.Errorf("system call %d is allowed and denied", number)
		}
	}

	return rules, nil
}

func (r *rule) add(s specs.LinuxSyscall) error {
	switch {
	case s.Action == specs.ActAllow && len(s.Args) == 0:
		r.allow = true
	case s.Action == specs.ActAllow:
		if !slices.ContainsFunc(s.Args, func(a specs.LinuxSeccompArg) bool { return !isComparable(a) }) {
			r.conditions = append(r.conditions, s.Args)
		}

	case s.Action == specs.ActErrno && len(s.Args) == 0:
		errno := defaultErrno
		if s.ErrnoRet != nil {
			errno = *s.ErrnoRet
		}
		r.errno = &errno

	default:
		return fmt.Errorf("action %s with %d conditions", s.Action, len(s.Args))
	}

	return nil
}

// isAllowed reports whether the rule allows the call, with or without a condition.
func (r *rule) isAllowed() bool { return r != nil && (r.allow || len(r.conditions) > 0) }

func isComparable(a specs.LinuxSeccompArg) bool {
	return a.Index < 6 && (a.Op == specs.OpEqualTo || a.Op == specs.OpMaskedEqual)
}

func errnoAction(errno *uint) uint32 {
	n := defaultErrno
	if errno != nil {
		n = *errno
	}
	return unix.SECCOMP_RET_ERRNO | uint32(n)&unix.SECCOMP_RET_DATA
}

// header denies the calls of other architectures, and loads the number of the call.
func header(deny uint32) []unix.SockFilter {
	out := []unix.SockFilter{load(offsetArch), jump(unix.BPF_JEQ, auditArch, 1, 0), ret(deny), load(offsetNumber)}
	if firstForeign != 0 {
		out = append(out, jump(unix.BPF_JGE, firstForeign, 0, 1), ret(deny))
	}
	return out
}

// compile returns the instructions of a rule. Before and after them the accumulator holds the
// number of the call.
func (r *rule) compile(number uint32) []unix.SockFilter {
	var body []unix.SockFilter
	switch {
	case r.allow:
		body = []unix.SockFilter{ret(unix.SECCOMP_RET_ALLOW)}
	case r.errno != nil:
		body = []unix.SockFilter{ret(errnoAction(r.errno))}
	case len(r.conditions) == 0:
		return nil
	default:
		for _, args := range r.conditions {
			body = append(body, compileArgs(args)...)
		}
		body = append(body, load(offsetNumber))
	}

	return append([]unix.SockFilter{jump(unix.BPF_JEQ, number, 0, uint8(len(body)))}, body...)
}

// compileArgs allows the call if all arguments match. Each comparison has three instructions for
// the low and three for the high half.
func compileArgs(args []specs.LinuxSeccompArg) []unix.SockFilter {
	const perArg = 6
	var out []unix.SockFilter
	for i, a := range args {
		mask, want := ^uint64(0), a.Value
		if a.Op == specs.OpMaskedEqual {
			mask, want = a.Value, a.ValueTwo
		}

		rest := (len(args)-i)*perArg + 1 // up to the end, from this argument on
		for half := range 2 {
			shift := half * 32
			skip := uint8(rest - half*3 - 3)
			out = append(out,
				load(offsetArgs+uint32(a.Index)*8+uint32(half)*4),
				unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: uint32(mask >> shift)},
				jump(unix.BPF_JEQ, uint32(want>>shift), 0, skip))
		}
	}

	return append(out, ret(unix.SECCOMP_RET_ALLOW))
}

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func jump(kind uint16, k uint32, isTrue, isFalse uint8) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | kind | unix.BPF_K, Jt: isTrue, Jf: isFalse, K: k}
}

func ret(action uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: action}
}
