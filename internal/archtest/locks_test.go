package archtest

import (
	"fmt"
	"go/ast"
	"go/token"
	"go/types"
	"maps"
	"slices"
	"strings"
	"testing"
)

// heldAcrossIO lists the functions that may do I/O while holding a sync.Mutex or RWMutex, with the
// reason: the kernel returns at once, or only the holder waits. All other functions use a lock with
// a ctx (keylock, or a channel), or do their I/O without a lock. The key is the function and the
// lock.
var heldAcrossIO = map[string]string{
	"(*internal/cgroup.processDir).open p.mu": "opens a procfs file, served from memory",
	"(*internal/podnet.confWatch).close w.mu": "closes inotify, without disk I/O",
	"(*internal/podnet.confWatch).update w.mu": "adds an inotify watch on the node's root file system; without that " +
		"file system no pod can be connected either",
	"(*internal/stats.Reader).pageSizes r.mu": "reads sysfs, once",
	"(*internal/stats.disks).findName d.mu":   "reads /proc/partitions, served from memory",
	"(*internal/stream.frameConn).Write c.mu": "writes the frames of one connection in order; " +
		"closing the connection ends the write",
	"(*internal/stream.output).fail o.mu":  "closes an unnamed file; only the session's sender waits",
	"(*internal/stream.output).spill o.mu": "closes an unnamed file; only the session's sender waits",
}

const (
	lockOp = iota + 1
	unlockOp
)

var lockOps = map[string]int{
	"(*sync.Mutex).Lock":      lockOp,
	"(*sync.RWMutex).Lock":    lockOp,
	"(*sync.RWMutex).RLock":   lockOp,
	"(*sync.Mutex).Unlock":    unlockOp,
	"(*sync.RWMutex).Unlock":  unlockOp,
	"(*sync.RWMutex).RUnlock": unlockOp,
}

// lockOpOf returns the operation of a call on a mutex, and the mutex. op is 0 for any other call.
func (p *typed) lockOpOf(call *ast.CallExpr) (op int, lock string) {
	f := p.callee(call)
	if f == nil || lockOps[f.FullName()] == 0 {
		return 0, ""
	}
	sel := ast.Unparen(call.Fun).(*ast.SelectorExpr)
	return lockOps[f.FullName()], types.ExprString(sel.X)
}

// held is the set of held locks, by their expression. The value is true if a defer releases the
// lock.
type held map[string]bool

func (h held) deferred() held {
	out := held{}
	for lock, deferred := range h {
		if deferred {
			out[lock] = true
		}
	}
	return out
}

// walker follows the control flow of one function. It calls visit for each call with the locks held
// there.
type walker struct {
	*typed
	visit func(call *ast.CallExpr, h held)
}

// deferredCallers lists functions that run their function arguments later, or in another goroutine.
var deferredCallers = []string{
	"time.AfterFunc", "context.AfterFunc", "(*golang.org/x/sync/errgroup.Group).Go", "(*sync.WaitGroup).Go",
	"(*cri-dockerd/internal/undo.Stack).Push",
}

// expr visits the calls of an expression.
func (w *walker) expr(n ast.Node, h held) {
	if n == nil {
		return
	}

	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit: // runs later; call handles function arguments
			w.block(n.Body.List, held{})
			return false
		case *ast.CallExpr:
			w.call(n, h)
			return false
		}

		return true
	})
}

func (w *walker) call(call *ast.CallExpr, h held) {
	inside := h
	if f := w.callee(call); f != nil && slices.Contains(deferredCallers, f.FullName()) {
		inside = held{}
	}

	for _, arg := range call.Args {
		if lit, ok := arg.(*ast.FuncLit); ok {
			w.block(lit.Body.List, maps.Clone(inside))
		} else {
			w.expr(arg, h)
		}
	}

	if lit, ok := call.Fun.(*ast.FuncLit); ok {
		w.block(lit.Body.List, maps.Clone(h))
		return
	}

	w.expr(call.Fun, h)
	w.visit(call, h)
}

// block follows statements and returns the locks held after them. ends reports whether control
// never reaches the end.
func (w *walker) block(list []ast.Stmt, h held) (after held, ends bool) {
	for _, s := range list {
		if h, ends = w.stmt(s, h); ends {
			return h, true
		}
	}
	return h, false
}

// branches follows alternatives and returns the locks held after any of them.
func (w *walker) branches(h held, lists ...[]ast.Stmt) (after held, ends bool) {
	after, ends = held{}, true
	for _, list := range lists {
		one, end := w.block(list, maps.Clone(h))
		if !end {
			maps.Copy(after, one)
			ends = false
		}
	}

	return after, ends
}

func (w *walker) stmt(s ast.Stmt, h held) (after held, ends bool) {
	switch s := s.(type) {
	case *ast.ExprStmt:
		if call, ok := s.X.(*ast.CallExpr); ok {
			if op, lock := w.lockOpOf(call); op != 0 {
				if h = maps.Clone(h); op == lockOp {
					h[lock] = false
				} else {
					delete(h, lock)
				}
				return h, false
			}
		}
		w.expr(s.X, h)

	case *ast.DeferStmt:
		if op, lock := w.lockOpOf(s.Call); op == unlockOp {
			if _, ok := h[lock]; ok {
				h = maps.Clone(h)
				h[lock] = true
			}
			return h, false
		}
		w.call(s.Call, h.deferred()) // runs before earlier deferred calls

	case *ast.GoStmt:
		w.call(s.Call, held{})
	case *ast.ReturnStmt:
		for _, r := range s.Results {
			w.expr(r, h)
		}
		return h, true

	case *ast.BranchStmt:
		return h, s.Tok != token.FALLTHROUGH
	case *ast.BlockStmt:
		return w.block(s.List, h)
	case *ast.LabeledStmt:
		return w.stmt(s.Stmt, h)
	default:
		return w.compound(s, h)
	}

	return h, false
}

// compound follows statements with bodies, and all remaining ones.
func (w *walker) compound(s ast.Stmt, h held) (after held, ends bool) {
	var init ast.Stmt
	var heads []ast.Node
	var lists [][]ast.Stmt
	switch s := s.(type) {
	case *ast.IfStmt:
		init, heads, lists = s.Init, []ast.Node{s.Cond}, [][]ast.Stmt{s.Body.List, nil}
		if s.Else != nil {
			lists[1] = []ast.Stmt{s.Else}
		}

	case *ast.ForStmt:
		init, lists = s.Init, [][]ast.Stmt{s.Body.List, nil}
		if s.Cond != nil {
			heads = []ast.Node{s.Cond}
		}
		if s.Post != nil {
			lists[0] = append(slices.Clone(s.Body.List), s.Post)
		}

	case *ast.RangeStmt:
		heads, lists = []ast.Node{s.X}, [][]ast.Stmt{s.Body.List, nil}
	case *ast.SwitchStmt:
		init, lists = s.Init, clauses(s.Body)
		if s.Tag != nil {
			heads = []ast.Node{s.Tag}
		}

	case *ast.TypeSwitchStmt:
		init, lists = s.Init, clauses(s.Body)
	case *ast.SelectStmt:
		lists = clauses(s.Body)
	default:
		w.expr(s, h)
		return h, false
	}

	if init != nil {
		h, _ = w.stmt(init, h)
	}

	for _, head := range heads {
		w.expr(head, h)
	}

	return w.branches(h, lists...)
}

// clauses returns the alternatives of a switch or select, including an empty one.
func clauses(body *ast.BlockStmt) [][]ast.Stmt {
	out := [][]ast.Stmt{nil}
	for _, c := range body.List {
		switch c := c.(type) {
		case *ast.CaseClause:
			var head []ast.Stmt
			for _, e := range c.List {
				head = append(head, &ast.ExprStmt{X: e})
			}
			out = append(out, append(head, c.Body...))

		case *ast.CommClause:
			var head []ast.Stmt
			if c.Comm != nil {
				head = append(head, c.Comm)
			}
			out = append(out, append(head, c.Body...))
		}
	}

	return out
}

// blocking records an I/O or waiting call for each function of the repository.
type blocking struct {
	by      map[string]string          // function → call, "" without one
	methods map[string]map[string]bool // name and signature → methods of the repository
}

// newBlocking finds the functions that do I/O, directly or through their callees.
func newBlocking(all []typed) *blocking {
	b := &blocking{by: map[string]string{}, methods: map[string]map[string]bool{}}
	calls := map[string][]*types.Func{}
	functions(all, func(p *typed, name string, body *ast.BlockStmt) {
		w := &walker{typed: p, visit: func(call *ast.CallExpr, _ held) {
			if f := p.callee(call); f != nil {
				calls[name] = append(calls[name], f)
			}
		}}
		w.block(withoutGo(body), held{})
	})

	functions(all, func(p *typed, name string, _ *ast.BlockStmt) { b.by[name] = "" })
	for i := range all {
		for _, o := range all[i].info.Defs {
			if f, ok := o.(*types.Func); ok && f.Signature().Recv() != nil {
				key := methodKey(f)
				if b.methods[key] == nil {
					b.methods[key] = map[string]bool{}
				}
				b.methods[key][f.FullName()] = true
			}
		}
	}

	for changed := true; changed; {
		changed = false
		for name, called := range calls {
			for _, f := range called {
				if call := b.blockingCall(f); call != "" && b.by[name] == "" {
					b.by[name], changed = call, true
				}
			}
		}
	}

	return b
}

// withoutGo returns the statements of a function without its go statements.
func withoutGo(body *ast.BlockStmt) []ast.Stmt {
	return slices.DeleteFunc(slices.Clone(body.List), func(s ast.Stmt) bool { _, ok := s.(*ast.GoStmt); return ok })
}

// methodKey returns a method's name and signature, without its receiver.
func methodKey(f *types.Func) string {
	return f.Name() + strings.TrimPrefix(types.TypeString(f.Type(), nil), "func")
}

// blockingCall returns a function's I/O or waiting call, or "" if it has none.
func (b *blocking) blockingCall(f *types.Func) string {
	name := f.FullName()
	if call, ours := b.by[name]; ours {
		if call != "" && !strings.Contains(call, " by ") {
			return name + " by " + call
		}
		return strings.TrimSpace(call)
	}

	if isIO(f) {
		return name
	}

	recv := f.Signature().Recv()
	if recv == nil || !types.IsInterface(recv.Type()) || f.Pkg() == nil || !strings.HasPrefix(f.Pkg().Path(), module) {
		return ""
	}
	if takesContext(f) {
		return name
	}

	for method := range b.methods[methodKey(f)] { // all possible implementations
		if b.by[method] != "" {
			return name + " by " + method
		}
	}

	return ""
}

func takesContext(f *types.Func) bool {
	params := f.Signature().Params()
	return params.Len() > 0 && params.At(0).Type().String() == "context.Context"
}

// ioPackages lists packages with I/O or waiting functions, and their harmless functions.
var ioPackages = map[string][]string{
	"os": {
		"Getpid", "Getenv", "LookupEnv", "Environ", "Geteuid", "Getuid", "IsNotExist", "IsExist", "NewFile",
		"NewSyscallError", "Getpagesize", "Fd", "Name", "Error", "Unwrap", "String", "IsDir", "Perm", "Mode", "Size",
		"ModTime", "Sys", "Type", "IsRegular", "Info", "Exit", "SyscallConn",
	},
	"os/exec": {"Error", "Command", "CommandContext", "Unwrap", "ExitCode", "String"},
	"syscall": {
		"Error", "Is", "Temporary", "Timeout", "ParseNetlinkMessage", "ParseNetlinkRouteAttr", "Umask", "Getpid",
		"Exited", "ExitStatus", "Signaled", "Signal", "String", "Control",
	},
	"golang.org/x/sys/unix": {"ParseDirent", "NewIfreq", "Uint32", "SetUint16", "Uint16", "Getpid",
		"ByteSliceToString", "Major", "Minor", "Close", "ErrnoName", "SignalName"},
	"github.com/containernetworking/cni/libcni": nil,
	"github.com/fsnotify/fsnotify":              {"Has", "String"},
	"github.com/moby/moby/client":               nil,
}

// ioFunctions lists I/O or waiting functions of other packages.
var ioFunctions = []string{
	"time.Sleep", "(*sync.WaitGroup).Wait", "(*golang.org/x/sync/errgroup.Group).Wait",
	"(*cri-dockerd/internal/keylock.Map).Lock",
	"path/filepath.Glob", "path/filepath.Walk", "path/filepath.WalkDir", "path/filepath.EvalSymlinks",
	"io.Copy", "io.CopyN", "io.CopyBuffer", "io.ReadAll", "io.ReadFull", "(io.Reader).Read", "(io.Writer).Write",
	"(io.Closer).Close",
	"(io/fs.File).Read", "io/fs.ReadFile", "io/fs.ReadDir", "io/fs.WalkDir",
	"(*bufio.Reader).Read", "(*bufio.Reader).ReadByte", "(*bufio.Reader).ReadString", "(*bufio.Reader).ReadSlice",
	"(*bufio.Scanner).Scan",
	"(*bufio.Writer).Flush", "(*encoding/json.Decoder).Decode", "(*encoding/json.Encoder).Encode",
	"crypto/tls.LoadX509KeyPair", "(net.Conn).Read", "(net.Conn).Write", "(net.Listener).Accept",
	"(*net.UnixConn).Read", "(*net.UnixConn).Write",
}

// contextual lists packages whose functions take a ctx without waiting.
var contextual = []string{"context", "log/slog", "golang.org/x/sync/errgroup", "go.opentelemetry.io/", "os/signal",
	"os/exec", "google.golang.org/grpc/metadata", "google.golang.org/grpc/peer"}

// isIO reports whether a function outside the repository does I/O or waits. Our own log calls do
// not count.
func isIO(f *types.Func) bool {
	if f.Pkg() == nil {
		return false
	}

	path := f.Pkg().Path()
	if harmless, ok := ioPackages[path]; ok {
		return !slices.Contains(harmless, f.Name())
	}

	if slices.Contains(ioFunctions, f.FullName()) || path == "net" && hasPrefix(f.Name(), "Dial", "Listen", "Lookup") ||
		path == "net/http" && f.Name() == "Do" {
		return true
	}

	return takesContext(f) && !strings.HasPrefix(path, module) && !slices.ContainsFunc(contextual, func(p string) bool {
		return strings.HasPrefix(path, p)
	})
}

func hasPrefix(s string, prefixes ...string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(s, p) })
}

// isContextual reports whether a call of a function value takes a ctx, and so may wait.
func (p *typed) isContextual(call *ast.CallExpr) bool {
	value := p.info.Types[call.Fun]
	sig, ok := value.Type.(*types.Signature)
	return ok && value.IsValue() && sig.Params().Len() > 0 && sig.Params().At(0).Type().String() == "context.Context"
}

// findHeld calls report for each I/O or waiting call while a mutex is held.
func findHeld(all []typed, report func(key, message string)) {
	b := newBlocking(all)
	functions(all, func(p *typed, name string, body *ast.BlockStmt) {
		w := &walker{typed: p, visit: func(call *ast.CallExpr, h held) {
			if len(h) == 0 {
				return
			}

			blocked := ""
			if f := p.callee(call); f != nil {
				blocked = b.blockingCall(f)
			} else if p.isContextual(call) {
				blocked = types.ExprString(call.Fun)
			}

			if blocked == "" {
				return
			}

			for lock := range h {
				key := strings.ReplaceAll(name, module, "") + " " + lock
				report(key, fmt.Sprintf("%s: %s is held across %s", p.fset.Position(call.Pos()), lock,
					strings.ReplaceAll(blocked, module, "")))
			}
		}}

		w.block(body.List, held{})
	})
}

// TestNoMutexIsHeldAcrossIO forbids slow operations under a mutex, because waiting for a mutex
// ignores ctx.
func TestNoMutexIsHeldAcrossIO(t *testing.T) {
	used := map[string]bool{}
	findHeld(typedPackages(t), func(key, message string) {
		used[key] = true
		if heldAcrossIO[key] == "" {
			t.Errorf("%s\n\tdo the I/O without the lock, use a lock with ctx, or add %q to heldAcrossIO with a reason",
				message, key)
		}
	})

	for key := range heldAcrossIO {
		if !used[key] {
			t.Errorf("%q is in heldAcrossIO but holds no mutex across I/O", key)
		}
	}
}
