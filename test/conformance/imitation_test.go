package conformance

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/test/engines"
)

// imitationSource is a program of another user. It waits, and perhaps listens, if its environment
// says so; if it is run in any other way, it leaves a mark.
const imitationSource = `package main

import (
	"net"
	"os"
	"path/filepath"
	"time"
)

func main() {
	if os.Getenv("IMITATION") == "" {
		_ = os.WriteFile(filepath.Join("MARKS", filepath.Base(os.Args[0])), nil, 0o644)
		return
	}
	if path := os.Getenv("IMITATION_LISTENS"); path != "" {
		if _, err := net.Listen("unix", path); err != nil {
			panic(err)
		}
	}
	println("started")
	time.Sleep(time.Hour)
}
`

// hostileArgs are arguments that run something if they are pasted or believed.
func hostileArgs(dir, marks string) []string {
	return []string{
		"--config=" + dir + "/fifo", "--network-plugin=cni", "--container-runtime-endpoint=unix:///evil/$(touch " +
			marks + "/pasted)", "--cgroup-driver=evil`touch " + marks + "/pasted`",
		"--docker-endpoint=unix:///tmp/evil'; touch " + marks + "/pasted; '",
		"--pod-infra-container-image=\x1b]0;evil\a\x1b[2J\nevil", "--cni-conf-dir=-evil", "--evil; touch " + marks +
			"/pasted",
		"--cri-dockerd-root-directory=/tmp/evil\xff",
	}
}

// imitations builds the program under the names that check searches for, and returns where the
// programs are and where their marks would be.
func imitations(t *testing.T, p *patient, n *node) (dir, marks string) {
	t.Helper()
	marks = filepath.Join(n.eng.Dir, "marks")
	source := t.TempDir()
	program := filepath.Join(source, "program")
	for name, content := range map[string]string{
		"go.mod":  "module k8s.io/kubernetes\n\ngo 1.24\n",
		"main.go": strings.ReplaceAll(imitationSource, "MARKS", marks),
	} {
		if err := os.WriteFile(filepath.Join(source, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	version := "-X k8s.io/component-base/version.gitVersion=v1.36.3"
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", version, "-o", program, ".")
	cmd.Dir, cmd.Env = source, append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	dir, err := os.MkdirTemp("/tmp", "imitation-") // other users reach it, and the node sees it
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { os.RemoveAll(dir) })
	p.sh(t, "mkdir -p "+marks+" && chmod 0777 "+marks+" "+dir+" && mkfifo "+dir+"/fifo")
	for _, name := range []string{"kubelet", "cri-dockerd", "dockerd"} {
		p.sh(t, "cp "+program+" "+dir+"/"+name+" && chmod 0755 "+dir+"/"+name)
	}

	return dir, marks
}

// imitate starts a program through others, such as setpriv or unshare, and waits for its first
// line.
func (p *patient) imitate(t *testing.T, program string, args, environment []string, through ...string) {
	t.Helper()
	words := slices.Concat(through, []string{program}, args)
	cmd := p.command("env", slices.Concat([]string{"IMITATION=1"}, environment, words)...)
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}

	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		p.sh(t, "pkill -KILL -f '^"+program+"'; true")
		_ = cmd.Wait() // it was killed
	})

	line := make([]byte, 100)
	if k, err := out.Read(line); err != nil || !strings.HasPrefix(string(line[:k]), "started") {
		t.Fatalf("%v: %q, %v", words, line[:k], err)
	}
}

// verdicts are what findings say of the node, without texts that change by themselves.
func verdicts(all []finding) []string {
	var out []string
	for _, f := range all {
		out = append(out, f.ID+" "+f.Status+" "+f.Fix+" "+f.Because)
	}
	slices.Sort(out)
	return out
}

// TestImitations starts processes of an unprivileged user, and of root in other namespaces, that
// look like the kubelet, Docker and the daemon. They change no finding of check, and nothing of
// theirs is run, believed or printed. The same process of root on this host is believed, and is not
// run either.
func TestImitations(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := newPatient(t, n)
		dir, marks := imitations(t, p, n)
		before := verdicts(p.check(t))
		others := map[string][]string{
			"nobody":            {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"},
			"nobody as real":    {"setpriv", "--ruid=65534", "--regid=65534", "--clear-groups"},
			"a mount namespace": {"unshare", "-m"},
			"a PID namespace":   {"unshare", "-p", "--fork"},
			"a user namespace": {"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-U",
				"-r"},
			"root's user as map": {"unshare", "-U", "-r"},
		}

		for _, through := range others {
			for _, name := range []string{"kubelet", "cri-dockerd", "dockerd"} {
				p.imitate(t, dir+"/"+name, hostileArgs(dir, marks), nil, through...)
			}
		}

		if diff := cmp.Diff(before, verdicts(p.check(t))); diff != "" {
			t.Errorf("findings changed: %s", diff)
		}

		for _, args := range [][]string{{"check"}, {"check", "-o", "json"},
			{"takeover", "--dry-run", "--docker-endpoint=unix://" + n.eng.Socket}} {
			began := time.Now()
			out, err := p.command(p.program, args...).CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Error(err)
			}

			if s := string(out); strings.Contains(s, "evil") || strings.Contains(s, "imitation") ||
				strings.Contains(s, "\x1b") || len(out) == 0 || time.Since(began) > 10*time.Second {
				t.Errorf("%v after %s:\n%q", args, time.Since(began), s)
			}
		}

		p.imitate(t, dir+"/kubelet", hostileArgs(dir, marks), nil) // of root on this host: this one is the kubelet
		all := p.check(t)
		i := slices.IndexFunc(all, func(f finding) bool { return f.ID == "kubelet-flags" })
		if i < 0 || !strings.Contains(all[i].Detail, "--network-plugin") {
			t.Errorf("root's kubelet is not seen: %+v", all)
		}

		for _, f := range all {
			if strings.Contains(f.Detail+f.Fix, "\x1b") || strings.HasPrefix(f.Fix, "sed") &&
				strings.Contains(f.Fix, "evil") {
				t.Errorf("%+v", f)
			}
		}

		p.sh(t, "[ -z \"$(ls "+marks+")\" ]")
	})
}

// TestSocketsOfOthers serves what check asks at sockets of an unprivileged user: it is named and
// not believed.
func TestSocketsOfOthers(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := newPatient(t, n)
		dir, _ := imitations(t, p, n)
		theirs := dir + "/theirs.sock"
		p.imitate(t, dir+"/kubelet", nil, []string{"IMITATION_LISTENS=" + theirs}, "setpriv", "--reuid=65534",
			"--regid=65534", "--clear-groups")
		moved := n.eng.Dir + "/moved.sock" // in a directory of root's
		p.sh(t, "ln "+theirs+" "+moved+" || mv "+theirs+" "+moved)
		for _, c := range []struct{ flag, id string }{{"--container-runtime-endpoint", "daemon"},
			{"--docker-endpoint", "engine"}} {
			all := p.check(t, c.flag+"=unix://"+moved)
			i := slices.IndexFunc(all, func(f finding) bool { return f.ID == c.id })
			if i < 0 || all[i].Status != "fail" ||
				!strings.Contains(all[i].Detail, "a process of user 65534 listens at "+moved+"; it is not believed") {
				t.Errorf("%s: %+v", c.flag, all[max(i, 0)])
			}
		}

		if n.eng.Version == engines.V29 { // takeover's client is the same for both
			out, err := p.command(p.program, "takeover", "--dry-run", "--docker-endpoint=unix://"+
				moved).CombinedOutput()
			if err == nil || !strings.Contains(string(out), "a process of user 65534 listens") {
				t.Errorf("takeover: %v\n%s", err, out)
			}
		}
	})
}
