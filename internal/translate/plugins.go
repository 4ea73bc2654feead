package translate

import (
	"strings"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// readPlugged returns the facts of NRI plugins about an object. required is in its record.
func readPlugged(h *container.HostConfig, required bool) model.Plugged {
	p := model.Plugged{Required: required}
	if a := readAnnotation(h).Adjustments; a != nil {
		p.Directory = a.Directory
	}
	return p
}

// ReadProcess returns the process of a container for NRI plugins. Read must have accepted the
// response.
func ReadProcess(in container.InspectResponse) *model.Process {
	p := &model.Process{Env: in.Config.Env, Seccomp: readSeccomp(in.HostConfig)}
	if limit := in.HostConfig.PidsLimit; limit != nil && *limit > 0 {
		p.Limits.PidsLimit = *limit
	}
	p.Limits.MemoryReservation = in.HostConfig.MemoryReservation

	if in.Path != "" {
		p.Args = append([]string{in.Path}, in.Args...)
	}

	for _, u := range in.HostConfig.Ulimits {
		p.Rlimits = append(p.Rlimits, model.Rlimit{
			Type: "RLIMIT_" + strings.ToUpper(u.Name),
			Soft: uint64(u.Soft),
			Hard: uint64(u.Hard),
		})
	}

	for _, d := range in.HostConfig.Devices {
		p.Devices = append(p.Devices, model.Device{
			HostPath:      d.PathOnHost,
			ContainerPath: d.PathInContainer,
			Access:        d.CgroupPermissions,
		})
	}

	return p
}

// readSeccomp returns the kind of a container's seccomp profile. Docker stores the content of a
// Localhost profile, not its name.
func readSeccomp(h *container.HostConfig) runtimeapi.SecurityProfile_ProfileType {
	kind := runtimeapi.SecurityProfile_RuntimeDefault
	if h.Privileged {
		return runtimeapi.SecurityProfile_Unconfined
	}

	for _, o := range h.SecurityOpt {
		switch profile, ok := strings.CutPrefix(o, "seccomp="); {
		case !ok:
		case profile == "unconfined":
			kind = runtimeapi.SecurityProfile_Unconfined
		default:
			kind = runtimeapi.SecurityProfile_Localhost
		}
	}

	return kind
}
