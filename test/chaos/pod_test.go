package chaos

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// inText finds object-specific parts of an error's message.
var inText = regexp.MustCompile(`[0-9a-f]{12,64}|pod-\d+-\d+|\d+(\.\d+)?(ms|s|µs)\b`)

// pod is a desired pod.
type pod struct {
	*kubelet
	slot, generation int
	uid              string
	hostNetwork      bool
	limit            int // its last container ends by itself after this many lines; 0 for never
	containers       []string
	random           *rand.Rand
}

func newPod(k *kubelet, slot, generation int, random *rand.Rand) *pod {
	p := &pod{
		kubelet:     k,
		slot:        slot,
		generation:  generation,
		uid:         fmt.Sprintf("pod-%d-%d", slot, generation),
		hostNetwork: slot%5 == 2,
		containers:  []string{"a", "b"}[:1+random.IntN(2)],
		random:      random,
	}
	if random.IntN(3) == 0 {
		p.limit = 100 + random.IntN(300)
	}
	if err := os.MkdirAll(p.stateDir(), 0o755); err != nil {
		k.tb.Fatalf("%v", err)
	}

	return p
}

func (p *pod) logDir() string   { return filepath.Join(p.logs, "chaos_"+p.uid+"_"+p.uid) }
func (p *pod) stateDir() string { return filepath.Join(p.state, p.uid) }

// runFor runs the pod for some time, or while pods are frozen, and then removes it.
func (p *pod) runFor(ctx context.Context, d time.Duration) {
	end := time.After(d)
	for expired := false; !closed(p.deletion) && (!expired || closed(p.freeze)); {
		select {
		case <-ctx.Done():
			return
		case <-p.deletion:
		case <-end:
			expired, end = true, nil
		case <-time.After(syncEvery):
			_ = p.sync(ctx) // call has counted failures
		}
	}

	p.end(ctx)
}

// end removes the pod and retries until it succeeds.
func (p *pod) end(ctx context.Context) {
	for {
		remaining, err := p.remove(ctx)
		if err == nil && remaining == 0 {
			p.removeCgroups()
			return
		}

		if !sleep(ctx, syncEvery) {
			return
		}
	}
}

// removeCgroups removes the pod's cgroups like a kubelet, including empty ones below them, for
// example from a killed runc. Cgroups with processes remain, and the checker finds them.
func (p *pod) removeCgroups() {
	roots, _ := filepath.Glob(p.eng.Path("/sys/fs/cgroup/*" + p.eng.CgroupParent + "/" + p.uid))
	for _, root := range append(roots, p.eng.Path("/sys/fs/cgroup"+p.eng.CgroupParent+"/"+p.uid)) {
		var dirs []string
		_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})

		for _, dir := range slices.Backward(dirs) {
			_ = os.Remove(dir)
		}
	}
}

// found contains the daemon's lists of a pod, newest attempts first.
type found struct {
	sandboxes  []*runtimeapi.PodSandbox
	containers []*runtimeapi.Container
}

// list lists the pod.
func (p *pod) list(ctx context.Context) (f found, err error) {
	labels := map[string]string{"io.kubernetes.pod.uid": p.uid}
	err = p.call(ctx, "ListPodSandbox", callTimeout, func(ctx context.Context) error {
		filter := &runtimeapi.PodSandboxFilter{LabelSelector: labels}
		r, err := p.daemon.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: filter})
		f.sandboxes = r.GetItems()
		return err
	})
	if err != nil {
		return f, err
	}

	err = p.call(ctx, "ListContainers", callTimeout, func(ctx context.Context) error {
		filter := &runtimeapi.ContainerFilter{LabelSelector: labels}
		r, err := p.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: filter})
		f.containers = r.GetContainers()
		return err
	})

	slices.SortFunc(f.sandboxes, func(a, b *runtimeapi.PodSandbox) int {
		return int(b.Metadata.Attempt) - int(a.Metadata.Attempt)
	})
	slices.SortFunc(f.containers, func(a, b *runtimeapi.Container) int {
		return int(b.Metadata.Attempt) - int(a.Metadata.Attempt)
	})

	return f, err
}

// ready returns the newest sandbox if it is ready, else nil.
func (f *found) ready() *runtimeapi.PodSandbox {
	if len(f.sandboxes) > 0 && f.sandboxes[0].State == runtimeapi.PodSandboxState_SANDBOX_READY {
		return f.sandboxes[0]
	}
	return nil
}

// newest returns the newest container with this name, or nil.
func (f *found) newest(name string) *runtimeapi.Container {
	for _, c := range f.containers {
		if c.Metadata.Name == name {
			return c
		}
	}
	return nil
}

// sync takes one step towards the desired pod (kuberuntime's SyncPod).
func (p *pod) sync(ctx context.Context) error {
	f, err := p.list(ctx)
	if err != nil {
		return err
	}

	sandbox := f.ready()
	if sandbox != nil && !p.hostNetwork {
		connected, err := p.hasAddress(ctx, sandbox.Id)
		if err != nil {
			return err
		}
		if !connected {
			sandbox = nil
		}
	}

	if sandbox == nil {
		if err := p.kill(ctx, f); err != nil {
			return err
		}
		return errors.Join(p.collect(ctx, f), p.create(ctx, f))
	}

	for _, name := range p.containers {
		c := f.newest(name)
		if c != nil && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING && c.PodSandboxId == sandbox.Id {
			continue
		}
		err = errors.Join(err, p.start(ctx, sandbox, name, c))
	}

	if p.random.IntN(20) == 0 {
		err = errors.Join(err, p.rotate(ctx, f))
	}

	return errors.Join(err, p.collect(ctx, f))
}

// hasAddress reports whether a sandbox has an address. A kubelet replaces a sandbox without one
// (kuberuntime's PodSandboxChanged).
func (p *pod) hasAddress(ctx context.Context, id string) (connected bool, err error) {
	err = p.call(ctx, "PodSandboxStatus", callTimeout, func(ctx context.Context) error {
		r, err := p.daemon.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id})
		connected = r.GetStatus().GetNetwork().GetIp() != ""
		return err
	})
	return connected, err
}

// create runs a new sandbox.
func (p *pod) create(ctx context.Context, f found) error {
	attempt := uint32(0)
	if len(f.sandboxes) > 0 {
		attempt = f.sandboxes[0].Metadata.Attempt + 1
	}
	if err := os.MkdirAll(p.eng.Path(p.logDir()), 0o755); err != nil {
		return err
	}

	return p.call(ctx, "RunPodSandbox", callTimeout, func(ctx context.Context) error {
		r, err := p.daemon.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: p.config(attempt)})
		if err == nil {
			p.mustExist(ctx, "RunPodSandbox", r.PodSandboxId)
		}
		return err
	})
}

// start starts the next attempt of a container, following the last one, if any.
func (p *pod) start(
	ctx context.Context, sandbox *runtimeapi.PodSandbox, name string, last *runtimeapi.Container,
) error {
	attempt := p.nextLog(name)
	if last != nil {
		attempt = max(attempt, last.Metadata.Attempt+1)
		if last.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			if err := p.stop(ctx, last.Id); err != nil {
				return err
			}
		}
	}

	var id string
	err := p.call(ctx, "CreateContainer", callTimeout, func(ctx context.Context) error {
		r, err := p.daemon.Runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
			PodSandboxId:  sandbox.Id,
			Config:        p.container(name, attempt),
			SandboxConfig: p.config(sandbox.Metadata.Attempt),
		})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}

	p.mu.Lock()
	p.ids[fmt.Sprintf("%s %s.%d", p.uid, name, attempt)] = id
	p.mu.Unlock()
	err = p.call(ctx, "StartContainer", callTimeout, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id})
		if err == nil {
			p.mustExist(ctx, "StartContainer", id)
		}
		return err
	})
	if err != nil {
		return err
	}

	return p.call(ctx, "UpdateContainerResources", callTimeout, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.UpdateContainerResources(ctx, &runtimeapi.UpdateContainerResourcesRequest{
			ContainerId: id,
			Linux:       &runtimeapi.LinuxContainerResources{CpuShares: 20},
		})
		return err
	})
}

// nextLog returns the first attempt of a container without a log and recorded lines.
func (p *pod) nextLog(name string) (attempt uint32) {
	for ; ; attempt++ {
		_, logErr := os.Lstat(p.eng.Path(filepath.Join(p.logDir(), name, fmt.Sprintf("%d.log", attempt))))
		_, stateErr := os.Lstat(filepath.Join(p.stateDir(), fmt.Sprintf("%s.%d", name, attempt)))
		if logErr != nil && stateErr != nil {
			return attempt
		}
	}
}

// stop stops a container with a grace period of two seconds.
func (p *pod) stop(ctx context.Context, id string) error {
	const grace = 2
	return p.call(ctx, "StopContainer", callTimeout+grace*time.Second, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.StopContainer(ctx, &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: grace})
		return err
	})
}

// kill kills all containers, and then stops the sandboxes (killPodWithSyncResult).
func (p *pod) kill(ctx context.Context, f found) error {
	var stopping sync.WaitGroup
	errs := make([]error, len(f.containers))
	for i, c := range f.containers {
		if c.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			stopping.Go(func() { errs[i] = p.stop(ctx, c.Id) })
		}
	}

	stopping.Wait()
	for _, s := range f.sandboxes {
		errs = append(errs, p.call(ctx, "StopPodSandbox", callTimeout, func(ctx context.Context) error {
			_, err := p.daemon.Runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id})
			return err
		}))
	}

	return errors.Join(errs...)
}

// collect removes all dead containers except the newest of each name, and dead sandboxes without
// containers.
func (p *pod) collect(ctx context.Context, f found) (err error) {
	holds := map[string]bool{}
	for _, c := range f.containers {
		if c.State != runtimeapi.ContainerState_CONTAINER_EXITED || f.newest(c.Metadata.Name) == c {
			holds[c.PodSandboxId] = true
			continue
		}
		err = errors.Join(err, p.removeContainer(ctx, c.Id))
	}

	for i, s := range f.sandboxes {
		if i > 0 && s.State != runtimeapi.PodSandboxState_SANDBOX_READY && !holds[s.Id] {
			err = errors.Join(err, p.removeSandbox(ctx, s.Id))
		}
	}

	return err
}

func (p *pod) removeContainer(ctx context.Context, id string) error {
	return p.call(ctx, "RemoveContainer", callTimeout, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: id})
		return err
	})
}

func (p *pod) removeSandbox(ctx context.Context, id string) error {
	return p.call(ctx, "RemovePodSandbox", callTimeout, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
}

// remove takes one step towards the removal of the pod, and returns the number of objects found.
func (p *pod) remove(ctx context.Context) (remaining int, err error) {
	f, err := p.list(ctx)
	if err != nil {
		return 0, err
	}

	remaining = len(f.sandboxes) + len(f.containers)
	if err := p.kill(ctx, f); err != nil {
		return remaining, err
	}

	for _, c := range f.containers {
		err = errors.Join(err, p.removeContainer(ctx, c.Id))
	}

	for _, s := range f.sandboxes {
		err = errors.Join(err, p.removeSandbox(ctx, s.Id))
	}

	return remaining, err
}

// rotate renames the log of a running container and requests a new file. If that fails, it renames
// the log back (logs.ContainerLogManager).
func (p *pod) rotate(ctx context.Context, f found) error {
	c := f.newest(p.containers[0])
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}

	log := p.eng.Path(filepath.Join(p.logDir(), c.Metadata.Name, fmt.Sprintf("%d.log", c.Metadata.Attempt)))
	old := log + "." + time.Now().Format("20060102-150405.000000000")
	if err := os.Rename(log, old); err != nil {
		return err
	}

	err := p.call(ctx, "ReopenContainerLog", callTimeout, func(ctx context.Context) error {
		_, err := p.daemon.Runtime.ReopenContainerLog(ctx, &runtimeapi.ReopenContainerLogRequest{ContainerId: c.Id})
		return err
	})
	if err != nil {
		return errors.Join(err, os.Rename(old, log))
	}

	return nil
}
