package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// copySource copies the Go source to a directory of its own.
func copySource(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, name := range []string{"cmd", "internal", "test", "hack", "go.mod", "go.sum"} {
		run(t, "cp", "-r", filepath.Join("../..", name), root)
	}

	return root
}

// TestModulePath changes the module path of a copy, which must build with the new path only.
func TestModulePath(t *testing.T) {
	t.Parallel() // the tests of nodes mostly wait
	const path = "example.org/containers/cri-dockerd"
	root := copySource(t)
	run(t, filepath.Join(root, "hack/module-path.sh"), path)
	for dir, want := range map[string]string{
		".":               path,
		"hack/tools":      path + "/hack/tools",
		"test/cilium":     path + "/test/cilium",
		"test/kubernetes": path + "/test/kubernetes",
	} {
		if got := strings.TrimSpace(run(t, "go", "-C", filepath.Join(root, dir), "list", "-m")); got != want {
			t.Errorf("module path of %s: %s, want %s", dir, got, want)
		}
	}

	// The cache has the packages of former runs: without the directory they are the same.
	for _, args := range [][]string{
		{"build", "-trimpath", "-buildvcs=false", "./..."},
		{"vet", "-trimpath", "./internal/check/finding", "./internal/archtest"},
		{"test", "-trimpath", "./internal/archtest", "-run", "TestImports|TestPackageComments"},
	} {
		run(t, "go", append([]string{"-C", root}, args...)...)
	}

	program := filepath.Join(root, "cri-dockerd")
	run(t, "go", "-C", root, "build", "-trimpath", "-buildvcs=false", "-o", program, "./cmd/cri-dockerd")
	if info := run(t, "go", "version", "-m", program); !strings.Contains(info, "\tmod\t"+path) {
		t.Errorf("module of the program:\n%s", info)
	}

	// A second change starts from the new path.
	run(t, filepath.Join(root, "hack/module-path.sh"), "example.org/other")
	out, err := exec.Command("grep", "-rlF", path, root, "--include=*.go", "--include=go.mod").Output()
	files := strings.ReplaceAll(string(out), filepath.Join(root, "test/packages/modulepath_test.go")+"\n", "")
	if files != "" {
		t.Errorf("files with the former path, %v:\n%s", err, files)
	}
}

// TestModulePathRefusesNames checks that names without a host, or with unusual characters, change
// nothing.
func TestModulePathRefusesNames(t *testing.T) {
	root := copySource(t)
	before, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		t.Fatal(err)
	}

	for _, args := range [][]string{
		{}, {""}, {"cri-dockerd"}, {"example.org"}, {"example.org/"}, {"example.org/a b"}, {"example.org/a#b"},
		{"example.org/../a"}, {"example.org/a", "b"},
	} {
		cmd := exec.Command(filepath.Join(root, "hack/module-path.sh"), args...)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "usage:") {
			t.Errorf("%q: %v\n%s", args, err, out)
		}
	}

	if after, err := os.ReadFile(filepath.Join(root, "go.mod")); err != nil || string(after) != string(before) {
		t.Errorf("go.mod was changed, %v", err)
	}
}
