package archtest

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// Limits for readability: functions and files in lines, interfaces and services in methods.
const (
	maxFunction       = 60
	maxFunctionP90    = 30
	maxTestFunction   = 80
	maxFile           = 400
	maxInterface      = 9
	maxEngine         = 14 // for interfaces named Engine: the engine has this many verbs
	maxServiceMethods = 70 // 41 RPCs and their steps
)

// largeFiles lists files longer than maxFile. Add none, and let none grow.
var largeFiles = map[string]int{}

// isProgram reports whether a file is part of the daemon rather than of its tests.
func isProgram(path string) bool {
	isTest := strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "test/")
	return !isTest && !strings.HasPrefix(path, "internal/engine/enginetest/")
}

func TestSizesOfFunctions(t *testing.T) {
	var all []int
	parse(t, func(path string, fset *token.FileSet, f *ast.File) {
		most := maxTestFunction
		if isProgram(path) {
			most = maxFunction
		}

		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}

			n := fset.Position(fn.End()).Line - fset.Position(fn.Pos()).Line + 1
			if n > most {
				t.Errorf("%s: %s has %d lines, at most %d", path, fn.Name.Name, n, most)
			}
			if isProgram(path) {
				all = append(all, n)
			}
		}
	})

	slices.Sort(all)
	if p90 := all[len(all)*9/10]; p90 > maxFunctionP90 {
		t.Errorf("the 90th percentile of function sizes is %d lines, at most %d", p90, maxFunctionP90)
	}
}

func TestSizesOfFiles(t *testing.T) {
	large := map[string]bool{}
	parse(t, func(path string, fset *token.FileSet, f *ast.File) {
		if !isProgram(path) {
			return
		}

		most, known := largeFiles[path]
		if !known {
			most = maxFile
		}

		n := fset.File(f.Pos()).LineCount()
		if n > most {
			t.Errorf("%s has %d lines, at most %d", path, n, most)
		}

		large[path] = n > maxFile
	})

	for path := range largeFiles {
		if !large[path] {
			t.Errorf("%s is in largeFiles but has at most %d lines", path, maxFile)
		}
	}
}

func TestSizesOfInterfaces(t *testing.T) {
	parse(t, func(path string, _ *token.FileSet, f *ast.File) {
		if !isProgram(path) {
			return
		}

		ast.Inspect(f, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}

			if i, ok := spec.Type.(*ast.InterfaceType); ok {
				most := maxInterface
				if spec.Name.Name == "Engine" {
					most = maxEngine
				}
				if n := i.Methods.NumFields(); n > most {
					t.Errorf("%s: interface %s has %d methods, at most %d", path, spec.Name.Name, n, most)
				}
			}

			return true
		})
	})
}

func TestMethodsOfTheService(t *testing.T) {
	methods := 0
	parse(t, func(path string, _ *token.FileSet, f *ast.File) {
		if !strings.HasPrefix(path, "internal/cri/") || !isProgram(path) {
			return
		}

		for _, d := range f.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Recv == nil {
				continue
			}

			if star, ok := fn.Recv.List[0].Type.(*ast.StarExpr); ok {
				if id, ok := star.X.(*ast.Ident); ok && id.Name == "Service" {
					methods++
				}
			}
		}
	})

	if methods == 0 || methods > maxServiceMethods {
		t.Errorf("cri.Service has %d methods, at most %d", methods, maxServiceMethods)
	}
}
