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

// strict makes tests assert the latencies of an idle machine.
var strict = flag.Bool("strict", false, "assert latencies; needs an idle machine")

// Limits for the latency of Status while one object hangs. With -strict the first applies to the
// 99th percentile. Otherwise the second applies to the maximum, since other tests load the machine.
const (
	strictStatus = 50 * time.Millisecond
	laxStatus    = time.Second
)

// startLimit limits the start of the daemon while one object hangs. It is longer than all deadlines
// of the first read together, and shorter than those of a single object.
const startLimit = 20 * time.Second

// hangNode is a node with an engine that does not respond to some requests.
type hangNode struct {
	*node
	proxy    *proxy
	registry *registry.Registry
	sandbox  string
	pod      *runtimeapi.PodSandboxConfig
	image    string // an image of the registry that never hangs
	unlisted bool   // the daemon could not list the images
}

// newHangNode starts a node behind a proxy, with a pod and a registry.
func newHangNode(t *testing.T, n *node) *hangNode {
	t.Helper()
	p := n.newProxy(t)
	n = n.withDaemon(t, "--docker-endpoint=unix://"+p.socket)
	h := &hangNode{node: n, proxy: p, registry: n.registry(t), pod: n.podConfig(t)}
	h.image = h.registry.Add(t, "healthy", "1", 1, 10000)
	h.sandbox = n.runPod(t, h.pod)
	return h
}

// restart kills and restarts the daemon. The start must not wait for a hanging object.
func (h *hangNode) restart(t *testing.T) {
	t.Helper()
	h.Kill(t)
	begin := time.Now()
	h.Restart(t)
	if d := time.Since(begin); d > scaled(startLimit) {
		t.Errorf("the daemon was ready after %s, want at most %s", d, startLimit)
	} else {
		t.Logf("the daemon was ready after %s", d)
	}
}

// end releases all requests and removes the pod.
func (h *hangNode) end(t *testing.T) {
	t.Helper()
	h.proxy.hang("")
	h.removePod(t, h.sandbox)
	h.assertNoLeftovers(t, h.pod)
}

// assertOthersWork makes every kind of call for objects that do not hang.
func (h *hangNode) assertOthersWork(t *testing.T, name string) {
	t.Helper()
	if ok, why := h.runtimeReady(t); !ok {
		t.Errorf("%s: not ready: %s", name, why)
	}

	h.assertStatusLatency(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	begin := time.Now()
	c := h.startNamed(t, h.sandbox, h.pod, name, sh("sleep 1000"))
	if out := h.exec(t, c, "echo", "healthy"); out != "healthy\n" {
		t.Errorf("%s: exec: %q", name, out)
	}
	if s := h.containerStatus(t, c); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%s: container status %v, want running", name, s)
	}
	if _, err := h.Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: c}); err != nil {
		t.Errorf("%s: ContainerStats: %v", name, err)
	}

	h.stop(t, c, 0)
	if _, err := h.Runtime.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c}); err != nil {
		t.Errorf("%s: RemoveContainer: %v", name, err)
	}

	lifecycle := time.Since(begin)

	begin = time.Now()
	h.assertImagesWork(ctx, t, name)
	images := time.Since(begin)

	begin = time.Now()
	other := h.podConfig(t)
	h.removePod(t, h.runPod(t, other))
	t.Logf("%s: lifecycle of a container %s, of an image %s, of a pod %s", name, lifecycle, images, time.Since(begin))
	h.assertNoLeftovers(t, other)
}

// assertImagesWork pulls, inspects, lists and removes an image. Names given and taken away by
// others are known soon.
func (h *hangNode) assertImagesWork(ctx context.Context, t *testing.T, name string) {
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

	const other = "others:1"
	h.docker(t, "tag", h.image, other)
	eventually(t, "a name given by others", func() bool { return h.imageStatus(t, other).GetId() == id })
	h.docker(t, "rmi", other)
	eventually(t, "the end of a name taken away by others", func() bool { return h.imageStatus(t, other) == nil })

	if err := h.removeImage(t, h.image); err != nil {
		t.Errorf("%s: RemoveImage: %v", name, err)
	}

	if i := h.imageStatus(t, h.image); i != nil {
		t.Errorf("%s: ImageStatus after the removal: %v", name, i)
	}
}

// assertStatusLatency measures Status.
func (h *hangNode) assertStatusLatency(t *testing.T, name string) {
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
	if *strict && p99 > strictStatus || most > scaled(laxStatus) {
		t.Errorf("%s: latency of Status is %s at the 99th percentile and at most %s", name, p99, most)
	}
}

// listed returns an image of the list of all images, or nil if it is missing.
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

// TestHangingExec has an engine that never responds to the request for one exec. Other containers
// and other execs do not wait for it.
func TestHangingExec(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := newHangNode(t, n)
		stuck := h.startNamed(t, h.sandbox, h.pod, "stuck", sh("sleep 1000"))
		h.proxy.hang("/containers/" + stuck + "/exec")
		for _, when := range []string{"at-rest", "after-start"} {
			if when == "after-start" {
				h.restart(t)
			}

			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := h.Runtime.ExecSync(ctx,
					&runtimeapi.ExecSyncRequest{ContainerId: stuck, Cmd: []string{"true"}})
				ended <- err
			}()

			eventually(t, "a hanging request", func() bool { return h.proxy.hanging() > 0 })
			h.assertOthersWork(t, when)
			if s := h.containerStatus(t, stuck); s.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
				t.Errorf("%s: container status %v, want running", when, s)
			}

			select {
			case err := <-ended:
				t.Errorf("%s: the hanging exec has ended: %v", when, err)
			default:
			}

			cancel()
			if err := <-ended; status.Code(err) != codes.Canceled {
				t.Errorf("%s: cancelled exec: %v, want Canceled", when, err)
			}
		}

		h.end(t)
	})
}

// TestHangingImageList has an engine that never responds to a list of images. Single images can be
// pulled, inspected and removed. A missing list is reported as an error, not as an empty list.
func TestHangingImageList(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := newHangNode(t, n)
		h.proxy.hang("/images/json")
		h.docker(t, "tag", h.node.image, "late:1") // its event triggers a list of the images
		eventually(t, "a hanging request", func() bool { return h.proxy.hanging() > 0 })
		h.assertOthersWork(t, "at-rest")
		if h.listed(t, h.node.image) == nil {
			t.Error("ListImages lacks the known images")
		}

		h.restart(t)
		if _, err := h.Image.ListImages(t.Context(),
			&runtimeapi.ListImagesRequest{}); status.Code(err) != codes.Unavailable {
			t.Errorf("ListImages without a list of the engine: %v, want Unavailable", err)
		}

		h.unlisted = true
		h.assertOthersWork(t, "after-start")

		h.proxy.hang("")
		if !within(2*time.Minute, func() bool { return h.listed(t, "late:1") != nil }) {
			t.Error("ListImages lacks the new image after the engine responds")
		}

		h.end(t)
	})
}

// TestHangingImageInspect has an engine that never responds to the inspect of one image. Other
// images are inspected, and the hanging image is reported with the data of the list.
func TestHangingImageInspect(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := newHangNode(t, n)
		stuck := h.registry.Add(t, "stuck", "1", 1, 10000)
		id, err := h.pull(t.Context(), stuck, nil)
		if err != nil {
			t.Fatal(err)
		}

		h.proxy.hang("/images/" + id + "/json")
		h.docker(t, "tag", stuck, "stuck:2") // the change triggers an inspect
		eventually(t, "a hanging request", func() bool { return h.proxy.totalHanging() > 0 })
		h.assertOthersWork(t, "at-rest")
		eventually(t, "new name of the image", func() bool { return h.listed(t, "stuck:2") != nil })

		h.restart(t)
		eventually(t, "listed image", func() bool { return h.listed(t, "stuck:2") != nil })
		h.assertOthersWork(t, "after-start")
		h.end(t)
	})
}

// TestHangingPull has a registry that never sends one image. Other pulls succeed.
func TestHangingPull(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		h := newHangNode(t, n)
		stuck := h.registry.Add(t, "stuck", "1", 1, 10000)
		h.registry.Set("stuck", registry.Rule{BeforeBlob: make(chan struct{})})
		for _, when := range []string{"at-rest", "after-start"} {
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				_, err := h.pull(ctx, stuck, nil)
				ended <- err
			}()

			eventually(t, "hanging pull in the registry", func() bool { return h.registry.Busy("stuck") > 0 })
			if when == "after-start" {
				h.restart(t) // the engine continues the pull, or the next pull starts a new one
				<-ended
				go func() {
					_, err := h.pull(ctx, stuck, nil)
					ended <- err
				}()
				eventually(t, "second pull in the registry", func() bool { return h.registry.Busy("stuck") > 0 })
			}

			h.assertOthersWork(t, when)
			if i := h.imageStatus(t, stuck); i != nil {
				t.Errorf("%s: ImageStatus before the end of the pull: %v", when, i)
			}

			select {
			case err := <-ended:
				if err == nil || !strings.Contains(err.Error(), "stuck") { // the pull may reach its own deadline
					t.Errorf("%s: the hanging pull has ended: %v", when, err)
				}
			default:
			}

			cancel()
		}

		h.end(t)
	})
}
