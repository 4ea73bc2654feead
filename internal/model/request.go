package model

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Both validate and translate read the parts of requests below. They stand here so that each has
// one interpretation.

// PauseName replaces the container's name in the name of a pause container. No container may have
// it.
const PauseName = "POD"

// IsNetSysctl reports whether a sysctl belongs to the network namespace. sysctl(8) allows dots and
// slashes as separators.
func IsNetSysctl(name string) bool {
	return strings.HasPrefix(name, "net.") || strings.HasPrefix(name, "net/")
}

// localhostPrefix is the prefix of a profile on this node in string form.
const localhostPrefix = "localhost/"

// ParseProfile parses the string form of a seccomp or AppArmor profile: runtime/default,
// docker/default, unconfined or localhost/<ref>. It returns nil for "", an unset profile. Any other
// string is InvalidArgument: it must not run as another profile.
func ParseProfile(s string) (*runtimeapi.SecurityProfile, error) {
	if ref, ok := strings.CutPrefix(s, localhostPrefix); ok {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}, nil
	}

	switch s {
	case "":
		return nil, nil //nolint:nilnil // an unset profile
	case "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}, nil
	case "runtime/default", "docker/default":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}, nil
	}

	return nil, fmt.Errorf("%q is not unconfined, runtime/default, docker/default or localhost/<profile>: %w", s,
		errdefs.ErrInvalidArgument)
}

// LocalhostRef returns the reference of a Localhost profile: a file for seccomp, a name for
// AppArmor. It returns "" for other profiles. Some clients send the string form, "localhost/<ref>".
func LocalhostRef(p *runtimeapi.SecurityProfile) string {
	if p.GetProfileType() != runtimeapi.SecurityProfile_Localhost {
		return ""
	}
	return strings.TrimPrefix(p.GetLocalhostRef(), localhostPrefix)
}

// AppArmorProfile returns the AppArmor profile of a container and its field in the security
// context. Kubelets before 1.30 send only its string form.
func AppArmorProfile(sc *runtimeapi.LinuxContainerSecurityContext) (p *runtimeapi.SecurityProfile, field string) {
	if p := sc.GetApparmor(); p != nil {
		return p, "apparmor"
	}
	p, _ = ParseProfile(sc.GetApparmorProfile()) //nolint:staticcheck // old kubelets
	return p, "apparmor_profile"
}

// cdiPrefix is the prefix of annotations with CDI device names from device plugins (Container
// Device Interface, annotations of containers). The value holds names, separated by commas.
const cdiPrefix = "cdi.k8s.io/"

// CDIDevice is a requested CDI device.
type CDIDevice struct {
	Field string // the field of the request
	Name  string // vendor/class=device
}

// CDIDevices returns the CDI devices of a container from its field and its annotations, each once.
// Their names are unchecked.
func CDIDevices(cfg *runtimeapi.ContainerConfig) []CDIDevice {
	var out []CDIDevice
	known := map[string]bool{}
	add := func(field, name string) {
		if !known[name] {
			known[name] = true
			out = append(out, CDIDevice{Field: field, Name: name})
		}
	}

	for _, d := range cfg.GetCDIDevices() {
		add("config.CDI_devices", d.GetName())
	}

	for _, key := range slices.Sorted(maps.Keys(cfg.GetAnnotations())) {
		if !strings.HasPrefix(key, cdiPrefix) {
			continue
		}
		for name := range strings.SplitSeq(cfg.GetAnnotations()[key], ",") {
			add(fmt.Sprintf("config.annotations[%q]", key), name)
		}
	}

	return out
}
