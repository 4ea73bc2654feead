package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// remains lists possible leftovers of pods, by kind.
type remains map[string][]string

// minus returns everything that is not in the baseline.
func (r remains) minus(baseline remains) []string {
	var more []string
	for kind, things := range r {
		counted := map[string]int{}
		for _, thing := range baseline[kind] {
			counted[thing]++
		}

		for _, thing := range things {
			if counted[thing]--; counted[thing] < 0 {
				more = append(more, kind+": "+thing)
			}
		}
	}

	slices.Sort(more)

	return more
}

// remaining collects everything on the node. It queries the engine directly, without the proxy.
func (l *lab) remaining(ctx context.Context) (r remains, err error) {
	if err := l.findLost(ctx); err != nil {
		return nil, err
	}

	r = remains{}
	for _, gather := range []func(context.Context, remains) error{
		l.collectEngine, l.collectDaemonLists, l.collectKernel, l.collectProcesses, l.collectFiles,
	} {
		err = errors.Join(err, gather(ctx, r))
	}

	return r, err
}

// collectEngine collects containers and networks.
func (l *lab) collectEngine(ctx context.Context, r remains) error {
	containers, err := l.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return err
	}

	for _, c := range containers.Items {
		r["containers"] = append(r["containers"], strings.Join(c.Names, ",")+" "+string(c.State))
	}

	networks, err := l.docker.NetworkList(ctx, client.NetworkListOptions{})
	if err != nil {
		return err
	}

	for _, n := range networks.Items {
		r["networks"] = append(r["networks"], n.Name)
	}

	return nil
}

// collectDaemonLists collects the daemon's lists.
func (l *lab) collectDaemonLists(ctx context.Context, r remains) error {
	sandboxes, err := l.daemon.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return err
	}

	for _, s := range sandboxes.Items {
		r["listed sandboxes"] = append(r["listed sandboxes"], s.Id+" "+s.State.String())
	}

	containers, err := l.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return err
	}

	for _, c := range containers.Containers {
		r["listed containers"] = append(r["listed containers"], c.Id+" "+c.State.String())
	}

	return nil
}

// collectKernel collects links, rules, mounts, network namespaces and cgroups of containers.
func (l *lab) collectKernel(_ context.Context, r remains) error {
	links, err := l.inside("ip", "-o", "link", "show", "type", "veth")
	rules, err2 := l.inside("iptables-save")
	mounts, err3 := l.mounts()
	if err := errors.Join(err, err2, err3); err != nil {
		return err
	}

	for line := range strings.Lines(links) {
		r["veths"] = append(r["veths"], strings.Fields(line)[1])
	}

	for line := range strings.Lines(rules) {
		if strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":CNI-") {
			r["rules"] = append(r["rules"], strings.TrimSpace(counters(line)))
		}
	}

	r["rules"] = l.filterLostRules(r["rules"])
	for _, m := range mounts {
		if !l.isLost(l.rootOf(m)) && !isLostInit(m, l.eng.DataRoot(), l.dockerdKilled.Load()) {
			r["mounts"] = append(r["mounts"], m)
		}
	}

	for _, root := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} {
		parents, _ := filepath.Glob(l.eng.Path(root + l.eng.CgroupParent))
		for _, parent := range parents {
			_ = filepath.WalkDir(parent, func(path string, d fs.DirEntry, err error) error {
				if id := inContainer.FindStringSubmatch(path); err == nil && d.IsDir() && id != nil &&
					!l.isLost(id[1]) {
					r["control groups"] = append(r["control groups"], path)
				}
				return nil
			})
		}
	}

	return nil
}

// counters removes the counters of a chain.
func counters(rule string) string {
	rule, _, _ = strings.Cut(rule, " [")
	return rule
}

// collectProcesses collects processes, except short-lived ones and shims that the engine has lost.
func (l *lab) collectProcesses(_ context.Context, r remains) error {
	all, err := l.list()
	if err != nil {
		return err
	}

	for _, p := range all {
		switch {
		case l.isLost(containerOf(p)), l.isLost(p.cgroup) && p.name == neverStarted:
		case p.cgroup != "":
			r["processes of containers"] = append(r["processes of containers"], p.name+" "+p.cgroup)
		case isShim(p):
			r["shims"] = append(r["shims"], p.cmdline)
		case strings.HasPrefix(p.cmdline, l.cni.dir+"/") || strings.HasPrefix(p.cmdline, l.cni.dir+".real/"):
			r["plugins"] = append(r["plugins"], p.cmdline)
		case strings.HasSuffix(p.name, "-netns") || p.name == "runc":
			r["helpers"] = append(r["helpers"], p.cmdline)
		}
	}

	return nil
}

// collectFiles collects pins, reservations, CNI's cache and journal, and the log-driver's table.
func (l *lab) collectFiles(_ context.Context, r remains) error {
	for kind, dir := range map[string]string{
		"pins":         l.daemon.PinDir,
		"reservations": l.leases(),
		"cache":        l.daemon.CacheDir,
		"journal":      l.daemon.PendingDir,
		"set aside":    filepath.Join(filepath.Dir(l.daemon.CacheDir), "set-aside"),
		"log table":    filepath.Join(l.eng.Dir, "run/log-driver/streams"),
	} {
		entries, err := os.ReadDir(l.eng.Path(dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}

		for _, e := range entries {
			name := e.Name()
			if name == "lock" || strings.HasPrefix(name, "last_reserved_ip") || l.isOrphan(filepath.Join(dir, name)) {
				continue
			}

			if kind == "log table" {
				container := l.writes(filepath.Join(dir, name))
				if l.isLost(container) {
					continue
				}
				name += " of " + container
			}

			r[kind] = append(r[kind], name)
		}
	}

	return nil
}

// writes returns the container of an entry in the log-driver's table. dockerd does not close the
// log of a container that it has lost.
func (l *lab) writes(file string) string {
	var e struct{ Container string }
	b, err := os.ReadFile(l.eng.Path(file))
	if err == nil {
		err = json.Unmarshal(b, &e)
	}

	if err != nil {
		return err.Error()
	}

	return e.Container
}

// isOrphan reports whether an entry in the log-driver's table belongs to a killed engine. The
// log-driver keeps it five minutes for the engine's successor.
func (l *lab) isOrphan(file string) bool {
	if filepath.Base(filepath.Dir(file)) != "streams" {
		return false
	}
	content, err := os.ReadFile(l.eng.Path(file))
	return err == nil && strings.Contains(string(content), `"orphaned"`)
}

// running returns all containers of the engine and whether they are running. reported is the
// daemon's answer. If it differs from the engine's list, an inspect decides: after a failed write
// to a full disk ("failed to store container" in dockerd's log), the engine's list shows an earlier
// state.
func (l *lab) running(ctx context.Context, reported map[string]bool) (map[string]bool, error) {
	list, err := l.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return nil, err
	}

	running := map[string]bool{}
	for _, c := range list.Items {
		running[c.ID] = c.State == "running"
		if listed, known := reported[c.ID]; known && listed == running[c.ID] {
			continue
		}

		// The engine's list may show a removed container: a failing start during the removal writes
		// it into the list again.
		r, err := l.docker.ContainerInspect(ctx, c.ID, client.ContainerInspectOptions{})
		if errdefs.IsNotFound(err) {
			delete(running, c.ID)
			continue
		}

		if err != nil {
			return nil, err
		}

		running[c.ID] = r.Container.State.Running
	}

	return running, nil
}

// checkSettled compares the pods that must stay with the daemon's answers and with the engine.
func (k *kubelet) checkSettled(ctx context.Context) (problems []string) {
	wrong := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	sandboxes, err := k.daemon.Runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return []string{err.Error()}
	}

	containers, err := k.daemon.Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return []string{err.Error()}
	}

	reported := map[string]bool{}
	for _, s := range sandboxes.Items {
		reported[s.Id] = s.State == runtimeapi.PodSandboxState_SANDBOX_READY
	}

	for _, c := range containers.Containers {
		reported[c.Id] = c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	}

	running, err := k.running(ctx, reported)
	if err != nil {
		return []string{err.Error()}
	}

	listed := map[string]bool{}
	for _, s := range sandboxes.Items {
		listed[s.Id] = true
		if ready := s.State == runtimeapi.PodSandboxState_SANDBOX_READY; ready != running[s.Id] {
			wrong("sandbox %s is listed as %s, the engine reports running=%v", s.Id, s.State, running[s.Id])
		}
		problems = append(problems, k.checkSandbox(ctx, s)...)
	}

	for _, c := range containers.Containers {
		listed[c.Id] = true
		if runs := c.State == runtimeapi.ContainerState_CONTAINER_RUNNING; runs != running[c.Id] {
			wrong("container %s is listed as %s, the engine reports running=%v", c.Id, c.State, running[c.Id])
		}

		s, err := k.daemon.Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: c.Id})
		if err != nil || s.Status.State != c.State || s.Status.Metadata.Attempt != c.Metadata.Attempt {
			wrong("container %s is listed as %s, its status is %v, %v", c.Id, c.State, s.GetStatus().GetState(), err)
		}
	}

	for id := range running {
		if _, known := listed[id]; !known {
			wrong("container %s of the engine is not listed", id)
		}
	}

	problems = append(problems, k.checkDesired(sandboxes.Items, containers.Containers)...)

	return append(problems, k.checkReservations(sandboxes.Items)...)
}

// checkSandbox compares a sandbox's status with the list and with its network namespace.
func (k *kubelet) checkSandbox(ctx context.Context, s *runtimeapi.PodSandbox) []string {
	r, err := k.daemon.Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.Id})
	switch {
	case err != nil:
		return []string{fmt.Sprintf("sandbox %s: %v", s.Id, err)}
	case r.Status.State != s.State:
		return []string{fmt.Sprintf("sandbox %s is listed as %s, its status is %s", s.Id, s.State, r.Status.State)}
	case s.State != runtimeapi.PodSandboxState_SANDBOX_READY:
		return nil
	case r.Status.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE:
		return nil
	}

	ip := r.Status.GetNetwork().GetIp()
	if _, err := netip.ParseAddr(ip); err != nil {
		return []string{fmt.Sprintf("sandbox %s has the address %q", s.Id, ip)}
	}

	netns := "--net=" + filepath.Join(k.daemon.PinDir, s.Id)
	out, err := k.inside("nsenter", netns, "ip", "-o", "-4", "addr", "show", "eth0")
	if err != nil || !strings.Contains(out, " "+ip+"/") {
		return []string{fmt.Sprintf("sandbox %s has the address %s, its namespace has %q, %v", s.Id, ip, out, err)}
	}

	owner, err := os.ReadFile(k.eng.Path(filepath.Join(k.leases(), ip)))
	if err != nil || !strings.HasPrefix(string(owner), s.Id) {
		return []string{fmt.Sprintf("the address %s of sandbox %s is reserved for %q, %v", ip, s.Id, owner, err)}
	}

	return nil
}

// checkDesired checks that every desired pod is running.
func (k *kubelet) checkDesired(sandboxes []*runtimeapi.PodSandbox, containers []*runtimeapi.Container) []string {
	var problems []string
	for _, p := range k.desired() {
		ready := 0
		for _, s := range sandboxes {
			if s.Metadata.Uid == p.uid && s.State == runtimeapi.PodSandboxState_SANDBOX_READY {
				ready++
			}
		}

		runs := map[string]int{}
		for _, c := range containers {
			if c.Labels["io.kubernetes.pod.uid"] == p.uid && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
				runs[c.Metadata.Name]++
			}
		}

		if ready != 1 {
			problems = append(problems, fmt.Sprintf("%s has %d ready sandboxes", p.uid, ready))
		}

		for _, name := range p.containers {
			if runs[name] != 1 {
				problems = append(problems, fmt.Sprintf("%s: %d running containers %s", p.uid, runs[name], name))
			}
		}
	}

	return problems
}

// checkReservations checks that every address is reserved for an existing sandbox.
func (k *kubelet) checkReservations(sandboxes []*runtimeapi.PodSandbox) (problems []string) {
	files, err := os.ReadDir(k.eng.Path(k.leases()))
	if err != nil {
		return []string{err.Error()}
	}

	for _, f := range files {
		if _, err := netip.ParseAddr(f.Name()); err != nil {
			continue
		}

		owner, err := os.ReadFile(filepath.Join(k.eng.Path(k.leases()), f.Name()))
		if err != nil {
			continue // released meanwhile
		}

		isOwner := func(s *runtimeapi.PodSandbox) bool { return strings.HasPrefix(string(owner), s.Id) }
		if !slices.ContainsFunc(sandboxes, isOwner) {
			problems = append(problems, fmt.Sprintf("the address %s is reserved for %.80q, but it does not exist",
				f.Name(), owner))
		}
	}

	return problems
}

// await calls check until it returns nothing, at most for d, and returns the last result.
func await(ctx context.Context, d time.Duration, check func(context.Context) []string) []string {
	deadline := time.Now().Add(d)
	for {
		timeout, cancel := context.WithTimeout(ctx, callTimeout)
		problems := check(timeout)
		cancel()
		if len(problems) == 0 || time.Now().After(deadline) || !sleep(ctx, syncEvery) {
			return problems
		}
	}
}
