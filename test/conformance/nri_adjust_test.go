package conformance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// adjusting returns a connected plugin that adjusts every container.
func (n *node) adjusting(t *testing.T, a *api.ContainerAdjustment) *plugin {
	t.Helper()
	p := newPlugin(10, "adjusting")
	p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		return a, nil, nil
	}
	return p.connect(t, n)
}

// TestNRIResources adjusts the resources of a container, with and without the shim. An update of
// another field keeps them.
func TestNRIResources(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		a := &api.ContainerAdjustment{}
		a.SetLinuxCPUShares(321)
		a.SetLinuxCPUSetCPUs("0")
		a.SetLinuxMemoryLimit(77 << 20)
		score := 555
		a.SetLinuxOomScoreAdj(&score)
		n.adjusting(t, a)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 128 << 20}
		c := n.startConfig(t, pod, cfg, cc)
		assert := func(when string) {
			t.Helper()
			if got := n.exec(t, c, "cat", "/proc/1/oom_score_adj"); got != "555\n" {
				t.Errorf("%s: OOM score %q, want 555", when, got)
			}
			if got := n.procStatus(t, c, "Cpus_allowed_list"); got != "0" {
				t.Errorf("%s: CPUs %q, want 0", when, got)
			}
			limit := n.exec(t, c, "sh", "-c",
				"cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null; true")
			if limit != fmt.Sprintln(77<<20) {
				t.Errorf("%s: memory limit %q, want %d", when, limit, 77<<20)
			}

			r := n.containerStatus(t, c).GetResources().GetLinux()
			if r.GetCpuShares() != 321 || r.GetCpusetCpus() != "0" || r.GetMemoryLimitInBytes() != 77<<20 {
				t.Errorf("%s: resources of the status: %v", when, r)
			}
		}
		assert("after the start")

		if _, err := n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c,
			Linux:       &runtimeapi.LinuxContainerResources{CpuQuota: 50000, CpuPeriod: 100000},
		}); err != nil {
			t.Errorf("UpdateContainerResources: %v", err)
		}
		assert("after an update")
	})
}

// fullAdjustment has adjustments that only the shim can carry out. directory is on the node.
func fullAdjustment(directory string) *api.ContainerAdjustment {
	a := &api.ContainerAdjustment{}
	a.AddEnv("FROM_PLUGIN", "yes")
	a.AddAnnotation("plugin.example/a", "b")
	a.AddMount(&api.Mount{Destination: "/plugin", Source: directory, Type: "bind", Options: []string{"rbind", "ro"}})
	a.AddRlimit("RLIMIT_NOFILE", 2222, 1111)
	a.AddDevice(&api.LinuxDevice{
		Path:     "/dev/plugin-null",
		Type:     "c",
		Major:    1,
		Minor:    3,
		FileMode: api.FileMode(os.FileMode(0o666)),
	})
	a.SetArgs([]string{"sh", "-c", "sleep 1000; true"})
	a.SetLinuxSysctl("net.ipv4.ip_unprivileged_port_start", "77")
	a.AddHooks(&api.Hooks{Poststart: []*api.Hook{{
		Path: "/bin/sh",
		Args: []string{"sh", "-c", "echo ran > " + filepath.Join(directory, "hook")},
	}}})

	return a
}

// TestNRIAdjustments adjusts everything that Docker's API cannot express. Without the shim it fails
// the creation with the names of the adjustments.
func TestNRIAdjustments(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		dir := filepath.Join(n.eng.Dir, "plugin")
		err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o644))
		if err != nil {
			t.Fatal(err)
		}

		n.adjusting(t, fullAdjustment(dir))
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("false"))
		created, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if !n.usesShim(t, pod) {
			for _, name := range []string{"environment", "mounts", "devices", "hooks", "arguments", "--containers",
				"10-adjusting"} {
				if err == nil || !strings.Contains(err.Error(), name) {
					t.Errorf("the error does not name %q: %v", name, err)
				}
			}
			if code := status.Code(err); code != codes.FailedPrecondition {
				t.Errorf("code %s, want FailedPrecondition", code)
			}
			if list, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}); err != nil ||
				len(list.Containers) > 0 {
				t.Errorf("containers: %v, %v", list, err)
			}
			return
		}

		if err != nil {
			t.Fatal(err)
		}

		c := created.ContainerId
		if _, err := n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{
			ContainerId: c,
		}); err != nil {
			t.Fatal(err)
		}

		for command, want := range map[string]string{
			"tr '\\0' '\\n' < /proc/1/environ | grep FROM_PLUGIN": "FROM_PLUGIN=yes\n",
			"echo $FROM_PLUGIN": "yes\n",
			"cat /plugin/f":     "x",
			"touch /plugin/g 2>/dev/null || echo read-only":     "read-only\n",
			"grep 'Max open files' /proc/1/limits | tr -s ' '":  "Max open files 1111 2222 files \n",
			"echo y > /dev/plugin-null && echo written":         "written\n",
			"cat /proc/sys/net/ipv4/ip_unprivileged_port_start": "77\n",
			"tr '\\0' ' ' < /proc/1/cmdline":                    "sh -c sleep 1000; true ",
		} {
			if got := n.exec(t, c, "sh", "-c", command); got != want {
				t.Errorf("%s: %q, want %q", command, got, want)
			}
		}
		eventually(t, "the hook", func() bool {
			b, err := os.ReadFile(filepath.Join(dir, "hook"))
			return err == nil && string(b) == "ran\n"
		})
	})
}

// TestNRIRefusedAdjustments checks that no adjustment is left out.
func TestNRIRefusedAdjustments(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		var a *api.ContainerAdjustment
		p := newPlugin(10, "refused")
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return a, nil, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		class := &api.ContainerAdjustment{}
		class.SetLinuxBlockIOClass("fast")
		rdt := &api.ContainerAdjustment{}
		rdt.SetLinuxRDTClass("../gold")
		for want, adjust := range map[string]*api.ContainerAdjustment{
			"block I/O class":   class,
			"RDT class":         rdt,
			"io.cri-dockerd.co": {Annotations: map[string]string{"io.cri-dockerd.container": "{}"}},
		} {
			a = adjust
			_, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod,
				Config:        n.containerConfig(sh("true")),
				SandboxConfig: cfg,
			})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want one with %q", err, want)
			}
		}
	})
}

// TestNRICDIDevices injects CDI devices by the specifications of the node. A device without one
// prevents the start. Without the shim the creation fails.
func TestNRICDIDevices(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		n.run(t, "sh", "-c", `mkdir -p /var/run/cdi && cat > /var/run/cdi/nri.json <<'X'
{"cdiVersion": "0.5.0", "kind": "example.org/nri", "devices": [{"name": "one", "containerEdits": {
"env": ["CDI_DEVICE=one"], "deviceNodes": [{"path": "/dev/cdi-null", "hostPath": "/dev/null"}]}}]}
X`)
		device := "example.org/nri=one"
		p := newPlugin(10, "cdi")
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return &api.ContainerAdjustment{CDIDevices: []*api.CDIDevice{{Name: device}}}, nil, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		create := func(name string) (string, error) {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name = name
			r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod,
				Config:        cc,
				SandboxConfig: cfg,
			})
			return r.GetContainerId(), err
		}

		c, err := create("known")
		if !n.usesShim(t, pod) {
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "CDI devices") {
				t.Errorf("error %v, want FailedPrecondition with the adjustment", err)
			}
			return
		}

		if err != nil {
			t.Fatal(err)
		}

		n.startID(t, c)
		if got := n.exec(t, c, "sh", "-c", "echo x > /dev/cdi-null && echo $CDI_DEVICE"); got != "one\n" {
			t.Errorf("device and variable: %q", got)
		}

		device = "example.org/nri=two"
		if c, err = create("unknown"); err != nil {
			t.Fatal(err)
		}
		_, err = n.Runtime.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: c})
		if err == nil || !strings.Contains(err.Error(), device) {
			t.Errorf("start with an unknown device: %v", err)
		}
	})
}

// TestNRIUpdates lets a plugin change updates of the kubelet, update another container in
// responses, and update and evict containers by itself.
func TestNRIUpdates(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		update := func(id string, shares uint64) *api.ContainerUpdate {
			u := &api.ContainerUpdate{ContainerId: id}
			u.SetLinuxCPUShares(shares)
			return u
		}
		var other string
		p := newPlugin(10, "updates")
		p.onUpdate = func(c *api.Container, _ *api.LinuxResources) ([]*api.ContainerUpdate, error) {
			return []*api.ContainerUpdate{update(c.GetId(), 777), update(other, 778)}, nil
		}
		p.onStop = func(*api.Container) []*api.ContainerUpdate { return []*api.ContainerUpdate{update(other, 779)} }
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		other = n.startNamed(t, pod, cfg, "other", sh("sleep 1000"))
		shares := func(id string, want int64) {
			t.Helper()
			eventually(t, "updated resources", func() bool {
				return n.containerStatus(t, id).GetResources().GetLinux().GetCpuShares() == want
			})
		}

		if _, err := n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c,
			Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 300},
		}); err != nil {
			t.Errorf("UpdateContainerResources: %v", err)
		}
		shares(c, 777)
		shares(other, 778)

		failed, err := p.stub.UpdateContainers([]*api.ContainerUpdate{
			update(c, 900), update(strings.Repeat("ab", 32), 1), update("../"+c[3:], 1),
		})
		if err != nil || len(failed) != 2 {
			t.Errorf("updates by the plugin itself: failed %v, %v; want two unknown containers", failed, err)
		}
		shares(c, 900)

		if _, err := n.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{
			ContainerId: c,
		}); err != nil {
			t.Errorf("StopContainer: %v", err)
		}
		shares(other, 779)
	})
}

// assertCheckOfPlugins expects that check lists the plugin, and finds one with an invalid name.
func (n *node) assertCheckOfPlugins(t *testing.T, plugins string, args []string) {
	t.Helper()
	wrong := filepath.Join(plugins, "logger")
	if err := os.WriteFile(wrong, nil, 0o755); err != nil {
		t.Fatal(err)
	}

	p := &checkedNode{command: n.eng.Command, program: n.Daemon.Program}
	args = append([]string{"--container-runtime-endpoint=unix://" + n.Daemon.Socket,
		"--docker-endpoint=unix://" + n.eng.Socket}, args...)
	found := map[string]finding{}
	for _, f := range p.check(t, args...) {
		found[f.ID] = f
	}

	if f := found["nri-plugins"]; f.Status != "ok" || f.Detail != "10-env" {
		t.Errorf("finding %+v, want the plugin 10-env", f)
	}
	if f := found["nri-files"]; f.Status != "fail" || !strings.Contains(f.Fix, "chmod a-x "+wrong) {
		t.Errorf("finding %+v, want the fix of %s", f, wrong)
	}
}

// TestNRIPluginDirectory lets the daemon start a plugin with its configuration.
func TestNRIPluginDirectory(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)

	for _, v := range engines.ShimVersions() {
		t.Run(string(v), func(t *testing.T) { testPluginDirectory(t, newNode(t, v)) })
	}
}

func testPluginDirectory(t *testing.T, n *node) {
	plugins, conf := filepath.Join(n.eng.Dir, "plugins"), filepath.Join(n.eng.Dir, "conf")
	err := errors.Join(os.Mkdir(plugins, 0o755), os.Mkdir(conf, 0o755),
		os.WriteFile(filepath.Join(conf, "10-env.conf"), []byte("configured\n"), 0o644))
	if err != nil {
		t.Fatal(err)
	}

	program := filepath.Join(plugins, "10-env")
	engines.Build(t, program, "cri-dockerd/test/nriplugin", "", false)
	args := []string{"--nri-socket=" + n.nriSocket(), "--nri-plugin-dir=" + plugins, "--nri-config-dir=" + conf}
	n.Daemon = n.eng.Daemon(t, append(args, "--containers=shim")...)

	cfg := n.podConfig(t)
	pod := n.runPod(t, cfg)
	c := n.start(t, pod, cfg, sh("sleep 1000"))
	if got := n.exec(t, c, "sh", "-c", "echo $PLUGIN"); got != "configured\n" {
		t.Errorf("PLUGIN=%q, want the plugin's configuration", got)
	}
	n.assertPlugins(t, "PluginsConnected", "10-env")
	n.assertCheckOfPlugins(t, plugins, args)
}
