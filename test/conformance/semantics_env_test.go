package conformance

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestEnvironmentOfOtherBytes creates containers with environment values. A value that is not UTF-8
// is refused with the name of its field, since Docker's API cannot carry it; every other one
// arrives.
func TestEnvironmentOfOtherBytes(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Envs = []*runtimeapi.KeyValue{{Key: "GOOD", Value: []byte("ä=b c\n")}, {Key: "BAD", Value: []byte("a\xff")}}
		_, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
			PodSandboxId:  pod,
			Config:        cc,
			SandboxConfig: cfg,
		})
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "envs[1].value") ||
			!strings.Contains(err.Error(), "BAD") {
			t.Errorf("%v, want InvalidArgument with the field and the variable", err)
		}

		cc.Envs = cc.Envs[:1]
		id := n.startConfig(t, pod, cfg, cc)
		if got := n.exec(t, id, "sh", "-c", `printf %s "$GOOD"`); got != "ä=b c\n" {
			t.Errorf("value %q", got)
		}
	})
}
