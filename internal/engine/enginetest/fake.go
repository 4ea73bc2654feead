// Package enginetest provides an in-memory engine for tests, and a contract suite for the fake and
// the real engines.
package enginetest

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// PauseRef is the name of the sandbox image of a Fake.
const PauseRef = "fake.local/pause:1"

// Passwd and Group are the files of all images of a Fake.
const (
	Passwd = "root:x:0:0:root:/:/bin/sh\napp:x:1000:1001:app:/:/bin/sh\n"
	Group  = "root:x:0:\napp:x:1001:\nextra:x:7777:app\n"
)

// Fake is an in-memory engine. Its containers pass through translate.Read, like the responses of a
// real engine.
type Fake struct {
	// Fault is called before and after each operation ("create", "start", …). If it returns an
	// error, the operation fails with this error.
	Fault func(operation string, after bool) error
	// ImageLabels are the labels of all images. Create merges them into the labels of a container,
	// as the engine does. Set it before using the fake.
	ImageLabels map[string]string

	// Flood is the output of the command "flood". Set it before using the fake.
	Flood []byte
	// Distort modifies the inspect response of a container, like a hostile image author or a broken
	// engine. It must not modify values behind pointers except State. Set it before using the fake.
	Distort func(*container.InspectResponse)
	// Shim is what Host reports of the containerd shim, and Trial the result of TryShim. Set them
	// before using the fake.
	Shim, Trial model.Shim

	mu         sync.Mutex // guards the fields below
	containers map[model.ContainerID]*container.InspectResponse
	images     map[string]*model.Image // by name
	held       map[model.ImageID]bool
	limits     map[model.ContainerID]model.KernelLimits
	limited    map[model.ContainerID]int // PID at the last LimitStarted
	kept       map[model.ContainerID]int // calls of KeepLimits
	lost       chan struct{}             // of LimitsLost
	watchers   []chan engine.Event
	created    int                       // number of created containers
	ticks      int                       // of the engine's clock
	forgotten  map[model.ContainerID]int // processes of containers without a record of their start
	pids       int
	down       bool
	ends       []chan error // ends the event streams
}

// NewFake returns an engine with images of the given names.
func NewFake(images ...string) *Fake {
	f := &Fake{
		containers: map[model.ContainerID]*container.InspectResponse{},
		images:     map[string]*model.Image{},
		held:       map[model.ImageID]bool{},
		limits:     map[model.ContainerID]model.KernelLimits{},
		kept:       map[model.ContainerID]int{},
		lost:       make(chan struct{}, 1),
		limited:    map[model.ContainerID]int{},
		forgotten:  map[model.ContainerID]int{},
		pids:       1000,
	}

	for _, ref := range images {
		f.addImage(ref)
	}

	return f
}

func (f *Fake) addImage(ref string) *model.Image {
	i, err := translate.ReadImage(image.Summary{
		ID:       "sha256:" + digest("image "+ref),
		RepoTags: []string{ref},
		Size:     1 << 20,
		Labels:   f.ImageLabels,
	}, image.InspectResponse{})
	if err != nil {
		panic(err) // the ID above is valid
	}

	i.Entrypoint = true
	f.images[ref] = i

	return i
}

func digest(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// do runs an operation, with a possible fault before and after it.
func (f *Fake) do(ctx context.Context, operation string, effect func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}

	if f.Fault != nil {
		if err := f.Fault(operation, false); err != nil {
			return err
		}
	}

	f.mu.Lock()
	err := effect()
	if f.down {
		err = fmt.Errorf("the fake engine is down: %w", errdefs.ErrUnavailable)
	}

	f.mu.Unlock()
	if err == nil && f.Fault != nil {
		err = f.Fault(operation, true)
	}

	return err
}

func (f *Fake) find(id model.ContainerID) (*container.InspectResponse, error) {
	if c := f.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("no such container %s: %w", id, errdefs.ErrNotFound)
}

// Create implements cri.Engine.
func (f *Fake) Create(ctx context.Context, c *translate.Create) (id model.ContainerID, err error) {
	err = f.do(ctx, "create", func() error {
		for _, other := range f.containers {
			if other.Name == "/"+c.Name {
				return fmt.Errorf("name %s is in use: %w", c.Name, errdefs.ErrConflict)
			}
		}

		f.created++
		id = model.ContainerID(digest(fmt.Sprint("container ", f.created)))
		in := &container.InspectResponse{
			ID:         string(id),
			Name:       "/" + c.Name,
			Created:    f.now(),
			Config:     f.merge(c.Config),
			HostConfig: c.Host,
			Image:      string(f.imageID(c.Config.Image)),
			State:      &container.State{Status: container.StateCreated},
		}
		if c.Host.LogConfig.Type == "json-file" {
			in.LogPath = "/var/lib/docker/containers/" + string(id) + "/" + string(id) + "-json.log"
		}

		f.containers[id] = in
		f.notifyLocked(id, engine.Changed)

		return nil
	})
	if err != nil {
		return "", err
	}

	return id, nil
}

// merge adds the labels of the image to those of the container, as Docker does. Labels of the
// container take precedence.
func (f *Fake) merge(c *container.Config) *container.Config {
	if len(f.ImageLabels) == 0 || c.Image == PauseRef {
		return c
	}

	merged := *c
	merged.Labels = maps.Clone(f.ImageLabels)
	maps.Copy(merged.Labels, c.Labels)
	return &merged
}

// read translates the inspect response of a container.
func (f *Fake) read(c *container.InspectResponse) (model.Object, error) {
	in := *c
	if f.Distort != nil {
		state := *c.State
		in.State = &state
		f.Distort(&in)
	}
	return translate.Read(in, f.imageLabels(c))
}

// AddImage adds an image with the given list entry and inspect response.
func (f *Fake) AddImage(s image.Summary, in image.InspectResponse) error {
	i, err := translate.ReadImage(s, in)
	if err != nil {
		return err
	}

	f.mu.Lock()
	defer f.mu.Unlock()

	f.images[string(i.ID)] = i
	f.notifyImageLocked()

	return nil
}

// imageLabels returns the labels inherited from the image of a container.
func (f *Fake) imageLabels(c *container.InspectResponse) model.ImageLabels {
	for _, i := range f.images {
		if string(i.ID) == c.Image {
			return i.InheritedLabels()
		}
	}
	return model.ImageLabels{Unknown: true}
}

func (f *Fake) imageID(ref string) model.ImageID {
	for _, i := range f.images {
		if i.Is(ref) {
			return i.ID
		}
	}
	return model.ImageID(ref)
}

// now advances the clock, so that times are unique.
func (f *Fake) now() string {
	f.ticks++
	return f.time().Format(time.RFC3339Nano)
}

func (f *Fake) time() time.Time { return time.Unix(1700000000, int64(f.ticks)*1000).UTC() }

// Start implements cri.Engine.
func (f *Fake) Start(ctx context.Context, id model.ContainerID) error {
	return f.do(ctx, "start", func() error {
		c, err := f.find(id)
		if err != nil {
			return err
		}

		f.pids++
		delete(f.limits, id) // the control group is new
		c.State = &container.State{
			Status:     container.StateRunning,
			Running:    true,
			Pid:        f.pids,
			StartedAt:  f.now(),
			FinishedAt: c.State.FinishedAt,
		}

		f.notifyLocked(id, engine.Started)

		return nil
	})
}

// Stop implements cri.Engine.
func (f *Fake) Stop(ctx context.Context, id model.ContainerID, _ time.Duration) error {
	return f.do(ctx, "stop", func() error {
		c, err := f.find(id)
		if err == nil && c.State.Running {
			c.State = &container.State{
				Status:     container.StateExited,
				ExitCode:   137,
				StartedAt:  c.State.StartedAt,
				FinishedAt: f.now(),
			}
			f.notifyLocked(id, engine.Died)
		}

		return err
	})
}

// Remove implements cri.Engine.
func (f *Fake) Remove(ctx context.Context, id model.ContainerID) error {
	return f.do(ctx, "remove", func() error {
		_, err := f.find(id)
		f.destroy(id)
		return err
	})
}

// Forget simulates a running container with this number of processes, but without a record of its
// start.
func (f *Fake) Forget(id model.ContainerID, processes int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgotten[id] = processes
}

// Forgotten returns the number of processes of a container without a record of its start.
func (f *Fake) Forgotten(id model.ContainerID) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.forgotten[id]
}

// KillForgotten implements cri.Engine.
func (f *Fake) KillForgotten(ctx context.Context, id model.ContainerID) (killed int, err error) {
	err = f.do(ctx, "kill forgotten", func() error {
		if c := f.containers[id]; c == nil || c.State.StartedAt == "" {
			killed = f.forgotten[id]
			delete(f.forgotten, id)
		}
		return nil
	})

	return killed, err
}

// Update implements cri.Engine.
func (f *Fake) Update(ctx context.Context, id model.ContainerID, u *translate.Update) error {
	return f.do(ctx, "update", func() error {
		c, err := f.find(id)
		if err == nil {
			parent := c.HostConfig.CgroupParent
			c.HostConfig.Resources = u.Resources
			c.HostConfig.CgroupParent = parent
			f.notifyLocked(id, engine.Updated)
		}
		return err
	})
}

// Limit implements cri.Engine. It records the limits.
func (f *Fake) Limit(_ context.Context, c *model.Container, l model.KernelLimits) error {
	if l.Empty() {
		return nil
	}

	if f.Fault != nil {
		if err := f.Fault("limit", false); err != nil {
			return err
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()

	f.limits[c.ID] = f.limits[c.ID].With(l)

	return nil
}

// LimitStarted implements cri.Engine.
func (f *Fake) LimitStarted(ctx context.Context, c *model.Container) error {
	f.mu.Lock()
	done := f.limited[c.ID] == c.Pid
	f.mu.Unlock()
	if done || c.Kernel.Empty() || c.Pid == 0 {
		return nil
	}
	if err := f.Limit(ctx, c, c.Kernel); err != nil {
		return err
	}

	f.mu.Lock()
	defer f.mu.Unlock()

	f.limited[c.ID] = c.Pid

	return nil
}

// KeepLimits implements cri.Engine. It counts the calls.
func (f *Fake) KeepLimits(_ context.Context, c *model.Container) error {
	if f.Fault != nil {
		if err := f.Fault("keep", false); err != nil {
			return err
		}
	}

	f.mu.Lock()
	defer f.mu.Unlock()

	f.kept[c.ID]++

	return nil
}

// Kept returns the number of successful calls of KeepLimits for a container.
func (f *Fake) Kept(id model.ContainerID) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.kept[id]
}

// LimitsLost implements cri.Engine.
func (f *Fake) LimitsLost() <-chan struct{} { return f.lost }

// LoseLimits simulates a reload of systemd.
func (f *Fake) LoseLimits() { f.lost <- struct{}{} }

// Measure implements cri.Engine. The limits are those of Limit.
func (f *Fake) Measure(c *model.Container) *model.Container {
	if c.Pid == 0 {
		return c
	}

	l := f.Limits(c.ID)
	if l.OOMScoreAdj == 0 {
		l.OOMScoreAdj = int(c.Resources.GetLinux().GetOomScoreAdj())
	}

	return c.WithMeasured(l)
}

// Limits returns the limits set by Limit and LimitStarted for a container.
func (f *Fake) Limits(id model.ContainerID) model.KernelLimits {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.limits[id]
}

// FindByName implements cri.Engine.
func (f *Fake) FindByName(ctx context.Context, name string) (id model.ContainerID, o model.Object, err error) {
	err = f.do(ctx, "find", func() error {
		for _, c := range f.containers {
			if c.Name == "/"+name {
				id = model.ContainerID(c.ID)
				o, _ = f.read(c) // an unreadable container is not managed by this program
				return nil
			}
		}

		return fmt.Errorf("no container %s: %w", name, errdefs.ErrNotFound)
	})

	return id, o, err
}

// flood writes Flood to both streams.
func (f *Fake) flood(x engine.Exec) error {
	for _, w := range []io.Writer{x.Stdout, x.Stderr} {
		if _, err := w.Write(f.Flood); err != nil {
			return err
		}
	}
	return nil
}

// Exec implements cri.Engine. It writes the command to stdout and returns exit code 0. "fail"
// returns exit code 1, "hang" waits for the end of ctx, and "flood" writes Flood.
func (f *Fake) Exec(ctx context.Context, id model.ContainerID, x engine.Exec) (int, error) {
	if err := f.do(ctx, "exec", func() error { _, err := f.find(id); return err }); err != nil {
		return 0, err
	}

	switch x.Cmd[0] {
	case "flood":
		return 0, f.flood(x)
	case "hang":
		<-ctx.Done()
		return 0, context.Cause(ctx)
	case "fail":
		return 1, nil
	}

	if x.Stdout == nil {
		return 0, nil
	}

	_, err := fmt.Fprintln(x.Stdout, strings.Join(x.Cmd, " "))

	return 0, err
}

// Pull implements cri.Engine.
func (f *Fake) Pull(ctx context.Context, ref string, _ *runtimeapi.AuthConfig) (id model.ImageID, err error) {
	err = f.do(ctx, "pull", func() error {
		id = f.addImage(model.FamiliarName(ref)).ID
		f.notifyImageLocked()
		return nil
	})

	return id, err
}

// Image implements view.Source.
func (f *Fake) Image(ctx context.Context, ref string) (image *model.Image, err error) {
	err = f.do(ctx, "find image", func() error {
		for _, i := range f.images {
			if i.Is(ref) {
				image = i
				return nil
			}
		}
		return fmt.Errorf("no such image %s: %w", ref, errdefs.ErrNotFound)
	})

	return image, err
}

// IsPinned implements cri.Engine.
func (f *Fake) IsPinned(i *model.Image) bool { return i.HasName(PauseRef) }

// ImageUsers implements cri.Engine.
func (f *Fake) ImageUsers(ctx context.Context, id model.ImageID) (names []string, err error) {
	err = f.do(ctx, "image users", func() error {
		for _, c := range f.containers {
			if c.Image == string(id) {
				names = append(names, strings.TrimPrefix(c.Name, "/"))
			}
		}
		return nil
	})

	return names, err
}

// RemoveImage implements cri.Engine.
func (f *Fake) RemoveImage(ctx context.Context, ref string) error {
	return f.do(ctx, "remove image", func() error {
		for name, i := range f.images {
			if name == ref || string(i.ID) == ref {
				delete(f.images, name)
				f.notifyImageLocked()
				return nil
			}
		}

		return fmt.Errorf("no such image %s: %w", ref, errdefs.ErrNotFound)
	})
}

// HoldImage implements cri.Engine.
func (f *Fake) HoldImage(ctx context.Context, imageID model.ImageID) ([]string, error) {
	return []string{"/var/lib/docker/overlay2/top/diff", "/var/lib/docker/overlay2/base/diff"},
		f.do(ctx, "hold image", func() error {
			if f.imageID(string(imageID)) != imageID {
				return fmt.Errorf("no such image %s: %w", imageID, errdefs.ErrNotFound)
			}
			f.held[imageID] = true
			return nil
		})
}

// ReleaseImage implements cri.Engine.
func (f *Fake) ReleaseImage(ctx context.Context, imageID model.ImageID) error {
	return f.do(ctx, "release image", func() error { delete(f.held, imageID); return nil })
}

// HeldImages implements cri.Engine.
func (f *Fake) HeldImages(ctx context.Context) (ids []model.ImageID, err error) {
	err = f.do(ctx, "held images", func() error { ids = slices.Collect(maps.Keys(f.held)); return nil })
	return ids, err
}

// Accounts implements cri.Accounts. All images have the users of Passwd and Group.
func (f *Fake) Accounts(ctx context.Context, imageID model.ImageID) (a *model.Accounts, err error) {
	err = f.do(ctx, "accounts", func() error {
		known := func(i *model.Image) bool { return i.ID == imageID }
		if !slices.ContainsFunc(slices.Collect(maps.Values(f.images)), known) {
			return fmt.Errorf("no such image %s: %w", imageID, errdefs.ErrNotFound)
		}
		a = &model.Accounts{}
		return errors.Join(a.AddUsers(strings.NewReader(Passwd)), a.AddGroups(strings.NewReader(Group)))
	})

	return a, err
}

// RemoveReaders implements cri.Accounts.
func (f *Fake) RemoveReaders(ctx context.Context) error {
	return f.do(ctx, "remove readers", func() error {
		for id, c := range f.containers {
			if _, ok := translate.ImageOfReader(c.Name); ok {
				delete(f.containers, id)
			}
		}
		return nil
	})
}

// Checkpoint implements cri.Checkpoints.
func (f *Fake) Checkpoint(ctx context.Context, c *model.Container, images, work string) error {
	return f.do(ctx, "checkpoint", func() error {
		dir, err := os.OpenRoot(work)
		if err != nil {
			return err
		}
		defer dir.Close()

		return errors.Join(dir.WriteFile(filepath.Base(images)+"/pages-1.img", []byte("pages"), 0o600),
			dir.WriteFile("dump.log", []byte("Error (criu/fake.c:1): none\n"), 0o600))
	})
}

// WriteLayer implements cri.Checkpoints.
func (f *Fake) WriteLayer(ctx context.Context, _ model.ContainerID, w io.Writer) error {
	return f.do(ctx, "layer", func() error { return tar.NewWriter(w).Close() })
}

// PauseImage implements cri.Engine.
func (f *Fake) PauseImage(ctx context.Context) (model.PauseImage, error) {
	return model.PauseImage{Source: PauseRef, Name: PauseRef}, f.do(ctx, "pause image", func() error {
		f.addImage(PauseRef)
		return nil
	})
}

// Host implements view.Source.
func (f *Fake) Host(ctx context.Context) (h model.Host, err error) {
	err = f.do(ctx, "host", func() error {
		h = model.Host{
			EngineVersion:   "29.0.0-fake",
			APIVersion:      "1.52",
			OperatingSystem: "linux",
			Architecture:    "x86_64",
			CgroupDriver:    "cgroupfs",
			CgroupVersion:   "2",
			RootDir:         "/var/lib/docker",
			StorageDriver:   "overlay2",
			DefaultRuntime:  "runc",
			Runtimes:        []string{"runc"},
			SecurityOptions: []string{"apparmor"},
			MinOOMScoreAdj:  -1000,
			Shim:            f.Shim,
		}

		return nil
	})

	return h, err
}

// TryShim implements view.Source.
func (f *Fake) TryShim(ctx context.Context) (model.Shim, error) {
	return f.Trial, f.do(ctx, "try shim", func() error { return nil })
}

// Ping implements view.Source.
func (f *Fake) Ping(ctx context.Context) error {
	return f.do(ctx, "ping", func() error { return nil })
}

// Objects implements view.Source.
func (f *Fake) Objects(ctx context.Context) (out []model.Object, err error) {
	err = f.do(ctx, "objects", func() error {
		for _, c := range f.containers {
			o, err := f.read(c)
			if err != nil {
				return err
			}
			out = append(out, o)
		}

		return nil
	})

	return out, err
}

// Inspect implements view.Source.
func (f *Fake) Inspect(ctx context.Context, id model.ContainerID) (o model.Object, err error) {
	err = f.do(ctx, "inspect", func() error {
		c, err := f.find(id)
		if err == nil {
			o, err = f.read(c)
		}
		return err
	})

	return o, err
}

// Images implements view.Source.
func (f *Fake) Images(ctx context.Context) (out []*model.Image, err error) {
	err = f.do(ctx, "images", func() error {
		for _, i := range f.images {
			out = append(out, i)
		}
		return nil
	})
	return out, err
}

// EventsBetween implements view.Source. The fake has no event buffer.
func (f *Fake) EventsBetween(context.Context, time.Time, time.Time) ([]engine.Event, error) {
	return nil, nil
}

// Events implements view.Source.
func (f *Fake) Events(ctx context.Context, changed func(engine.Event)) <-chan error {
	f.mu.Lock()
	defer f.mu.Unlock()

	events, end, done := make(chan engine.Event, 1024), make(chan error, 1), make(chan error, 1)
	f.watchers, f.ends = append(f.watchers, events), append(f.ends, end)
	go func() {
		for {
			select {
			case e := <-events:
				changed(e)
			case err := <-end:
				done <- err
				return
			case <-ctx.Done():
				done <- ctx.Err()
				return
			}
		}
	}()

	return done
}

func (f *Fake) notifyLocked(id model.ContainerID, kind engine.EventKind) {
	e := engine.Event{ID: id, Kind: kind, At: f.time()}
	if kind == engine.Died {
		e.ExitCode = f.containers[id].State.ExitCode
	}

	for _, w := range f.watchers {
		select {
		case w <- e:
		default: // the subscriber does not read any more
		}
	}
}

func (f *Fake) notifyImageLocked() {
	for _, w := range f.watchers {
		select {
		case w <- engine.Event{Image: true}:
		default:
		}
	}
}

// SetDown makes the engine unreachable or reachable. It ends all event streams.
func (f *Fake) SetDown(down bool) {
	f.mu.Lock()
	defer f.mu.Unlock()

	f.down = down
	for _, end := range f.ends {
		end <- fmt.Errorf("the fake engine went down: %w", errdefs.ErrUnavailable)
	}
	f.watchers, f.ends = nil, nil
}

// Containers returns the number of containers.
func (f *Fake) Containers() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.containers)
}

// SecurityOptions returns the security options of all containers.
func (f *Fake) SecurityOptions() (all []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.containers {
		all = append(all, c.HostConfig.SecurityOpt...)
	}
	return all
}

// End simulates the exit of a container's process with an exit code.
func (f *Fake) End(id model.ContainerID, code int) {
	f.mu.Lock()
	defer f.mu.Unlock()

	c := f.containers[id]
	c.State = &container.State{
		Status:     container.StateExited,
		ExitCode:   code,
		StartedAt:  c.State.StartedAt,
		FinishedAt: f.now(),
	}

	f.notifyLocked(id, engine.Died)
}

// Drop removes a container, as another client of the engine would.
func (f *Fake) Drop(id model.ContainerID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.destroy(id)
}

// destroy removes a container, running or not. An unknown container is ignored.
func (f *Fake) destroy(id model.ContainerID) {
	c := f.containers[id]
	if c == nil {
		return
	}

	if f.ticks++; c.State.Running {
		c.State.ExitCode = 137
		f.notifyLocked(id, engine.Died)
	}

	delete(f.containers, id)
	f.notifyLocked(id, engine.Destroyed)
}
