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

// TestErrors searches quoted errors in the source of the program or of Kubernetes. In a quote, …
// matches any text.
func TestErrors(t *testing.T) {
	own := messages(t, filepath.Join(root, "internal"), filepath.Join(root, "cmd"))
	var upstream []string
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			at := fmt.Sprintf("%s:%d", p.path, b.line)
			known := own
			if from := b.marks["from"]; from == "kubernetes" {
				if upstream == nil {
					upstream = kubernetesMessages(t)
				}
				known = upstream
			} else if from != "" {
				t.Errorf("%s: unknown mark from=%s", at, from)
			}

			if b.language == "error" {
				for _, l := range b.lines() {
					checkQuote(t, at, l, known)
				}
			}
		}
	}
}

// minQuote is the minimum length of the longest part of a quote, to identify an error.
const minQuote = 12

func checkQuote(t *testing.T, at, quote string, known []string) {
	t.Helper()
	longest := 0
	for piece := range strings.SplitSeq(quote, "…") {
		piece = strings.Trim(piece, " ;:,.()")
		longest = max(longest, len(piece))
		if piece != "" && !slices.ContainsFunc(known, func(s string) bool { return strings.Contains(s, piece) }) {
			t.Errorf("%s: not found in the source: %q", at, piece)
		}
	}

	if longest < minQuote {
		t.Errorf("%s: quote %q is too short", at, quote)
	}
}

var verb = regexp.MustCompile(`%[-+# 0]*[0-9.]*[a-zA-Z]`)

// messages returns the string constants in the Go source below directories, without tests. It joins
// concatenated constants and replaces format verbs with NUL, to match no quote.
func messages(t *testing.T, dirs ...string) []string {
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

// constant returns the value of a string literal or of concatenated literals.
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

// kubernetesMessages returns the string constants of kubeadm and the kubelet, in the release used
// by the tests.
func kubernetesMessages(t *testing.T) []string {
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

	return messages(t, dirs...)
}
