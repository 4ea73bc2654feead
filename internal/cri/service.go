// Package cri is the CRI itself: one RPC, one file, each method the story of its call. It only
// choreographs: what a request means is decided in spec, what runs is known by view, what Docker
// does is done by engine, and pod networks are podnet's. The interfaces below are all that it needs
// of them.
package cri

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/spec"
	"cri-dockerd/internal/view"
)

// Engine is what Docker does for us. Errors carry an errdefs kind (NotFound, Conflict,
// InvalidArgument, Unavailable …). A call that was cancelled may still have happened at the engine.
type Engine interface {
	// Create makes a container and returns its ID. A name in use is a Conflict
	// (errdefs.IsConflict). Once asked, the engine is waited for even if ctx ends.
	Create(ctx context.Context, c *spec.Create) (id model.ContainerID, err error)
	// Start starts a container that was made. Starting a running one is no error.
	Start(ctx context.Context, id model.ContainerID) error
	// Stop sends the container's stop signal and, after grace, SIGKILL; it returns when the
	// container has ended. Grace 0 kills at once. A stopped container is no error; an unknown one
	// is NotFound.
	Stop(ctx context.Context, id model.ContainerID, grace time.Duration) error
	// Remove removes a container by force, running or not, with its anonymous volumes. An unknown
	// one is NotFound.
	Remove(ctx context.Context, id model.ContainerID) error
	// KillForgotten kills the processes of a container that the engine has never started by its own
	// account, or does not have, and returns how many. Of any other it kills none. The container
	// must not be started meanwhile.
	KillForgotten(ctx context.Context, id model.ContainerID) (killed int, err error)
	// Update changes the resources of a container that Docker knows.
	Update(ctx context.Context, id model.ContainerID, u *spec.Update) error
	// Limit writes to the kernel what Docker cannot be told of a running container's resources; one
	// that has ended is no error.
	Limit(c *spec.Container, l spec.KernelLimits) error
	// LimitStarted is Limit of what the container's record asks for, unless that was done since the
	// container started.
	LimitStarted(c *spec.Container) error
	// Inspect reads one container; NotFound if it is gone, an empty object if it is none that we
	// can read.
	Inspect(ctx context.Context, id model.ContainerID) (spec.Object, error)
	// FindByName returns the object whose container has this name (without slash), NotFound if
	// there is none.
	FindByName(ctx context.Context, name string) (id model.ContainerID, o spec.Object, err error)
	// Exec runs a command in a container until it ends and returns its exit code: 127 for a command
	// that does not exist, 126 for one that cannot be executed, with the engine's text on stderr.
	// When ctx ends first, the process and all its descendants are killed and ctx's error is
	// returned.
	Exec(ctx context.Context, id model.ContainerID, x engine.Exec) (exitCode int, err error)
}

// Images are the engine's images. Errors are those of Engine.
type Images interface {
	// Pull pulls an image and returns its ID.
	Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (id model.ImageID, err error)
	// RemoveImage removes one reference or, with an ID, all of an image. NotFound if it is not
	// there.
	RemoveImage(ctx context.Context, ref string) error
	// ImageUsers are the names of the containers, running or not, ours or not, that were made from
	// an image.
	ImageUsers(ctx context.Context, id model.ImageID) ([]string, error)
	// HoldImage keeps the layers of an image from being removed and returns their directories, the
	// uppermost first. To hold it twice is no error. FailedPrecondition if the engine does not tell
	// them.
	HoldImage(ctx context.Context, imageID model.ImageID) (layers []string, err error)
	// ReleaseImage undoes HoldImage; an image that is not held is no error.
	ReleaseImage(ctx context.Context, imageID model.ImageID) error
	// HeldImages are the IDs of the images that are held.
	HeldImages(ctx context.Context) ([]model.ImageID, error)
	// PauseImage makes sure that the sandbox image is there and says what to create sandboxes from:
	// the embedded image, loaded if it is missing, or the configured one, pulled if it is missing.
	PauseImage(ctx context.Context) (spec.PauseImage, error)
}

// View is what runs on this node, from memory. Records are shared: read only. IDs may be shortened
// to a unique prefix; an unknown ID is NotFound, an ambiguous one InvalidArgument.
type View interface {
	Engine() view.EngineState
	Sandbox(id string) (*spec.Sandbox, error)
	Container(id string) (*spec.Container, error)
	Sandboxes() []*spec.Sandbox    // newest first
	Containers() []*spec.Container // newest first
	ContainersOf(sandboxID model.ContainerID) []*spec.Container
	// Pod is a sandbox with its containers and a time that orders it among the changes.
	Pod(sandboxID string) (view.Pod, error)
	// Watch begins to deliver what changes; see view.Watch. To be stopped.
	Watch() *view.Watch
	// Refresh reads the objects anew from the engine, so that the view shows what a call of ours
	// has done. An object that is gone leaves the view without an error.
	Refresh(ctx context.Context, ids ...model.ContainerID) error
}

// ImageView is the images of this node, from memory, as View has containers.
type ImageView interface {
	// Image returns an image by tag, digest or ID, also a shortened one, with or without "sha256:".
	Image(ref string) (*spec.Image, error)
	// Images returns all images; Unavailable while the engine has not listed them.
	Images() ([]*spec.Image, error)
	// RefreshImages reads all images anew.
	RefreshImages(ctx context.Context) error
	// RefreshImage reads one image anew, by name or ID, and returns it. NotFound if there is none.
	RefreshImage(ctx context.Context, ref string) (*spec.Image, error)
	// ForgetImage takes an image out of the view that was removed just now.
	ForgetImage(id model.ImageID)
}

// Logs is how a container's output reaches the kubelet; see package logs.
type Logs interface {
	// Config is what Docker is told for a container with this log path beneath its pod's log
	// directory. Unavailable while it cannot be logged as it must be.
	Config(ctx context.Context, directory, path string) (spec.LogConfig, error)
	// Started makes the log of a container that has just been started (or failed to) visible at its
	// path.
	Started(ctx context.Context, c *spec.Container) error
	// Reopen gives a running container a new log at its path, since the kubelet has renamed the old
	// one. On error no new one is made.
	Reopen(ctx context.Context, c *spec.Container) error
	// Removed undoes Started. The log of an unknown container is no error.
	Removed(ctx context.Context, c *spec.Container) error
	// State is the mode that is active, "" for none, and why, in words, if it is not the one to
	// wish for.
	State() (active, reason string)
}

// Stats reports what pods, containers and images use; see podstats.Reporter.
type Stats interface {
	Container(id string) (*runtimeapi.ContainerStats, error)
	Containers(f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats
	Pod(id string) (*runtimeapi.PodSandboxStats, error)
	Pods(f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats
	// Metrics returns PodSandboxMetrics as encoded items of a list; see package wire.
	Metrics() []byte
	ImageFileSystem() (*runtimeapi.ImageFsInfoResponse, error)
	// Forget closes what is held open for a container or sandbox that is being removed.
	Forget(id string)
}

// Volumes are images mounted for engines that cannot do so; see package imagevolume.
type Volumes interface {
	Mount(id model.ImageID, layers []string) error
	Unmount(id model.ImageID) error
	List() ([]model.ImageID, error)
	Resolve(id model.ImageID, subPath string) (path string, err error)
}

// Streams hands out single-use URLs of the streaming server.
type Streams interface {
	GetExec(*runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error)
	GetAttach(*runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error)
	GetPortForward(*runtimeapi.PortForwardRequest) (*runtimeapi.PortForwardResponse, error)
}

// Network is the network of a pod, from its namespace to its release; see podnet.Manager.
type Network interface {
	// Prepare makes a network namespace for a sandbox that is not created yet, until drop.
	Prepare(sysctls map[string]string) (netns string, drop func(), err error)
	// Keep pins a namespace of Prepare for its sandbox, and spares it from Reclaim until release.
	Keep(ctx context.Context, id model.ContainerID, netns string) (release func(), err error)
	// Connect connects a pod. Disconnect undoes it, also after an error.
	Connect(ctx context.Context, sb *spec.Sandbox, cfg *runtimeapi.PodSandboxConfig) ([]netip.Addr, error)
	// HasJoined reports whether a process is the sandbox's and in the namespace of Keep.
	HasJoined(id model.ContainerID, pid int) bool
	// Confirm marks a connected pod as complete. Only then it has Addresses.
	Confirm(id model.ContainerID) error
	// Disconnect releases the network of a pod, connected or not, running or not.
	Disconnect(ctx context.Context, sb *spec.Sandbox) error
	Addresses(sb *spec.Sandbox) []netip.Addr
	IsConnected(sb *spec.Sandbox) bool
	// NetNS opens the network namespace of a running pod. NotFound if there is none.
	NetNS(sb *spec.Sandbox) (*os.File, error)
}

// NodeNetwork is the pod network of the node; see podnet.Manager.
type NodeNetwork interface {
	// ConnectsPods reports whether this program connects pods, and not the engine.
	ConnectsPods() bool
	// State returns a warning about the network, and why pods cannot be connected, nil if they can.
	State() (notice string, err error)
	SetPodCIDR(cidrs []netip.Prefix) error
	// Check returns the path of a pod's namespace and the plugins' opinion of its connection.
	Check(ctx context.Context, sb *spec.Sandbox) (netns, result string)
	// Holds reports whether something of a pod's network is left.
	Holds(id model.ContainerID) bool
}

// Reclaimer adopts and releases the networks of pods that no call names; see podnet.Manager.
type Reclaimer interface {
	// IsAdoptable reports whether a pod may have a network that is not known here.
	IsAdoptable(sb *spec.Sandbox) bool
	Adopt(ctx context.Context, sb *spec.Sandbox) error
	// Reclaim releases the networks of sandboxes that are removed or do not run.
	Reclaim(ctx context.Context, all podnet.Sandboxes) error
	// RequestReclaim requests a call of Recover. It never blocks.
	RequestReclaim()
	// Collect has the plugins release what belongs to no pod.
	Collect(ctx context.Context) error
}

// Deps are the parts that a Service is wired from, all required, and what is decided for it.
type Deps struct {
	Log       *slog.Logger
	Engine    Engine
	Images    Images
	View      View
	ImageView ImageView
	Network   Network
	Node      NodeNetwork
	Reclaimer Reclaimer
	Logs      Logs
	Stats     Stats
	Volumes   Volumes
	Streams   Streams
	// EngineNetNS is why the engine is to make pods' network namespaces, "" if they are to be ours
	// where that is possible.
	EngineNetNS string
}

// Service implements runtime.v1.RuntimeService and runtime.v1.ImageService. RPCs that it does not
// have answer Unimplemented with their name, through the embedded servers.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	*imageService
	*gate
	Deps
	volumes *imageVolumes
	joining joining
	starts  starts

	encodedSandboxes  *encodings[spec.Sandbox]
	encodedContainers *encodings[spec.Container]
	outputs           outputBytes // of ExecSync
}

var (
	_ runtimeapi.RuntimeServiceServer = (*Service)(nil)
	_ runtimeapi.ImageServiceServer   = (*Service)(nil)
)

// New returns the services. Recover should be called whenever the view has been read anew.
func New(d Deps) *Service {
	g := &gate{view: d.View, names: keylock.New()}
	volumes := &imageVolumes{gate: g, images: d.ImageView, store: d.Images, mounts: d.Volumes}

	return &Service{
		imageService: &imageService{gate: g, images: d.ImageView, store: d.Images, stats: d.Stats, volumes: volumes},
		gate:         g,
		volumes:      volumes,
		Deps:         d,
		joining:      joining{configured: d.EngineNetNS, timeout: joinDeadline},
		starts:       starts{running: map[model.ContainerID]bool{}, late: map[model.ContainerID]bool{}},
		encodedSandboxes: newEncodings(
			func(sb *spec.Sandbox) proto.Message { return sb.Item() },
			func(sb *spec.Sandbox) proto.Message { return sb.ShortItem() }),
		encodedContainers: newEncodings(
			func(c *spec.Container) proto.Message { return c.Item() },
			func(c *spec.Container) proto.Message { return c.ShortItem() }),
	}
}

const (
	// undoDeadline is how long undoing a failed call may take, whatever became of the caller.
	undoDeadline = 30 * time.Second
	// undoSandboxDeadline is the same for a call that may have connected a pod. Plugins whose agent
	// is away take most of a minute to release it.
	undoSandboxDeadline = 2 * time.Minute
)

// maxProfile bounds a seccomp profile, in bytes. Docker's default has 20 KiB.
const maxProfile = 1 << 20

// readSeccomp is the content of a Localhost profile, "" without one.
func readSeccomp(file string) (string, error) {
	if file == "" {
		return "", nil
	}

	b, err := safefs.ReadTrusted(file, maxProfile)
	if err != nil {
		return "", fmt.Errorf("seccomp profile: %w: %w", err, errdefs.ErrInvalidArgument)
	}

	return string(b), nil
}

// notFoundIsFine makes an idempotent call of one that finds its object gone.
func notFoundIsFine(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
