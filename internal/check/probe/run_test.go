package probe

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestNoProgramsRun checks that the packages for gathering facts about processes and files of other
// users contain no call to run a program.
func TestNoProgramsRun(t *testing.T) {
	forbidden := map[string][]string{
		"exec":    {"Command", "CommandContext", "Cmd"},
		"os":      {"StartProcess"},
		"syscall": {"Exec", "ForkExec", "StartProcess"},
		"unix":    {"Exec"},
	}

	seen := 0
	for _, root := range []string{"..", "../../takeover", "../../proc", "../../rootonly", "../../shell"} {
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}

			seen++
			fset := token.NewFileSet()
			file, err := parser.ParseFile(fset, path, nil, 0)
			if err != nil {
				return err
			}

			ast.Inspect(file, func(n ast.Node) bool {
				sel, isSelector := n.(*ast.SelectorExpr)
				if !isSelector {
					return true
				}
				if x, isName := sel.X.(*ast.Ident); isName && slices.Contains(forbidden[x.Name], sel.Sel.Name) {
					t.Errorf("%s: %s.%s", fset.Position(n.Pos()), x.Name, sel.Sel.Name)
				}

				return true
			})

			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	if seen < 20 {
		t.Errorf("parsed only %d files", seen)
	}
}
