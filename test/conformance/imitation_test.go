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
)

// imitationSource is a program of another user. With IMITATION in its environment it waits, and
// with IMITATION_LISTENS it also listens on a socket. Any other execution leaves a mark.
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

// hostileArgs returns arguments that execute commands if they are pasted into a shell or trusted.
func hostileArgs(dir, marks string) []string {
	return []string{
		"--config=" + dir + "/fifo",
		"--network-plugin=cni",
		"--container-runtime-endpoint=unix:///evil/$(touch " + marks + "/pasted)",
		"--cgroup-driver=evil`touch " + marks + "/pasted`",
		"--docker-endpoint=unix:///tmp/evil'; touch " + marks + "/pasted; '",
		"--pod-infra-container-image=\x1b]0;evil\a\x1b[2J\nevil",
		"--cni-conf-dir=-evil",
		"--evil; touch " + marks + "/pasted",
		"--cri-dockerd-root-directory=/tmp/evil\xff",
	}
}

// buildImitations builds the program under the names that check searches for. It returns the
// directories of the programs and of their marks.
func buildImitations(t *testing.T, p *checkedNode, n *node) (dir, marks string) {
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
		t.Fatalf("go build: %v\n%s", err, out)
	}

	dir, err := os.MkdirTemp("/tmp", "imitation-") // accessible to other users and inside the node
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

// imitate starts a program through a wrapper such as setpriv or unshare and waits for its first
// line.
func (p *checkedNode) imitate(t *testing.T, program string, args, environment []string, wrapper ...string) {
	t.Helper()
	words := slices.Concat(wrapper, []string{program}, args)
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
		_ = cmd.Wait() // killed above
	})

	line := make([]byte, 100)
	if k, err := out.Read(line); err != nil || !strings.HasPrefix(string(line[:k]), "started") {
		t.Fatalf("%v: %q, %v", words, line[:k], err)
	}
}

// summarize returns the findings without texts that vary between runs.
func summarize(all []finding) []string {
	var out []string
	for _, f := range all {
		out = append(out, f.ID+" "+f.Status+" "+f.Fix+" "+f.Cause)
	}
	slices.Sort(out)
	return out
}

// TestImitations starts processes of an unprivileged user, and of root in other namespaces, with
// the names of the kubelet, Docker and the daemon. They do not change the findings of check. check
// does not run, trust or print anything of theirs. It trusts the same process of root on this host,
// but does not run it either.
func TestImitations(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := newCheckedNode(t, n)
		dir, marks := buildImitations(t, p, n)
		before := summarize(p.check(t))
		nobody := []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"}
		wrappers := [][]string{
			nobody,
			{"setpriv", "--ruid=65534", "--regid=65534", "--clear-groups"}, // the real user only
			{"unshare", "-m"},
			{"unshare", "-p", "--fork"},
			slices.Concat(nobody, []string{"unshare", "-U", "-r"}),
			{"unshare", "-U", "-r"},
		}

		for _, wrapper := range wrappers {
			for _, name := range []string{"kubelet", "cri-dockerd", "dockerd"} {
				p.imitate(t, dir+"/"+name, hostileArgs(dir, marks), nil, wrapper...)
			}
		}

		if diff := cmp.Diff(before, summarize(p.check(t))); diff != "" {
			t.Errorf("findings changed: %s", diff)
		}

		for _, args := range [][]string{
			{"check"},
			{"check", "-o", "json"},
			{"takeover", "--dry-run", "--docker-endpoint=unix://" + n.eng.Socket},
		} {
			began := time.Now()
			out, err := p.command(p.program, args...).CombinedOutput()
			var exit *exec.ExitError
			if err != nil && !errors.As(err, &exit) {
				t.Error(err)
			}

			if s := string(out); strings.Contains(s, "evil") || strings.Contains(s, "imitation") ||
				strings.Contains(s, "\x1b") || len(out) == 0 || time.Since(began) > scaled(10*time.Second) {
				t.Errorf("%v after %s printed:\n%q", args, time.Since(began), s)
			}
		}

		p.imitate(t, dir+"/kubelet", hostileArgs(dir, marks), nil) // as root on this host: a real kubelet
		all := p.check(t)
		i := slices.IndexFunc(all, func(f finding) bool { return f.ID == "kubelet-flags" })
		if i < 0 || !strings.Contains(all[i].Detail, "--network-plugin") {
			t.Errorf("findings lack the flags of root's kubelet: %+v", all)
		}

		for _, f := range all {
			if strings.Contains(f.Detail+f.Fix, "\x1b") || strings.HasPrefix(f.Fix, "sed") &&
				strings.Contains(f.Fix, "evil") {
				t.Errorf("finding with hostile text: %+v", f)
			}
		}

		p.sh(t, "[ -z \"$(ls "+marks+")\" ]")
	})
}

// TestSocketsOfOtherUsers has an unprivileged user serve the sockets that check connects to. check
// reports the user and does not trust the socket.
func TestSocketsOfOtherUsers(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		p := newCheckedNode(t, n)
		dir, _ := buildImitations(t, p, n)
		theirs := dir + "/theirs.sock"
		p.imitate(t, dir+"/kubelet", nil, []string{"IMITATION_LISTENS=" + theirs}, "setpriv", "--reuid=65534",
			"--regid=65534", "--clear-groups")
		moved := n.eng.Dir + "/moved.sock" // in a directory of root
		p.sh(t, "ln "+theirs+" "+moved+" || mv "+theirs+" "+moved)
		for _, c := range []struct{ flag, id string }{
			{"--container-runtime-endpoint", "daemon"},
			{"--docker-endpoint", "engine"},
		} {
			t.Run(c.flag, func(t *testing.T) {
				all := p.check(t, c.flag+"=unix://"+moved)
				i := slices.IndexFunc(all, func(f finding) bool { return f.ID == c.id })
				want := "is not trusted: a process of user 65534 listens at " + moved
				if i < 0 || all[i].Status != "fail" || !strings.Contains(all[i].Detail, want) {
					t.Errorf("finding %+v, want %q", all[max(i, 0)], want)
				}
			})
		}

		cmd := p.command(p.program, "takeover", "--dry-run", "--docker-endpoint=unix://"+moved)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), "a process of user 65534 listens") {
			t.Errorf("takeover: %v\n%s", err, out)
		}
	})
}
