// Package podstats reports the usage of pods, containers and images: the stats of the CRI, its
// metrics, and the same metrics under cAdvisor's names for Prometheus. A call reads only the kernel
// and memory, never the engine.
package podstats

import (
	"log/slog"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
	"cri-dockerd/internal/view"
	"cri-dockerd/internal/wire"
)

// View provides the state of this node from memory; see view.View. Records are shared: read only.
type View interface {
	Engine() view.EngineState
	Sandbox(id string) (*model.Sandbox, error)
	Container(id string) (*model.Container, error)
	Sandboxes() []*model.Sandbox
	Containers() []*model.Container
	Images() ([]*model.Image, error)
}

// Usage reports the usage of running processes; see package stats. A pod is identified by any of
// its running processes, of the pause container or another container. NotFound if the process has
// ended.
type Usage interface {
	Container(id string, pid int) (stats.Usage, error)
	// Pod returns stats.ErrNoPodGroup for a pod without its own cgroup.
	Pod(id string, pid int, uid string) (stats.Usage, error)
	Processes(id string, pid int) (uint64, error)
	Network(id string, pid, most int) ([]stats.Interface, error)
	// Forget closes the files held open for a container or pause container about to be removed.
	Forget(id string)
}

// Details reports values that only metrics need; see package stats. Errors are those of Usage.
type Details interface {
	ContainerDetails(id string, pid int) (stats.Details, error)
	PodDetails(id string, pid int, uid string) (stats.Details, error)
	Descriptors(id string, pid int) (stats.Processes, error)
	LogBytes(id, path string) (uint64, error)
	Path(id string, pid int) string
	FileSystem(dir string) (stats.FileSystem, error)
	Device(major, minor uint32) string
}

// ImageFS is the disk usage of images and writable layers; see package imagefs.
type ImageFS interface {
	// Read returns the last measurement of a store, false while there is none. It does no work.
	Read(s imagefs.Store) (imagefs.Measurement, bool)
	// Complete is like Read, and also measures these containers if they are not in the last
	// measurement. It returns false if it cannot know the store.
	Complete(s imagefs.Store, containers []model.ContainerID) (imagefs.Measurement, bool)
}

// Config has the sources of a Reporter, all required.
type Config struct {
	View    View
	Usage   Usage
	Details Details
	ImageFS ImageFS
	Log     *slog.Logger
}

// Reporter reports stats and metrics. It is safe for concurrent use.
type Reporter struct {
	Config
	podAttributes       *wire.Cache[model.Sandbox]
	containerAttributes *wire.Cache[model.Container]
	metricsSize         atomic.Int64 // of the last Metrics, in bytes
}

// New returns a Reporter.
func New(c Config) *Reporter {
	return &Reporter{
		Config:              c,
		podAttributes:       wire.NewCache(func(sb *model.Sandbox) proto.Message { return sb.Attributes() }),
		containerAttributes: wire.NewCache(func(c *model.Container) proto.Message { return c.Attributes() }),
	}
}

// Forget closes the files held open for a container or sandbox about to be removed.
func (r *Reporter) Forget(id string) { r.Usage.Forget(id) }

// ImageFileSystem reports the disk usage of images and of the writable layers of containers, from
// the last measurement in the background. Before the first one, and for storage drivers whose
// layout is unknown, it reports the sum of the images' sizes, without inodes.
func (r *Reporter) ImageFileSystem() (*runtimeapi.ImageFsInfoResponse, error) {
	host := r.View.Engine().Host
	m, measured := r.ImageFS.Read(storeOf(host))
	if !measured {
		images, err := r.View.Images()
		if err != nil {
			return nil, err
		}
		m = sizesOf(images, host.RootDir)
	}

	usage := func(dir string, u imagefs.Usage) []*runtimeapi.FilesystemUsage {
		inodes := &u.Inodes
		if !measured {
			inodes = nil
		}
		return []*runtimeapi.FilesystemUsage{newFilesystemUsage(m.At, dir, u.Bytes, inodes)}
	}

	return &runtimeapi.ImageFsInfoResponse{
		ImageFilesystems:     usage(m.ImageDir, m.Image),
		ContainerFilesystems: usage(m.ContainerDir, m.Container),
	}, nil
}

// layers returns the last measurement of the writable layers.
func (r *Reporter) layers() imagefs.Measurement {
	m, _ := r.ImageFS.Read(storeOf(r.View.Engine().Host))
	return m
}

func storeOf(host model.Host) imagefs.Store {
	return imagefs.Store{
		Driver:     host.StorageDriver,
		Root:       host.RootDir,
		Containerd: host.ContainerdStore,
	}
}

// logUnreadable logs the reason for missing stats, unless the process has ended.
func (r *Reporter) logUnreadable(kind, id string, err error) {
	if !errdefs.IsNotFound(err) {
		r.Log.Debug("cannot read stats", kind, id, "err", err)
	}
}
