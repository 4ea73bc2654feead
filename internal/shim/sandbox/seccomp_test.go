package sandbox

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// profile is the profile of the pause image, in the form of the OCI specification. Docker resolves
// its conditions on architectures.
func profile(t *testing.T) *specs.LinuxSeccomp {
	t.Helper()
	text, err := os.ReadFile("../../engine/pause/seccomp.json")
	if err != nil {
		t.Fatal(err)
	}

	p := &specs.LinuxSeccomp{}
	if err := json.Unmarshal(text, p); err != nil {
		t.Fatal(err)
	}

	return p
}

// run returns the result of a filter for a system call.
func run(t *testing.T, filter []unix.SockFilter, arch, number uint32, args ...uint64) uint32 {
	t.Helper()
	var raw []bpf.RawInstruction
	for _, f := range filter {
		raw = append(raw, bpf.RawInstruction{Op: f.Code, Jt: f.Jt, Jf: f.Jf, K: f.K})
	}

	program, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the filter has unknown instructions")
	}

	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}

	// The kernel loads words in its own byte order, the VM in that of the network.
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data[offsetNumber:], number)
	binary.BigEndian.PutUint32(data[offsetArch:], arch)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[offsetArgs+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[offsetArgs+8*i+4:], uint32(a>>32))
	}

	n, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}

	return uint32(n)
}

const (
	denied  = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	noSys   = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
	allowed = uint32(unix.SECCOMP_RET_ALLOW)
)

func TestCompile(t *testing.T) {
	filter, err := compile(profile(t))
	if err != nil {
		t.Fatal(err)
	}

	const namespaces = 0x7e020000 // all CLONE_NEW* flags but CLONE_NEWTIME
	for name, c := range map[string]struct {
		arch, number uint32
		arg          uint64
		want         uint32
	}{
		"allowed":              {auditArch, unix.SYS_FUTEX, 0, allowed},
		"last allowed":         {auditArch, numbers["rseq"], 0, allowed},
		"denied":               {auditArch, unix.SYS_MOUNT, 0, denied},
		"other architecture":   {auditArch + 1, unix.SYS_FUTEX, 0, denied},
		"clone of a process":   {auditArch, unix.SYS_CLONE, unix.CLONE_VFORK | unix.CLONE_VM | 17, allowed},
		"clone of a namespace": {auditArch, unix.SYS_CLONE, unix.CLONE_NEWUSER, denied},
		"clone of all":         {auditArch, unix.SYS_CLONE, namespaces, denied},
		"its own error":        {auditArch, unix.SYS_CLONE3, 0, noSys},
		"number of x32":        {auditArch, unix.SYS_FUTEX | 0x40000000, 0, denied},
		"negative number":      {auditArch, 1<<32 - 1, 0, denied},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, filter, c.arch, c.number, c.arg); got != c.want {
				t.Errorf("result %#x, want %#x", got, c.want)
			}
		})
	}
}

// TestCompileConditions checks both halves of several arguments, and several alternatives.
func TestCompileConditions(t *testing.T) {
	p := profile(t)
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{
		Names:  []string{"clone"},
		Action: specs.ActAllow,
		Args: []specs.LinuxSeccompArg{
			{Index: 0, Value: 0x1_0000_0002 | unix.CLONE_NEWUSER, Op: specs.OpEqualTo},
			{Index: 2, Value: 0xf0_0000_00f0, ValueTwo: 0x30_0000_0030, Op: specs.OpMaskedEqual},
		},
	})

	filter, err := compile(p)
	if err != nil {
		t.Fatal(err)
	}

	const first, second = 0x1_0000_0002 | unix.CLONE_NEWUSER, 0x35_0000_0036
	for name, c := range map[string]struct {
		first, second uint64
		want          uint32
	}{
		"all match":         {first, second, allowed},
		"low half, first":   {first ^ 1, second, denied},
		"high half, first":  {first ^ 1<<33, second, denied},
		"low half, second":  {first, second ^ 0x10, denied},
		"high half, second": {first, second ^ 0x10<<32, denied},
		"other alternative": {17, 0, allowed},
	} {
		t.Run(name, func(t *testing.T) {
			if got := run(t, filter, auditArch, unix.SYS_CLONE, c.first, 0, c.second); got != c.want {
				t.Errorf("result %#x, want %#x", got, c.want)
			}
		})
	}
}

func TestCompileRejects(t *testing.T) {
	for name, change := range map[string]func(*specs.LinuxSeccomp){
		"allows by default": func(p *specs.LinuxSeccomp) { p.DefaultAction = specs.ActAllow },
		"kills by default":  func(p *specs.LinuxSeccomp) { p.DefaultAction = specs.ActKillProcess },
		"flags":             func(p *specs.LinuxSeccomp) { p.Flags = []specs.LinuxSeccompFlag{"X"} },
		"listener":          func(p *specs.LinuxSeccomp) { p.ListenerPath = "/run/x" },
		"denies nearly all": func(p *specs.LinuxSeccomp) { p.Syscalls = p.Syscalls[1:] },
		"kills a call": func(p *specs.LinuxSeccomp) {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActKill})
		},
		"allows and denies": func(p *specs.LinuxSeccomp) {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"read"}, Action: specs.ActErrno})
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := profile(t)
			change(p)
			if _, err := compile(p); err == nil {
				t.Error("the profile was compiled")
			}
		})
	}
}

// TestUnknownConditionsAreLeftOut checks that a rule with an unknown condition allows nothing.
func TestUnknownConditionsAreLeftOut(t *testing.T) {
	p := profile(t)
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{
		Names:  []string{"clone3"},
		Action: specs.ActAllow,
		Args:   []specs.LinuxSeccompArg{{Index: 0, Value: 1, Op: specs.OpGreaterThan}},
	})

	filter, err := compile(p)
	if err != nil {
		t.Fatal(err)
	}
	if got := run(t, filter, auditArch, unix.SYS_CLONE3, 2); got == allowed {
		t.Error("the call is allowed")
	}
}
