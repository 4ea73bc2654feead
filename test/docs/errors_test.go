package docs

import (
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestErrors: an error that a page quotes is one that the program, or Kubernetes, has in these
// words; … stands for what differs.
func TestErrors(t *testing.T) {
	ours, theirs := texts(t, filepath.Join(root, "internal"), filepath.Join(root, "cmd")), []string(nil)
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			at := fmt.Sprintf("%s:%d", p.path, b.line)
			known := ours
			if from := b.marks["from"]; from == "kubernetes" {
				if theirs == nil {
					theirs = kubernetes(t)
				}
				known = theirs
			} else if from != "" {
				t.Errorf("%s: from=%s is not known", at, from)
			}

			if b.language == "error" {
				for _, l := range b.lines() {
					checkQuote(t, at, l, known)
				}
			}
		}
	}
}

// telling is how long a piece of a quotation must be to tell one error from others.
const telling = 12

func checkQuote(t *testing.T, at, quote string, known []string) {
	t.Helper()
	longest := 0
	for piece := range strings.SplitSeq(quote, "…") {
		piece = strings.Trim(piece, " ;:,.()")
		longest = max(longest, len(piece))
		if piece != "" && !slices.ContainsFunc(known, func(s string) bool { return strings.Contains(s, piece) }) {
			t.Errorf("%s: no source has the words %q", at, piece)
		}
	}

	if longest < telling {
		t.Errorf("%s: %q quotes too little", at, quote)
	}
}

var verb = regexp.MustCompile(`%[-+# 0]*[0-9.]*[a-zA-Z]`)

// texts are the strings in the Go source below folders, without tests, with what is put together
// from constants as one. Each verb of a format is a NUL, which no quotation has.
func texts(t *testing.T, dirs ...string) []string {
	t.Helper()
	var all []string
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}

			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}

			ast.Inspect(f, func(n ast.Node) bool {
				e, ok := n.(ast.Expr)
				if !ok {
					return true
				}

				s, ok := constant(e)
				if ok {
					all = append(all, verb.ReplaceAllString(s, "\x00"))
				}

				return !ok
			})

			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	return all
}

// constant is the text of a string, or of several with a plus between.
func constant(e ast.Expr) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, err := strconv.Unquote(e.Value)
		return s, e.Kind == token.STRING && err == nil
	case *ast.BinaryExpr:
		x, ok := constant(e.X)
		y, ok2 := constant(e.Y)
		return x + y, e.Op == token.ADD && ok && ok2
	}

	return "", false
}

// kubernetes are the texts of kubeadm and the kubelet, of the release from which the tests' kubelet
// is built.
func kubernetes(t *testing.T) []string {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", "k8s.io/kubernetes", "k8s.io/cri-client")
	cmd.Dir = filepath.Join(root, "test/kubernetes")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("source of Kubernetes: %v\n%s", err, out)
	}

	var dirs []string
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var m struct{ Path, Dir string }
		if err := d.Decode(&m); err != nil {
			t.Fatal(err)
		}

		if m.Path == "k8s.io/kubernetes" {
			dirs = append(dirs, filepath.Join(m.Dir, "cmd/kubeadm"), filepath.Join(m.Dir, "pkg/kubelet"))
		} else {
			dirs = append(dirs, m.Dir)
		}
	}

	return texts(t, dirs...)
}
