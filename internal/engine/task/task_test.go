package task

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/proc"
)

const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// process writes the files of a process for package proc.
func process(t *testing.T, dir string, pid, parent int, address string) {
	t.Helper()
	p := filepath.Join(dir, strconv.Itoa(pid))
	if err := os.MkdirAll(filepath.Join(p, "cwd"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"stat":        strconv.Itoa(pid) + " (a) name) S " + strconv.Itoa(parent) + " 1 1",
		"cgroup":      "0::/docker/" + id + "\n",
		"cwd/address": address,
	} {
		if err := os.WriteFile(filepath.Join(p, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestFindAddress reads the address from the working directory of the shim.
func TestFindAddress(t *testing.T) {
	good := "unix:///run/containerd/s/" + id
	for name, c := range map[string]struct {
		id, address, want string
	}{
		"found":             {id, good + "\n", "/run/containerd/s/" + id},
		"another container": {strings.Repeat("f", 64), good, ""},
		"elsewhere":         {id, "unix:///tmp/" + id, ""},
		"a path upwards":    {id, "unix:///run/containerd/s/../../" + id, ""},
		"no file":           {id, "", ""},
		"large":             {id, strings.Repeat("a", maxAddress+1), ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			process(t, dir, 10, 5, "")
			process(t, dir, 5, 1, c.address)
			got, err := findAddress(proc.At(dir), 10, c.id)
			if got != c.want || (err == nil) != (c.want != "") {
				t.Errorf("%q, %v; want %q", got, err, c.want)
			}
		})
	}
}

// TestCheckpointWithoutAShim expects the reason for a process that has ended.
func TestCheckpointWithoutAShim(t *testing.T) {
	err := Checkpoint(t.Context(), proc.At(t.TempDir()), 10, id, "/images", "/work")
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("error %v", err)
	}
}
