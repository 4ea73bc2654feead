package conformance

import (
	"context"
	"crypto/rand"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
	"cri-dockerd/test/peer"
)

// endpointNode connects to the runtime at -endpoint. With Docker it also uses the engine.
var endpointNode = sync.OnceValue(func() *node {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()

	n := &node{Daemon: engines.Connect(all, *endpoint), image: *shellImage, groups: "/critest" + rand.Text()[:8]}
	v, err := n.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		all.Fatalf("%s: %v", *endpoint, err)
	}

	if v.RuntimeName == "docker" {
		n.eng = engines.Attach(all, *dockerSocket)
		n.Daemon = n.eng.AttachedDaemon(all, strings.TrimPrefix(*endpoint, "unix://"), *runDir)
		n.groups = n.eng.CgroupParent
		n.unrelated = append(slices.Collect(maps.Keys(n.networkFiles())), n.unknownPins()...)
	}

	c, err := n.Runtime.RuntimeConfig(ctx, &runtimeapi.RuntimeConfigRequest{})
	n.slices = err == nil && c.GetLinux().GetCgroupDriver() == runtimeapi.CgroupDriver_SYSTEMD
	n.addImage(ctx)

	return n
})

// addImage provides the image of the tests.
func (n *node) addImage(ctx context.Context) {
	if n.image == "" && n.eng != nil {
		n.image = n.eng.ImportBusybox(all)
	}
	if n.image == "" {
		n.image = "busybox:latest"
	}

	spec := &runtimeapi.ImageSpec{Image: n.image}
	s, err := n.Image.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: spec})
	if err == nil && s.Image == nil {
		_, err = n.Image.PullImage(ctx, &runtimeapi.PullImageRequest{Image: spec})
	}

	if err != nil {
		all.Fatalf("%s: image %s: %v", *endpoint, n.image, err)
	}
}

// TestEndpoint runs this suite on a socket, as on a node in use. Tests pass if they do not stop or
// reconfigure the engine or the daemon.
func TestEndpoint(t *testing.T) {
	pass := []string{"TestPodLifecycle", "TestContainerLifecycle", "TestListContainers", "TestProcess", "TestUser",
		"TestExecSync", "TestExecStream", "TestPidTarget", "TestUnknownIDs", "TestCDI", "TestResources"}
	skip := []string{"TestOneShimPerPod", "TestReload"}

	each(t, func(t *testing.T, n *node) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}

		out := n.run(t, self, "-test.v", "-endpoint=unix://"+n.Socket, "-docker="+n.own(t).Socket,
			"-run-directory="+filepath.Dir(n.PinDir),
			"-test.run=^("+strings.Join(slices.Concat(pass, skip), "|")+")$")
		for _, name := range pass {
			if want := "--- PASS: " + name; !strings.Contains(out, want) {
				t.Errorf("output lacks %q:\n%s", want, out)
			}
		}

		for _, name := range skip {
			if want := "--- SKIP: " + name; !strings.Contains(out, want) {
				t.Errorf("output lacks %q:\n%s", want, out)
			}
		}
	})
}

var nodeTests = flag.String("node-tests",
	"TestVersion|TestCgroupParent|TestResources|TestHugepages|TestNestedGroups|TestStats$|TestMetrics$|TestOOMKilled",
	"tests of TestEndpointOfANode")

// foreignTimeout limits the tests of TestForeignRuntime.
const foreignTimeout = "10m"

var foreignTests = flag.String("foreign-tests",
	"^(TestPidTarget|TestProcess|TestStrictGroups|TestLimitsOfTheFirstProcess|TestUserNamespace|"+
		"TestUserNamespaceVolumes|TestUserNamespaceRules|TestCheckpoint)$", "tests of TestForeignRuntime")

// nodeNetwork is a pod network with the standard plugins.
const nodeNetwork = `{"cniVersion": "1.0.0", "name": "test", "plugins": [
	{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
		"ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
	{"type": "portmap", "capabilities": {"portMappings": true}}]}`

// TestEndpointOfANode runs this suite on the socket of a node with the package, its units, and the
// systemd cgroup driver. Only tests that stop or reconfigure the engine or the daemon may be
// skipped.
func TestEndpointOfANode(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)
	runInNode(t, nodes.StartWithDaemon(t, nodes.Config{
		Driver: "systemd",
		Files:  map[string]string{"/etc/cni/net.d/10-test.conflist": nodeNetwork},
	}), *nodeTests)
}

// TestShimOfANode runs tests on a node with the package, the systemd cgroup driver and pods under
// the containerd shim.
func TestShimOfANode(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)
	n := nodes.StartWithDaemon(t, nodes.Config{
		Engine: engines.V29,
		Driver: "systemd",
		Files:  map[string]string{"/etc/cni/net.d/10-test.conflist": nodeNetwork},
	})
	n.Run(t, "sh", "-c", "echo CRI_DOCKERD_OPTS=--containers=shim > /etc/default/cri-docker")
	n.Run(t, "systemctl", "restart", "cri-docker")
	runInNode(t, n, "^(TestPodLifecycle|TestContainerLifecycle|TestProcess|TestUser|TestExecSync|TestPidTarget|"+
		"TestResources|TestCgroupParent|TestGroupsOfThePause|TestPodsDuringReexec|TestOOM.*|TestShimIsUsed)$")
}

// TestForeignRuntime runs tests on containerd's CRI. They follow the text of the CRI only, so a
// wrong expectation fails there, too.
func TestForeignRuntime(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)
	n := newNode(t, engines.V29)
	p := peer.Start(t.Context(), t, n.eng)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}

	out, err := n.eng.Command(self, "-test.v", "-test.timeout="+foreignTimeout, "-endpoint=unix://"+p.Socket,
		"-image="+p.Busybox, "-test.run="+*foreignTests).CombinedOutput()
	t.Logf("%s", out)
	if err != nil || !strings.Contains(string(out), "--- PASS: ") {
		t.Errorf("tests on containerd's CRI: %v", err)
	}
}

// TestShimIsUsed checks that pods run under the shim exactly if Status has its condition. It also
// runs on the runtime at -endpoint.
func TestShimIsUsed(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}

		wants := slices.ContainsFunc(s.GetStatus().GetConditions(), func(c *runtimeapi.RuntimeCondition) bool {
			return c.Type == "ContainerdShim" && c.Status
		})
		if got := n.usesShim(t, pod); got != wants {
			t.Errorf("pod under the shim: %v, condition ContainerdShim: %v", got, wants)
		}
		if wants {
			n.assertRuncDoesNotKnow(t, pod)
		}
	})
}

// runInNode runs tests of this suite on the socket of a node.
func runInNode(t *testing.T, n *nodes.Node, tests string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}

	n.Copy(t, self, "/tmp/conformance.test")
	// One test at a time: while other slices come and go, systemd on cgroup v1 may remove the
	// groups that runc is creating in a slice.
	out, err := n.Try("/tmp/conformance.test", "-test.v", "-test.timeout=3h", "-test.parallel=1",
		"-endpoint="+nodes.Endpoint, "-test.run="+tests)
	t.Log(out)
	if err != nil {
		t.Error(err)
	}

	if skipped, want := strings.Count(out, "--- SKIP: "), strings.Count(out, needsPrivate); skipped != want {
		t.Errorf("%d tests were skipped, want only the %d that need an engine of their own", skipped, want)
	}
	if !strings.Contains(out, "--- PASS: ") {
		t.Error("no test ran")
	}
}
