package conformance

import (
	"context"
	"flag"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

// strict has tests assert what an idle machine must reach.
var strict = flag.Bool("strict", false, "assert latencies, which needs an idle machine")

// The latency of Status while one object hangs: at the 99th percentile with -strict, else at most
// of all calls, as a busy machine still reaches it.
const (
	strictStatus = 50 * time.Millisecond
	laxStatus    = time.Second
)

// startLimit is for the daemon's start while one object hangs. All deadlines of the first reading
// together are shorter, and those of a single object longer.
const startLimit = 20 * time.Second

// hangNode is a node whose engine answers not every request.
type hangNode struct {
	*node
	proxy    *proxy
	registry *registry.Registry
	sandbox  string
	pod      *runtimeapi.PodSandboxConfig
	image    string // a second image of the registry, which never hangs
	unlisted bool   // the daemon has no list of images
}

// hanging starts a node behind a proxy, with a pod and a registry.
func hanging(t *testing.T, n *node) *hangNode {
	t.Helper()
	p := n.newProxy(t)
	n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
	h := &hangNode{node: n, proxy: p, registry: n.registry(t), pod: n.podConfig(t)}
	h.image = h.registry.Add(t, "well", "1", 1, 10000)
	h.sandbox = n.runPod(t, h.pod)
	return h
}

// restart kills the daemon and starts it again, which must not wait for what hangs.
func (h *hangNode) restart(t *testing.T) {
	t.Helper()
	h.Kill(t)
	begin := time.Now()
	h.Restart(t)
	if d := time.Since(begin); d > startLimit {
		t.Errorf("the daemon was ready after %s", d)
	} else {
		t.Logf("the daemon was ready after %s", d)
	}
}

// end lets everything go on and removes the pod.
func (h *hangNode) end(t *testing.T) {
	t.Helper()
	h.proxy.hang("")
	h.removePod(t, h.sandbox)
	h.assertNothingLeft(t, h.pod)
}

// othersAnswer makes every kind of call for objects that do not hang.
func (h *hangNode) othersAnswer(t *testing.T, name string) {
	t.Helper()
	if ok, why := h.runtimeReady(t); !ok {
		t.Errorf("%s: not ready: %s", name, why)
	}

	h.statusIsQuick(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	begin := time.Now()
	c := h.startNamed(t, h.sandbox, h.pod, name, sh("sleep 1000"))
	if out := h.exec(t, c, "echo", "well"); out != "well\n" {
		t.Errorf("%s: exec: %q", name, out)
	}
	if s := h.containerStatus(t, c); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%s: %v", name, s)
	}
	if _, err := h.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c}); err != nil {
		t.Errorf("%s: ContainerStats: %v", name, err)
	}

	h.stop(t, c, 0)
	if _, err := h.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c}); err != nil {
		t.Errorf("%s: RemoveContainer: %v", name, err)
	}

	life := time.Since(begin)

	begin = time.Now()
	h.imagesAnswer(ctx, t, name)
	images := time.Since(begin)

	begin = time.Now()
	other := h.podConfig(t)
	h.removePod(t, h.runPod(t, other))
	t.Logf("%s: life of a container %s, of an image %s, of a pod %s", name, life, images, time.Since(begin))
	h.assertNothingLeft(t, other)
}

// imagesAnswer takes an image through its life.
func (h *hangNode) imagesAnswer(ctx context.Context, t *testing.T, name string) {
	t.Helper()
	id, err := h.pull(ctx, h.image, nil)
	if err != nil {
		t.Fatalf("%s: PullImage: %v", name, err)
	}

	if i := h.imageStatus(t, h.image); i.GetId() != id {
		t.Errorf("%s: ImageStatus: %v, want %s", name, i, id)
	}

	r, err := h.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{
		Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: h.image}},
	})
	if h.unlisted != (status.Code(err) == codes.Unavailable) || !h.unlisted && len(r.GetImages()) != 1 {
		t.Errorf("%s: ListImages of one: %v, %v", name, r, err)
	}

	if err := h.removeImage(t, h.image); err != nil {
		t.Errorf("%s: RemoveImage: %v", name, err)
	}

	if i := h.imageStatus(t, h.image); i != nil {
		t.Errorf("%s: ImageStatus after the removal: %v", name, i)
	}
}

// statusIsQuick measures Status.
func (h *hangNode) statusIsQuick(t *testing.T, name string) {
	t.Helper()
	var took []time.Duration
	for range 200 {
		begin := time.Now()
		if _, err := h.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}

	slices.Sort(took)
	p99, most := took[len(took)*99/100-1], took[len(took)-1]
	t.Logf("%s: Status p99 %s, at most %s", name, p99, most)
	if *strict && p99 > strictStatus || most > laxStatus {
		t.Errorf("%s: Status takes %s at the 99th percentile and at most %s", name, p99, most)
	}
}

// listed returns an image in the list of all, nil if it is not there.
func (h *hangNode) listed(t *testing.T, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := h.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		return nil
	}

	for _, i := range r.Images {
		if slices.Contains(i.RepoTags, ref) {
			return i
		}
	}

	return nil
}

// TestHangingExec: the engine never answers the request for one exec. Other containers, and other
// execs, do not wait for it.
func TestHangingExec(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := hanging(t, n)
		sick := h.startNamed(t, h.sandbox, h.pod, "sick", sh("sleep 1000"))
		h.proxy.hang("/containers/" + sick + "/exec")
		for _, when := range []string{"at-rest", "after-start"} {
			if when == "after-start" {
				h.restart(t)
			}

			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := h.Runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: sick, Cmd: []string{"true"}})
				ended <- err
			}()

			eventually(t, "the engine is asked for what hangs", func() bool { return h.proxy.waits() > 0 })
			h.othersAnswer(t, when)
			if s := h.containerStatus(t, sick); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%s: %v", when, s)
			}

			select {
			case err := <-ended:
				t.Errorf("%s: the exec that hangs has ended: %v", when, err)
			default:
			}

			cancel()
			if err := <-ended; status.Code(err) != codes.Canceled {
				t.Errorf("%s: the exec that hangs: %v", when, err)
			}
		}

		h.end(t)
	})
}

// TestHangingImageList: the engine never answers a list of images. Single images are pulled,
// described and removed meanwhile, and an image list that never came is no empty one.
func TestHangingImageList(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := hanging(t, n)
		h.proxy.hang("/images/json")
		h.docker(t, "tag", h.node.image, "late:1") // its event has the images listed
		eventually(t, "the engine is asked for what hangs", func() bool { return h.proxy.waits() > 0 })
		h.othersAnswer(t, "at-rest")
		if h.listed(t, h.node.image) == nil {
			t.Error("the images that were known are not listed")
		}

		h.restart(t)
		if _, err := h.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{}); status.Code(err) !=
			codes.Unavailable {
			t.Errorf("ListImages without a list: %v", err)
		}

		h.unlisted = true
		h.othersAnswer(t, "after-start")

		h.proxy.hang("")
		if !within(2*time.Minute, func() bool { return h.listed(t, "late:1") != nil }) {
			t.Error("the images were not listed after the engine went on")
		}

		h.end(t)
	})
}

// TestHangingImageInspect: the engine never describes one image. The others are described, the
// image itself is shown as the list has it.
func TestHangingImageInspect(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := hanging(t, n)
		sick := h.registry.Add(t, "sick", "1", 1, 10000)
		id, err := h.pull(t.Context(), sick, nil)
		if err != nil {
			t.Fatal(err)
		}

		h.proxy.hang("/images/" + id + "/json")
		h.docker(t, "tag", sick, "sick:2") // it has changed, and is inspected
		eventually(t, "the engine is asked for what hangs", func() bool { return h.proxy.waited() > 0 })
		h.othersAnswer(t, "at-rest")
		eventually(t, "the image has its new name", func() bool { return h.listed(t, "sick:2") != nil })

		h.restart(t)
		eventually(t, "the image is listed", func() bool { return h.listed(t, "sick:2") != nil })
		h.othersAnswer(t, "after-start")
		h.end(t)
	})
}

// TestHangingPull: the registry never sends one image. Others are pulled meanwhile.
func TestHangingPull(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := hanging(t, n)
		sick := h.registry.Add(t, "sick", "1", 1, 10000)
		h.registry.Set("sick", registry.Rule{BeforeBlob: make(chan struct{})})
		for _, when := range []string{"at-rest", "after-start"} {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := h.pull(ctx, sick, nil)
				ended <- err
			}()

			eventually(t, "the registry is asked for what hangs", func() bool { return h.registry.Busy("sick") > 0 })
			if when == "after-start" {
				h.restart(t) // the engine goes on with the pull, or a new one joins it
				<-ended
				go func() {
					_, err := h.pull(ctx, sick, nil)
					ended <- err
				}()
				eventually(t, "the registry is asked again", func() bool { return h.registry.Busy("sick") > 0 })
			}

			h.othersAnswer(t, when)
			if i := h.imageStatus(t, sick); i != nil {
				t.Errorf("%s: an image that was not pulled: %v", when, i)
			}

			select {
			case err := <-ended:
				if err == nil || !strings.Contains(err.Error(), "sick") { // its own deadline may have come
					t.Errorf("%s: the pull that hangs has ended: %v", when, err)
				}
			default:
			}

			cancel()
		}

		h.end(t)
	})
}
