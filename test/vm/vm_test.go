package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSelectSteps parses selections of steps.
func TestSelectSteps(t *testing.T) {
	for _, c := range []struct{ list, want string }{
		{"", strings.Join(standard, " ")},
		{"none", ""},
		{"deb", "deb"},
		{"check oom@29", "deb check oom@29"},
		{" units@cgroupfs  units@cgroupfs@29 ", "deb units@cgroupfs units@29@cgroupfs"},
		{"check@20.10@systemd", "deb check"},
		{"other", `unknown step "other"`},
		{"check@30", `step "check@30": "30" is neither`},
		{"check@", `step "check@": "" is neither`},
	} {
		t.Run(c.list, func(t *testing.T) {
			selected, err := selectSteps(c.list)
			got := strings.Trim(fmt.Sprint(selected), "[]")
			if err != nil {
				got = err.Error()
			}

			if err == nil && got != c.want || err != nil && !strings.HasPrefix(got, c.want) {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// TestScripts checks that every step has its scripts, and that every script belongs to a step.
func TestScripts(t *testing.T) {
	used := map[string]bool{
		"lib": true, "engine": true, "docker29": true, "kubelet-up": true, // parts of others
	}
	for _, s := range all {
		for _, part := range s.parts {
			name, _, _ := strings.Cut(part, " ")
			used[name] = true
			if _, err := fs.Stat(scripts, "steps/"+name+".sh"); err != nil {
				t.Errorf("step %s: %v", s.name, err)
			}
		}
	}

	files, err := fs.Glob(scripts, "steps/*")
	if err != nil {
		t.Fatal(err)
	}

	for _, f := range files {
		if name := strings.TrimSuffix(strings.TrimPrefix(f, "steps/"), ".sh"); !used[name] {
			t.Errorf("no step uses %s", f)
		}
	}
}

// TestResults continues a run: a failed step is repeated, a passed one is not.
func TestResults(t *testing.T) {
	dir := t.TempDir()
	r, err := openResults(dir, true)
	if err != nil {
		t.Fatal(err)
	}

	begin := time.Date(2026, 11, 29, 15, 0, 0, 0, time.UTC)
	for _, one := range []result{
		{Step: "deb", About: "installs", Result: resultPassed, Begin: begin, Seconds: 61.6},
		{Step: "check", About: "checks", Result: resultFailed, Note: "exit status 1", Begin: begin},
	} {
		if err := r.add(one); err != nil {
			t.Fatal(err)
		}
	}

	if r, err = openResults(dir, true); err != nil || !r.passed("deb") || r.passed("check") || r.passed("oom") {
		t.Fatalf("%v, %v", r, err)
	}

	repeated := result{Step: "check", About: "checks", Result: resultPassed, Begin: begin, Seconds: 1}
	if err := r.add(repeated); err != nil {
		t.Fatal(err)
	}

	want := "| step | test | result | time | date |\n|---|---|---|---|---|\n" +
		"| deb | installs | passed | 1m2s | 2026-11-29 |\n| check | checks | passed | 1s | 2026-11-29 |\n"
	if got := r.markdown(); got != want {
		t.Errorf("table:\n%s\nwant:\n%s", got, want)
	}

	if r, err = openResults(dir, false); err != nil || r.passed("deb") {
		t.Errorf("a new run has results: %v, %v", r, err)
	}
}

// makeFiles creates empty files below a directory.
func makeFiles(t *testing.T, root string, names ...string) {
	t.Helper()
	for _, name := range names {
		file := filepath.Join(root, name)
		err := os.MkdirAll(filepath.Dir(file), 0o755)
		if err == nil {
			err = os.WriteFile(file, nil, 0o600)
		}

		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestHostLacks refuses nodes without cgroup v2 or systemd, with the reason.
func TestHostLacks(t *testing.T) {
	root := t.TempDir()
	err := lacks(root, 1000)
	for _, reason := range []string{"not root", "not cgroup v2", "systemd is not process 1"} {
		if err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%v, want %q", err, reason)
		}
	}

	makeFiles(t, root, "sys/fs/cgroup/cgroup.controllers", "run/systemd/system/x")
	if err := lacks(root, 0); err != nil {
		t.Error(err)
	}
}
