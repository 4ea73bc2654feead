package translate

import (
	"strings"

	"github.com/moby/moby/api/types/container"

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

// readProcess returns the process of a container for NRI plugins.
func readProcess(in container.InspectResponse) *model.Process {
	p := &model.Process{Env: in.Config.Env}
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
