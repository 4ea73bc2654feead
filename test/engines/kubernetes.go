package engines

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// kubeletRead builds test/kubernetes/kubeletread once, next to the tests' other programs. Go's
// build cache contains the kubelet's packages from hack/kubernetes.sh, with the same flags.
var kubeletRead = sync.OnceValues(func() (program string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}

	program = filepath.Join(cache, "cri-dockerd-test", "kubeletread")
	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}")
	module, err := cmd.Output()
	if err != nil {
		return "", err
	}

	cmd = exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program,
		"./kubeletread")
	cmd.Dir = filepath.Join(string(module[:len(module)-1]), "test/kubernetes")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, msg)
	}

	return program, nil
})

// KubeletRead builds the program to read a CRI runtime with the kubelet's own code, and returns its
// path.
func KubeletRead(tb TB) string {
	tb.Helper()
	program, err := kubeletRead()
	if err != nil {
		tb.Fatalf("build kubeletread: %v", err)
	}
	return program
}
