package archtest

import (
	"go/ast"
	"go/types"
	"slices"
	"strings"
	"testing"
)

// recordReaders lists the functions of cri with permission to read a record from the view by its ID
// without a lock. All others obtain it together with the lock (lockSandbox, lockContainer), because
// a change must not be based on a stale record.
var recordReaders = map[string]string{
	"internal/cri.checkTarget":                      "checks that the container exists",
	"(*internal/cri.Service).awaitJoined":           "checks that the pause still runs; the caller holds the lock",
	"(*internal/cri.Service).ContainerStatus":       "reads only",
	"(*internal/cri.Service).StartContainer":        "checks that the container is visible; the record has the lock",
	"(*internal/cri.Service).translateContainer":    "checks that the sandbox is visible",
	"(internal/cri.completer).hasNothingToComplete": "avoids the lock; the record is read again under it",
	"(internal/cri.recovery).IsRemoved":             "checks that the sandbox exists",
	"(*internal/cri.hooks).create":                  "the caller holds the name, and nobody knows the ID",
	"(*internal/cri.hooks).current":                 "describes the container to plugins",
	"(*internal/cri.hooks).pod":                     "describes the pod to plugins",
	"(*internal/cri.gate).lockContainer":            "the gate itself",
	"(*internal/cri.gate).lockSandbox":              "the gate itself",
	"(*internal/cri.Service).OpenNetNS":             "opens a namespace by its pin or a verified process",
	"(*internal/cri.gate).renew":                    "the caller holds the lock",
	"(*internal/cri.gate).runningContainer":         "an exec or attach does not change the record",
	"(*internal/cri.gate).runningSandbox": "checks that the pod is ready, before and after creating or starting a " +
		"container",
	"(internal/cri.recovery).Sandbox":                   "podnet reads again under the lock of the network",
	"(*internal/cri.gate).sandboxID":                    "resolves the ID for the gate",
	"(*internal/cri.gate).checkPodStop":                 "reads the time the pod stopped",
	"(*internal/cri.Service).startPause":                "the caller holds the lock",
	"(*internal/cri.Service).StopContainer":             "uses the ID; a stop only waits for a start in progress",
	"(*internal/cri.Service).UpdatePodSandboxResources": "checks that the sandbox exists",
	"(*internal/cri.gate).WhileRunning":                 "checks that the container still runs, to end its sessions",
}

// recordReads are the methods that read a record by its ID.
var recordReads = []string{
	"(internal/cri.View).Sandbox",
	"(internal/cri.View).Container",
	"(internal/cri.Visible).Sandbox",
	"(internal/cri.Visible).Container",
}

// pidUsers lists the files that may use the PID of a record, and the code that verifies the
// process: after the PID is reused, a namespace found by number alone may be the node's or another
// pod's.
var pidUsers = map[string]string{
	"internal/cri/container_complete.go":     "checks for a PID",
	"internal/cri/container_status.go":       "reports it",
	"internal/cri/recover.go":                "checks for a process",
	"internal/cri/joining.go":                "Pins.Joined verifies the process",
	"internal/cri/sandbox_status.go":         "reports it",
	"internal/engine/checkpoint.go":          "task.Checkpoint verifies the process",
	"internal/engine/enginetest/contract.go": "checks for one",
	"internal/engine/enginetest/fake.go":     "has no processes",
	"internal/engine/limits.go":              "Kernel.FindGroup verifies the process",
	"internal/nri/convert.go":                "reports it",
	"internal/podnet/manager.go":             "Pins.Pin, Pins.Addresses and OpenProcess verify the process",
	"internal/podnet/reclaim.go":             "Pins.Pin verifies the process",
	"internal/podnet/release.go":             "Pins.Pin verifies the process",
	"internal/view/exit.go":                  "cgroup.OOMWatcher and proc.Exits verify the control group",
	"internal/podstats/containers.go":        "package stats verifies the process by its control group",
	"internal/podstats/measured.go":          "package stats verifies the process by its control group",
	"internal/podstats/pods.go":              "package stats verifies the process by its control group",
	"internal/takeover/survey.go":            "podnet.Addresses verifies the process",
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
			if f == nil || !slices.Contains(recordReads, strings.ReplaceAll(f.FullName(), module, "")) {
				return true
			}

			key := strings.ReplaceAll(name, module, "")
			used[key] = true
			if recordReaders[key] == "" {
				t.Errorf("%s: %s is read without a lock; use lockSandbox or lockContainer, or add %q to recordReaders "+
					"with a reason", p.fset.Position(call.Pos()), f.Name(), key)
			}

			return true
		})
	})

	checkStale(t, used, recordReaders)
}

func TestPIDsAreVerified(t *testing.T) {
	used := map[string]bool{}
	functions(typedPackages(t), func(p *typed, _ string, body *ast.BlockStmt) {
		if p.name == "internal/model" || p.name == "internal/translate" { // they create the records
			return
		}

		ast.Inspect(body, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok || sel.Sel.Name != "Pid" {
				return true
			}

			field, ok := p.info.Uses[sel.Sel].(*types.Var)
			if !ok || !field.IsField() || field.Pkg() == nil || field.Pkg().Path() != module+"internal/model" {
				return true
			}

			pos := p.fset.Position(sel.Pos())
			_, file, _ := strings.Cut(pos.Filename, "/internal/")
			key := "internal/" + file
			used[key] = true
			if pidUsers[key] == "" {
				t.Errorf("%s: a record's PID is used; verify the process, and add %q to pidUsers with the code",
					pos, key)
			}

			return true
		})
	})

	checkStale(t, used, pidUsers)
}

// checkStale reports unused rows of a table.
func checkStale(t *testing.T, used map[string]bool, table map[string]string) {
	t.Helper()
	for key := range table {
		if !used[key] {
			t.Errorf("%q is an unused row of the table", key)
		}
	}
}
