package engines

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
)

// kubernetesModule returns the directory of the module that builds Kubernetes.
var kubernetesModule = sync.OnceValues(func() (dir string, err error) {
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return "", fmt.Errorf("go list: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(out)), "test/kubernetes"), nil
})

// kubernetesVersion returns the version of Kubernetes under test, such as "v1.37.2".
var kubernetesVersion = sync.OnceValues(func() (string, error) {
	if v := os.Getenv("KUBERNETES"); v != "" {
		return "v" + strings.TrimPrefix(v, "v"), nil
	}

	module, err := kubernetesModule()
	if err != nil {
		return "", err
	}

	return versionIn(filepath.Join(module, "go.mod"))
})

var requirement = regexp.MustCompile(`(?m)^(?:require|\t) ?k8s\.io/kubernetes (v\S+)`)

// versionIn returns the version of Kubernetes that a go.mod requires.
func versionIn(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}

	m := requirement.FindSubmatch(b)
	if m == nil {
		return "", fmt.Errorf("%s has no version of k8s.io/kubernetes", file)
	}

	return string(m[1]), nil
}

// KubernetesVersion returns the version of Kubernetes under test, such as "v1.37.2": the one in the
// environment variable KUBERNETES, else the one in test/kubernetes/go.mod.
func KubernetesVersion(tb TB) string {
	tb.Helper()
	v, err := kubernetesVersion()
	if err != nil {
		tb.Fatalf("version of Kubernetes: %v", err)
	}
	return v
}

// KubernetesMinor returns the minor version of Kubernetes under test, such as 37.
func KubernetesMinor(tb TB) int {
	tb.Helper()
	version := KubernetesVersion(tb)
	var minor, patch int
	if _, err := fmt.Sscanf(version, "v1.%d.%d", &minor, &patch); err != nil {
		tb.Fatalf("version of Kubernetes %q: %v", version, err)
	}
	return minor
}

// KubernetesProgram returns the path of a program of Kubernetes, or of an add-on, in the version
// under test. set is the argument of hack/kubernetes.sh that builds the program.
func KubernetesProgram(tb TB, set, name string) string {
	tb.Helper()
	version := KubernetesVersion(tb)
	program := filepath.Join(Cache(), "kubernetes-"+version, name)
	if _, err := os.Stat(program); err != nil {
		tb.Fatalf("%s is not built; run KUBERNETES=%s hack/kubernetes.sh %s: %v", name, version, set, err)
	}
	return program
}

// KubernetesSource returns the directory of the source of Kubernetes, in the version of
// test/kubernetes/go.mod.
func KubernetesSource(tb TB) string {
	tb.Helper()
	module, err := kubernetesModule()
	if err != nil {
		tb.Fatalf("source of Kubernetes: %v", err)
	}

	cmd := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "k8s.io/kubernetes")
	cmd.Dir = module
	out, err := cmd.Output()
	if err != nil {
		tb.Fatalf("source of Kubernetes: go list: %v", err)
	}

	return strings.TrimSpace(string(out))
}

// kubeletRead builds test/kubernetes/kubeletread once, next to the tests' other programs. Go's
// build cache contains the kubelet's packages from hack/kubernetes.sh, with the same flags.
var kubeletRead = sync.OnceValues(func() (program string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}

	program = filepath.Join(cache, "cri-dockerd-test", "kubeletread")
	module, err := kubernetesModule()
	if err != nil {
		return "", err
	}

	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", program,
		"./kubeletread")
	cmd.Dir = module
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
