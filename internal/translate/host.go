package translate

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/system"

	"cri-dockerd/internal/model"
)

// ReadHost translates the engine's response to GET /info. minOOM is the lowest oom_score_adj that
// this machine permits.
func ReadHost(in system.Info, apiVersion string, minOOM int) model.Host {
	h := model.Host{
		EngineVersion:   in.ServerVersion,
		APIVersion:      apiVersion,
		OperatingSystem: in.OSType,
		Architecture:    in.Architecture,
		CgroupDriver:    in.CgroupDriver,
		CgroupVersion:   in.CgroupVersion,
		StorageDriver:   in.Driver,
		RootDir:         in.DockerRootDir,
		DefaultRuntime:  in.DefaultRuntime,
		LiveRestore:     in.LiveRestoreEnabled,
		LogDriver:       in.LoggingDriver,
		MinOOMScoreAdj:  minOOM,
		CDI:             len(in.CDISpecDirs) > 0,
	}

	for _, kv := range in.DriverStatus { // ["driver-type", "io.containerd.snapshotter.v1"]
		h.ContainerdStore = h.ContainerdStore || strings.HasPrefix(kv[1], "io.containerd.snapshotter.")
	}

	if h.CgroupVersion == "" {
		h.CgroupVersion = "1" // engines before API 1.41 support no other
	}

	for r := range in.Runtimes {
		h.Runtimes = append(h.Runtimes, r)
	}

	slices.Sort(h.Runtimes)
	program := cmp.Or(in.Runtimes[in.DefaultRuntime].Path, in.DefaultRuntime)
	h.DefaultRunc, h.DefaultIsRunc = isRunc(program), isRuncItself(program)
	for _, o := range in.SecurityOptions {
		// "name=seccomp,profile=default"; very old engines give the bare name
		first, rest, _ := strings.Cut(strings.TrimPrefix(o, "name="), ",")
		h.SecurityOptions = append(h.SecurityOptions, first)
		if first == "seccomp" { // "default" before Engine 23
			h.BuiltinSeccomp = rest == "profile=builtin" || rest == "profile=default"
		}
	}

	return h
}

// isRunc reports whether an OCI runtime's program, or a runtime's name without a program, is runc
// or a wrapper of it.
func isRunc(program string) bool {
	return isRuncItself(program) || strings.HasPrefix(path.Base(program), "nvidia-container-runtime")
}

// isRuncItself reports whether an OCI runtime's program, or a runtime's name without a program, is
// runc without a vendor's wrapper.
func isRuncItself(program string) bool {
	base := path.Base(program)
	return strings.HasPrefix(base, "runc") || base == "io.containerd.runc.v2"
}
