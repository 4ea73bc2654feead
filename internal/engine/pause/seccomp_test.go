package pause

import (
	"encoding/json"
	"reflect"
	"slices"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// TestSeccompIsStricterThanDockers checks that Docker's default profile allows everything that the
// profile of the pause image allows, for a process with CAP_SYS_ADMIN as the pause process has at
// its start.
func TestSeccompIsStricterThanDockers(t *testing.T) {
	var own seccomp.Seccomp
	if err := json.Unmarshal([]byte(Seccomp), &own); err != nil {
		t.Fatal(err)
	}
	if own.DefaultAction != specs.ActErrno || len(own.ArchMap) > 0 || len(own.Architectures) > 0 {
		t.Errorf("default action %s, architectures %v %v", own.DefaultAction, own.ArchMap, own.Architectures)
	}

	allowed := map[string][][]specs.LinuxSeccompArg{} // argument conditions by system call
	for _, s := range seccomp.DefaultProfile().Syscalls {
		if s.Action == specs.ActAllow && isInForce(s.Includes) {
			for _, name := range s.Names {
				allowed[name] = append(allowed[name], s.Args)
			}
		}
	}

	for _, s := range own.Syscalls {
		if s.Action != specs.ActAllow {
			continue
		}
		for _, name := range s.Names {
			if !isAllowed(allowed[name], s.Args) {
				t.Errorf("Docker's default profile does not allow %s with these arguments", name)
			}
		}
	}
}

// isAllowed reports whether one of the conditions is empty or equal to args.
func isAllowed(conditions [][]specs.LinuxSeccompArg, args []specs.LinuxSeccompArg) bool {
	for _, c := range conditions {
		if len(c) == 0 || reflect.DeepEqual(c, args) {
			return true
		}
	}

	return false
}

// isInForce reports whether a rule applies to a process with CAP_SYS_ADMIN on amd64.
func isInForce(condition *seccomp.Filter) bool {
	if condition == nil {
		return true
	}

	return (len(condition.Caps) == 0 || slices.Contains(condition.Caps, "CAP_SYS_ADMIN")) &&
		(len(condition.Arches) == 0 || slices.Contains(condition.Arches, "amd64"))
}
