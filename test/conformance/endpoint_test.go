package conformance

import (
	"os"
	"strings"
	"testing"
)

// TestEndpoint points this suite at a socket, as a stranger would with a runtime of any kind: what
// needs no engine of its own passes.
func TestEndpoint(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}

		out := n.run(t, self, "-test.v", "-endpoint=unix://"+n.Socket, "-image="+n.image,
			"-test.run=^(TestPodLife|TestContainerLife|TestListContainers|TestProcess|TestUser|TestExecSync|TestExecStream|TestPidTarget|TestUnknownIDs|TestOneShimPerPod|TestCDI)$")
		for _, want := range []string{"PASS: TestPodLife", "PASS: TestContainerLife", "PASS: TestListContainers",
			"PASS: TestProcess", "PASS: TestUser",
			"PASS: TestExecSync", "PASS: TestExecStream", "PASS: TestPidTarget", "PASS: TestUnknownIDs",
			"SKIP: TestOneShimPerPod", "SKIP: TestCDI"} {
			if !strings.Contains(out, "--- "+want) {
				t.Errorf("no %q in:\n%s", want, out)
			}
		}
	})
}
