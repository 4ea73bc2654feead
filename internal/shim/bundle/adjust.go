package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"cri-dockerd/internal/shim/adjustment"
)

// isEmpty reports whether adjustments change nothing.
func isEmpty(a *api.ContainerAdjustment) bool { return a == nil || proto.Size(a) == 0 }

// adjust applies the adjustments of NRI plugins with NRI's own generator. It works on a typed copy
// of the spec, and changes only the values that differ afterwards: fields that this program does
// not know stay.
func (b *Bundle) adjust() error {
	text, err := json.Marshal(b.raw)
	if err != nil {
		return err
	}

	spec := &specs.Spec{}
	if err := json.Unmarshal(text, spec); err != nil {
		return err
	}

	before, err := toObject(spec)
	if err != nil {
		return err
	}

	if b.deviceEnv, err = adjustSpec(spec, b.Adjust); err == nil {
		err = checkRDT(spec)
	}
	if err != nil {
		return fmt.Errorf("adjustments of NRI plugins: %w", err)
	}

	after, err := toObject(spec)
	if err != nil {
		return err
	}

	full, err := decodeObject(text)
	if err != nil {
		return err
	}

	mergeChanges(full, before, after)
	if text, err = json.Marshal(full); err != nil {
		return err
	}

	b.raw = object{}

	return json.Unmarshal(text, &b.raw)
}

// toObject returns the JSON form of a spec.
func toObject(spec *specs.Spec) (map[string]any, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	return decodeObject(text)
}

// decodeObject decodes a JSON object. Its numbers keep all digits.
func decodeObject(text []byte) (map[string]any, error) {
	out := map[string]any{}
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()

	return out, d.Decode(&out)
}

// mergeChanges applies the difference between two objects to a third one. Lists that differ are
// replaced as a whole.
func mergeChanges(to, before, after map[string]any) {
	for key := range before {
		if _, ok := after[key]; !ok {
			delete(to, key)
		}
	}

	for key, value := range after {
		old, existed := before[key]
		if existed && reflect.DeepEqual(old, value) {
			continue
		}

		target, isObject := to[key].(map[string]any)
		oldObject, wasObject := old.(map[string]any)
		newObject, staysObject := value.(map[string]any)
		if isObject && wasObject && staysObject {
			mergeChanges(target, oldObject, newObject)
			continue
		}

		to[key] = value
	}
}

// adjustSpec applies adjustments to a spec, and returns the environment of CDI devices. It rejects
// adjustments that NRI's generator would leave out.
func adjustSpec(spec *specs.Spec, a *api.ContainerAdjustment) (deviceEnv []*api.KeyValue, err error) {
	if spec.Process == nil || spec.Linux == nil {
		return nil, errors.New("the spec is incomplete")
	}

	replaceRlimits(spec.Process, a.GetRlimits())
	inject := func(spec *specs.Spec, devices []string) error {
		before := slices.Clone(spec.Process.Env)
		err := injectCDI(spec, devices)
		deviceEnv = addedEnv(before, spec.Process.Env)
		return err
	}
	g := generate.SpecGenerator(&generator{spec}, generate.WithCDIDeviceInjector(inject),
		generate.WithRdtResolver(resolveRDT), generate.WithBlockIOResolver(adjustment.DecodeBlockIO))
	if err := g.Adjust(a); err != nil {
		return nil, err
	}
	adjustMemory(spec.Linux.Resources, a.GetLinux().GetResources().GetMemory())

	return deviceEnv, nil
}

// resolveRDT returns an RDT class of the node.
func resolveRDT(class string) (*specs.LinuxIntelRdt, error) {
	return &specs.LinuxIntelRdt{ClosID: class}, nil
}

// checkRDT returns an error for a spec with Intel RDT on a node without it. Older versions of runc
// ignore it there.
func checkRDT(spec *specs.Spec) error {
	if spec.Linux.IntelRdt == nil {
		return nil
	}

	if mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("resctrl")); err != nil || len(mounts) > 0 {
		return err
	}

	return errors.New("intelRdt: the node has no RDT; it needs a CPU with RDT and a mount of the file system resctrl " +
		"(mount -t resctrl resctrl /sys/fs/resctrl)")
}

// addedEnv returns the variables of an environment that are not in an earlier one.
func addedEnv(before, after []string) (added []*api.KeyValue) {
	for _, v := range after {
		if name, value, _ := strings.Cut(v, "="); !slices.Contains(before, v) {
			added = append(added, &api.KeyValue{Key: name, Value: value})
		}
	}
	return added
}

// injectCDI adds CDI devices to a spec, by the specifications in /etc/cdi and /var/run/cdi. A
// device without a specification is an error.
func injectCDI(spec *specs.Spec, devices []string) error {
	cache, err := cdi.NewCache(cdi.WithAutoRefresh(false))
	if err != nil {
		return fmt.Errorf("CDI devices: %w", err)
	}

	unknown, err := cache.InjectDevices(spec, devices...)
	if err != nil {
		return fmt.Errorf("CDI devices %s: %w", strings.Join(unknown, ", "), err)
	}

	return nil
}

// replaceRlimits removes the limits of the adjustments from a process: NRI's generator only adds
// limits, and an OCI runtime rejects two of one type.
func replaceRlimits(p *specs.Process, limits []*api.POSIXRlimit) {
	for _, l := range limits {
		kept := p.Rlimits[:0]
		for _, old := range p.Rlimits {
			if old.Type != l.GetType() {
				kept = append(kept, old)
			}
		}
		p.Rlimits = kept
	}
}

// adjustMemory sets the limits of memory that NRI's generator does not know: it sets the limit
// itself, and that of swap to the same value.
func adjustMemory(r *specs.LinuxResources, m *api.LinuxMemory) {
	if r == nil || m == nil {
		return
	}
	if r.Memory == nil {
		r.Memory = &specs.LinuxMemory{}
	}

	if m.Reservation != nil {
		r.Memory.Reservation = m.Reservation.Get()
	}
	if m.Swap != nil {
		r.Memory.Swap = m.Swap.Get()
	}
	if m.Kernel != nil {
		r.Memory.Kernel = m.Kernel.Get() //nolint:staticcheck // an OCI runtime reports that it is obsolete
	}
	if m.KernelTcp != nil {
		r.Memory.KernelTCP = m.KernelTcp.Get()
	}
	if m.Swappiness != nil {
		r.Memory.Swappiness = m.Swappiness.Get()
	}
	if m.DisableOomKiller != nil {
		r.Memory.DisableOOMKiller = m.DisableOomKiller.Get()
	}
	if m.UseHierarchy != nil {
		r.Memory.UseHierarchy = m.UseHierarchy.Get()
	}
}
