package conformance

import (
	"flag"
	"fmt"
	"os"
	"sync"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// Flags to test an existing runtime instead of private engines.
var (
	endpoint = flag.String("endpoint", "",
		"test the runtime at this CRI socket (unix:///…) of this machine; tests that stop or reconfigure the engine "+
			"or the daemon are skipped")
	runDir       = flag.String("run-directory", "/run/cri-dockerd", "with -endpoint: --run-directory of the daemon")
	dockerSocket = flag.String("docker", "/var/run/docker.sock", "with -endpoint: Docker's socket")
	shellImage   = flag.String("image", "", "with -endpoint: an image with busybox's programs; it is pulled if it is "+
		"missing. The default is busybox:latest, with Docker an image of this machine's busybox")
)

// shared is the node of all tests on one engine version.
type shared struct {
	once sync.Once
	node *node
}

var sharedNodes = map[engines.Version]*shared{engines.V20: {}, engines.V26: {}, engines.V29: {}}

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

// newNode returns a node with a private engine and without a daemon.
func newNode(tb engines.TB, v engines.Version, flags ...string) *node {
	tb.Helper()
	e := engines.Start(tb, v, flags...)
	return &node{eng: e, image: e.ImportBusybox(tb), groups: e.CgroupParent}
}

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
			s := sharedNodes[v]
			s.once.Do(func() {
				n := newNode(all, v)
				n.Daemon = n.eng.Daemon(all)
				s.node = n
			})
			if s.node == nil {
				t.Fatal("an earlier test failed to start the shared node")
			}
			test(t, s.node)
		})
	}
}

// skipAtEndpoint skips a test that starts engines or daemons of its own.
func skipAtEndpoint(t *testing.T) {
	t.Helper()
	if *endpoint != "" {
		t.Skip(needsPrivate)
	}
}

// eachFeature is eachShim for tests of what Docker's API lacks. With -endpoint they run there if
// the runtime has Strict groups.
func eachFeature(t *testing.T, test func(*testing.T, *node)) {
	if *endpoint == "" {
		eachShim(t, test)
		return
	}

	t.Parallel()
	n := endpointNode()
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	skipUnlessReported(t, s.GetFeatures().GetSupplementalGroupsPolicy(), "features beyond Docker's API")
	test(t, n)
}

// skipUnlessReported skips a test of a feature that the runtime at -endpoint does not report. Our
// own nodes must have every feature.
func skipUnlessReported(t *testing.T, reported bool, feature string) {
	t.Helper()
	if *endpoint != "" && !reported {
		t.Skipf("the runtime has no %s", feature)
	}
}

// eachEngine runs a test on a new engine of every version, started with additional dockerd flags.
// It starts no daemon.
func eachEngine(t *testing.T, test func(*testing.T, *node), flags ...string) {
	t.Parallel()
	skipAtEndpoint(t)

	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			test(t, newNode(t, v, flags...))
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

// eachAlone runs a test on a new node of every engine version or, before all parallel tests, on the
// runtime at -endpoint.
func eachAlone(t *testing.T, test func(*testing.T, *node)) {
	if *endpoint != "" {
		test(t, endpointNode())
		return
	}
	eachFresh(t, test)
}

// withDaemon starts another daemon on the engine of a node. A node has at most one running daemon.
func (n *node) withDaemon(t *testing.T, args ...string) *node {
	t.Helper()
	other := *n
	other.Daemon = n.private(t).Daemon(t, args...)

	return &other
}
