package spec

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/text"
)

// cdiPrefix begins the annotations by which device plugins name CDI devices (Container Device
// Interface, annotations of containers). The value holds names, separated by commas.
const cdiPrefix = "cdi.k8s.io/"

// cdiName is the form of a CDI device's name: vendor/class=device (CDI specification 0.8, "kind"
// and "devices").
var cdiName = regexp.MustCompile(`^[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?` +
	`=[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?$`)

// cdiDevice is a CDI device and the field of the request that names it.
type cdiDevice struct{ field, name string }

// cdiDevices returns the CDI devices of a container, by field and by annotation, each once. A name
// that is none is InvalidArgument: the container must not start without its device.
func cdiDevices(cfg *runtimeapi.ContainerConfig) ([]cdiDevice, error) {
	var asked []cdiDevice
	for _, d := range cfg.GetCDIDevices() {
		asked = append(asked, cdiDevice{field: "config.CDI_devices", name: d.GetName()})
	}

	for _, key := range slices.Sorted(maps.Keys(cfg.GetAnnotations())) {
		if !strings.HasPrefix(key, cdiPrefix) {
			continue
		}
		for name := range strings.SplitSeq(cfg.GetAnnotations()[key], ",") {
			asked = append(asked, cdiDevice{field: fmt.Sprintf("config.annotations[%q]", key), name: name})
		}
	}

	var out []cdiDevice
	known := map[string]bool{}
	for _, d := range asked {
		if !cdiName.MatchString(d.name) {
			return nil, fmt.Errorf("%s: %q is not the name of a CDI device, which has the form vendor/class=device: %w",
				d.field, text.Clean(d.name, maxName), errdefs.ErrInvalidArgument)
		}

		if !known[d.name] {
			known[d.name] = true
			out = append(out, d)
		}
	}

	return out, nil
}

// checkCDI refuses CDI devices on an engine that would start the container without them.
func checkCDI(devices []cdiDevice, h Host) error {
	if len(devices) == 0 || h.CDI {
		return nil
	}
	return fmt.Errorf("%s: Docker Engine %s has no CDI (%s); it came with Engine 25, where daemon.json may have to "+
		"enable it "+
		"(\"features\": {\"cdi\": true}): %w",
		devices[0].field, h.EngineVersion, strings.Join(cdiNames(devices), ", "), errdefs.ErrInvalidArgument)
}

func cdiNames(devices []cdiDevice) []string {
	var out []string
	for _, d := range devices {
		out = append(out, d.name)
	}
	return out
}
