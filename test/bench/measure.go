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
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/spec"
)

// options are what the measuring part is told.
type options struct {
	CRI, Docker string // endpoints
	Cache       string // results in the daemon's libcni cache
	Scratch     string // folder for what the floor needs
	Parent      string // the control group of all pods; "" for the engine's own
	// the daemon runs with --pod-netns=engine: the sandboxes alone, the pods are there
	EngineMode bool
	Pods       int
	Rounds     int
	Calls      int
}

// figures are the times of each operation, in the order of their measuring.
type figures struct {
	Engine  string
	Samples map[operation][]time.Duration
}

// operation is what was timed.
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

// perMode are the operations that are measured in both modes.
var perMode = []operation{runSandbox, stopSandbox, removeSandbox, floorHost, floorSandbox, floorCreate, floorStart,
	floorAdd, floorStop, floorDel, floorDown}

// inEngineMode is an operation of perMode with --pod-netns=engine.
func inEngineMode(op operation) operation { return op + " (engine)" }

// warmUp is how many rounds are not counted: page caches, the engine's own caches.
const warmUp = 3

// measuring is the measuring part at work.
type measuring struct {
	options
	runtime runtimeapi.RuntimeServiceClient
	docker  *client.Client
	host    spec.Host
	pause   spec.PauseImage
	cni     *libcni.CNIConfig
	network *libcni.NetworkConfigList
	figures figures
	sandbox string // one of the pods, and its container
	running string
}

// measureInside measures in the namespaces in which it runs, and prints the figures as JSON.
func measureInside(ctx context.Context, arg string) error {
	m := &measuring{figures: figures{Samples: map[operation][]time.Duration{}}}
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

	parts := []func(context.Context) error{m.prepare, m.fill, m.learnNetwork, m.calls, m.rounds}
	if m.EngineMode {
		parts = []func(context.Context) error{m.prepare, m.learnNetwork, m.rounds}
	}

	for _, part := range parts {
		if err := part(ctx); err != nil {
			return err
		}
	}

	if m.EngineMode {
		for _, op := range perMode {
			m.figures.Samples[inEngineMode(op)] = m.figures.Samples[op]
			delete(m.figures.Samples, op)
		}
	}

	return json.NewEncoder(os.Stdout).Encode(m.figures)
}

func (m *measuring) prepare(ctx context.Context) error {
	e, err := engine.New(engine.Config{Endpoint: m.Docker, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	defer e.Close()

	if m.host, err = e.Host(ctx); err != nil {
		return err
	}

	m.figures.Engine = m.host.EngineVersion
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

// fill starts the pods that run meanwhile. Their containers run the pause program too.
func (m *measuring) fill(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: %d pods are started\n", m.Pods)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for i := range m.Pods {
		g.Go(func() error {
			cfg := podConfig(fmt.Sprintf("pod-%d", i))
			if m.Parent != "" { // as a kubelet does
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

// learnNetwork takes the configuration with which the daemon has connected the pods, so that the
// floor runs the same plugins, but with a cache of its own.
func (m *measuring) learnNetwork(context.Context) error {
	dirs := podnet.DefaultBinDirs()
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

// timed adds the time that do takes to an operation's samples, unless it fails.
func (m *measuring) timed(op operation, do func() error) error {
	began := time.Now()
	err := do()
	took := time.Since(began)
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}

	m.figures.Samples[op] = append(m.figures.Samples[op], took)

	return nil
}

// ask is a call that is measured.
type ask struct {
	op operation
	do func() error
}

// version is the call that does nothing.
func (m *measuring) version(ctx context.Context) ask {
	return ask{floorCall, func() error {
		_, err := m.runtime.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	}}
}

// inTurn measures each once.
func (m *measuring) inTurn(asks []ask) error {
	for _, a := range asks {
		if err := m.timed(a.op, a.do); err != nil {
			return err
		}
	}
	return nil
}

// calls measures what a kubelet asks all the time, in turn.
func (m *measuring) calls(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: %d calls of each list and status\n", m.Calls)
	asks := append([]ask{m.version(ctx)}, m.relist(ctx)...)
	for range m.Calls {
		if err := m.inTurn(asks); err != nil {
			return err
		}
	}

	return m.engineLists(ctx)
}

// relist are lists and statuses.
func (m *measuring) relist(ctx context.Context) []ask {
	return []ask{
		{listSandboxes, func() error {
			r, err := m.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
			return enough(len(r.GetItems()), m.Pods, err)
		}},
		{listContainers, func() error {
			r, err := m.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
			return enough(len(r.GetContainers()), m.Pods, err)
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

// engineLists measures the engine's own list, which is slow, for comparison.
func (m *measuring) engineLists(ctx context.Context) error {
	for range 10 {
		if err := m.timed(engineList, func() error {
			r, err := m.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
			return enough(len(r.Items), 2*m.Pods, err)
		}); err != nil {
			return err
		}
	}

	return nil
}

func enough(n, want int, err error) error {
	if err == nil && n < want {
		err = fmt.Errorf("%d listed, %d expected", n, want)
	}
	return err
}

// rounds makes and removes sandboxes through the daemon and without it, turn about.
func (m *measuring) rounds(ctx context.Context) error {
	fmt.Fprintf(os.Stderr, "bench: %d sandboxes through the daemon, and as many without it\n", m.Rounds)
	for i := range m.Rounds + warmUp {
		if i == warmUp {
			for _, op := range perMode {
				delete(m.figures.Samples, op)
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

// ours makes a sandbox through the daemon and removes it.
func (m *measuring) ours(ctx context.Context, name string) error {
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

// start makes and starts a pause without the daemon, and without the labels by which the daemon
// would take it for its own.
func (m *measuring) start(
	ctx context.Context, name, mode string, create, start operation,
) (id string, remove func(), err error) {
	c, err := spec.NewSandbox(podConfig(name), spec.SandboxOptions{Host: m.host, Image: m.pause, NetworkMode: mode})
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

// floor does what ours does without the daemon: the same container and the same plugins, one after
// the other.
func (m *measuring) floor(ctx context.Context, name string) error {
	id, remove, err := m.start(ctx, name, "none", floorCreate, floorStart)
	if err != nil {
		return err
	}
	defer remove()

	// not counted, though nobody finds the namespace without it
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

	s := m.figures.Samples
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

// floorInHostMode is what a pod in a namespace of our own cannot do without: a pause for which the
// engine makes no network.
func (m *measuring) floorInHostMode(ctx context.Context, name string) error {
	const create, start operation = "create in host mode", "start in host mode"
	_, remove, err := m.start(ctx, name, "host", create, start)
	if err != nil {
		return err
	}

	remove()
	s := m.figures.Samples
	s[floorHost] = append(s[floorHost], last(s[create])+last(s[start]))

	return nil
}

func last(d []time.Duration) time.Duration { return d[len(d)-1] }
