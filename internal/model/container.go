package model

import (
	"cmp"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Container is the record of one container. It is shared and must not be changed.
type Container struct {
	ID            ContainerID
	Name          string // the container's name, without slash
	SandboxID     ContainerID
	Metadata      *runtimeapi.ContainerMetadata
	Labels        map[string]string
	Annotations   map[string]string
	Image         string // as named at creation: a name or an ID
	ImageID       ImageID
	ImageRef      string // the image's name with digest; its ID if it has none
	State         runtimeapi.ContainerState
	CreatedAt     time.Time
	StartedAt     time.Time // zero before the start
	FinishedAt    time.Time // zero before the exit
	ExitCode      int32
	Reason        string // one of the Reason constants; "" before the exit
	Message       string
	Pid           int    // 0 if it does not run
	LogPath       string // <LogDirectory>/<LogPath> of CRI; "" without a log
	EngineLogPath string // the engine's own log file (json-file); "" with other drivers
	LogDriver     string
	Mounts        []*runtimeapi.Mount
	ImageVolumes  []ImageVolume
	Resources     *runtimeapi.ContainerResources
	Kernel        KernelLimits // as requested at creation; written at each start
	User          *runtimeapi.ContainerUser
	StopSignal    runtimeapi.Signal
	TTY           bool
	Stdin         bool
	StdinOnce     bool
	ExecOutput    string // directory for the output of execs from the shim, "" for none
	Plugged       Plugged
	Process       *Process // nil unless NRI plugins are on
	Stale         bool     // from the engine's list alone: no process, limits, mounts or times
}

// Plugged are the facts of NRI plugins about a container or sandbox.
type Plugged struct {
	// Required is set if plugins must have seen the object before it exists for the CRI.
	Required bool
	// Directory is the directory with the adjustments for the shim, "" if it does not read them.
	Directory string
}

// Process is the process of a container, as Docker starts it.
type Process struct {
	Args    []string
	Env     []string // without variables that Docker adds at the start
	Rlimits []Rlimit
	Devices []Device
	Seccomp runtimeapi.SecurityProfile_ProfileType
	Limits  PluginResources // beside Container.Resources
}

// Rlimit is a limit of setrlimit(2). Type has the form RLIMIT_NOFILE.
type Rlimit struct {
	Type       string
	Soft, Hard uint64
}

// Device is a device of the node in a container.
type Device struct {
	HostPath, ContainerPath string
	Access                  string // some of rwm
}

// LogConfig selects the engine's log driver for a container.
type LogConfig struct {
	Driver  string            // e.g. "json-file"
	Options map[string]string // driver options
}

// KernelLimits are resources without a field in Docker's API. They are written to the kernel while
// the container runs.
type KernelLimits struct {
	OOMScoreAdj int                   `json:"-"`                   // of every process; 0 changes nothing
	Hugepages   map[PageSize]uint64   `json:"hugepages,omitempty"` // bytes
	Unified     map[UnifiedKey]string `json:"unified,omitempty"`   // file of cgroup v2: value
}

// Empty reports whether there is nothing to write.
func (l KernelLimits) Empty() bool {
	return l.OOMScoreAdj == 0 && len(l.Hugepages) == 0 && len(l.Unified) == 0
}

// With returns the limits after an update. Limits missing from it remain.
func (l KernelLimits) With(update KernelLimits) KernelLimits {
	return KernelLimits{
		OOMScoreAdj: cmp.Or(update.OOMScoreAdj, l.OOMScoreAdj),
		Hugepages:   merge(l.Hugepages, update.Hugepages),
		Unified:     merge(l.Unified, update.Unified),
	}
}

// merge returns a map with the entries of both, those of b first. It may return one of them.
func merge[M ~map[K]V, K comparable, V any](a, b M) M {
	switch {
	case len(a) == 0:
		return b
	case len(b) == 0:
		return a
	}

	out := maps.Clone(a)
	maps.Copy(out, b)

	return out
}

// Check checks the names in limits read from JSON.
func (l KernelLimits) Check() error {
	for size := range l.Hugepages {
		if _, err := ParsePageSize(string(size)); err != nil {
			return err
		}
	}

	for key := range l.Unified {
		if _, err := ParseUnifiedKey(string(key)); err != nil {
			return err
		}
	}

	return nil
}

// SetOn replaces the huge page limits and unified values of r.
func (l KernelLimits) SetOn(r *runtimeapi.LinuxContainerResources) {
	r.Unified, r.HugepageLimits = nil, nil
	for key, value := range l.Unified {
		if r.Unified == nil {
			r.Unified = map[string]string{}
		}
		r.Unified[string(key)] = value
	}

	for _, size := range slices.Sorted(maps.Keys(l.Hugepages)) {
		r.HugepageLimits = append(r.HugepageLimits,
			&runtimeapi.HugepageLimit{PageSize: string(size), Limit: l.Hugepages[size]})
	}
}

// WithMeasured returns a copy of the record with the kernel's actual limits.
func (c *Container) WithMeasured(l KernelLimits) *Container {
	r := proto.CloneOf(c.Resources)
	if r.GetLinux() == nil {
		r = &runtimeapi.ContainerResources{Linux: &runtimeapi.LinuxContainerResources{}}
	}
	r.Linux.OomScoreAdj = int64(l.OOMScoreAdj)
	l.SetOn(r.Linux)

	out := *c
	out.Resources = r

	return &out
}

// NoSwap reports whether Docker's limits permit memory, but no swap.
func (c *Container) NoSwap() bool {
	r := c.Resources.GetLinux()
	return r.GetMemoryLimitInBytes() > 0 && r.GetMemorySwapLimitInBytes() == r.GetMemoryLimitInBytes()
}

// ImageVolume is an image mounted into a container (CRI Mount.image). It is part of the container's
// record on disk.
type ImageVolume struct {
	ImageID ImageID `json:"image"`
	Target  string  `json:"target"`            // clean absolute path in the container
	SubPath string  `json:"subPath,omitempty"` // local path in the image
	// Path is the mount point of the image on the node, including the sub-path. It is "" if the
	// engine mounts images itself.
	Path string `json:"-"`
	// Ref is the image's name with digest. It is "" for an image without a digest and in records
	// of older releases.
	Ref string `json:"ref,omitempty"`
}

// MountsImage reports whether the container mounts this image.
func (c *Container) MountsImage(imageID ImageID) bool {
	return slices.ContainsFunc(c.ImageVolumes, func(v ImageVolume) bool { return v.ImageID == imageID })
}
