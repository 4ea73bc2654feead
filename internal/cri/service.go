// Package cri implements the CRI services. Each RPC has its own file, and each method reads as the
// story of its call. The package only coordinates: validate checks requests against the engine,
// translate translates them, view holds the state of the node, engine talks to Docker, and podnet
// owns pod networks. The interfaces below list everything the services need from these packages.
//
// Requests must have passed validate.Request: the interceptor of package rpc calls it.
package cri

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/time/rate"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/keylock"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/translate"
	"cri-dockerd/internal/view"
)

// Engine runs containers. Errors carry an errdefs kind (NotFound, Conflict, InvalidArgument,
// Unavailable …). A canceled call may still take effect at the engine.
type Engine interface {
	// Create creates a container and returns its ID. It returns a Conflict (errdefs.IsConflict) if
	// the name is in use. Once the request is sent, Create waits for the engine even if ctx ends.
	Create(ctx context.Context, c *translate.Create) (id model.ContainerID, err error)
	// Start starts a created container. Starting a running container succeeds.
	Start(ctx context.Context, id model.ContainerID) error
	// Stop sends the container's stop signal and, after grace, SIGKILL. It returns once the
	// container has ended. A grace of 0 kills at once. Stopping a stopped container succeeds.
	// NotFound if the container is unknown.
	Stop(ctx context.Context, id model.ContainerID, grace time.Duration) error
	// Remove force-removes a container, running or not, with its anonymous volumes. NotFound if the
	// container is unknown.
	Remove(ctx context.Context, id model.ContainerID) error
	// KillForgotten kills the remaining processes of a container if the engine has no record of its
	// start, or none of the container. It returns the number of killed processes. For any other
	// container it kills nothing. The container must not be started meanwhile.
	KillForgotten(ctx context.Context, id model.ContainerID) (killed int, err error)
	// Update changes the resources of a container through Docker's API.
	Update(ctx context.Context, id model.ContainerID, u *translate.Update) error
	// LimitStarted applies the kernel limits of the container's record, once per start of the
	// container. An ended container is no error. Unavailable means that the limits are set, but
	// systemd has not confirmed to keep them; LimitKeeper tries again.
	LimitStarted(ctx context.Context, c *model.Container) error
	// Limit changes limits of a running container where Docker's API has no field, and keeps them
	// until it ends. Results are those of LimitStarted.
	Limit(ctx context.Context, c *model.Container, update model.KernelLimits) error
	// KeepLimits restores the limits that somebody has replaced. Results are those of LimitStarted.
	KeepLimits(ctx context.Context, c *model.Container) error
	// LimitsLost delivers an element after the limits of any container may have been replaced.
	LimitsLost() <-chan struct{}
	// Measure returns the record of a container with the kernel's current limits.
	Measure(c *model.Container) *model.Container
	// Inspect reads one container. NotFound if it was removed. The object is empty if the container
	// is not managed by this daemon.
	Inspect(ctx context.Context, id model.ContainerID) (model.Object, error)
	// FindByName returns the object with this container name (without slash), or NotFound.
	FindByName(ctx context.Context, name string) (id model.ContainerID, o model.Object, err error)
	// Exec runs a command in a container until it ends and returns its exit code: 127 if the
	// command does not exist, 126 if it cannot be executed, with the engine's message on stderr. If
	// ctx ends first, Exec kills the process with all its descendants and returns ctx's error.
	Exec(ctx context.Context, id model.ContainerID, x engine.Exec) (exitCode int, err error)
}

// Images manages the engine's images. Errors carry the same kinds as those of Engine.
type Images interface {
	// Pull pulls an image and returns its ID.
	Pull(ctx context.Context, ref string, auth *runtimeapi.AuthConfig) (id model.ImageID, err error)
	// RemoveImage removes one reference or, given an ID, the whole image. NotFound if it does not
	// exist.
	RemoveImage(ctx context.Context, ref string) error
	// ImageUsers returns the names of all containers created from an image, running or not, managed
	// by this daemon or not.
	ImageUsers(ctx context.Context, id model.ImageID) ([]string, error)
	// HoldImage protects the layers of an image from removal and returns their directories, the
	// uppermost first. Holding an image twice succeeds. FailedPrecondition if the engine does not
	// report the directories.
	HoldImage(ctx context.Context, imageID model.ImageID) (layers []string, err error)
	// ReleaseImage undoes HoldImage. Releasing an image without a hold succeeds.
	ReleaseImage(ctx context.Context, imageID model.ImageID) error
	// HeldImages returns the IDs of all held images.
	HeldImages(ctx context.Context) ([]model.ImageID, error)
	// IsPinned reports whether the kubelet must not remove an image.
	IsPinned(i *model.Image) bool
	// PauseImage returns the sandbox image: the embedded image, loaded if missing, or the
	// configured one, pulled if missing.
	PauseImage(ctx context.Context) (model.PauseImage, error)
}

// Accounts reads the users and groups of images. Errors carry the same kinds as those of Engine.
type Accounts interface {
	// Accounts returns the users and groups of an image. DataLoss for files that no image needs.
	Accounts(ctx context.Context, id model.ImageID) (*model.Accounts, error)
	// RemoveReaders removes what interrupted calls of Accounts have left.
	RemoveReaders(ctx context.Context) error
}

// View provides the state of this node from memory. Records are shared and read-only. IDs may be
// shortened to a unique prefix. NotFound for an unknown ID, InvalidArgument for an ambiguous one.
type View interface {
	Engine() view.EngineState
	Sandbox(id string) (*model.Sandbox, error)
	Container(id string) (*model.Container, error)
	Sandboxes() []*model.Sandbox    // newest first
	Containers() []*model.Container // newest first
	ContainersOf(sandboxID model.ContainerID) []*model.Container
	// Pod returns a sandbox with its containers and a timestamp to order it among the events.
	Pod(sandboxID string) (view.Pod, error)
	// Watch subscribes to changes; see view.Watch. The caller must stop it.
	Watch() *view.Watch
	// Refresh reads the objects from the engine again, so that the view reflects a completed call.
	// It drops removed objects from the view without an error.
	Refresh(ctx context.Context, ids ...model.ContainerID) error
}

// EngineStates provides the state of the engine and its changes.
type EngineStates interface {
	Engine() view.EngineState
	// Changed returns a channel closed at the next change of Engine.
	Changed() <-chan struct{}
}

// Updates provides the containers whose limits may have been replaced; see package view.
type Updates interface {
	// NextUpdated waits for the next container.
	NextUpdated(ctx context.Context) (model.ContainerID, error)
	// AddUpdated makes NextUpdated return a container after a delay.
	AddUpdated(id model.ContainerID, delay time.Duration)
}

// ImageView provides the images of this node from memory, as View does for containers.
type ImageView interface {
	// Image returns an image by tag, digest or ID. The ID may be shortened and may have the
	// "sha256:" prefix.
	Image(ref string) (*model.Image, error)
	// Images returns all images. Unavailable until the engine has listed them.
	Images() ([]*model.Image, error)
	// RefreshImages reads all images again.
	RefreshImages(ctx context.Context) error
	// RefreshImage reads one image again, by name or ID, and returns it. NotFound if it does not
	// exist.
	RefreshImage(ctx context.Context, ref string) (*model.Image, error)
	// ForgetImage drops an image from the view after its removal.
	ForgetImage(id model.ImageID)
}

// Logs routes the output of containers to the kubelet's log paths; see package logs.
type Logs interface {
	// Config returns Docker's log configuration for a container with this log path beneath its
	// pod's log directory. Unavailable if the required log mode is not working.
	Config(ctx context.Context, directory, path string) (model.LogConfig, error)
	// Started creates the log path of a container after its start, successful or not.
	Started(ctx context.Context, c *model.Container) error
	// Reopen gives a running container a new log file at its path after the kubelet has renamed the
	// old one. On error it creates no file.
	Reopen(ctx context.Context, c *model.Container) error
	// Removed undoes Started. An unknown container is no error.
	Removed(ctx context.Context, c *model.Container) error
	// State returns the active mode, "" for none, and the reason if it is not the preferred one.
	State() (active, reason string)
}

// Stats reports the resource usage of pods and containers; see podstats.Reporter.
type Stats interface {
	Container(id string) (*runtimeapi.ContainerStats, error)
	Containers(f *runtimeapi.ContainerStatsFilter) []*runtimeapi.ContainerStats
	Pod(id string) (*runtimeapi.PodSandboxStats, error)
	Pods(f *runtimeapi.PodSandboxStatsFilter) []*runtimeapi.PodSandboxStats
	// Metrics returns PodSandboxMetrics as encoded items of a list; see package wire.
	Metrics() []byte
	ImageFileSystem() (*runtimeapi.ImageFsInfoResponse, error)
	// Forget closes the files that are held open for a container or sandbox before its removal.
	Forget(id string)
}

// Volumes mounts images for engines without image volumes; see package imagevolume.
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

// Network manages the network of a pod, from its namespace to its release; see podnet.Manager.
type Network interface {
	// Prepare creates a network namespace for a future sandbox. drop releases it.
	Prepare(sysctls map[string]string) (netns string, drop func(), err error)
	// Keep pins a namespace of Prepare for its sandbox and protects it from Reclaim until release.
	Keep(ctx context.Context, id model.ContainerID, netns string) (release func(), err error)
	// Connect connects a pod. Disconnect undoes it, even after an error.
	Connect(ctx context.Context, sb *model.Sandbox, cfg *runtimeapi.PodSandboxConfig) ([]netip.Addr, error)
	// HasJoined reports whether a process belongs to the sandbox and runs in the namespace of Keep.
	HasJoined(id model.ContainerID, pid int) bool
	// Confirm marks a connected pod as complete. Addresses returns nothing before.
	Confirm(id model.ContainerID) error
	// Disconnect releases the network of a pod, connected or not, running or not.
	Disconnect(ctx context.Context, sb *model.Sandbox) error
	Addresses(sb *model.Sandbox) []netip.Addr
	IsConnected(sb *model.Sandbox) bool
	// NetNS opens the network namespace of a running pod, or returns NotFound.
	NetNS(sb *model.Sandbox) (*os.File, error)
}

// NodeNetwork reports and configures the pod network of the node; see podnet.Manager.
type NodeNetwork interface {
	// ConnectsPods reports whether this program connects pods, instead of the engine.
	ConnectsPods() bool
	// State returns a warning about the network, and an error if pods cannot be connected.
	State() (notice string, err error)
	SetPodCIDR(cidrs []netip.Prefix) error
	// Check returns the path of a pod's namespace and the result of the plugins' CHECK.
	Check(ctx context.Context, sb *model.Sandbox) (netns, result string)
	// Holds reports whether any network resource of a pod remains.
	Holds(id model.ContainerID) bool
}

// Reclaimer adopts and releases the networks of pods outside of any call; see podnet.Manager.
type Reclaimer interface {
	// IsAdoptable reports whether a pod may have a network that this daemon has not recorded.
	IsAdoptable(sb *model.Sandbox) bool
	Adopt(ctx context.Context, sb *model.Sandbox) error
	// Reclaim releases the networks of removed or stopped sandboxes.
	Reclaim(ctx context.Context, all podnet.Sandboxes) error
	// ReclaimOne releases the network of one sandbox, if it is removed or stopped.
	ReclaimOne(ctx context.Context, id model.ContainerID, all podnet.Sandboxes) error
	// RequestReclaim requests a call of Recover. It never blocks.
	RequestReclaim()
	// Collect runs the plugins' garbage collection for networks without a pod.
	Collect(ctx context.Context) error
}

// Deps lists the dependencies and settings of a Service. All parts but Plugins are required.
type Deps struct {
	Log         *slog.Logger
	Engine      Engine
	Images      Images
	Accounts    Accounts
	Checkpoints Checkpoints
	View        View
	States      EngineStates
	Updates     Updates
	ImageView   ImageView
	Network     Network
	Node        NodeNetwork
	Reclaimer   Reclaimer
	Logs        Logs
	Stats       Stats
	Volumes     Volumes
	Streams     Streams
	AppArmor    AppArmor
	Concealer   Concealer
	Visible     Visible
	// Plugins is nil without NRI plugins.
	Plugins     Plugins
	PluginStore PluginStore
	// EngineNetNS is the reason to let the engine create all pod network namespaces. If it is
	// empty, the daemon creates them where possible.
	EngineNetNS string
}

// Service implements runtime.v1.RuntimeService and runtime.v1.ImageService. The embedded servers
// answer all other RPCs with Unimplemented and the name of the RPC.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	*imageService
	*gate
	Deps
	volumes     *imageVolumes
	checkpoints *checkpointing
	hooks       *hooks // nil without NRI plugins
	joining     joining
	starts      starts

	encodedSandboxes  *encodings[model.Sandbox]
	encodedContainers *encodings[model.Container]
	outputs           outputBytes    // of ExecSync
	unkept            rate.Sometimes // bounds the warnings that systemd does not answer
}

var (
	_ runtimeapi.RuntimeServiceServer = (*Service)(nil)
	_ runtimeapi.ImageServiceServer   = (*Service)(nil)
)

// New returns the services. Call Recover after every full read of the view.
func New(d Deps) *Service {
	g := &gate{view: d.View, names: keylock.New()}
	volumes := &imageVolumes{gate: g, images: d.ImageView, store: d.Images, mounts: d.Volumes}

	s := &Service{
		imageService: &imageService{gate: g, images: d.ImageView, store: d.Images, stats: d.Stats, volumes: volumes},
		gate:         g,
		volumes:      volumes,
		checkpoints:  &checkpointing{gate: g, store: d.Checkpoints, running: keylock.New()},
		Deps:         d,
		joining:      joining{configured: d.EngineNetNS, timeout: joinDeadline},
		starts:       starts{running: map[model.ContainerID]bool{}, late: map[model.ContainerID]bool{}},
		encodedSandboxes: newEncodings(
			func(sb *model.Sandbox) proto.Message { return sb.Item() },
			func(sb *model.Sandbox) proto.Message { return sb.ShortItem() }),
		encodedContainers: newEncodings(
			func(c *model.Container) proto.Message { return c.Item() },
			func(c *model.Container) proto.Message { return c.ShortItem() }),
		unkept: rate.Sometimes{Interval: keepLogInterval},
	}
	s.hooks = newHooks(s)

	return s
}

const (
	// undoDeadline bounds the cleanup after a failed call. It is independent of the caller's
	// context.
	undoDeadline = 30 * time.Second
	// undoSandboxDeadline is the same for a call with a pod network to release. Plugins take most
	// of a minute for this if their agent is down.
	undoSandboxDeadline = 2 * time.Minute
)

// maxProfile bounds a seccomp profile, in bytes. Docker's default profile has 20 KiB.
const maxProfile = 1 << 20

// readSeccomp reads a Localhost profile. It returns "" if file is empty.
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

// ignoreNotFound drops a NotFound error, for idempotent calls on removed objects.
func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
