package archtest

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// typed is a package of the repository with the types of its expressions.
type typed struct {
	name  string
	fset  *token.FileSet
	files []*ast.File
	info  *types.Info
}

var loaded []typed

// typedPackages returns all packages of the daemon. They are type-checked once.
func typedPackages(t *testing.T) []typed {
	t.Helper()
	if loaded == nil {
		loaded = loadTyped(t)
	}
	return loaded
}

// loadTyped type-checks all packages of the daemon. Imports come from the build cache.
func loadTyped(t *testing.T) []typed {
	t.Helper()
	cmd := exec.Command("go", "list", "-export", "-deps", "-json=ImportPath,Dir,GoFiles,Export", "./cmd/...",
		"./internal/...")
	cmd.Dir = "../.."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list -export: %v", err)
	}

	exports := map[string]string{}
	var ours []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			pkg
			Export string
		}

		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}

		exports[p.ImportPath] = p.Export
		if strings.HasPrefix(p.ImportPath, module) {
			ours = append(ours, p.pkg)
		}
	}

	lookup := func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) }

	var all []typed
	for _, p := range ours {
		fset := token.NewFileSet()
		var files []*ast.File
		for _, name := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, name), nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, f)
		}

		all = append(all, check(t, fset, p.ImportPath, files, importer.ForCompiler(fset, "gc", lookup)))
	}

	return all
}

func check(t *testing.T, fset *token.FileSet, path string, files []*ast.File, imports types.Importer) typed {
	t.Helper()
	info := &types.Info{
		Types:      map[ast.Expr]types.TypeAndValue{},
		Defs:       map[*ast.Ident]types.Object{},
		Uses:       map[*ast.Ident]types.Object{},
		Selections: map[*ast.SelectorExpr]*types.Selection{},
	}

	conf := types.Config{Importer: imports}
	if _, err := conf.Check(path, fset, files, info); err != nil {
		t.Fatalf("type-check %s: %v", path, err)
	}

	return typed{name: strings.TrimPrefix(path, module), fset: fset, files: files, info: info}
}

// callee returns the called function or method, or nil for a value or a conversion.
func (p *typed) callee(call *ast.CallExpr) *types.Func {
	fun := ast.Unparen(call.Fun)
	if index, ok := fun.(*ast.IndexExpr); ok { // a type argument
		fun = index.X
	}

	var id *ast.Ident
	switch fun := fun.(type) {
	case *ast.Ident:
		id = fun
	case *ast.SelectorExpr:
		id = fun.Sel
	default:
		return nil
	}

	f, _ := p.info.Uses[id].(*types.Func)
	if f == nil {
		return nil
	}

	return f.Origin()
}

// functions calls visit for each function with a body, by its full name.
func functions(all []typed, visit func(p *typed, name string, body *ast.BlockStmt)) {
	for i := range all {
		p := &all[i]
		for _, f := range p.files {
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
					visit(p, p.info.Defs[fn.Name].(*types.Func).FullName(), fn.Body)
				}
			}
		}
	}
}
