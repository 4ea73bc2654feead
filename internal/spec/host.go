package spec

import (
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/system"
)

// ReadHost is what the engine's /info answer means for the translation. minOOM is the lowest
// oom_score_adj that this machine permits.
func ReadHost(in system.Info, apiVersion string, minOOM int) Host {
	h := Host{
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
		h.CgroupVersion = "1" // engines before API 1.41 knew no other
	}

	for r := range in.Runtimes {
		h.Runtimes = append(h.Runtimes, r)
	}

	slices.Sort(h.Runtimes)
	for _, o := range in.SecurityOptions {
		// "name=seccomp,profile=default"; very old engines give the bare name
		first, _, _ := strings.Cut(strings.TrimPrefix(o, "name="), ",")
		h.SecurityOptions = append(h.SecurityOptions, first)
	}

	return h
}

// Has says whether the engine has a security option: "apparmor", "seccomp", "selinux", "rootless",
// "userns".
func (h Host) Has(option string) bool { return slices.Contains(h.SecurityOptions, option) }

// AtLeast says whether the negotiated API is this version ("1.44") or newer.
func (h Host) AtLeast(api string) bool {
	a, b := apiNumber(h.APIVersion), apiNumber(api)
	return a >= b
}

// apiNumber orders API versions: 1.44 is 1044.
func apiNumber(s string) int {
	major, minor, _ := strings.Cut(s, ".")
	a, _ := strconv.Atoi(major)
	b, _ := strconv.Atoi(minor)
	return a*1000 + b
}

// RecursiveReadOnly says whether the engine can make a mount read-only with all mounts below it
// (API 1.44, Engine 25).
func (h Host) RecursiveReadOnly() bool { return h.AtLeast("1.44") }

// clampOOM is the score that a container can really get here.
func (h Host) clampOOM(score int64) int { return max(int(score), h.MinOOMScoreAdj) }
