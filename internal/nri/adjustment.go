package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/nri/pkg/api"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shim/adjustment"
	"cri-dockerd/internal/text"
)

// Adjustment is what plugins change in a new container. nil changes nothing.
type Adjustment struct {
	message *api.ContainerAdjustment
	owners  *owners // nil for a stored adjustment
}

// maxRDTClass is the limit of file names in Linux (NAME_MAX).
const maxRDTClass = 255

// reservedAnnotations are the prefixes of annotations for the containerd shim.
var reservedAnnotations = []string{"io.cri-dockerd.", "io.containerd."}

// newAdjustment checks the adjustments of plugins. It rejects those that neither Docker nor the
// shim can carry out, with the names of their plugins, and resolves the class of block I/O.
func newAdjustment(
	m *api.ContainerAdjustment, o *owners, classes map[string][]blockIORule,
) (*Adjustment, error) {
	prune(m)
	if m == nil || proto.Size(m) == 0 {
		return nil, nil
	}

	r := m.GetLinux().GetResources()
	if class := r.GetBlockioClass().GetValue(); class != "" { // "" removes the class
		parameters, err := resolveBlockIO(classes, class, deviceDir)
		if err != nil {
			return nil, fmt.Errorf("adjustment of the %s: %w",
				o.describe("block I/O class", api.Field_BlockioClass), err)
		}
		if r.BlockioClass.Value, err = adjustment.EncodeBlockIO(parameters); err != nil {
			return nil, err
		}
	}

	for _, class := range []string{r.GetRdtClass().GetValue(), m.GetLinux().GetRdt().GetClosId().GetValue()} {
		if err := checkRDTClass(class); err != nil {
			return nil, fmt.Errorf("adjustment of the %s: %w",
				o.describe("RDT class", api.Field_RdtClass, api.Field_RdtClosID), err)
		}
	}

	for key := range m.GetAnnotations() {
		name, _ := api.IsMarkedForRemoval(key)
		if slices.ContainsFunc(reservedAnnotations, func(p string) bool { return strings.HasPrefix(name, p) }) {
			return nil, fmt.Errorf("adjustment of the annotation %s: it is reserved for the runtime",
				o.describe(text.Clean(name, text.MaxName), api.Field_Annotations))
		}
	}

	if _, err := pluginResources(r); err != nil {
		return nil, fmt.Errorf("adjustment of %s: %w", o.describe("resources", resourceFields...), err)
	}
	if _, err := adjustment.Encode(m); err != nil {
		return nil, err
	}

	return &Adjustment{message: m, owners: o}, nil
}

// checkRDTClass checks the name of an RDT class. It is the name of a directory in resctrl. "" is no
// class.
func checkRDTClass(class string) error {
	if class == "." || class == ".." || strings.ContainsAny(class, "/\x00\n") || len(class) > maxRDTClass {
		return fmt.Errorf("%q is not the name of a class: %w", text.Clean(class, text.MaxName),
			errdefs.ErrInvalidArgument)
	}
	return nil
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

	r := fromResources(a.message.GetLinux().GetResources())
	r.OomScoreAdj = a.message.GetLinux().GetOomScoreAdj().GetValue()

	return r
}

// PluginResources returns the adjusted resources with a field in Docker's API, but not in the CRI.
func (a *Adjustment) PluginResources() model.PluginResources {
	if a == nil {
		return model.PluginResources{}
	}
	out, _ := pluginResources(a.message.GetLinux().GetResources()) // newAdjustment has checked them
	return out
}

// NeedsShim returns the adjustments that only the containerd shim can carry out, with the names of
// their plugins.
func (a *Adjustment) NeedsShim() []string {
	if a == nil {
		return nil
	}

	var out []string
	for _, p := range propertiesOf(otherResources, a.message.GetLinux().GetResources()) {
		out = append(out, a.owners.describe(p.name, p.fields...))
	}
	for _, p := range propertiesOf(shimProperties, a.message) {
		out = append(out, a.owners.describe(p.name, p.fields...))
	}
	slices.Sort(out)

	return out
}

// DescribeResources returns "resources" with the names of the plugins that have adjusted them.
func (a *Adjustment) DescribeResources() string {
	return a.owners.describe("resources", resourceFields...)
}
