package conformance

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// TestEndpoint runs this suite on a socket, as with the runtime of another project. Tests without
// an engine of their own pass.
func TestEndpoint(t *testing.T) {
	pass := []string{"TestPodLifecycle", "TestContainerLifecycle", "TestListContainers", "TestProcess", "TestUser",
		"TestExecSync", "TestExecStream", "TestPidTarget", "TestUnknownIDs"}
	skip := []string{"TestOneShimPerPod", "TestCDI"}

	each(t, func(t *testing.T, n *node) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}

		out := n.run(t, self, "-test.v", "-endpoint=unix://"+n.Socket, "-image="+n.image,
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
