package takeover

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"mvdan.cc/sh/v3/syntax"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
)

// TestHostileNames uses hostile text in all names of images, pods and containers. The report stays
// bounded and printable, with one line for each finding, and commands quote every word.
func TestHostileNames(t *testing.T) {
	for _, evil := range []string{
		"; rm -rf /evil", "$(touch /evil)", "`touch /evil`",
		"a\n\nActions required before the daemon starts:\n  evil: evil\n    -> rm -rf /", "\x1b[2J\x1b]0;evil\a",
		"\xff\xfe", "'; touch /evil; '", "-evil", "\tevil\r\nevil", "\u202eevil",
		strings.Repeat("evil ", 1<<17),
	} {
		t.Run(fmt.Sprintf("%.20q", evil), func(t *testing.T) {
			s := node(
				sandbox("aa", evil, func(s *model.Sandbox) { s.Metadata.Namespace, s.Metadata.Uid = evil, evil }),
				member("a1", "aa", evil, func(c *model.Container) {
					c.LogPath, c.EngineLogPath, c.Name = evil, "/docker/"+evil, evil
				}),
				member("a2", "aa", evil, func(c *model.Container) { c.LogDriver, c.EngineLogPath = evil, "" }),
				member("g1", "gg", evil, func(c *model.Container) { c.Name = evil }),
				sandbox("bb", evil, ours), member("b1", "bb", evil, criLog),
			)

			s.plugin, s.host.EngineVersion = "cni", evil
			s.cache["aa"] = podnet.Connection{
				Network: evil,
				Problem: evil,
				Ports:   []*runtimeapi.PortMapping{{HostPort: 1, HostIp: evil}},
			}

			s.checkpoints["aa"] = checkpointFile{file: "/notes/" + evil, problem: evil}
			s.checkpoints["zz"] = checkpointFile{file: "/notes/" + evil}
			s.logLinks["a1"] = ""
			s.misfits = []engine.Misfit{
				{ID: "-" + evil, Name: evil, Reason: evil},
				{ID: "99", Name: evil, Reason: evil},
			}

			r, h := s.report(), s.handBack()
			var out bytes.Buffer
			r.text(&out)
			h.text(&out, true)
			want := 0
			for _, f := range r.Findings {
				want += strings.Count(out.String(), "    -> "+f.Fix.String()+"\n")
				if !strings.HasPrefix(f.Fix.String(), "ln -sfn ") && !strings.HasPrefix(f.Fix.String(), "docker rm") {
					continue
				}
				if n := commands(t, f.Fix.String()); n != 1 {
					t.Errorf("%d commands in %s", n, f.Fix)
				}
			}

			const heading = "Actions required before the daemon starts:\n"
			if want < len(r.Findings) || strings.Count(out.String(), heading) > 1 {
				t.Errorf("a name creates additional lines:\n%.3000s", &out)
			}

			both, err := json.Marshal([]any{r, h})
			if err = errors.Join(err, json.Unmarshal(both, new(any))); err != nil || len(both) > 128<<10 ||
				out.Len() > 128<<10 {
				t.Errorf("%d bytes of JSON, %d of text, %v", len(both), out.Len(), err)
			}

			if !utf8.Valid(out.Bytes()) ||
				strings.ContainsFunc(out.String(), func(r rune) bool {
					return unicode.IsControl(r) && r != '\n' ||
						unicode.Is(unicode.Bidi_Control, r)
				}) {
				t.Errorf("control characters:\n%.3000q", &out)
			}
		})
	}
}

// commands counts the commands in a shell line, including substitutions and redirections.
func commands(t *testing.T, line string) (n int) {
	t.Helper()
	file, err := syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).Parse(strings.NewReader(line), "")
	if err != nil {
		t.Errorf("%s: %v", line, err)
		return 0
	}

	syntax.Walk(file, func(node syntax.Node) bool {
		switch node.(type) {
		case *syntax.CallExpr, *syntax.CmdSubst, *syntax.Redirect, *syntax.ParamExp:
			n++
		}
		return true
	})

	return n
}
