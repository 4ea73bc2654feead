package archtest

import (
	"go/ast"
	"go/types"
	"strings"
	"testing"
)

// recordReaders are the functions of cri that may get a record from the view by its ID, without a
// lock. All others get it with the lock (lockSandbox, lockContainer), so that what they change is
// what they have seen.
var recordReaders = map[string]string{
	"(*internal/cri.Service).awaitJoined":           "asks whether the pause still runs; the call has the lock",
	"(*internal/cri.Service).ContainerStatus":       "reads only",
	"(internal/cri.completer).hasNothingToComplete": "saves the lock; the record is read again with it",
	"(internal/cri.recovery).IsRemoved":             "asks whether the sandbox exists",
	"(*internal/cri.gate).lockContainer":            "the gate itself",
	"(*internal/cri.gate).lockSandbox":              "the gate itself",
	"(*internal/cri.Service).OpenNetNS":             "opens a namespace by its pin or a verified process",
	"(*internal/cri.gate).renew":                    "the call has the lock",
	"(*internal/cri.gate).runningContainer":         "an exec or attach changes nothing of the record",
	"(*internal/cri.gate).runningSandbox": "asks whether the pod is ready, before and after a " +
		"container is made or started",
	"(internal/cri.recovery).Sandbox":    "podnet reads again under the lock of the network",
	"(*internal/cri.gate).sandboxID":     "resolves the ID for the gate",
	"(*internal/cri.gate).checkPodStop":  "asks when the pod stopped",
	"(*internal/cri.Service).startPause": "the call has the lock",
	"(*internal/cri.Service).StopContainer": "uses the ID; a stop waits for nobody but a start that is " +
		"under way",
	"(*internal/cri.Service).translateContainer":        "asks whether the container exists",
	"(*internal/cri.Service).UpdatePodSandboxResources": "asks whether the sandbox exists",
	"(*internal/cri.gate).WhileRunning":                 "asks whether the container still runs, to end its sessions",
}

// pidUsers are the files that may use the PID of a record, with who makes sure that the process
// with that number is still the container's. A namespace that is named by a number alone may be the
// node's, or another pod's.
var pidUsers = map[string]string{
	"internal/cri/container_complete.go":     "asks whether the PID is known",
	"internal/cri/container_status.go":       "shows it",
	"internal/cri/recover.go":                "asks whether there was a process",
	"internal/cri/joining.go":                "Pins.Joined verifies the process",
	"internal/cri/sandbox_status.go":         "shows it",
	"internal/engine/enginetest/contract.go": "asks whether there is one",
	"internal/engine/enginetest/fake.go":     "has no processes",
	"internal/engine/kernel.go":              "Kernel.Of verifies the process",
	"internal/podnet/manager.go":             "Pins.Pin, Pins.Addresses and OpenProcess verify the process",
	"internal/podnet/reclaim.go":             "Pins.Pin verifies the process",
	"internal/podnet/release.go":             "Pins.Pin verifies the process",
	"internal/view/exit.go": "cgroup.OOMWatcher finds the control group and proc.Exits reads it " +
		"behind a pidfd, which verifies the process",
	"internal/podstats/containers.go": "package stats finds the control group, which verifies the process",
	"internal/podstats/measured.go":   "package stats finds the control group, which verifies the process",
	"internal/podstats/pods.go":       "package stats finds the control group, which verifies the process",
	"internal/takeover/survey.go":     "podnet.Addresses verifies the process",
}

func TestRecordsAreReadWithTheirLock(t *testing.T) {
	used := map[string]bool{}
	functions(typedPackages(t), func(p *typed, name string, body *ast.BlockStmt) {
		if p.name != "internal/cri" {
			return
		}

		ast.Inspect(body, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}

			f := p.callee(call)
			if f == nil || f.FullName() != "("+module+"internal/cri.View).Sandbox" && f.FullName() != "("+module+
				"internal/cri.View).Container" {
				return true
			}

			key := strings.ReplaceAll(name, module, "")
			used[key] = true
			if recordReaders[key] == "" {
				t.Errorf("%s: %s is read without a lock; use lockSandbox or lockContainer, or add %q to the table "+
					"with the reason",
					p.fset.Position(call.Pos()), f.Name(), key)
			}

			return true
		})
	})

	stale(t, used, recordReaders)
}

func TestPIDsAreVerified(t *testing.T) {
	used := map[string]bool{}
	functions(typedPackages(t), func(p *typed, _ string, body *ast.BlockStmt) {
		if p.name == "internal/spec" { // which makes the records
			return
		}

		ast.Inspect(body, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "Pid" {
				return true
			}

			field, ok := p.info.Uses[sel.Sel].(*types.Var)
			if !ok || !field.IsField() || field.Pkg() == nil || field.Pkg().Path() != module+"internal/spec" {
				return true
			}

			pos := p.fset.Position(sel.Pos())
			_, file, _ := strings.Cut(pos.Filename, "/internal/")
			key := "internal/" + file
			used[key] = true
			if pidUsers[key] == "" {
				t.Errorf("%s: a record's PID is used; verify the process, and add %q to the table with how", pos, key)
			}

			return true
		})
	})

	stale(t, used, pidUsers)
}

// stale reports rows of a table that nothing needs.
func stale(t *testing.T, used map[string]bool, table map[string]string) {
	t.Helper()
	for key := range table {
		if !used[key] {
			t.Errorf("%q is in the table for nothing", key)
		}
	}
}
