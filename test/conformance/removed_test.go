package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestSandboxRemovedWithDocker removes a sandbox with docker. The daemon releases the pod's network
// without a restart or another call.
func TestSandboxRemovedWithDocker(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		sandbox := n.runPod(t, n.podConfig(t))
		if held := n.networkOf(sandbox); len(held) < 2 {
			t.Fatalf("running pod holds %q, want its namespace and its address", held)
		}

		n.docker(t, "rm", "-f", sandbox)
		eventually(t, "release of the network", func() bool { return len(n.networkOf(sandbox)) == 0 })
	})
}

// networkOf returns the pinned namespace and the address reservations of a sandbox.
func (n *node) networkOf(sandbox string) (held []string) {
	if _, err := os.Lstat(n.eng.Path(filepath.Join(n.PinDir, sandbox))); err == nil {
		held = append(held, sandbox)
	}

	leases, _ := filepath.Glob(n.eng.Path(filepath.Join(n.LeaseDir, "*", "10.*")))
	for _, lease := range leases {
		if owner, err := os.ReadFile(lease); err == nil && strings.HasPrefix(string(owner), sandbox) {
			held = append(held, lease)
		}
	}

	return held
}

// TestTornReservation has an address reservation without an owner, as after a crash of host-local
// or the node. The daemon releases the address at its start.
func TestTornReservation(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		n.runPod(t, n.podConfig(t))
		leases, _ := filepath.Glob(n.eng.Path(filepath.Join(n.LeaseDir, "*", "10.*")))
		if len(leases) == 0 {
			t.Fatal("no address is reserved")
		}

		torn := filepath.Join(filepath.Dir(leases[0]), "10.99.99.99")
		if err := os.WriteFile(torn, nil, 0o600); err != nil {
			t.Fatal(err)
		}

		n.Kill(t)
		n.Restart(t)
		eventually(t, "release of the address", func() bool {
			_, err := os.Lstat(torn)
			return os.IsNotExist(err)
		})

		if _, err := os.Lstat(leases[0]); err != nil {
			t.Errorf("address of the running pod: %v", err)
		}
	})
}
