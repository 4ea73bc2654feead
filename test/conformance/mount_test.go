package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// mountTmpfs mounts a tmpfs in the engine's mount namespace until the end of the test.
func (n *node) mountTmpfs(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.run(t, "mount", "-t", "tmpfs", "none", dir)
	t.Cleanup(func() { n.run(t, "umount", "-l", dir) })
}

// TestReadOnlyIsNotRecursive checks that readonly alone does not affect mounts below it, as
// documented by Kubernetes (recursiveReadOnly: Disabled is the default). Engine 25 and later would
// make them read-only.
func TestReadOnlyIsNotRecursive(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		n.mountTmpfs(t, filepath.Join(dir, "sub"))
		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/m", Readonly: true}}
		c := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		n.exec(t, c, "sh", "-c", "! touch /m/x 2>/dev/null && touch /m/sub/x")
	})
}

// TestRecursiveReadOnly checks mounts below a recursive read-only mount.
func TestRecursiveReadOnly(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		n.mountTmpfs(t, filepath.Join(dir, "sub"))
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Mounts = []*runtimeapi.Mount{{HostPath: dir, ContainerPath: "/m", Readonly: true, RecursiveReadOnly: true}}
		if !n.hasFeature(t, func(f *runtimeapi.RuntimeHandlerFeatures) bool { return f.GetRecursiveReadOnlyMounts() }) {
			assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.mounts[0].recursive_read_only")
			return
		}

		c := n.startConfig(t, pod, cfg, cc)
		n.exec(t, c, "sh", "-c", "! touch /m/x 2>/dev/null && ! touch /m/sub/x 2>/dev/null")
		if m := n.containerStatus(t, c).Mounts; len(m) != 1 || !m[0].Readonly || !m[0].RecursiveReadOnly {
			t.Errorf("mounts in the status: %v", m)
		}

		cc.Metadata.Name = "writable"
		cc.Mounts[0].Readonly = false
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "recursive_read_only")
	})
}

// hasFeature reports whether the default runtime handler has a feature, according to Status.
func (n *node) hasFeature(t *testing.T, has func(*runtimeapi.RuntimeHandlerFeatures) bool) bool {
	t.Helper()
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, h := range s.RuntimeHandlers {
		if h.Name == "" {
			return has(h.Features)
		}
	}

	return false
}

// TestMountPropagation checks the three modes in both directions.
func TestMountPropagation(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		// A separate shared mount, like the kubelet's volumes.
		n.run(t, "mount", "--bind", dir, dir)
		n.run(t, "mount", "--make-shared", dir)
		t.Cleanup(func() { n.run(t, "umount", "-l", dir) })
		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.Privileged = true
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.Privileged = true
		cc.Mounts = []*runtimeapi.Mount{
			{HostPath: dir, ContainerPath: "/private"},
			{
				HostPath:      dir,
				ContainerPath: "/slave",
				Propagation:   runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER,
			},
			{
				HostPath:      dir,
				ContainerPath: "/shared",
				Propagation:   runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL,
			},
		}

		c := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		mounted := func(path string) bool {
			return strings.Contains(n.exec(t, c, "cat", "/proc/mounts"), " "+path+" ")
		}
		n.mountTmpfs(t, filepath.Join(dir, "host"))
		if mounted("/private/host") || !mounted("/slave/host") || !mounted("/shared/host") {
			t.Errorf("visible mounts of the node: private %t, slave %t, shared %t",
				mounted("/private/host"), mounted("/slave/host"), mounted("/shared/host"))
		}

		n.exec(t, c, "sh", "-c", "mkdir -p /shared/a /slave/b && "+
			"mount -t tmpfs none /shared/a && mount -t tmpfs none /slave/b")
		node := n.run(t, "cat", "/proc/mounts")
		if !strings.Contains(node, dir+"/a ") || strings.Contains(node, dir+"/b ") {
			t.Errorf("visible mounts of the container: shared %t, slave %t",
				strings.Contains(node, dir+"/a "), strings.Contains(node, dir+"/b "))
		}

		n.run(t, "umount", "-l", filepath.Join(dir, "a"))
	})
}

// TestMountsThroughLinks mounts host paths that are links, one of them without a target.
func TestMountsThroughLinks(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		if err := os.MkdirAll(filepath.Join(dir, "real"), 0o755); err != nil {
			t.Fatal(err)
		}

		for link, to := range map[string]string{"link": "real", "dangling": "created/later"} {
			if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}

		cfg := n.podConfig(t)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Mounts = []*runtimeapi.Mount{
			{HostPath: filepath.Join(dir, "link"), ContainerPath: "/link"},
			{HostPath: filepath.Join(dir, "dangling"), ContainerPath: "/dangling"},
		}

		c := n.startConfig(t, n.runPod(t, cfg), cfg, cc)
		n.exec(t, c, "sh", "-c", "touch /link/x /dangling/x")
		for _, f := range []string{"real/x", "created/later/x"} {
			if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
				t.Error(err)
			}
		}
	})
}

// TestDevices checks the permissions of devices, and the error for a missing device.
func TestDevices(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Devices = []*runtimeapi.Device{
			{HostPath: "/dev/loop-control", ContainerPath: "/dev/read-only", Permissions: "r"},
			{HostPath: "/dev/fuse", ContainerPath: "/dev/both", Permissions: "rw"},
		}

		c := n.startConfig(t, pod, cfg, cc)
		got := n.exec(t, c, "sh", "-c", `[ -c /dev/read-only ] && [ -c /dev/both ] && echo nodes
			(: < /dev/read-only) 2>/dev/null && echo read
			(: > /dev/read-only) 2>/dev/null || echo not written
			(: > /dev/both) 2>/dev/null && echo written`)
		if got != "nodes\nread\nnot written\nwritten\n" {
			t.Errorf("devices: %q", got)
		}

		cc = n.containerConfig(sh("sleep 1000"))
		cc.Metadata.Name = "missing"
		cc.Devices = []*runtimeapi.Device{{
			HostPath:      "/dev/no-such-device",
			ContainerPath: "/dev/x",
			Permissions:   "rwm",
		}}

		r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if err == nil { // the engine may report the error at the start
			_, err = n.Runtime.StartContainer(t.Context(),
				&runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
		}

		if err == nil || !strings.Contains(err.Error(), "no-such-device") {
			t.Errorf("container with a missing device: %v", err)
		}
	})
}

// TestCDI requests a device by its CDI name. Without CDI support the daemon must refuse the
// container, because the engine would start it without its device.
func TestCDI(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.run(t, "sh", "-c", `mkdir -p /var/run/cdi && cat > /var/run/cdi/test.json <<'X'
{"cdiVersion": "0.5.0", "kind": "example.org/test",
 "devices": [{"name": "one", "containerEdits": {"env": ["FROM_CDI=yes"]}}]}
X`)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.CDIDevices = []*runtimeapi.CDIDevice{{Name: "example.org/test=one"}}
		if !strings.Contains(n.docker(t, "info", "-f", "{{json .}}"), `"CDISpecDirs":["`) {
			assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "config.CDI_devices")
			return
		}

		c := n.startConfig(t, pod, cfg, cc)
		if got := n.exec(t, c, "cat", "/proc/1/environ"); !strings.Contains(got, "FROM_CDI=yes") {
			t.Errorf("environment lacks the edits of the device: %q", got)
		}
	})
}
