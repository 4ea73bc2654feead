package archtest

import (
	"go/ast"
	"go/token"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// shortWord is a word that occurs inside of other words: "own" in "unknown", "end" in "append".
var shortWord = regexp.MustCompile(`^[a-z]{1,3}$`)

// TestNeedlesAreSpecific checks that no test searches for a short word with strings.Contains.
// Almost any text contains it, so the test cannot fail.
func TestNeedlesAreSpecific(t *testing.T) {
	files := 0
	parse(t, func(path string, fset *token.FileSet, file *ast.File) {
		if !strings.HasSuffix(path, "_test.go") {
			return
		}

		files++
		ast.Inspect(file, func(n ast.Node) bool {
			call, isCall := n.(*ast.CallExpr)
			if !isCall || !isContains(call) {
				return true
			}

			needle, isLiteral := call.Args[1].(*ast.BasicLit)
			if !isLiteral {
				return true
			}
			if word, err := strconv.Unquote(needle.Value); err == nil && shortWord.MatchString(word) {
				t.Errorf("%s: a test for %q passes for many other texts; search for more of the text, or compare it",
					fset.Position(call.Pos()), word)
			}

			return true
		})
	})

	if files < 200 {
		t.Errorf("parsed only %d test files", files)
	}
}

// isContains reports whether a call is strings.Contains or bytes.Contains.
func isContains(call *ast.CallExpr) bool {
	sel, isSelector := call.Fun.(*ast.SelectorExpr)
	if !isSelector || sel.Sel.Name != "Contains" || len(call.Args) != 2 {
		return false
	}
	x, isName := sel.X.(*ast.Ident)
	return isName && (x.Name == "strings" || x.Name == "bytes")
}
