package archtest

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"strings"
	"testing"
)

// lockedSource contains functions named held… with a mutex held across I/O, and functions named
// free… without.
const lockedSource = `package p

import (
	"context"
	"os"
	"sync"
)

type source interface{ Read(ctx context.Context) error }

type t struct {
	mu  sync.Mutex
	rw  sync.RWMutex
	src source
}

func (x *t) heldPlain()    { x.mu.Lock(); os.Remove("f"); x.mu.Unlock() }
func (x *t) heldDeferred() { x.mu.Lock(); defer x.mu.Unlock(); x.reads() }
func (x *t) heldShared()   { x.rw.RLock(); defer x.rw.RUnlock(); _ = x.src.Read(nil) }
func (x *t) heldBranch(b bool) {
	x.mu.Lock()
	if b {
		x.mu.Unlock()
		return
	}
	x.reads()
	x.mu.Unlock()
}
func (x *t) heldInDefer()   { x.mu.Lock(); defer x.mu.Unlock(); defer x.reads() }
func (x *t) heldInLiteral() { x.mu.Lock(); each(func() { x.reads() }); x.mu.Unlock() }
func (x *t) heldValue(do func(context.Context)) { x.mu.Lock(); do(nil); x.mu.Unlock() }
func (x *t) heldLoop() {
	for {
		x.mu.Lock()
		switch {
		case true:
			x.indirect()
		}
		x.mu.Unlock()
	}
}
func (x *t) freePlain() { x.mu.Lock(); n := os.Getpid(); x.mu.Unlock(); _ = n; os.Remove("f") }
func (x *t) freeBranch(b bool) {
	x.mu.Lock()
	if b {
		x.mu.Unlock()
		x.reads()
		return
	}
	x.mu.Unlock()
	x.reads()
}
func (x *t) freeGo()    { x.mu.Lock(); defer x.mu.Unlock(); go x.reads() }
func (x *t) freeDefer() { defer x.reads(); x.mu.Lock(); x.mu.Unlock() }
func (x *t) freeKept() func() { x.mu.Lock(); defer x.mu.Unlock(); return func() { x.reads() } }
func (x *t) reads()    { os.Remove("f") }
func (x *t) indirect() { x.reads() }
func each(do func())   { do() }
`

// TestFindHeld verifies that the rule can fail.
func TestFindHeld(t *testing.T) {
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "p.go", lockedSource, 0)
	if err != nil {
		t.Fatal(err)
	}

	all := []typed{check(t, fset, module+"p", []*ast.File{f}, importer.ForCompiler(fset, "source", nil))}
	found := map[string]bool{}
	findHeld(all, func(key, _ string) {
		name, _, _ := strings.Cut(key[strings.LastIndex(key, ".t).")+len(".t)."):], " ")
		found[name] = true
	})

	functions(all, func(_ *typed, full string, _ *ast.BlockStmt) {
		name := full[strings.LastIndex(full, ".")+1:]
		want := strings.HasPrefix(name, "held")
		if found[name] != want {
			t.Errorf("%s: reported %v, want %v", name, found[name], want)
		}
	})
}
