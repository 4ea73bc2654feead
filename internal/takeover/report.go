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
	"cri-dockerd/internal/text"
)

// Report is the state of a node for adoption by the daemon.
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
	Sandbox    string      `json:"sandbox"` // sandbox ID
	CreatedBy  string      `json:"createdBy"`
	Ready      bool        `json:"ready"`
	Network    string      `json:"network"`
	Addresses  []string    `json:"addresses,omitempty"`
	HostPorts  []string    `json:"hostPorts,omitempty"`
	Checkpoint string      `json:"checkpoint,omitempty"` // the checkpoint file of the older shim
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

// Finding is a problem or a note about a pod.
type Finding struct {
	ActionRequired bool       `json:"actionRequired"` // requires an action of the operator
	Subject        string     `json:"subject"`
	Detail         string     `json:"detail"`
	Fix            shell.Line `json:"fix,omitzero"` // what to do, or what the daemon does
}

// Creators of a sandbox.
const (
	createdHere         = "this release"
	createdByDockershim = "dockershim"
	createdByOlder      = "older cri-dockerd"
	createdByUnknown    = "an older shim" // without a checkpoint, so the shim is unknown
)

func (s *survey) report() *Report {
	r := &Report{
		Engine:        clean(s.host.EngineVersion),
		NetworkPlugin: s.plugin,
		Pods:          []Pod{},
		Findings:      []Finding{},
	}
	for _, sb := range s.sandboxes() {
		r.Pods = append(r.Pods, s.pod(sb))
		r.Findings = append(r.Findings, s.sandboxFindings(sb)...)
		for _, c := range s.containersOf(sb.ID) {
			r.Findings = append(r.Findings, s.logFindings(title(sb), c)...)
		}
	}

	r.Findings = append(r.Findings, s.leftoverFindings()...)
	for _, m := range s.misfits {
		detail := m.Reason + "; it is not managed by Kubernetes"
		r.Findings = append(r.Findings,
			newFinding(true, "container "+m.Name, detail, shell.Command("docker rm -f {}", m.ID)))
	}

	return r
}

// manualActions returns the number of findings with an action of the operator.
func (r *Report) manualActions() (n int) {
	for _, f := range r.Findings {
		if f.ActionRequired {
			n++
		}
	}
	return n
}

// sandboxes returns all sandboxes, sorted by namespace, name and attempt.
func (s *survey) sandboxes() []*model.Sandbox {
	var out []*model.Sandbox
	for _, o := range s.objects {
		if o.Sandbox != nil {
			out = append(out, o.Sandbox)
		}
	}

	slices.SortFunc(out, func(a, b *model.Sandbox) int {
		return cmp.Or(strings.Compare(title(a), title(b)), cmp.Compare(a.Metadata.Attempt, b.Metadata.Attempt),
			strings.Compare(string(a.ID), string(b.ID)))
	})

	return out
}

// containersOf returns a sandbox's containers, sorted by name and attempt.
func (s *survey) containersOf(id model.ContainerID) []*model.Container {
	var out []*model.Container
	for _, o := range s.objects {
		if o.Container != nil && o.Container.SandboxID == id {
			out = append(out, o.Container)
		}
	}

	slices.SortFunc(out, func(a, b *model.Container) int {
		return cmp.Or(strings.Compare(a.Metadata.Name, b.Metadata.Name),
			cmp.Compare(a.Metadata.Attempt, b.Metadata.Attempt))
	})

	return out
}

// title returns <namespace>/<name>. Both come from labels and may be arbitrary.
func title(sb *model.Sandbox) string {
	return clean(sb.Metadata.GetNamespace() + "/" + sb.Metadata.GetName())
}

// clean sanitises a foreign string for a line of the report.
func clean(s string) string {
	return text.Clean(strings.NewReplacer("\n", " ", "\t", " ").Replace(text.Clean(s, text.MaxName)), text.MaxName)
}

func newFinding(actionRequired bool, subject, detail string, fix shell.Line) Finding {
	return Finding{
		ActionRequired: actionRequired,
		Subject:        clean(subject),
		Detail:         clean(detail),
		Fix:            fix,
	}
}

func (s *survey) pod(sb *model.Sandbox) Pod {
	p := Pod{
		Name:       title(sb),
		UID:        clean(sb.Metadata.GetUid()),
		Attempt:    sb.Metadata.GetAttempt(),
		Sandbox:    string(sb.ID),
		CreatedBy:  s.createdBy(sb),
		Ready:      sb.Ready(),
		Network:    clean(s.network(sb)),
		Addresses:  s.addresses(sb),
		HostPorts:  portNames(s.ports(sb)),
		Checkpoint: clean(s.checkpoints[string(sb.ID)].file),
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

func (s *survey) createdBy(sb *model.Sandbox) string {
	file := s.checkpoints[string(sb.ID)].file
	switch {
	case !sb.Foreign:
		return createdHere
	case strings.HasPrefix(file, checkpoint.Dockershim+"/"):
		return createdByDockershim
	case file != "":
		return createdByOlder
	}

	return createdByUnknown
}

func (s *survey) network(sb *model.Sandbox) string {
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

	return "unknown"
}

func (s *survey) addresses(sb *model.Sandbox) []string {
	ips := sb.EngineIPs
	switch {
	case sb.HostNetwork():
		return nil
	case len(s.cache[string(sb.ID)].Addresses) > 0:
		ips = s.cache[string(sb.ID)].Addresses
	case len(s.nsAddresses[string(sb.ID)]) > 0:
		ips = s.nsAddresses[string(sb.ID)]
	}

	var out []string
	for _, ip := range ips {
		out = append(out, ip.String())
	}

	return out
}

// ports returns a sandbox's host ports from the first source with any.
func (s *survey) ports(sb *model.Sandbox) []*runtimeapi.PortMapping {
	all := s.cache[string(sb.ID)].Ports
	if len(all) == 0 {
		all = s.checkpoints[string(sb.ID)].Ports
	}
	if len(all) == 0 {
		all = sb.EnginePorts
	}

	return slices.DeleteFunc(slices.Clone(all), func(p *runtimeapi.PortMapping) bool { return p.GetHostPort() <= 0 })
}

// portNames formats ports like `docker ps`.
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

// logMode returns the path of a container's output to the kubelet.
func logMode(c *model.Container) string {
	switch {
	case c.LogDriver == driver.Name:
		return "CRI file"
	case c.EngineLogPath != "":
		return c.LogDriver + ", linked"
	}
	return c.LogDriver + ", no file"
}
