package conformance

import (
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestProcMount: the kubelet sends the lists of procMount Default, and empty ones for Unmasked; a
// runtime must not put its own in their place (CRI LinuxContainerSecurityContext.masked_paths,
// readonly_paths).
func TestProcMount(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		look := func(name string, masked, readonly []string) string {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
			cc.Linux.SecurityContext.MaskedPaths, cc.Linux.SecurityContext.ReadonlyPaths = masked, readonly
			c := n.startConfig(t, pod, cfg, cc)
			return n.exec(t, c, "sh", "-c", "head -c 5 /proc/version; echo; awk '$2 ~ \"^/proc/\" {print $2}' "+
				"/proc/mounts | sort")
		}
		if got := look("default", []string{"/proc/version"}, []string{"/proc/sys"}); got !=
			"\n/proc/sys\n/proc/version\n" {
			t.Errorf("the given lists: %q", got)
		}

		if got := look("unmasked", nil, nil); got != "Linux\n" {
			t.Errorf("procMount Unmasked: %q", got)
		}
	})
}

// capabilities is the bounding set of a container, in hexadecimal.
func (n *node) capabilities(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string, add, drop []string,
) string {
	t.Helper()
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	cc.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: add, DropCapabilities: drop}
	return strings.TrimSpace(n.exec(t, n.startConfig(t, pod, cfg, cc), "sh", "-c",
		"grep CapBnd /proc/1/status | cut -f2"))
}

func TestCapabilities(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		if got := n.capabilities(t, pod, cfg, "none", nil, []string{"ALL"}); got != "0000000000000000" {
			t.Errorf("drop ALL: %s", got)
		}

		if got := n.capabilities(t, pod, cfg, "two", []string{"NET_ADMIN", "CAP_KILL"}, []string{"ALL"}); got !=
			"0000000000001020" {
			t.Errorf("drop ALL, add NET_ADMIN and KILL: %s", got)
		}

		all := n.capabilities(t, pod, cfg, "all", []string{"ALL"}, nil)
		butChown := n.capabilities(t, pod, cfg, "butchown", []string{"ALL"}, []string{"CHOWN"})
		if !strings.HasSuffix(all, "f") || butChown != strings.TrimSuffix(all, "f")+"e" {
			t.Errorf("add ALL: %s, and drop CHOWN: %s", all, butChown)
		}

		cc := n.containerConfig(sh("true"))
		cc.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NO_SUCH"}}
		if err := n.createErr(t, pod, cfg, cc); err == nil {
			t.Error("a capability that does not exist was accepted")
		}
	})
}

// TestSupplementalGroups: Merge adds to the groups that the image gives the user; Strict would
// replace them, which Docker cannot.
func TestSupplementalGroups(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t) // its image has the user
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("sleep 1000"))
		cc.Linux.SecurityContext.RunAsUsername = "app"
		cc.Linux.SecurityContext.SupplementalGroups = []int64{1234}
		c := n.startConfig(t, pod, cfg, cc)
		got := n.exec(t, c, "grep", "-E", "^(Uid|Gid|Groups)", "/proc/1/status")
		for _, want := range []string{"Uid:\t1000", "Gid:\t1000", "1234", "7777"} {
			if !strings.Contains(got, want) {
				t.Errorf("the process lacks %q:\n%s", want, got)
			}
		}

		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		if err != nil || s.Features == nil || s.Features.SupplementalGroupsPolicy {
			t.Errorf("features: %v, %v", s.GetFeatures(), err)
		}

		cc.Metadata.Name = "strict"
		cc.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		refused(t, n.createErr(t, pod, cfg, cc), "supplemental_groups_policy")
		strict := n.podConfig(t)
		strict.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		_, err = n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: strict})
		refused(t, err, "supplemental_groups_policy")
		n.assertNothingLeft(t, strict)
	})
}

// TestAppArmor: on a node without AppArmor a container with a profile must not start without it;
// the profiles that mean nothing there do no harm. Both fields count, the one of 1.30 and the
// string before.
func TestAppArmor(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		has := strings.Contains(n.docker(t, "info", "-f", "{{.SecurityOptions}}"), "apparmor")
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for i, sc := range []*runtimeapi.LinuxContainerSecurityContext{
			{
				Apparmor: &runtimeapi.SecurityProfile{
					ProfileType:  runtimeapi.SecurityProfile_Localhost,
					LocalhostRef: "own",
				},
			},
			{ApparmorProfile: "localhost/own"}, //nolint:staticcheck // kubelets before 1.30 send only this
		} {
			cc := n.containerConfig(sh("true"))
			cc.Linux.SecurityContext = sc
			cc.Metadata.Name = "own" + string(rune('0'+i))
			r, err := n.Runtime.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{
				PodSandboxId:  pod,
				Config:        cc,
				SandboxConfig: cfg,
			})
			if has && err == nil { // the profile is not loaded, as the engine finds
				_, err = n.Runtime.StartContainer(t.Context(),
					&runtimeapi.StartContainerRequest{ContainerId: r.ContainerId})
			} else {
				refused(t, err, "config.linux.security_context.apparmor")
			}

			if err == nil || !strings.Contains(err.Error(), "own") {
				t.Errorf("%d: the error does not name the profile: %v", i, err)
			}
		}

		for i, sc := range []*runtimeapi.LinuxContainerSecurityContext{
			{Apparmor: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}},
			{ApparmorProfile: "runtime/default"}, //nolint:staticcheck // kubelets before 1.30 send only this
		} {
			cc := n.containerConfig(sh("true"))
			cc.Metadata.Name, cc.LogPath = "plain"+string(rune('0'+i)), ""
			cc.Linux.SecurityContext = sc
			n.startConfig(t, pod, cfg, cc)
		}
	})
}

func TestSeccompProfileThatIsNotThere(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("true"))
		missing := filepath.Join(n.tempDir(t), "missing.json")
		cc.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{
			ProfileType:  runtimeapi.SecurityProfile_Localhost,
			LocalhostRef: missing,
		}
		if err := n.createErr(t, pod, cfg, cc); err == nil || !strings.Contains(err.Error(), "missing.json") {
			t.Errorf("a profile that is not there: %v", err)
		}
	})
}

// TestNoNewPrivilegesOfTheEngine: a container's own setting wins over the engine's default.
func TestNoNewPrivilegesOfTheEngine(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		n.Daemon = n.eng.Daemon(t)
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		for name, c := range map[string]struct {
			noNewPrivs bool
			want       string
		}{
			"allowed": {noNewPrivs: false, want: "0"},
			"denied":  {noNewPrivs: true, want: "1"},
		} {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name = name
			cc.Linux.SecurityContext.NoNewPrivs = c.noNewPrivs
			id := n.startConfig(t, pod, cfg, cc)
			for _, file := range []string{"/proc/1/status", "/proc/self/status"} { // the container's and exec's
				if got := n.exec(t, id, "sed", "-n", `s/^NoNewPrivs:\s*//p`, file); strings.TrimSpace(got) != c.want {
					t.Errorf("%s, %s: NoNewPrivs %q, want %s", name, file, got, c.want)
				}
			}
		}
	}, "--no-new-privileges")
}
