package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/moby/moby/client"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
	"cri-dockerd/test/peer"
)

// options are the options of the measuring process.
type options struct {
	CRI, Docker string // endpoints
	Cache       string // results in the daemon's libcni cache
	Scratch     string // directory for the floor's files
	Parent      string // the control group of all pods; "" for the engine's own
	// EngineMode measures only sandboxes: the daemon runs with --pod-netns=engine, and the other
	// pods are already running.
	EngineMode bool
	Pods       int
	Rounds     int
	Calls      int
}

// results are the times of each operation, in the order of the measurements.
type results struct {
	Engine  string
	Samples map[operation][]time.Duration
}

// operation is the name of a timed operation.
type operation string

const (
	listSandboxes   operation = "ListPodSandbox"
	listContainers  operation = "ListContainers"
	sandboxStatus   operation = "PodSandboxStatus"
	containerStatus operation = "ContainerStatus"
	floorCall       operation = "floor: Version, gRPC alone"
	engineList      operation = "engine: list containers"
	runSandbox      operation = "RunPodSandbox"
	stopSandbox     operation = "StopPodSandbox"
	removeSandbox   operation = "RemovePodSandbox"
	floorHost       operation = "floor: create + start, host mode"
	floorSandbox    operation = "floor: create + start + CNI ADD"
	floorCreate     operation = "floor: create"
	floorStart      operation = "floor: start"
	floorAdd        operation = "floor: CNI ADD"
	floorStop       operation = "floor: engine stop"
	floorDel        operation = "floor: CNI DEL"
	floorDown       operation = "floor: the longer of both"
)

// perMode are the operations measured in both modes.
var perMode = []operation{runSandbox, stopSandbox, removeSandbox, floorHost, floorSandbox, floorCreate, floorStart,
	floorAdd, floorStop, floorDel, floorDown}

// inEngineMode returns the name of an operation of perMode with --pod-netns=engine.
func inEngineMode(op operation) operation { return op + " (engine)" }

// warmUp is the number of initial rounds to ignore. They fill page caches and the engine's own
// caches.
const warmUp = 3

// measurement is a running measurement.
type measurement struct {
	options
	runtime runtimeapi.RuntimeServiceClient
	docker  *client.Client
	host    model.Host
	pause   model.PauseImage
	cni     *libcni.CNIConfig
	network *libcni.NetworkConfigList
	results results
	sandbox string // one of the pods, and its container
	running string
}

// measureInside takes the measurements in its own namespaces, and prints the results as JSON.
func measureInside(ctx context.Context, arg string) error {
	m := &measurement{results: results{Samples: map[operation][]time.Duration{}}}
	if err := json.Unmarshal([]byte(arg), &m.options); err != nil {
		return err
	}

	conn, err := grpc.NewClient(m.CRI, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()

	m.runtime = runtimeapi.NewRuntimeServiceClient(conn)
	if m.docker, err = client.New(client.WithHost(m.Docker)); err != nil {
		return err
	}
	defer m.docker.Close()

	parts := []func(context.Context) error{m.prepare, m.fill, m.loadNetwork, m.measureCalls, m.rounds}
	if m.EngineMode {
		parts = []func(context.Context) error{m.prepare, m.loadNetwork, m.rounds}
	}

	for _, part := range parts {
		if err := part(ctx); err != nil {
			return err
		}
	}

	if m.EngineMode {
		for _, op := range perMode {
			m.results.Samples[inEngineMode(op)] = m.results.Samples[op]
			delete(m.results.Samples, op)
		}
	}

	return json.NewEncoder(os.Stdout).Encode(m.results)
}

func (m *measurement) prepare(ctx context.Context) error {
	e, err := engine.New(engine.Config{Endpoint: m.Docker, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer e.Close()

	if m.host, err = e.Host(ctx); err != nil {
		return err
	}

	m.results.Engine = m.host.EngineVersion
	m.pause, err = e.PauseImage(ctx)

	return err
}

func podConfig(name string) *runtimeapi.PodSandboxConfig {
	return &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: "uid-" + name},
		Hostname: name,
		Labels: map[string]string{
			"io.kubernetes.pod.name":      name,
			"io.kubernetes.pod.namespace": "bench",
			"io.kubernetes.pod.uid":       "uid-" + name,
			"app":                         "bench",
		},
		Annotations: map[string]string{
			"kubernetes.io/config.source": "api", "kubernetes.io/config.seen": "2024-01-01T00:00:00.000000000Z",
		},
		Linux: &runtimeapi.LinuxPodSandboxConfig{},
	}
}

// fill starts the background pods. Their containers also run the pause program.
func (m *measurement) fill(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: starting %d pods\n", m.Pods)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range m.Pods {
		g.Go(func() error {
			cfg := podConfig(fmt.Sprintf("pod-%d", i))
			if m.Parent != "" { // like a kubelet
				cfg.Linux.CgroupParent = m.Parent + "/kubepods/burstable/pod" + cfg.Metadata.Uid
				cfg.LogDirectory = filepath.Join(m.Scratch, "pods", cfg.Metadata.Uid)
			}

			pod, err := m.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
			if err != nil {
				return err
			}

			c, err := m.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod.PodSandboxId,
				SandboxConfig: cfg,
				Config: &runtimeapi.ContainerConfig{
					Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
					Image:    &runtimeapi.ImageSpec{Image: m.pause.Name},
					Labels:   cfg.Labels,
					LogPath:  "main/0.log",
				},
			})
			if err != nil {
				return err
			}

			if i == 0 {
				m.sandbox, m.running = pod.PodSandboxId, c.ContainerId
			}

			_, err = m.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})

			return err
		})
	}

	return g.Wait()
}

// loadNetwork loads the daemon's network configuration, so that the floor runs the same plugins,
// but with its own cache.
func (m *measurement) loadNetwork(context.Context) error {
	dirs := peer.PluginDirs()
	attached, err := libcni.NewCNIConfigWithCacheDir(dirs, filepath.Dir(m.Cache), nil).GetCachedAttachments("")
	if err != nil {
		return err
	}

	if len(attached) == 0 {
		return errors.New("the daemon has connected no pod")
	}

	m.cni = libcni.NewCNIConfigWithCacheDir(dirs, filepath.Join(m.Scratch, "floor-cache"), nil)
	m.network, err = libcni.ConfListFromBytes(attached[0].Config)

	return err
}

// timed adds the duration of a successful do to an operation's samples.
func (m *measurement) timed(op operation, do func() error) error {
	began := time.Now()
	err := do()
	took := time.Since(began)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}

	m.results.Samples[op] = append(m.results.Samples[op], took)

	return nil
}

// call is a measured call.
type call struct {
	op operation
	do func() error
}

// version returns the call with the least work.
func (m *measurement) version(ctx context.Context) call {
	return call{floorCall, func() error {
		_, err := m.runtime.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	}}
}

// measureEach measures each call once.
func (m *measurement) measureEach(calls []call) error {
	for _, a := range calls {
		if err := m.timed(a.op, a.do); err != nil {
			return err
		}
	}
	return nil
}

// measureCalls measures a kubelet's frequent calls, in turn.
func (m *measurement) measureCalls(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: %d calls of each list and status\n", m.Calls)
	calls := append([]call{m.version(ctx)}, m.relist(ctx)...)
	for range m.Calls {
		if err := m.measureEach(calls); err != nil {
			return err
		}
	}

	return m.engineLists(ctx)
}

// relist returns lists and statuses.
func (m *measurement) relist(ctx context.Context) []call {
	return []call{
		{listSandboxes, func() error {
			r, err := m.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return checkCount(len(r.GetItems()), m.Pods, err)
		}},
		{listContainers, func() error {
			r, err := m.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return checkCount(len(r.GetContainers()), m.Pods, err)
		}},
		{sandboxStatus, func() error {
			_, err := m.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: m.sandbox})
			return err
		}},
		{containerStatus, func() error {
			_, err := m.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: m.running})
			return err
		}},
	}
}

// engineLists measures the engine's own slow list, for comparison.
func (m *measurement) engineLists(ctx context.Context) error {
	for range 10 {
		if err := m.timed(engineList, func() error {
			r, err := m.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
			return checkCount(len(r.Items), 2*m.Pods, err)
		}); err != nil {
			return err
		}
	}

	return nil
}

func checkCount(n, want int, err error) error {
	if err == nil && n < want {
		err = fmt.Errorf("got %d items, want %d", n, want)
	}
	return err
}

// rounds creates and removes sandboxes through the daemon and without it, alternating.
func (m *measurement) rounds(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: %d sandboxes through the daemon, and as many without it\n", m.Rounds)
	for i := range m.Rounds + warmUp {
		if i == warmUp {
			for _, op := range perMode {
				delete(m.results.Samples, op)
			}
		}

		turns := []func(context.Context, string) error{m.ours, m.floor, m.floorInHostMode}
		if i%2 == 1 {
			slices.Reverse(turns)
		}

		for _, turn := range turns {
			if err := turn(ctx, fmt.Sprintf("round-%d", i)); err != nil {
				return err
			}
		}
	}

	return nil
}

// ours creates a sandbox through the daemon and removes it.
func (m *measurement) ours(ctx context.Context, name string) error {
	var id string

	return errors.Join(
		m.timed(runSandbox, func() error {
			r, err := m.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: podConfig(name)})
			id = r.GetPodSandboxId()
			return err
		}),
		m.timed(stopSandbox, func() error {
			_, err := m.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: id})
			return err
		}),
		m.timed(removeSandbox, func() error {
			_, err := m.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		}),
	)
}

// start creates and starts a pause container without the daemon. It omits the labels, because the
// daemon would adopt the container.
func (m *measurement) start(
	ctx context.Context, name, mode string, create, start operation,
) (id string, remove func(), err error) {
	c, err := translate.NewSandbox(podConfig(name), translate.SandboxOptions{
		Host:        m.host,
		Image:       m.pause,
		NetworkMode: mode,
	})
	if err != nil {
		return "", nil, err
	}

	c.Config.Labels = nil
	if err := m.timed(create, func() error {
		r, err := m.docker.ContainerCreate(ctx, client.ContainerCreateOptions{
			Name:       "floor-" + mode + "-" + name,
			Config:     c.Config,
			HostConfig: c.Host,
		})
		id = r.ID
		return err
	}); err != nil {
		return "", nil, err
	}

	err = m.timed(start, func() error {
		_, err := m.docker.ContainerStart(ctx, id, client.ContainerStartOptions{})
		return err
	})

	return id, func() {
		// ends with the engine at the latest
		_, _ = m.docker.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true})
	}, err
}

// floor does the work of ours without the daemon: the same container and the same plugins,
// sequentially.
func (m *measurement) floor(ctx context.Context, name string) error {
	id, remove, err := m.start(ctx, name, "none", floorCreate, floorStart)
	if err != nil {
		return err
	}
	defer remove()

	// Not measured, but required to find the namespace.
	in, err := m.docker.ContainerInspect(ctx, id, client.ContainerInspectOptions{})
	if err != nil {
		return err
	}

	rt := &libcni.RuntimeConf{
		ContainerID: id,
		NetNS:       fmt.Sprintf("/proc/%d/ns/net", in.Container.State.Pid),
		IfName:      "eth0",
	}
	if err := m.timed(floorAdd, func() error {
		_, err := m.cni.AddNetworkList(ctx, m.network, rt)
		return err
	}); err != nil {
		return err
	}

	s := m.results.Samples
	s[floorSandbox] = append(s[floorSandbox], last(s[floorCreate])+last(s[floorStart])+last(s[floorAdd]))
	if err := errors.Join(
		m.timed(floorDel, func() error { return m.cni.DelNetworkList(ctx, m.network, rt) }),
		m.timed(floorStop, func() error {
			at := 0
			_, err := m.docker.ContainerStop(ctx, id, client.ContainerStopOptions{Timeout: &at})
			return err
		}),
	); err != nil {
		return err
	}

	s[floorDown] = append(s[floorDown], max(last(s[floorStop]), last(s[floorDel])))

	return nil
}

// floorInHostMode measures the minimum for a pod with our own namespace: a pause container without
// a network from the engine.
func (m *measurement) floorInHostMode(ctx context.Context, name string) error {
	const create, start operation = "create in host mode", "start in host mode"
	_, remove, err := m.start(ctx, name, "host", create, start)
	if err != nil {
		return err
	}

	remove()
	s := m.results.Samples
	s[floorHost] = append(s[floorHost], last(s[create])+last(s[start]))

	return nil
}

func last(d []time.Duration) time.Duration { return d[len(d)-1] }
