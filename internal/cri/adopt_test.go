package cri

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/engine/enginetest"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/podnet"
	"cri-dockerd/internal/translate"
)

// foreign creates a sandbox as an older shim does, started or not.
func (w *world) foreign(t *testing.T, network string, start bool) string {
	t.Helper()
	create, err := translate.NewSandbox(w.pod(),
		translate.SandboxOptions{
			Image:       model.PauseImage{Source: enginetest.PauseRef, Name: enginetest.PauseRef},
			NetworkMode: network,
		})
	if err != nil {
		t.Fatal(err)
	}

	for k := range create.Config.Labels {
		if strings.HasPrefix(k, "io.cri-dockerd.") {
			delete(create.Config.Labels, k)
		}
	}

	create.Host.NetworkMode = container.NetworkMode(network)
	id, err := w.engine.Create(t.Context(), create)
	if err == nil && start {
		err = w.engine.Start(t.Context(), id)
	}

	if err != nil {
		t.Fatal(err)
	}

	return string(id)
}

// settled waits until the view has a sandbox in the given state.
func settled(t *testing.T, s *Service, id string, running bool) {
	t.Helper()
	eventually(t, func() bool {
		sb, err := s.View.Sandbox(id)
		return err == nil && sb.Running == running && sb.Foreign
	})
}

// TestAdopt starts on a node with pods of older shims. Running pods stay unchanged, get a pin, and
// keep their addresses.
func TestAdopt(t *testing.T) {
	s, w := newService(t)
	running, bridged, host, created := w.foreign(t, "none", true), w.foreign(t, "bridge", true),
		w.foreign(t, "host", true), w.foreign(t, "none", false)
	for id, runs := range map[string]bool{running: true, bridged: true, host: true, created: false} {
		settled(t, s, id, runs)
	}

	ip := func() string {
		r, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: running})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Network.GetIp()
	}
	if got := ip(); got != "10.99.0.9" {
		t.Errorf("info before the adoption: %q", got)
	}

	for range 2 {
		if err := s.Recover(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	if got := ip(); got != "10.99.0.9" {
		t.Errorf("info after the adoption: %q", got)
	}

	for id, runs := range map[string]bool{running: true, bridged: true, host: true, created: false} {
		if sb, err := s.View.Sandbox(id); err != nil || sb.Running != runs {
			t.Errorf("sandbox: %+v, %v", sb, err)
		}
	}

	if got := keys(w, w.pins); !slices.Equal(got, []string{running}) {
		t.Errorf("pins: %v", got)
	}
	if got := keys(w, w.adopted); !slices.Equal(got, []string{running}) {
		t.Errorf("adopted: %v", got)
	}

	for _, id := range []string{running, bridged, host, created} {
		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: id,
		}); err != nil {
			t.Error(err)
		}
	}

	var released []string
	for _, p := range w.released {
		released = append(released, p.ID)
		if !p.Foreign {
			t.Errorf("released pod is not marked as foreign: %+v", p)
		}
	}

	if slices.Sort(released); !slices.Equal(released, slices.Sorted(slices.Values([]string{running, created}))) {
		t.Errorf("released %v; the networks of the engine and the host do not belong to CNI", released)
	}

	w.assertNoLeftovers(t, s)
}

// TestCheckpoints releases the sandboxes in an older shim's checkpoints with their ports, even if
// the container was removed, and skips unreadable checkpoints.
func TestCheckpoints(t *testing.T) {
	s, w := newService(t)
	removed, hostRemoved, broken, stopped := testID("aa01"), testID("aa02"), testID("aa03"), testID("aa04")
	ports := []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080}}
	alive := w.foreign(t, "none", true)
	settled(t, s, alive, true)
	for id, c := range map[string]checkpoint.Checkpoint{
		alive:       {Name: "lives", Ports: ports},
		removed:     {Name: "removed", Namespace: "default", Ports: ports},
		hostRemoved: {HostNetwork: true},
		broken:      {},
	} {
		if err := w.files.Write(model.ContainerID(id), c); err != nil {
			t.Fatal(err)
		}
	}

	if err := os.WriteFile(w.files.Path(model.ContainerID(broken)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	var ids []string
	for _, p := range w.released {
		ids = append(ids, p.ID)
		if !p.Foreign || p.ID == removed && (p.Name != "removed" || p.Namespace != "default" || len(p.Ports) != 1) {
			t.Errorf("released as %+v", p)
		}
	}

	if slices.Sort(ids); !slices.Equal(ids, []string{removed, broken}) {
		t.Errorf("released %v", ids)
	}
	if left := w.files.List(); !slices.Equal(left, []model.ContainerID{model.ContainerID(alive)}) {
		t.Errorf("remaining checkpoints: %v", left)
	}

	if err := w.files.Write(model.ContainerID(stopped), checkpoint.Checkpoint{
		Name:  "stopped",
		Ports: ports,
	}); err != nil {
		t.Fatal(err)
	}

	w.released = nil
	for _, id := range []string{alive, stopped} {
		if _, err := s.StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
			t.Error(err)
		}
		if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{
			PodSandboxId: id,
		}); err != nil {
			t.Error(err)
		}
	}

	for _, id := range []string{alive, stopped} {
		if i := slices.IndexFunc(w.released, func(p podnet.Pod) bool {
			return p.ID == id
		}); i < 0 || len(w.released[i].Ports) != 1 {
			t.Errorf("%s was not released with its ports: %+v", id, w.released)
		}
	}

	if left := w.files.List(); len(left) > 0 {
		t.Errorf("remaining: %v", left)
	}

	w.assertNoLeftovers(t, s)
}

// TestSandboxMissingFromView keeps the network of an existing container even if the view lacks the
// container.
func TestSandboxMissingFromView(t *testing.T) {
	s, w := newService(t)
	create, err := translate.NewSandbox(w.pod(),
		translate.SandboxOptions{
			Image:       model.PauseImage{Source: enginetest.PauseRef, Name: enginetest.PauseRef},
			NetworkMode: "none",
		})
	if err != nil {
		t.Fatal(err)
	}

	create.Name = "renamed"
	id, err := w.engine.Create(t.Context(), create)
	if err == nil {
		err = w.files.Write(id, checkpoint.Checkpoint{Name: "web"})
	}

	if err != nil {
		t.Fatal(err)
	}

	if err := s.Recover(t.Context()); err != nil || len(w.released) > 0 || len(w.files.List()) != 1 {
		t.Errorf("%v; released %v, checkpoints %v", err, w.released, w.files.List())
	}

	w.engine.Drop(id)
	if err := s.Recover(t.Context()); err != nil || len(w.released) != 1 || len(w.files.List()) != 0 {
		t.Errorf("removed: %v; released %v, checkpoints %v", err, w.released, w.files.List())
	}
}

// TestAdoptRestartedPause: the namespace of a restarted pause container is not the pod's. It is not
// pinned, and the network is released without it.
func TestAdoptRestartedPause(t *testing.T) {
	s, w := newService(t)
	id := w.foreign(t, "none", true)
	w.engine.End(model.ContainerID(id), 0)
	w.start(t, id)
	refresh(t, s, id)
	if err := s.Recover(t.Context()); err != nil {
		t.Fatal(err)
	}

	if !w.has(w.adopted, id) || w.has(w.pins, id) {
		t.Errorf("adopted %v, pinned %v", keys(w, w.adopted), keys(w, w.pins))
	}
	if _, err := s.OpenNetNS(id); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("OpenNetNS: %v", err)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}); err != nil {
		t.Error(err)
	}

	if len(w.released) != 1 || w.released[0].NetNS != "" {
		t.Errorf("released: %+v", w.released)
	}

	w.assertNoLeftovers(t, s)
}
