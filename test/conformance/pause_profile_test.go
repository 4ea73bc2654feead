package conformance

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPauseProfile runs pods with the default seccomp profile, as every kubelet requests it for
// sandboxes. The pause process gets the stricter profile of its image in both modes of network
// namespaces, and does all its work under it: it joins a namespace, switches users and reaps
// processes.
func TestPauseProfile(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		pods := map[string]func(*runtimeapi.LinuxSandboxSecurityContext){
			"plain": func(*runtimeapi.LinuxSandboxSecurityContext) {},
			"user and groups": func(sc *runtimeapi.LinuxSandboxSecurityContext) {
				sc.RunAsUser, sc.RunAsGroup = &runtimeapi.Int64Value{Value: 1000}, &runtimeapi.Int64Value{Value: 1001}
				sc.SupplementalGroups = []int64{1002, 1003}
			},
			"shared PIDs": func(sc *runtimeapi.LinuxSandboxSecurityContext) {
				sc.NamespaceOptions = &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}
			},
			"host network": func(sc *runtimeapi.LinuxSandboxSecurityContext) {
				sc.NamespaceOptions = &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}
			},
		}
		for _, mode := range []string{"own", "engine"} {
			n.Change(t, "--pod-netns="+mode)
			n.AwaitReady(t)
			for name, change := range pods {
				t.Run(mode+"/"+name, func(t *testing.T) { pauseProfile(t, n, change) })
			}
		}
	})
}

func pauseProfile(t *testing.T, n *node, change func(*runtimeapi.LinuxSandboxSecurityContext)) {
	cfg := n.podConfig(t)
	sc := cfg.Linux.SecurityContext
	sc.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
	change(sc)
	pod := n.runPod(t, cfg)

	if opts := n.inspect(t, pod, ".HostConfig.SecurityOpt"); !strings.Contains(opts, "rt_sigtimedwait") {
		t.Errorf("the pause container lacks its profile: %s", opts)
	}
	if mode := n.procStatus(t, pod, "Seccomp"); mode != "2" {
		t.Errorf("seccomp mode %s, want 2", mode)
	}

	hostNetwork := sc.GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
	if st := n.podStatus(t, pod); st.State != runtimeapi.PodSandboxState_SANDBOX_READY ||
		(st.Network.GetIp() == "") != hostNetwork {
		t.Errorf("status %v", st)
	}

	if user := sc.GetRunAsUser().GetValue(); user != 0 {
		if uid := n.procStatus(t, pod, "Uid"); uid != "1000 1000 1000 1000" {
			t.Errorf("user IDs %s of the pause process", uid)
		}
		if groups := n.procStatus(t, pod, "Groups"); !strings.Contains(groups, "1002 1003") {
			t.Errorf("groups %s of the pause process", groups)
		}
	}

	// An orphan of the container becomes a child of the pause process, which reaps it.
	c := n.startConfig(t, pod, cfg, n.containerConfig(sh("(sleep 0.1 &); sleep 1000")))
	if sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_POD {
		eventually(t, "the pause process to reap the orphan", func() bool {
			return !strings.Contains(n.exec(t, c, "ps"), "Z")
		})
	}

	n.removePod(t, pod)
	n.assertNoLeftovers(t, cfg)
}
