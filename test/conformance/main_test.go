package conformance

import (
	"context"
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// A runtime that is tested in place of private engines.
var (
	endpoint = flag.String("endpoint", "", "test the runtime that serves this CRI socket (unix:///…); tests that "+
		"need an engine of their own are skipped")
	shellImage = flag.String("image", "busybox:latest", "with -endpoint: an image with busybox's programs, which "+
		"the runtime has or can pull")
)

// shared is what all tests of a version use.
type shared struct {
	once sync.Once
	node *node
}

var nodes = map[engines.Version]*shared{engines.V20: {}, engines.V29: {}}

// suite is the TB of what outlives a single test.
type suite struct {
	mu      sync.Mutex
	cleanup []func()
	failed  bool
}

func (*suite) Helper() {}
func (s *suite) Fatalf(format string, args ...any) {
	s.failed = true
	panic(fmt.Sprintf(format, args...))
}
func (*suite) Logf(format string, args ...any) { fmt.Printf(format+"\n", args...) }
func (s *suite) Failed() bool                  { return s.failed }
func (s *suite) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cleanup = append(s.cleanup, f)
}

var all = &suite{}

func TestMain(m *testing.M) {
	code := m.Run()
	all.failed = code != 0
	for i := len(all.cleanup) - 1; i >= 0; i-- {
		all.cleanup[i]()
	}

	if code == 0 && all.failed {
		code = 1
	}

	os.Exit(code)
}

// start starts an engine with a daemon.
func start(tb engines.TB, v engines.Version) *node {
	e := engines.Start(tb, v)
	n := &node{eng: e, image: e.ImportBusybox(tb)}
	n.Daemon = e.Daemon(tb)
	return n
}

// stranger is the runtime at -endpoint.
var stranger = sync.OnceValue(func() *node {
	n := &node{Daemon: engines.Connect(all, *endpoint), image: *shellImage}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()

	spec := &runtimeapi.ImageSpec{Image: n.image}
	if s, err := n.Image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec}); err != nil {
		all.Fatalf("%s: %v", *endpoint, err)
	} else if s.Image == nil {
		if _, err := n.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec}); err != nil {
			all.Fatalf("%s: pull %s: %v", *endpoint, n.image, err)
		}
	}

	return n
})

// each runs a test on the shared node of every version, in parallel with others, or on the runtime
// at -endpoint.
func each(t *testing.T, test func(*testing.T, *node)) {
	t.Parallel()
	if *endpoint != "" {
		test(t, stranger())
		return
	}

	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			s := nodes[v]
			s.once.Do(func() { s.node = start(all, v) })
			if s.node == nil {
				t.Fatal("the node did not start")
			}
			test(t, s.node)
		})
	}
}

// eachEngine runs a test on an engine of its own of every version, with dockerd's further flags,
// without a daemon.
func eachEngine(t *testing.T, test func(*testing.T, *node), flags ...string) {
	t.Parallel()
	if *endpoint != "" {
		t.Skip("needs an engine of its own; not with -endpoint")
	}

	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			e := engines.Start(t, v, flags...)
			test(t, &node{eng: e, image: e.ImportBusybox(t)})
		})
	}
}

// eachFresh runs a test on a node of its own of every version.
func eachFresh(t *testing.T, test func(*testing.T, *node)) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		test(t, n)
	})
}

// withDaemon is the node with another daemon in place of the first, which is a node's only one
// while it runs.
func (n *node) withDaemon(t *testing.T, args ...string) *node {
	t.Helper()
	eng := n.own(t)
	return &node{Daemon: eng.Daemon(t, args...), eng: eng, image: n.image}
}
