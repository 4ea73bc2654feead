package conformance

import (
	"path/filepath"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestProcMount uses the path lists of procMount Default, and the empty ones of Unmasked. A runtime
// must not use its own lists instead (CRI LinuxContainerSecurityContext.masked_paths,
// readonly_paths).
func TestProcMount(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		procMounts := func(name string, masked, readonly []string) string {
			cc := n.containerConfig(sh("sleep 1000"))
			cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
			cc.Linux.SecurityContext.MaskedPaths, cc.Linux.SecurityContext.ReadonlyPaths = masked, readonly
			c := n.startConfig(t, pod, cfg, cc)
			return n.exec(t, c, "sh", "-c", "head -c 5 /proc/version; echo; "+
				"awk '$2 ~ \"^/proc/\" {print $2}' /proc/mounts | sort")
		}

		got := procMounts("default", []string{"/proc/version"}, []string{"/proc/sys"})
		if got != "\n/proc/sys\n/proc/version\n" {
			t.Errorf("procMount Default: %q", got)
		}

		if got := procMounts("unmasked", nil, nil); got != "Linux\n" {
			t.Errorf("procMount Unmasked: %q", got)
		}
	})
}

// capabilities returns the bounding set of a container in hexadecimal.
func (n *node) capabilities(
	t *testing.T, pod string, cfg *runtimeapi.PodSandboxConfig, name string, add, drop []string,
) string {
	t.Helper()
	cc := n.containerConfig(sh("sleep 1000"))
	cc.Metadata.Name, cc.LogPath = name, name+"_0.log"
	cc.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: add, DropCapabilities: drop}
	id := n.startConfig(t, pod, cfg, cc)

	return strings.TrimSpace(n.exec(t, id, "sh", "-c", "grep CapBnd /proc/1/status | cut -f2"))
}

// TestCapabilities checks added and dropped capabilities, including ALL.
func TestCapabilities(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		if got := n.capabilities(t, pod, cfg, "none", nil, []string{"ALL"}); got != "0000000000000000" {
			t.Errorf("drop ALL: %s", got)
		}

		two := n.capabilities(t, pod, cfg, "two", []string{"NET_ADMIN", "CAP_KILL"}, []string{"ALL"})
		if two != "0000000000001020" {
			t.Errorf("drop ALL, add NET_ADMIN and KILL: %s", two)
		}

		all := n.capabilities(t, pod, cfg, "all", []string{"ALL"}, nil)
		butChown := n.capabilities(t, pod, cfg, "butchown", []string{"ALL"}, []string{"CHOWN"})
		if !strings.HasSuffix(all, "f") || butChown != strings.TrimSuffix(all, "f")+"e" {
			t.Errorf("add ALL: %s; add ALL, drop CHOWN: %s", all, butChown)
		}

		cc := n.containerConfig(sh("true"))
		cc.Linux.SecurityContext.Capabilities = &runtimeapi.Capability{AddCapabilities: []string{"NO_SUCH"}}
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "NO_SUCH")
	})
}

// TestSupplementalGroups adds groups to those of the image's user (policy Merge). Policy Strict
// would replace them; Docker cannot, so it is refused.
func TestSupplementalGroups(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.own(t) // the imported image has the user
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

		if n.usesShim(t, pod) {
			return // TestStrictGroups
		}

		s, err := n.Runtime.Status(t.Context(), &runtimeapi.StatusRequest{})
		if err != nil || s.Features == nil || s.Features.SupplementalGroupsPolicy {
			t.Errorf("features: %v, %v", s.GetFeatures(), err)
		}

		cc.Metadata.Name = "strict"
		cc.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "supplemental_groups_policy")
		strict := n.podConfig(t)
		strict.Linux.SecurityContext.SupplementalGroupsPolicy = runtimeapi.SupplementalGroupsPolicy_Strict
		_, err = n.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: strict})
		assertInvalidArgument(t, err, "supplemental_groups_policy")
		n.assertNoLeftovers(t, strict)
	})
}

// TestMissingSeccompProfile uses a missing local profile.
func TestMissingSeccompProfile(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		cc := n.containerConfig(sh("true"))
		missing := filepath.Join(n.tempDir(t), "missing.json")
		cc.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{
			ProfileType:  runtimeapi.SecurityProfile_Localhost,
			LocalhostRef: missing,
		}

		assertInvalidArgument(t, n.createErr(t, pod, cfg, cc), "seccomp profile: open "+missing)
	})
}

// TestNoNewPrivilegesOfTheEngine checks that a container's setting overrides the engine's default.
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
			t.Run(name, func(t *testing.T) {
				cc := n.containerConfig(sh("sleep 1000"))
				cc.Metadata.Name = name
				cc.Linux.SecurityContext.NoNewPrivs = c.noNewPrivs
				id := n.startConfig(t, pod, cfg, cc)
				// The first file is of the container, the second of the exec.
				for _, file := range []string{"/proc/1/status", "/proc/self/status"} {
					got := n.exec(t, id, "sed", "-n", `s/^NoNewPrivs:\s*//p`, file)
					if strings.TrimSpace(got) != c.want {
						t.Errorf("%s: NoNewPrivs %q, want %s", file, got, c.want)
					}
				}
			})
		}
	}, "--no-new-privileges")
}
