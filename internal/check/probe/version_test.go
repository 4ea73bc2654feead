package probe

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// buildKubelet builds a program of the kubelet's module. The program creates a file if it is run.
func buildKubelet(t *testing.T, file, module string, flags ...string) {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"go.mod": "module " + module + "\n\ngo 1.24\n",
		"main.go": "package main\n\nimport \"os\"\n\nvar gitVersion string\n\nfunc main() {\n\t_ = os.WriteFile(\"" +
			file + ".ran\", nil, 0o644)\n\tprintln(gitVersion)\n}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	cmd := exec.Command("go", append([]string{"build", "-buildvcs=false", "-o", file}, append(flags, ".")...)...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// TestKubeletVersion reads the version from recorded linker flags and, like in published builds
// with -trimpath and without symbols, from strings set by the linker.
func TestKubeletVersion(t *testing.T) {
	const flag = "-X k8s.io/component-base/version.gitVersion="
	for name, c := range map[string]struct {
		module, want string
		flags        []string
	}{
		"recorded": {kubeletModule, "v1.31.4", []string{"-ldflags", flag + "v1.31.4"}},
		"recorded, quoted": {kubeletModule, "v1.31.4-rc.1",
			[]string{"-ldflags", "-X 'k8s.io/component-base/version.gitVersion=v1.31.4-rc.1' -s"}},
		"published": {kubeletModule, "v1.29.15",
			[]string{"-trimpath", "-ldflags", "-s -w -X main.gitVersion=v1.29.15"}},
		"none":            {kubeletModule, "", nil},
		"another program": {"example.org/kubelet", "", []string{"-ldflags", flag + "v1.31.4"}},
		"hostile version": {kubeletModule, "", []string{"-ldflags", flag + "$(id);v1.31.4"}},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "kubelet")
			buildKubelet(t, file, c.module, c.flags...)
			p := tree(t, nil)
			p.root = ""
			if got := p.programVersion(t.Context(), file); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if _, err := os.Stat(file + ".ran"); !errors.Is(err, fs.ErrNotExist) {
				t.Error("the program was run")
			}

			if err := os.Truncate(file, 1<<42); err != nil {
				t.Fatal(err)
			}

			if got := p.programVersion(t.Context(), file); got != "" {
				t.Errorf("program of 4 TiB: got %q", got)
			}
			if err := os.Chmod(file, 0o777); err != nil {
				t.Fatal(err)
			}

			if got := p.programVersion(t.Context(), file); got != "" || len(p.untrusted) != 1 {
				t.Errorf("world-writable program: got %q, untrusted files %+v", got, p.untrusted)
			}
		})
	}
}

func TestKubeletVersionUnknown(t *testing.T) {
	p := tree(t, map[string]string{"/usr/bin/kubelet": "#!/bin/sh\necho Kubernetes v1.31.4\n", "/big": ""})
	if err := os.Truncate(p.path("/big"), 1<<42); err != nil {
		t.Fatal(err)
	}

	for _, program := range []string{
		"/usr/bin/kubelet", "/big", "kubelet", "", "/none", "/usr", strings.Repeat("/x", 5000),
	} {
		t.Run(fmt.Sprintf("%.20s", program), func(t *testing.T) {
			if got := p.programVersion(t.Context(), program); got != "" {
				t.Errorf("got %q", got)
			}
		})
	}
}
