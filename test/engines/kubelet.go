package engines

import (
	"os"
	"os/exec"
	"path/filepath"
)

// kubeletSource is a program that behaves like the kubelet towards systemd: it runs until it is
// stopped, and exits at once if it gets a flag that its version has removed.
const kubeletSource = `package main

import (
	"os"
	"strings"
	"time"
)

func main() {
	for _, a := range os.Args[1:] {
		if strings.HasPrefix(a, "--network-plugin") {
			os.Exit(1)
		}
	}
	time.Sleep(1 << 62)
}
`

// BuildKubelet builds a program with the build information of a kubelet of this version, such as
// "v1.37.2".
func BuildKubelet(tb TB, out, version string) {
	tb.Helper()
	dir, err := os.MkdirTemp("", "kubelet-build-")
	if err != nil {
		tb.Fatalf("build a kubelet: %v", err)
	}
	defer os.RemoveAll(dir)

	files := map[string]string{"go.mod": "module k8s.io/kubernetes\n\ngo 1.24\n", "main.go": kubeletSource}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			tb.Fatalf("build a kubelet: %v", err)
		}
	}

	flag := "-X k8s.io/component-base/version.gitVersion=" + version
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", flag, "-o", out, ".")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "GOWORK=off", "GOFLAGS=", "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build a kubelet: %v\n%s", err, msg)
	}
}
