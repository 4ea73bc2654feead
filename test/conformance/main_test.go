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

// Flags to test an existing runtime instead of private engines.
var (
	endpoint = flag.String("endpoint", "",
		"test the runtime at this CRI socket (unix:///…); tests that need an engine of their own are skipped")
	shellImage = flag.String("image", "busybox:latest",
		"with -endpoint: an image with busybox's programs; it is pulled if it is missing")
)

// shared is the node of all tests on one engine version.
type shared struct {
	once sync.Once
	node *node
}

var nodes = map[engines.Version]*shared{engines.V20: {}, engines.V29: {}}

// suite is the TB of resources with the lifetime of the whole test binary.
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

func (s *suite) Failed() bool { return s.failed }

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

// endpointNode connects to the runtime at -endpoint and pulls the test image if it is missing.
var endpointNode = sync.OnceValue(func() *node {
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

// each runs a test on the shared node of every engine version, in parallel with other tests, or on
// the runtime at -endpoint.
func each(t *testing.T, test func(*testing.T, *node)) {
	t.Parallel()
	if *endpoint != "" {
		test(t, endpointNode())
		return
	}

	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			s := nodes[v]
			s.once.Do(func() { s.node = start(all, v) })
			if s.node == nil {
				t.Fatal("an earlier test failed to start the shared node")
			}
			test(t, s.node)
		})
	}
}

// eachEngine runs a test on a new engine of every version, started with additional dockerd flags.
// It starts no daemon.
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

// eachFresh runs a test on a new node of every engine version.
func eachFresh(t *testing.T, test func(*testing.T, *node)) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		test(t, n)
	})
}

// withDaemon starts another daemon on the engine of a node. A node has at most one running daemon.
func (n *node) withDaemon(t *testing.T, args ...string) *node {
	t.Helper()
	eng := n.own(t)
	return &node{Daemon: eng.Daemon(t, args...), eng: eng, image: n.image}
}
