package conformance

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/google/go-cmp/cmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestNRIOrder checks the events of a pod and a container, in the order of NRI's documentation.
func TestNRIOrder(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		p := newPlugin(10, "order").connect(t, n)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		if _, err := n.Runtime.UpdateContainerResources(t.Context(), &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: c,
			Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 300},
		}); err != nil {
			t.Errorf("UpdateContainerResources: %v", err)
		}

		if _, err := n.Runtime.UpdatePodSandboxResources(t.Context(), &runtimeapi.UpdatePodSandboxResourcesRequest{
			PodSandboxId: pod,
		}); err != nil {
			t.Errorf("UpdatePodSandboxResources: %v", err)
		}

		for range 2 { // the second call changes nothing
			if _, err := n.Runtime.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{
				ContainerId: c,
			}); err != nil {
				t.Errorf("StopContainer: %v", err)
			}
		}

		n.stopPod(t, pod)
		n.removePod(t, pod)

		want := []string{"RunPodSandbox", "CreateContainer", "PostCreateContainer", "StartContainer",
			"PostStartContainer", "UpdateContainer", "PostUpdateContainer", "UpdatePodSandbox", "PostUpdatePodSandbox",
			"StopContainer", "StopPodSandbox", "RemoveContainer", "RemovePodSandbox"}
		if diff := cmp.Diff(want, p.all("")); diff != "" {
			t.Errorf("events: %s", diff)
		}

		n.assertNoLeftovers(t, cfg)
		n.assertNoAdjustments(t)
	})
}

// assertNoAdjustments checks that the daemon has no file of a plugin's object.
func (n *node) assertNoAdjustments(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(n.eng.Dir + "/run/nri")
	if err != nil && !errors.Is(err, os.ErrNotExist) || len(entries) > 0 {
		t.Errorf("remaining adjustments: %v, %v", entries, err)
	}
}

// TestNRIMetadata checks what plugins see of a pod and a container.
func TestNRIMetadata(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		p := newPlugin(10, "metadata").connect(t, n)
		cfg := n.podConfig(t)
		cfg.Labels, cfg.Annotations = map[string]string{"l": "1"}, map[string]string{"a": "2"}
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Labels, cc.Annotations = map[string]string{"cl": "1"}, map[string]string{"ca": "2"}
		cc.Envs = []*runtimeapi.KeyValue{{Key: "V", Value: []byte("x")}}
		cc.Linux.Resources = &runtimeapi.LinuxContainerResources{CpuShares: 256, MemoryLimitInBytes: 64 << 20}
		cc.Mounts = []*runtimeapi.Mount{{ContainerPath: "/m", HostPath: "/usr", Readonly: true}}
		id := n.startConfig(t, pod, cfg, cc)

		got := p.find(t, "RunPodSandbox").pod
		if m := cfg.Metadata; got.GetId() != pod || got.GetName() != m.Name || got.GetUid() != m.Uid ||
			got.GetNamespace() != m.Namespace || got.GetLabels()["l"] != "1" || got.GetAnnotations()["a"] != "2" {
			t.Errorf("pod: %v", got)
		}

		if ip := n.podStatus(t, pod).GetNetwork().GetIp(); !slices.Equal(got.GetIps(), []string{ip}) {
			t.Errorf("addresses of the pod: %v, want %s", got.GetIps(), ip)
		}

		if got.GetPid() == 0 || got.GetLinux().GetCgroupParent() == "" {
			t.Errorf("pod: PID %d, control group %q", got.GetPid(), got.GetLinux().GetCgroupParent())
		}

		c := p.find(t, "CreateContainer").container
		if c.GetId() != id || c.GetPodSandboxId() != pod || c.GetName() != cc.Metadata.Name ||
			c.GetState() != api.ContainerState_CONTAINER_CREATED || c.GetLabels()["cl"] != "1" ||
			c.GetAnnotations()["ca"] != "2" || !slices.Equal(c.GetArgs(), sh("sleep 1000")) ||
			!slices.Contains(c.GetEnv(), "V=x") {
			t.Errorf("container: %v", c)
		}

		r := c.GetLinux().GetResources()
		if r.GetCpu().GetShares().GetValue() != 256 || r.GetMemory().GetLimit().GetValue() != 64<<20 {
			t.Errorf("resources: %v", r)
		}

		if m := c.GetMounts(); !slices.ContainsFunc(m, func(m *api.Mount) bool {
			return m.GetDestination() == "/m" && m.GetSource() == "/usr" && slices.Contains(m.GetOptions(), "ro")
		}) {
			t.Errorf("mounts: %v", m)
		}

		if s := p.find(t, "PostStartContainer").container; s.GetState() != api.ContainerState_CONTAINER_RUNNING ||
			s.GetPid() == 0 || s.GetStartedAt() == 0 {
			t.Errorf("started container: %v", s)
		}
	})
}

// TestNRIExit lets a container exit by itself. Plugins learn of it once.
func TestNRIExit(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		p := newPlugin(10, "exit").connect(t, n)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("exit 3"))
		eventually(t, "StopContainer", func() bool { return slices.Contains(p.all(c), "StopContainer") })
		if e := p.find(t, "StopContainer").container; e.GetState() != api.ContainerState_CONTAINER_STOPPED ||
			e.GetExitCode() != 3 {
			t.Errorf("stopped container: %v", e)
		}

		removed := n.startNamed(t, pod, cfg, "removed", sh("sleep 1000"))
		n.docker(t, "rm", "-f", removed)
		eventually(t, "RemoveContainer", func() bool { return slices.Contains(p.all(removed), "RemoveContainer") })

		n.stopPod(t, pod)
		n.removePod(t, pod)
		for _, id := range []string{c, removed} {
			if got := p.all(id)[4:]; !slices.Equal(got, []string{"StopContainer", "RemoveContainer"}) {
				t.Errorf("last events of %s: %q", id, got)
			}
		}
	})
}

// TestNRIFailure lets a plugin reject each event that can prevent something. Nothing may remain and
// be visible, and a retry must succeed.
func TestNRIFailure(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		var rejected string // the name of the event to reject
		reject := func(name string) error {
			if name == rejected {
				return errors.New("no, says the plugin")
			}
			return nil
		}
		first := newPlugin(10, "first").connect(t, n)
		p := newPlugin(20, "failing")
		p.onEvent = func(name string, _ *api.PodSandbox, _ *api.Container) error { return reject(name) }
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return nil, nil, reject("CreateContainer")
		}
		p.connect(t, n)
		assertRejected := func(err error) {
			t.Helper()
			if err == nil || !strings.Contains(err.Error(), "says the plugin") {
				t.Errorf("%s was rejected: error %v", rejected, err)
			}
			rejected = ""
		}

		cfg := n.podConfig(t)
		rejected = "RunPodSandbox"
		_, err := n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: cfg})
		assertRejected(err)
		n.assertNoLeftovers(t, cfg)
		n.assertNoAdjustments(t)
		want := []string{"RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"}
		if got := first.all(""); !slices.Equal(got, want) {
			t.Errorf("events of a rejected pod: %q, want %q", got, want)
		}

		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		create := &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc, SandboxConfig: cfg}
		rejected = "CreateContainer"
		_, err = n.Runtime.CreateContainer(t.Context(), create)
		assertRejected(err)
		if list, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}); err != nil ||
			len(list.Containers) > 0 {
			t.Errorf("containers after a rejected creation: %v, %v", list, err)
		}

		c, err := n.Runtime.CreateContainer(t.Context(), create)
		if err != nil {
			t.Fatalf("the retry: %v", err)
		}

		start := &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}
		rejected = "StartContainer"
		_, err = n.Runtime.StartContainer(t.Context(), start)
		assertRejected(err)
		if _, err := n.Runtime.StartContainer(t.Context(), start); err != nil {
			t.Errorf("the retry: %v", err)
		}

		n.stopPod(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		n.assertNoAdjustments(t)
	})
}

// assertPlugins checks the condition of the status that lists the plugins.
func (n *node) assertPlugins(t *testing.T, reason, message string) {
	t.Helper()
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range s.GetStatus().GetConditions() {
		if c.Type == "NRIPlugins" {
			if c.Reason != reason || !strings.HasPrefix(c.Message, message) {
				t.Errorf("condition %v, want %s: %s", c, reason, message)
			}
			return
		}
	}
	t.Error("the status has no condition NRIPlugins")
}

// TestNRITimeout lets a plugin hang. The runtime drops it, and the pod starts without it.
func TestNRITimeout(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		end := make(chan struct{})
		t.Cleanup(func() { close(end) })
		p := newPlugin(10, "hanging")
		p.onEvent = func(name string, _ *api.PodSandbox, _ *api.Container) error { <-end; return nil }
		p.connect(t, n)

		began := time.Now()
		n.runPod(t, n.podConfig(t))
		if took := time.Since(began); took < time.Second {
			t.Errorf("the pod took %s: the plugin was not asked", took)
		}
		eventually(t, "the end of the plugin's connection", p.isDropped)

		if page := n.Metrics(t); !strings.Contains(page, "\ncri_dockerd_nri_plugins 0\n") {
			t.Error("the plugin is still counted")
		}
		n.assertPlugins(t, "PluginFailed", "10-hanging (disconnected after a failure) (1 failed calls; "+
			"the last: RunPodSandbox: ")
	}, "--nri-plugin-request-timeout=1s")
}

// statsOf returns the RPCs of stats that show an object.
func (n *node) statsOf(ctx context.Context, id string) (shown []string) {
	add := func(rpc string, isShown bool) {
		if isShown {
			shown = append(shown, rpc+" of "+id)
		}
	}

	_, err := n.Runtime.PodSandboxStats(ctx, &runtimeapi.PodSandboxStatsRequest{PodSandboxId: id})
	add("PodSandboxStats", err == nil)
	_, err = n.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	add("ContainerStats", err == nil)

	pods, err := n.Runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
	add("ListPodSandboxStats", err != nil || strings.Contains(pods.String(), id))
	containers, err := n.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
	add("ListContainerStats", err != nil || strings.Contains(containers.String(), id))
	metrics, err := n.Runtime.ListPodSandboxMetrics(ctx, &runtimeapi.ListPodSandboxMetricsRequest{})
	add("ListPodSandboxMetrics", err != nil || strings.Contains(metrics.String(), id))

	return shown
}

// TestNRIVisibility lists pods and containers while plugins handle their creation.
func TestNRIVisibility(t *testing.T) {
	eachNRI(t, func(t *testing.T, n *node) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		stream, err := n.Runtime.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
		if err == nil {
			_, err = stream.Header()
		}
		if err != nil {
			t.Fatal(err)
		}

		var seen []string
		inspect := func(id string) {
			pods, err := n.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			containers, listErr := n.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			if err = errors.Join(err, listErr); err != nil {
				seen = append(seen, err.Error())
			}
			for _, p := range pods.GetItems() {
				seen = append(seen, p.GetId())
			}
			for _, c := range containers.GetContainers() {
				seen = append(seen, c.GetId())
			}
			if _, err := n.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{
				PodSandboxId: id,
			}); err == nil {
				seen = append(seen, "status of "+id)
			}
			if _, err := n.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{
				ContainerId: id,
			}); err == nil {
				seen = append(seen, "status of "+id)
			}
			seen = append(seen, n.statsOf(ctx, id)...)
		}
		p := newPlugin(10, "inspecting")
		p.onEvent = func(name string, pod *api.PodSandbox, _ *api.Container) error {
			if name == "RunPodSandbox" {
				inspect(pod.GetId())
			}
			return nil
		}
		p.onCreate = func(
			pod *api.PodSandbox, c *api.Container,
		) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			inspect(c.GetId())
			seen = slices.DeleteFunc(seen, func(s string) bool { return s == pod.GetId() })
			return nil, nil, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		c := n.start(t, pod, cfg, sh("sleep 1000"))
		if len(seen) > 0 {
			t.Errorf("visible before their plugins had completed: %q", seen)
		}

		want := []string{"CREATED " + pod, "STARTED " + pod, "CREATED " + c, "STARTED " + c}
		for _, w := range want {
			e, err := stream.Recv()
			if err != nil {
				t.Fatal(err)
			}
			kind, _, _ := strings.Cut(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_")
			if got := kind + " " + e.ContainerId; got != w {
				t.Errorf("event %s, want %s", got, w)
			}
		}
	})
}
