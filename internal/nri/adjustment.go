package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/shim/adjustment"
)

// Adjustment is what plugins change in a new container. nil changes nothing.
type Adjustment struct {
	message *api.ContainerAdjustment
}

// reservedAnnotations are the prefixes of annotations for the containerd shim.
var reservedAnnotations = []string{"io.cri-dockerd.", "io.containerd."}

// newAdjustment checks the adjustments of plugins. It rejects those that neither Docker nor the
// shim can carry out.
func newAdjustment(m *api.ContainerAdjustment) (*Adjustment, error) {
	prune(m)
	if m == nil || proto.Size(m) == 0 {
		return nil, nil
	}

	r := m.GetLinux().GetResources()
	switch {
	case r.GetBlockioClass() != nil:
		return nil, fmt.Errorf("adjustment of the block I/O class: the node has no classes")
	case r.GetRdtClass() != nil:
		return nil, fmt.Errorf("adjustment of the RDT class: the node has no classes")
	}

	for key := range m.GetAnnotations() {
		name, _ := api.IsMarkedForRemoval(key)
		if slices.ContainsFunc(reservedAnnotations, func(p string) bool { return strings.HasPrefix(name, p) }) {
			return nil, fmt.Errorf("adjustment of the annotation %s: it is reserved for the runtime", name)
		}
	}

	if _, err := adjustment.Encode(m); err != nil {
		return nil, err
	}

	return &Adjustment{m}, nil
}

// prune removes the empty parts of adjustments: NRI's library adds some.
func prune(m *api.ContainerAdjustment) {
	if proto.Size(m.GetHooks()) == 0 && m != nil {
		m.Hooks = nil
	}

	l := m.GetLinux()
	if l == nil {
		return
	}

	if r := l.GetResources(); r != nil {
		if proto.Size(r.GetMemory()) == 0 {
			r.Memory = nil
		}
		if proto.Size(r.GetCpu()) == 0 {
			r.Cpu = nil
		}
		if proto.Size(r) == 0 {
			l.Resources = nil
		}
	}

	if proto.Size(l.GetRdt()) == 0 {
		l.Rdt = nil
	}
	if proto.Size(l) == 0 {
		m.Linux = nil
	}
}

// Resources returns the adjusted resources with a field in the CRI, nil for none.
func (a *Adjustment) Resources() *runtimeapi.LinuxContainerResources {
	if a == nil || a.message.GetLinux().GetResources() == nil && a.message.GetLinux().GetOomScoreAdj() == nil {
		return nil
	}

	r, _ := fromResources(a.message.GetLinux().GetResources())
	r.OomScoreAdj = a.message.GetLinux().GetOomScoreAdj().GetValue()

	return r
}

// NeedsShim returns the adjustments that only the containerd shim can carry out.
func (a *Adjustment) NeedsShim() []string {
	if a == nil {
		return nil
	}

	m, l := a.message, a.message.GetLinux()
	_, out := fromResources(l.GetResources())
	for name, isSet := range map[string]bool{
		"annotations":     len(m.GetAnnotations()) > 0,
		"mounts":          len(m.GetMounts()) > 0,
		"environment":     len(m.GetEnv()) > 0,
		"arguments":       len(m.GetArgs()) > 0,
		"hooks":           m.GetHooks() != nil,
		"process limits":  len(m.GetRlimits()) > 0,
		"devices":         len(l.GetDevices()) > 0,
		"CDI devices":     len(m.GetCDIDevices()) > 0,
		"control group":   l.GetCgroupsPath() != "",
		"I/O priority":    l.GetIoPriority() != nil,
		"seccomp policy":  l.GetSeccompPolicy() != nil,
		"namespaces":      len(l.GetNamespaces()) > 0,
		"sysctls":         len(l.GetSysctl()) > 0,
		"network devices": len(l.GetNetDevices()) > 0,
		"scheduler":       l.GetScheduler() != nil,
		"RDT":             l.GetRdt() != nil,
		"memory policy":   l.GetMemoryPolicy() != nil,
	} {
		if isSet {
			out = append(out, name)
		}
	}
	slices.Sort(out)

	return out
}
