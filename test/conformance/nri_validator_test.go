package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestNRIValidator refuses adjustments by the rules of NRI's default validator. Nothing remains of
// the container, and the same container without the adjustment runs.
func TestNRIValidator(t *testing.T) {
	file := filepath.Join(t.TempDir(), "validator.yaml")
	rules := "enable: true\nrejectOCIHookAdjustment: true\nrejectRuntimeDefaultSeccompAdjustment: true\n"
	if err := os.WriteFile(file, []byte(rules), 0o644); err != nil {
		t.Fatal(err)
	}

	eachNRI(t, func(t *testing.T, n *node) {
		hook := &api.ContainerAdjustment{}
		hook.AddHooks(&api.Hooks{Poststart: []*api.Hook{{Path: "/bin/true"}}})
		seccomp := &api.ContainerAdjustment{}
		seccomp.SetLinuxSeccompPolicy(&api.LinuxSeccomp{DefaultAction: "SCMP_ACT_ALLOW"})

		var a *api.ContainerAdjustment
		p := newPlugin(10, "refused")
		p.onCreate = func(*api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return a, nil, nil
		}
		p.connect(t, n)

		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext = &runtimeapi.LinuxContainerSecurityContext{
			Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		}
		create := &runtimeapi.CreateContainerRequest{PodSandboxId: pod, Config: cc, SandboxConfig: cfg}
		for want, adjust := range map[string]*api.ContainerAdjustment{"OCI hook": hook, "seccomp": seccomp} {
			a = adjust
			_, err := n.Runtime.CreateContainer(t.Context(), create)
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), want) ||
				!strings.Contains(err.Error(), "10-refused") {
				t.Errorf("error %v, want FailedPrecondition for %q of 10-refused", err, want)
			}
			if out := n.docker(t, "ps", "-aq", "--filter", "name=_"+cc.Metadata.Name+"_"); out != "" {
				t.Errorf("remaining containers: %s", out)
			}
		}

		a = nil
		n.startConfig(t, pod, cfg, cc)
		n.stopPod(t, pod)
		n.removePod(t, pod)
		n.assertNoLeftovers(t, cfg)
		n.assertNoAdjustments(t)
	}, "--nri-validator-config="+file)
}
