package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"cri-dockerd/test/engines"
)

// unitPackages have tests that read the kernel's control groups.
var unitPackages = []string{"internal/cgroup", "internal/stats", "internal/podstats", "internal/proc"}

// payload is what the node needs from this machine, built on demand.
type payload struct {
	dir  string
	sent map[string]bool
}

// newPayload creates the directory of the built files.
func newPayload(dir string) (*payload, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}

	return &payload{dir: dir, sent: map[string]bool{}}, os.MkdirAll(dir, 0o755)
}

// send builds the files of a step and copies those that the node lacks.
func (p *payload) send(ctx context.Context, m machine, s selection) error {
	for _, part := range []struct {
		name   string
		needed bool
		local  func(context.Context) (string, error)
	}{
		{"steps", true, p.steps},
		{"deb", s.name == "deb", p.deb},
		{"units", s.name == "units", p.units},
		{"conformance", true, p.conformance},
		{"pods", true, p.pods},
		{"docker29", s.engine == "29" || strings.HasPrefix(s.name, "upgrade"), p.docker29},
		{"kubernetes", s.name == "kubelet", p.kubernetes},
	} {
		if !part.needed || p.sent[part.name] {
			continue
		}

		local, err := part.local(ctx)
		if err != nil {
			return fmt.Errorf("build %s: %w", part.name, err)
		}

		if err := m.send(ctx, local, part.name); err != nil {
			return err
		}

		p.sent[part.name] = true
	}

	return nil
}

// steps writes the scripts.
func (p *payload) steps(context.Context) (string, error) {
	return filepath.Join(p.dir, "steps"), os.CopyFS(p.dir, scripts)
}

// deb builds the package.
func (p *payload) deb(ctx context.Context) (string, error) {
	out := filepath.Join(p.dir, "deb")
	cmd := exec.CommandContext(ctx, "hack/package.sh")
	cmd.Env = append(os.Environ(), "VERSION=1.0.0~vm", "MAINTAINER=vm <vm@localhost>", "ARCHES=amd64", "OUT="+out)
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("hack/package.sh: %w\n%s", err, msg)
	}

	return out, nil
}

// units builds the unit tests, each in a directory with its testdata.
func (p *payload) units(ctx context.Context) (string, error) {
	out := filepath.Join(p.dir, "units")
	for _, pkg := range unitPackages {
		if err := buildTest(ctx, pkg, filepath.Join(out, filepath.Base(pkg))); err != nil {
			return "", err
		}
	}

	return out, nil
}

// conformance builds the conformance suite.
func (p *payload) conformance(ctx context.Context) (string, error) {
	out := filepath.Join(p.dir, "conformance")
	return out, buildTest(ctx, "test/conformance", out)
}

// pods builds the program that runs pods.
func (p *payload) pods(ctx context.Context) (string, error) {
	out := filepath.Join(p.dir, "pods")
	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}

	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out+"/", "./test/vm/pods")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("test/vm/pods: %w\n%s", err, msg)
	}

	return out, nil
}

// buildTest builds the test program of a package and copies its testdata.
func buildTest(ctx context.Context, pkg, out string) error {
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}

	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-trimpath", "-ldflags", "-s -w", "-o",
		filepath.Join(out, "test"), "./"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", pkg, err, msg)
	}

	err := os.CopyFS(filepath.Join(out, "testdata"), os.DirFS(filepath.Join(pkg, "testdata")))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}

	return err
}

// docker29 builds Docker 29.
func (p *payload) docker29(ctx context.Context) (string, error) {
	return filepath.Join(engines.Cache(), "docker-29"), hack(ctx, "docker29.sh")
}

// kubernetes builds Kubernetes and links the programs of a control plane without a scheduler.
func (p *payload) kubernetes(ctx context.Context) (string, error) {
	out := filepath.Join(p.dir, "kubernetes")
	if err := hack(ctx, "kubernetes.sh", "kubelet", "cluster"); err != nil {
		return "", err
	}

	mod, err := os.ReadFile("test/kubernetes/go.mod")
	if err != nil {
		return "", err
	}

	version := regexp.MustCompile(`k8s\.io/kubernetes (v[0-9.]+)`).FindSubmatch(mod)
	if version == nil {
		return "", errors.New("test/kubernetes/go.mod has no version of k8s.io/kubernetes")
	}

	if err := os.MkdirAll(out, 0o755); err != nil {
		return "", err
	}

	for _, program := range []string{"kubelet", "kube-apiserver", "etcd", "kubectl"} {
		file := filepath.Join(engines.Cache(), "kubernetes-"+string(version[1]), program)
		if err := os.Symlink(file, filepath.Join(out, program)); err != nil {
			return "", err
		}
	}

	return out, nil
}

// hack runs a script of the directory hack.
func hack(ctx context.Context, script string, args ...string) error {
	if msg, err := exec.CommandContext(ctx, "hack/"+script, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("hack/%s: %w\n%s", script, err, msg)
	}

	return nil
}
