package finding

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"mvdan.cc/sh/v3/syntax"
)

// hostile returns texts of other users: names, arguments, file contents and responses.
func hostile() []string {
	return []string{
		"; rm -rf /evil", "$(touch /evil)", "`touch /evil`", "a\nrm -rf /evil\n", "\x1b]0;evil\a\x1b[2J",
		"\x1b[31mevil", "\xff\xfeevil", "'; evil '", "' && evil #", `"; evil "`,
		"-evil", "--evil=1", "| evil", "> /evil", "evil\x00evil", "\u202egpj.evil", "\r\nevil", "evil\\",
		"evil#evil#e", "s/evil/evil/e", "&evil&", "evil: [evil", "/../../evil", "${IFS}evil", "!evil", "{}",
		"*evil*",
		strings.Repeat("evil ", 1<<18), strings.Repeat("'", 4000), "%s%d%!evil",
	}
}

// poison replaces every text in v, at any depth, with a hostile one, and every other value with a
// random one.
func poison(v reflect.Value, r *rand.Rand, texts []string) {
	switch v.Kind() {
	case reflect.String:
		if v.Type() != reflect.TypeFor[Problem]() {
			v.SetString(texts[r.IntN(len(texts))])
			return
		}
		problems := []Problem{"", Missing, Refused, Denied, Silent, TLS, TooOld, NoSocket, NotRoot, Other}
		v.SetString(string(problems[r.IntN(len(problems))]))

	case reflect.Bool:
		v.SetBool(r.IntN(2) == 0)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(r.IntN(60) - 2))
	case reflect.Uint32, reflect.Uint64:
		v.SetUint(uint64(r.IntN(100)))
	case reflect.Struct:
		if v.Type().PkgPath() == "cri-dockerd/internal/shell" {
			return // package shell has tests of its own
		}
		for i := range v.NumField() {
			poison(v.Field(i), r, texts)
		}

	case reflect.Slice:
		n := r.IntN(4)
		v.Set(reflect.MakeSlice(v.Type(), n, n))
		for i := range n {
			poison(v.Index(i), r, texts)
		}

	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range r.IntN(3) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			poison(key, r, texts)
			if value.Kind() != reflect.Interface {
				poison(value, r, texts)
			}
			v.SetMapIndex(key, value)
		}

	case reflect.Pointer:
		if r.IntN(2) == 0 {
			v.Set(reflect.New(v.Type().Elem()))
			poison(v.Elem(), r, texts)
		}
	}
}

// seasoned returns hostile texts mixed with the values recognized by the rules.
func seasoned() []string {
	var all []string
	for range 2 {
		all = append(all, "", "cni", "kubenet", "json-file", "0", "1", "vfs", "bridge", "flannel", "remote", "systemd",
			"RuntimeReady", "NetworkReady", "ContainerLogs", "PodNetworkNamespaces", "ContainerdShim", "NRIPlugins",
			"network-plugin", "container-runtime-endpoint", "cgroup-driver", "fail-swap-on", "live-restore",
			"pod-infra-container-image", "unix:///run/x.sock", "/etc/x", "nodefs", "imagefs", "29.1.0", "31.0.0")
	}

	return append(all, hostile()...)
}

// TestHostileFacts evaluates many nodes full of hostile texts. The texts of every finding must be
// bounded and printable, and commands must contain hostile bytes only in quoted words.
func TestHostileFacts(t *testing.T) {
	texts := seasoned()
	commands := map[string]bool{}
	for seed := range uint64(800) {
		r := rand.New(rand.NewPCG(seed, 1))
		f := healthy()
		part := reflect.ValueOf(f).Elem()
		if seed%3 == 0 {
			poison(part, r, texts)
		} else { // poison one part of a healthy node, to avoid other causes
			poison(part.Field(r.IntN(part.NumField())), r, texts)
			poison(reflect.ValueOf(&f.Flags).Elem(), r, texts)
			f.Root = seed%7 != 0
		}

		for _, x := range Evaluate(f) {
			check(t, seed, x, commands)
		}
	}

	if len(commands) < 20 {
		t.Errorf("got only %d different commands: %v", len(commands), commands)
	}
}

func check(t *testing.T, seed uint64, x Finding, commands map[string]bool) {
	t.Helper()
	b, err := json.Marshal(x)
	if err != nil || len(b) > 128<<10 {
		t.Fatalf("seed %d: %s: %d bytes of JSON, %v", seed, x.ID, len(b), err)
	}

	if len(x.Detail) > 4<<10 {
		t.Errorf("seed %d: %s: detail has %d bytes", seed, x.ID, len(x.Detail))
	}

	for _, s := range []string{x.Detail, x.Fix.String()} {
		if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool {
			return unicode.IsControl(r) && r != '\n' && r != '\t' || unicode.Is(unicode.Bidi_Control, r)
		}) {
			t.Errorf("seed %d: %s: %.200q", seed, x.ID, s)
		}
	}

	if strings.ContainsAny(x.Fix.String(), "\n\t\r") {
		t.Errorf("seed %d: %s: more than one line: %q", seed, x.ID, x.Fix)
	}
	if problem := harmless(x.Fix.String(), commands); problem != "" {
		t.Errorf("seed %d: %s: %s: %.300s", seed, x.ID, problem, x.Fix)
	}
}

// programs are the programs of suggested commands.
var programs = []string{
	"systemctl", "kill", "sleep", "sed", "mv", "sudo", "newgrp", "chown", "chmod", "nohup", "ip", "apt-get",
	"modprobe", "echo", "docker", "mkdir", "kubectl", "ln", "mount", "timedatectl", "find", "groupadd",
	"sysctl", "tee", "swapoff", "kubeadm", "grep",
	"service", "id", "dpkg", "command", "cut",
}

// harmless parses a line like a shell and returns a problem, or "". Advice does not start with a
// program, but its words must be quoted as well: harmless searches hostile text outside of quotes.
func harmless(line string, commands map[string]bool) string {
	first, _, _ := strings.Cut(line, " ")
	if !slices.Contains(programs, first) && first != "{" {
		for word := range strings.FieldsSeq(unquoted(line)) {
			if strings.Contains(word, "evil") && strings.ContainsAny(word, "`;|<>$&#*!\"\\") {
				return "hostile text outside of quotes in advice"
			}
		}
		return ""
	}

	file, err := syntax.NewParser(syntax.Variant(syntax.LangPOSIX)).Parse(strings.NewReader(line), "")
	if err != nil {
		return fmt.Sprintf("shell syntax error (%v)", err)
	}

	problem := ""
	syntax.Walk(file, func(n syntax.Node) bool {
		switch n := n.(type) {
		case *syntax.CallExpr:
			if len(n.Args) == 0 {
				problem = "contains an assignment"
				return false
			}
			name := n.Args[0].Lit()
			if !slices.Contains(programs, name) {
				problem = fmt.Sprintf("runs %q", name)
			}
			commands[name] = true
			for _, w := range n.Args[1:] {
				if lit := w.Lit(); strings.HasPrefix(lit, "-") && strings.Contains(lit, "evil") &&
					!strings.Contains(lit, "=") {
					problem = "hostile option " + lit
				}
			}
			if name == "sed" {
				problem += sedRuns(n)
			}

		case *syntax.CmdSubst:
			if strings.Contains(line[n.Pos().Offset():n.End().Offset()], "evil") {
				problem = "hostile command substitution"
			}

		case *syntax.ParamExp, *syntax.ArithmExp:
			problem = "contains an expansion"
		}

		return true
	})

	return problem
}

// unquoted returns a line without its parts in single quotes.
func unquoted(line string) string {
	var b strings.Builder
	quoted := false
	for i := 0; i < len(line); i++ {
		switch {
		case line[i] == '\'':
			quoted = !quoted
		case !quoted && line[i] == '\\':
			i++
		case !quoted:
			b.WriteByte(line[i])
		}
	}

	return b.String()
}

// plain matches texts without special meaning in a shell, in sed or in a file.
var plain = regexp.MustCompile(`^[-A-Za-z0-9/.:,_=@%+]*$`)

// sedRuns returns a problem if an expression of sed contains hostile text, since sed can run
// programs and write files.
func sedRuns(call *syntax.CallExpr) string {
	for _, w := range call.Args {
		for _, p := range w.Parts {
			q, quoted := p.(*syntax.SglQuoted)
			if !quoted || !strings.HasPrefix(q.Value, "s/") && !strings.HasPrefix(q.Value, "s#") {
				continue
			}

			for _, h := range hostile() {
				if strings.Contains(h, "evil") && !plain.MatchString(h) && strings.Contains(q.Value, h) {
					return "hostile expression of sed " + q.Value
				}
			}
		}
	}

	return ""
}
