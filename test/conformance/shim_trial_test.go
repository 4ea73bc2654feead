package conformance

import (
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/translate"
	"cri-dockerd/test/engines"
	breaker "cri-dockerd/test/proxy"
)

// TestHangingShimTrial has the engine hang while it creates the trial container of the shim. The
// node is ready, and a new pod runs without the shim after a bounded wait, and without a wait once
// the trial has timed out. When the engine responds, new pods run under the shim, and nothing
// remains of the trials.
func TestHangingShimTrial(t *testing.T) {
	t.Parallel()
	skipAtEndpoint(t)

	const wait = 10 * time.Second // of a new pod
	n := newNode(t, engines.V29)
	p := breaker.Start(t, filepath.Join(n.tempDir(t), "proxy.sock"), n.eng.Socket)
	n = n.withDaemon(t, "--containers=auto", "--docker-endpoint=unix://"+p.Socket)
	n.Kill(t)
	p.Break(func(r *http.Request) breaker.Fault {
		return breaker.Fault{Hang: r.URL.Query().Get("name") == translate.ShimTrialName}
	})
	n.Start(t)
	eventually(t, "the node is ready", func() bool {
		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		return err == nil && s.Status.Conditions[0].Status
	})

	cfg := n.podConfig(t)
	begin := time.Now()
	without := n.runPod(t, cfg)
	if took := time.Since(begin); took < wait/2 || took > scaled(2*wait) {
		t.Errorf("RunPodSandbox took %s, want the wait of %s", took, wait)
	}
	if c := n.condition(t, "ContainerdShim"); c.Status || c.Reason == "CreatedByEngine" || n.usesShim(t, without) {
		t.Errorf("during the trial: condition %v, pod under the shim: %v", c, n.usesShim(t, without))
	}

	// A kubelet would reject a Strict pod for good without the feature, and repeats a refused call.
	s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil || !s.GetFeatures().GetSupplementalGroupsPolicy() {
		t.Errorf("features during the trial: %v, %v", s.GetFeatures(), err)
	}
	strict := n.podConfig(t)
	strict.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
	_, err = n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: strict})
	assertInvalidArgument(t, err, "supplemental_groups_policy")

	id := n.start(t, without, cfg, sh("sleep 1000"))
	n.exec(t, id, "true")
	eventually(t, "the trial is overdue", func() bool {
		return n.condition(t, "ContainerdShim").Reason == "Overdue"
	})
	begin = time.Now()
	n.removePod(t, n.runPod(t, n.podConfig(t)))
	if took := time.Since(begin); took > scaled(wait/2) {
		t.Errorf("RunPodSandbox and its removal took %s after the first trial, want no wait for the next one", took)
	}

	p.Break(nil)
	if !within(time.Minute, func() bool { return n.condition(t, "ContainerdShim").Status }) { // the next trial
		t.Fatal("no trial has ended within a minute")
	}

	other := n.podConfig(t)
	with := n.runPod(t, other)
	if !n.usesShim(t, with) {
		t.Error("a pod after the trial is not under the shim")
	}

	n.start(t, with, other, sh("sleep 1000"))
	n.removePod(t, n.runPod(t, strict))
	n.removePod(t, without)
	n.removePod(t, with)
	n.assertNoLeftovers(t, cfg)
	n.assertNoLeftovers(t, other)
	if names := n.docker(t, "ps", "-a", "--format", "{{.Names}}"); strings.Contains(names, "trial") {
		t.Errorf("containers of trials remain: %s", names)
	}
}
