package archtest

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "cri-dockerd/"

// allowedImports lists the allowed internal imports of each package of the daemon. Add a new
// package here deliberately, because the table is the architecture (see ARCHITECTURE.md).
var allowedImports = map[string][]string{
	"internal/model":           {"internal/shim/annotation"},
	"internal/nri":             {"internal/rootonly", "internal/shim/adjustment"},
	"internal/text":            {},
	"internal/safefs":          {},
	"internal/translate":       {"internal/shim/annotation"},
	"internal/validate":        {"internal/shim/annotation"},
	"internal/undo":            {},
	"internal/keylock":         {},
	"internal/connlimit":       {},
	"internal/wire":            {},
	"internal/quantity":        {},
	"internal/secret":          {},
	"internal/shell":           {},
	"internal/proc":            {},
	"internal/process":         {},
	"internal/rootonly":        {"internal/proc"},
	"internal/tracing":         {},
	"internal/exit":            {},
	"internal/config":          {"internal/secret"},
	"internal/engine/output":   {"internal/shim/annotation"},
	"internal/engine/pause":    {},
	"internal/engine/task":     {"internal/proc", "internal/rootonly"},
	"internal/archive":         {},
	"internal/cgroup":          {},
	"internal/apparmor":        {},
	"internal/systemd":         {},
	"internal/imagefs":         {},
	"internal/checkpoint":      {},
	"internal/imagevolume":     {},
	"internal/stats":           {"internal/cgroup"},
	"internal/engine/tolerant": {},
	"internal/engine": {
		"internal/archive", "internal/cgroup", "internal/engine/output", "internal/engine/pause",
		"internal/engine/task", "internal/engine/tolerant", "internal/keylock", "internal/model", "internal/proc",
		"internal/secret", "internal/systemd", "internal/text", "internal/translate",
	},
	"internal/view": {"internal/engine"},
	"internal/podstats": {
		"internal/cgroup", "internal/imagefs", "internal/stats", "internal/view", "internal/wire",
	},
	"internal/podnet": {
		"internal/checkpoint", "internal/keylock", "internal/quantity", "internal/secret", "internal/undo",
	},
	"internal/logs/driver": {},
	"internal/logs/process": {
		"internal/logs/driver", "internal/proc", "internal/process",
	},
	"internal/logs":   {"internal/logs/driver"},
	"internal/stream": {"internal/connlimit", "internal/engine"},
	"internal/cri": {
		"internal/archive", "internal/engine", "internal/keylock", "internal/nri", "internal/podnet",
		"internal/podstats", "internal/text", "internal/translate", "internal/undo", "internal/validate",
		"internal/view", "internal/wire",
	},
	"internal/rpc": {
		"internal/connlimit", "internal/secret", "internal/text", "internal/wire",
	},
	"internal/check": {
		"internal/check/finding", "internal/check/probe", "internal/config", "internal/engine",
		"internal/engine/pause", "internal/exit", "internal/shell",
	},
	"internal/takeover": {
		"internal/checkpoint", "internal/config", "internal/engine", "internal/exit", "internal/logs/driver",
		"internal/podnet", "internal/proc", "internal/process", "internal/rootonly", "internal/shell",
	},
	"internal/daemon": {
		"internal/apparmor", "internal/cgroup", "internal/checkpoint", "internal/config", "internal/connlimit",
		"internal/cri", "internal/engine", "internal/imagefs", "internal/imagevolume", "internal/logs",
		"internal/logs/driver", "internal/logs/process", "internal/nri", "internal/podnet", "internal/podstats",
		"internal/proc", "internal/process", "internal/rpc", "internal/stats", "internal/stream", "internal/systemd",
		"internal/tracing", "internal/undo", "internal/validate", "internal/view",
	},
	"cmd/cri-dockerd": {
		"internal/check", "internal/config", "internal/daemon", "internal/exit", "internal/logs/driver",
		"internal/logs/process", "internal/takeover",
	},

	"internal/check/finding": {"internal/quantity", "internal/shell"},
	"internal/check/probe": {
		"internal/check/finding", "internal/config", "internal/engine", "internal/logs/driver", "internal/nri",
		"internal/podnet", "internal/proc", "internal/rootonly", "internal/shell",
	},
	// The containerd shim: two programs of their own.
	"internal/shim/annotation": {},
	"internal/shim/launcher":   {"internal/shim/annotation"},
	"internal/shim/adjustment": {"internal/rootonly"},
	"internal/shim/bundle":     {"internal/shim/adjustment", "internal/shim/annotation"},
	"internal/shim/sandbox":    {"internal/shim/bundle", "internal/shim/thread"},
	"internal/shim/thread":     {},
	"internal/shim/idmap":      {"internal/shim/annotation", "internal/shim/thread"},
	"internal/shim/task": {
		"internal/shim/annotation", "internal/shim/bundle", "internal/shim/idmap", "internal/shim/launcher",
		"internal/shim/sandbox",
	},
	"internal/shim/server": {
		"internal/shim/annotation", "internal/shim/idmap", "internal/shim/sandbox", "internal/shim/task",
	},
	"cmd/containerd-shim-cri-dockerd-v1":     {"internal/shim/launcher"},
	"cmd/containerd-shim-cri-dockerd-server": {"internal/shim/server"},
	// Programs and fixtures outside the daemon.
	"internal/engine/pause/src":   {},
	"internal/engine/pause/build": {"internal/engine/pause"},
	"internal/engine/enginetest":  {"internal/engine", "internal/translate"},
	"internal/archtest":           {},
}

// vocabulary lists the packages open to all others: checked types, and the gates for text and files
// from outside.
var vocabulary = []string{"internal/model", "internal/text", "internal/safefs"}

// restricted lists the allowed importers of external packages.
var restricted = map[string]struct {
	users  []string
	reason string
}{
	"github.com/moby/moby/client": {
		[]string{"internal/engine", "internal/engine/enginetest"},
		"only engine calls Docker's API",
	},
	"github.com/moby/moby/api": {
		[]string{"internal/engine", "internal/engine/enginetest", "internal/translate", "internal/view"},
		"only engine, translate and view use Docker's types",
	},
	"google.golang.org/grpc": {
		[]string{"internal/rpc", "internal/check", "internal/check/probe"},
		"only rpc serves gRPC; check is a client",
	},
	"github.com/containerd/nri": {
		[]string{"internal/nri", "internal/shim/adjustment", "internal/shim/bundle"},
		"only nri talks to NRI plugins; the shim applies their adjustments",
	},
	"github.com/containernetworking/cni": {
		[]string{"internal/podnet"},
		"only podnet uses CNI",
	},
	"github.com/containerd/containerd/v2": {
		[]string{"internal/shim/server", "internal/shim/task", "internal/shim/sandbox", "internal/shim/idmap"},
		"only the shim server uses containerd's packages",
	},
	"github.com/containerd/containerd/api": {
		[]string{"internal/shim/server", "internal/shim/task", "internal/engine/task"},
		"only the shim server and its client use the messages of containerd's shims",
	},
	"k8s.io/cri-streaming": {
		[]string{"internal/stream"},
		"only stream runs the streaming server",
	},
	"github.com/spf13/cobra": {
		[]string{"cmd/cri-dockerd", "internal/check", "internal/takeover", "internal/config"},
		"command lines belong to cmd",
	},
	"github.com/coreos/go-systemd": {
		[]string{"internal/process", "internal/logs/process", "internal/rpc", "internal/shim/sandbox"},
		"process sends messages to systemd; servers take its sockets; the shim starts scopes",
	},
	"github.com/godbus/dbus": {
		[]string{"internal/systemd", "internal/shim/sandbox"},
		"only systemd speaks D-Bus",
	},
	"google.golang.org/grpc/codes": {
		[]string{"internal/rpc", "internal/check", "internal/check/probe"},
		"codes are mapped once, in rpc",
	},
	"go.opentelemetry.io/otel/sdk": {
		[]string{"internal/tracing"},
		"tracing exports spans; other packages only use providers",
	},
	"go.opentelemetry.io/otel/exporters": {
		[]string{"internal/tracing"},
		"tracing exports spans",
	},
	"google.golang.org/protobuf/encoding": {
		[]string{"internal/logs/driver", "internal/wire"},
		"only Docker's log messages and large responses are encoded outside gRPC",
	},
	"github.com/prometheus": {
		[]string{"internal/logs/driver", "internal/engine", "internal/nri", "internal/view", "internal/podnet",
			"internal/podstats", "internal/rpc", "internal/daemon"},
		"each part collects its metrics, and the daemon serves them",
	},
}

// banned lists packages the daemon must not link, directly or indirectly.
var banned = []string{"k8s.io/kubernetes", "k8s.io/client-go", "k8s.io/apimachinery", "k8s.io/api/",
	"github.com/docker/docker/", "github.com/containerd/containerd/v2/", "github.com/containerd/cgroups/"}

type pkg struct {
	ImportPath string
	Name       string
	Doc        string
	Dir        string
	GoFiles    []string
	Imports    []string
	Deps       []string
}

// goList runs go list with the given arguments in the repository's root.
func goList(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Name,Doc,Dir,GoFiles,Imports,Deps"},
		args...)...)
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatalf("go list: %v", err)
	}

	var all []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	for _, p := range goList(t, "./cmd/...", "./internal/...") {
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, known := allowedImports[name]
		if !known {
			t.Errorf("%s is not in allowedImports: add it there and to ARCHITECTURE.md", name)
			continue
		}

		for _, imp := range p.Imports {
			if own, ours := strings.CutPrefix(imp, module); ours && !slices.Contains(allowed, own) &&
				!slices.Contains(vocabulary, own) {
				t.Errorf("%s imports %s, a package beside or above it", name, own)
			}

			for prefix, r := range restricted {
				if (imp == prefix || strings.HasPrefix(imp, prefix+"/")) && !slices.Contains(r.users, name) {
					t.Errorf("%s imports %s: %s", name, imp, r.reason)
				}
			}
		}
	}
}

// TestLauncherIsSmall checks that the launcher of the shim links the standard library alone. It
// runs once for each container, and the initialization of large packages would be most of its time.
func TestLauncherIsSmall(t *testing.T) {
	for _, dep := range goList(t, "./cmd/containerd-shim-cri-dockerd-v1")[0].Deps {
		first, _, _ := strings.Cut(dep, "/")
		if strings.Contains(first, ".") && first != "vendor" {
			t.Errorf("the launcher links %s", dep)
		}
	}
}

func TestPackageComments(t *testing.T) {
	for _, p := range goList(t, "./...") {
		if len(p.GoFiles) > 0 && p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
	}
}

func TestBannedDependencies(t *testing.T) {
	p := goList(t, "./cmd/cri-dockerd")[0]
	for _, dep := range p.Deps {
		for _, b := range banned {
			if strings.HasPrefix(dep+"/", b) {
				t.Errorf("the daemon links %s", dep)
			}
		}
	}
}

// parse calls visit for each Go file of the repository.
func parse(t *testing.T, visit func(path string, fset *token.FileSet, f *ast.File)) {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}

	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}

		if d.IsDir() && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".")) && path != root {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}

		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			return err
		}

		rel, _ := filepath.Rel(root, path)
		visit(rel, fset, f)

		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestNoHiddenState forbids init functions, assignments to package variables, and contexts without
// a parent. All mutable state has an owner, and the daemon wires the owners.
func TestNoHiddenState(t *testing.T) {
	roots := []string{"cmd/", "internal/daemon/", "internal/check/"}
	parse(t, func(path string, fset *token.FileSet, f *ast.File) {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "test/") ||
			strings.HasPrefix(path, "internal/engine/pause/build") {
			return
		}

		globals := map[string]bool{}
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Name.Name == "init" && d.Recv == nil {
					t.Errorf("%s: init function", path)
				}

			case *ast.GenDecl:
				if d.Tok == token.VAR {
					for _, s := range d.Specs {
						for _, n := range s.(*ast.ValueSpec).Names {
							globals[n.Name] = true
						}
					}
				}
			}
		}

		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.AssignStmt:
				for _, l := range n.Lhs {
					if id, ok := l.(*ast.Ident); ok && n.Tok != token.DEFINE && globals[id.Name] && id.Obj != nil &&
						id.Obj.Decl != nil {
						if _, local := id.Obj.Decl.(*ast.AssignStmt); !local {
							t.Errorf("%s: package variable %s is written", fset.Position(n.Pos()), id.Name)
						}
					}
				}

			case *ast.CallExpr:
				if sel, ok := n.Fun.(*ast.SelectorExpr); ok {
					if x, ok := sel.X.(*ast.Ident); ok && x.Name == "context" &&
						(sel.Sel.Name == "Background" || sel.Sel.Name == "TODO") &&
						!slices.ContainsFunc(roots, func(r string) bool { return strings.HasPrefix(path, r) }) {
						t.Errorf("%s: context.%s outside main, daemon and tests", fset.Position(n.Pos()), sel.Sel.Name)
					}
				}
			}

			return true
		})
	})
}

// maySkip lists the files with permitted skips: their features may be missing in a foreign runtime
// (-endpoint), or depend on the cgroup version, or their tests passed in an earlier run.
var maySkip = []string{
	"internal/shim/task/oom_test.go", "test/conformance/main_test.go", "test/conformance/node_test.go",
	"test/kubernetes/progress/progress.go",
}

// TestSkips forbids skipped tests. A test must install or build its requirements.
func TestSkips(t *testing.T) {
	parse(t, func(path string, fset *token.FileSet, f *ast.File) {
		if strings.HasPrefix(path, "internal/archtest/") || slices.Contains(maySkip, path) {
			return
		}

		ast.Inspect(f, func(n ast.Node) bool {
			if sel, ok := n.(*ast.SelectorExpr); ok && (sel.Sel.Name == "Skip" || sel.Sel.Name == "Skipf" ||
				sel.Sel.Name == "SkipNow") {
				t.Errorf("%s: tests must not call %s", fset.Position(n.Pos()), sel.Sel.Name)
			}
			return true
		})

		for _, imp := range f.Imports {
			if p, _ := strconv.Unquote(imp.Path.Value); p == "io/ioutil" || p == "log" {
				t.Errorf("%s imports %s: use os/io, log/slog", path, p)
			}
		}
	})
}
