package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// disk returns the device file and the numbers of a block device that the kernel has.
func disk(t *testing.T) (file, numbers string) {
	t.Helper()
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		t.Fatal(err)
	}

	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join("/sys/block", e.Name(), "dev"))
		file := filepath.Join("/dev", e.Name())
		if _, statErr := os.Stat(file); err == nil && statErr == nil {
			return file, strings.TrimSpace(string(b))
		}
	}
	t.Fatal("the machine has no block device")

	return "", ""
}

// TestNRIBlockIO sets a class of block I/O: the kernel has its limit. An unknown class fails with
// the name of the plugin.
func TestNRIBlockIO(t *testing.T) {
	device, numbers := disk(t)
	file := filepath.Join(t.TempDir(), "blockio.yaml")
	classes := "Classes:\n  slow:\n    - Devices: [" + device + "]\n      ThrottleReadBps: 50M\n"
	if err := os.WriteFile(file, []byte(classes), 0o644); err != nil {
		t.Fatal(err)
	}

	eachNRI(t, func(t *testing.T, n *node) {
		class := "unknown"
		p := newPlugin(10, "blockio")
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			a := &api.ContainerAdjustment{}
			a.SetLinuxBlockIOClass(class)
			return a, nil, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		create := &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc, SandboxConfig: cfg}
		assertRefused := func(want string) {
			_, err := n.Runtime.CreateContainer(t.Context(), create)
			if err == nil || !strings.Contains(err.Error(), "block I/O class (by plugin 10-blockio)") ||
				!strings.Contains(err.Error(), want) {
				t.Errorf("class %s: %v, want a refusal with %q", class, err, want)
			}
		}
		assertRefused(`"unknown" is not a class`)

		class = "slow"
		if !n.usesShim(t, pod) {
			assertRefused("containerd shim")
			return
		}

		c := n.startConfig(t, pod, cfg, cc)
		got := n.readCgroup(t, c, "blkio/blkio.throttle.read_bps_device", "io.max")
		if !strings.HasPrefix(got, numbers+" ") || !strings.Contains(got, "50000000") {
			t.Errorf("limit of %s: %q, want 50000000 for %s", device, got, numbers)
		}
	}, "--nri-blockio-config="+file)
}
