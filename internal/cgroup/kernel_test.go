package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// realGroups creates groups in this machine's kernel, at a path in every hierarchy read by this
// package. It returns a function to move a process there.
func realGroups(t *testing.T, path string) (move func(pid int)) {
	t.Helper()
	var dirs []string
	for _, root := range append(controllers[:], "", "unified") {
		root = filepath.Join(Host().Cgroup, root)
		if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
			continue
		}

		dir := filepath.Join(root, path)
		must(t, os.MkdirAll(dir, 0o755))
		t.Cleanup(func() {
			for dir := dir; dir != root; dir = filepath.Dir(dir) {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // it has other groups
					return
				}
			}
		})

		dirs = append(dirs, dir)
	}

	return func(pid int) {
		t.Helper()
		for _, dir := range dirs {
			must(t, os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0))
		}
	}
}

// sleeper starts an idle process that runs until the test ends.
func sleeper(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	must(t, cmd.Start())
	t.Cleanup(func() { must(t, cmd.Process.Kill()); _ = cmd.Wait() })
	return cmd.Process.Pid
}

// TestProcessThatMovesItself uses real groups. A process of one container moves to the groups of
// another one, as is possible with /sys/fs/cgroup mounted.
func TestProcessThatMovesItself(t *testing.T) {
	k := Host()
	base := fmt.Sprintf("/cri-dockerd-test-%d", os.Getpid())
	own, other := strings.Repeat("a", 64), strings.Repeat("b", 64)
	toOwn, toChild := realGroups(t, base+"/pod1/"+own), realGroups(t, base+"/pod1/"+own+"/child")
	toOther, toSame := realGroups(t, base+"/pod2/"+other), realGroups(t, base+"/pod2/"+other+"/"+own)
	attacker, victim := sleeper(t), sleeper(t)
	toOther(victim)
	score := func(pid int) string { return strings.TrimSpace(read(t, process(k, pid, "oom_score_adj"))) }
	before := score(victim)

	for name, c := range map[string]struct {
		move func(int)
		path string
	}{
		"its own group":                     {toOwn, base + "/pod1/" + own},
		"a group below its own":             {toChild, base + "/pod1/" + own},
		"a group of its own name elsewhere": {toSame, base + "/pod2/" + other + "/" + own},
	} {
		t.Run(name, func(t *testing.T) {
			c.move(attacker)
			g, err := k.FindGroup(attacker, own)
			if err != nil || g.Path() != c.path {
				t.Errorf("group %v, %v", g, err)
				return
			}

			if pids, err := g.PIDs(); err != nil || len(pids) != 1 || pids[0] != attacker {
				t.Errorf("processes %v, %v", pids, err)
			}

			must(t, g.SetOOMScoreAdj(500))
			if score(attacker) != "500" || score(victim) != before {
				t.Errorf("scores %s and %s", score(attacker), score(victim))
			}

			toOther(attacker) // and away again, while the group is open
			if err := g.SetOOMScoreAdj(600); err != nil || score(attacker) != "500" || score(victim) != before {
				t.Errorf("after it has moved on: %v, scores %s and %s", err, score(attacker), score(victim))
			}

			g.Close()
			if g, err := k.FindGroup(attacker, own); !errors.Is(err, errdefs.ErrNotFound) {
				t.Errorf("FindGroup returned the other container's group: %v", g)
			}
		})
	}
}
