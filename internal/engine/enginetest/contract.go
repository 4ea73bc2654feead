package enginetest

import (
	"bytes"
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// Engine is the subject of the contract: the operations on containers used by cri and node.
type Engine interface {
	Images
	Host(ctx context.Context) (model.Host, error)
	Create(ctx context.Context, c *translate.Create) (model.ContainerID, error)
	Start(ctx context.Context, id model.ContainerID) error
	Stop(ctx context.Context, id model.ContainerID, grace time.Duration) error
	Remove(ctx context.Context, id model.ContainerID) error
	Inspect(ctx context.Context, id model.ContainerID) (model.Object, error)
	FindByName(ctx context.Context, name string) (model.ContainerID, model.Object, error)
	Objects(ctx context.Context) ([]model.Object, error)
	Events(ctx context.Context, changed func(engine.Event)) <-chan error
	Exec(ctx context.Context, id model.ContainerID, x engine.Exec) (int, error)
}

// Images are the operations of an Engine on images.
type Images interface {
	PauseImage(ctx context.Context) (model.PauseImage, error)
	Images(ctx context.Context) ([]*model.Image, error)
	Image(ctx context.Context, ref string) (*model.Image, error)
	IsPinned(i *model.Image) bool
	ImageUsers(ctx context.Context, id model.ImageID) ([]string, error)
	RemoveImage(ctx context.Context, ref string) error
	HoldImage(ctx context.Context, imageID model.ImageID) ([]string, error)
	ReleaseImage(ctx context.Context, imageID model.ImageID) error
	HeldImages(ctx context.Context) ([]model.ImageID, error)
	Accounts(ctx context.Context, imageID model.ImageID) (*model.Accounts, error)
	RemoveReaders(ctx context.Context) error
}

var (
	_ Engine = (*Fake)(nil)
	_ Engine = (*engine.Engine)(nil)
)

// Contract tests an engine, fake or real. cgroupParent is the parent control group of containers,
// or "" for the engine's default.
func Contract(t *testing.T, e Engine, cgroupParent string) {
	ctx := t.Context()
	host, err := e.Host(ctx)
	if err != nil || host.EngineVersion == "" || host.CgroupDriver == "" || len(host.Runtimes) == 0 {
		t.Fatalf("Host: %+v, %v", host, err)
	}

	pause, err := e.PauseImage(ctx)
	if err != nil {
		t.Fatalf("PauseImage: %v", err)
	}

	if again, err := e.PauseImage(ctx); err != nil || again != pause {
		t.Errorf("second PauseImage: %s, %v", again, err)
	}

	testPinned(t, e, pause.Name)
	events := make(chan engine.Event, 1024)
	watch, stop := context.WithCancel(ctx)
	done := e.Events(watch, func(ev engine.Event) { events <- ev })
	defer func() { stop(); <-done }()

	create, err := translate.NewSandbox(&runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{
			Name:      "contract",
			Namespace: "default",
			Uid:       "contract",
		},
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: cgroupParent},
	}, translate.SandboxOptions{
		Host:        host,
		Image:       pause,
		NetworkMode: "none",
	})
	if err != nil {
		t.Fatal(err)
	}

	testLifecycle(t, e, create, events)
	testHold(t, e, host, pause.Name)
	testAccounts(t, e, pause.Name)
	testUnknown(t, e)
}

// testHold holds an image twice and releases it twice. Engines without layer information return an
// error and must not keep anything.
func testHold(t *testing.T, e Engine, host model.Host, ref string) {
	t.Helper()
	image, err := e.Image(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}

	id := image.ID
	for range 2 {
		layers, err := e.HoldImage(t.Context(), id)
		if host.ContainerdStore != errdefs.IsFailedPrecondition(err) || host.ContainerdStore == (len(layers) > 0) {
			t.Errorf("HoldImage: %v, %v", layers, err)
		}

		held, err := e.HeldImages(t.Context())
		if err != nil || slices.Contains(held, id) == host.ContainerdStore {
			t.Errorf("HeldImages: %v, %v", held, err)
		}
	}

	for range 2 {
		if err := e.ReleaseImage(t.Context(), id); err != nil {
			t.Errorf("ReleaseImage: %v", err)
		}
	}

	if held, err := e.HeldImages(t.Context()); err != nil || slices.Contains(held, id) {
		t.Errorf("HeldImages after the release: %v, %v", held, err)
	}
}

// testAccounts reads the users of an image twice. Nothing remains of it, nor of an interrupted
// read.
func testAccounts(t *testing.T, e Engine, ref string) {
	t.Helper()
	image, err := e.Image(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}

	reader := translate.NewReader(image.ID)
	for range 2 {
		if _, err := e.Create(t.Context(), reader); err != nil {
			t.Fatal(err)
		}

		if err := e.RemoveReaders(t.Context()); err != nil {
			t.Errorf("RemoveReaders: %v", err)
		}
		if id, _, err := e.FindByName(t.Context(), reader.Name); !errdefs.IsNotFound(err) {
			t.Errorf("after RemoveReaders: %s, %v", id, err)
		}

		a, err := e.Accounts(t.Context(), image.ID)
		if err != nil {
			t.Fatalf("Accounts: %v", err)
		}
		if u, err := a.Resolve("0:12"); err != nil || u.UID != 0 || u.GID != 12 {
			t.Errorf("user 0:12: %+v, %v", u, err)
		}
	}

	if _, err := e.Accounts(t.Context(), model.ImageID("sha256:"+strings.Repeat("0", 64))); !errdefs.IsNotFound(err) {
		t.Errorf("Accounts of an unknown image: %v", err)
	}
}

func testPinned(t *testing.T, e Engine, ref string) {
	t.Helper()
	images, err := e.Images(t.Context())
	if err != nil {
		t.Fatalf("Images: %v", err)
	}

	for _, i := range images {
		if i.HasName(ref) {
			if !e.IsPinned(i) || i.ID == "" {
				t.Errorf("pause image is not pinned: %+v", i)
			}
			return
		}
	}

	t.Errorf("Images lacks %s", ref)
}

// testLifecycle takes one container from its creation to its removal.
func testLifecycle(t *testing.T, e Engine, create *translate.Create, events <-chan engine.Event) {
	t.Helper()
	ctx := t.Context()
	id, err := e.Create(ctx, create)
	if err != nil {
		t.Fatalf("Create: %v", err)
	}
	defer e.Remove(context.WithoutCancel(ctx), id) //nolint:errcheck // already removed if the test passes

	if other, err := e.Create(ctx, create); !errdefs.IsConflict(err) {
		t.Errorf("Create with a name in use: %s, %v", other, err)
	}

	if found, o, err := e.FindByName(ctx, create.Name); err != nil || found != id || o.Sandbox == nil ||
		!o.Sandbox.NeverStarted {
		t.Errorf("FindByName: %s, %+v, %v", found, o.Sandbox, err)
	}

	found, err := e.Image(ctx, create.Config.Image)
	if err != nil {
		t.Fatalf("Image: %v", err)
	}

	image := found.ID
	if users, err := e.ImageUsers(ctx, image); err != nil || !slices.Contains(users, create.Name) {
		t.Errorf("ImageUsers: %v, %v", users, err)
	}

	sandbox := func() *model.Sandbox {
		t.Helper()
		o, err := e.Inspect(ctx, id)
		if err != nil || o.Sandbox == nil {
			t.Fatalf("Inspect: %+v, %v", o, err)
		}
		return o.Sandbox
	}

	running := func() bool {
		t.Helper()
		sb := sandbox()
		return sb.Running && sb.Pid > 0
	}

	for range 2 {
		if err := e.Start(ctx, id); err != nil || !running() || !sandbox().Ready() {
			t.Errorf("Start: %v", err)
		}
	}

	waitForEvent(t, events, id)
	if all, err := e.Objects(ctx); err != nil || !hasSandbox(all, id) {
		t.Errorf("Objects lacks the sandbox: %v", err)
	}

	for range 2 {
		if err := e.Stop(ctx, id, 0); err != nil || running() {
			t.Errorf("Stop: %v", err)
		}
	}

	if err := e.Start(ctx, id); err != nil || !running() || sandbox().Ready() {
		t.Errorf("Start of a stopped container: %v, %+v", err, sandbox())
	}

	if err := e.Remove(ctx, id); err != nil {
		t.Errorf("Remove: %v", err)
	}

	if _, err := e.Inspect(ctx, id); !errdefs.IsNotFound(err) {
		t.Errorf("Inspect of a removed container: %v", err)
	}

	if users, err := e.ImageUsers(ctx, image); err != nil || slices.Contains(users, create.Name) {
		t.Errorf("ImageUsers after the removal: %v, %v", users, err)
	}
}

func hasSandbox(all []model.Object, id model.ContainerID) bool {
	for _, o := range all {
		if o.Sandbox != nil && o.Sandbox.ID == id {
			return true
		}
	}
	return false
}

// waitForEvent waits for an event of a container.
func waitForEvent(t *testing.T, events <-chan engine.Event, id model.ContainerID) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case ev := <-events:
			if ev.ID == id {
				return
			}
		case <-deadline:
			t.Fatalf("received no event of container %s", id)
		}
	}
}

// testUnknown calls the operations with unknown objects, and with a cancelled context.
func testUnknown(t *testing.T, e Engine) {
	t.Helper()
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	if users, err := e.ImageUsers(t.Context(), "sha256:"+id); err != nil || len(users) > 0 {
		t.Errorf("ImageUsers of an unknown image: %v, %v", users, err)
	}

	var out bytes.Buffer
	for operation, do := range map[string]func(context.Context) error{
		"Start":       func(ctx context.Context) error { return e.Start(ctx, id) },
		"Stop":        func(ctx context.Context) error { return e.Stop(ctx, id, 0) },
		"Remove":      func(ctx context.Context) error { return e.Remove(ctx, id) },
		"Inspect":     func(ctx context.Context) error { _, err := e.Inspect(ctx, id); return err },
		"Image":       func(ctx context.Context) error { _, err := e.Image(ctx, "nobody:1"); return err },
		"RemoveImage": func(ctx context.Context) error { return e.RemoveImage(ctx, "nobody:1") },
		"FindByName":  func(ctx context.Context) error { _, _, err := e.FindByName(ctx, "nobody"); return err },
		"Exec": func(ctx context.Context) error {
			_, err := e.Exec(ctx, id, engine.Exec{Cmd: []string{"true"}, Streams: engine.Streams{Stdout: &out}})
			return err
		},
	} {
		if err := do(t.Context()); !errdefs.IsNotFound(err) {
			t.Errorf("%s of an unknown object: %v", operation, err)
		}

		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if err := do(ended); err == nil {
			t.Errorf("%s returned no error with a cancelled context", operation)
		}
	}
}
