package archtest

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// pathOpeners are the files that may pass a path to package os, each with who may write there. All
// others open files with safefs, os.Root or openat2: a path that is joined from foreign text, or
// that lies beneath a directory that others may write, leads anywhere.
var pathOpeners = map[string]string{
	"internal/cgroup/hugepages.go":        "a directory of the kernel's",
	"internal/check/pod.go":               "removes its own log directory, with a random name below /var/log",
	"internal/check/pod_steps.go":         "the self-test's own log directory, and this program",
	"internal/check/probe/daemon.go":      "asks whether sockets and files of the configuration exist",
	"internal/check/probe/node.go":        "asks whether files of the kernel exist",
	"internal/check/probe/peer.go":        "asks for the kind of a socket before its peer is checked",
	"internal/check/probe/probe.go":       "asks whether files of the configuration exist",
	"internal/check/probe/trust.go":       "opens without blocking, and checks owner and kind by the descriptor",
	"internal/checkpoint/checkpoint.go":   "root's directory, names are checked IDs",
	"internal/cri/container_create.go":    "host paths that a pod may name (hostPath)",
	"internal/daemon/wire.go":             "the root directory, which is root's",
	"internal/engine/engine.go":           "/proc/self",
	"internal/engine/exec_kill.go":        "/proc and numbers",
	"internal/imagefs/imagefs.go":         "/proc/self/mountinfo",
	"internal/imagefs/layout.go":          "asks which of containerd's directories exists",
	"internal/imagevolume/imagevolume.go": "names of descriptors below /proc/self/fd",
	"internal/imagevolume/private.go":     "the run directory, which is root's; it is checked by descriptor afterwards",
	"internal/logs/driver/driver.go":      "the run directory, which is root's, and FIFOs that were checked",
	"internal/logs/driver/file.go":        "makes the directories above the pod's log directory",
	"internal/logs/driver/spill.go":       "the run directory, which is root's",
	"internal/logs/driver/table.go":       "the run directory, which is root's",
	"internal/logs/process/launch.go":     "the run directory, which is root's",
	"internal/logs/process/process.go":    "the run directory and that of Docker's plugins, which are root's",
	"internal/podnet/cache.go":            "CNI's cache, which is root's; names are checked",
	"internal/podnet/cache_aside.go":      "moves files of the CNI cache, which is owned by root",
	"internal/podnet/confwatch.go":        "asks whether the configuration's directory exists",
	"internal/podnet/journal.go":          "a directory of root's beside CNI's cache",
	"internal/podnet/kubenet.go":          "a file of the kernel's",
	"internal/podnet/netconfig.go":        "opens without blocking, and checks the kind by the descriptor",
	"internal/podnet/netns_linux.go":      "opens namespaces, and checks by the descriptor that they are some",
	"internal/podnet/pins_linux.go":       "the directory of pins, opened once",
	"internal/podnet/result.go":           "compares the identity of two namespaces",
	"internal/proc/proc.go":               "/proc and numbers",
	"internal/process/process.go":         "/proc/self, and the directories that it locks, which are root's",
	"internal/rootonly/file.go":           "walks from / by descriptor and checks each step",
	"internal/rpc/listen.go":              "the socket of the operator's configuration",
	"internal/safefs/replace.go":          "the gate itself",
	"internal/safefs/safefs.go":           "the gate itself",
	"internal/stream/tls.go":              "asks for the age of the operator's certificate",
	"internal/takeover/survey.go":         "reads where a log's link leads",
}

// pathFunctions of package os take a path.
var pathFunctions = []string{
	"Chdir", "Chmod", "Chown", "Chtimes", "Create", "Lchown", "Link", "Lstat", "Mkdir", "MkdirAll", "Open", "OpenFile",
	"ReadDir", "ReadFile",
	"Readlink", "Remove", "RemoveAll", "Rename", "Stat", "Symlink", "Truncate", "WriteFile",
}

func TestPathsAreOpenedInFewPlaces(t *testing.T) {
	used := map[string]bool{}
	parse(t, func(path string, fset *token.FileSet, f *ast.File) {
		daemon := strings.HasPrefix(path, "internal/") || strings.HasPrefix(path, "cmd/")
		if !daemon || strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "internal/engine/pause/build") {
			return
		}

		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}

			if x, ok := call.X.(*ast.Ident); !ok || x.Name != "os" || x.Obj != nil ||
				!slices.Contains(pathFunctions, call.Sel.Name) {
				return true
			}

			if pathOpeners[path] == "" {
				t.Errorf("%s: os.%s takes a path; use safefs, os.Root or openat2, or add the file to the table with "+
					"the reason",
					fset.Position(call.Pos()), call.Sel.Name)
			}

			used[path] = true

			return true
		})
	})

	for path := range pathOpeners {
		if !used[path] {
			t.Errorf("%s is in the table and opens nothing by its path", path)
		}
	}
}
