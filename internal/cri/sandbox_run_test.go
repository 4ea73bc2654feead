package cri

import (
	"context"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

// TestInvalidSandboxPullsNothing: the sandbox image is not requested for an invalid request.
func TestInvalidSandboxPullsNothing(t *testing.T) {
	s, w := newService(t)
	images := &countingImages{Images: s.Images}
	s.Images = images
	for _, engineNetNS := range []string{"", "configured"} {
		s.joining.configured = engineNetNS
		r := &runtimeapi.RunPodSandboxRequest{Config: w.pod(), RuntimeHandler: "unknown"}
		if _, err := s.RunPodSandbox(t.Context(), r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("engine namespace %q: %v", engineNetNS, err)
		}
	}

	if n := images.asked.Load(); n != 0 {
		t.Errorf("the sandbox image was requested %d times", n)
	}

	w.assertNoLeftovers(t, s)
}

// countingImages counts the requests for the sandbox image.
type countingImages struct {
	Images
	asked atomic.Int32
}

func (c *countingImages) PauseImage(ctx context.Context) (model.PauseImage, error) {
	c.asked.Add(1)
	return c.Images.PauseImage(ctx)
}

// pruningEngine loses an image before the first create, or the first pause container before its
// start.
type pruningEngine struct {
	Engine
	losesImage, losesPause bool
	calls                  *atomic.Int32
}

func (p pruningEngine) Create(ctx context.Context, c *translate.Create) (model.ContainerID, error) {
	if p.losesImage && p.calls.Add(1) == 1 {
		return "", errdefs.ErrNotFound
	}
	return p.Engine.Create(ctx, c)
}

func (p pruningEngine) Start(ctx context.Context, id model.ContainerID) error {
	if p.losesPause && p.calls.Add(1) == 1 {
		if err := p.Remove(ctx, id); err != nil {
			return err
		}
	}
	return p.Engine.Start(ctx, id)
}

// TestPruneDuringRunPodSandbox: an image or pause container pruned during the call is created
// again.
func TestPruneDuringRunPodSandbox(t *testing.T) {
	for name, lost := range map[string]pruningEngine{
		"image": {losesImage: true},
		"pause": {losesPause: true},
	} {
		for _, engineNetNS := range []string{"", "configured"} {
			t.Run(name+" "+engineNetNS, func(t *testing.T) {
				s, w := newServiceWith(t, engineNetNS)
				lost.Engine, lost.calls = s.Engine, new(atomic.Int32)
				s.Engine = lost

				id := runPod(t, s, w.pod())
				if sb, err := s.View.Sandbox(id); err != nil || !s.isReady(sb) {
					t.Errorf("sandbox: %+v, %v", sb, err)
				}

				if n := lost.calls.Load(); n < 2 {
					t.Errorf("%d calls: nothing was lost", n)
				}

				r := &runtimeapi.RemovePodSandboxRequest{PodSandboxId: id}
				if _, err := s.RemovePodSandbox(t.Context(), r); err != nil {
					t.Error(err)
				}

				w.assertNoLeftovers(t, s)
			})
		}
	}
}
