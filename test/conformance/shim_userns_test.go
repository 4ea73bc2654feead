package conformance

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// userns is a user namespace with different users and groups.
func userns() *runtimeapi.UserNamespace {
	return &runtimeapi.UserNamespace{
		Mode: runtimeapi.NamespaceMode_POD,
		Uids: []*runtimeapi.IDMapping{{HostId: 1 << 20, Length: 65536}},
		Gids: []*runtimeapi.IDMapping{{HostId: 1 << 21, Length: 65536}},
	}
}

// usernsPod returns the configuration of a pod with a user namespace.
func (n *node) usernsPod(t *testing.T) *runtimeapi.PodSandboxConfig {
	t.Helper()
	cfg := n.podConfig(t)
	cfg.Linux.SecurityContext.NamespaceOptions = &runtimeapi.NamespaceOption{
		Pid:           runtimeapi.NamespaceMode_CONTAINER,
		UsernsOptions: userns(),
	}

	return cfg
}

// usernsContainer returns the configuration of a container in a pod. Kubelets send the namespaces
// of the pod with each container.
func (n *node) usernsContainer(cfg *runtimeapi.PodSandboxConfig) *runtimeapi.ContainerConfig {
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Linux.SecurityContext.NamespaceOptions = cfg.Linux.SecurityContext.NamespaceOptions
	return cc
}

// mapped returns a mount with the mappings of userns.
func mapped(host, container string) *runtimeapi.Mount {
	return &runtimeapi.Mount{
		HostPath:      host,
		ContainerPath: container,
		UidMappings:   userns().Uids,
		GidMappings:   userns().Gids,
	}
}

// TestUserNamespace checks a pod with a user namespace (CRI UserNamespace): root inside is nobody
// outside, in the pause, a container and an exec.
func TestUserNamespace(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		if !n.hasFeature(t, (*runtimeapi.RuntimeHandlerFeatures).GetUserNamespaces) {
			t.Error("the runtime handler does not report user namespaces")
		}

		cfg := n.usernsPod(t)
		pod := n.runPod(t, cfg)
		c := n.startConfig(t, pod, cfg, n.usernsContainer(cfg))
		for _, id := range []string{pod, c} {
			if got := strings.Fields(n.procStatus(t, id, "Uid"))[0]; got != "1048576" {
				t.Errorf("user of %s on the node: %s, want 1048576", id, got)
			}
			if got := strings.Fields(n.procStatus(t, id, "Gid"))[0]; got != "2097152" {
				t.Errorf("group of %s on the node: %s, want 2097152", id, got)
			}
		}

		ns := func(id, kind string) string {
			return n.run(t, "readlink", "/proc/"+n.pid(t, id)+"/ns/"+kind)
		}
		if ns(pod, "user") != ns(c, "user") || ns(pod, "user") == n.run(t, "readlink", "/proc/1/ns/user") {
			t.Errorf("user namespaces: pause %s, container %s", ns(pod, "user"), ns(c, "user"))
		}

		for command, want := range map[string]string{
			"id -u; id -g":                                       "0\n0\n",
			"tr -s ' ' < /proc/self/uid_map":                     " 0 1048576 65536\n",
			"tr -s ' ' < /proc/self/gid_map":                     " 0 2097152 65536\n",
			"hostname":                                           cfg.Hostname + "\n",
			"stat -c %u:%g /bin/busybox /etc/hosts":              "0:0\n0:0\n",
			"stat -c %u:%g /etc/resolv.conf":                     "0:0\n",
			"touch /new && chown 7:8 /new && stat -c %u:%g /new": "7:8\n",
			"ls /sys/class/net/lo >/dev/null && echo sysfs":      "sysfs\n",
			"echo x > /dev/shm/x && cat /dev/shm/x":              "x\n",
			"echo out > /dev/stdout":                             "out\n",
		} {
			if got := n.exec(t, c, "sh", "-c", command); got != want {
				t.Errorf("%s: %q, want %q", command, got, want)
			}
		}

		if n.eng != nil { // containerd 2.4 differs
			owners := map[bool]string{true: "0:0\n", false: "65534:65534\n"}[mapsMemory(t)]
			if got := n.exec(t, c, "stat", "-c", "%u:%g", "/dev/shm"); got != owners {
				t.Errorf("owners of /dev/shm: %q, want %q", got, owners)
			}
			if got := n.exec(t, c, "cat", "/proc/sys/net/ipv4/ping_group_range"); got != "0\t65535\n" {
				t.Errorf("groups that may ping: %q, want all", got)
			}
		}

		want := cfg.Linux.SecurityContext.NamespaceOptions
		got := n.podStatus(t, pod).GetLinux().GetNamespaces().GetOptions()
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("namespaces in the status:\n%s", diff)
		}

		n.assertNoStage(t, pod, c)
		n.stopPod(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
	})
}

// mapsMemory reports whether the kernel can map the owners of a tmpfs.
func mapsMemory(t *testing.T) bool {
	t.Helper()
	var name unix.Utsname
	var major, minor int
	if err := unix.Uname(&name); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(name.Release[:]), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 3
}

// assertNoStage checks that the shim leaves no mapped mounts of a container on the node. Containers
// of other tests may be starting, with mounts.
func (n *node) assertNoStage(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if got := n.run(t, "sh", "-c", "grep /run/cri-dockerd-shim/"+id+" /proc/self/mountinfo || true"); got != "" {
			t.Errorf("mounts on the node:\n%s", got)
		}
	}
}

// TestUserNamespaceVolumes checks the owners of volumes with and without mappings.
func TestUserNamespaceVolumes(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		if err := os.Chmod(dir, 0o755); err != nil { // nobody reads it without a mapping
			t.Fatal(err)
		}
		for file, owner := range map[string][2]int{"root": {0, 0}, "user": {1000, 2000}} {
			path := filepath.Join(dir, file)
			if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Chown(path, owner[0], owner[1]); err != nil {
				t.Fatal(err)
			}
		}

		secret := filepath.Join(n.tempDir(t), "secret")
		n.run(t, "mkdir", "-p", secret)
		if mapsMemory(t) {
			n.run(t, "mount", "-t", "tmpfs", "none", secret)
			t.Cleanup(func() { n.run(t, "umount", "-l", secret) })
		}
		n.run(t, "sh", "-c", "umask 077; echo key > "+secret+"/key")

		cfg := n.usernsPod(t)
		pod := n.runPod(t, cfg)
		cc := n.usernsContainer(cfg)
		cc.Mounts = []*runtimeapi.Mount{
			mapped(dir, "/mapped"),
			{HostPath: dir, ContainerPath: "/plain"},
			mapped(secret, "/secret"),
			mapped(filepath.Join(dir, "user"), "/file"),
		}
		cc.Mounts[2].Readonly = true
		c := n.startConfig(t, pod, cfg, cc)
		for command, want := range map[string]string{
			"stat -c %u:%g /mapped/root /mapped/user /file":           "0:0\n1000:2000\n1000:2000\n",
			"stat -c %u:%g /plain/root /plain/user":                   "65534:65534\n65534:65534\n",
			"cat /secret/key":                                         "key\n",
			"touch /secret/x 2>/dev/null || echo read-only":           "read-only\n",
			"touch /mapped/new && chown 5:6 /mapped/new && echo done": "done\n",
			"touch /plain/other 2>/dev/null || echo refused":          "refused\n",
			"umask": "0022\n",
		} {
			if got := n.exec(t, c, "sh", "-c", command); got != want {
				t.Errorf("%s: %q, want %q", command, got, want)
			}
		}

		if got := n.run(t, "stat", "-c", "%u:%g", dir+"/new"); got != "5:6\n" {
			t.Errorf("owners of a new file on the node: %q, want 5:6", got)
		}

		for _, m := range n.containerStatus(t, c).Mounts {
			if has := len(m.UidMappings) == 1 && len(m.GidMappings) == 1; has != (m.ContainerPath != "/plain") {
				t.Errorf("mappings of %s in the status: %v, %v", m.ContainerPath, m.UidMappings, m.GidMappings)
			}
		}
		n.assertNoStage(t, pod, c)
	})
}

// TestUserNamespaceDocker checks Docker's commands that read and write the layers of a container
// with a user namespace: they see the owners inside.
func TestUserNamespaceDocker(t *testing.T) {
	eachShim(t, func(t *testing.T, n *node) {
		cfg := n.usernsPod(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		n.exec(t, c, "sh", "-c", "mkdir /made && echo 1 > /made/a && chown 5:6 /made/a && rm /etc/passwd")
		got := n.docker(t, "diff", c)
		if !strings.Contains(got, "A /made/a") || !strings.Contains(got, "D /etc/passwd") {
			t.Errorf("docker diff:\n%s", got)
		}

		if got := n.copyOut(t, c, "/made/a"); got.Uid != 5 || got.Gid != 6 {
			t.Errorf("owners of a copied file: %d:%d, want 5:6", got.Uid, got.Gid)
		}

		in := n.eng.Dir + "/copied"
		n.run(t, "sh", "-c", "echo 2 > "+in+"; chown 7:8 "+in)
		n.docker(t, "cp", "-a", in, c+":/made/b")
		if got := n.exec(t, c, "stat", "-c", "%u:%g", "/made/b"); got != "7:8\n" {
			t.Errorf("owners of a file of docker cp: %q, want 7:8", got)
		}

		image := strings.TrimSpace(n.docker(t, "commit", c))
		t.Cleanup(func() { n.docker(t, "rmi", "-f", image) })
		got = n.docker(t, "run", "--rm", "--network", "none", "--entrypoint", "stat", image, "-c", "%u:%g", "/made/a")
		if got != "5:6\n" {
			t.Errorf("owners in a committed image: %q, want 5:6", got)
		}

		n.docker(t, "top", c)
		n.docker(t, "exec", c, "true")
		n.docker(t, "stop", "-t", "1", c)
		n.docker(t, "start", c)
		if got := n.docker(t, "exec", c, "stat", "-c", "%u:%g", "/made/a"); got != "5:6\n" {
			t.Errorf("owners after a restart: %q, want 5:6", got)
		}
	})
}

// copyOut returns the header of a file in the archive of docker cp.
func (n *node) copyOut(t *testing.T, id, path string) *tar.Header {
	t.Helper()
	h, err := tar.NewReader(strings.NewReader(n.docker(t, "cp", id+":"+path, "-"))).Next()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// assertForbidden expects the error of a request that the CRI forbids. Ours names the field.
func (n *node) assertForbidden(t *testing.T, name string, err error, field string) {
	t.Helper()
	named := status.Code(err) == codes.InvalidArgument && strings.Contains(err.Error(), field)
	if err == nil || n.eng != nil && !named {
		t.Errorf("%s: %v, want InvalidArgument with the field", name, err)
	}
}

// TestUserNamespaceRules checks the requests that the CRI forbids (CRI UserNamespace).
func TestUserNamespaceRules(t *testing.T) {
	eachFeature(t, func(t *testing.T, n *node) {
		for name, change := range map[string]func(*runtimeapi.NamespaceOption){
			"mode CONTAINER": func(o *runtimeapi.NamespaceOption) {
				o.UsernsOptions.Mode = runtimeapi.NamespaceMode_CONTAINER
			},
			"mode TARGET": func(o *runtimeapi.NamespaceOption) {
				o.UsernsOptions.Mode = runtimeapi.NamespaceMode_TARGET
			},
			"two mappings": func(o *runtimeapi.NamespaceOption) {
				o.UsernsOptions.Uids = append(o.UsernsOptions.Uids,
					&runtimeapi.IDMapping{ContainerId: 65536, HostId: 1 << 22, Length: 1})
			},
			"no mapping":   func(o *runtimeapi.NamespaceOption) { o.UsernsOptions.Gids = nil },
			"no root":      func(o *runtimeapi.NamespaceOption) { o.UsernsOptions.Uids[0].ContainerId = 1 },
			"no IDs":       func(o *runtimeapi.NamespaceOption) { o.UsernsOptions.Uids[0].Length = 0 },
			"too many IDs": func(o *runtimeapi.NamespaceOption) { o.UsernsOptions.Uids[0].Length = 1<<32 - 1 },
			"host network": func(o *runtimeapi.NamespaceOption) { o.Network = runtimeapi.NamespaceMode_NODE },
			"host PIDs":    func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_NODE },
			"host IPC":     func(o *runtimeapi.NamespaceOption) { o.Ipc = runtimeapi.NamespaceMode_NODE },
		} {
			cfg := n.usernsPod(t)
			change(cfg.Linux.SecurityContext.NamespaceOptions)
			_, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			n.assertForbidden(t, name, err, "namespace_options")
		}

		if n.eng != nil { // more than the CRI forbids
			cfg := n.usernsPod(t)
			cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions.Uids[0].HostId = 0
			_, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
			n.assertForbidden(t, "root outside", err, "namespace_options")
		}

		cfg := n.podConfig(t)
		cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &runtimeapi.UserNamespace{
			Mode: runtimeapi.NamespaceMode_NODE,
		}
		pod := n.runPod(t, cfg)
		if got := n.procStatus(t, pod, "Uid"); !strings.HasPrefix(got, "0") && !strings.HasPrefix(got, "65535") {
			t.Errorf("user of a pod with mode NODE: %s", got)
		}

		cc := n.usernsContainer(cfg)
		cc.Mounts = []*runtimeapi.Mount{mapped("/tmp", "/v")}
		_, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if n.eng != nil { // containerd 2.4 accepts it
			n.assertForbidden(t, "mapped mount in a pod without a user namespace", err, "uidMappings")
		}
	})
}
