package chaos

import (
	"context"
	"errors"
	"flag"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/client"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/registry"
)

var allCrashPoints = flag.Bool("all-crash-points", false, "test every point on every engine, instead of a sample on 29")

// Distances between sampled points. For abandoned calls they are odd: every other point is before a
// step, the others are after one.
const (
	sampleStride          = 6
	abandonedStride       = 5
	abandonedSampleStride = 11
)

// crash kills the daemon at one point of a call: at a request to the engine or a CNI plugin, or
// after its completion.
type crash struct {
	*kubelet
	image string // from a test registry
	pod   *pod
	pods  int

	sandbox, container string

	points sync.Mutex // guards the fields below
	armed  bool
	seen   int    // points since arm
	at     int    // the point to kill at, starting with 1
	hit    string // the event at the point, "" for none yet
}

// operation is a call with side effects.
type operation struct {
	name    string
	prepare []func(*crash, context.Context) error // must succeed, without kills
	call    func(*crash, context.Context) error
}

var operations = []operation{
	{"RunPodSandbox", nil, (*crash).run},
	{"CreateContainer", steps((*crash).run), (*crash).create},
	{"StartContainer", steps((*crash).run, (*crash).create), (*crash).start},
	{"UpdateContainerResources", steps((*crash).run, (*crash).create, (*crash).start), (*crash).update},
	{"StopContainer", steps((*crash).run, (*crash).create, (*crash).start), (*crash).stop},
	{"RemoveContainer", steps((*crash).run, (*crash).create, (*crash).start), (*crash).remove},
	{"StopPodSandbox", steps((*crash).run, (*crash).create, (*crash).start), (*crash).stopPod},
	{"RemovePodSandbox", steps((*crash).run, (*crash).create, (*crash).start, (*crash).stopPod), (*crash).removePod},
	{"PullImage", nil, (*crash).pull},
	{"RemoveImage", steps((*crash).pull), (*crash).removeImage},
}

func steps(all ...func(*crash, context.Context) error) []func(*crash, context.Context) error {
	return all
}

// TestCrashPoints kills the daemon at every request to the engine and every call of a CNI plugin in
// a mutating call: before its execution, and after it while the response is on its way. The daemon
// then starts again, the call is repeated, the pod is removed, and nothing may remain.
//
// At some of the points the call is abandoned: its caller never repeats it, and only removes the
// objects that the daemon lists. At every other of these points someone removes the pod's
// containers before the daemon starts. If no list shows an acquired resource, the daemon must
// release it by itself.
func TestCrashPoints(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			c := newCrash(t, v)
			baseline := c.takeBaseline(t)
			stride, abandoned := 1, abandonedStride
			switch {
			case *allCrashPoints:
				abandoned = 1
			case v != engines.V20:
				stride, abandoned = sampleStride, abandonedSampleStride
			}

			for i, o := range operations {
				t.Run(o.name, func(t *testing.T) {
					c.everywhere(t, o, points{first: 1 + i%stride, stride: stride}, baseline)
				})
				t.Run(o.name+" abandoned", func(t *testing.T) {
					c.everywhere(t, o, points{first: 1 + i%abandoned, stride: abandoned, abandon: true}, baseline)
				})
			}
		})
	}
}

// points selects the points of an operation to kill at.
type points struct {
	first, stride int
	abandon       bool // the call is not repeated
}

func newCrash(t *testing.T, v engines.Version) *crash {
	t.Helper()
	c := &crash{kubelet: newKubelet(newLab(t, v), 0, 0)}
	reg := registry.Serve(t, c.eng.Listen(t, "127.0.0.1:0"))
	c.image = reg.Add(t, "chaos/app", "v1", 1, 1000)
	c.proxy.Observe(
		func(r *http.Request) { c.point(r.Method + " " + r.URL.Path) },
		func(r *http.Request) {
			if r.Method != http.MethodGet { // GET changes nothing
				c.point(r.Method + " " + r.URL.Path + ", done")
			}
		})

	c.cni.answer(func(q question) string {
		what := q.Command + " of " + q.Plugin
		if q.After {
			what += ", done"
		}
		c.point(what)
		return ""
	})

	return c
}

// takeBaseline takes one pod through its lifecycle and returns the remaining resources.
func (c *crash) takeBaseline(t *testing.T) remains {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()

	c.next()
	for _, step := range steps((*crash).run, (*crash).create, (*crash).start, (*crash).removePod) {
		if err := step(c, ctx); err != nil {
			t.Fatal(err)
		}
	}

	baseline, err := c.remaining(ctx)
	if err != nil {
		t.Fatal(err)
	}

	return baseline
}

// remaining collects everything on the node, images included.
func (c *crash) remaining(ctx context.Context) (remains, error) {
	r, err := c.kubelet.remaining(ctx)
	if err != nil {
		return nil, err
	}

	images, err := c.docker.ImageList(ctx, client.ImageListOptions{All: true})
	for _, i := range images.Items {
		r["images"] = append(r["images"], i.ID+" "+strings.Join(i.RepoTags, ","))
	}

	return r, err
}

// next switches to another pod.
func (c *crash) next() {
	c.pods++
	c.pod = newPod(c.kubelet, 1, c.pods, rand.New(rand.NewPCG(0, 0)))
	c.sandbox, c.container = "", ""
}

// arm selects the point for the kill of the daemon.
func (c *crash) arm(at int) {
	c.points.Lock()
	defer c.points.Unlock()
	c.armed, c.seen, c.at, c.hit = true, 0, at, ""
}

// disarm returns the event at the point, "" if it was not reached.
func (c *crash) disarm() string {
	c.points.Lock()
	defer c.points.Unlock()
	c.armed = false
	return c.hit
}

// point is called at every point. At the selected point it returns after the daemon's death.
func (c *crash) point(what string) {
	c.points.Lock()
	defer c.points.Unlock()

	if !c.armed || c.hit != "" {
		return
	}

	if c.seen++; c.seen == c.at {
		c.hit = what
		c.killDaemon()
	}
}

// everywhere repeats an operation and kills the daemon at one point after the other.
func (c *crash) everywhere(t *testing.T, o operation, p points, baseline remains) {
	const most = 200
	reached := 0
	for at := p.first; at < most; at += p.stride {
		hit := c.once(t, o, at, p.abandon, baseline)
		if hit == "" {
			break
		}

		reached++
		if t.Failed() {
			t.Fatalf("killed at point %d: %s", at, hit)
		}
	}

	t.Logf("%d points", reached)
	if reached == 0 && p.first == 1 {
		t.Error("no point was reached")
	}
}

// once kills the daemon at one point of an operation and returns the event there, "" if the
// operation has fewer points. With abandon, the call is not repeated.
func (c *crash) once(t *testing.T, o operation, at int, abandon bool, baseline remains) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	c.next()
	for _, step := range o.prepare {
		if err := step(c, ctx); err != nil {
			t.Fatalf("prepare %s: %v", o.name, err)
		}
	}

	c.arm(at)
	err := o.call(c, ctx)
	hit := c.disarm()
	if hit == "" && err != nil {
		t.Fatalf("%s without a kill: %v", o.name, err)
	}

	if hit != "" && abandon && at%2 == 0 {
		if err := c.removeExternally(ctx); err != nil {
			t.Fatal(err)
		}
	}

	if hit != "" {
		c.daemon.Restart(t)
	}

	switch {
	case hit != "" && abandon:
		c.mustSucceed(t, ctx, o.name+", abandoned after "+hit, func(ctx context.Context) []string {
			return slices.Concat(problem(c.removeListed(ctx)), c.leftovers(ctx, baseline))
		})
		return hit

	case hit != "":
		repeat := func(ctx context.Context) []string { return problem(o.call(c, ctx)) }
		c.mustSucceed(t, ctx, o.name+" repeated after "+hit, repeat)
	}

	c.mustSucceed(t, ctx, o.name+", removed after "+hit, func(ctx context.Context) []string {
		return problem(c.clear(ctx))
	})
	c.mustSucceed(t, ctx, o.name+", no remains after "+hit, func(ctx context.Context) []string {
		return c.leftovers(ctx, baseline)
	})

	return hit
}

// leftovers returns everything on the node that is not in the baseline.
func (c *crash) leftovers(ctx context.Context, baseline remains) []string {
	now, err := c.remaining(ctx)
	return slices.Concat(problem(err), now.minus(baseline))
}

func problem(err error) []string {
	if err == nil {
		return nil
	}
	return []string{err.Error()}
}

// mustSucceed fails the test unless find finally returns no problems.
func (c *crash) mustSucceed(t *testing.T, ctx context.Context, what string, find func(context.Context) []string) {
	t.Helper()
	if problems := await(ctx, time.Minute, find); len(problems) > 0 {
		t.Fatalf("%s: %q", what, problems)
	}
}

// removeExternally removes the pod's containers while the daemon is dead, like an administrator
// cleaning up after a crash (docker rm -f). Only the daemon then still knows the pod's network.
func (c *crash) removeExternally(ctx context.Context) error {
	all, err := c.docker.ContainerList(ctx, client.ContainerListOptions{All: true})
	if err != nil {
		return err
	}

	for _, i := range all.Items {
		if !strings.Contains(strings.Join(i.Names, " "), c.pod.uid) {
			continue
		}
		_, removeErr := c.docker.ContainerRemove(ctx, i.ID, client.ContainerRemoveOptions{Force: true})
		if !errdefs.IsNotFound(removeErr) && !errdefs.IsConflict(removeErr) { // already being removed
			err = errors.Join(err, removeErr)
		}
	}

	return err
}

// clear removes the pod and the image.
func (c *crash) clear(ctx context.Context) error {
	return errors.Join(c.clearPod(ctx), c.removeImage(ctx))
}

// removeListed removes the pod and the image if the daemon lists them.
func (c *crash) removeListed(ctx context.Context) error {
	r, err := c.daemon.Image.ListImages(ctx, &runtimeapi.ListImagesRequest{})
	isListed := func(i *runtimeapi.Image) bool { return slices.Contains(i.RepoTags, c.image) }
	if err == nil && slices.ContainsFunc(r.Images, isListed) {
		err = c.removeImage(ctx)
	}
	return errors.Join(c.clearPod(ctx), err)
}

// clearPod removes the pod's objects listed by the daemon.
func (c *crash) clearPod(ctx context.Context) error {
	leftovers, err := c.pod.remove(ctx)
	if err == nil && leftovers > 0 {
		leftovers, err = c.pod.remove(ctx)
	}

	if err == nil && leftovers > 0 {
		err = errors.New("a removed pod is listed")
	}

	return err
}
