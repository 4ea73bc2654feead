package archtest

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// pathOpeners lists the files that may pass a path to package os, and the reason for its safety.
// All other files use safefs, os.Root or openat2: a path built from foreign text, or beneath a
// directory writable by others, may lead anywhere.
var pathOpeners = map[string]string{
	"internal/apparmor/apparmor.go":       "a kernel file",
	"internal/cgroup/hugepages.go":        "a kernel directory",
	"internal/check/pod.go":               "removes its own log directory, with a random name below /var/log",
	"internal/check/pod_steps.go":         "the self-test's own log directory, and this program",
	"internal/check/probe/daemon.go":      "checks the existence of sockets and configuration files",
	"internal/check/probe/node.go":        "checks the existence of kernel files",
	"internal/check/probe/peer.go":        "checks the type of a socket before checking its peer",
	"internal/check/probe/probe.go":       "checks the existence of configuration files",
	"internal/check/probe/trust.go":       "opens without blocking, and checks owner and type by the descriptor",
	"internal/checkpoint/checkpoint.go":   "root's directory; names are checked IDs",
	"internal/cri/container_create.go":    "host paths of a pod (hostPath)",
	"internal/daemon/streaming.go":        "the root directory, owned by root",
	"internal/engine/engine.go":           "/proc/self",
	"internal/engine/exec_kill.go":        "/proc and numbers",
	"internal/engine/output/leftovers.go": "the run directory, owned by root",
	"internal/engine/output/output.go":    "the run directory, owned by root; names are random",
	"internal/imagefs/imagefs.go":         "/proc/self/mountinfo",
	"internal/imagefs/layout.go":          "checks the existence of containerd's directories",
	"internal/imagevolume/imagevolume.go": "names of descriptors below /proc/self/fd",
	"internal/imagevolume/private.go":     "the run directory, owned by root and checked by descriptor afterwards",
	"internal/logs/driver/driver.go":      "the run directory, owned by root, and checked FIFOs",
	"internal/logs/driver/file.go":        "creates the parents of the pod's log directory",
	"internal/logs/driver/spill.go":       "the run directory, owned by root",
	"internal/logs/driver/table.go":       "the run directory, owned by root",
	"internal/logs/process/launch.go":     "the run directory, owned by root",
	"internal/check/probe/nri.go":         "names in the operator's directory of plugins",
	"internal/logs/process/process.go":    "the run directory and Docker's plugin directory, owned by root",
	"internal/nri/nri.go":                 "the operator's directory of plugins, and the socket for them",
	"internal/nri/store.go":               "the run directory, owned by root; names are checked IDs",
	"internal/podnet/cache.go":            "CNI's cache, owned by root; names are checked",
	"internal/podnet/cache_aside.go":      "moves files of the CNI cache, which is owned by root",
	"internal/podnet/confwatch.go":        "checks the existence of the configuration directory",
	"internal/podnet/journal.go":          "a directory beside CNI's cache, owned by root",
	"internal/podnet/kubenet.go":          "a kernel file",
	"internal/podnet/netconfig.go":        "opens without blocking, and checks the type by the descriptor",
	"internal/podnet/netns_linux.go":      "opens namespaces, and checks the type by the descriptor",
	"internal/podnet/pins_linux.go":       "the directory of pins, opened once",
	"internal/podnet/result.go":           "compares the identity of two namespaces",
	"internal/proc/proc.go":               "/proc and numbers",
	"internal/process/process.go":         "/proc/self, and the directories to lock, owned by root",
	"internal/rootonly/file.go":           "walks from / by descriptor and checks each step",
	"internal/rpc/listen.go":              "the socket of the operator's configuration",
	"internal/safefs/replace.go":          "the gate itself",
	"internal/safefs/safefs.go":           "the gate itself",
	"internal/shim/bundle/bundle.go":      "the bundle, owned by root; file names are constants",
	"internal/shim/idmap/idmap.go":        "root's directory of stages; IDs are checked; the engine's mounts",
	"internal/shim/idmap/overlay.go":      "the layers of the engine's mounts",
	"internal/shim/task/output.go":        "FIFOs named by containerd",
	"internal/shim/task/users.go":         "/proc and numbers",
	"internal/shim/task/oom_counter.go":   "kernel files; the path of a control group is the kernel's",
	"internal/shim/launcher/launcher.go":  "root's bundle and socket directory; names are constants and hashes",
	"internal/shim/sandbox/cgroup.go":     "kernel files; page sizes are checked",
	"internal/shim/sandbox/kill.go":       "/proc and numbers",
	"internal/shim/sandbox/pause.go":      "/proc and numbers; FIFOs of containerd",
	"internal/shim/sandbox/state.go":      "the bundle, owned by root; /proc and numbers",
	"internal/shim/task/service.go":       "the bundle, owned by root; the name is a constant",
	"internal/shim/sandbox/thread.go":     "/proc and checked names of sysctls",
	"internal/stream/tls.go":              "checks the age of the operator's certificate",
	"internal/takeover/survey.go":         "reads the target of a log's link",
}

// pathFunctions lists the functions of package os with a path argument.
var pathFunctions = []string{
	"Chdir", "Chmod", "Chown", "Chtimes", "Create", "Lchown", "Link", "Lstat", "Mkdir", "MkdirAll", "Open", "OpenFile",
	"ReadDir", "ReadFile", "Readlink", "Remove", "RemoveAll", "Rename", "Stat", "Symlink", "Truncate", "WriteFile",
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
				t.Errorf("%s: os.%s takes a path; use safefs, os.Root or openat2, or add the file to pathOpeners "+
					"with a reason", fset.Position(call.Pos()), call.Sel.Name)
			}

			used[path] = true

			return true
		})
	})

	for path := range pathOpeners {
		if !used[path] {
			t.Errorf("%s is in pathOpeners but opens nothing by path", path)
		}
	}
}
