package shell

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"mvdan.cc/sh/v3/syntax"
)

// words returns names, arguments and file contents of other users.
func words() []string {
	return []string{
		"plain", "a b", "", "it's", `"x"`, "$(touch /tmp/x)", "`id`", "; rm -rf /", "a\nb", "\x1b]0;title\a",
		"\x1b[2J", "\xff\xfe", "a\tb", "!!", "*", "~root", "~", "=ls", "#",
		"{a,b}", "\\", "'\\''", "a'b\"c$d`e", "&& id", "| sh", "> /etc/passwd", "-rf", "--help",
		"\u202egnp.exe", "\u200b", "é", strings.Repeat("x", 1<<20), strings.Repeat("'", 2000), "\r", "\x00",
		"$'\\x41'", "%s%n",
		"{}", "{} {}",
	}
}

// TestQuoteRoundTrip passes every word accepted by Quote through a shell.
func TestQuoteRoundTrip(t *testing.T) {
	var line strings.Builder
	var want []string
	for _, w := range words() {
		if quoted, err := Quote(w); err == nil {
			line.WriteString(" " + quoted)
			want = append(want, w)
		}
	}

	for _, name := range []string{"sh", "bash"} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command(name, "-c", "printf '%s\\0'"+line.String()).Output()
			if err != nil {
				t.Fatalf("%v", err)
			}
			if got := strings.Split(strings.TrimSuffix(string(out), "\x00"), "\x00"); !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
}

func TestQuoteErrors(t *testing.T) {
	for _, w := range []string{
		"a\nb", "\x1b[2J", "\xff", "\x00", "\r", "a\tb", "\u202ex", "\u200b", strings.Repeat("x", MaxWord+1),
	} {
		if quoted, err := Quote(w); err == nil {
			t.Errorf("%.20q: got %.40s, want an error", w, quoted)
		}
	}
}

func TestLines(t *testing.T) {
	none := Line{}
	for want, l := range map[string]Line{
		"mv /a '/b c'":                            Command("mv {} {}", "/a", "/b c"),
		"kubeadm init --cri-socket=-x":            Command("kubeadm init --cri-socket={}", "-x"),
		"/bin/d --a=b x":                          none.And(Command("/bin/d --a=b {}", "x")).And(none).Args(),
		"a && b; c":                               Command("a").And(Command("b")).Then(Command("c")),
		"nohup '/my d' --a-b='x y' >>/log 2>&1 &": Run("/my d", Option{"a-b", "x y"}).Detached("/log"),
		"a  # then b":                             Command("a").Note("then b"),
		"swapoff /a '/b c'":                       Command("swapoff").Args("/a", "/b c"),
		"correct 'a b;c', now":                    Advice("correct {}, now", "a\nb;c"),
		"correct 'a b', now":                      Advice("correct {}, now", "a b"),
		refused:                                   Command("rm {}", "-rf"),
	} {
		t.Run(want, func(t *testing.T) {
			if got := l.String(); got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}

	for name, l := range map[string]Line{
		"option": Command("rm {}", "-x"), "operand": Command("rm").Args("-x"), "program": Run("-x"),
		"name": Run("/x", Option{"a;b", ""}), "newline": Run("/x", Option{"a", "\n"}),
		"missing": Command("rm {}"), "too many": Command("rm", "x"),
		"quoted placeholder": Command("echo 'it is {}'", "x"), "apostrophe": Advice("the daemon's {}", "x"),
		"second command": Command("a").And(Command("rm {}", "\x1b")),
	} {
		t.Run(name, func(t *testing.T) {
			if l.Err() == nil || l.String() != refused {
				t.Errorf("got %s, want an error", l)
			}
		})
	}

	if !none.IsZero() || Command("a").IsZero() || Command("rm {}", "-x").IsZero() {
		t.Error("IsZero: want true for the zero Line only")
	}

	b, err := json.Marshal(struct {
		A Line `json:"a"`
		B Line `json:"b,omitzero"`
	}{A: Command("echo {}", "<&>")})
	if err != nil || string(b) != `{"a":"echo '\u003c\u0026\u003e'"}` {
		t.Errorf("%s %v", b, err)
	}
}

// FuzzCommand builds a line from a constant with several commands and from arbitrary words. The
// parsed line must have the same commands, and the words must be literals.
func FuzzCommand(f *testing.F) {
	for _, w := range words() {
		f.Add(w, "other")
		f.Add("other", w)
	}

	f.Fuzz(func(t *testing.T, a, b string) {
		l := Command("grep -q x {} && sed -i --file={} /y | tee -a {}", a, b, a)
		if !utf8.ValidString(l.String()) || len(l.String()) > 3*4*MaxWord+100 {
			t.Fatalf("%q", l)
		}
		if l.Err() != nil {
			return
		}

		file, err := syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).Parse(strings.NewReader(l.String()), "")
		if err != nil {
			t.Fatalf("%s: %v", l, err)
		}

		var calls [][]string
		syntax.Walk(file, func(n syntax.Node) bool {
			switch n := n.(type) {
			case *syntax.CallExpr:
				var call []string
				for _, w := range n.Args {
					call = append(call, literal(t, w))
				}
				calls = append(calls, call)

			case *syntax.CmdSubst, *syntax.ParamExp, *syntax.Redirect, *syntax.ArithmExp, *syntax.Comment,
				*syntax.DblQuoted, *syntax.ExtGlob:
				t.Errorf("%s: contains %T", l, n)
			}

			return true
		})

		want := [][]string{{"grep", "-q", "x", a}, {"sed", "-i", "--file=" + b, "/y"}, {"tee", "-a", a}}
		if len(calls) != 3 || !slices.EqualFunc(calls, want, slices.Equal[[]string]) {
			t.Errorf("%s: got %q, want %q", l, calls, want)
		}
	})
}

// literal returns the text of a word and reports an error for any expansion.
func literal(t *testing.T, w *syntax.Word) string {
	t.Helper()
	var b strings.Builder
	for _, p := range w.Parts {
		switch p := p.(type) {
		case *syntax.Lit:
			b.WriteString(strings.ReplaceAll(p.Value, `\'`, "'"))
		case *syntax.SglQuoted:
			b.WriteString(p.Value)
		default:
			t.Errorf("word contains %T", p)
		}
	}

	return b.String()
}
