package takeover

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/text"
)

// Report is what the daemon finds when it starts.
type Report struct {
	Engine        string    `json:"engine"`
	NetworkPlugin string    `json:"networkPlugin"`
	Pods          []Pod     `json:"pods"`
	Findings      []Finding `json:"findings"`
}

// Pod is one sandbox.
type Pod struct {
	Name       string      `json:"name"` // <namespace>/<name>
	UID        string      `json:"uid"`
	Attempt    uint32      `json:"attempt"`
	Sandbox    string      `json:"sandbox"` // its ID
	MadeBy     string      `json:"madeBy"`
	Ready      bool        `json:"ready"`
	Network    string      `json:"network"`
	Addresses  []string    `json:"addresses,omitempty"`
	HostPorts  []string    `json:"hostPorts,omitempty"`
	Note       string      `json:"note,omitempty"` // the file of the older shim
	Containers []Container `json:"containers,omitempty"`
}

// Container is one container of a pod.
type Container struct {
	Name    string `json:"name"`
	Attempt uint32 `json:"attempt"`
	ID      string `json:"id"`
	State   string `json:"state"`
	Log     string `json:"log"`
	LogPath string `json:"logPath,omitempty"`
}

// Finding is something odd.
type Finding struct {
	ByHand  bool       `json:"byHand"` // the daemon cannot fix it
	Subject string     `json:"subject"`
	Detail  string     `json:"detail"`
	Fix     shell.Line `json:"fix,omitzero"` // what to do, or what the daemon does
}

// Who made a sandbox.
const (
	madeHere       = "this release"
	madeDockershim = "dockershim"
	madeOlder      = "older cri-dockerd"
	madeUnknown    = "an older shim" // it left no note that would tell which
)

func (s *survey) report() *Report {
	r := &Report{Engine: clean(s.host.EngineVersion), NetworkPlugin: s.plugin, Pods: []Pod{}, Findings: []Finding{}}
	for _, sb := range s.sandboxes() {
		r.Pods = append(r.Pods, s.pod(sb))
		r.Findings = append(r.Findings, s.oddSandbox(sb)...)
		for _, c := range s.containersOf(sb.ID) {
			r.Findings = append(r.Findings, s.oddLog(title(sb), c)...)
		}
	}

	r.Findings = append(r.Findings, s.leftovers()...)
	for _, m := range s.misfits {
		r.Findings = append(r.Findings, newFinding(true, "container "+m.Name, m.Reason+"; nobody manages it",
			shell.Command("docker rm -f {}", m.ID)))
	}

	return r
}

// byHand is how many findings the daemon cannot fix.
func (r *Report) byHand() (n int) {
	for _, f := range r.Findings {
		if f.ByHand {
			n++
		}
	}
	return n
}

// sandboxes are all, by namespace, name and attempt.
func (s *survey) sandboxes() []*spec.Sandbox {
	var out []*spec.Sandbox
	for _, o := range s.objects {
		if o.Sandbox != nil {
			out = append(out, o.Sandbox)
		}
	}

	slices.SortFunc(out, func(a, b *spec.Sandbox) int {
		return cmp.Or(strings.Compare(title(a), title(b)), cmp.Compare(a.Metadata.Attempt, b.Metadata.Attempt),
			strings.Compare(string(a.ID), string(b.ID)))
	})

	return out
}

// containersOf are a sandbox's containers, by name and attempt.
func (s *survey) containersOf(id model.ContainerID) []*spec.Container {
	var out []*spec.Container
	for _, o := range s.objects {
		if o.Container != nil && o.Container.SandboxID == id {
			out = append(out, o.Container)
		}
	}

	slices.SortFunc(out, func(a, b *spec.Container) int {
		return cmp.Or(strings.Compare(a.Metadata.Name, b.Metadata.Name),
			cmp.Compare(a.Metadata.Attempt, b.Metadata.Attempt))
	})

	return out
}

// title is <namespace>/<name>. Both come from labels, which may be anybody's.
func title(sb *spec.Sandbox) string {
	return clean(sb.Metadata.GetNamespace() + "/" + sb.Metadata.GetName())
}

// clean makes a foreign string fit for a line of the report.
func clean(s string) string {
	return text.Clean(strings.NewReplacer("\n", " ", "\t", " ").Replace(text.Clean(s, text.MaxName)), text.MaxName)
}

func newFinding(byHand bool, subject, detail string, fix shell.Line) Finding {
	return Finding{ByHand: byHand, Subject: clean(subject), Detail: clean(detail), Fix: fix}
}

func (s *survey) pod(sb *spec.Sandbox) Pod {
	p := Pod{
		Name:      title(sb),
		UID:       clean(sb.Metadata.GetUid()),
		Attempt:   sb.Metadata.GetAttempt(),
		Sandbox:   string(sb.ID),
		MadeBy:    s.madeBy(sb),
		Ready:     sb.Ready(),
		Network:   clean(s.network(sb)),
		Addresses: s.addresses(sb),
		HostPorts: portNames(s.ports(sb)),
		Note:      clean(s.notes[string(sb.ID)].file),
	}

	for _, c := range s.containersOf(sb.ID) {
		p.Containers = append(p.Containers, Container{
			Name:    clean(c.Metadata.GetName()),
			Attempt: c.Metadata.GetAttempt(),
			ID:      string(c.ID),
			LogPath: clean(c.LogPath),
			Log:     clean(logMode(c)),
			State:   strings.ToLower(strings.TrimPrefix(c.State.String(), "CONTAINER_")),
		})
	}

	return p
}

func (s *survey) madeBy(sb *spec.Sandbox) string {
	file := s.notes[string(sb.ID)].file
	switch {
	case !sb.Foreign:
		return madeHere
	case strings.HasPrefix(file, checkpoint.Dockershim+"/"):
		return madeDockershim
	case file != "":
		return madeOlder
	}

	return madeUnknown
}

func (s *survey) network(sb *spec.Sandbox) string {
	c, cached := s.cache[string(sb.ID)]
	switch {
	case sb.HostNetwork():
		return "host"
	case sb.EngineNetwork():
		return "Docker's bridge"
	case cached && sb.OwnNetNS:
		return c.Network + ", own namespace"
	case cached:
		return c.Network
	}

	return "not in the cache"
}

func (s *survey) addresses(sb *spec.Sandbox) []string {
	ips := sb.EngineIPs
	switch {
	case sb.HostNetwork():
		return nil
	case len(s.cache[string(sb.ID)].Addresses) > 0:
		ips = s.cache[string(sb.ID)].Addresses
	case len(s.found[string(sb.ID)]) > 0:
		ips = s.found[string(sb.ID)]
	}

	var out []string
	for _, ip := range ips {
		out = append(out, ip.String())
	}

	return out
}

// ports are a sandbox's host ports, as whoever knows them says.
func (s *survey) ports(sb *spec.Sandbox) []*runtimeapi.PortMapping {
	all := s.cache[string(sb.ID)].Ports
	if len(all) == 0 {
		all = s.notes[string(sb.ID)].Ports
	}
	if len(all) == 0 {
		all = sb.EnginePorts
	}

	return slices.DeleteFunc(slices.Clone(all), func(p *runtimeapi.PortMapping) bool { return p.GetHostPort() <= 0 })
}

// portNames are ports as `docker ps` shows them.
func portNames(ports []*runtimeapi.PortMapping) []string {
	var out []string
	for _, p := range ports {
		host := fmt.Sprint(p.GetHostPort())
		if p.GetHostIp() != "" {
			host = clean(p.GetHostIp()) + ":" + host
		}
		out = append(out, fmt.Sprintf("%s->%d/%s", host, p.GetContainerPort(),
			strings.ToLower(p.GetProtocol().String())))
	}

	return out
}

// logMode is how a container's output reaches the kubelet.
func logMode(c *spec.Container) string {
	switch {
	case c.LogDriver == driver.Name:
		return "CRI file"
	case c.EngineLogPath != "":
		return c.LogDriver + ", linked"
	}
	return c.LogDriver + ", no file"
}
