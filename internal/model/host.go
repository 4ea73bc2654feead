package model

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// Host describes the engine and this machine. It is read once per connection and never changes
// while the engine runs.
type Host struct {
	EngineVersion   string // e.g. "20.10.24"
	APIVersion      string // negotiated, e.g. "1.41"
	OperatingSystem string // "linux" or "windows"
	Architecture    string // in the engine's terms: "x86_64", "aarch64"
	CgroupDriver    string // "cgroupfs" or "systemd"
	CgroupVersion   string // "1" or "2"
	StorageDriver   string
	ContainerdStore bool   // images are in containerd's store, not in a graph driver's
	RootDir         string // the engine's data root
	DefaultRuntime  string
	Runtimes        []string // configured OCI runtimes, sorted
	SecurityOptions []string // names only: "apparmor", "seccomp", "selinux", "rootless", "userns"
	DefaultRunc     bool     // the program of the default runtime is runc or a wrapper of it
	DefaultIsRunc   bool     // it is runc itself, without a vendor's wrapper
	BuiltinSeccomp  bool     // the default seccomp profile is Docker's own, not the operator's
	CDI             bool     // the engine supports the Container Device Interface
	LiveRestore     bool
	LogDriver       string // default of the engine
	// MinOOMScoreAdj is the lowest oom_score_adj of a container on this machine: -1000, or higher
	// without CAP_SYS_RESOURCE.
	MinOOMScoreAdj int
	Shim           Shim
}

// Shim is the state of this project's containerd shim on an engine (docs/adr/0011).
type Shim struct {
	Mode    string // of --containers: "shim", "auto", "engine" or "" for "engine"
	Problem string // why containers cannot run under the shim, "" if they can
	// IsPending is set until a trial has shown whether containers can run under the shim. Until
	// then they cannot.
	IsPending bool
	// IsOverdue is set if the trials had no result in time. A new pod does not wait for the next.
	IsOverdue bool
	// IsUnsupported is set if the engine cannot use a shim by its nature. No installation changes
	// that.
	IsUnsupported bool
	// UserNSProblem is the reason why pods under the shim cannot have a user namespace, "" if they
	// can.
	UserNSProblem string
	// OutputDirectory is the directory for the output of execs from the shim, "" for none.
	OutputDirectory string
	// Adjustments is the directory with the adjustments of NRI plugins, "" without plugins.
	Adjustments string
}

// IsActive reports whether new pods run under the shim.
func (s Shim) IsActive() bool { return s.IsWanted() && s.Problem == "" }

// MayBeActive reports whether new pods run under the shim, or a trial may still show that they
// can.
func (s Shim) MayBeActive() bool { return s.IsActive() || s.IsWanted() && s.IsPending }

// IsWanted reports whether new pods should run under the shim.
func (s Shim) IsWanted() bool { return s.Mode == "shim" || s.Mode == "auto" }

// IsRequired reports whether new pods must not run without the shim.
func (s Shim) IsRequired() bool { return s.Mode == "shim" }

// UserNSProblem returns the reason why pods cannot have a user namespace, "" if they can.
func (h Host) UserNSProblem() string {
	if !h.Shim.IsActive() {
		return "they need the containerd shim (" + cmp.Or(h.Shim.Problem, "--containers=engine") + ")"
	}
	return h.Shim.UserNSProblem
}

// Has reports whether the engine has a security option: "apparmor", "seccomp", "selinux",
// "rootless" or "userns".
func (h Host) Has(option string) bool { return slices.Contains(h.SecurityOptions, option) }

// AtLeast reports whether the negotiated API has this version ("1.44") or a newer one.
func (h Host) AtLeast(api string) bool { return apiNumber(h.APIVersion) >= apiNumber(api) }

// apiNumber orders API versions: 1.44 is 1044.
func apiNumber(s string) int {
	major, minor, _ := strings.Cut(s, ".")
	a, _ := strconv.Atoi(major)
	b, _ := strconv.Atoi(minor)
	return a*1000 + b
}

// RecursiveReadOnly reports whether the engine can mount a file system and its submounts read-only
// (API 1.44, Engine 25).
func (h Host) RecursiveReadOnly() bool { return h.AtLeast("1.44") }

// MapsUsers reports whether the engine runs with userns-remap.
func (h Host) MapsUsers() bool { return h.Has("userns") }

// NativeImageVolumes reports whether the engine mounts images itself (API 1.48, Engine 28, with
// containerd's image store).
func (h Host) NativeImageVolumes() bool { return h.ContainerdStore && h.AtLeast("1.48") }

// ClampOOMScore raises an oom_score_adj to the lowest value that this machine permits.
func (h Host) ClampOOMScore(score int64) int { return max(int(score), h.MinOOMScoreAdj) }
